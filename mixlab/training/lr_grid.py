"""Which learning rate to train with: each of a grid tried for a share of the steps, judged on validation."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from mixlab.data.loader import TrainingPictures, training_batches
from mixlab.errors import TrainingError, UsageError
from mixlab.evaluation.metrics import summarize
from mixlab.report.screen import Screen
from mixlab.training.curriculum import num_coarse_steps, refine
from mixlab.training.distributed import classify_shared
from mixlab.training.failures import NonFiniteError, explain_out_of_memory
from mixlab.training.prepared import Prepared
from mixlab.training.recipe import Recipe
from mixlab.training.step import TrainState, train_step


@dataclass(frozen=True, kw_only=True)
class LrGrid:
    """lrs: the rates to try; muon's own follow in proportion. share: of the run's steps for each, in (0, 1].

    The paper, after ViT, tries each for all steps (a share of 1); a tenth is our shorter way.
    """

    lrs: tuple[float, ...]
    share: float = 0.1

    def __post_init__(self) -> None:
        if (
            not self.lrs
            or not all(0 < lr < math.inf for lr in self.lrs)
            or len(set(self.lrs)) < len(self.lrs)
        ):
            raise UsageError(
                f"a grid is of different numbers above 0, not {self.lrs}",
                where="--lr-grid",
                hint="such as 0.003,0.01",
            )
        if not 0 < self.share <= 1:
            raise UsageError(f"lr_share must be in (0, 1], got {self.share}", where="--lr-share")

    def num_steps(self, steps: int) -> int:
        """Steps of one trial for a run of `steps`."""
        return max(round(self.share * steps), 1)


def parse_lr_grid(text: str, share: float) -> LrGrid:
    """`0.003,0.01` as a grid; UsageError for anything else."""
    try:
        return LrGrid(lrs=tuple(float(part) for part in text.split(",")), share=share)
    except ValueError:
        raise UsageError(
            f"{text!r} is no list of numbers", where="--lr-grid", hint="such as 0.003,0.01"
        ) from None


def choose_lr(
    prepared: Prepared, grid: LrGrid, build: Callable[[Prepared], TrainState], screen: Screen
) -> tuple[Recipe, dict[str, Any]]:
    """The recipe with the best rate, and what was tried: {"share", "steps", "lr", "tried": [{"lr", "top1", "loss"}]}.

    build: the state before the first step. Each trial is a training of its own, with warm-up and decay in proportion;
    it leaves no files. `top1` and `loss` (mean) are those of the validation split, None with `failed` where a trial's
    numbers became infinite. TrainingError if all did.
    """
    recipe = prepared.recipe
    assert recipe.steps is not None
    steps = grid.num_steps(recipe.steps)
    screen.say(f"trying {len(grid.lrs)} learning rates for {steps} of {recipe.steps} steps each")
    rows: list[dict[str, Any]] = []
    for lr in grid.lrs:
        trial = replace(prepared, recipe=_for_trial(recipe, lr, steps))
        rows.append({"lr": lr} | _try(trial, build(trial), screen))
        top1 = rows[-1]["top1"]
        screen.say(
            f"lr {lr:g}: " + (rows[-1]["failed"] if top1 is None else f"validation {100 * top1:.2f} %")
        )
    judged = [row for row in rows if row["top1"] is not None]
    if not judged:
        raise TrainingError(
            "no learning rate of the grid could be trained with", where="--lr-grid", hint="try smaller ones"
        )
    best: float = max(judged, key=lambda row: (row["top1"], -row["loss"]))["lr"]
    is_edge = len(grid.lrs) > 1 and best in (min(grid.lrs), max(grid.lrs))
    screen.say(
        f"training with lr {best:g}" + (", at the end of the grid: a wider one may be better" * is_edge)
    )
    tried = {"share": grid.share, "steps": steps, "lr": best, "tried": rows}
    return _with_lr(recipe, best), tried


def _with_lr(recipe: Recipe, lr: float) -> Recipe:
    """The recipe at another rate; muon's own moves in proportion."""
    optimizer = recipe.optimizer
    changed = replace(optimizer, lr=lr, muon_lr=optimizer.muon_lr * lr / optimizer.lr)
    return replace(recipe, optimizer=changed if optimizer.name == "muon" else replace(optimizer, lr=lr))


def describe_tried(tried: dict[str, Any]) -> str:
    """What `choose_lr` found, as a sentence."""
    rates = [
        f"{row['lr']:g} (" + (row["failed"] if row["top1"] is None else f"{100 * row['top1']:.2f} %") + ")"
        for row in tried["tried"]
    ]
    return (
        f"The learning rate is the best on the validation split of those tried for {tried['steps']} steps each: "
        f"{', '.join(rates)}."
    )


def _for_trial(recipe: Recipe, lr: float, steps: int) -> Recipe:
    schedule = recipe.schedule
    if schedule.warmup_steps is not None:
        assert recipe.steps is not None
        schedule = replace(schedule, warmup_steps=round(schedule.warmup_steps * steps / recipe.steps))
    return replace(_with_lr(recipe, lr), schedule=schedule, steps=steps)


def _try(prepared: Prepared, state: TrainState, screen: Screen) -> dict[str, Any]:
    recipe = prepared.recipe
    assert recipe.steps is not None
    assert prepared.val is not None
    pictures = TrainingPictures(
        images=prepared.train,
        augment=recipe.augment,
        batch_size=recipe.batch_size,
        seed=recipe.seed,
        num_shards=state.num_shards,
        shards=state.shards,
    )
    # Files that have gone bad are left out here and reported by the training itself, which meets them again.
    batches = training_batches(
        pictures,
        first_step=0,
        num_steps=recipe.steps,
        num_workers=recipe.data.num_workers or 0,
        on_bad=lambda file: None,
        timeout_seconds=recipe.timeout_seconds,
    )
    change = num_coarse_steps(recipe) if recipe.coarse_share else None
    state.model.train()
    try:
        with screen.progress(f"trying lr {recipe.optimizer.lr:g}", recipe.steps) as bar:
            for step, batch in enumerate(batches):
                if step == change:
                    refine(state)
                state.world.now(f"trying lr {recipe.optimizer.lr:g}, step {step + 1}")
                train_step(state, batch, step)
                bar.update(step + 1)
    except NonFiniteError as error:
        return {"top1": None, "loss": None, "failed": error.message}
    except (MemoryError, RuntimeError) as error:
        explained = explain_out_of_memory(error, recipe, state.device)
        if explained is None:
            raise
        raise explained from error
    predictions = classify_shared(
        state.world,
        state.best_guess,
        prepared.val,
        recipe.batch_size,
        state.device,
        on_bad=lambda file: None,
        is_spread=state.is_spread,
    )
    result = summarize(predictions, prepared.source.class_names)
    return {"top1": result.top1, "loss": result.loss}
