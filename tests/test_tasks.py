"""Tables into tasks: templates, specs and their errors, files of every kind, and splits that share nothing."""

import json
import random
from dataclasses import replace

import pandas as pd
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from workbench import tasks
from workbench.errors import TaskError
from workbench.metrics import METRICS
from workbench.tasks import Example, Task
from workbench.tasks.readers import read_rows
from workbench.tasks.spec import Spec, read
from workbench.tasks.splits import split
from workbench.tasks.tables import listed
from workbench.tasks.templates import LISTS, check, fill, look_up, quoted

ROW = {
    "text": "a cat",
    "question-X": "why?",
    "n": 3,
    "share": 2.0,
    "half": 2.5,
    "true": True,
    "none": None,
    "options": ["ant", "bee", "cow"],
    "answers": {"text": ["one", "two"], "start": [1]},
    "choices": {"label": ["A", "B"], "text": ["ant", "bee"]},
    "a.b": "dotted",
    "x[y]": "bracketed",
}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{text}", "a cat"),
        ("Q: {question-X}\nA: {n}", "Q: why?\nA: 3"),
        ("{share} {half} {true}", "2 2.5 True"),
        ("{{text}} {text}", "{text} a cat"),
        ("{options[1]} {options[-1]}", "bee cow"),
        ("{answers[text][0]}", "one"),
        ("{options:letters}", "(A) ant\n(B) bee\n(C) cow"),
        ("{options:numbers}", "0: ant\n1: bee\n2: cow"),
        ("{options:lines}", "ant\nbee\ncow"),
        ("{options:commas}", "ant, bee, cow"),
        ("{answers[text]:commas}", "one, two"),
        ("{choices:pairs}", "(A) ant\n(B) bee"),
        ("{text:lines}", "a cat"),
        ("{a.b} {x[y]}", "dotted bracketed"),
    ],
)
def test_templates(template, text):
    assert fill(template, ROW) == text


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{txt}", "no column 'txt'; did you mean 'text'. There are text, question-X"),
        ("{zzz}", "no column 'zzz'; there are text,"),
        ("{text.upper}", "no column 'text.upper'"),
        ("{text.__class__}", "no column 'text.__class__'"),
        ("{n.real}", "no column 'n.real'"),
        ("{}", "write {column}"),
        ("{0}", "no column '0'"),
        ("{text!r}", "write {column}"),
        ("{text:>10000000000}", "no way to write a list; there are letters"),
        ("{text:{n}}", "no way to write a list"),
        ("{text", "cannot be read"),
        ("text}", "cannot be read"),
        ("{options}", "options is a list, not text; write one of {options:letters}"),
        ("{answers}", "answers is a dict, not text"),
        ("{answers:lines}", "answers:lines wants a list"),
        ("{options:pairs}", "wants a mapping of label and text"),
        ("{options[9]}", "nothing lies at .9."),
        ("{options[x]}", "nothing lies at .x."),
        ("{answers[lost]}", "nothing lies at .lost."),
        ("{n[0]}", "nothing lies at .0."),
        ("{none}", "none has no value in a row; skip_missing"),
    ],
)
def test_templates_that_are_refused(template, why):
    with pytest.raises(TaskError, match=why):
        fill(template, ROW)


@given(st.text(alphabet="{}[]!:.ab _\n", max_size=12))
def test_a_template_is_filled_or_refused(template):
    try:
        fill(template, {"a": "1", "b": ["2", "3"]})
        check(template, ["a", "b"])
    except TaskError:
        pass


def test_what_a_template_quotes():
    assert quoted("{a} and {b[x]:lines}") == ["a", "b[x]"]
    assert look_up("none[x]", ROW) is None
    assert set(LISTS) == {"letters", "numbers", "lines", "commas"}


PLAIN = {"name": "t", "instruction": "Say it.", "input": "{given}", "target": "wanted"}
SMALL = {"train": 4, "validation": 2, "test": 6}
ROWS = [{"given": f"q{i}", "wanted": "yes" if i % 3 else "no", "kind": "ab"[i % 2]} for i in range(20)]


