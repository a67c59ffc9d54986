"""`workbench merge`, `adapt`, `evaluate`, `forge` and `lab`: what they write, print and refuse, and what the shell completes."""

import json
import signal
import subprocess
import sys
from dataclasses import replace
from functools import cache

import pandas as pd
import pytest
import torch
from typer.testing import CliRunner

import workbench as wb
from helpers import hook_logits, peft_logits, relative, some_ids
from workbench.adapt import ADAPTIVE
from workbench.adapt.progress import Bar
from workbench.beside import ADAPTER, try_adapter
from workbench.cli import app, completion
from workbench.cli.given import words
from workbench.cli.make import _weights
from workbench.cli.shared import options_of
from workbench.compose import compose, grouped
from workbench.controls import MATCHES, random_like
from workbench.errors import MergeError, TaskError
from workbench.merge import methods
from workbench.nano import forge as forging
from workbench.nano.shelf import NAME, bundled
from workbench.select import SELECTIONS
from workbench.trial import BASE, CONTROL, NEW

NAMES = ("second-digits", "sort-animals-quotes")
TASK = "nano/rotate-right-months"
SIZES = ("--n-train", "4", "--n-validation", "3")
FEW = {"n_train": 4, "n_validation": 3}


def called(*arguments, **more):
    return CliRunner().invoke(app, [str(one) for one in arguments], **more)


def fine(*arguments):
    result = called(*arguments)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module", autouse=True)
def opened_once():
    """The bundled pool and its base, which every command here would open again, stay open."""
    with pytest.MonkeyPatch.context() as patch:
        for kind, name in ((wb.Pool, "open"), (wb.Base, "load")):
            patch.setattr(kind, name, cache(getattr(kind, name)))
        yield


