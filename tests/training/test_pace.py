"""The number of steps of a run with a deadline follows the machine's speed, and a resumed run follows it too."""

import dataclasses
import json
import time

import pytest

import mixlab.training.pace
from mixlab.errors import WeightsError
from mixlab.training import course, loop
from mixlab.training.budget import Plan
from mixlab.training.pace import Pace, read_changes
from tests.training.test_curriculum import QUIET, cut, kills, train


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now


@pytest.mark.parametrize("speeds", [(10, 10), (10, 5), (5, 10), (10, 5, 20, 8)])
def test_a_run_ends_at_its_deadline_with_its_last_step(monkeypatch, tmp_path, speeds):
    clock = Clock()
    monkeypatch.setattr(mixlab.training.pace, "time", clock)
    pace, step, steps = Pace(tmp_path, {}), 0, 6000  # 600 s, at 10 steps a second
    pace.begin(0, 700.0)
    changes = 0
    while step < steps:
        clock.now += 1 / speeds[min(int((clock.now - 100) / 600 * len(speeds)), len(speeds) - 1)]
        step += 1
        if found := pace.look(step, steps):
            assert found > step
            steps, changes = found, changes + 1
    assert 696.0 < clock.now < 703.0
    assert changes < 40


def ran(monkeypatch, tmp_path, steps, speed, seconds=600.0):
    """A run with a deadline after `seconds` that begins with a plan of `steps`: when it ends, steps, changes."""
    clock = Clock()
    monkeypatch.setattr(mixlab.training.pace, "time", clock)
    pace, step, changes = Pace(tmp_path, {}), 0, []
    pace.begin(0, 100.0 + seconds)
    while step < steps and clock.now < 100.0 + seconds:
        clock.now += 1 / speed(clock.now - 100.0)
        step += 1
        if found := pace.look(step, steps):
            steps = found
            changes.append((step, found))
    return clock.now - 100.0, step, changes


@pytest.mark.parametrize("steps", [1, 20, 113, 1764])
def test_a_plan_that_was_measured_in_a_stall_grows_until_the_time_is_used(monkeypatch, tmp_path, steps):
    end, done, changes = ran(monkeypatch, tmp_path, steps, lambda now: 10.0)
    assert 590.0 < end < 602.0
    assert done > 5900
    assert len(changes) < 40


@pytest.mark.parametrize("stall", [(0, 60), (60, 100), (200, 230), (500, 520)])
def test_a_stall_takes_no_more_than_its_time(monkeypatch, tmp_path, stall):
    begin, end_of_stall = stall
    end, done, changes = ran(
        monkeypatch, tmp_path, 6000, lambda now: 0.5 if begin <= now < end_of_stall else 10.0
    )
    assert 590.0 < end < 603.0
    assert done > 0.97 * 10 * (600 - (end_of_stall - begin))
    # While much is left no look takes more than half of it away.
    steps = 6000
    for step, found in changes:
        assert step > 0.7 * 600 * 10 or found >= step + (steps - step) // 2
        steps = found


def test_without_a_deadline_nothing_changes(monkeypatch, tmp_path):
    clock = Clock()
    monkeypatch.setattr(mixlab.training.pace, "time", clock)
    pace = Pace(tmp_path, {})
    pace.begin(3, None)
    clock.now += 1000
    assert pace.look(5, 9) == 0


class Scripted(Pace):
    """Its looks are written down beforehand: 20 steps become 8, then 12."""

    def look(self, step: int, steps: int) -> int:
        return {4: 8, 7: 12}.get(step, 0) if self._deadline is not None else 0


@pytest.fixture
def scripted(monkeypatch):
    def plan(prepared, state, **_):
        recipe = dataclasses.replace(prepared.recipe, steps=20, epochs=None)
        return Plan(recipe=recipe, deadline=time.monotonic() + 600)

    monkeypatch.setattr(course, "Pace", Scripted)
    monkeypatch.setattr(loop, "plan_steps", plan)


def run_budget(run):
    train(run, epochs=None, threads=1, budget="10m")


def rates(run):
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [row["lr"] for row in rows if row["event"] == "train"]


@pytest.mark.parametrize("step", [2, 4, 5, 7, 8, 11])
def test_a_run_stopped_before_at_or_after_a_change_resumes_to_the_same_bits(
    step, scripted, tmp_path, monkeypatch
):
    run_budget(tmp_path / "whole")
    assert len(rates(tmp_path / "whole")) == 12
    assert rates(tmp_path / "whole")[-1] < rates(tmp_path / "whole")[6]
    run = tmp_path / "run"
    cut(monkeypatch, step, lambda: run_budget(run))
    assert read_changes(run) == {at: steps for at, steps in {4: 8, 7: 12}.items() if at <= step}
    loop.resume(run, screen=QUIET)
    if step >= 7:
        assert kills.fingerprint(run) == kills.fingerprint(tmp_path / "whole")
        assert rates(run) == rates(tmp_path / "whole")
    else:  # without a deadline, as long as was known when it was stopped
        assert len(rates(run)) == (8 if step >= 4 else 20)


def test_a_finished_run_stays_finished(scripted, tmp_path):
    run_budget(tmp_path / "run")
    before = kills.fingerprint(tmp_path / "run")
    loop.resume(tmp_path / "run", screen=QUIET)
    assert kills.fingerprint(tmp_path / "run") == before
    assert len(rates(tmp_path / "run")) == 12


@pytest.mark.parametrize("text", ['{"4": "many"}', '{"4": null}', "[]"])
def test_a_damaged_list_says_where(tmp_path, text):
    (tmp_path / "pace.json").write_text(text)
    with pytest.raises(Exception, match=r"pace\.json|no list of changes|holds no") as caught:
        read_changes(tmp_path)
    assert text == "[]" or isinstance(caught.value, WeightsError)
