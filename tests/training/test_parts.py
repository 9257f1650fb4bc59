"""Schedule, losses, decay mask and recipe: each against its definition or somebody else's code."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.optim.swa_utils import AveragedModel

from mixlab.errors import UsageError
from mixlab.models.catalog import create_model
from mixlab.planning.budget import parse_duration
from mixlab.recipes import RECIPES, find_recipe
from mixlab.threads import one_core_each
from mixlab.training.keys import from_toml, override, recipe_keys, to_toml
from mixlab.training.losses import LossConfig, balanced_class_weights, loss_per_batch
from mixlab.training.objectives.labels import Labels
from mixlab.training.optimizer import OPTIMIZERS, OptimizerConfig, build_optimizer, check_keeps, decays
from mixlab.training.recipe import Recipe
from mixlab.training.schedule import ScheduleConfig, lr_factor
from mixlab.training.step import warmed_ema

SCHEDULES = Path(__file__).resolve().parents[3] / "shared" / "reference" / "training" / "schedules.json"


def test_the_learning_rate_is_the_authors_at_every_step_they_published():
    if not SCHEDULES.exists():
        pytest.skip("the reference arrays ../shared/reference are not here")
    cases = json.loads(SCHEDULES.read_text())["schedules"]["big_vision"]
    assert cases
    for case in cases:
        settings = case["settings"]
        config = ScheduleConfig(
            decay=settings["decay_type"],
            warmup_steps=settings.get("warmup_steps", 0),
            end_factor=settings.get("linear_end", 0.0),
        )
        ours = [lr_factor(step, case["total_steps"], config) for step in case["step"]]
        assert ours == pytest.approx(case["factor"], abs=1e-6)


def test_warmup_can_be_a_share_of_the_run():
    config = ScheduleConfig(decay="constant", warmup_fraction=0.1)
    assert [lr_factor(step, 100, config) for step in (0, 5, 10, 99)] == [0.0, 0.5, 1.0, 1.0]


def test_softmax_loss_is_torchs_cross_entropy_with_smoothing_and_weights():
    torch.manual_seed(0)
    logits, label = torch.randn(9, 4), torch.randint(0, 4, (9,))
    target = F.one_hot(label, 4).float()
    for smoothing in (0.0, 0.1):
        ours = loss_per_batch(logits, target, LossConfig(label_smoothing=smoothing))
        assert ours.item() == pytest.approx(
            F.cross_entropy(logits, label, label_smoothing=smoothing).item(), rel=1e-6
        )
    weights = torch.tensor([1.0, 2.0, 0.5, 3.0])
    ours = loss_per_batch(logits, target, LossConfig(), weights)
    theirs = (F.cross_entropy(logits, label, reduction="none") * weights[label]).mean()
    assert ours.item() == pytest.approx(theirs.item(), rel=1e-6)


def test_sigmoid_loss_sums_over_classes_and_averages_over_images():
    torch.manual_seed(0)
    logits, target = torch.randn(5, 3), F.one_hot(torch.tensor([0, 1, 2, 0, 1]), 3).float()
    theirs = -(target * logits.sigmoid().log() + (1 - target) * (1 - logits.sigmoid()).log()).sum() / 5
    assert loss_per_batch(logits, target, LossConfig(name="sigmoid")).item() == pytest.approx(
        theirs.item(), rel=1e-5
    )


def test_balanced_weights_give_each_class_the_same_say():
    labels = np.array([0] * 6 + [1] * 3 + [3])
    weights = balanced_class_weights(labels, 4)
    says = [weights[k].item() * (labels == k).sum() for k in (0, 1, 3)]
    assert says == pytest.approx([2.5, 2.5, 2.5])
    assert weights[2] == 0


def test_weight_decay_touches_kernels_only():
    with torch.device("meta"):
        model = create_model("mixer_micro4", num_classes=10)
    names = {name for name, parameter in model.named_parameters() if decays(name, parameter)}
    assert names == {
        name for name, _ in model.named_parameters() if name.endswith("weight") and "norm" not in name
    }
    groups = build_optimizer(create_model("mixer_pico2", num_classes=10), OptimizerConfig()).param_groups
    assert [group["weight_decay"] for group in groups] == [0.05, 0.0]


@pytest.mark.parametrize("options", [{}, {"name": "sgd"}, {"name": "sgd", "momentum": 0.0}, {"name": "muon"}])
def test_an_optimizer_that_stores_something_else_than_it_says_ends_the_first_step(options, monkeypatch):
    config = OptimizerConfig(**options)
    model = create_model("mixer_pico2", num_classes=3, image_size=8, num_blocks=1)
    optimizer = build_optimizer(model, config)
    assert check_keeps(optimizer, config) == (options.get("momentum") == 0)
    (model(torch.ones(1, 3, 8, 8)) - 1).square().sum().backward()
    optimizer.step()
    assert check_keeps(optimizer, config)
    wrong = replace(OPTIMIZERS[config.name], keeps=lambda group: {"something"})
    monkeypatch.setitem(OPTIMIZERS, config.name, wrong)
    if options.get("momentum") != 0:
        with pytest.raises(TypeError, match="something"):
            check_keeps(optimizer, config)


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_survives_its_toml_file(name, tmp_path):
    recipe = override(find_recipe(name), {"data.image_size": "24x32", "steps": 7, "seed": 3})
    path = tmp_path / "recipe.toml"
    path.write_text(to_toml(recipe))
    assert override(Recipe(), from_toml(path)) == recipe


def test_keys_are_converted_by_type_and_may_be_short_where_clear():
    recipe = override(
        Recipe(), {"lr": "3e-4", "optimizer.beta2": "0.95", "compile": "yes", "image_size": "32"}
    )
    assert recipe.optimizer.lr == 3e-4
    assert recipe.optimizer.beta2 == 0.95
    assert recipe.compile is True
    assert recipe.data.image_size == (32, 32)
    assert override(recipe, {"image_size": "none"}).data.image_size is None


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("optimizer.lrr", "1", "optimizer.lr"),
        ("optimiser.lr", "1", "optimizer.lr"),
        ("label_smoothin", "1", "label_smoothing"),
        ("seed", "x", "integer"),
        ("seed", "1.5", "integer"),
        ("optimizer.name", "adm", r"adamw\|sgd"),
        ("compile", "perhaps", r"true\|false"),
        ("image_size", "32x", "image size"),
        ("lr", "-1", "above 0"),
        ("steps", "0", "above 0"),
        ("accumulate", "3", "equal parts"),
        ("name.x", "1", "no key"),
        ("warmup_steps", "-5", "negative"),
        ("split_seed", "-1", "negative"),
        ("early_stop", "-1", "negative"),
    ],
)
def test_a_wrong_key_or_value_is_named_with_what_would_be_right(key, value, message):
    with pytest.raises(UsageError, match=message):
        override(Recipe(), {key: value})


def test_every_key_of_a_recipe_has_a_type_that_a_person_can_read():
    from mixlab.training.keys import type_name

    assert {"optimizer.lr": "number", "data.image_size": "HxW", "epochs": "number"}.items() <= {
        key: type_name(known.hint) for key, known in recipe_keys().items()
    }.items()


@pytest.mark.parametrize(
    ("text", "seconds"), [("90s", 90), ("10m", 600), ("1.5h", 5400), ("45", 45), ("2D", 172800)]
)
def test_durations(text, seconds):
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "10x", "-5m", "0", "m", "1m30"])
def test_what_is_no_duration_is_refused(text):
    with pytest.raises(UsageError, match="length of time"):
        parse_duration(text)


def plain_muon(weight, gradients, lr, weight_decay):
    """Muon as published, one matrix in float64, without batching."""
    momentum = np.zeros_like(weight)
    for gradient in gradients:
        momentum = 0.95 * momentum + 0.05 * gradient
        x = 0.05 * gradient + 0.95 * momentum
        flip = x.shape[0] > x.shape[1]
        x = x.T if flip else x
        x = x / np.linalg.norm(x)
        for _ in range(5):
            gram = x @ x.T
            x = 3.4445 * x + (-4.7750 * gram + 2.0315 * gram @ gram) @ x
        x = x.T if flip else x
        weight = weight * (1 - lr * weight_decay) - lr * max(1, weight.shape[0] / weight.shape[1]) ** 0.5 * x
    return weight


def test_muon_is_the_published_one_for_matrices_and_adamw_for_the_rest():
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=4, image_size=8, num_blocks=2).double()
    twin = create_model("mixer_pico2", num_classes=4, image_size=8, num_blocks=2).double()
    twin.load_state_dict(model.state_dict())
    before = {name: parameter.detach().numpy().copy() for name, parameter in model.named_parameters()}
    config = OptimizerConfig(name="muon", lr=1e-3, muon_lr=0.02, weight_decay=0.1)
    muon, adamw = (
        build_optimizer(model, config),
        build_optimizer(twin, OptimizerConfig(lr=1e-3, weight_decay=0.1)),
    )
    gradients = {name: [] for name in before}
    for _ in range(4):
        for (name, parameter), other in zip(model.named_parameters(), twin.parameters(), strict=True):
            parameter.grad = torch.randn_like(parameter)
            other.grad = parameter.grad.clone()
            gradients[name].append(parameter.grad.numpy().copy())
        muon.param_groups[-1]["lr"] = 0.02
        muon.step()
        adamw.step()
    twins = dict(twin.named_parameters())
    matrices = [name for name in before if "mixing" in name and name.endswith("weight")]
    assert len(matrices) == 8
    for name, parameter in model.named_parameters():
        if name in matrices:
            expected = plain_muon(before[name], gradients[name], 0.02, 0.1)
            assert np.abs(parameter.detach().numpy() - expected).max() < 1e-12
        else:
            assert torch.equal(parameter, twins[name])


def test_muon_in_bfloat16_turns_wide_matrices_the_same_way():
    """Within the iteration's own slack, which lets singular values be 0.7 to 1.2; narrow ones keep their bits."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Linear(192, 128, bias=False), nn.Linear(128, 64, bias=False)) for _ in "ab"]
    models[1].load_state_dict(models[0].state_dict())
    before = models[0][0].weight.detach().clone()
    config = OptimizerConfig(name="muon", muon_lr=1.0, weight_decay=0.0)
    for model, wide_dtype in zip(models, (None, torch.bfloat16), strict=True):
        optimizer = build_optimizer(model, config, wide_dtype)
        optimizer.param_groups[-1]["lr"] = 1.0
        torch.manual_seed(1)
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    exact, rounded = (before - model[0].weight.detach() for model in models)
    assert torch.equal(models[0][1].weight, models[1][1].weight)
    assert 0 < (exact - rounded).norm() < 0.05 * exact.norm()
    singular = torch.linalg.svdvals(rounded)
    assert 0.6 < float(singular.min()) < float(singular.max()) < 1.3


