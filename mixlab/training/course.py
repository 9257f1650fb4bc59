"""The course of one training: step by step, validate, save beside it, and go on through what can be survived."""

import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from mixlab.checkpoint.checkpoints import (
    CHECKPOINTS_NAME,
    Checkpoint,
    checkpoint_paths,
    load_newest_checkpoint,
    save_checkpoint,
    sweep,
)
from mixlab.checkpoint.store import CONFIG_NAME, Weights, save_weights
from mixlab.data.loader import Batch, TrainingPictures, training_batches
from mixlab.data.order import steps_per_epoch
from mixlab.data.reading import BadFile, check_bad_share
from mixlab.errors import DiskError, TrainingError, WeightsError
from mixlab.escape import without_places
from mixlab.evaluation.metrics import Evaluation, summarize
from mixlab.records import take
from mixlab.report.run_log import RunLog
from mixlab.report.screen import Screen
from mixlab.training.curriculum import is_coarse, num_coarse_steps, refine, settings_now
from mixlab.training.distributed import classify_shared
from mixlab.training.failures import NonFiniteError, explain_out_of_memory
from mixlab.training.fsdp import local, save_spread, together, whole
from mixlab.training.history import check_end
from mixlab.training.pace import Pace, read_changes
from mixlab.training.prepared import Prepared
from mixlab.training.run_folder import add_bad_files, add_nonfinite_batch, read_bad_files
from mixlab.training.saver import Saver, snapshot
from mixlab.training.small_sets import explain_one_image
from mixlab.training.step import StepResult, TrainState, train_step
from mixlab.training.tracking import Rows, open_tracker

SAVE_PAUSE = 60  # times what a save takes, between two of them: one to two per cent of the time
NUM_LOG_ROWS = 1000  # of training, in metrics.jsonl, about
FOREVER = 1 << 40  # steps
NOTED_SHARE = 0.05  # of a plan, by which it must change to be mentioned


