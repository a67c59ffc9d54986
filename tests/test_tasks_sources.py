"""BIG-Bench Hard, LoraHub's layout and the specs that come with the package."""

import csv
import json
import random

import pytest

from helpers import published, worded_base
from workbench import tasks
from workbench.errors import TaskError
from workbench.evaluate import encode_task
from workbench.metrics import METRICS, find
from workbench.tasks.spec import shipped
from workbench.tasks.templates import check, quoted

# the study's tables call some tasks by other names
OTHER_NAMES = {
    "cryptonews_articles_with_price_momentum_labels": "cryptonews_articles",
    "imbalanced": "clinc_oos",
    "main": "gsm8k",
    "mmlu": "mmlu_combined",
    "swa": "masakhanews_swa",
    "yor": "masakhanews_yor",
    "tokenized": "aqua_rat",
    "toxicchat0124": "toxic_chat",
}
WRONG = "a wrong answer 77"


def all_of(task):
    return (*task.train, *task.validation, *task.test)


@pytest.mark.parametrize("name", tasks.names("bbh"))
def test_big_bench_hard(name):
    """Each example comes back from its prompt, and its own answer is right, another one wrong."""
    folder = published("bbh")
    rows = json.loads((folder / f"{name.removeprefix('bbh/')}.json").read_text())["examples"]
    task = tasks.load(name, folder=folder, n_train=30, n_validation=10, n_test=len({r["input"] for r in rows}) - 40)
    known = {row["input"]: row["target"] for row in reversed(rows)}
    every = all_of(task)
    assert {e.input: e.target for e in every} == known
    assert len(every) == len(known) >= 140
    assert task.metric == "lorahub match"
    metric = find(task.metric)
    for e in every:
        prompt = task.prompt(e)
        assert prompt == f"{task.instruction}\n\n{e.input}\nAnswer:\n"
        assert prompt.partition("\n\n")[2].removesuffix("\nAnswer:\n") == e.input
        assert metric.score(e.target, e.answers) == metric.score(f" {e.target.upper()}.\n", e.answers) == 1
        assert metric.score(WRONG, e.answers) == metric.score(f"{e.target} or not", e.answers) == 0
        for other in set(task.choices_of(e)) - {e.target}:
            assert metric.score(other, e.answers) == 0


@pytest.mark.parametrize("name", tasks.names("bbh"))
def test_big_bench_hard_by_choices(name):
    folder, over = published("bbh"), "accuracy over choices"
    if shipped("bbh")[name].choices == ():
        with pytest.raises(TaskError, match=f"{name}: the metric '{over}' needs choices"):
            tasks.bbh(folder, name, metric=over)
        return
    task, plain = tasks.bbh(folder, name, metric=over), tasks.bbh(folder, name)
    lost = {"movie_recommendation": 1, "ruin_names": 2, "snarks": 1}.get(name.removeprefix("bbh/"), 0)
    rows = json.loads((folder / f"{name.removeprefix('bbh/')}.json").read_text())["examples"]
    most = len({row["input"] for row in rows}) - lost  # those whose options were torn apart are left out
    assert len(all_of(tasks.bbh(folder, name, metric=over, n_train=10, n_validation=5, n_test=most - 15))) == most
    with pytest.raises(TaskError, match=f"{most + 1} training, validation and test examples asked for"):
        tasks.bbh(folder, name, metric=over, n_train=11, n_validation=5, n_test=most - 15)
    for e in all_of(task):
        assert e.target in task.choices_of(e)
        if e.choices and e.choices[0] == "(A)":
            assert all(f"{letter} " in e.input for letter in e.choices)
    assert all(e.choices or plain.choices for e in all_of(plain))


