"""Sweeps as processes that are killed, starved of disk and run twice at once: nothing finished is lost or computed twice.

Each result is a file of its own that no later one replaces, so the files of a run tell how often it was computed.
"""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from collections import Counter
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
from distributed import Client
from pandas.testing import assert_frame_equal

from helpers import free_port
from sweeping import described, swept, tiny_pool, written
from workbench.errors import WorkbenchError
from workbench.results import Results
from workbench.sweep import Sweep, run
from workbench.sweep.cluster import connected
from workbench.sweep.hands import There

pytestmark = pytest.mark.slow

PATIENCE = 240
SLOW = [{"method": "coefficients", "k": 4, "steps": 60}]  # half a second each, so that a kill meets some under way


@pytest.fixture(scope="module")
def where(tmp_path_factory):
    return tiny_pool(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def file(where, tmp_path):
    given = described(where, tmp_path / "runs", recipes=SLOW, seeds=[0, 1, 2], n_test=20)
    return written(tmp_path / "sweep.yaml", given)


def environment():
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default", "HF_HUB_OFFLINE": "1"}


def started(file, *options, **more):
    command = [sys.executable, "-m", "workbench.cli", "sweep", str(file), *map(str, options)]
    piped = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "env": environment()}
    return subprocess.Popen(command, start_new_session=True, **piped | more)


def finished(process):
    out, err = process.communicate(timeout=PATIENCE)
    return process.returncode, out, err


def single(folder):
    """How often each run was computed and stored."""
    return Counter(path.name.partition(".")[0] for path in Path(folder).glob("*.parquet"))


def wait_for(folder, number, process=None):
    end = time.monotonic() + PATIENCE
    while len(single(folder)) < number:
        assert time.monotonic() < end, "no results came"
        assert process is None or process.poll() is None, process.communicate()
        time.sleep(0.02)


def descendants(process):
    with suppress(psutil.NoSuchProcess):
        return psutil.Process(process.pid).children(recursive=True)
    return []


def workers_of(process):
    """The processes that compute."""
    return [one for one in descendants(process) if "spawn_main" in " ".join(one.cmdline())]


def complete(file):
    """Every run of the sweep is stored, once, each file whole, nothing left over."""
    sweep = Sweep.load(file)
    assert single(sweep.results) == Counter(Results(sweep.results).read()["key"])
    assert set(single(sweep.results).values()) == {1}
    assert len(single(sweep.results)) == len(sweep.runs)
    assert Results(sweep.results).failures().empty
    assert not list((sweep.results / "claims").iterdir())


def folder(file):
    return Sweep.load(file).results


def test_a_killed_worker_loses_nothing(file):
    sweep = started(file, "--workers", 2, "--json")
    wait_for(folder(file), 3, sweep)
    victim = workers_of(sweep)[0]
    victim.send_signal(signal.SIGKILL)
    code, out, err = finished(sweep)
    assert code == 0, err
    report = json.loads(out)
    assert report["ran"] + report["stored"] == 24  # stored, not ran: by the killed one, just before it could say so
    complete(file)


def test_a_killed_command_goes_on_where_it_was(file):
    sweep = started(file, "--workers", 2)
    wait_for(folder(file), 3, sweep)
    below = descendants(sweep)
    sweep.kill()
    sweep.communicate()
    before = len(Results(folder(file)).read())  # whole rows, whatever was under way
    assert before >= 3
    _, alive = psutil.wait_procs(below, timeout=60)
    assert not alive, "workers live on without the command that started them"
    code, out, err = finished(started(file, "--workers", 2, "--json"))
    assert code == 0, err
    report = json.loads(out)
    assert report["stored"] >= before
    assert report["ran"] + report["stored"] == 24
    complete(file)


def quiet():
    return {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL, "env": environment()}


