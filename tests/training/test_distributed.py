"""Several processes that train as one: the same bits, the same images, and what happens when one is lost."""

import csv
import io
import json
import os
import pickle
import signal
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

import mixlab
from benchmarks.reliability import kills, ranks, worlds
from mixlab.checkpoint.checkpoints import load_newest_checkpoint
from mixlab.checkpoint.sharded import read_index
from mixlab.errors import DiskError, ExampleError, UsageError, WeightsError
from mixlab.report.run_log import read_run_log
from mixlab.training import course, fit
from mixlab.training import step as step_module
from mixlab.training.choose import exchange_of
from mixlab.training.choose_split import recipe_of
from mixlab.training.distributed import ALONE, World, check_own_cards
from mixlab.training.exchanges.exact import Exact
from mixlab.training.exchanges.fsdp import Fsdp
from mixlab.training.keys import override
from mixlab.training.objectives.labels import Labels
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState
from tests.training.seams import QUIET, TINY, StopAfter

PLAIN = {"steps": 6, "epochs": None, "threads": 1, "batch_size": 32, "keep_weights": "last", "seed": 3}
PLAIN |= {"augment__mixup_alpha": 0.0, "augment__cutmix_alpha": 0.0, "model__stochastic_depth": 0.0}
TWO_BLOCKS = TINY | {"model__num_blocks": 2}


@pytest.fixture(autouse=True)
def _one_thread():
    torch.set_num_threads(1)


def train(
    run: Path,
    size: int,
    *,
    seconds: float = 100,
    patch=None,
    stop_after: int = 0,
    with_report=False,
    **options,
) -> list[int]:
    """Exit statuses of `size` ranks that train digits in `run`, or go on with it.

    stop_after: the step after which the last rank gets SIGTERM.
    """

    def job():
        if patch is not None:
            patch()
        is_last = int(os.environ.get("RANK", "0")) == size - 1
        screen = StopAfter(stop_after) if stop_after and is_last else QUIET
        if (run / "recipe.toml").exists():
            mixlab.resume(run, screen=screen, figures=False)
        else:
            mixlab.train(
                "digits",
                "digits",
                run=run,
                screen=screen,
                figures=False,
                with_pictures=False,
                **(PLAIN | TWO_BLOCKS | options),
            )

    children = ranks.start(job, size=size, with_report=with_report)
    statuses = ranks.wait(children, seconds)
    if statuses is None:
        ranks.kill(children, signal.SIGKILL)
        ranks.wait(children, 10)
        pytest.fail(f"{size} ranks still ran after {seconds} s")
    return statuses


def weights(run: Path) -> torch.Tensor:
    tensors = load_file(run / "weights.safetensors")
    return torch.cat([tensors[name].flatten() for name in sorted(tensors)])


def losses(run: Path) -> list[float]:
    return [row["loss"] for row in read_run_log(run / "metrics.jsonl") if row["event"] == "train"]


# Exact mode


@pytest.fixture(scope="module")
def images(tmp_path_factory) -> Path:
    return worlds.write_pictures(tmp_path_factory.mktemp("pictures"))


def test_exact_mode_has_the_same_bits_on_other_numbers_of_ranks_and_workers_changed_in_mid_run(
    images, tmp_path
):
    found = []
    options = TWO_BLOCKS | {"model__name": "mixer_pico", "virtual_shards": 4}
    for name, first, second in (("one", (1, 0), (1, 0)), ("other", (2, 2), (4, 0))):
        (tmp_path / name).mkdir()
        run, order = worlds.train_in_two(tmp_path / name, images, first, second, 8, **options)
        found.append((kills.fingerprint(run), order))
    assert found[0] == found[1]


@pytest.mark.slow
def test_an_odd_number_of_ranks_shares_the_shards_and_validation_chooses_the_same_weights(tmp_path):
    options = {"virtual_shards": 4, "keep_weights": "best", "epochs": 2, "steps": None, "batch_size": 128}
    for size in (1, 3):
        assert train(tmp_path / f"{size}", size, **options) == [0] * size
    assert kills.fingerprint(tmp_path / "1") == kills.fingerprint(tmp_path / "3")


