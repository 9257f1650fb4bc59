"""Few images: what cannot be computed or tested with them, said before the work where it can be known."""

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from mixlab.data.dataset import Source, Split
from mixlab.errors import TrainingError, UsageError
from mixlab.language import tell, word
from mixlab.training.recipe import Recipe

NUM_NAMED = 5  # classes
SMALLEST_TESTED = 3  # images of a class, from which on a drawn split has one in train, val and test each


def why_not_tested(source: Source, splits: dict[str, Split]) -> str | None:
    """The reason, as the end of a sentence, where nothing can be tested; None where there is a test split."""
    if "test" in splits:
        return None
    if "all" in source.splits:
        many = source.modality.many
        return tell(
            "no class has {n} different {many}, as it takes to give one to the test split",
            n=SMALLEST_TESTED,
            many=many,
        )
    return tell("the data set has no test split")


def describe_absent(source: Source, splits: dict[str, Split]) -> dict[str, str]:
    """By split a sentence on classes without images, where others have some: of `test`, and of a given `val`."""
    wanted = ("val", "test") if "val" in source.splits else ("test",)
    found = {name: _describe_absent(source, splits[name], name) for name in wanted if name in splits}
    return {name: text for name, text in found.items() if text is not None}


def _describe_absent(source: Source, split: Split, split_name: str) -> str | None:
    present = set(split.labels.tolist())
    names = [name for number, name in enumerate(source.class_names) if number not in present]
    if not names:
        return None
    some = ", ".join(names[:NUM_NAMED])
    if len(names) > NUM_NAMED:
        some += tell(" and {n:,} more", n=len(names) - NUM_NAMED)
    values = {"kind": word("validation" if split_name == "val" else split_name), "names": some}
    values["many"] = source.modality.many
    if len(names) == 1:
        return tell("1 class has no {kind} {many} and is not measured there: {names}", **values)
    return tell(
        "{n} classes have no {kind} {many} and are not measured there: {names}", n=len(names), **values
    )


def smallest_part(recipe: Recipe, num_images: int, num_processes: int) -> int:
    """How many images the model gets at once, at the least: a batch is shared by processes, and then in parts."""
    share = min(recipe.batch_size, num_images) // recipe.num_parts(num_processes)
    return share // max(min(recipe.accumulate, share), 1)


def needs_two(model: nn.Module, image_size: tuple[int, int], in_channels: int) -> bool:
    """Whether the model cannot be trained on one image: batch normalisation where one pixel of it is left.

    With more pixels its statistics are those of the one image, which can be computed. `model` must not be on meta
    where it has batch normalisation; its running statistics change.
    """
    if not any(isinstance(module, _BatchNorm) for module in model.modules()):
        return False
    was_training, device = model.training, next(model.parameters()).device
    try:
        with torch.no_grad():
            model.train()(torch.zeros(1, in_channels, *image_size, device=device))
    except ValueError as error:
        return is_of_one_image(error)
    finally:
        model.train(was_training)
    return False


def is_of_one_image(error: Exception) -> bool:
    """Whether `error` is how torch refuses to normalise one value."""
    return isinstance(error, ValueError) and "more than 1 value per channel" in str(error)


def check_parts(recipe: Recipe, model: nn.Module, num_images: int, num_processes: int) -> None:
    """UsageError if a resolved recipe gives the model one image at a time, and it cannot be trained on one."""
    if recipe.batch_size == 0 or smallest_part(recipe, num_images, num_processes) > 1:
        return
    assert recipe.data.image_size is not None
    if needs_two(model, recipe.data.image_size, recipe.data.channels or 3):
        text, hint = _words(recipe, num_processes)
        raise UsageError(text, where="batch_size", hint=hint)


def explain_one_image(error: Exception, recipe: Recipe, num_processes: int) -> TrainingError | None:
    """The same, where it shows in training only: images of a batch could not be read any more."""
    if not is_of_one_image(error):
        return None
    text, hint = _words(recipe, num_processes)
    return TrainingError(text, where="batch_size", hint=hint)


def _words(recipe: Recipe, num_processes: int) -> tuple[str, str]:
    shared = recipe.accumulate * num_processes
    parts = "" if shared == 1 else f", which is computed in {shared} parts"
    return (
        f"{recipe.model.name} normalises over the images of a batch, and would get one at a time "
        f"(batch_size {recipe.batch_size}{parts})",
        f"give --batch-size {2 * shared} or more"
        + (", or a smaller --accumulate" if recipe.accumulate > 1 else "")
        + "; or take a model without batch normalisation, such as a Mixer",
    )