def worker(address, preload="workbench.sweep.preload"):
    command = [sys.executable, "-c", "import sys; from distributed.cli.dask_worker import main; sys.exit(main())"]
    options = ["--nthreads", "1", "--no-dashboard", "--memory-limit", "0", "--preload", preload]
    return subprocess.Popen([*command, address, *options, "--death-timeout", str(PATIENCE)], **quiet())


@contextmanager
def cluster(port):
    """A scheduler and two workers, as processes of their own."""
    address = f"tcp://127.0.0.1:{port}"
    scheduler = [sys.executable, "-c", "import sys; from distributed.cli.dask_scheduler import main; sys.exit(main())"]
    processes = [
        subprocess.Popen([*scheduler, "--host", "127.0.0.1", "--port", str(port), "--no-dashboard"], **quiet())
    ]
    processes += [worker(address) for _ in range(2)]
    try:
        with Client(address, timeout=PATIENCE, set_as_default=False) as client:
            client.wait_for_workers(2, timeout=PATIENCE)  # on a busy machine they take longer than a sweep waits
        yield address, processes[0]
    finally:
        below = [child for one in processes for child in descendants(one)]
        for one in processes:
            one.kill()
            one.wait()
        for one in below:
            with suppress(psutil.NoSuchProcess):
                one.kill()


def test_a_killed_scheduler_loses_nothing(file):
    with cluster(free_port()) as (address, scheduler):
        sweep = started(file, "--scheduler", address)
        wait_for(folder(file), 3, sweep)
        scheduler.kill()
        code, _, err = finished(sweep)
        assert code == 1
        assert f"the scheduler at {address} is gone; what has finished is stored" in " ".join(err.split())
        assert "Traceback" not in err
    before = len(Results(folder(file)).read())
    assert before >= 3
    with cluster(free_port()) as (address, _):
        code, out, err = finished(started(file, "--scheduler", address, "--json"))
        assert code == 0, err
        assert json.loads(out)["stored"] >= before
    complete(file)


def test_a_scheduler_that_goes_before_a_result_is_fetched(file):
    """Whichever way Dask puts it: the worker has ended, and what it returned can no longer be asked for."""

    with cluster(free_port()) as (address, scheduler), connected(scheduler=address) as client:
        hands = There(client, address)
        worker = hands.idle(set())[0]
        hands.give(worker, sum, [1, 2])
        assert until(hands.finished) == [(worker, 3)]
        hands.give(worker, sum, [1, 2])
        ended = hands._done.get(timeout=PATIENCE)
        scheduler.kill()
        scheduler.wait()
        hands._done.put(ended)
        with pytest.raises(WorkbenchError, match="is gone; what has finished is stored"):
            list(hands.finished(1.0))
        assert hands.idle(set()) == []
        client.close()
        with pytest.raises(WorkbenchError, match="is gone; what has finished is stored"):
            hands.give(worker, sum, [1, 2])


def test_a_worker_of_another_version_is_not_used(tmp_path):
    """Whether it is there at the beginning or its job was still in a queue then."""

    older = tmp_path / "older.py"
    older.write_text("import workbench.results as r\nr.provenance = lambda: {'versions': '0.0.1', 'commit': ''}\n")
    with cluster(free_port()) as (address, _), connected(scheduler=address) as client:
        hands = There(client, address)
        assert len(hands.idle(set())) == 2
        late = worker(address, str(older))
        try:
            client.wait_for_workers(3, timeout=PATIENCE)
            with pytest.raises(WorkbenchError, match=r"runs 0\.0\.1 at commit unknown, this process .*update one"):
                hands.idle(set())
            with pytest.raises(WorkbenchError, match=r"runs 0\.0\.1"):
                There(client, address).idle(set())
        finally:
            for one in (*descendants(late), late):
                one.kill()
            late.wait()


def until(finished):
    end = time.monotonic() + PATIENCE
    while not (found := list(finished(1.0))):
        assert time.monotonic() < end, "nothing ended"
    return found