def test_a_table_becomes_a_task():
    task = tasks.load(PLAIN | SMALL | {"metric": "normalised match", "max_new_tokens": 5}, table=ROWS)
    assert [len(s) for s in (task.train, task.validation, task.test)] == [4, 2, 6]
    assert task.name == "t"
    assert task.metric == "normalised match"
    assert task.max_new_tokens == 5
    assert task.labels == {"kind": "table", "operation": "t"}
    known = {row["given"]: row["wanted"] for row in ROWS}
    for example in (*task.train, *task.validation, *task.test):
        assert known[example.input] == example.target
    assert task.prompt(task.test[0]) == f"Say it.\n\n{task.test[0].input}\nAnswer:\n"
    one = task.train[0]
    assert task.prompt(task.test[0], [one]).startswith(f"{one.input}\nAnswer:\n{one.target}\n\n{task.test[0].input}")


def test_words_classes_choices_and_references():
    rows = [{"given": f"q{i}", "label": float(i % 2), "all": [f"a{i}", "b"]} for i in range(30)]
    spec = PLAIN | SMALL | {"target": "label", "words": {0: "bad", 1: "good"}}
    task = tasks.load(spec | {"choices": ["good", "bad"], "metric": "accuracy over choices"}, table=rows)
    assert {e.target for e in task.test} == {"good", "bad"}
    assert task.choices == ("good", "bad")
    task = tasks.load(spec | {"words": {}, "instruction": "Which?\n{classes}", "classes": ["bad", "good"]}, table=rows)
    assert task.instruction == "Which?\n0 bad\n1 good"
    assert task.choices == ("0", "1")
    assert {e.target for e in task.test} == {"0", "1"}
    task = tasks.load(spec | {"words": {}, "target": "{all[0]}", "references": "all", "metric": "squad f1"}, table=rows)
    assert all(e.references == (e.target, "b") for e in task.test)
    task = tasks.load(spec | {"words": {}, "target": "given", "references": "all", "metric": "squad f1"}, table=rows)
    assert all(e.references == (e.target, e.target.replace("q", "a"), "b") for e in task.test)
    task = tasks.load(
        spec | {"words": {}, "target": "{all[0]}", "choices": "all"}, table=rows, metric="accuracy over choices"
    )
    assert all(e.choices == (e.target, "b") for e in task.test)
    assert task.choices == ()
    with pytest.raises(TaskError, match=r"split train, row \d+: label is '0', which is none of words: 1, 2"):
        tasks.load(spec | {"words": {1: "a", 2: "b"}}, table=rows)


def test_listed_options():
    assert listed("Which?\nOptions:\n(A) ant\n(B) - bee") == ("(A)", "(B)")
    assert listed("Is it?\nOptions:\n- valid \n- in valid") == ("valid", "in valid")
    assert listed("What (A) is\n this - that") == ()


def test_where_and_what_is_missing():
    kept = tasks.load(PLAIN | {"where": {"kind": ["b"]}, "train": 3, "validation": 1, "test": 4}, table=ROWS)
    assert {int(e.input[1:]) % 2 for e in (*kept.train, *kept.validation, *kept.test)} == {1}
    with pytest.raises(TaskError, match=r"t, split train: no examples; none of 20 rows has {'kind': \('c',\)}"):
        tasks.load(PLAIN | {"where": {"kind": "c"}}, table=ROWS)
    for nothing in (None, float("nan"), "", " \n"):
        holed = [*ROWS, {"given": "q", "wanted": nothing, "kind": "a"}]
        with pytest.raises(TaskError, match=r"split train, row 21: .*skip_missing"):
            tasks.load(PLAIN | SMALL, table=holed)
        task = tasks.load(PLAIN | SMALL | {"skip_missing": True}, table=holed)
        assert task.digest() == tasks.load(PLAIN | SMALL, table=ROWS).digest()
    with pytest.raises(TaskError, match="no examples; something is missing"):
        tasks.load(PLAIN | {"skip_missing": True}, table=[{"given": "", "wanted": "x"}])


