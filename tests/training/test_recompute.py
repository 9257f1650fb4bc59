"""Blocks that are computed again in the backward pass change memory and nothing else."""

import multiprocessing

import pytest
import torch
from safetensors.torch import load_file

import mixlab
from mixlab.errors import UsageError
from mixlab.models.recompute import checkpoint_blocks
from mixlab.report.screen import Screen
from mixlab.training.signals import Interrupted
from tests.training.seams import StopAfter, before_steps, resume

QUIET = Screen(quiet=True)
PLAIN = {"steps": 6, "epochs": None, "batch_size": 24, "keep_weights": "last", "model__stochastic_depth": 0.5}
CASES = {
    "the fast passes": {"threads": 2},
    "torch's own passes": {"fast": False, "threads": 1},
    "a variant": {"model__token_mixing": "untied", "threads": 1},
    "exact mode": {"virtual_shards": 2},
    "timm's ViT, its dropped paths": {"model__name": "timm/vit_tiny_patch16_224", "image_size": 32, "threads": 1},
    "timm's ResNet, its running statistics": {"model__name": "timm/resnet10t", "image_size": 32, "threads": 1},
}  # fmt: skip


QUICK = next(iter(CASES))  # the others are variants


def train(run, **options):
    mixlab.train("digits", "digits", run=run, figures=False, **({"screen": QUIET} | PLAIN | options))
    return load_file(run / "weights.safetensors")


def assert_equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name], b[name])] == []


@pytest.mark.parametrize(
    "case", [case if case == QUICK else pytest.param(case, marks=pytest.mark.slow) for case in CASES]
)
def test_training_ends_with_the_same_bits(case, tmp_path, monkeypatch):
    calls = multiprocessing.Value("i")  # processes of the fast passes count too
    real = torch.utils.checkpoint.checkpoint

    def counted(*arguments, **options):
        with calls.get_lock():
            calls.value += 1
        return real(*arguments, **options)

    for place in ("mixlab.models.mixer", "mixlab.cpu.passes", "torch.utils.checkpoint"):
        monkeypatch.setattr(f"{place}.checkpoint", counted)
    returned = []
    monkeypatch.setattr("mixlab.training.build.return_memory", lambda: returned.append(1))
    plain = train(tmp_path / "plain", **CASES[case])
    assert calls.value == 0
    assert not returned
    assert_equal(plain, train(tmp_path / "again", checkpoint_blocks=True, **CASES[case]))
    assert calls.value >= 6 * 4  # steps and blocks
    assert returned


def test_a_run_resumes_with_it_to_the_bits_of_one_without(tmp_path):
    options = {"threads": 2, "accumulate": 2, "ema_decay": 0.9, "augment__mixup_alpha": 0.4}
    whole = train(tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train(tmp_path / "cut", checkpoint_blocks=True, screen=StopAfter(3), **options)
    seen = []
    resume(
        tmp_path / "cut",
        course_type=before_steps(lambda course: seen.append(course.state.model.checkpoint_blocks)),
    )
    assert seen == [True] * 3
    assert_equal(whole, load_file(tmp_path / "cut" / "weights.safetensors"))


def test_a_model_that_cannot_is_refused_before_anything_is_read(tmp_path):
    with pytest.raises(UsageError, match="cannot be computed again") as found:
        train(
            tmp_path / "run",
            model__name="timm/hrnet_w18_small",
            image_size=32,
            checkpoint_blocks=True,
            model__stochastic_depth=0.0,
        )
    assert found.value.where == "checkpoint_blocks"
    assert not (tmp_path / "run").exists()
    with pytest.raises(UsageError, match="cannot be computed again"):
        checkpoint_blocks(torch.nn.Linear(2, 2))
