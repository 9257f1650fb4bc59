"""Facts about models for `mixlab info` and `mixlab models`."""

from typing import Any

import torch

from mixlab.cpu.cost import measure_cost
from mixlab.errors import UsageError
from mixlab.models.catalog import MODELS, create_model, display_name
from mixlab.models.mixer import Mixer
from mixlab.models.recompute import checkpoint_blocks


def describe_settings(
    settings: dict[str, Any], *, batch_size: int, accumulate: int = 1, recompute: bool = False
) -> dict[str, Any]:
    """Counts and costs of the model that `create_model(**settings)` makes; no memory is taken for its weights.

    accumulate, recompute: of a training, the recipe's keys `accumulate` and `checkpoint_blocks`.
    """
    if batch_size < 1:
        raise UsageError(f"batch_size must be at least 1, got {batch_size}", where="--batch-size")
    if not 1 <= accumulate <= batch_size:
        raise UsageError(
            f"{batch_size} images cannot be computed in {accumulate} parts", where="--accumulate"
        )
    name = settings["name"]
    with torch.device("meta"):
        model = create_model(**settings)
    if recompute:
        checkpoint_blocks(model)
    facts: dict[str, Any] = {"model": name, "display_name": display_name(name)}
    if isinstance(model, Mixer):
        config = model.config
        image_size = config.image_size
        facts |= {
            "image_size": "x".join(str(side) for side in image_size),
            "patch_size": config.patch_size,
            "num_patches": config.num_patches,
            "num_blocks": config.num_blocks,
            "hidden_dim": config.hidden_dim,
            "token_mlp_dim": config.token_mlp_dim,
            "channel_mlp_dim": config.channel_mlp_dim,
        }
    else:
        image_size = settings.get("image_size") or tuple(dict(model.default_cfg)["input_size"][1:])  # type: ignore[arg-type]
        facts |= {"image_size": "x".join(str(side) for side in image_size), "num_patches": None}
        if hasattr(model, "patch_embed"):
            facts["num_patches"] = getattr(model.patch_embed, "num_patches", None)
    facts |= {"num_classes": settings["num_classes"], "in_channels": settings.get("in_channels", 3)}
    cost = measure_cost(
        model, image_size, in_channels=facts["in_channels"], batch_size=batch_size, accumulate=accumulate
    )
    return facts | cost.to_json()


def list_models(timm_pattern: str | None = None) -> list[dict[str, Any]]:
    """A row for each of our models, and for each of timm's that matches the pattern."""
    rows = []
    for name, (side, purpose) in MODELS.items():
        facts = describe_settings({"name": name, "num_classes": 1000}, batch_size=1)
        rows.append(
            {
                "model": name,
                "display_name": facts["display_name"],
                "image_side": side,
                "num_parameters": facts["num_parameters"],
                "macs": facts["macs"],
                "purpose": purpose,
            }
        )
    if timm_pattern is not None:
        import timm

        empty = {"image_side": None, "num_parameters": None, "macs": None, "purpose": "timm"}
        rows += [{"model": f"timm/{n}", "display_name": n} | empty for n in timm.list_models(timm_pattern)]
    return rows