@pytest.fixture(scope="module")
def nano(opened_once):
    pool = wb.Pool.open("nano")
    return wb.Base.load(pool.base, device=None), pool


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A merge made by the command, and what it printed."""
    out = tmp_path_factory.mktemp("merged") / "ties"
    more = (
        "--names",
        ",".join(NAMES),
        "--weights",
        "1,-0.5",
        "--rank",
        4,
        "-o",
        "density=0.3",
        "-o",
        "elect=frequency",
    )
    return out, fine("merge", "nano", "ties", "--out", out, *more)


def test_merge_writes_what_merge_returns_and_plain_peft_loads(merged, nano):
    out, printed = merged
    base, pool = nano
    want = wb.merge(pool.stack(NAMES), "ties", weights=[1, -0.5], rank=4, density=0.3, elect="frequency")
    read = wb.Adapter.load(out)
    assert list(read.modules) == list(want.modules)
    for module, factors in want.modules.items():
        assert torch.equal(read.modules[module].delta(), factors.delta())
    ids = some_ids(base)
    assert relative(peft_logits(base, out, ids), hook_logits(base, want, ids)) < 1e-5
    assert relative(hook_logits(base, want, ids), base.model(input_ids=ids).logits) > 1e-3
    card = (out / "README.md").read_text()
    worst = max(want.info["error"], key=want.info["error"].get)
    for text in (printed, card):
        assert f"{want.info['error'][worst]:.3g}" in text
        assert all(name in text for name in NAMES)
    assert "rank 4 in 28 modules" in printed
    assert f"workbench evaluate {out} TASK" in printed


def test_merge_of_a_whole_pool_as_json(tmp_path, nano):
    told = json.loads(fine("merge", "nano", "average", "--out", tmp_path / "all", "--json"))
    want = wb.merge(nano[1], "average")
    assert told["sources"] == want.info["sources"]
    assert len(told["sources"]) == 72
    assert (told["rank"], told["modules"], told["method"], told["error"]) == (want.rank, 28, "average", {})
    assert told["digest"] == want.digest()
    assert told["norm"] == pytest.approx(want.norm())


def test_merge_of_selected_adapters_and_one_that_needs_examples(tmp_path, nano):
    base, pool = nano
    told = json.loads(
        fine("merge", "nano", "sum", "--select", "random", "-k", 3, "--seed", 5, "--out", tmp_path / "a", "--json")
    )
    assert list(told["sources"]) == list(pool.select("random", 3, seed=5).names)
    told = json.loads(fine("merge", "nano", "regmean", "--names", ",".join(NAMES), "--out", tmp_path / "b", "--json"))
    stack = pool.stack(NAMES)
    want = wb.merge(stack, "regmean", statistics=wb.merge.collect(base, stack, wb.tasks.upstream(NAMES, 16)))
    got = wb.Adapter.load(tmp_path / "b")
    assert all(relative(got.modules[m].delta(), f.delta()) < 1e-4 for m, f in want.modules.items())


def test_a_folder_in_use_is_kept_unless_told_otherwise(tmp_path):
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "thesis.txt").write_text("mine")
    arguments = ("merge", "nano", "sum", "--names", ",".join(NAMES))
    first = fine(*arguments, "--out", tmp_path / "a")
    again = called(*arguments, "--out", tmp_path / "a", "--scale", 2)
    assert (again.exit_code, again.stdout) == (1, "")
    assert "exists already" in again.stderr
    assert fine(*arguments, "--out", tmp_path / "a", "--scale", 2, "--overwrite") != first
    assert called(*arguments, "--out", tmp_path / "own", "--overwrite").exit_code == 1
    assert (tmp_path / "own" / "thesis.txt").read_text() == "mine"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("merge", "nano", "tise"), "did you mean 'ties'"),
        (("merge", "nano", "ties"), "add a rank, such as --rank 16"),
        (("merge", "nano", "ties", "--rank", "0"), "greater than or equal to 1"),
        (("merge", "nano", "ties", "--rank", "2", "-o", "densty=1"), "did you mean 'density'"),
        (
            ("merge", "nano", "ties", "--rank", "2", "-o", "density=2"),
            "density is 2, expected a finite number in [0, 1]",
        ),
        (("merge", "nano", "ties", "-o", "rank=2"), "use --rank"),
        (("merge", "nano", "ties", "-o", "density"), "name=value"),
        (("merge", "nano", "sum", "--names", "nobody"), "no adapter 'nobody'"),
        (("merge", "nano", "sum", "--names", "a", "--select", "random"), "exclude each other"),
        (("merge", "nano", "sum", "--select", "randm"), "did you mean random"),
        (("merge", "nano", "sum", "--select", "random", "-k", "73"), "has 72"),
        (("merge", "nano", "sum", "--select", "evaluation"), "needs a task"),
        (("merge", "nano", "sum", "--task", "nano/mirror-month"), "did you mean nano/mirror-months"),
        (("merge", "nano", "sum", "--weights", "1,two"), "got 'two'"),
        (("adapt", "nano", TASK, "coeficients"), "did you mean 'coefficients'"),
        (("adapt", "nano", "nano/none"), "no task 'nano/none'"),
        (("adapt", "nano", TASK, "arrow"), "routed model"),
        (("adapt", "nano", TASK, "-o", "steps=1.5"), "steps is 1.5, expected a whole number"),
        (("adapt", "nano", TASK, "-o", "seed=1"), "use --seed"),
    ],
)
def test_wrong_usage_is_said_on_stderr_with_exit_code_2(arguments, said, tmp_path):
    result = called(*arguments, "--out", tmp_path / "out")
    assert result.exit_code == 2
    assert said in result.stderr
    assert "Traceback" not in result.output
    assert result.stdout == ""
    assert not (tmp_path / "out").exists()


def test_what_fails_at_run_time_ends_with_1(tmp_path, merged):
    (tmp_path / "file").write_text("")
    for arguments, said in (
        (("merge", tmp_path / "none", "sum", "--out", tmp_path / "a"), "found nothing"),
        (("merge", "nano", "sum", "--weights", "1,2", "--out", tmp_path / "a"), "expected 72 weights"),
        (("merge", "nano", "sum", "--names", NAMES[0], "--out", tmp_path / "file" / "a"), "File exists"),
        (("evaluate", tmp_path / "none", TASK), "none"),
        (("evaluate", merged[0], TASK, "--base", tmp_path / "none"), "none"),
    ):
        result = called(*arguments)
        assert (result.exit_code, result.stdout) == (1, ""), result.output
        assert said in result.stderr
        assert isinstance(result.exception, SystemExit)


def test_adapt_writes_what_adapt_returns(tmp_path, nano):
    base, pool = nano
    arguments = (
        "adapt",
        "nano",
        TASK,
        "--names",
        ",".join(NAMES),
        *SIZES,
        "--seed",
        3,
        "-o",
        "steps=3",
        "-o",
        "lr=1e-1",
    )
    told = json.loads(fine(*arguments, "--out", tmp_path / "a", "--json"))
    task = wb.tasks.load(TASK, seed=3, **FEW)
    want = wb.adapt(base, pool.stack(NAMES), task, "coefficients", seed=3, steps=3, lr=0.1)
    assert told["digest"] == want.adapter.digest()
    assert (told["passes"], told["tokens"], told["parameters"]) == (want.passes, want.tokens, want.parameters)
    assert told["validation_loss"] == pytest.approx(float(want.curves.validation.min()), rel=1e-4)
    assert (told["n_train"], told["stopped_at"]) == (4, None)
    assert told["sources"] == want.adapter.info["sources"]
    read = wb.Adapter.load(tmp_path / "a")
    assert all(torch.equal(read.modules[m].delta(), f.delta()) for m, f in want.adapter.modules.items())
    printed = fine(*arguments, "--out", tmp_path / "b")
    assert f"validation loss {told['validation_loss']:.4f}" in printed
    assert f"{want.tokens:,} tokens" in printed
    assert "interrupted" not in printed


def test_an_interrupted_fit_is_written_with_the_best_so_far(tmp_path, nano, monkeypatch):
    base, pool = nano
    plain = Bar.__call__

    def interrupted(self, step, steps, loss):
        if step == 2:
            signal.raise_signal(signal.SIGINT)
        return plain(self, step, steps, loss)

    arguments = ("adapt", "nano", TASK, "--names", ",".join(NAMES), *SIZES, "-o", "steps=9", "-o", "every=1")
    monkeypatch.setattr(Bar, "__call__", interrupted)
    before = signal.getsignal(signal.SIGINT)
    assert "interrupted at step 2 of 9: the best so far is kept" in fine(*arguments, "--out", tmp_path / "a")
    assert signal.getsignal(signal.SIGINT) is before
    monkeypatch.undo()
    task, options = wb.tasks.load(TASK, **FEW), {"steps": 9, "every": 1}
    want = wb.adapt(base, pool.stack(NAMES), task, watch=lambda step, *_: step == 2, **options)
    got = wb.Adapter.load(tmp_path / "a")
    assert all(torch.equal(got.modules[m].delta(), f.delta()) for m, f in want.adapter.modules.items())


@pytest.fixture(scope="module")
def beside(merged):
    """What `evaluate --json` says of the merge, two tasks at once."""
    more = ("--n-test", 12, *SIZES, "--draws", 3, "-o", "steps=2", "--json")
    return json.loads(fine("evaluate", merged[0], TASK, "nano/mirror-months", *more))


def test_evaluate_agrees_with_evaluate(beside, merged, nano):
    base, _ = nano
    adapter = wb.Adapter.load(merged[0])
    assert (beside["base"], beside["control"]) == (NAME, "sigma")
    assert [one["task"] for one in beside["tasks"]] == [TASK, "nano/mirror-months"]
    for told in beside["tasks"]:
        task = wb.tasks.load(told["task"], n_test=12, **FEW)
        rows = pd.DataFrame(told["rows"]).set_index("what")
        assert list(rows.index) == [ADAPTER, BASE, NEW, CONTROL]
        assert (told["n_test"], told["n_train"], told["left_out"]) == (12, 4, [])
        draws = [random_like(wb.Stack.of([adapter]), seed=i).adapter(0) for i in range(3)]
        for what, updates in ((ADAPTER, [adapter]), (BASE, []), (CONTROL, draws)):
            want = wb.evaluate(base, task, grouped(updates) if updates else None)
            assert rows["accuracy"][what] == pytest.approx(float(want.accuracy.mean()))
            assert rows["loss"][what] == pytest.approx(float(want.loss.mean()), rel=1e-4)
            assert rows["loss_low"][what] < rows["loss"][what] < rows["loss_high"][what]
            assert rows["low"][what] <= rows["accuracy"][what] <= rows["high"][what]
            if what == CONTROL:
                assert told["random_accuracies"] == pytest.approx(want.accuracy.tolist())
        for what in (BASE, NEW, CONTROL):
            gap = rows["accuracy"][ADAPTER] - rows["accuracy"][what]
            assert rows["difference"][what] == pytest.approx(gap)
        if told["task"] != TASK:
            continue
        fresh = wb.compare(base, wb.Pool.open("nano"), [task], [], baselines=[wb.Recipe("new adapter", steps=2)])
        assert rows["loss"][NEW] == pytest.approx(fresh["loss"].item(), rel=1e-4)
        assert rows["accuracy"][NEW] == pytest.approx(fresh["accuracy"].item())


def test_evaluate_an_adapter_of_a_pool_and_say_what_was_left_out(nano):
    base, pool = nano
    arguments = ("evaluate", "rotate-right-animals", TASK, "--pool", "nano", "--n-test", 20, "--no-new", "--draws", 2)
    printed = fine(*arguments)
    task = wb.tasks.load(TASK, n_test=20)
    own = float(wb.evaluate(base, task, grouped([pool.adapter("rotate-right-animals")])).accuracy)
    assert own > 0
    lines = printed.splitlines()
    assert any(line.startswith(f"adapter         {own:.3f} [") for line in lines)
    assert not any(line.startswith("new adapter   ") for line in lines)
    assert "new adapter: left out (--no-new)" in printed
    assert "2 random adapters matched by sigma" in printed
    assert called("evaluate", "rotate-right-animal", TASK, "--pool", "nano", "--no-new").exit_code == 2
    assert called(*arguments, "--control", "none").exit_code == 2


def test_try_adapter_refuses_what_cannot_be_done(nano):
    base, pool = nano
    adapter, task = pool.adapter(NAMES[0]), wb.tasks.load(TASK, n_test=2, **FEW)
    untrained = replace(task, train=())
    for given, error, said in (
        ({"control": "luck"}, MergeError, "'luck' is unknown"),
        ({"draws": 0}, MergeError, "draws is 0"),
        ({"new": {"step": 4}}, MergeError, "did you mean 'steps'"),
        ({"task": untrained}, TaskError, "needs training and validation examples"),
    ):
        with pytest.raises(error, match=said):
            try_adapter(base, adapter, **{"task": task, **given})
    one = try_adapter(base, adapter, untrained, train_new=False, draws=1, control="spectrum")
    assert (one.new, len(one.draws), list(one.table.index)) == (None, 1, [ADAPTER, BASE, CONTROL])
    with compose(base.model, grouped([adapter])):
        assert float(wb.evaluate(base, untrained).loss.mean()) == pytest.approx(one.table["loss"][ADAPTER], rel=1e-4)


def test_options_are_read_as_json_or_yaml():
    given = ["a=1e-3", "b=[1, 0.5]", "c=None", "d=true", "e=linear", "f=null", "g= x = y ", 'h={"a": [1]}', "i=True"]
    want = {
        "a": 1e-3,
        "b": (1, 0.5),
        "c": None,
        "d": True,
        "e": "linear",
        "f": None,
        "g": "x = y",
        "h": {"a": [1]},
        "i": True,
    }
    assert options_of(given) == want
    assert options_of(None) == {}
    assert words(" a, b,,") == ["a", "b"]
    assert _weights("1,-0.5") == [1.0, -0.5]
    assert _weights("a=1, b=-0.5") == {"a": 1.0, "b": -0.5}
    assert _weights("") is None
    for wrong in ("a=1,2", "a=1,a=2", "x"):
        with pytest.raises(Exception, match="weight"):
            _weights(wrong)


def test_a_base_is_found_by_the_name_that_saved_merges_give_it(tmp_path):
    assert (bundled(NAME), bundled("org/base")) == (wb.Pool.open("nano").base, "org/base")


def completed(words, at):
    environment = {"_WORKBENCH_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(at)}
    return called(env=environment, prog_name="workbench").stdout.split()


def test_the_shell_completes_names(tmp_path, monkeypatch):
    assert completed("workbench mer", 1) == ["merge"]
    assert sorted(completed("workbench merge nano ", 3)) == sorted(methods())
    assert completed("workbench merge nano kn", 3) == ["knots_ties", "knots_dare"]
    assert sorted(completed("workbench adapt nano t ", 4)) == sorted(ADAPTIVE)
    assert completed("workbench adapt nano nano/rotate-right-mon", 3) == [TASK]
    built_in = [name for name in SELECTIONS if not name.startswith("dial ")]  # which the laboratory adds, once imported
    assert sorted(completed("workbench merge nano ties --select ", 5)) == sorted(built_in)
    assert completed("workbench merge nano ties --names second-digits,sort-an", 5) == [
        "second-digits,sort-animals-quotes"
    ]
    assert completed("workbench evaluate x y --control ", 5) == list(MATCHES)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "natural" / "pool").mkdir(parents=True)
    assert completed("workbench merge na", 2) == ["nano", "natural"]
    assert completed("workbench merge natural/p", 2) == ["natural/pool"]
    assert completion.declared("merge", "method")["lego"] == methods()["lego"].function.__doc__.partition("\n")[0]


LIGHT = """
import os, sys
from workbench.cli import app, completion
for line in {lines!r}:
    try:
        app(line, prog_name="workbench")
    except SystemExit as end:
        assert not end.code, line