def test_rows_caps_what_is_read():
    spec = PLAIN | SMALL | {"rows": 15}
    task = tasks.load(spec, table=ROWS)
    again = {e.input for s in range(5) for e in tasks.load(spec, table=ROWS, seed=s).train}
    assert len(again | {e.input for e in task.test}) <= 15
    with pytest.raises(TaskError, match="16 training, validation and test examples asked for, but there are 15"):
        tasks.load(spec, table=ROWS, n_train=5, n_validation=5, n_test=6)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"promt": "x"}, "the spec t: no field 'promt'; did you mean 'input'|no field 'promt'; there are"),
        ({"tarket": "x"}, "no field 'tarket'; did you mean 'target'"),
        ({"kind": "study"}, "no field 'kind'"),
        ({"input": None}, "input is None, expected text"),
        ({"input": ""}, "input missing"),
        ({"input": "{given", "columns": ["given", "wanted"]}, "cannot be read"),
        ({"metric": "exact"}, "no metric 'exact'; did you mean 'exact match'"),
        ({"metric": "accuracy over choices"}, "'accuracy over choices' needs choices"),
        ({"words": {0: False, 1: True}}, 'words is .*quote "yes" and "no"'),
        ({"choices": [True, False]}, 'choices is .*quote "yes"'),
        ({"choices": {"listing": "given"}}, "choices is .*listed: column"),
        ({"words": {0: "a"}, "choices": ["b", "c"]}, "the word 'a' is not among the choices"),
        ({"words": {0: "a"}, "target": "{wanted}!"}, "words are for the values of a column"),
        ({"max_new_tokens": 0}, "max_new_tokens is 0, expected a whole number, at least 1"),
        ({"max_new_tokens": "5"}, "max_new_tokens is '5', expected a whole number"),
        ({"train": True}, "train is True, expected a whole number"),
        ({"validation": "all"}, 'validation is .all., expected a whole number, at least 1, or "same"'),
        ({"seed": -1}, "seed is -1, expected a whole number, at least 0"),
        ({"skip_missing": "yes"}, "skip_missing is 'yes', expected true or false"),
        ({"template": "{question}"}, "{question} in .* only {instruction} and {input}"),
        ({"classes": ["a"]}, "classes are listed where the instruction says"),
        ({"instruction": "{classes}"}, "give both or neither"),
        ({"splits": {"test": "dev"}}, "splits is .* train at least"),
        ({"splits": {"train": "a", "dev": "b"}}, "splits is .*train at least"),
        ({"columns": ["given", "label"]}, "no column 'wanted'; there are given, label"),
        ({"where": ["a"]}, "where is .* columns and the values kept"),
        ({"file": {"test": "x.csv"}}, "file is .* a path, or {train"),
    ],
)
def test_specs_that_are_refused(change, why):
    with pytest.raises(TaskError, match=why):
        tasks.load(PLAIN | change, table=ROWS)


def test_specs_that_lack_something():
    with pytest.raises(TaskError, match="instruction, target missing"):
        Spec.of({"name": "x", "input": "y"})
    with pytest.raises(TaskError, match="expected fields and values, got 'x'"):
        Spec.of("x")
    with pytest.raises(TaskError, match="t: the spec names no dataset and no file; give the data as table="):
        tasks.load(PLAIN)


@pytest.mark.parametrize("column", ["input", "target", "choices", "references", "where", "listed"])
def test_a_wrong_column_names_those_there_are(column):
    wrong = {
        "input": {"input": "{give}"},
        "target": {"target": "want"},
        "choices": {"choices": "optoins"},
        "references": {"references": "answers[text]"},
        "where": {"where": {"knd": "a"}},
        "listed": {"choices": {"listed": "prompt"}},
    }[column]
    with pytest.raises(TaskError, match=r"t, split train: no column '.*; .*here are given, wanted, kind"):
        tasks.load(PLAIN | SMALL | wrong, table=ROWS)


