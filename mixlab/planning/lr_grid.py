"""Which learning rate to train with: each of a grid tried for a share of the steps, judged on validation."""

import math
from dataclasses import dataclass, replace
from typing import Any

from mixlab.errors import TrainingError, UsageError
from mixlab.evaluation.metrics import summarize
from mixlab.planning.draft import Draft
from mixlab.training.build import build
from mixlab.training.clock import Clock
from mixlab.training.failures import NonFiniteError
from mixlab.training.fit import Course, batches, fit, validate
from mixlab.training.plan import Plan
from mixlab.training.recipe import Recipe
from mixlab.training.session import Session
from mixlab.training.step import StepResult


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

    @property
    def num_trials(self) -> int:
        return len(self.lrs)

    def num_steps(self, steps: int) -> int:
        """Steps of one trial for a run of `steps`."""
        return max(round(self.share * steps), 1)

    def check(self, has_validation: bool) -> None:
        """UsageError if there is nothing to judge learning rates on."""
        if not has_validation:
            raise UsageError(
                "nothing is held out to judge learning rates on",
                where="--lr-grid",
                hint="give --val-fraction 0.1, and more than one image of each class",
            )

    def decide(self, draft: Draft, num_steps: int) -> Draft:
        """The draft of a training of `num_steps` with the best rate, and what was tried.

        Each trial is a training of its own, with warm-up and decay in proportion; it leaves no files. Its row has
        accuracy and mean loss of the validation split, None with `failed` where its numbers became infinite.
        TrainingError if all did.
        """
        steps, screen = self.num_steps(num_steps), draft.session.screen
        screen.say(f"trying {len(self.lrs)} learning rates for {steps} of {num_steps} steps each")
        rows: list[dict[str, Any]] = []
        for lr in self.lrs:
            plan = draft.plan(steps, _for_trial(draft.recipe, lr, steps, num_steps))
            rows.append({"lr": lr} | _try(plan, draft.session))
            top1 = rows[-1]["top1"]
            screen.say(
                f"lr {lr:g}: " + (rows[-1]["failed"] if top1 is None else f"validation {100 * top1:.2f} %")
            )
        judged = [row for row in rows if row["top1"] is not None]
        if not judged:
            raise TrainingError(
                "no learning rate of the grid could be trained with",
                where="--lr-grid",
                hint="try smaller ones",
            )
        best: float = max(judged, key=lambda row: (row["top1"], -row["loss"]))["lr"]
        is_edge = len(self.lrs) > 1 and best in (min(self.lrs), max(self.lrs))
        screen.say(
            f"training with lr {best:g}" + (", at the end of the grid: a wider one may be better" * is_edge)
        )
        tried = {"share": self.share, "steps": steps, "lr": best, "tried": rows}
        return replace(draft, recipe=_with_lr(draft.recipe, best), tried=tried)


def parse_lr_grid(text: str, share: float) -> LrGrid:
    """`0.003,0.01` as a grid; UsageError for anything else."""
    try:
        return LrGrid(lrs=tuple(float(part) for part in text.split(",")), share=share)
    except ValueError:
        raise UsageError(
            f"{text!r} is no list of numbers", where="--lr-grid", hint="such as 0.003,0.01"
        ) from None


def _with_lr(recipe: Recipe, lr: float) -> Recipe:
    """The recipe at another rate; muon's own moves in proportion."""
    optimizer = recipe.optimizer
    changed = replace(optimizer, lr=lr, muon_lr=optimizer.muon_lr * lr / optimizer.lr)
    return replace(recipe, optimizer=changed if optimizer.name == "muon" else replace(optimizer, lr=lr))


def _for_trial(recipe: Recipe, lr: float, steps: int, num_steps: int) -> Recipe:
    schedule = recipe.schedule
    if schedule.warmup_steps is not None:
        schedule = replace(schedule, warmup_steps=round(schedule.warmup_steps * steps / num_steps))
    return replace(_with_lr(recipe, lr), schedule=schedule)


class _Trial(Course):
    """Shows how far it is. Files that have gone bad are left out, and reported by the training that follows."""

    def __init__(self, clock: Clock, lr: float, bar: Any) -> None:
        self._clock, self._bar = clock, bar
        self.doing = f"trying lr {lr:g},"

    def after_step(self, result: StepResult | None) -> bool:
        self._bar.update(self._clock.step)
        return False


def _try(plan: Plan, session: Session) -> dict[str, Any]:
    recipe = plan.recipe
    state, clock, lr = build(plan, session.silent()), Clock(plan.num_steps), recipe.optimizer.lr
    with session.screen.progress(f"trying lr {lr:g}", plan.num_steps) as bar:
        course = _Trial(clock, lr, bar)
        try:
            fit(state, batches(plan, state, clock, course), clock, course)
        except NonFiniteError as error:
            return {"top1": None, "loss": None, "failed": error.message}
    result = summarize(validate(plan, state, course), plan.class_names)
    return {"top1": result.top1, "loss": result.loss}
