"""A teacher answers, once, for every view of every training example: how distillation is prepared."""

import time
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.readers import open_tensors
from mixlab.checkpoint.store import Weights
from mixlab.cpu.inference import fast
from mixlab.data.images.imagenet import numbers_by_name
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.loader import TrainingDataset
from mixlab.device import memory_bytes
from mixlab.errors import UsageError, WeightsError
from mixlab.report.screen import format_seconds
from mixlab.training.from_labels import labels_of
from mixlab.training.objectives.distillation import ANSWERS_NAME, Distillation
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session
from mixlab.training.setup import MEMORY_SHARE


@dataclass(frozen=True, kw_only=True)
class Teacher:
    """The preparation of distillation: weights that suit a recipe.

    columns int64 (K,): where their logits have the data's classes. batch_size: images at a time, shared
    out whole: the last bits then depend on no number of ranks.
    """

    weights: Weights
    columns: torch.Tensor
    batch_size: int = 256

    looks_at_views = True

    def prepare(
        self, recipe: Recipe, data: Prepared, session: Session, end: float | None = None
    ) -> Distillation:
        """The teacher's answers for every view of every training example; each rank asks for its share of them.

        end: of a budget, on the monotonic clock. UsageError after the first view if all would take longer.
        """
        began = time.monotonic()
        logits = _ask(self, recipe, data, session, end)
        return Distillation(labels_of(recipe.loss, data), recipe.distill, logits, time.monotonic() - began)


def reopen(run: Path, recipe: Recipe, data: Prepared, session: Session) -> Distillation:
    """The answers as they were kept in the run; only where they are not whole the teacher answers again."""
    world = session.world
    kept = _read_answers(run, recipe, data)
    if not world.all_reduce_max([kept is None])[0] and kept is not None:
        return kept
    teacher = begin(recipe, data.source.class_names, world.local_size * len(data.train))
    asked = teacher.prepare(recipe, data, session)
    world.run_on_main(lambda: asked.keep(run))
    return asked


def begin(recipe: Recipe, class_names: tuple[str, ...], num_images: int) -> Teacher:
    """The teacher that a resolved recipe names. UsageError if it cannot answer for these images.

    num_images: of which answers are kept on this machine.
    """
    name, data = str(recipe.distill.teacher), recipe.data
    if not data.in_memory:
        raise UsageError(
            "a teacher answers for images that are kept in memory, and these are not",
            where="data.in_memory",
            hint="--in-memory true, with smaller images (--image-size) if they do not fit; streams have no teacher",
        )
    num_bytes = 4 * recipe.distill.views * num_images * len(class_names)
    if num_bytes > MEMORY_SHARE * memory_bytes():
        raise UsageError(
            f"the answers for {recipe.distill.views} views would take {num_bytes / 2**30:.1f} GiB of memory",
            where="distill.views",
            hint="take fewer views",
        )
    weights = open_weights(name, image_size=data.image_size, resampled=False)
    own = weights.preprocess
    if isinstance(own, ImagePreprocess) and own.permutation is not None:
        raise UsageError(
            "this teacher takes permuted images, and training's are not",
            where=name,
            hint="take the weights from before `mixlab permute`",
        )
    its_size, our_size = ("x".join(map(str, size)) for size in (own.input_size, data.image_size or ()))
    our_rate = getattr(recipe.part_of(own.modality), "rate", None)  # of sounds, which are kept at it
    for key, its, ours in (
        ("rate", own.facts().get("rate"), our_rate),
        ("channels", own.channels, data.channels),
        ("image-size", its_size, our_size),
    ):
        if its != ours:
            same = (
                f"--{key} {its}"
                if key == "rate" or our_rate is None
                else "the teacher's --seconds and --bands"
            )
            raise UsageError(
                f"the {key.replace('-', ' ')} of the teacher is {its}, of the training {ours}",
                where=name,
                hint=f"train with {same}, or take another teacher",
            )
    number = numbers_by_name(weights.class_names)
    unknown = [word for word in class_names if word not in number]
    if unknown:
        raise UsageError(
            f"the teacher does not know {len(unknown)} of the {len(class_names)} classes: {_some(unknown)}",
            where=name,
            hint=f"it knows {_some(weights.class_names)}",
        )
    columns = torch.tensor([number[word] for word in class_names])
    return Teacher(weights=weights, columns=columns)


def _some(names: list[str] | tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


@torch.no_grad()
def _ask(
    teacher: Teacher, recipe: Recipe, data: Prepared, session: Session, end: float | None
) -> torch.Tensor:
    """float32 (views, N, K): the logits of the data's classes."""
    world, screen, device = session.world, session.screen, session.device
    num_images, began, batch_size = len(data.train), time.monotonic(), teacher.batch_size
    augment = recipe.part_of(data.source.modality)
    dataset = TrainingDataset(examples=data.train, augment=augment, batch_size=batch_size, seed=recipe.seed)
    own = replace(data.train, preprocess=teacher.weights.preprocess)
    asked = replace(dataset, examples=own)
    quick = fast(teacher.weights.model.to(device).eval())
    views, many = recipe.distill.views, data.source.modality.many
    logits = torch.zeros(views, num_images, len(teacher.columns))
    screen.say(
        f"asking {recipe.distill.teacher} about {views} views of {num_images:,} {many}; its answers take "
        f"{logits.nbytes / 2**20:,.1f} MiB"
    )
    with screen.progress("asking the teacher", views * num_images) as bar:
        for view in range(views):
            world.now(f"asking the teacher about view {view} of {views}")
            for start in range(world.rank * batch_size, num_images, world.size * batch_size):
                index = np.arange(start, min(start + batch_size, num_images))
                kept, _ = dataset.drawn(view, index, [])
                answers = quick(asked.to_input(kept, view, index).to(device)).float().cpu()
                logits[view, index[0] : index[-1] + 1] = answers[:, teacher.columns]
                bar.update(view * num_images + start + len(index))
            world.sum_(logits[view])  # the others' rows are zeros here: exact
            needed = (time.monotonic() - began) / (view + 1) * views
            if world.all_reduce_max([end is not None and began + needed > end])[0]:
                raise UsageError(
                    f"the teacher needs {format_seconds(needed)} for its answers, more than the budget has left",
                    where="distill.views",
                    hint="give more time, fewer views or a smaller teacher",
                )
    if not bool(torch.isfinite(logits).all()):
        raise WeightsError("some of the teacher's answers are not finite", where=str(recipe.distill.teacher))
    return logits


def _read_answers(run: Path, recipe: Recipe, data: Prepared) -> Distillation | None:
    """The answers kept in the run; None if there are none, they are damaged, or they are of other examples."""
    try:
        with open_tensors(run / ANSWERS_NAME) as file:
            logits, seconds = file.read("logits"), file.read("seconds")
    except WeightsError:
        return None
    wanted = (recipe.distill.views, len(data.train), len(data.source.class_names))
    if logits.shape != wanted:
        return None
    return Distillation(labels_of(recipe.loss, data), recipe.distill, logits, float(seconds[0]))