def test_metrics_that_do_not_fit_the_target():
    with pytest.raises(TaskError, match=r"t: the metric 'accuracy over choices' does not fit the target '\w+' of 'q"):
        tasks.load(PLAIN | SMALL | {"choices": ["a", "b"]}, table=ROWS, metric="accuracy over choices")
    with pytest.raises(TaskError, match="t: the metric 'accuracy over choices' needs choices"):
        tasks.load(PLAIN | SMALL, table=ROWS, metric="accuracy over choices")
    with pytest.raises(TaskError, match=r"'normalised match' does not fit the target '...'"):
        tasks.load(PLAIN | SMALL, table=[row | {"wanted": "..."} for row in ROWS], metric="normalised match")
    with pytest.raises(TaskError, match="no metric 'bluu'"):
        tasks.load(PLAIN | SMALL, table=ROWS, metric="bluu")
    for metric in ("squad f1", "bleu", "lorahub match"):
        assert tasks.load(PLAIN | SMALL, table=ROWS, metric=metric).metric == metric


# files ---------------------------------------------------------------------------------------------------------------


def written(folder, kind):
    frame, path = pd.DataFrame(ROWS), folder / f"rows.{kind}"
    if kind in ("csv", "tsv"):
        frame.to_csv(path, index=False, sep="\t" if kind == "tsv" else ",")
    elif kind == "parquet":
        frame.to_parquet(path)
    elif kind == "jsonl":
        path.write_text("\n".join(map(json.dumps, ROWS)) + "\n\n")
    elif kind == "json":
        path.write_text(json.dumps(ROWS))
    return path


@pytest.mark.parametrize("kind", ["csv", "tsv", "json", "jsonl", "parquet"])
def test_every_kind_of_file_gives_the_same_task(tmp_path, kind):
    want = tasks.load(PLAIN | SMALL, table=ROWS)
    path = written(tmp_path, kind)
    (tmp_path / "t.yaml").write_text(yaml.safe_dump(PLAIN | SMALL | {"file": path.name}))
    assert tasks.load(tmp_path / "t.yaml").digest() == want.digest()
    assert tasks.load(PLAIN | SMALL, table=path).digest() == want.digest()
    assert tasks.load(PLAIN | SMALL, table=str(path)).digest() == want.digest()
    assert tasks.load(str(tmp_path / "t.yaml"), table=pd.DataFrame(ROWS[::-1])).digest() == want.digest()


def test_datasets_tables_and_its_builders(tmp_path, monkeypatch):
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()
    want = tasks.load(PLAIN | SMALL, table=ROWS)
    made = datasets.Dataset.from_list(ROWS)
    assert tasks.load(PLAIN | SMALL, table=made).digest() == want.digest()
    both = datasets.DatasetDict(train=made.select(range(12)), test=made.select(range(12, 20)))
    apart = tasks.load(PLAIN | SMALL, table=both)
    assert {e.input for e in apart.test} <= {f"q{i}" for i in range(12, 20)}
    written(tmp_path, "parquet")
    written(tmp_path, "jsonl")
    for builder, file in (("parquet", "rows.parquet"), ("json", "rows.jsonl")):
        found = tasks.load(PLAIN | SMALL | {"dataset": builder, "file": file}, folder=tmp_path)
        assert found.digest() == want.digest()
        parts = {"dataset": builder, "file": {"train": file, "test": file}}
        with pytest.raises(TaskError, match="t: 6 training and validation examples asked for, but there are 0"):
            tasks.load(PLAIN | SMALL | parts, folder=tmp_path)  # all of it is in the test set
    with pytest.raises(TaskError, match=r"t: json could not be loaded"):
        tasks.load(PLAIN | {"dataset": "json", "file": "lost.json"}, folder=tmp_path)


