"""The number of steps of a run with a deadline follows the machine's speed, and a resumed run follows it too."""

import io
import json
import time

import pytest

from benchmarks.reliability import kills
from mixlab.errors import WeightsError
from mixlab.report.screen import Screen
from mixlab.training.clock import Clock, read_changes
from mixlab.training.signals import Interrupted
from tests.training.seams import TINY, StopAfter, resume, steps_of, train, with_decisions


class Time:
    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.mark.parametrize("speeds", [(10, 10), (10, 5), (5, 10), (10, 5, 20, 8)])
def test_a_run_ends_at_its_deadline_with_its_last_step(speeds):
    time_ = Time()
    clock, changes = Clock(6000, deadline=700.0, now=time_), 0  # 600 s, at 10 steps a second
    while clock.step < clock.num_steps:
        time_.now += 1 / speeds[min(int((time_.now - 100) / 600 * len(speeds)), len(speeds) - 1)]
        clock.step += 1
        if found := clock.look():
            assert found > clock.step
            clock.change(found)
            changes += 1
    assert 696.0 < time_.now < 703.0
    assert changes < 40


def ran(steps, speed, seconds=600.0):
    """A run with a deadline after `seconds` that begins with a plan of `steps`: when it ends, steps, changes."""
    time_ = Time()
    clock, changes = Clock(steps, deadline=100.0 + seconds, now=time_), []
    while clock.step < clock.num_steps and not clock.is_late:
        time_.now += 1 / speed(time_.now - 100.0)
        clock.step += 1
        if found := clock.look():
            clock.change(found)
            changes.append((clock.step, found))
    return time_.now - 100.0, clock.step, changes


@pytest.mark.parametrize("steps", [1, 20, 113, 1764])
def test_a_plan_that_was_measured_in_a_stall_grows_until_the_time_is_used(steps):
    end, done, changes = ran(steps, lambda now: 10.0)
    assert 590.0 < end < 602.0
    assert done > 5900
    assert len(changes) < 40


@pytest.mark.parametrize("stall", [(0, 60), (60, 100), (200, 230), (500, 520)])
def test_a_stall_takes_no_more_than_its_time(stall):
    begin, end_of_stall = stall
    end, done, changes = ran(6000, lambda now: 0.5 if begin <= now < end_of_stall else 10.0)
    assert 590.0 < end < 603.0
    assert done > 0.97 * 10 * (600 - (end_of_stall - begin))
    # While much is left no look takes more than half of it away.
    steps = 6000
    for step, found in changes:
        assert step > 0.7 * 600 * 10 or found >= step + (steps - step) // 2
        steps = found


def test_without_a_deadline_nothing_changes():
    time_ = Time()
    clock = Clock(9, step=3, now=time_)
    time_.now += 1000
    clock.step = 5
    assert clock.look() == 0


class Scripted(Clock):
    """Its looks are written down beforehand: 20 steps become 8, then 12."""

    def look(self) -> int:
        return {4: 8, 7: 12}.get(self.step, 0) if self.deadline is not None else 0


def run_budget(run, **options):
    decisions = with_decisions(decide_steps=steps_of(20, deadline=time.monotonic() + 600))
    doubles = {"decisions": decisions, "clock_type": Scripted}
    train("digits", "digits", run, budget="10m", doubles=doubles, epochs=None, threads=1, **TINY, **options)


def rates(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["lr"] for row in rows if row["event"] == "train"]


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    run = tmp_path_factory.mktemp("runs") / "whole"
    screen = Screen()
    screen.console.file = io.StringIO()
    run_budget(run, screen=screen)
    told = screen.console.file.getvalue()
    assert "slower than it was: 20 steps became 8," in told
    assert "faster than it was: 8 steps became 12," in told
    assert len(rates(run)) == 12
    assert rates(run)[-1] < rates(run)[6]
    return run


@pytest.mark.parametrize("step", [2, 4, 5, 7, 8, 11])
def test_a_run_stopped_before_at_or_after_a_change_resumes_to_the_same_bits(step, whole, tmp_path):
    run = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_budget(run, screen=StopAfter(step))
    assert read_changes(run) == {at: steps for at, steps in {4: 8, 7: 12}.items() if at <= step}
    resume(run)
    if step >= 7:
        assert kills.fingerprint(run) == kills.fingerprint(whole)
        assert rates(run) == rates(whole)
    else:  # without a deadline, as long as was known when it was stopped
        assert len(rates(run)) == (8 if step >= 4 else 20)


def test_a_finished_run_stays_finished(whole):
    before = kills.fingerprint(whole)
    resume(whole)
    assert kills.fingerprint(whole) == before
    assert len(rates(whole)) == 12


@pytest.mark.parametrize("text", ['{"4": "many"}', '{"4": null}', "[]"])
def test_a_damaged_list_says_where(tmp_path, text):
    (tmp_path / "pace.json").write_text(text)
    with pytest.raises(Exception, match=r"pace\.json|no list of changes|holds no") as caught:
        read_changes(tmp_path)
    assert text == "[]" or isinstance(caught.value, WeightsError)