def test_big_bench_hard_reads_a_clone_too_and_says_what_it_lacks(tmp_path):
    rows = [{"input": f"Which?\nOptions:\n(A) {i}\n(B) {i + 1}", "target": "(B)"} for i in range(120)]
    (tmp_path / "bbh").mkdir()
    (tmp_path / "bbh" / "snarks.json").write_text(json.dumps({"canary": "x", "examples": rows}))
    task = tasks.load("bbh/snarks", folder=tmp_path)
    assert (
        task.digest()
        == tasks.bbh(str(tmp_path / "bbh"), "snarks").digest()
        == tasks.bbh(tmp_path, "bbh/snarks").digest()
    )
    assert [len(s) for s in (task.train, task.validation, task.test)] == [80, 20, 20]
    assert task.labels == {
        "kind": "bbh",
        "operation": "snarks",
        "dataset": "lukaemon/bbh",
        "licence": "MIT",
        "homepage": "https://github.com/suzgunmirac/BIG-Bench-Hard",
    }
    base = worded_base("byte-bpe")
    encoded = encode_task(base, task, task.test[:3])
    assert {base.tokenizer.decode(row.answer[:-1]).strip() for row in encoded} == {"(B)"}
    with pytest.raises(TaskError, match=r"there is no file .*navigate.json"):
        tasks.bbh(tmp_path, "navigate")
    with pytest.raises(TaskError, match="no task 'bbh/navigat'; did you mean bbh/navigate"):
        tasks.bbh(tmp_path, "navigat")
    with pytest.raises(TaskError, match="bbh/navigate: lukaemon/bbh navigate could not be loaded"):
        tasks.bbh(None, "navigate")  # the tests are offline
    assert tasks.load("bbh/snarks", table=rows).test == task.test


# LoraHub ----------------------------------------------------------------------------------------------------------------


def lines(n, head="q"):
    return [{"context": f"{head} {i}\nA:", "completion": f"({'AB'[i % 2]})"} for i in range(n)]


