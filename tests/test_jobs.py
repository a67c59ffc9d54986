"""workbench.jobs: the order of the lines, what really runs at once, and failures that stay by themselves."""

import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

from workbench.jobs import each


def nothing():
    pass


def fail(text):
    raise ValueError(text)


def die():
    os._exit(1)


def meet(mine, other):
    """Say that it is here and wait for the other, which a job that has to wait for this one's end never says."""
    Path(mine).touch()
    until(Path(other).exists)


def until(true, seconds=100.0):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


class Stay(int):
    def __call__(self):
        Path(str(int(self))).write_text(str(os.getpid()))
        time.sleep(120)


def alive(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


@pytest.mark.parametrize("at_once", [1, 2])
def test_a_line_a_job_in_order_and_failures_by_themselves(capsys, at_once):
    texts = {"second": "first line\n\x1b[31mthe last line\x1b[0m\n", "fourth": ""}
    jobs = {name: nothing for name in ("first", "second", "third", "fourth")}
    jobs |= {name: partial(fail, text) for name, text in texts.items()}
    assert each(jobs, at_once) == {"second": "the last line", "fourth": "ValueError"}
    lines = [re.sub(r" … \d+ s", "", line) for line in capsys.readouterr().out.splitlines()]
    assert lines == ["first ok", "second failed: the last line", "third ok", "fourth failed: ValueError"]


def test_as_many_as_said_run_at_once(tmp_path):
    names = [str(tmp_path / name) for name in "ab"]
    assert each({"a": partial(meet, *names), "b": partial(meet, *reversed(names))}, 2) == {}


def test_a_job_that_ends_its_process_is_a_failure():
    (line,) = each({"dies": die}, 2).values()
    assert "terminated abruptly" in line


@pytest.mark.slow
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_no_process_outlives_the_one_that_was_ended(tmp_path, how):
    """Killed alone, or interrupted with all its processes as a terminal does; what waited never starts."""
    script = (
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"  # a shell's background jobs ignore it
        "from workbench.jobs import each; import test_jobs\neach({str(i): test_jobs.Stay(i) for i in range(4)}, 2)"
    )
    path = os.pathsep.join([str(Path(__file__).parent), *filter(None, [os.environ.get("PYTHONPATH")])])
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": path},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        until(lambda: len([file for file in tmp_path.iterdir() if file.read_text()]) == 2)
        if how == signal.SIGINT:
            os.killpg(process.pid, how)
        else:
            process.send_signal(how)
        assert process.wait(30) != 0
    finally:
        process.kill()
        process.wait()
    until(lambda: not any(alive(int(file.read_text())) for file in tmp_path.iterdir()))
    assert len(list(tmp_path.iterdir())) == 2
