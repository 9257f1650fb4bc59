"""The command `mixlab`, in a process that also knows two models of timm's with as many multiplications as a pyramid.

python -m benchmarks.equal_models train DATA --model.name timm/equal_vit ...
"""

from typing import Any

from mixlab.cli import main  # first: a budget counts from here

from timm.models import register_model  # isort: skip
from timm.models.mlp_mixer import MlpMixer  # isort: skip
from timm.models.vision_transformer import VisionTransformer  # isort: skip


@register_model
def equal_mixer(pretrained: bool = False, **options: Any) -> MlpMixer:
    """24.7 million multiplications for 32 x 32 pixels; Mixer-Pyramid-Mini/2 has 24.8."""
    sizes = {"patch_size": 4, "num_blocks": 5, "embed_dim": 128, "mlp_ratio": (0.5, 1.8125)}
    return MlpMixer(**_known(sizes | options))


@register_model
def equal_vit(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """25.4 million."""
    sizes = {"patch_size": 4, "depth": 7, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 3.75}
    return VisionTransformer(**_known(sizes | options))


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Without what timm's create_model adds for its own builders."""
    return {key: value for key, value in options.items() if not key.startswith(("pretrained", "cache_dir"))}


if __name__ == "__main__":
    main()
