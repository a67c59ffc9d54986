"""A sweep's runs: their rows are `compare`'s, what is stored is skipped, what fails is told apart, who holds what."""

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

import workbench as wb
from sweeping import RECIPES, TASKS, swept, tiny_pool
from workbench.base import Base
from workbench.errors import WorkbenchError
from workbench.experiment import Recipe, compare
from workbench.pool import Pool
from workbench.results import Results
from workbench.sweep import dispatch, run, run_from, work
from workbench.sweep.claims import Claims
from workbench.sweep.plan import outlook
from workbench.sweep.reading import sweep_of
from workbench.sweep.spec import Sweep

TIMED = ["seconds", "written", "peak_memory"]


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tiny_pool(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="module")
def done(where, tmp_path_factory):
    """A sweep that has run, one after the other."""
    sweep = swept(where, tmp_path_factory.mktemp("runs"))
    return sweep, run(sweep, workers=0)


def alike(ours, theirs):
    """Whether rows are equal in every column that both have and that is not of the clock."""
    both = [name for name in ours if name in theirs and name not in TIMED]
    ours, theirs = (f[both].set_index("key").sort_index() for f in (ours, theirs))
    return len(both) > 40 and ours.astype(object).equals(theirs.astype(object))


def test_rows_are_those_of_compare(where, done, tmp_path):
    sweep, report = done
    assert (report.ran, report.stored, report.failed, report.left) == (24, 0, 0, 0)
    pool, base = Pool.open(where["pool"], base=where["base"]), Base.load(where["base"])
    recipes = [Recipe(**given) for given in RECIPES]
    baselines = [wb.Recipe("zero-shot"), wb.Recipe("new adapter", steps=2)]
    sizes = {"n_train": 4, "n_validation": 3, "n_test": 5}
    compare(base, pool, TASKS, recipes, seeds=[0, 1], baselines=baselines, results=tmp_path, **sizes)
    assert set(Results(tmp_path).keys()) == set(Results(sweep.results).keys())
    ours = Results(sweep.results).read().set_index("key").sort_index()
    theirs = Results(tmp_path).read().set_index("key").sort_index()
    for name in ("accuracy", "loss", "train_loss", "validation_loss", "norm"):  # side by side there, alone here
        assert ours[name].tolist() == pytest.approx(theirs[name].tolist(), rel=1e-4)
    for name in ("recipe", "task", "seed", "control", "chosen", "pool", "base", "split"):
        assert ours[name].tolist() == theirs[name].tolist()


def test_each_row_holds_the_run_that_gives_it_again(done, tmp_path):
    sweep, _ = done
    rows = Results(sweep.results).read()
    assert {run_from(json.loads(text)) for text in rows["run"]} == set(sweep.runs)
    row = rows[rows.method == "coefficients"].iloc[[0]]
    again = Sweep("again", tmp_path, (run_from(json.loads(row["run"].item())),))
    assert run(again, workers=0).ran == 1
    assert alike(Results(tmp_path).read(), row)


def test_what_is_stored_is_not_run_again(done, monkeypatch):
    sweep, _ = done
    monkeypatch.setattr(work, "rows_of", None)
    report = run(sweep, workers=0)
    assert (report.ran, report.stored, report.left) == (0, 24, 0)
    assert len(list(sweep.results.glob("*.parquet"))) == 24
    assert not list((sweep.results / "claims").iterdir())


def test_a_changed_sweep_runs_only_what_is_new(where, done):
    sweep, _ = done
    more = swept(where, sweep.results, seeds=[0, 1, 2], tasks=TASKS[:1])
    frame, stored = outlook(more)
    assert stored == 12
    assert frame[~frame.kind.str.startswith("once")].runs.sum() == 6
    assert (frame.source.str.contains("earlier")).all()
    report = run(more, workers=0)
    assert (report.ran, report.stored) == (6, 12)
    for key in Results(sweep.results).read().query("seed == 2").key:
        next(sweep.results.glob(f"{key}.*")).unlink()


def test_side_by_side_gives_the_same_rows(where, done, tmp_path):
    sweep, _ = done
    report = run(swept(where, tmp_path, together=3), workers=0)
    assert report.ran == 24
    ours, theirs = (Results(f).read().set_index("key").sort_index() for f in (tmp_path, sweep.results))
    assert ours.index.equals(theirs.index)
    assert ours.loss.tolist() == pytest.approx(theirs.loss.tolist(), rel=1e-4)


