"""`reopen`: the plan of a run that was stopped, as it was before its first step."""

from functools import partial
from pathlib import Path
from unicodedata import normalize

from mixlab.checkpoint.checkpoints import CHECKPOINTS_NAME, checkpoint_paths
from mixlab.checkpoint.described import check_size
from mixlab.checkpoint.store import CONFIG_NAME, WEIGHTS_NAME, read_config
from mixlab.data.dataset import everything
from mixlab.data.modality import read_preprocess
from mixlab.device import set_threads
from mixlab.errors import DataError, UsageError, WeightsError
from mixlab.planning.make_plan import read_everywhere
from mixlab.records import take, take_list
from mixlab.training.choose import objective_module
from mixlab.training.choose_split import open_own_data, recipe_of
from mixlab.training.initial import fit_initial, open_initial
from mixlab.training.plan import Plan
from mixlab.training.prepared import prepare
from mixlab.training.recipe import Recipe
from mixlab.training.run_folder import add_bad_files
from mixlab.training.session import Session
from mixlab.training.setup import for_this_machine, model_settings


def reopen(run: Path, moved_to: str | None, session: Session) -> Plan:
    """The plan of `run`, whose data may be at `moved_to` now. Nothing is decided or measured again."""
    world = session.world
    recipe = recipe_of(run)
    num_steps = _check_resolved(recipe, run)
    source, recorded = open_own_data(run, recipe, moved_to)
    known = source.class_names
    # Alone: a kill may have come between new weights and what describes them.
    if (run / CONFIG_NAME).is_file():
        names = take_list(read_config(run / CONFIG_NAME), "class_names", str, str(run / CONFIG_NAME))
        known = tuple(normalize("NFC", name) for name in names)
        _check_described(run, recipe)
    if known != source.class_names:
        raise DataError("the data set has other classes than when this run began", where=source.name)
    set_threads(recipe.threads)
    joined = everything(source)
    splits = {name: joined.take(places) for name, places in recorded.places.items()}
    recipe = for_this_machine(recipe, source.modality, len(splits["train"]), world.local_size)
    read = partial(prepare, recipe, source, splits, session.screen, recorded.digests)
    recipe, data = read_everywhere(world, lambda: (recipe, read()))
    world.run_on_main(lambda: add_bad_files(run, data.bad_files))
    initial = None
    if not checkpoint_paths(run / CHECKPOINTS_NAME):
        initial = open_initial(recipe)
        if initial is not None:
            _, initial = fit_initial(recipe, initial, source.modality)
    objective = objective_module(recipe).reopen(run, recipe, data, session)
    return Plan(recipe=recipe, data=data, num_steps=num_steps, initial=initial, objective=objective)


def _check_resolved(recipe: Recipe, run: Path) -> int:
    """The number of steps. UsageError if a run's recipe leaves open what every run's says."""
    stated = {
        "steps": recipe.steps,
        "threads": recipe.threads,
        "batch_size": recipe.batch_size or None,
        "precision": None if recipe.precision == "auto" else recipe.precision,
        "model.name": recipe.model.name,
        "data.image_size": recipe.data.image_size,
        "data.channels": recipe.data.channels,
        "data.in_memory": recipe.data.in_memory,
    }
    if missing := [key for key, value in stated.items() if value is None]:
        raise UsageError(
            f"the recipe of a run says its {missing[0]}, and this one does not",
            where=str(run / "recipe.toml"),
            hint="bring the file back as the run wrote it",
        )
    return recipe.steps or 0


def _check_described(run: Path, recipe: Recipe) -> None:
    """WeightsError if recipe.toml and config.json of a run are of different models: one of them was changed."""
    where = str(run / CONFIG_NAME)
    config = read_config(run / CONFIG_NAME)
    preprocess = read_preprocess(take(config, "preprocess", dict, where), where)
    stated = (recipe.data.image_size, recipe.data.channels)
    if stated != (preprocess.input_size, preprocess.channels):
        raise WeightsError(
            "recipe.toml and config.json say different things of the size or channels of the model's input",
            where=where,
            hint="one of them is not this run's: bring it back",
        )
    files = [*(run / CHECKPOINTS_NAME).glob("step_*/model.safetensors"), run / WEIGHTS_NAME]
    num_bytes = max((file.stat().st_size for file in files if file.is_file()), default=None)
    if num_bytes is not None and not list((run / CHECKPOINTS_NAME).glob("step_*/.metadata")):
        num_classes = len(take_list(config, "class_names", str, where))
        check_size(model_settings(recipe, num_classes), num_bytes, str(run / "recipe.toml"))
