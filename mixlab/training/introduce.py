"""What a training says before its first step: the data, the model, the run; a line each."""

from pathlib import Path
from typing import Any

from mixlab.models.catalog import config_of, display_name
from mixlab.report.screen import Screen
from mixlab.training.clock import Clock
from mixlab.training.plan import Plan
from mixlab.training.session import Session
from mixlab.training.step import TrainState


def introduce(plan: Plan, state: TrainState, run: Path, clock: Clock, session: Session) -> None:
    """Say what is about to be trained, on what and where."""
    screen: Screen = session.screen
    screen.say(f"data: {_data(plan)}")
    screen.say(f"model: {_model(plan, state)}")
    screen.say(f"run: {_run(plan, run, clock, session)}")
    screen.say(f"kept: {_kept(plan)}")


def _kept(plan: Plan) -> str:
    if plan.data.val is None:
        return "the weights after the last step; there is no validation split to choose by"
    if plan.recipe.keep_weights == "last":
        return "the weights after the last step"
    return "the best weights: those with the highest validation accuracy; of equals, with the lowest validation loss"


def _data(plan: Plan) -> str:
    data, many = plan.data, plan.modality.many
    # Those that can be read, as the report counts them; of a test split that is not in memory that shows at the end.
    test = data.splits.get("test") if data.test is None else data.test
    splits = {"training": data.train, "validation": data.val, "test": test}
    counts = [f"{len(split):,} {name}" for name, split in splits.items() if split is not None]
    size = " x ".join(map(str, (*plan.preprocess.input_size, plan.preprocess.channels)))
    num_classes = len(plan.class_names)
    return f"{plan.data.source.name}, {num_classes:,} classes; {', '.join(counts)} {many}; input {size}"


def _model(plan: Plan, state: TrainState) -> str:
    model: Any = state.eval_model
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    text = f"{display_name(plan.model_settings['name'])}, {num_parameters:,} parameters"
    config = config_of(model)
    return text if config is None else f"{text}, {config.num_patches:,} patches"


def _run(plan: Plan, run: Path, clock: Clock, session: Session) -> str:
    recipe = plan.recipe
    per_step = min(recipe.batch_size, len(plan.data.train))
    epochs = clock.num_steps * per_step / len(plan.data.train)
    about = "about " if clock.deadline is not None else ""
    length = f"{about}{clock.num_steps:,} steps of {per_step:,} {plan.modality.many} ({epochs:,.3g} epochs)"
    device = str(session.device)
    if session.device.type == "cpu":
        device += f" with {recipe.threads} thread" + ("" if recipe.threads == 1 else "s")
    if session.world.size > 1:
        device += f", {session.world.size} processes"
    return f"{run}; {length}; {device}; {recipe.precision}"