def test_sharpness_aware_steps_have_the_same_bits_on_one_and_two_ranks(tmp_path):
    options = {"virtual_shards": 2, "steps": 3, "optimizer__sam_rho": 0.1, "optimizer__gsam_alpha": 0.2}
    for size in (1, 2):
        assert train(tmp_path / f"{size}", size, **options) == [0] * size
    assert kills.fingerprint(tmp_path / "1") == kills.fingerprint(tmp_path / "2")


def test_threads_are_one_in_exact_mode_unless_the_recipe_says_otherwise(tmp_path):
    options = {key: value for key, value in PLAIN.items() if key != "threads"}
    mixlab.train(
        "digits",
        "digits",
        run=tmp_path / "run",
        screen=QUIET,
        figures=False,
        virtual_shards=2,
        **(options | {"steps": 1}),
    )
    assert recipe_of(tmp_path / "run").threads == 1


# Data parallel, and spread over the ranks


def test_ddp_does_what_one_process_does_up_to_rounding(tmp_path):
    for size in (1, 2):
        assert train(tmp_path / f"{size}", size, accumulate=2) == [0] * size
    one, two = weights(tmp_path / "1"), weights(tmp_path / "2")
    assert not torch.equal(one, two)  # the sum is taken in another order, which is why there is an exact mode
    assert torch.allclose(one, two, rtol=0, atol=2e-4)
    assert np.allclose(losses(tmp_path / "1"), losses(tmp_path / "2"), atol=1e-4)


@pytest.mark.slow
def test_fsdp_saved_on_two_ranks_goes_on_with_the_same_bits_and_loads_on_three(tmp_path):
    options = {"parallel": "fsdp", "ema_decay": 0.9}
    assert train(tmp_path / "whole", 2, **options) == [0, 0]
    ends = {}
    for size in (2, 3):
        run = tmp_path / f"{size}"
        assert train(run, 2, stop_after=4, **options) == [143, 143]
        step = load_newest_checkpoint(run / "checkpoints")[0]
        assert step.parts is not None
        assert {path.name for path in step.parts.glob("*.distcp")} == {"__0_0.distcp", "__1_0.distcp"}
        assert train(run, size) == [0] * size
        ends[size] = kills.fingerprint(run)
    assert ends[2] == kills.fingerprint(tmp_path / "whole")
    assert train(tmp_path / "ddp", 2, ema_decay=0.9) == [0, 0]
    for other in ("3", "ddp"):
        assert torch.allclose(weights(tmp_path / "whole"), weights(tmp_path / other), rtol=0, atol=2e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("first", "second"), [(1, 2), (2, 1)])
