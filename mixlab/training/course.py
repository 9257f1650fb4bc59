"""What goes with the steps of one training: log, validate, save beside it, go on through what can be survived."""

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from mixlab.checkpoint.checkpoints import (
    CHECKPOINTS_NAME,
    Checkpoint,
    checkpoint_paths,
    load_newest_checkpoint,
    sweep,
)
from mixlab.checkpoint.store import CONFIG_NAME, Weights, save_weights
from mixlab.data.loader import Batch
from mixlab.data.modality import BadFile
from mixlab.data.order import steps_per_epoch
from mixlab.data.reading import check_bad_share
from mixlab.errors import DiskError, TrainingError, WeightsError
from mixlab.evaluation.metrics import Predictions, summarize
from mixlab.language import Sentence
from mixlab.records import take
from mixlab.report.run_log import RunLog
from mixlab.training.calibrated import calibrated
from mixlab.training.clock import NOTED_SHARE, Clock
from mixlab.training.dtensors import to_local
from mixlab.training.failures import NonFiniteError
from mixlab.training.fit import Course, validate
from mixlab.training.history import check_end
from mixlab.training.plan import Plan
from mixlab.training.run_folder import add_bad_files, add_nonfinite_batch, read_bad_files
from mixlab.training.saver import Saver, snapshot
from mixlab.training.session import Session
from mixlab.training.signals import Interrupted, catch_signals
from mixlab.training.step import StepResult, TrainState
from mixlab.training.tracking import Rows, open_tracker

SAVE_PAUSE = 60  # times what a save takes, between two of them: one to two per cent of the time
NUM_LOG_ROWS = 1000  # of training, in metrics.jsonl, about


