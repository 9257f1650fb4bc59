"""Training: build, resume, step by step, evaluate, save, report. One loop for every kind of training."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mixlab.checkpoint.store import (
    CONFIG_NAME,
    Checkpoint,
    Weights,
    load_newest_checkpoint,
    load_weights,
    save_checkpoint,
    save_weights,
    sweep,
)
from mixlab.data.loader import (
    BadFile,
    TrainingPictures,
    check_bad_share,
    evaluation_batches,
    steps_per_epoch,
    training_batches,
)
from mixlab.data.random import torch_seed
from mixlab.device import autocast, pick_device, set_threads
from mixlab.errors import DataError, UsageError
from mixlab.evaluation.classify import classify
from mixlab.evaluation.metrics import Evaluation, summarize
from mixlab.models.catalog import create_model
from mixlab.report.run_log import RunLog
from mixlab.report.screen import Screen
from mixlab.training.budget import plan_steps
from mixlab.training.initial import fit_initial, load_initial, open_initial, with_absolute_init
from mixlab.training.optimizer import freeze_layers
from mixlab.training.outcome import finish
from mixlab.training.recipe import Recipe, from_toml, override
from mixlab.training.run_folder import add_bad_files, create_run, default_run_path, read_bad_files
from mixlab.training.setup import (
    Prepared,
    check_model,
    open_data,
    prepare,
    reopen_splits,
    resolve,
    split_source,
    with_absolute_paths,
)
from mixlab.training.signals import Interrupted, catch_signals
from mixlab.training.step import TrainState, train_step
from mixlab.training.tracking import Rows, check_tracker, open_tracker

NUM_LOG_ROWS = 1000  # of training, in metrics.jsonl, at most


def train(
    recipe: Recipe,
    *,
    run: Path | None = None,
    budget_seconds: float | None = None,
    started: float | None = None,
    device: str = "auto",
    download: bool = False,
    with_pictures: bool = True,
    tracker: str | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Train `recipe` into the new folder `run`; returns the object that `train --json` prints.

    budget_seconds: total time from `started` (a time.monotonic(), by default now) to the end; sets the steps.
    """
    started = time.monotonic() if started is None else started
    screen = screen or Screen()
    if run is not None and run.exists():
        raise UsageError(
            "this run exists already", where=str(run), hint="choose another --run, or --resume it"
        )
    if budget_seconds is not None and (recipe.steps is not None or recipe.epochs is not None):
        raise UsageError(
            "a budget sets the steps itself", where="--budget", hint="leave steps and epochs out"
        )
    torch_device = pick_device(device)
    autocast(torch_device, recipe.precision)  # raises if this device does not have it
    check_tracker(tracker)
    recipe = with_absolute_init(with_absolute_paths(recipe))
    initial = open_initial(recipe)
    source = open_data(recipe, download=download)
    splits = split_source(source, recipe)
    if initial is not None:
        recipe, initial = fit_initial(recipe, initial)
    recipe = resolve(recipe, splits["train"])
    check_model(recipe, len(source.class_names))  # before reading the pictures, which may take long
    run = run or default_run_path(recipe)
    set_threads(recipe.threads)
    prepared = prepare(recipe, source, splits, screen)
    state = _build(prepared, torch_device, initial, screen)
    deadline = None
    if budget_seconds is not None:
        plan = plan_steps(prepared, state, budget_seconds=budget_seconds, started=started)
        recipe, deadline = plan.recipe, plan.deadline
    elif recipe.steps is None:
        per_epoch = steps_per_epoch(len(prepared.train), recipe.batch_size)
        recipe = replace(recipe, steps=max(round((recipe.epochs or 10) * per_epoch), 1))
    prepared = replace(prepared, recipe=recipe)
    state.recipe = recipe
    create_run(run, prepared)
    return _run(prepared, state, run, started, deadline, with_pictures, tracker, screen)