def test_a_checkpoint_of_one_process_is_spread_over_two_and_the_other_way_round(first, second, tmp_path):
    options = {"parallel": "fsdp", "ema_decay": 0.9}
    assert train(tmp_path / "run", first, stop_after=4, **options) == [143] * first
    assert train(tmp_path / "run", second) == [0] * second
    assert train(tmp_path / "whole", 1, **options) == [0]
    assert torch.allclose(weights(tmp_path / "whole"), weights(tmp_path / "run"), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_fsdp_ranks_with_other_numbers_of_parts_do_not_wait_for_each_other(tmp_path):
    options = {"parallel": "fsdp", "batch_size": 3, "accumulate": 3, "timeout_seconds": 20}
    assert train(tmp_path / "run", 2, **options) == [0, 0]
    assert train(tmp_path / "one", 1, **options) == [0]
    assert torch.allclose(weights(tmp_path / "one"), weights(tmp_path / "run"), rtol=0, atol=2e-4)


@pytest.mark.slow
def test_weights_that_cannot_be_written_do_not_mix_the_checkpoints_of_two_steps(tmp_path):
    def patch():
        real, real_step = course.save_weights, fit.train_step

        def full(*arguments):
            if not (tmp_path / "free").exists():
                raise DiskError("could not write: No space left on device", where="weights")
            real(*arguments)

        def step(state, batch, clock):
            if clock.step == 4:
                (tmp_path / "free").touch()
            return real_step(state, batch, clock)

        course.save_weights, fit.train_step = full, step

    options = {"parallel": "fsdp", "checkpoint_seconds": 0.0, "timeout_seconds": 20}
    assert train(tmp_path / "run", 2, patch=patch, **options) == [0, 0]
    assert train(tmp_path / "calm", 2, **options) == [0, 0]
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(tmp_path / "calm")


def test_a_full_disk_under_one_rank_of_a_spread_save_is_survived_by_all(tmp_path, capfd):
    def patch():
        from mixlab.checkpoint import sharded

        real = sharded.write_shards

        def full(folder, tensors, group):
            if not (tmp_path / "full").exists() and torch.distributed.get_rank() == 1:
                (tmp_path / "full").touch()
                folder = Path("/proc/no such place")
            real(folder, tensors, group)

        sharded.write_shards = full

    options = {"parallel": "fsdp", "checkpoint_seconds": 0.0}
    assert train(tmp_path / "run", 2, patch=patch, **options) == [0, 0], capfd.readouterr().err
    assert (tmp_path / "full").exists()
    assert load_newest_checkpoint(tmp_path / "run" / "checkpoints")[0].step == 6


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"optimizer.name": "muon"}, "muon"),
        ({"precision": "fp16"}, "fp16"),
        ({"optimizer.name": "sgd", "optimizer.momentum_dtype": "bf16"}, "bf16"),
    ],
)
def test_what_fsdp_cannot_do_is_refused(options, words):
    recipe = override(Recipe(steps=1, parallel="fsdp"), options)
    with pytest.raises(UsageError, match="statistics"):
        Fsdp(World(0, 2)).check(torch.nn.BatchNorm1d(2), Recipe(parallel="fsdp"))
    with pytest.raises(UsageError, match=words):
        TrainState(
            torch.nn.Linear(2, 2), recipe, Labels(recipe.loss, None, 2), torch.device("cpu"), World(0, 2)
        )


def test_two_ranks_on_one_gpu_are_refused():
    check_own_cards([("a", "GPU-1"), ("a", "GPU-2"), ("b", "GPU-1")])
    with pytest.raises(UsageError, match="ranks 1 and 2 have the same GPU of b"):
        check_own_cards([("a", "GPU-1"), ("b", "GPU-1"), ("b", "GPU-1")])


# Evaluation


@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_every_image_is_counted_once_on_any_number_of_ranks(parallel, tmp_path):
    for size in (1, 3):
        run = tmp_path / f"{size}"
        options = {"virtual_shards": 3, "batch_size": 33} if parallel == "ddp" else {"parallel": "fsdp"}
        assert train(run, size, with_report=True, **options) == [0] * size
        with (run / "predictions.csv").open() as file:
            assert len({row["path"] for row in csv.DictReader(file)}) == 357
        assert read_run_log(run / "metrics.jsonl")[-1]["test"]["num_images"] == 357
        assert (run / "report.html").is_file()
    if parallel == "ddp":
        assert (tmp_path / "1/predictions.csv").read_bytes() == (tmp_path / "3/predictions.csv").read_bytes()


# Bad moments