completion.merging(""), completion.adaptive(""), completion.selections(""), completion.tasks("")
heavy = ("torch", "transformers", "pandas", "rich")
assert not [name for name in heavy if name in sys.modules], [name for name in heavy if name in sys.modules]
"""


def test_help_and_completion_import_no_torch():
    lines = [
        ["--help"],
        *(
            [name, "--help"]
            for name in ("methods", "merge", "adapt", "evaluate", "forge", "lab", "pool", "results", "notebooks")
        ),
    ]
    done = subprocess.run([sys.executable, "-c", LIGHT.format(lines=lines)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "workbench merge nano ties --rank 16 -o density=0.2 --out out/ties\n" in done.stdout


@pytest.mark.parametrize("command", ["merge", "adapt", "evaluate", "forge", "lab"])
def test_help_shows_examples_and_explains_every_option(command):
    printed = called(command, "--help").stdout
    assert f"\n  workbench {command}" in printed
    options = [line for line in printed.partition("\nOptions:\n")[2].splitlines() if line.startswith("  -")]
    assert len(options) >= 2
    text = printed.partition("\nOptions:\n")[2]
    for option in options:  # what explains it stands in the same line, or in the next, further in
        after = text.partition(option)[2].lstrip("\n").partition("\n")[0]
        assert "  " in option.strip() or after.startswith("        "), option


def test_forge_is_the_module_s_own_command(tmp_path, monkeypatch):
    made = []
    monkeypatch.setattr(forging, "forge", lambda *given, **more: made.append((*given, more)))
    fine("forge", "--preset", "nano", "--out", tmp_path, "--device", "cpu", "--workers", 3)
    forging.main(["--out", str(tmp_path), "--device", "cpu"])
    assert made[0] == (forging.PRESETS["nano"], tmp_path, "cpu", {"workers": 3})
    assert made[1] == (forging.PRESETS["tiny"], tmp_path, "cpu", {"workers": 1})
    result = called("forge", "--preset", "nanno", "--out", tmp_path)
    assert result.exit_code == 2
    assert "did you mean 'nano'" in result.stderr
    assert called("forge").exit_code == 2


def test_lab_opens_jupyterlab_on_the_notebooks(tmp_path, monkeypatch):
    started = []
    monkeypatch.setattr("workbench.cli.laboratory.os.execv", lambda program, words: started.append((program, words)))
    monkeypatch.chdir(tmp_path)
    result = called("lab")
    assert (result.exit_code, result.stdout, started) == (1, "", [])
    assert "no folder notebooks here" in result.stderr
    (tmp_path / "notebooks").mkdir()
    fine("lab", "--no-browser", "--port", "9000")
    program, words = started.pop()
    assert program == words[0] == sys.executable
    assert words[1:4] == ["-m", "jupyterlab", f"--ServerApp.root_dir={tmp_path.resolve()}"]
    assert words[4:] == ["--LabApp.default_url=/lab/tree/notebooks", "--no-browser", "--port", "9000"]
    monkeypatch.setattr("workbench.cli.laboratory.find_spec", lambda _: None)
    result = called("lab")
    assert (result.exit_code, started) == (1, [])
    assert "JupyterLab is not installed" in result.stderr