def test_workers_do_nothing_beside_the_runs():
    """Dask's own profiler and clock would take much of their time."""

    with connected(workers=1) as client:
        beats = client.run(lambda dask_worker: {n: c.callback_time for n, c in dask_worker.periodic_callbacks.items()})
    (beats,) = beats.values()
    assert "profile" not in beats
    assert min(beats.values()) >= 500  # milliseconds


def test_nobody_at_the_scheduler_s_address(file):
    address = f"tcp://127.0.0.1:{free_port()}"

    with (
        pytest.raises(WorkbenchError, match="no scheduler answers at tcp://127"),
        connected(scheduler=address, patience=2),
    ):
        pass


def test_ctrl_c_lets_what_has_begun_end(file):
    sweep = started(file, "--workers", 2)
    wait_for(folder(file), 3, sweep)
    os.killpg(sweep.pid, signal.SIGINT)  # as a terminal does: to all of its processes
    code, out, err = finished(sweep)
    assert code == 130, err
    assert "stopping when the runs that have begun have ended" in err
    assert "Traceback" not in err
    assert "the same command goes on" in out
    before = len(Results(folder(file)).read())
    assert 3 <= before < 24
    code, out, err = finished(started(file, "--workers", 2, "--json"))
    assert code == 0, err
    assert json.loads(out)["stored"] == before
    complete(file)


def test_two_sweeps_at_once_share_the_runs(file):
    both = [started(file, "--workers", 1, "--json") for _ in range(2)]
    reports = []
    for sweep in both:
        code, out, err = finished(sweep)
        assert code == 0, err
        reports.append(json.loads(out))
    assert sum(report["ran"] for report in reports) == 24
    assert all(report["ran"] + report["stored"] == 24 for report in reports)
    complete(file)


def test_a_full_disk_stops_it_and_nothing_is_half_written(file):
    """A limit on the size of files: writes beyond it fail as on a full disk, in every process of the sweep."""

    def starve():
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))

    code, _, err = finished(started(file, "--workers", 2, preexec_fn=starve))
    assert code == 1
    assert "results cannot be written to" in " ".join(err.split())
    assert "Traceback" not in err
    assert Results(folder(file)).read().empty
    assert not list(folder(file).glob("*.parquet"))
    code, _, err = finished(started(file, "--workers", 2))
    assert code == 0, err
    complete(file)


def test_a_disk_that_fills_up_on_the_way(where, tmp_path):
    """A real file system of 256 KiB: what fitted is stored and whole, and the rest runs when there is room."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", disk], capture_output=True).returncode:
        pytest.skip("a small file system cannot be mounted here")
    try:
        file = written(tmp_path / "sweep.yaml", described(where, disk / "runs", seeds=[0, 1, 2, 3]))
        code, _, err = finished(started(file, "--workers", 2))
        assert code == 1
        assert "No space left on device" in err
        rows = Results(disk / "runs").read()
        assert 0 < len(rows) < 48
        assert set(single(disk / "runs").values()) == {1}
        subprocess.run(["mount", "-o", "remount,size=4m", disk], check=True)
        code, out, err = finished(started(file, "--workers", 2, "--json"))
        assert code == 0, err
        assert json.loads(out)["stored"] == len(rows)
        complete(file)
    finally:
        subprocess.run(["umount", disk], check=True)


def test_two_workers_give_what_one_gives(where, tmp_path):
    """Row for row and bit for bit, one thread each."""
    serial, spread = (swept(where, tmp_path / name, seeds=[0, 1, 2]) for name in ("serial", "spread"))
    run(serial, workers=0)
    code, _, err = finished(
        started(written(tmp_path / "s.yaml", described(where, spread.results, seeds=[0, 1, 2])), "--workers", 2)
    )
    assert code == 0, err
    ours, theirs = (Results(one.results).read().set_index("key").sort_index() for one in (serial, spread))
    timed = ["seconds", "written", "peak_memory"]
    names = [name for name in ours if name not in timed]
    assert len(ours) == 36
    assert_frame_equal(ours[names], theirs[names], check_exact=True)