def test_a_signal_to_one_rank_stops_all_with_the_state_saved(tmp_path):
    options = {"ema_decay": 0.9, "accumulate": 2, "model__stochastic_depth": 0.2, "augment__mixup_alpha": 0.4}
    assert train(tmp_path / "run", 2, stop_after=3, **options) == [143, 143]
    assert load_newest_checkpoint(tmp_path / "run" / "checkpoints")[0].step == 3
    assert losses(tmp_path / "run") != []
    assert train(tmp_path / "run", 2) == [0, 0]
    assert train(tmp_path / "whole", 2, **options) == [0, 0]
    assert kills.fingerprint(tmp_path / "run") == kills.fingerprint(tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "seconds"), [(signal.SIGKILL, 30), pytest.param(signal.SIGSTOP, 30, marks=pytest.mark.slow)]
)
def test_a_killed_or_hung_rank_is_named_with_what_it_was_doing(number, seconds, tmp_path, capfd):
    run = tmp_path / "run"

    def patch():
        real = fit.train_step

        def lost(state, batch, clock):
            if clock.step == 2 and state.world.rank == 1:
                time.sleep(1.5)  # long enough for a sign of life that says where it is
                os.kill(os.getpid(), number)
            return real(state, batch, clock)

        fit.train_step = lost

    def job():
        patch()
        mixlab.train(
            "digits",
            "digits",
            run=run,
            screen=QUIET,
            figures=False,
            **(PLAIN | {"timeout_seconds": 4, "steps": 50}),
        )

    children = ranks.start(job, size=2)
    began = time.monotonic()
    while ranks.wait(children[:1], 0.1) is None:
        assert time.monotonic() - began < seconds
    ranks.kill(children[1:], signal.SIGKILL)
    ranks.wait(children[1:], 5)
    error = capfd.readouterr().err
    assert "no sign of life from rank 1" in error, error
    assert f"process {children[1]}" in error
    assert "computing step 3" in error
    assert "4 s for each other" in error
    # What was saved before is there, and another number of ranks goes on with it or begins again.
    assert train(run, 1) == [0]


