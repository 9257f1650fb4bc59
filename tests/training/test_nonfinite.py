"""A batch that is not finite never reaches the weights, on one process or many, by every engine."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

import mixlab
from benchmarks.reliability import ranks
from mixlab.data.loader import Batch
from mixlab.device import multiplies_bf16
from mixlab.models.catalog import create_model
from mixlab.report.screen import Screen
from mixlab.training import fit
from mixlab.training.clock import Clock
from mixlab.training.engines.by_cpu import CpuEngine
from mixlab.training.failures import NonFiniteError
from mixlab.training.objectives.labels import Labels
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState, train_step
from tests.training.seams import TINY

LABEL = torch.arange(8) % 4
ENGINES = {"torch": {"fast": False}, "cpu": {"fast": True}}
SAMS = {"plain": {}, "sam": {"sam_rho": 0.1}, "gsam": {"sam_rho": 0.1, "gsam_alpha": 0.2}}
OPTIMIZERS = {"adamw": {}, "sgd": {"name": "sgd"}, "muon": {"name": "muon"}}


class Spoilt(Labels):
    """A loss that stays finite while its gradient does not, as soon as `is_on`."""

    is_on = False

    @property
    def loss(self):
        def of(logits, target):
            found = F.cross_entropy(logits, target.to(logits.dtype))
            return found + (logits.sum() - logits.sum().detach()).abs().sqrt() if self.is_on else found

        return of

    @loss.setter
    def loss(self, value):
        pass


def everything(state: TrainState) -> dict[str, torch.Tensor]:
    groups = state.tensors().items()
    return {
        f"{file}.{name}": tensor.detach().clone() for file, group in groups for name, tensor in group.items()
    }


@pytest.mark.parametrize(
    ("engine", "precision", "shards", "sam", "optimizer"),
    [
        *itertools.product(ENGINES, ["fp32", "bf16"], [0, 2], SAMS, ["adamw"]),
        *itertools.product(ENGINES, ["fp32"], [0, 2], ["plain"], ["sgd", "muon"]),
    ],
)
@pytest.mark.parametrize("what", ["loss", "gradient"])
def test_a_batch_that_is_not_finite_changes_nothing(engine, precision, shards, sam, optimizer, what):
    if (engine, precision) == ("cpu", "bf16") and not multiplies_bf16():
        pytest.skip("this processor does not multiply bf16")
    recipe = Recipe(
        batch_size=8, precision=precision, virtual_shards=shards, accumulate=1 + shards // 2, ema_decay=0.9,
        optimizer=OptimizerConfig(lr=0.01, **SAMS[sam], **OPTIMIZERS[optimizer]), **ENGINES[engine],
    )  # fmt: skip
    torch.manual_seed(0)
    size = {"hidden_dim": 16, "token_mlp_dim": 8, "channel_mlp_dim": 16, "num_blocks": 2}
    model = create_model("mixer_custom4", num_classes=4, image_size=8, **size)
    objective = Spoilt(recipe.loss, LABEL.numpy(), 4)
    state = TrainState(model.train(), recipe, objective, torch.device("cpu"))
    assert isinstance(state.engine, CpuEngine) == (engine == "cpu")
    image = torch.randn(8, 3, 8, 8)
    sizes = (4, 4) if shards else ()
    good = Batch(image, LABEL, LABEL.numpy(), sizes, 8 if shards else 0)
    clock = Clock(10)
    train_step(state, good, clock)
    before = everything(state)
    objective.is_on = what == "gradient"
    spoilt = image.clone()
    if what == "loss":
        spoilt[5] = float("inf")
    with pytest.raises(NonFiniteError, match=what):
        train_step(state, replace(good, inputs=spoilt), clock)
    after = everything(state)
    assert before.keys() == after.keys()
    assert all(torch.equal(tensor, after[name]) for name, tensor in before.items())
    objective.is_on = False
    train_step(state, good, clock)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in everything(state).values())


RANKS = {
    "ddp": {},
    "ddp by torch, in parts": {"fast": False, "accumulate": 2},
    "fsdp": {"parallel": "fsdp"},
    "exact shards": {"virtual_shards": 4},
    "exact shards and sam": {"virtual_shards": 4, "optimizer__sam_rho": 0.1},
}


@pytest.mark.slow
@pytest.mark.parametrize("case", RANKS)
def test_two_ranks_leave_it_out_together(case, tmp_path: Path):
    """One rank alone meets it, and all leave the batch out; the weights stay finite."""

    def job():
        real = fit.train_step

        def spoiling(state, batch, clock):
            if clock.step == 2 and state.world.rank == 1:
                batch = replace(batch, inputs=batch.inputs * float("nan"))
            return real(state, batch, clock)

        fit.train_step = spoiling
        mixlab.train(
            "digits", "digits", run=tmp_path / "run", screen=Screen(quiet=True), figures=False, with_pictures=False,
            steps=5, epochs=None, threads=1, batch_size=32, keep_weights="last", skip_nonfinite=1,
            **(TINY | RANKS[case]),
        )  # fmt: skip

    assert ranks.wait(ranks.start(job, size=2), 100) == [0, 0]
    weights = load_file(tmp_path / "run" / "weights.safetensors")
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
    left_out = (tmp_path / "run" / "nonfinite.csv").read_text().splitlines()[1:]
    assert left_out
    assert {row.split(",")[0] for row in left_out} == {"2"}