def test_muons_state_survives_a_checkpoint():
    from mixlab.training.step import TrainState

    recipe = override(find_recipe("digits"), {"optimizer.name": "muon", "steps": 5})
    states = [
        TrainState(
            create_model("mixer_pico2", num_classes=4),
            recipe,
            Labels(recipe.loss, None, 4),
            torch.device("cpu"),
        )
        for _ in "ab"
    ]
    for parameter in states[0].model.parameters():
        parameter.grad = torch.randn_like(parameter)
    states[0].optimizer.step()
    states[1].load({k: {n: t.clone() for n, t in v.items()} for k, v in states[0].tensors().items()}, {})
    assert states[1].tensors().keys() == states[0].tensors().keys()
    for name, tensor in states[0].tensors()["optimizer"].items():
        assert torch.equal(states[1].tensors()["optimizer"][name], tensor)


def test_a_moving_average_is_the_same_by_more_cores_than_there_are_tensors():
    found, before = [], torch.get_num_threads()
    for number in (1, 40):
        model = torch.nn.Linear(3, 2)
        torch.nn.init.constant_(model.weight, 1.0)
        torch.nn.init.zeros_(model.bias)
        averaged = AveragedModel(model, multi_avg_fn=warmed_ema(0.9))
        torch.set_num_threads(number)
        try:
            with one_core_each():
                for _ in range(3):
                    with torch.no_grad():
                        model.weight.mul_(2.0)
                    averaged.update_parameters(model)
        finally:
            torch.set_num_threads(before)
        found.append(averaged.module.weight.detach().clone())
    assert torch.equal(*found)