class Training:
    """One training on its way: where it is, what was best, and where it writes."""

    def __init__(
        self, prepared: Prepared, state: TrainState, run: Path, screen: Screen, tracker: str | None
    ) -> None:
        self.prepared, self.state, self.run, self.screen = prepared, state, run, screen
        self.recipe, self.world = state.recipe, state.world
        self.log = RunLog(run / "metrics.jsonl") if self.world.is_main else None
        self.saver = Saver(self._note_disk_error)
        self.save_seconds = 0.0  # that the last checkpoint took to write
        self.save_group: Any = (
            dist.new_group(backend="gloo", timeout=timedelta(seconds=self.recipe.timeout_seconds))
            if state.is_spread
            else None
        )
        self.tracker = open_tracker(tracker if self.world.is_main else None, run)
        self.step = 0
        self.seconds = 0.0  # spent in training and validation, over all sittings
        self.best: dict[str, Any] = {"top1": -1.0, "loss": float("inf"), "step": 0}
        self.epochs_without_gain = 0
        self.notes = [] if state.teaching is None else [state.teaching.describe()]
        self.bad_files = {file.path for file in self.world.from_main(lambda: read_bad_files(run))}
        self.gone_bad: list[BadFile] = []  # readable when training began, and not any more
        self._new_bad: list[BadFile] = []  # of them those that this process has met and not told the others
        self._has_weights = self.world.from_main((run / CONFIG_NAME).is_file)
        self.planned_steps = self.recipe.steps or 0
        self.pace = Pace(run, self.world.from_main(lambda: read_changes(run)))
        self.num_skipped = 0  # batches left out because their loss or gradient was not finite

    def steps(self, signals: list[int], deadline: float | None) -> None:
        """Train from `self.step` to the recipe's last step, an early stop, the deadline or a signal."""
        recipe, prepared = self.recipe, self.prepared
        assert recipe.steps is not None
        # What came first of a run with coarse patches cannot be made longer or shorter afterwards.
        self.pace.begin(self.step, None if recipe.coarse_share else deadline)
        per_epoch = steps_per_epoch(len(prepared.train), recipe.batch_size)
        pictures = TrainingPictures(
            images=prepared.train,
            augment=recipe.augment,
            batch_size=recipe.batch_size,
            seed=recipe.seed,
            num_shards=self.state.num_shards,
            shards=self.state.shards,
            views=recipe.distill.num_views,
        )
        batches = training_batches(
            pictures,
            first_step=self.step,
            num_steps=FOREVER if deadline is not None else self.pace.at(FOREVER, self.planned_steps),
            num_workers=recipe.data.num_workers or 0,
            on_bad=self._new_bad.append,
            timeout_seconds=recipe.timeout_seconds,
        )
        rows = Rows(every=max(recipe.steps // NUM_LOG_ROWS, 1))
        sitting_began, seconds_before, last_save = time.monotonic(), self.seconds, time.monotonic()
        self.state.model.train()
        self.world.now(f"reading the pictures of step {self.step + 1}")
        with self.screen.progress("training", recipe.steps, self.step) as bar:
            for batch in batches:
                if self._should_stop_early():
                    break
                if is_coarse(self.state.model, recipe) and self.step >= num_coarse_steps(recipe):
                    self.world.now("changing the patches")
                    refine(self.state)
                    self.screen.say(f"patches {recipe.coarse_factor} times as small after step {self.step}")
                self.world.now(f"computing step {self.step + 1}")
                result = self._step(batch)
                self.step += 1
                self.seconds = seconds_before + time.monotonic() - sitting_began
                row = None if result is None else rows.add(result, self.step, per_epoch, self.seconds)
                if row is not None:
                    self._write("train", row)
                    bar.update(self.step, rows.text)
                fitting = self.pace.look(self.step, self._num_steps) if self.world.is_main else 0
                due = self.world.is_main and time.monotonic() - last_save >= self._save_interval()
                late = deadline is not None and time.monotonic() > deadline
                is_late, is_due, is_busy, has_bad, stops, fitting = self.world.largest(
                    [late, due, self.saver.is_busy, len(self._new_bad) > 0, len(signals) > 0, fitting]
                )
                if fitting and self.world.is_main:
                    self._guarded(partial(self.pace.change, self.step, fitting))
                self._set_steps(fitting or self.pace.at(self.step, self._num_steps))
                bar.total = self._num_steps
                if has_bad:
                    self._share_bad_files()
                is_last = self.step >= self._num_steps or bool(is_late)
                if self.step % per_epoch == 0 or is_last:
                    self._end_epoch(per_epoch, bar)
                    self.seconds = seconds_before + time.monotonic() - sitting_began
                    rows.restart()
                if (is_due and not is_busy) or is_last or stops:
                    self.save()
                    last_save = time.monotonic()
                if stops:
                    return
                if is_last and self.step < self._num_steps:
                    self.notes.append(
                        f"The budget ended after {self.step} of {self._num_steps} planned steps, because the "
                        "machine became slower than it was when it was measured."
                    )
                if is_last:
                    self._note_length()
                    break
                self.world.now(f"reading the pictures of step {self.step + 1}")

    @property
    def _num_steps(self) -> int:
        assert self.recipe.steps is not None
        return self.recipe.steps

    def _set_steps(self, steps: int) -> None:
        if steps != self._num_steps:
            self.recipe = self.state.recipe = replace(self.recipe, steps=steps)

    def _note_length(self) -> None:
        planned, steps = self.planned_steps, self._num_steps
        if abs(steps - planned) > NOTED_SHARE * planned:
            self.notes.append(f"The plan of {planned} steps became {steps}, as the machine's speed changed.")

    def _step(self, batch: Batch) -> StepResult | None:
        """One training step; None for a batch left out because it was not finite, up to `skip_nonfinite` of them."""
        try:
            return train_step(self.state, batch, self.step)
        except NonFiniteError as error:
            index, what = np.concatenate(self.world.gather(batch.index)), error.what
            names = [self.prepared.train.split.names[i] for i in index]
            if self.world.is_main:
                self._guarded(lambda: add_nonfinite_batch(self.run, self.step, what, index, names))
            if self.num_skipped >= self.recipe.skip_nonfinite:
                raise
            self.num_skipped += 1
            text = f"step {self.step} was left out: {error.message}"
            self.notes.append(text[0].upper() + text[1:] + ".")
            self.screen.say(text)
            return None
        except (MemoryError, RuntimeError, ValueError) as error:
            explained = explain_out_of_memory(error, self.recipe, self.state.device)
            explained = explained or explain_one_image(error, self.recipe, self.world.size)
            if explained is None:
                raise
            raise explained from error

    def _end_epoch(self, per_epoch: int, bar: Any) -> None:
        """Validate, and keep the weights if they are the best so far (or the last, without validation)."""
        val, recipe = self.prepared.val, self.recipe
        better = val is None or recipe.keep_weights == "last"
        provenance: dict[str, Any] = {}
        if val is not None:
            result = self._evaluate(recipe.batch_size)
            values = {"top1": result.top1, "loss": result.loss, "ece": result.ece}
            if result.balanced_accuracy is not None:
                values["balanced_accuracy"] = result.balanced_accuracy
            self._write(
                "validation", {"step": self.step, "epoch": self.step / per_epoch} | values | self._clock()
            )
            gained = (values["top1"], -values["loss"]) > (self.best["top1"], -self.best["loss"])
            self.epochs_without_gain = (
                0 if values["top1"] > self.best["top1"] else self.epochs_without_gain + 1
            )
            if gained:
                self.best = {"top1": values["top1"], "loss": values["loss"], "step": self.step}
            better = better or gained
            provenance["validation_top1"] = values["top1"]
            bar.update(self.step, f"validation {100 * values['top1']:.1f} %")
        if better:
            self._save_weights(provenance)

    def _evaluate(self, batch_size: int) -> Evaluation:
        assert self.prepared.val is not None
        self.world.now(f"validating after step {self.step}")
        predictions = classify_shared(
            self.world,
            self.state.best_guess,
            self.prepared.val,
            batch_size,
            self.state.device,
            on_bad=self._new_bad.append,
            is_spread=self.state.is_spread,
        )
        self._share_bad_files()
        return summarize(predictions, self.prepared.source.class_names)

    def _save_weights(self, provenance: dict[str, Any]) -> None:
        facts = {"data": self.prepared.source.name, "recipe": self.recipe.name, "seed": self.recipe.seed}
        if self.state.teaching is not None:
            facts |= {"teacher": without_places(self.recipe.distill.teacher), "labels_only": False}
        weights = Weights(
            model=self.state.best_guess,
            model_settings=settings_now(self.prepared.model_settings, self.state.model, self.recipe),
            preprocess=self.prepared.preprocess,
            class_names=self.prepared.source.class_names,
            provenance=facts | {"step": self.step, "ema": self.state.ema is not None} | provenance,
        )
        self._has_weights = True
        values = whole(weights.model) if self.state.is_spread else weights.model.state_dict()
        job: Callable[[], None] | None = None
        if self.world.is_main:
            tensors = snapshot(values)

            def write() -> None:
                self.check_folder()
                save_weights(self.run, weights, tensors)

            job = write
        if self.save_group is not None:
            self.saver.submit("weights", partial(together, job, self.save_group))
        elif job is not None:
            self.saver.submit("weights", job)

    def _should_stop_early(self) -> bool:
        patience = self.recipe.early_stop
        if not patience or self.epochs_without_gain < patience:
            return False
        self.notes.append(
            f"Stopped early after step {self.step}: no better validation accuracy in {patience} epochs."
        )
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, between two steps, beside the steps that follow."""
        self.check_folder()
        self._check_state()
        values = {
            "seconds": self.seconds,
            "best": self.best if self.best["step"] else None,
            "epochs_without_gain": self.epochs_without_gain,
            "scaler": self.state.scaler.state_dict(),
            "num_skipped": self.num_skipped,
        }
        if self.world.is_main or self.save_group is not None:
            self._save_checkpoint(values)
        if not self._has_weights:
            # So that a run stopped in its first epoch can be looked at. After the checkpoint: weights without one
            # are not written over (`check_resumable`).
            self._save_weights({})

    def _save_checkpoint(self, values: dict[str, Any]) -> None:
        tensors = {name: snapshot(group) for name, group in self.state.tensors().items()}
        checkpoint = Checkpoint(step=self.step, tensors=tensors, state=values)
        folder, keep = self.run / CHECKPOINTS_NAME, self.recipe.keep

        def write() -> None:
            self.check_folder()  # which a write would make again
            began = time.monotonic()
            if self.save_group is None:
                save_checkpoint(folder, checkpoint, keep=keep)
            else:
                save_spread(folder, checkpoint, keep=keep, group=self.save_group)
            self.save_seconds = time.monotonic() - began

        self.saver.submit("checkpoint", write)

    def _save_interval(self) -> float:
        """Seconds between two checkpoints: those of a large model take a core for a while."""
        wanted = self.recipe.checkpoint_seconds
        return max(wanted, SAVE_PAUSE * self.save_seconds) if wanted else 0.0

    def _check_state(self) -> None:
        """A checkpoint that is not finite would be worse than none: the one before could be pruned for it."""
        damaged = None
        for name, tensor in self.state.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(local(tensor)).all()):
                damaged = name
        if self.world.largest([damaged is not None])[0]:
            raise TrainingError(
                f"{damaged or 'a weight'} was no longer finite after step {self.step}; it was not saved",
                where=str(self.run),
                hint="lower --optimizer.lr; the last checkpoint is from before",
            )

    def load(self) -> None:
        """Go back to the newest valid checkpoint; a run that has none yet (`check_resumable`) starts again."""
        if not self.world.from_main(self._tidy):
            if self.log is not None:
                self.log.truncate_after(0)
            self.screen.say("no checkpoint was written yet: starting from the beginning")
            return
        checkpoint, rejected = load_newest_checkpoint(self.run / CHECKPOINTS_NAME, self._check_checkpoint)
        self.world.check_same(checkpoint.step, "newest checkpoint")
        for reason in rejected:
            self.screen.say(f"skipped a damaged checkpoint: {reason}")
        self.world.from_main(lambda: check_end(self.run, checkpoint.step))
        tensors = checkpoint.tensors
        if checkpoint.parts is not None:
            from mixlab.checkpoint.sharded import read_shards  # slow to import: see fsdp.py

            tensors = read_shards(checkpoint.parts, self.state.place)
        self.state.load(tensors, checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self._set_steps(self.pace.at(self.step, self.planned_steps))
        self.best = checkpoint.state["best"] or self.best
        self.epochs_without_gain = checkpoint.state["epochs_without_gain"]
        self.num_skipped = checkpoint.state["num_skipped"]
        if self.log is not None:
            self.log.truncate_after(self.step)
            self.log.write("resume", step=self.step)
        self.screen.say(f"resumed after step {self.step} of {self.recipe.steps}")

    def _check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """WeightsError if a checkpoint that is whole does not fit this run; the model takes its patches."""
        state, where = checkpoint.state, "state.json"
        take(state, "seconds", float, where, low=0.0)
        for key in ("epochs_without_gain", "num_skipped"):
            take(state, key, int, where, low=0)
        if "best" not in state:
            raise WeightsError("the key 'best' is missing", where=where)
        best = take(state, "best", dict, where, optional=True)
        for key, kind in (("top1", float), ("loss", float), ("step", int)) if best is not None else ():
            take(best, key, kind, f"{where}, best")
        scaler = take(state, "scaler", dict, where)
        if scaler.keys() != self.state.scaler.state_dict().keys():
            raise WeightsError("scaler is of another precision", where=where)
        for key in scaler:
            take(scaler, key, float, f"{where}, scaler")
        if checkpoint.step > max(self.planned_steps, *self.pace.changes.values(), 0):
            raise WeightsError(f"it is of step {checkpoint.step}, beyond the end of this run", where=where)
        if is_coarse(self.state.model, self.recipe) and checkpoint.step > num_coarse_steps(self.recipe):
            refine(self.state)  # into the shapes of the checkpoint, which replaces the values
        if checkpoint.parts is not None:
            from mixlab.checkpoint.sharded import shapes_of

            found = shapes_of(checkpoint.parts)
        else:
            found = {
                f"{file}.{name}": tensor.shape
                for file, group in checkpoint.tensors.items()
                for name, tensor in group.items()
            }
            for file, group in checkpoint.tensors.items():
                for name, tensor in group.items():
                    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                        raise WeightsError(f"{file}.{name} is not finite")
        self.state.check(found, has_stepped=checkpoint.step > 0)

    def _tidy(self) -> bool:
        """Remove what killed saves left behind; whether there is a checkpoint."""
        sweep(self.run)
        sweep(self.run / CHECKPOINTS_NAME)
        return bool(checkpoint_paths(self.run / CHECKPOINTS_NAME))

    def _share_bad_files(self) -> None:
        """Tell all ranks of the files that went bad, and list them. DataError if they are too many."""
        found = [file for files in self.world.gather(self._new_bad) for file in files]
        self._new_bad.clear()
        for file in found:
            if file.path not in self.bad_files:
                self.bad_files.add(file.path)
                if self.world.is_main:
                    self._guarded(lambda file=file: add_bad_files(self.run, [file]))  # type: ignore[misc]
                self.screen.say(f"left out {file.path}: {file.reason}")
                self.gone_bad.append(file)
        check_bad_share(self.gone_bad, len(self.prepared.train), self.recipe.data.max_bad_share)

    def _clock(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def check_folder(self) -> None:
        """TrainingError if somebody has taken the run's folder away: nothing could be saved any more."""
        if self.world.is_main and not (self.run / "recipe.toml").is_file():
            raise TrainingError(
                f"the run folder is gone: it was deleted or moved before step {self.step} was over",
                where=str(self.run),
                hint="if it was moved, go on with --resume there, from the last checkpoint in it",
            )

    def _write(self, event: str, values: dict[str, Any]) -> None:
        self.check_folder()
        if self.log is not None:
            log = self.log
            self._guarded(lambda: log.write(event, **values))
            self.tracker(event, values)

    def _guarded(self, write: Callable[[], object]) -> None:
        """A disk that is full for an hour must not end a training of a week."""
        try:
            write()
        except DiskError as error:
            self._note_disk_error(error)

    def _note_disk_error(self, error: DiskError) -> None:
        text = f"training goes on, but {error}"
        if not self.notes or self.notes[-1] != text:
            self.notes.append(text)
            self.screen.say(text)