def test_a_failure_is_stored_and_the_others_go_on(where, tmp_path, monkeypatch):
    real, lines = work.rows_of, []

    def sometimes(place, recipe, cases):
        if recipe.method == "average" and any(case.seed == 1 for case in cases):
            raise RuntimeError("a singular matrix\nin module 3")
        return real(place, recipe, cases)

    monkeypatch.setattr(work, "rows_of", sometimes)
    sweep = swept(where, tmp_path, tasks=TASKS[:1], together=2)
    report = run(sweep, workers=0, say=lines.append)
    assert (report.ran, report.failed) == (10, 2)
    assert {error for _, error in report.errors} == {"in module 3"}
    assert len(lines) == 2
    assert lines[0].startswith("failed: nano/second-days, seed 1: average")
    failures = Results(tmp_path).failures()
    assert len(failures) == 2
    assert "RuntimeError: a singular matrix" in failures["traceback"][0]
    assert {run_from(json.loads(text)).seed for text in failures["run"]} == {1}
    monkeypatch.setattr(work, "rows_of", real)
    report = run(sweep, workers=0)
    assert (report.ran, report.stored, report.failed_before) == (0, 10, 2)
    report = run(sweep, workers=0, retry_failed=True)
    assert (report.ran, report.stored, report.failed_before) == (2, 10, 0)
    assert Results(tmp_path).failures().empty
    assert len(Results(tmp_path).keys()) == 12


def test_a_task_that_does_not_load_fails_alone(where, tmp_path, monkeypatch):
    real = work.case_of

    def lost(task, seed, **sizes):
        if "mirror" in task:
            raise OSError(2, "the table is gone")
        return real(task, seed, **sizes)

    work._loaded.cache_clear()
    monkeypatch.setattr(work, "case_of", lost)
    report = run(swept(where, tmp_path, seeds=[0], recipes=RECIPES[:1]), workers=0)
    work._loaded.cache_clear()
    assert (report.ran, report.failed) == (4, 4)
    assert all("the table is gone" in error for _, error in report.errors)


@pytest.mark.parametrize("wrong", [{"pool": "/no/such/pool"}, {"base": "/no/such/base"}])
def test_a_pool_or_base_that_cannot_be_opened_ends_it(where, tmp_path, wrong):
    with pytest.raises(WorkbenchError, match=r"no/such/.*nothing was run: put it right"):
        run(swept(where | wrong, tmp_path), workers=0)
    assert Results(tmp_path).failures().empty


def test_a_full_disk_ends_it_and_keeps_what_is_stored(where, tmp_path, monkeypatch):
    real, written = Results.write, []

    def full(self, row):
        if len(written) == 5:
            raise OSError(28, "No space left on device")
        written.append(row)
        return real(self, row)

    with monkeypatch.context() as patch:
        patch.setattr(Results, "write", full)
        with pytest.raises(WorkbenchError, match=r"cannot be written to .*No space left.*; 5 runs are stored"):
            run(swept(where, tmp_path), workers=0)
    assert len(Results(tmp_path).keys()) == 5
    assert Results(tmp_path).failures().empty
    report = run(swept(where, tmp_path), workers=0)
    assert (report.ran, report.stored) == (19, 5)


def test_stopping_keeps_what_is_left_for_the_next_time(where, tmp_path, monkeypatch):
    stop, real = threading.Event(), work.rows_of

    def counted(place, recipe, cases):
        if len(Results(tmp_path).keys()) == 3:
            stop.set()
        return real(place, recipe, cases)

    monkeypatch.setattr(work, "rows_of", counted)
    report = run(swept(where, tmp_path), workers=0, stop=stop)
    assert (report.ran, report.left, report.stopped) == (4, 20, True)
    assert "stopped with 20 left" in report.text(tmp_path)
    assert run(swept(where, tmp_path), workers=0).stored == 4


def test_a_run_that_another_holds_is_waited_for(where, tmp_path, monkeypatch):
    """Held by another machine's claim, which dies after a while: it is taken over, once."""
    monkeypatch.setattr(dispatch, "AGAIN", 0.2)
    sweep = swept(where, tmp_path, tasks=TASKS[:1], seeds=[0], recipes=RECIPES[:1])
    key = work._keys(sweep.runs[0])[0]
    claim = tmp_path / "claims" / f"{key}.0"
    claim.parent.mkdir()
    claim.write_text(json.dumps({"where": "elsewhere", "pid": 1, "started": 0.0}))
    monkeypatch.setattr(work._claims(tmp_path), "patience", 1.0)
    start = time.time()
    report = run(sweep, workers=0)
    assert time.time() - start > 0.9
    assert report.ran == 4
    assert not list(claim.parent.iterdir())


def test_groups_share_a_task_and_a_seed(where, tmp_path):
    groups = dispatch._groups(swept(where, tmp_path, seeds=[0, 1, 2]).runs, 1)
    assert [len(group.parts) for group in groups] == [6] * 6
    for group in groups:
        assert len({(one.task, one.seed) for part in group.parts for one in part}) == 1
        assert all(len(part) == 1 for part in group.parts)
    groups = dispatch._groups(swept(where, tmp_path, seeds=[0, 1, 2]).runs, 4)
    assert [sorted({len(part) for part in group.parts}) for group in groups] == [[4], [2]]
    assert all(len({one.recipe for one in part}) == 1 for group in groups for part in group.parts)


class Pretended:
    """Workers that finish in a given order, without doing anything; `seen` is what each was given."""

    def __init__(self, names, status=work.RAN):
        self.names, self.status, self.seen, self.waiting = names, status, [], []

    def idle(self, working):
        return [name for name in self.names if name not in working]

    def give(self, worker, does, runs, *_):
        self.seen.append((worker, does, runs))
        self.waiting.append((worker, does, runs))

    def finished(self, _):
        worker, does, runs = self.waiting.pop(0)
        yield worker, [work.Outcome(work.MISSING if does is work.look else self.status)] * len(runs)