def test_the_hub_is_asked_for_id_configuration_and_revision(monkeypatch):
    import datasets

    asked = []

    def load_dataset(*args, **more):
        asked.append((args, more))
        return {"a": ROWS[:12], "b": ROWS[12:]}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    hub = {"dataset": "who/what", "config": "small", "revision": "abc", "splits": {"train": "a", "test": "b"}}
    task = tasks.load(PLAIN | SMALL | hub)
    assert asked == [(("who/what",), {"name": "small", "revision": "abc"})]
    assert {e.input for e in task.test} <= {f"q{i}" for i in range(12, 20)}
    assert task.labels["dataset"] == "who/what"
    with pytest.raises(TaskError, match="t: no split 'c'; there are a, b"):
        tasks.load(PLAIN | hub | {"splits": {"train": "c"}})
    with pytest.raises(TaskError, match="t: no split is called train; there are a, b: say which with splits:"):
        tasks.load(PLAIN | {key: value for key, value in hub.items() if key != "splits"})

    def fails(*args, **more):
        raise RuntimeError("Dataset scripts are no longer supported, but found what.py")

    monkeypatch.setattr(datasets, "load_dataset", fails)
    with pytest.raises(TaskError, match=r"who/what small could not be loaded: .*revision: refs/convert/parquet"):
        tasks.load(PLAIN | hub)


def test_without_the_library_datasets_the_extra_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    with pytest.raises(
        TaskError, match=r"t \(from the Hub\) needs the library datasets: pip install 'workbench\[tasks\]'"
    ):
        tasks.load(PLAIN | {"dataset": "who/what"})


@pytest.mark.parametrize(
    ("name", "text", "why"),
    [
        ("x.csv", "", "cannot be read"),
        ("x.json", "[1, 2]", "expected a list of mappings"),
        ("x.json", '{"a": [{}], "b": [{}]}', "expected a list of mappings"),
        ("x.json", "{", "cannot be read"),
        ("x.jsonl", '{"a": 1}\n{', "cannot be read"),
        ("x.parquet", "text", "cannot be read"),
        ("x.txt", "text", "expected .csv, .tsv, .json, .jsonl or .parquet"),
    ],
)
def test_files_that_are_refused(tmp_path, name, text, why):
    (tmp_path / name).write_text(text)
    with pytest.raises(TaskError, match=why):
        read_rows(tmp_path / name)


def test_other_tables(tmp_path):
    with pytest.raises(TaskError, match="there is no file"):
        read_rows(tmp_path / "lost.csv")
    with pytest.raises(TaskError, match=r"expected a path, a data frame, .* got a int"):
        read_rows(3)
    (tmp_path / "bench.json").write_text('{"canary": "x", "examples": [{"input": "a"}]}')
    assert read_rows(tmp_path / "bench.json") == [{"input": "a"}]
    (tmp_path / "cells.csv").write_text("code,country\n007,NA\n,x\n")
    assert read_rows(tmp_path / "cells.csv") == [{"code": "007", "country": "NA"}, {"code": "", "country": "x"}]
    frame = pd.DataFrame({"n": [1, None], "list": [["a"], ["b", "c"]]})
    assert read_rows(frame) == [{"n": 1.0, "list": ["a"]}, {"n": None, "list": ["b", "c"]}]
    for empty in ([], pd.DataFrame({"given": [], "wanted": []})):
        with pytest.raises(TaskError, match="t, split train: no rows"):
            tasks.load(PLAIN, table=empty)
    with pytest.raises(TaskError, match="t, split test: no rows"):
        tasks.load(PLAIN | SMALL, table={"train": ROWS, "test": []})


def test_yaml_files(tmp_path):
    path = tmp_path / "some.yaml"
    path.write_text(yaml.safe_dump({".x": {}, "one": PLAIN, "two": PLAIN | {"name": "other"}}))
    assert read(f"{path}#one").name == "t"
    assert read(f"{path}#two").name == "other"
    with pytest.raises(TaskError, match=r"holds 2 specs; name one of them, such as .*#two"):
        read(f"{path}#tow")
    path.write_text("name: [")
    with pytest.raises(TaskError, match=r"some.yaml is no YAML: .*line 1"):
        tasks.load(path)
    path.write_bytes(b"\xff\xfe\xfa")
    with pytest.raises(TaskError, match=r"some.yaml cannot be read|is no YAML"):
        tasks.load(path)
    with pytest.raises(TaskError, match=r"lost.yaml cannot be read"):
        tasks.load(tmp_path / "lost.yaml")
    path.write_text("- 1\n- 2\n")
    with pytest.raises(TaskError, match="expected fields and values"):
        tasks.load(path)
    path.write_text(yaml.safe_dump({k: v for k, v in PLAIN.items() if k != "name"} | {"fiel": "x"}))
    with pytest.raises(TaskError, match=r"some.yaml: no field 'fiel'; did you mean 'file'"):
        tasks.load(path)
    path.write_text("name: !!python/object/apply:os.system ['true']")
    with pytest.raises(TaskError, match="is no YAML"):
        tasks.load(path)