class TrainingCourse(Course):
    """The course of a training for good: its log, validation, checkpoints, and its end."""

    def __init__(self, plan: Plan, state: TrainState, run: Path, clock: Clock, session: Session) -> None:
        self.plan, self.state, self.run, self.clock, self.screen = plan, state, run, clock, session.screen
        self.recipe, self.world = plan.recipe, session.world
        self.log = RunLog(run / "metrics.jsonl") if self.world.is_main else None
        self.saver = Saver(self._note_disk_error)
        self.save_seconds = 0.0  # that the last checkpoint took to write
        self.exchange = state.exchange
        self.exchange.begin_saving(self.recipe.timeout_seconds)
        self.tracker = open_tracker(session.tracker if self.world.is_main else None, run)
        self.seconds = 0.0  # spent in training and validation, over all parts of the run
        self.best: dict[str, Any] = {"top1": -1.0, "loss": float("inf"), "step": 0}
        self.epochs_without_gain = 0
        self._validated = ""  # the last validation, in words
        self._said_steps = clock.num_steps  # the length of the training that was said last
        self.notes: list[Sentence] = list(plan.objective.notes)
        self.bad_files = {file.path for file in self.world.run_on_main(lambda: read_bad_files(run))}
        self.gone_bad: list[BadFile] = []  # readable when training began, and not any more
        self._new_bad: list[BadFile] = []  # of them those that this process has met and not told the others
        self._has_weights = self.world.run_on_main((run / CONFIG_NAME).is_file)
        self.num_skipped = 0  # batches left out because their loss or gradient was not finite
        self._per_epoch = steps_per_epoch(len(plan.data.train), self.recipe.batch_size)
        self._signals: list[int] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Inside, the model is fitted and signals are noted; after it all is written. Interrupted where one came."""
        clock, world = self.clock, self.world
        clock.go_to(clock.step)
        self._rows = Rows(every=max(clock.num_steps // NUM_LOG_ROWS, 1), many=self.plan.modality.many)
        self._said_steps = clock.num_steps
        self._began = self._last_save = time.monotonic()
        self._seconds_before = self.seconds
        try:
            with catch_signals(every=world.size > 1) as self._signals:
                with self.screen.progress("training", clock.num_steps, clock.step) as self._bar:
                    yield
                world.now("waiting for the last files")
                if self.exchange.needs_all_ranks:
                    self.saver.close()
                else:
                    world.run_on_main(self.saver.close)
                # Also where another rank got it.
                number = world.all_reduce_max([self._signals[0] if self._signals else 0])[0]
                if number:
                    self._signals.append(number)
                    raise Interrupted(number, self.run, clock.step)
                self.check_folder()
                self._note_problems()
        finally:
            self.saver.abandon()
            self.state.engine.close()

    def _note_problems(self) -> None:
        problem = self.state.engine.problem()
        if problem:
            self.screen.say(str(problem))
            self.notes.append(problem)

    def on_bad(self, file: BadFile) -> None:
        self._new_bad.append(file)

    def is_over(self) -> bool:
        patience = self.recipe.early_stop
        if not patience or self.epochs_without_gain < patience:
            return False
        stopped = Sentence(
            "Stopped early after step {step}: no better validation accuracy in {patience} epochs.",
            step=self.clock.step,
            patience=patience,
        )
        self.notes.append(stopped)
        self.screen.say(str(stopped).rstrip("."))
        return True

    def leaves_out(self, batch: Batch, error: NonFiniteError) -> bool:
        """Up to `skip_nonfinite` batches may be left out because they were not finite."""
        step = self.clock.step
        index, what = np.concatenate(self.world.gather(batch.index)), error.what
        names = [self.plan.data.train.split.names[i] for i in index]
        if self.world.is_main:
            self._guarded(lambda: add_nonfinite_batch(self.run, step, what, index, names))
        if self.num_skipped >= self.recipe.skip_nonfinite:
            return False
        self.num_skipped += 1
        self.notes.append(Sentence("Step {step} was left out: {reason}.", step=step, reason=error.message))
        self.screen.say(f"step {step} was left out: {error.message}")
        return True

    def after_step(self, result: StepResult | None) -> bool:
        clock, world = self.clock, self.world
        self.seconds = self._seconds_before + time.monotonic() - self._began
        if result is not None:
            self._log_step(result)
        fitting = clock.look() if world.is_main else 0
        due = world.is_main and time.monotonic() - self._last_save >= self._save_interval()
        is_late, is_due, is_busy, has_bad, stops, fitting = world.all_reduce_max(
            [clock.is_late, due, self.saver.is_busy, len(self._new_bad) > 0, len(self._signals) > 0, fitting]
        )
        if fitting and world.is_main:
            self._guarded(partial(clock.write, fitting))
        clock.change(fitting)
        self._bar.total = clock.num_steps
        self._say_new_length()
        if has_bad:
            self._share_bad_files()
        is_last = clock.step >= clock.num_steps or bool(is_late)
        if clock.step % self._per_epoch == 0 or is_last:
            self._end_epoch()
            self.seconds = self._seconds_before + time.monotonic() - self._began
            self._rows.restart()
        if (is_due and not is_busy) or is_last or stops:
            self.save()
            self._last_save = time.monotonic()
        if is_last and not stops:
            self.notes += clock.notes()
            if (cut_off := clock.cut_off()) is not None:
                self.screen.say(f"warning: {cut_off}")
        return is_last or bool(stops)

    def _say_new_length(self) -> None:
        steps, before = self.clock.num_steps, self._said_steps
        if abs(steps - before) <= NOTED_SHARE * before:
            return
        speed = "slower" if steps < before else "faster"
        self.screen.say(
            f"the machine is {speed} than it was: {before:,} steps became {steps:,}, to end within the budget"
        )
        self._said_steps = steps

    def _log_step(self, result: StepResult) -> None:
        row = self._rows.add(result, self.clock.step, self._per_epoch, self.seconds)
        if row is not None:
            self._write("train", row)
            self._show_progress()

    def _show_progress(self, *, is_news: bool = False) -> None:
        parts = (self._validated, self._rows.text)
        self._bar.update(self.clock.step, "  ".join(part for part in parts if part), is_news=is_news)

    def _end_epoch(self) -> None:
        """Validate, and keep the weights if they are the best so far (or the last, without validation)."""
        val, recipe, step = self.plan.data.val, self.recipe, self.clock.step
        better = val is None or recipe.keep_weights == "last"
        provenance: dict[str, Any] = {}
        predictions = None
        if val is not None:
            predictions = self._evaluate()
            result = summarize(predictions, self.plan.class_names)
            values = {"top1": result.top1, "loss": result.loss, "ece": result.ece}
            if result.balanced_accuracy is not None:
                values["balanced_accuracy"] = result.balanced_accuracy
            self._write(
                "validation", {"step": step, "epoch": step / self._per_epoch} | values | self._clock()
            )
            gained = (values["top1"], -values["loss"]) > (self.best["top1"], -self.best["loss"])
            self.epochs_without_gain = (
                0 if values["top1"] > self.best["top1"] else self.epochs_without_gain + 1
            )
            if gained:
                self.best = {"top1": values["top1"], "loss": values["loss"], "step": step}
            better = better or gained
            provenance["validation_top1"] = values["top1"]
            best = "best" if gained else f"best {100 * self.best['top1']:.1f} %"
            self._validated = (
                f"epoch {step / self._per_epoch:.4g}  validation accuracy {100 * values['top1']:.1f} % ({best})  "
                f"validation loss {values['loss']:.3f}"
            )
            self._show_progress(is_news=True)
        if better:
            self._save_weights(provenance, predictions)

    def _evaluate(self) -> Predictions:
        self.world.now(f"validating after step {self.clock.step}")
        predictions = validate(self.plan, self.state, self)
        self._share_bad_files()
        return predictions

    def _save_weights(self, provenance: dict[str, Any], predictions: Predictions | None = None) -> None:
        """predictions: of these weights for the validation split, from which their probabilities are calibrated."""
        facts = {"data": self.plan.data.source.name, "recipe": self.recipe.name, "seed": self.recipe.seed}
        facts |= self.plan.objective.facts
        weights = Weights(
            model=self.state.eval_model,
            model_settings=self.plan.model_settings,
            preprocess=self.plan.preprocess,
            class_names=self.plan.class_names,
            provenance=facts | {"step": self.clock.step, "ema": self.state.ema is not None} | provenance,
        )
        if predictions is not None and self.world.is_main:
            weights = calibrated(weights, predictions)
        self._has_weights = True
        values = self.exchange.full_state_dict(weights.model)
        job: Callable[[], None] | None = None
        if self.world.is_main:
            tensors = snapshot(values)

            def write() -> None:
                self.check_folder()
                save_weights(self.run, weights, tensors)

            job = write
        own = self.exchange.writing(job)
        if own is not None:
            self.saver.submit("weights", own)

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
        if self.world.is_main or self.exchange.needs_all_ranks:
            self._save_checkpoint(values)
        if not self._has_weights:
            # So that a run stopped in its first epoch can be looked at. After the checkpoint: weights without one
            # are not written over (`check_resumable`).
            self._save_weights({})

    def _save_checkpoint(self, values: dict[str, Any]) -> None:
        tensors = {name: snapshot(group) for name, group in self.state.tensors().items()}
        checkpoint = Checkpoint(step=self.clock.step, tensors=tensors, state=values)
        folder, keep = self.run / CHECKPOINTS_NAME, self.recipe.keep

        def write() -> None:
            self.check_folder()  # which a write would make again
            began = time.monotonic()
            self.exchange.save(folder, checkpoint, keep=keep)
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
            if tensor.is_floating_point() and not bool(torch.isfinite(to_local(tensor)).all()):
                damaged = name
        if self.world.all_reduce_max([damaged is not None])[0]:
            raise TrainingError(
                f"{damaged or 'a weight'} was no longer finite after step {self.clock.step}; it was not saved",
                where=str(self.run),
                hint="lower --optimizer.lr; the last checkpoint is from before",
            )

    def load(self) -> None:
        """Go back to the newest valid checkpoint; a run that has none yet (`check_resumable`) starts again."""
        if not self.world.run_on_main(self._tidy):
            if self.log is not None:
                self.log.truncate_after(0)
            self.screen.say("no checkpoint was written yet: starting from the beginning")
            return
        checkpoint, rejected = load_newest_checkpoint(self.run / CHECKPOINTS_NAME, self._check_checkpoint)
        self.world.check_same(checkpoint.step, "newest checkpoint")
        for reason in rejected:
            self.screen.say(f"skipped a damaged checkpoint: {reason}")
        self.world.run_on_main(lambda: check_end(self.run, checkpoint.step))
        tensors = checkpoint.tensors
        if checkpoint.parts is not None:
            from mixlab.checkpoint.sharded import read_shards  # slow to import: see exchanges/fsdp.py

            tensors = read_shards(checkpoint.parts, self.state.place)
        self.state.load(tensors, checkpoint.state["scaler"])
        self.clock.go_to(checkpoint.step)
        self.seconds = checkpoint.state["seconds"]
        self.best = checkpoint.state["best"] or self.best
        self.epochs_without_gain = checkpoint.state["epochs_without_gain"]
        self.num_skipped = checkpoint.state["num_skipped"]
        if self.log is not None:
            self.log.truncate_after(self.clock.step)
            self.log.write("resume", step=self.clock.step)
        self.screen.say(f"resumed after step {self.clock.step} of {self.clock.num_steps}")

    def _check_checkpoint(self, checkpoint: Checkpoint) -> None:
        """WeightsError if a checkpoint that is whole does not fit this run."""
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
        if checkpoint.step > self.clock.most_steps:
            raise WeightsError(f"it is of step {checkpoint.step}, beyond the end of this run", where=where)
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
        check_bad_share(
            self.gone_bad,
            len(self.plan.data.train),
            self.recipe.data.max_bad_share,
            self.plan.modality.one,
            self.plan.modality.many,
        )

    def _clock(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def check_folder(self) -> None:
        """TrainingError if somebody has taken the run's folder away: nothing could be saved any more."""
        if self.world.is_main and not (self.run / "recipe.toml").is_file():
            raise TrainingError(
                f"the run folder is gone: it was deleted or moved before step {self.clock.step} was over",
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
        note = Sentence("training goes on, but {reason}", reason=str(error))
        if not self.notes or str(self.notes[-1]) != str(note):
            self.notes.append(note)
            self.screen.say(str(note))
