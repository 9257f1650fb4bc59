"""Distillation: the loss on paper, answers for the very images that the student sees, and the same bits again."""

import filecmp
import json
import re
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from benchmarks.reliability import kills, ranks
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.permute import permute_weights
from mixlab.checkpoint.store import Weights, load_weights, save_weights
from mixlab.data.images.augment import AugmentConfig
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.loader import Batch
from mixlab.data.order import steps_per_epoch
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import create_model, settings_of
from mixlab.planning.lr_grid import LrGrid
from mixlab.planning.make_plan import decide_objective
from mixlab.training import teacher
from mixlab.training.clock import Clock
from mixlab.training.course import TrainingCourse
from mixlab.training.engines.by_cpu import CpuEngine
from mixlab.training.keys import from_toml, override, to_toml
from mixlab.training.losses import LossConfig, loss_per_batch
from mixlab.training.objectives.distillation import Distillation, DistillationLoss, DistillConfig
from mixlab.training.objectives.labels import LabelLoss, Labels
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.recipe import Recipe
from mixlab.training.schedule import ScheduleConfig
from mixlab.training.signals import Interrupted
from mixlab.training.step import TrainState, train_step
from tests.training import seams
from tests.training.seams import StopAfter

CPU = torch.device("cpu")
COLOURS = ("blue", "green", "red")
OPTIONS = {
    "steps": 14, "epochs": None, "batch_size": 16, "threads": 1, "keep_weights": "last", "val_fraction": 0,
    "model__name": "mixer_pico", "augment__cutmix_alpha": 0.0,
    "augment__crop": "pad", "augment__crop_padding": 2, "augment__policy": "trivialaugment",
    "model__stochastic_depth": 0.2,
}  # fmt: skip


@pytest.fixture(scope="module")
def colours(tmp_path_factory) -> Path:
    root = tmp_path_factory.mktemp("data") / "colours"
    rng = np.random.default_rng(0)
    for number, name in enumerate(COLOURS):
        (root / name).mkdir(parents=True)
        for i in range(18):
            pixels = rng.integers(0, 120, (8, 8, 3))
            pixels[..., 2 - number] += 100
            Image.fromarray(pixels.astype(np.uint8)).save(root / name / f"{i:02}.png")
    return root


def write_teacher(folder: Path, class_names=("red", "other", "blue", "green"), *, size=8, channels=3) -> Path:
    """A teacher with drawn weights, a mean and std of its own, and its classes in an order of its own."""
    torch.manual_seed(5)
    model = create_model(
        "mixer_custom4", image_size=size, num_classes=len(class_names), in_channels=channels, num_blocks=2,
        hidden_dim=8, token_mlp_dim=5, channel_mlp_dim=7,
    )  # fmt: skip
    nn.init.normal_(model.head.weight)
    preprocess = ImagePreprocess(
        image_size=(size, size), channels=channels, mean=(0.2,) * channels, std=(0.1,) * channels
    )
    settings = settings_of(model.config)
    weights = Weights(
        model=model, model_settings=settings, preprocess=preprocess, class_names=class_names, provenance={}
    )
    save_weights(folder, weights)
    return folder


@pytest.fixture
def taught(tmp_path) -> Path:
    return write_teacher(tmp_path / "teacher")


def train(data: Path, run: Path, *, lr_grid: LrGrid | None = None, **options) -> dict:
    return seams.train(data, "small_data", run, trials=lr_grid, **(OPTIONS | options))


def preparing(change: Callable[[teacher.Teacher], teacher.Teacher]) -> dict:
    """Doubles of a training whose teacher is changed before it is asked."""

    def decide(draft):
        return decide_objective(replace(draft, preparation=change(draft.preparation)))

    return {"decisions": seams.with_decisions(decide_objective=decide)}


def has_same_weights(first: Path, second: Path) -> bool:
    return filecmp.cmp(first / "weights.safetensors", second / "weights.safetensors", shallow=False)


# The loss