# splits --------------------------------------------------------------------------------------------------------------


@st.composite
def sources(draw):
    names = st.integers(0, 60).map(lambda i: f"q{i}")
    roles = ["train", *draw(st.sets(st.sampled_from(["validation", "test"])))]
    return {role: {q: Example(q, role) for q in draw(st.lists(names, min_size=1, max_size=60))} for role in roles}


@given(sources(), st.integers(1, 20), st.sampled_from([1, 5, "same"]), st.sampled_from([None, 1, 7]), st.integers(0, 5))
def test_splits_share_nothing_and_the_test_set_is_one(examples, n_train, n_validation, n_test, seed):
    def drawn(seed, source=examples):
        sizes = {"n_train": n_train, "n_validation": n_validation, "n_test": n_test}
        return split(source, **sizes, most=9, seed=seed, draw="x")

    try:
        train, validation, test = drawn(seed)
    except TaskError as error:
        assert "asked for, but there are" in str(error)  # noqa: PT017
        return
    inputs = [[e.input for e in part] for part in (train, validation, test)]
    assert all(len(set(part)) == len(part) for part in inputs)
    assert not set(inputs[0]) & set(inputs[2])
    assert not set(inputs[1]) & set(inputs[2])
    assert len(train) == n_train
    if n_validation == "same":
        assert validation == train
    else:
        assert len(validation) == n_validation
        assert not set(inputs[0]) & set(inputs[1])
    assert len(test) == n_test if n_test else 1 <= len(test) <= 9
    assert drawn(seed + 1)[2] == test
    rows = {role: dict(random.Random(1).sample(list(part.items()), len(part))) for role, part in examples.items()}
    assert drawn(seed, rows) == (train, validation, test)
    if "test" in examples:
        assert not set(inputs[0] + inputs[1]) & set(examples["test"])
    if "validation" in examples and n_validation != "same":
        assert set(inputs[1]) <= set(examples["validation"])


def test_splits_by_example():
    every = {"train": {f"q{i}": Example(f"q{i}", "x") for i in range(100)}}

    def drawn(seed=0, source=every, n_train=20, n_validation=10, n_test=None, most=1000):
        parts = split(source, n_train=n_train, n_validation=n_validation, n_test=n_test, most=most, seed=seed, draw="x")
        return [[e.input for e in part] for part in parts]

    first, second = drawn(0), drawn(1)
    assert list(map(len, first)) == [20, 10, 50]  # half of what there is, at most
    assert first[0] != second[0]
    assert set(first[0]) != set(second[0])
    assert drawn(most=30)[2] == first[2][:30]
    assert drawn(n_test=70)[2][:50] == first[2]
    assert list(map(len, drawn(n_train=60, n_validation=20))) == [60, 20, 20]  # or what is left
    assert drawn(n_train=10, n_validation="same")[1] == drawn(n_train=10, n_validation="same")[0]
    with pytest.raises(TaskError, match="101 training, validation and test examples asked for, but there are 100"):
        drawn(n_train=90)
    with pytest.raises(TaskError, match="81 training and test examples asked for, but there are 80 different ones"):
        drawn(source={"train": dict(list(every["train"].items())[:80])}, n_train=80, n_validation="same")
    asked = every | {"test": {f"q{i}": Example(f"q{i}", "x") for i in range(90, 120)}}
    assert set(drawn(source=asked)[2]) == set(asked["test"])
    with pytest.raises(TaskError, match="31 test examples asked for, but there are 30"):
        drawn(source=asked, n_test=31)
    with pytest.raises(TaskError, match="91 training and validation examples asked for, but there are 90"):
        drawn(source=asked, n_train=81)
    apart = every | {"validation": {f"v{i}": Example(f"v{i}", "x") for i in range(5)}}
    with pytest.raises(TaskError, match="10 validation examples asked for, but there are 5"):
        drawn(source=apart)
    assert {q[0] for q in drawn(source=apart, n_validation=5)[1]} == {"v"}
    both = asked | {"validation": {f"q{i}": Example(f"q{i}", "x") for i in range(85, 100)}}
    assert set(drawn(source=both, n_validation=5)[1]) == {f"q{i}" for i in range(85, 90)}  # the others are tested on
    for wrong in ({"n_train": 0}, {"n_validation": 0}, {"n_test": 0}, {"n_train": 2.5}, {"n_validation": "some"}):
        with pytest.raises(TaskError, match="expected a whole number, at least 1"):
            drawn(**wrong)
    with pytest.raises(TaskError, match=r"n_train is 'same', expected a whole number, at least 1$"):
        drawn(n_train="same")


