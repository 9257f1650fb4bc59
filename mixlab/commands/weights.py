"""The commands about models and their weights, one function each; its docstring is the command's help.

torch is imported inside the commands that need it, so that help and usage errors come at once.
"""

from pathlib import Path
from typing import Annotated, Any

from cyclopts import Parameter

from mixlab.commands.context import Context, emit, find_weights, open_named, parse_size
from mixlab.errors import UsageError


def info(
    model: str,
    /,
    *,
    image_size: str | None = None,
    num_classes: int | None = None,
    batch_size: int = 1,
    patch_size: int | None = None,
    accumulate: int = 1,
    checkpoint_blocks: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Parameters, multiply-accumulates and memory of a model, by name or from weights.

    Parameters
    ----------
    model
        A name from `mixlab models`, timm/NAME, a run, a weights file of any known format, or a published name.
    image_size
        Side, or HxW, in pixels; by default the model's own.
    accumulate
        Parts of a batch, as in the recipe of the training whose memory is wanted.
    checkpoint_blocks
        As in that recipe.
    """
    from mixlab.checkpoint.published import PUBLISHED
    from mixlab.cpu.describe import describe_settings
    from mixlab.device import current_memory_bytes, set_threads
    from mixlab.report.tables import show_facts

    set_threads(None)
    name = find_weights(model)
    size = parse_size(image_size)
    provenance: dict[str, Any] = {}
    if Path(name).exists() or ":" in model or model in PUBLISHED:
        if num_classes is not None or patch_size is not None:
            raise UsageError(
                "weights have their own number of classes and patch size",
                where="--num-classes" if num_classes is not None else "--patch-size",
            )
        weights = open_named(model, image_size=size)
        settings, provenance = weights.model_settings, weights.provenance
    else:
        settings = {"name": model, "num_classes": num_classes or 1000}
        if size is not None:
            settings["image_size"] = size
        if patch_size is not None:
            settings["patch_size"] = patch_size
    facts = describe_settings(
        settings, batch_size=batch_size, accumulate=accumulate, recompute=checkpoint_blocks
    )
    facts["process_bytes"] = current_memory_bytes()  # on top of the model's; a training adds its data set
    facts |= {"provenance": provenance} if provenance else {}
    show_facts(facts, Context.screen())
    emit(facts)


def models(*, timm: str | None = None, pretrained: Annotated[bool, Parameter(negative="")] = False) -> None:
    """List the models that can be trained by name, or the published weights.

    Parameters
    ----------
    timm
        Also list timm's models that match this pattern, such as '*mixer*'; they are used as timm/NAME.
    pretrained
        List every published file of Mixer weights instead: name, size, classes, accuracy, where it comes from.
    """
    from mixlab.report.tables import show_models, show_published

    if pretrained:
        from mixlab.checkpoint.download import list_published

        published = list_published()
        show_published(published, Context.screen())
        emit({"pretrained": published})
        return
    from mixlab.cpu.describe import list_models

    rows = list_models(timm)
    show_models(rows, Context.screen())
    emit({"models": rows})


def convert(
    source: str,
    destination: Path,
    /,
    *,
    format: str | None = None,
    image_size: str | None = None,
    gelu: str | None = None,
    layer_norm_eps: float | None = None,
    accept_gelu_change: Annotated[bool, Parameter(negative="")] = False,
    half: Annotated[bool, Parameter(negative="")] = False,
) -> None:
    """Turn weights of one format into another; the source is recognised by its keys and shapes.

    Parameters
    ----------
    source
        A file or folder of weights (the authors' .npz, timm, mmpretrain, lucidrains, mixlab), a run, or a
        published name.
    destination
        What to write; it must not exist.
    format
        mixlab, official (.npz), timm (a folder for timm and transformers), mixlab-timm (the same with mixlab's
        architecture, which keeps the tanh GELU), mmpretrain or lucidrains; by default official for *.npz, else
        mixlab.
    image_size
        Side, or HxW, in pixels: resample to it; needed where the number of patches is no square.
    gelu
        tanh or erf, instead of what the source's format implies.
    layer_norm_eps
        Instead of what the source's format implies.
    accept_gelu_change
        Write weights for code that runs another GELU or epsilon than they were trained with; the difference is
        measured, printed and stored.
    half
        A mixlab folder with 16-bit weights, half the size; the difference is measured and printed.
    """
    from mixlab.checkpoint.convert import convert as convert_weights
    from mixlab.models.layers import ACTIVATIONS
    from mixlab.report.tables import show_conversion

    if gelu is not None and gelu not in ACTIVATIONS:
        raise UsageError(f"gelu must be {' or '.join(ACTIVATIONS)}, got {gelu!r}", where="--gelu")
    weights = open_named(source, image_size=parse_size(image_size), gelu=gelu, layer_norm_eps=layer_norm_eps)
    result = convert_weights(
        weights, destination, format=format, accept_gelu_change=accept_gelu_change, half=half
    )
    settings = {key: value for key, value in weights.model_settings.items() if value is not None}
    result |= {"source": weights.provenance, "model": settings}
    show_conversion(result, Context.screen())
    emit(result)


def permute(weights: str, /, *, seed: int = 0, out: Path) -> None:
    """Rewrite weights for images whose patches and pixels are permuted: same answers, and the proof.

    Parameters
    ----------
    weights
        A run, a weights file of any known format, or a published name; a Mixer or a timm ViT.
    seed
        Of the permutation of the patches and of the pixels in a patch.
    out
        Folder to write the new weights to; it must not exist. They permute images themselves.
    """
    from mixlab.checkpoint.permute import permute_weights
    from mixlab.checkpoint.store import save_weights
    from mixlab.report.tables import show_permutation

    if out.exists():
        raise UsageError("it exists already", where=str(out), hint="choose another --out")
    permuted, proof = permute_weights(open_named(weights), seed=seed)
    save_weights(out, permuted)
    result = proof | {"out": str(out), "seed": seed}
    show_permutation(result, Context.screen())
    emit(result)