def test_a_batch_that_is_not_finite_on_one_rank_stops_all_and_is_listed_whole(tmp_path, capfd):
    def patch():
        real = step_module.mix

        def spoilt(image, *arguments, step, **options):
            if step == 2 and torch.distributed.get_rank() == 1:
                image = image * float("nan")
            return real(image, *arguments, step=step, **options)

        step_module.mix = spoilt

    assert train(tmp_path / "run", 2, patch=patch) == [1, 1]
    assert "loss became nan at step 2" in capfd.readouterr().err
    with (tmp_path / "run" / "nonfinite.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len({row["index"] for row in rows}) == 32
    assert train(tmp_path / "other", 2, patch=patch, skip_nonfinite=1) == [0, 0]
    assert len(losses(tmp_path / "other")) == 5


@pytest.mark.parametrize("size", [1, 2])
def test_exact_mode_goes_on_after_a_batch_that_was_left_out(size, tmp_path):
    def patch():
        real = step_module.mix

        def spoilt(image, *arguments, step, shard, **options):
            if step == 2 and shard == 1:
                image = image * float("nan")
            return real(image, *arguments, step=step, shard=shard, **options)

        step_module.mix = spoilt

    options = {"virtual_shards": 2, "skip_nonfinite": 1}
    assert train(tmp_path / "run", size, patch=patch, **options) == [0] * size
    assert len(losses(tmp_path / "run")) == 5


def test_a_rank_without_readable_pictures_goes_on_and_storage_that_is_gone_is_said_by_all(tmp_path, capfd):
    data = worlds.write_pictures(tmp_path / "data")
    options = PLAIN | {
        "steps": 8, "batch_size": 2, "data__in_memory": False, "data__num_workers": 0, "data__image_size": "16",
        "augment__flip": True, "data__max_bad_share": 0.5, "model__name": "mixer_pico", **TWO_BLOCKS,
    }  # fmt: skip

    def job(run, gone):
        from mixlab.data import dataset

        real, real_step = dataset.read_example_file, fit.train_step

        def read(path):
            if os.environ.get("GONE") and (gone == "all" or torch.distributed.get_rank() == 1):
                raise ExampleError("it has gone", where=str(path))
            return real(path)

        def step(state, batch, clock):
            os.environ["GONE"] = "1" if gone == "all" or clock.step == 3 else ""  # for the next one
            return real_step(state, batch, clock)

        dataset.read_example_file, fit.train_step = read, step
        mixlab.train(str(data), "small_images", run=run, screen=QUIET, figures=False, **options)

    assert ranks.wait(ranks.start(lambda: job(tmp_path / "some", "one"), size=2), 60) == [0, 0]
    assert len((tmp_path / "some/bad_files.csv").read_text().splitlines()) == 2
    assert ranks.wait(ranks.start(lambda: job(tmp_path / "none", "all"), size=2), 60) == [1, 1]
    assert "no example of step 1 can be read any more" in capfd.readouterr().err


def test_a_run_folder_that_only_one_rank_sees_is_said_at_once(tmp_path, capfd):
    def job():
        folder = tmp_path / os.environ["RANK"]
        folder.mkdir()
        os.chdir(folder)
        mixlab.train("digits", "digits", run=Path("run"), screen=QUIET, figures=False, **PLAIN)

    assert ranks.wait(ranks.start(job, size=2), 60) == [1, 1]
    assert "not all machines see the run folder" in capfd.readouterr().err


def splits(run: Path) -> list[dict[str, str]]:
    with (run / "split.csv").open() as file:
        return list(csv.DictReader(file))


def test_a_file_that_only_one_rank_finds_unreadable_is_listed_for_all(images, tmp_path):
    run = tmp_path / "run"
    data = worlds.write_pictures(tmp_path / "data")

    def job():
        from mixlab.data import dataset

        real = dataset.read_example_file

        def read(path):
            if str(path) == os.environ.get("GONE"):
                raise ExampleError("it has gone", where=str(path))
            return real(path)

        dataset.read_example_file = read
        real_step = fit.train_step

        def step(state, batch, clock):
            os.environ["GONE"] = next(row["path"] for row in splits(run) if row["split"] == "train")
            return real_step(state, batch, clock)

        fit.train_step = step
        mixlab.train(
            str(data), "small_images", run=run, screen=QUIET, figures=False, data__in_memory=False,
            data__num_workers=0, data__image_size="16", model__name="mixer_pico",
            **(PLAIN | TWO_BLOCKS | {"steps": 16, "batch_size": 16}),
        )  # fmt: skip

    assert ranks.wait(ranks.start(job, size=2), 60) == [0, 0]
    with (run / "bad_files.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["path"] for row in rows] == [
        next(row["path"] for row in splits(run) if row["split"] == "train")
    ]


def test_the_first_rank_alone_creates_the_run_and_an_existing_one_is_refused_by_all(tmp_path):
    run = tmp_path / "run"
    assert train(run, 2) == [0, 0]

    def job():
        mixlab.train("digits", "digits", run=run, screen=QUIET, figures=False, **PLAIN)

    assert ranks.wait(ranks.start(job, size=2), 60) == [1, 1]  # UsageErrors, which the command turns into 2


def test_more_ranks_than_shards_and_batch_normalisation_are_refused():
    with pytest.raises(UsageError, match="4 processes for 2 virtual shards"):
        exchange_of(Recipe(virtual_shards=2), World(0, 4))
    with pytest.raises(UsageError, match="batch normalisation"):
        Exact(ALONE, 2).check(torch.nn.BatchNorm1d(2), Recipe(virtual_shards=2))
    with pytest.raises(UsageError, match="3 equal shards"):
        Recipe(batch_size=32, virtual_shards=3)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (2, 4), (1, 1), (0, 2)])
def test_shares_are_neighbours_and_complete(count, size):
    shares = [World(rank, size).share(count) for rank in range(size)]
    assert [i for share in shares for i in share] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


# The index of a spread checkpoint, which is a pickle


class Evil:
    def __init__(self, *call):
        self.call = call

    def __reduce__(self):
        return self.call