def test_the_first_of_rows_with_the_same_input_stands():
    rows = [{"given": f"q{i // 2}", "wanted": "ab"[i % 2]} for i in range(40)]
    task = tasks.load(PLAIN | SMALL, table=rows, n_test=14)
    every = (*task.train, *task.validation, *task.test)
    assert len({e.input for e in every}) == len(every) == 20
    assert {e.target for e in every} == {"a"}


def test_sizes_and_seeds():
    spec = PLAIN | {"train": 3, "validation": "same", "test": 5}
    task = tasks.load(spec, table=ROWS)
    assert task.validation == task.train
    assert len(task.train) == 3
    assert len(task.test) == 5
    assert tasks.load(spec | {"seed": 1}, table=ROWS).test != task.test
    assert tasks.load(spec, table=ROWS, seed=4).test == task.test
    assert tasks.load(spec, table=ROWS, seed=4).train != task.train
    assert len(tasks.load(spec, table=ROWS, n_validation=2).validation) == 2
    with pytest.raises(TaskError, match=r"^t: 26 training, validation and test examples asked for, but there are 20"):
        tasks.load(spec, table=ROWS, n_train=20, n_validation=5)


# the bundled ones, and tasks as such ------------------------------------------------------------------------------------


def test_bundled_tasks_take_the_same_arguments():
    plain = tasks.load("nano/mirror-months")
    assert [len(s) for s in (plain.train, plain.validation, plain.test)] == [80, 20, 2000]
    same = tasks.load("nano/mirror-months", n_train=10, n_validation="same", n_test=3)
    assert same.validation == same.train == plain.train[:10]
    assert tasks.load("nano/mirror-months", n_test=3, metric="squad f1").metric == "squad f1"
    with pytest.raises(TaskError, match="does not fit the target"):
        tasks.load("nano/mirror-months", metric="accuracy over choices")
    with pytest.raises(TaskError, match="bundled: it takes no table"):
        tasks.load("nano/mirror-months", table=ROWS)


def test_digests_are_as_they_were_and_know_the_metric():
    """The hash of a plain task is the one that stored results are keyed by."""
    task = Task("t", "say", (Example("a", "b"),), (), (Example("c", "d"),))
    assert task.digest() == "a459e548746e9d3c055354a4bbbf59624ecaaa574c90f37820f5485de53022fa"
    changes = [
        {"metric": "normalised match"},
        {"choices": ("b", "d")},
        {"choices": ("b", "e")},
        {"test": (replace(task.test[0], references=("d", "e")),)},
        {"test": (replace(task.test[0], choices=("d", "e")),)},
    ]
    assert len({replace(task, **change).digest() for change in changes} | {task.digest()}) == 6
    assert all(replace(task, metric=name) for name in METRICS)
