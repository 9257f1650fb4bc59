"""What a resumed training does with a run whose files do not belong together, or lead elsewhere: nothing is lost."""

import json
import os
import shutil
from pathlib import Path

import pytest

import mixlab
from mixlab.errors import TrainingError, WeightsError
from mixlab.files import sha256
from mixlab.report.run_log import read_run_log
from mixlab.report.screen import Screen
from tests.forked import mixlab as command

QUIET = Screen(quiet=True)
TINY = {
    "model__hidden_dim": 8, "model__token_mlp_dim": 4, "model__channel_mlp_dim": 8, "model__num_blocks": 1,
    "threads": 1, "epochs": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A finished run of 24 steps, with checkpoints of several."""
    run = tmp_path_factory.mktemp("trained") / "run"
    mixlab.train(
        "digits", "digits", run=run, screen=QUIET, figures=False, steps=24, checkpoint_seconds=0.0, **TINY
    )
    return run


@pytest.fixture
def run(trained, tmp_path):
    return Path(shutil.copytree(trained, tmp_path / "run"))


def content(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def forget(run: Path, *events: str) -> None:
    """Take events out of the log."""
    log = run / "metrics.jsonl"
    lines = log.read_text().splitlines(keepends=True)
    log.write_text("".join(line for line in lines if json.loads(line)["event"] not in events))


@pytest.mark.parametrize("gone", ["removed", "renamed"])
@pytest.mark.parametrize("ended", [True, False], ids=["finished", "not finished"])
def test_a_run_whose_checkpoints_are_gone_is_refused_and_stays_as_it_is(run, gone, ended):
    if gone == "removed":
        shutil.rmtree(run / "checkpoints")
    else:
        (run / "checkpoints").rename(run / "old_checkpoints")
    if not ended:
        forget(run, "end")
    before = content(run)
    with pytest.raises(TrainingError, match=r"no checkpoint to go on from.*--start-over"):
        mixlab.resume(run, screen=QUIET, figures=False)
    assert content(run) == before


def test_weights_alone_are_reason_enough(run):
    shutil.rmtree(run / "checkpoints")
    (run / "metrics.jsonl").unlink()
    before = content(run)
    with pytest.raises(TrainingError, match="has weights"):
        mixlab.resume(run, screen=QUIET, figures=False)
    assert content(run) == before


def test_starting_over_is_asked_for_and_keeps_all_that_was_there(run):
    before = content(run)
    shutil.rmtree(run / "checkpoints")
    assert command("train", "--resume", run, cwd=run.parent).returncode == 1
    done = command("train", "--resume", run, "--start-over", "--without-figures", cwd=run.parent)
    assert done.returncode == 0, done.stderr
    (aside,) = run.glob("before_*")
    kept = content(aside)
    assert kept["weights.safetensors"] == before["weights.safetensors"]
    assert kept["metrics.jsonl"] == before["metrics.jsonl"]
    assert (run / "weights.safetensors").read_bytes() == before["weights.safetensors"]  # the same seed
    assert [row["event"] for row in read_run_log(run / "metrics.jsonl")].count("end") == 1


def test_start_over_without_a_run_is_wrong_usage(tmp_path):
    assert command("train", "digits", "--start-over", cwd=tmp_path).returncode == 2


def test_the_end_of_a_run_is_not_given_up_for_an_older_checkpoint(run):
    newest = max((run / "checkpoints").iterdir())
    (newest / "state.json").write_text("{}")
    before = content(run)
    with pytest.raises(TrainingError, match="has ended after step 24"):
        mixlab.resume(run, screen=QUIET, figures=False)
    assert content(run) == before


def rewrite(checkpoint: Path, name: str, change) -> None:
    """Change a JSON file of a checkpoint, and its manifest with it, as one who means it would."""
    values = json.loads((checkpoint / name).read_text())
    change(values)
    (checkpoint / name).write_text(json.dumps(values))
    if name != "manifest.json":
        facts = {"size": (checkpoint / name).stat().st_size, "sha256": sha256(checkpoint / name)}
        rewrite(checkpoint, "manifest.json", lambda manifest: manifest.update({name: facts}))


@pytest.mark.parametrize(
    ("name", "change", "reason"),
    [
        ("state.json", lambda state: state.pop("scaler"), "scaler"),
        ("state.json", lambda state: state.update(seconds="long"), "seconds must be a number"),
        ("state.json", lambda state: state.update(best=[1]), "best must be an object"),
        ("state.json", lambda state: state.pop("best"), "best"),
        ("state.json", lambda state: state.update(step=7), "step 7"),
        ("manifest.json", lambda manifest: manifest.pop("optimizer.safetensors"), "incomplete"),
        ("manifest.json", lambda manifest: manifest.pop("model.safetensors"), "incomplete"),
        (
            "manifest.json",
            lambda manifest: manifest.update({"../../recipe.toml": {}}),
            "no file of a checkpoint",
        ),
    ],
)
def test_an_incomplete_checkpoint_is_passed_over_for_the_one_before(run, name, change, reason, capsys):
    forget(run, "end")
    rewrite(max((run / "checkpoints").iterdir()), name, change)
    older = min((run / "checkpoints").iterdir())
    training = mixlab.resume(run, screen=Screen(), figures=False)
    said = capsys.readouterr().out
    assert training["steps"] == 24
    assert "skipped a damaged checkpoint: step_00000024" in said
    assert reason in said
    assert f"resumed after step {int(older.name[5:])} of 24" in said


@pytest.mark.parametrize(
    "name",
    ["checkpoints", "figures", "metrics.jsonl", ".lock", "report.html", "weights.safetensors", "split.csv"],
)
def test_no_link_in_a_run_is_followed(run, name, tmp_path):
    victim = tmp_path / "victim"
    place = run / name
    if place.is_dir():
        shutil.move(place, victim)
        (victim / ".a.1.tmp").mkdir()
    else:
        victim.write_text("precious\n")
        place.unlink(missing_ok=True)
    place.parent.mkdir(exist_ok=True)
    place.symlink_to(victim)
    before = content(victim) if victim.is_dir() else victim.read_bytes()
    with pytest.raises(WeightsError, match=f"{name} is a link"):
        mixlab.resume(run, screen=QUIET, figures=False)
    assert (content(victim) if victim.is_dir() else victim.read_bytes()) == before
    if victim.is_dir():
        assert (victim / ".a.1.tmp").is_dir()


def test_a_pipe_in_a_run_is_refused_and_not_waited_for(run):
    (run / "split.csv").unlink()
    os.mkfifo(run / "split.csv")
    with pytest.raises(WeightsError, match="no regular file"):
        mixlab.resume(run, screen=QUIET, figures=False)


def test_what_is_not_known_to_be_ours_is_not_pruned(run):
    forget(run, "end")
    stranger = run / "checkpoints" / "step_00000000"  # no training saves before its first step
    stranger.mkdir()
    (stranger / "thesis.txt").write_text("precious")
    for old in sorted((run / "checkpoints").iterdir())[2:]:
        shutil.rmtree(old)
    mixlab.resume(run, screen=QUIET, figures=False)
    assert (stranger / "thesis.txt").read_text() == "precious"