def resume(
    run: Path,
    *,
    device: str = "auto",
    with_pictures: bool = True,
    tracker: str | None = None,
    screen: Screen | None = None,
) -> dict[str, Any]:
    """Go on with the training in `run` from its newest valid checkpoint, as if it had never stopped."""
    started = time.monotonic()
    screen = screen or Screen()
    if not (run / "recipe.toml").is_file():
        raise UsageError("there is no run to resume", where=str(run), hint="`mixlab runs` lists the runs")
    recipe = override(Recipe(), from_toml(run / "recipe.toml"), where=str(run / "recipe.toml"))
    source = open_data(recipe)
    known = load_weights(run).class_names if (run / CONFIG_NAME).is_file() else source.class_names
    if known != source.class_names:
        raise DataError("the data set has other classes than when this run began", where=source.name)
    set_threads(recipe.threads)
    prepared = prepare(recipe, source, reopen_splits(source, run / "split.csv"), screen)
    add_bad_files(run, prepared.bad_files)
    initial = None
    if not any((run / "checkpoints").glob("step_*")):
        initial = open_initial(recipe)
        if initial is not None:
            recipe, initial = fit_initial(recipe, initial)
    state = _build(prepared, pick_device(device), initial, screen)
    return _run(prepared, state, run, started, None, with_pictures, tracker, screen, resuming=True)


def _build(prepared: Prepared, device: torch.device, initial: Weights | None, screen: Screen) -> TrainState:
    torch.manual_seed(torch_seed(prepared.recipe.seed, 0, 2**31))  # a shard number that no step uses
    model = create_model(**prepared.model_settings)
    if initial is not None:
        screen.say(load_initial(model, initial, prepared.recipe, prepared.source.class_names))
    freeze_layers(model, prepared.recipe.freeze)
    num_classes = len(prepared.source.class_names)
    return TrainState(model, prepared.recipe, prepared.train.split.labels, num_classes, device)


def _run(
    prepared: Prepared,
    state: TrainState,
    run: Path,
    started: float,
    deadline: float | None,
    with_pictures: bool,
    tracker: str | None,
    screen: Screen,
    resuming: bool = False,
) -> dict[str, Any]:
    training = Training(prepared, state, run, screen, tracker)
    if resuming:
        training.load()
    with catch_signals() as signals:
        training.steps(signals, deadline)
    return finish(
        prepared,
        run,
        steps=training.step,
        seconds=training.seconds,
        device=state.device,
        started=started,
        with_pictures=with_pictures,
        notes=training.notes,
        screen=screen,
    )