@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_the_one_on_paper(temperature):
    rng = np.random.default_rng(0)
    logits, theirs = rng.normal(size=(6, 4)), rng.normal(size=(6, 4))
    target, weights = np.eye(4)[[0, 1, 2, 3, 3, 0]], np.array([1.0, 2.0, 0.5, 1.5])

    def log_softmax(x):
        return x - np.log(np.exp(x).sum(axis=1, keepdims=True))

    q = np.exp(log_softmax(theirs / temperature))
    smoothed = 0.9 * target + 0.1 / 4
    usual = (-(smoothed * log_softmax(logits)).sum(axis=1) * (target @ weights)).mean()
    divergence = (q * (np.log(q) - log_softmax(logits / temperature))).sum(axis=1).mean()
    entropy = -(q * np.log(q)).sum(axis=1).mean()
    expected = 0.7 * usual + 0.3 * temperature**2 * (divergence + entropy)
    config = DistillConfig(teacher="t", weight=0.3, temperature=temperature)
    given = torch.from_numpy(np.stack([target, q], axis=1))
    labels = LabelLoss(config=LossConfig(label_smoothing=0.1), class_weights=tuple(weights))
    loss = DistillationLoss(labels=labels, config=config)(torch.from_numpy(logits), given)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_without_weight_it_is_the_usual_loss_to_the_bit():
    logits, target = torch.randn(6, 4), torch.eye(4)[[0, 1, 2, 3, 3, 0]]
    labels = LabelLoss(config=LossConfig(label_smoothing=0.1))
    usual = loss_per_batch(logits, target, labels.config)
    assert torch.equal(labels(logits, target), usual)
    both = torch.stack([target, torch.full((6, 4), 0.25)], dim=1)
    for weight, is_usual in ((0.0, True), (0.5, False)):
        loss = DistillationLoss(labels=labels, config=DistillConfig(teacher="t", weight=weight))
        assert torch.equal(loss(logits, both), usual) == is_usual


# One step

ANSWERS = torch.randn(3, 10, 4, generator=torch.Generator().manual_seed(7))


def tiny_state(*, dtype=torch.float32, distill=None, depth=0.3, **options) -> TrainState:
    distill = distill or DistillConfig(teacher="t", weight=0.4, temperature=2.0, views=3)
    torch.manual_seed(0)
    model = create_model("mixer_pico2", num_classes=4, image_size=8, num_blocks=2, stochastic_depth=depth)
    nn.init.normal_(model.head.weight, std=0.3)
    recipe = Recipe(
        distill=distill, steps=4, batch_size=8, schedule=ScheduleConfig(decay="constant", warmup_steps=0),
        optimizer=OptimizerConfig(name="sgd", lr=0.1, weight_decay=0.0), **options,
    )  # fmt: skip
    objective = Distillation(Labels(recipe.loss, None, 4), distill, ANSWERS, 0.0)
    return TrainState(model.to(dtype).train(), recipe, objective, CPU)


def batch(*, labels=None, sizes=(), dtype=torch.float32, view=2) -> Batch:
    image = torch.randn(8, 3, 8, 8, generator=torch.Generator().manual_seed(1)).to(dtype)
    labels = torch.arange(8) % 4 if labels is None else labels
    return Batch(image, labels, np.arange(8)[::-1].copy(), sizes, view=view)