@pytest.fixture
def layout(tmp_path):
    folder = tmp_path / "data" / "navigate"
    folder.mkdir(parents=True)
    shots = [{"context": f"Q A\n\n{row['context']}", "completion": row["completion"]} for row in lines(30)]
    for name, rows in (("example", lines(12, "x") + lines(2)), ("zero_shot", lines(30)), ("few_shot", shots)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder


def test_lorahub_s_layout(layout):
    task = tasks.lorahub(layout)
    known = lines(12, "x") + lines(2)
    random.seed(42)  # as the reference code draws its five examples
    random.shuffle(known)
    assert [(e.input, e.target) for e in task.train] == [(r["context"], r["completion"]) for r in known[:5]]
    assert task.validation == task.train
    assert len(task.test) == 28  # what is learned from is not tested on
    assert not {e.input for e in task.test} & {row["context"] for row in known}
    assert task.metric == "lorahub match"
    assert task.max_new_tokens == 256
    assert task.name == "lorahub/navigate"
    assert task.prompt(task.test[0]) == task.test[0].input
    assert (
        task.prompt(task.test[0], task.train[:1])
        == f"{task.train[0].input} {task.train[0].target}\n\n{task.test[0].input} "
    )
    for same in (
        tasks.load("lorahub/navigate", folder=layout.parent, seed=42),
        tasks.load(layout, seed=42),
        tasks.load(str(layout), seed=42),
    ):
        assert same.digest() == task.digest()
    few = tasks.lorahub(layout, shots=True)
    assert [e.input for e in few.test] == [f"Q A\n\n{e.input}" for e in task.test]
    apart = tasks.lorahub(layout, n_train=6, n_validation=4, n_test=10, seed=1, metric="exact match")
    assert [len(s) for s in (apart.train, apart.validation, apart.test)] == [6, 4, 10]
    assert not {e.input for e in apart.train} & {e.input for e in apart.validation}
    assert apart.metric == "exact match"


def test_what_lorahub_s_layout_lacks(layout):
    with pytest.raises(TaskError, match="16 training and validation examples asked for, but there are 14"):
        tasks.lorahub(layout, n_train=12, n_validation=4)
    with pytest.raises(TaskError, match="29 test examples asked for, but there are 28"):
        tasks.lorahub(layout, n_test=29)
    (layout / "few_shot.jsonl").write_text(json.dumps(lines(1)[0]))
    with pytest.raises(TaskError, match=r"few_shot.jsonl has 1 lines, zero_shot.jsonl 30"):
        tasks.lorahub(layout, shots=True)
    (layout / "zero_shot.jsonl").write_text("\n".join(map(json.dumps, [*lines(2), {"input": "a", "completion": "b"}])))
    with pytest.raises(
        TaskError, match=r"zero_shot.jsonl, line 3: no text under 'context', got the fields input, completion"
    ):
        tasks.lorahub(layout)
    (layout / "zero_shot.jsonl").write_text("\n")
    with pytest.raises(TaskError, match=r"zero_shot.jsonl has no lines"):
        tasks.lorahub(layout)
    (layout / "example.jsonl").unlink()
    with pytest.raises(TaskError, match=r"there is no file .*example.jsonl"):
        tasks.lorahub(layout)


# the specs that come with the package -----------------------------------------------------------------------------------


def made_up(spec, n=130, start=0):
    """A table with the columns that a spec declares, every column of the kind that its template wants."""
    rows = []
    for i in range(start, start + n):
        row = {column: f"{column} {i}" for column in spec.columns}
        for path in (*quoted(spec.input), spec.choices if isinstance(spec.choices, str) else "text"):
            if "choices" in spec.columns and "pairs" in spec.input:
                row["choices"] = {"label": ["A", "B", "C"], "text": [f"a{i}", f"b{i}", f"c{i}"]}
            elif path in ("options", "answers", "choices"):
                row[path] = [f"a{i}", f"b{i}", f"c{i}"]
        answers = spec.options or (("A", "B", "C") if "pairs" in spec.input else ())
        row[spec.target] = answers[i % len(answers)] if answers else f"gold {i}"
        if spec.options and all(word.isdigit() for word in spec.options):
            row[spec.target] = int(row[spec.target])
        rows.append(row)
    return rows


@pytest.mark.parametrize("name", tasks.names("study"))
def test_every_spec_of_the_study_runs_on_its_columns(name):
    spec = shipped("study")[name]
    for template in (spec.input, spec.target_template):
        check(template, spec.columns)
    used = {path.partition("[")[0] for path in spec.paths}
    assert used == set(spec.columns)  # nothing declared that is not used
    assert spec.metric in METRICS
    assert bool(spec.dataset) != bool(spec.file)
    assert spec.verified or spec.note
    assert not (spec.file and not spec.note)
    assert spec.max_new_tokens in (30, 500)
    rows, roles = made_up(spec), spec.splits or {"train": "train"}
    apart = {"train": rows, "validation": made_up(spec, 25, 1000), "test": made_up(spec, 25, 2000)}
    task = tasks.load(name, table={source: apart[role] for role, source in roles.items()})
    assert len(task.train) == 80
    assert len(task.validation) == 20
    assert task.test
    assert task.labels["kind"] == "study"
    metric = find(task.metric)
    for e in all_of(task):
        assert metric.score(e.target, e.answers) == 1
        assert metric.score(WRONG, e.answers) == 0
        assert "{" not in task.prompt(e)
        assert not task.choices_of(e) or e.target in task.choices_of(e)
    for column in sorted(used):
        broken = [{k: v for k, v in row.items() if k != column} for row in rows]
        with pytest.raises(TaskError, match=f"{name}, split .*: no column '{column}"):
            tasks.load(name, table={source: broken for source in roles.values()})


def test_the_study_s_specs_are_those_of_its_tables():
    folder = published("recycling")

    def column(name):
        with open(folder / name, newline="") as file:
            return [row[0] for row in list(csv.reader(file))[1:]]

    trained = column("lora_baseline_10_results.csv")
    assert len(trained) == 62
    with open(folder / "hub_model_evaluation_test.csv", newline="") as file:
        evaluated = next(csv.reader(file))[3:]
    every = {*trained, *column("zero_shot_performance.csv"), *evaluated}
    every |= set(column("merged_performance_eval_experts_summary.csv"))
    assert {f"study/{OTHER_NAMES.get(name, name)}" for name in every} == set(tasks.names("study"))
    assert len(tasks.names("study")) == 69


def test_the_study_s_files_are_not_shipped():
    with pytest.raises(
        TaskError, match=r"study/web_of_lies is read from data/web_of_lies.json, .*unpack data.tar.gz .*folder="
    ):
        tasks.load("study/web_of_lies")
    with pytest.raises(TaskError, match=r"study/gsm8k: openai/gsm8k main could not be loaded: .*(offline|reach)"):
        tasks.load("study/gsm8k")
    with pytest.raises(TaskError, match="no task 'study/gsm'; did you mean study/gsm8k"):
        tasks.load("study/gsm")


def test_the_study_s_files_are_read_where_they_lie(tmp_path):
    rows = [{"input": f"q {i}", "target": ["True", "False"][i % 2]} for i in range(240)]
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "web_of_lies.json").write_text(json.dumps(rows))
    task = tasks.load("study/web_of_lies", folder=tmp_path)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [80, 20, 120]
    few = tasks.load("study/web_of_lies", folder=tmp_path / "data", n_train=10, n_validation="same")
    assert few.train == few.validation  # the study's low-data mode
    assert few.test == task.test
    text = [row | {"options": "0: a 1: b"} for row in rows]
    for options in ("0: a, 1: b", ["a", "b"]):
        (tmp_path / "temporal_sequences.json").write_text(
            json.dumps([r | {"options": options, "target": "1"} for r in text])
        )
        assert "\n0: a" in tasks.load("study/temporal_sequences", folder=tmp_path).test[0].input