def through(sweep, hands, folder):
    from workbench.sweep.dispatch import _Dispatch

    with dispatch._bar(False, sweep) as bar:
        return _Dispatch(sweep, folder, 1, False, threading.Event(), bar, None).through(hands)


@pytest.mark.parametrize("names", ["a", "ab", "abcdefghijklmnop"])
def test_every_run_is_handed_out_once(where, tmp_path, names):
    sweep, hands = swept(where, tmp_path, seeds=[0, 1, 2]), Pretended(names)
    report = through(sweep, hands, tmp_path)
    given = Counter(one for _, does, runs in hands.seen if does is work.carry_out for one in runs)
    assert given == Counter(sweep.runs)
    assert report.ran == len(sweep.runs) == 36
    if len(names) <= 2:  # whoever has begun on a task goes on with it, but for the last halves
        switches = sum(does is work.look for _, does, _ in hands.seen)
        assert switches == 6
    else:  # more workers than groups: they share
        assert len({worker for worker, does, _ in hands.seen if does is work.carry_out}) == len(names)


def test_claims_hold_one_at_a_time(tmp_path):
    ours, theirs = Claims(tmp_path), Claims(tmp_path)
    assert ours.take("k")
    assert not theirs.take("k")
    assert theirs.take("other")
    ours.release("k")
    assert theirs.take("k")
    theirs.close()
    assert ours.take("other")
    ours.close()
    assert not list((tmp_path / "claims").iterdir())


def test_a_dead_process_s_claim_is_taken_over(tmp_path):
    code = (
        "import os, sys; from workbench.sweep.claims import Claims; assert Claims(sys.argv[1]).take('k'); os._exit(9)"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    assert [path.name for path in (tmp_path / "claims").iterdir()] == ["k.0"]
    with Claims(tmp_path) as ours:
        assert ours.take("k")
        assert [path.name for path in (tmp_path / "claims").iterdir()] == ["k.1"]
        assert not Claims(tmp_path).take("k")


def test_another_machine_s_claim_dies_when_it_is_not_touched(tmp_path):
    claim = tmp_path / "claims" / "k.3"
    claim.parent.mkdir()
    claim.write_text(json.dumps({"where": "elsewhere", "pid": os.getpid(), "started": 0.0}))
    ours = Claims(tmp_path)
    assert not ours.take("k")
    long_ago = time.time() - 61
    os.utime(claim, (long_ago, long_ago))
    assert ours.take("k")
    assert [path.name for path in claim.parent.iterdir()] == ["k.4"]
    ours.close()


def test_a_living_claim_is_touched(tmp_path):
    with Claims(tmp_path, beat=0.05) as ours:
        assert ours.take("k")
        path = tmp_path / "claims" / "k.0"
        os.utime(path, (0, 0))
        end = time.monotonic() + 10
        while path.stat().st_mtime == 0 and time.monotonic() < end:
            time.sleep(0.02)
        assert path.stat().st_mtime > 0


def test_half_written_claims_die_of_age_alone(tmp_path):
    claim = tmp_path / "claims" / "k.0"
    claim.parent.mkdir()
    claim.write_text("")
    assert not Claims(tmp_path).take("k")
    os.utime(claim, (0, 0))
    assert Claims(tmp_path).take("k")


def test_many_threads_take_each_run_once(tmp_path):
    claim = tmp_path / "claims"
    claim.mkdir()
    for i in range(20):
        (claim / f"k{i}.0").write_text("{}")
        os.utime(claim / f"k{i}.0", (0, 0))
    taken, barrier = [], threading.Barrier(8)

    def take():
        ours = Claims(tmp_path)
        barrier.wait()
        taken.extend(f"k{i}" for i in range(20) if ours.take(f"k{i}"))

    threads = [threading.Thread(target=take) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert Counter(taken) == Counter({f"k{i}": 1 for i in range(20)})


def test_merges_for_several_tasks(tmp_path):
    """A merge of several adapters is a run of its own kind, with a row for each task."""
    sizes = {"n_train": 4, "n_validation": 3, "n_test": 5}
    names = ["rotate-right-animals", "second-animals-commas"]
    given = {"name": "merges", "results": str(tmp_path), "pool": "nano", "seeds": [0], **sizes}
    given["merges"] = [
        {"adapters": names, "baselines": [], "variants": [{"method": "average"}, {"method": "zero-shot"}]}
    ]
    sweep = sweep_of(given)
    report = run(sweep, workers=0)
    assert (report.ran, report.failed) == (3, 0), report.errors
    rows = Results(tmp_path).read()
    assert len(rows) == 6
    assert {run_from(json.loads(text)) for text in rows["run"]} == set(sweep.runs)
    next(tmp_path.glob(f"{rows.key[0]}.*")).unlink()  # one of the two rows of a run is missing: the run is
    assert (run(sweep, workers=0).ran, len(Results(tmp_path).keys())) == (1, 6)
    assert run(sweep, workers=0).stored == 3