@pytest.fixture
def one_thread():
    """So that parts of a batch are computed one after the other."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "options", [{"fast": False}, {"fast": True}, {"accumulate": 2}, {"virtual_shards": 2}]
)
def test_answers_are_mixed_with_the_pictures_share_and_partner(options, one_thread):
    seen = []
    state = tiny_state(augment=AugmentConfig(mixup_alpha=0.8), **options)
    loss = state.objective.loss

    def spy(logits, target):
        seen.append(target.detach())
        return loss(logits, target)

    state.objective.loss = spy
    assert isinstance(state.engine, CpuEngine) == options.get("fast", True)
    sizes = (4, 4) if "virtual_shards" in options else ()
    train_step(state, batch(sizes=sizes), Clock(state.recipe.steps, step=1))
    target = torch.cat(seen)
    assert target.shape == (8, 2, 4)
    own = (ANSWERS[2].flip(0)[2:] / 2.0).softmax(dim=1)  # of images 7 ... 0
    label = nn.functional.one_hot(torch.arange(8) % 4, 4).float()
    for rows in torch.arange(8).split(sizes or (8,)):
        share = target[rows[0], 0, label[rows[0]].argmax()]
        assert 0.5 < share < 1.0
        for mixed, whole in ((target[rows, 0], label[rows]), (target[rows, 1], own[rows])):
            assert torch.allclose(mixed, share * whole + (1 - share) * whole.roll(1, dims=0), atol=1e-6)


def test_our_own_passes_take_the_same_step_as_torchs():
    states = [tiny_state(fast=fast, augment=AugmentConfig(cutmix_alpha=1.0)) for fast in (True, False)]
    results = [
        [train_step(state, batch(view=step), Clock(state.recipe.steps, step=step)) for step in range(3)]
        for state in states
    ]
    for a, b in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.allclose(a, b, rtol=0, atol=2e-6)
    assert [r.num_correct for r in results[0]] == [r.num_correct for r in results[1]]


def test_labels_alone_say_what_is_correct_and_with_all_of_the_weight_they_change_nothing_else():
    whole = DistillConfig(teacher="t", weight=1.0, views=3)
    states = [tiny_state(dtype=torch.float64, distill=whole, depth=0.0) for _ in range(2)]
    with torch.no_grad():
        predicted = states[0].model.eval()(batch(dtype=torch.float64).inputs).argmax(dim=1)
    wrong = (predicted + 1) % 4
    results = [
        train_step(state, batch(labels=labels, dtype=torch.float64), Clock(state.recipe.steps, step=0))
        for state, labels in zip(states, (predicted, wrong), strict=True)
    ]
    for a, b in zip(*(state.model.parameters() for state in states), strict=True):
        assert torch.equal(a, b)
    assert results[0].num_correct > results[1].num_correct


# A whole training


@pytest.mark.parametrize("crop", ["pad", "resized"])
def test_kept_answers_are_those_for_the_pictures_that_the_student_saw(crop, colours, taught, tmp_path):
    seen = []

    class Seeing(TrainingCourse):
        def __init__(self, *arguments) -> None:
            super().__init__(*arguments)
            targets = self.state.objective.targets
            self.state.objective.targets = lambda batch, device: seen.append(batch) or targets(batch, device)

    options = {"distill__teacher": str(taught), "distill__views": 2}
    options |= {"augment__crop": crop, "augment__flip": True, "augment__mixup_alpha": 0.3}
    train(colours, tmp_path / "run", doubles={"course_type": Seeing}, **options)
    answers = np.load(tmp_path / "run" / "teacher.npz")["logits"]
    num_images = answers.shape[1]
    assert answers.shape == (2, num_images, 3)
    assert answers.dtype == np.float32
    per_epoch = steps_per_epoch(num_images, 16)
    assert 14 // per_epoch > 3
    preprocess, weights = load_weights(tmp_path / "run").preprocess, load_weights(taught)
    assert preprocess.mean != weights.preprocess.mean
    order = [weights.class_names.index(name) for name in COLOURS]
    pictures = {}
    for step, batch in enumerate(seen):
        view = step // per_epoch % 2
        pixels = preprocess.denormalize(batch.inputs)
        with torch.no_grad():
            logits = weights.model(weights.preprocess.to_input(pixels))[:, order]
        assert np.allclose(logits, answers[view, batch.index], atol=1e-4)
        assert not np.allclose(logits, answers[1 - view, batch.index], atol=1e-2)
        for i, picture in zip(batch.index, pixels, strict=True):
            assert torch.equal(pictures.setdefault((view, i), picture), picture)
    orders = [np.concatenate([b.index for b in seen[e * per_epoch : (e + 1) * per_epoch]]) for e in (0, 2)]
    assert orders[0].tolist() != orders[1].tolist()  # the same view in the order of another epoch


@pytest.mark.parametrize("state_of_answers", ["kept", "damaged", "gone"])
def test_a_run_stopped_in_its_middle_resumes_to_the_same_bits(state_of_answers, colours, taught, tmp_path):
    options = {"distill__teacher": str(taught), "distill__views": 2, "distill__temperature": 2.0}
    options |= {"augment__cutmix_alpha": 1.0, "ema_decay": 0.9}
    train(colours, tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        train(colours, tmp_path / "cut", screen=StopAfter(8), **options)
    answers = tmp_path / "cut" / "teacher.npz"
    before = np.load(answers)["logits"]
    if state_of_answers == "kept":
        shutil.rmtree(taught)  # is needed no more
    elif state_of_answers == "gone":
        answers.unlink()
    else:
        content = bytearray(answers.read_bytes())
        content[len(content) // 2] ^= 1
        answers.write_bytes(content)
    seams.resume(tmp_path / "cut")
    assert np.array_equal(np.load(answers)["logits"], before)
    assert has_same_weights(tmp_path / "whole", tmp_path / "cut")


def test_learning_rates_are_tried_on_the_views_that_the_teacher_has_seen(colours, taught, tmp_path):
    options = {"distill__teacher": str(taught), "distill__views": 1, "epochs": 3, "steps": None}
    options |= {"data__val_fraction": 0.2}
    grid = LrGrid(lrs=(0.001, 0.003), share=1.0)
    tried = train(colours, tmp_path / "run", lr_grid=grid, **options)["grid"]  # three epochs, one view
    best = max(tried["tried"], key=lambda row: (row["top1"], -row["loss"]))
    alone = train(colours, tmp_path / "alone", optimizer__lr=best["lr"], **options)
    assert alone["steps"] == tried["steps"]
    assert has_same_weights(tmp_path / "run", tmp_path / "alone")


def test_another_number_of_ranks_gives_the_same_bits(colours, taught, tmp_path):
    torch.set_num_threads(1)
    doubles = preparing(lambda asked: replace(asked, batch_size=10))  # so that both ranks ask
    options = {
        "distill__teacher": str(taught),
        "distill__views": 2,
        "virtual_shards": 2,
        "steps": 6,
        "doubles": doubles,
    }
    for size in (1, 2):
        children = ranks.start(lambda size=size: train(colours, tmp_path / f"{size}", **options), size=size)
        statuses = ranks.wait(children, 100)
        if statuses is None:
            ranks.kill(children, signal.SIGKILL)
        assert statuses == [0] * size
    assert kills.fingerprint(tmp_path / "1") == kills.fingerprint(tmp_path / "2")
    first, second = (np.load(tmp_path / f"{size}" / "teacher.npz")["logits"] for size in (1, 2))
    assert np.array_equal(first, second)


def test_plain_ddp_follows_a_teacher_too(colours, taught, tmp_path):
    torch.set_num_threads(1)
    children = ranks.start(
        lambda: train(colours, tmp_path / "run", distill__teacher=str(taught), steps=3), size=2
    )
    assert ranks.wait(children, 100) == [0, 0]


def test_no_weight_is_no_teacher_to_the_bit(colours, taught, tmp_path):
    train(colours, tmp_path / "without")
    train(colours, tmp_path / "zero", distill__teacher=str(taught), distill__weight=0.0, distill__views=1)
    train(colours, tmp_path / "taught", distill__teacher=str(taught))
    assert has_same_weights(tmp_path / "without", tmp_path / "zero")
    assert not (tmp_path / "zero" / "teacher.npz").exists()
    assert "teacher" not in load_weights(tmp_path / "zero").provenance
    assert not has_same_weights(tmp_path / "without", tmp_path / "taught")


def test_the_run_says_that_it_did_not_learn_from_labels_only(colours, taught, tmp_path):
    screen = seams.Listening()
    train(colours, tmp_path / "run", distill__teacher=str(taught), distill__weight=0.25, screen=screen)
    provenance = json.loads((tmp_path / "run" / "config.json").read_text())["provenance"]
    assert provenance["labels_only"] is False
    assert provenance["teacher"] == taught.name  # no place of this machine
    report = re.sub(r"\s+", " ", (tmp_path / "run" / "report.html").read_text())
    assert "no: 25% of the training loss follows a teacher" in report
    assert "Not from labels only: 25% of the training loss follows the answers of" in report
    assert any("4 views of" in line and "MiB" in line for line in screen.said)
    again = override(Recipe(), from_toml(tmp_path / "run" / "recipe.toml"))
    assert again.distill == DistillConfig(teacher=str(taught), weight=0.25)


# What does not fit


def test_the_keys_are_read_back_as_written(tmp_path):
    recipe = override(
        Recipe(), {"teacher": "runs/x", "temperature": "2", "views": "8", "distill.weight": "1"}
    )
    assert recipe.distill == DistillConfig(teacher="runs/x", weight=1.0, temperature=2.0, views=8)
    (tmp_path / "r.toml").write_text(to_toml(recipe))
    assert override(Recipe(), from_toml(tmp_path / "r.toml")) == recipe


@pytest.mark.parametrize("setting", [{"weight": 0.3}, {"temperature": 2.0}, {"views": 2}])
def test_settings_without_a_teacher_are_refused(setting):
    with pytest.raises(UsageError, match="none is named"):
        DistillConfig(**setting)


@pytest.mark.parametrize("setting", [{"weight": 1.1}, {"weight": -0.1}, {"temperature": 0.0}, {"views": 0}])
def test_impossible_settings_are_refused(setting):
    with pytest.raises(UsageError, match=next(iter(setting))):
        DistillConfig(teacher="t", **setting)


def test_the_sigmoid_loss_has_no_teacher():
    with pytest.raises(UsageError, match="sigmoid"):
        Recipe(loss=LossConfig(name="sigmoid"), distill=DistillConfig(teacher="t"))
    Recipe(loss=LossConfig(name="sigmoid"), distill=DistillConfig(teacher="t", weight=0.0))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"class_names": ("red", "blue", "yellow")}, r"does not know 1 of the 3 classes: green"),
        ({"channels": 1}, "channels of the teacher is 1"),
        ({"size": 12}, "image size of the teacher is 12x12, of the training 8x8"),
    ],
)
def test_a_teacher_of_other_classes_or_pictures_is_refused(changes, message, colours, tmp_path):
    path = write_teacher(tmp_path / "teacher", **changes)
    with pytest.raises(UsageError, match=message):
        train(colours, tmp_path / "run", distill__teacher=str(path))
    assert not (tmp_path / "run").exists()


def test_a_teacher_of_permuted_pictures_and_one_that_is_not_there_are_refused(colours, taught, tmp_path):
    permuted, _ = permute_weights(open_weights(taught), seed=1)
    save_weights(tmp_path / "permuted", permuted)
    with pytest.raises(UsageError, match="permuted"):
        train(colours, tmp_path / "run", distill__teacher=str(tmp_path / "permuted"))
    with pytest.raises(WeightsError, match="no such run"):
        train(colours, tmp_path / "run", distill__teacher=str(tmp_path / "nothing"))
    assert not (tmp_path / "run").exists()


def test_pictures_or_answers_that_memory_does_not_hold_are_refused(colours, taught, tmp_path):
    with pytest.raises(UsageError, match="kept in memory"):
        train(colours, tmp_path / "run", distill__teacher=str(taught), data__in_memory=False)
    with pytest.raises(UsageError, match="1000000000000 views would take"):
        train(colours, tmp_path / "run", distill__teacher=str(taught), distill__views=10**12)
    assert not (tmp_path / "run").exists()


def test_answers_that_are_not_finite_are_no_answers(colours, tmp_path):
    folder = write_teacher(tmp_path / "teacher")
    weights = load_weights(folder)
    nn.init.constant_(weights.model.head.weight, 3e38)  # finite, and its products are not
    shutil.rmtree(folder)
    save_weights(folder, weights)
    with pytest.raises(WeightsError, match="not finite"):
        train(colours, tmp_path / "run", distill__teacher=str(folder))


class Slow(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model, self.asked = model, 0

    def forward(self, image):
        self.asked += 1
        time.sleep(0.4)
        return self.model(image)


def test_a_teacher_that_is_too_slow_for_the_budget_is_said_after_the_first_view(colours, taught, tmp_path):
    model = Slow(load_weights(taught).model)
    doubles = preparing(lambda asked: replace(asked, weights=replace(asked.weights, model=model)))
    options = {"distill__teacher": str(taught), "distill__views": 1000, "doubles": doubles}
    with pytest.raises(UsageError, match="more than the budget has left"):
        train(colours, tmp_path / "run", steps=None, budget="15s", **options)
    assert model.asked == 1


def test_a_budget_counts_the_teachers_time(colours, taught, tmp_path):
    began = time.monotonic()
    options = {"steps": None, "budget": "14s", "distill__teacher": str(taught)}
    train(colours, tmp_path / "run", **options)
    assert time.monotonic() - began < 30
    recipe = override(Recipe(), from_toml(tmp_path / "run" / "recipe.toml"))
    assert recipe.steps
    assert recipe.steps >= 1
    assert replace(recipe.distill, teacher=None) == DistillConfig()
