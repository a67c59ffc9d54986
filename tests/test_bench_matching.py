"""Teacher forcing and generating agree, and demonstrations read once give the losses of those read for each."""

from helpers import generate
from workbench.bench import random_base
from workbench.bench.matching import EACH, ONCE, OURS, lines, written
from workbench.bench.population import random_rows


def test_lines():
    found = list(lines("nano", "cpu", quick=True))
    works = list(dict.fromkeys(line.work for line in found))
    assert [sum(line.work == work for line in found) for work in works] == [2, 2, 2]
    assert [line.way for line in found if line.work == works[-1]] == [EACH, ONCE]
    assert all(line.timing.seconds > 0 for line in found)
    assert [line.against for line in found if line.way == OURS] == ["generate, batches of 6", "generate, batches of 4"]
    assert all(line.error == 0 for line in found if line.way == OURS)
    assert found[-1].error < 1e-4


def test_what_is_written_in_batches_is_what_each_prompt_gets():
    base = random_base("nano", layers=2)
    prompts = [row.prompt for row in random_rows(base, 5, 9, 1)]
    want = generate(base, prompts, 6)
    for batch in (1, 2, 5):
        assert written(base, prompts, 6, batch) == want