class Training:
    """One training on its way: where it is, what was best, and where it writes."""

    def __init__(
        self, prepared: Prepared, state: TrainState, run: Path, screen: Screen, tracker: str | None
    ) -> None:
        self.prepared, self.state, self.run, self.screen = prepared, state, run, screen
        self.recipe = state.recipe
        self.log = RunLog(run / "metrics.jsonl")
        self.tracker = open_tracker(tracker, run)
        self.step = 0
        self.seconds = 0.0  # spent in training and validation, over all sittings
        self.best: dict[str, Any] = {"top1": -1.0, "loss": float("inf"), "step": 0}
        self.epochs_without_gain = 0
        self.notes: list[str] = []
        self.bad_files = {file.path for file in read_bad_files(run)}
        self.gone_bad: list[BadFile] = []  # readable when training began, and not any more

    def steps(self, signals: list[int], deadline: float | None) -> None:
        """Train from `self.step` to the recipe's last step, an early stop, the deadline or a signal."""
        recipe, prepared = self.recipe, self.prepared
        assert recipe.steps is not None
        per_epoch = steps_per_epoch(len(prepared.train), recipe.batch_size)
        pictures = TrainingPictures(
            images=prepared.train, augment=recipe.augment, batch_size=recipe.batch_size, seed=recipe.seed
        )
        batches = training_batches(
            pictures,
            first_step=self.step,
            num_steps=recipe.steps,
            num_workers=recipe.data.num_workers or 0,
            on_bad=self._note_bad_file,
        )
        rows = Rows(every=max(recipe.steps // NUM_LOG_ROWS, 1))
        sitting_began, seconds_before, last_save = time.monotonic(), self.seconds, time.monotonic()
        self.state.model.train()
        with self.screen.progress("training", recipe.steps, self.step) as bar:
            for batch in batches:
                if self._should_stop_early():
                    break
                result = train_step(self.state, batch, self.step)
                self.step += 1
                self.seconds = seconds_before + time.monotonic() - sitting_began
                row = rows.add(result, self.step, per_epoch, self.seconds)
                if row is not None:
                    self._write("train", row)
                    bar.update(self.step, rows.text)
                is_last = self.step == recipe.steps or (deadline is not None and time.monotonic() > deadline)
                if self.step % per_epoch == 0 or is_last:
                    self._end_epoch(per_epoch, bar)
                    self.seconds = seconds_before + time.monotonic() - sitting_began
                    rows.restart()
                    if is_last or time.monotonic() - last_save >= recipe.checkpoint_seconds:
                        self.save()
                        last_save = time.monotonic()
                if signals:
                    self.save()
                    raise Interrupted(signals[0], self.run, self.step)
                if is_last and self.step < recipe.steps:
                    self.notes.append(
                        f"The budget ended after {self.step} of {recipe.steps} planned steps, because the machine "
                        "became slower than it was when it was measured."
                    )
                    break

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
        batches = evaluation_batches(self.prepared.val, batch_size, on_bad=self._note_bad_file)
        predictions = classify(self.state.best_guess, batches, self.state.device)
        return summarize(predictions, self.prepared.source.class_names)

    def _save_weights(self, provenance: dict[str, Any]) -> None:
        facts = {"data": self.prepared.source.name, "recipe": self.recipe.name, "seed": self.recipe.seed}
        weights = Weights(
            model=self.state.best_guess,
            model_settings=self.prepared.model_settings,
            preprocess=self.prepared.preprocess,
            class_names=self.prepared.source.class_names,
            provenance=facts | {"step": self.step, "ema": self.state.ema is not None} | provenance,
        )
        save_weights(self.run, weights)

    def _should_stop_early(self) -> bool:
        patience = self.recipe.early_stop
        if not patience or self.epochs_without_gain < patience:
            return False
        self.notes.append(
            f"Stopped early after step {self.step}: no better validation accuracy in {patience} epochs."
        )
        return True

    def save(self) -> None:
        """Write a checkpoint of this moment, between two steps."""
        if not (self.run / "config.json").exists():
            self._save_weights({})  # so that a run stopped in its first epoch can be looked at
        values = {
            "seconds": self.seconds,
            "best": self.best if self.best["step"] else None,
            "epochs_without_gain": self.epochs_without_gain,
            "scaler": self.state.scaler.state_dict(),
        }
        checkpoint = Checkpoint(step=self.step, tensors=self.state.tensors(), state=values)
        save_checkpoint(self.run / "checkpoints", checkpoint)

    def load(self) -> None:
        """Go back to the newest valid checkpoint of the run; a run killed before its first starts again."""
        sweep(self.run)
        sweep(self.run / "checkpoints")
        if not any((self.run / "checkpoints").glob("step_*")):
            self.log.truncate_after(0)
            self.screen.say("no checkpoint was written yet: starting from the beginning")
            return
        checkpoint, rejected = load_newest_checkpoint(self.run / "checkpoints")
        for reason in rejected:
            self.screen.say(f"skipped a damaged checkpoint: {reason}")
        self.state.load(checkpoint.tensors, checkpoint.state["scaler"])
        self.step, self.seconds = checkpoint.step, checkpoint.state["seconds"]
        self.best = checkpoint.state["best"] or self.best
        self.epochs_without_gain = checkpoint.state["epochs_without_gain"]
        self.log.truncate_after(self.step)
        self.log.write("resume", step=self.step)
        self.screen.say(f"resumed after step {self.step} of {self.recipe.steps}")

    def _note_bad_file(self, file: BadFile) -> None:
        if file.path not in self.bad_files:
            self.bad_files.add(file.path)
            add_bad_files(self.run, [file])
            self.screen.say(f"left out {file.path}: {file.reason}")
            self.gone_bad.append(file)
            check_bad_share(self.gone_bad, len(self.prepared.train), self.recipe.data.max_bad_share)

    def _clock(self) -> dict[str, float]:
        return {"seconds": self.seconds}

    def _write(self, event: str, values: dict[str, Any]) -> None:
        self.log.write(event, **values)
        self.tracker(event, values)
