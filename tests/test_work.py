"""Long work beside the kernel's thread: progress, stopping, one at a time, and how errors are told."""

import threading
import time

import pytest

from workbench.widgets.parts import Panel
from workbench.widgets.work import Work

WAIT = 30


def test_a_job_tells_how_far_it_is_and_ends():
    work, seen, ended, free = Work(), [], [], threading.Event()

    def job(tell):
        assert not tell(1, 4, "k = <b>$2$</b>")
        seen.append((work._bar.value, work._bar.max, work._words.value, work.layout.display))
        free.wait(WAIT)

    assert work.layout.display == "none"
    work.start(job, ended.append)
    assert work.running
    assert not work.wait(0.01)
    free.set()
    assert work.wait(WAIT)
    assert seen == [(1, 4, "k = <b>[dollar]2[dollar]</b> (1 of 4)", "flex")]
    assert ended == [None]
    assert (work.running, work.stopped, work.layout.display) == (False, False, "none")


def test_stop_ends_a_job_where_it_next_tells():
    work, started, done = Work(), threading.Event(), []

    def job(tell):
        started.set()
        for i in range(10_000):
            if tell(i, 10_000):
                return
            done.append(i)
            time.sleep(0.002)

    work.start(job)
    assert started.wait(WAIT)
    work._stop.click()
    assert work.wait(WAIT)
    assert work.stopped
    assert len(done) < 10_000
    work.stop()  # nothing runs: nothing happens
    assert work._words.value == "stopping …"


def test_a_new_job_takes_the_place_of_the_old_one_and_of_those_that_wait():
    work, started, go, order = Work(), threading.Event(), threading.Event(), []

    def first(tell):
        started.set()
        while not tell(0, 1):
            time.sleep(0.002)
        go.wait(WAIT)  # until the others wait
        order.append("first stopped")

    work.start(first, lambda error: order.append("first ended"))
    assert started.wait(WAIT)
    work.start(lambda tell: order.append("second"), lambda error: order.append("second ended"))
    work.start(lambda tell: order.append("third"), lambda error: order.append("third ended"))
    go.set()
    assert work.wait(WAIT)
    assert [one for one in order if not one.startswith("second")] == ["first stopped", "third", "third ended"]
    assert "second ended" not in order
    assert not work.stopped


def test_a_loss_is_shown_as_one():
    work, words = Work(), []

    def job(tell):
        tell(3, 20, 0.12345)
        words.append(work._words.value)

    work.start(job)
    assert work.wait(WAIT)
    assert words == ["loss 0.123 (3 of 20)"]


@pytest.mark.parametrize("text", ["<img src=x onerror=alert(1)>", ""])
def test_what_a_job_raises_is_told_as_a_sentence_and_in_full(text):
    panel, work = Panel([]), Work()

    def job(tell):
        raise ValueError(text)

    work.start(job, panel.told)
    assert work.wait(WAIT)
    assert isinstance(panel.error, ValueError)
    shown = panel._message.value
    assert "could not be computed: " + ("&lt;img" if text else "ValueError") in shown
    assert "<img" not in shown
    assert "Traceback" in shown[shown.index("<details>") :]
    panel.told(None)
    assert (panel.error, panel._message.value) == (None, "")