def hostile() -> dict[str, bytes]:
    mark = "touch CANARY"
    good = Metadata(state_dict_metadata={}, storage_data={})
    stack = lambda *lines: b"".join(lines)  # noqa: E731
    payloads = {
        "os.system": pickle.dumps(Evil(os.system, (mark,))),
        "eval": pickle.dumps(Evil(eval, ("open('CANARY','w')",))),
        "exec": pickle.dumps(Evil(exec, ("open('CANARY','w')",))),
        "open": pickle.dumps(Evil(open, ("CANARY", "w"))),
        "getattr": b"cbuiltins\ngetattr\n.",
        "import": stack(b"cbuiltins\n__import__\n(S'os'\ntR."),
        "subprocess": stack(b"csubprocess\nPopen\n(S'touch CANARY'\ntR."),
        "torch.load": stack(b"ctorch\nload\n(S'x'\ntR."),
        "torch.hub": stack(b"ctorch\nhub.load\n(S'x'\ntR."),
        "dotted": stack(b"\x80\x04\x8c\x05torch\x8c\x0aSize.mro\x93."),
        "dotted metadata": stack(b"\x80\x04\x8c'torch.distributed.checkpoint.metadata\x8c\x02os\x93."),
        "numpy": pickle.dumps(np.zeros(2)),
        "code in state": pickle.dumps({"x": Evil(os.system, (mark,))}),
        "not an index": pickle.dumps({"a": 1}),
        "empty": b"",
        "cut": pickle.dumps(good)[:-20],
        "text": b"hello",
        "persistent id": b"Pabc\n.",
        "extension": b"\x80\x02\x82\x01.",
        "deep": b"(" * 100_000 + b".",
        "bytes entry": pickle.dumps(
            Metadata(state_dict_metadata={"model.x": BytesStorageMetadata()}, storage_data={})
        ),
    }
    from torch.distributed.checkpoint.filesystem import _StorageInfo

    for name, info in {
        "path outside": _StorageInfo(relative_path="../../etc/passwd", offset=0, length=1),
        "absolute path": _StorageInfo(relative_path="/etc/passwd", offset=0, length=1),
        "transform": _StorageInfo(
            relative_path="a.distcp", offset=0, length=1, transform_descriptors=["zstd"]
        ),
    }.items():
        index = Metadata(state_dict_metadata={}, storage_data={MetadataIndex("x"): info})
        payloads[name] = pickle.dumps(index)
    return payloads


@pytest.mark.parametrize("name", hostile())
def test_hostile_indexes_are_refused_and_run_nothing(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".metadata").write_bytes(hostile()[name])
    with pytest.raises(WeightsError, match="index"):
        read_index(tmp_path)
    assert not (tmp_path / "CANARY").exists()


def test_an_index_is_not_opened_where_the_manifest_does_not_verify(tmp_path):
    run = tmp_path / "run"
    assert train(run, 2, stop_after=4, parallel="fsdp") == [143, 143]
    newest = load_newest_checkpoint(run / "checkpoints")[0].parts
    assert newest is not None
    (newest / ".metadata").write_bytes(hostile()["os.system"])
    with pytest.raises(WeightsError, match="damaged"):
        load_newest_checkpoint(run / "checkpoints")
    manifest = json.loads((newest / "manifest.json").read_text())
    assert {".metadata", "__0_0.distcp", "__1_0.distcp"} <= set(manifest)


def test_an_index_larger_than_any_model_needs_is_not_read(tmp_path, monkeypatch):
    monkeypatch.setattr("mixlab.checkpoint.sharded.MAX_INDEX_BYTES", 10)
    (tmp_path / ".metadata").write_bytes(pickle.dumps(Metadata({}, None, storage_data={})))
    with pytest.raises(WeightsError, match="more than the 10 of the largest"):
        read_index(tmp_path)


def test_pickles_of_the_reader_are_what_dcp_writes():
    buffer = io.BytesIO(pickle.dumps(Metadata(state_dict_metadata={}, storage_data={})))
    from mixlab.checkpoint.sharded import _AllowList

    assert isinstance(_AllowList(buffer).load(), Metadata)
