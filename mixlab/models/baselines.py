"""Models of other families to compare a Mixer with: timm's own classes, in sizes for small images and sounds.

`timm/baseline_NAME` in a recipe. timm's named sizes are for 224 pixels and hundreds of times as much computing.
Counts are multiply-accumulates of a 32 x 32 image with 10 classes, or of a log-mel picture of 40 bands and 96 frames.
"""

from typing import Any

from timm.models import register_model
from timm.models.mlp_mixer import MlpMixer
from timm.models.resnet import BasicBlock, ResNet
from timm.models.vision_transformer import VisionTransformer
from torch import nn


@register_model
def baseline_mixer_mini(pretrained: bool = False, **options: Any) -> MlpMixer:
    """24.7 million; Mixer-Pyramid-Mini/2 has 24.8."""
    sizes = {"patch_size": 4, "num_blocks": 5, "embed_dim": 128, "mlp_ratio": (0.5, 1.8125)}
    return MlpMixer(**_known(sizes | options))


@register_model
def baseline_vit_mini(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """25.4 million."""
    sizes = {"patch_size": 4, "depth": 7, "embed_dim": 64, "num_heads": 4, "mlp_ratio": 3.75}
    return VisionTransformer(**_known(sizes | options))


@register_model
def baseline_vit_micro(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """12.7 million; Mixer-Micro/4 has 12.9."""
    sizes = {"patch_size": 4, "depth": 5, "embed_dim": 56, "num_heads": 4, "mlp_ratio": 3}
    return VisionTransformer(**_known(sizes | options))


@register_model
def baseline_resnet_micro(pretrained: bool = False, **options: Any) -> ResNet:
    """12.6 million: a basic block in each of four stages."""
    sizes = {"block": BasicBlock, "layers": (1, 1, 1, 1), "channels": (28, 56, 88, 128)}
    model: Any = ResNet(**_known(sizes | options))
    # ImageNet's stem, 7 x 7 and pooling, would leave 8 x 8 of 32 x 32 pixels. This one leaves 16 x 16.
    model.conv1 = nn.Conv2d(options.get("in_chans", 3), 64, 3, stride=2, padding=1, bias=False)
    nn.init.kaiming_normal_(model.conv1.weight, mode="fan_out", nonlinearity="relu")
    model.maxpool = nn.Identity()
    assert isinstance(model, ResNet)
    return model


@register_model
def baseline_vit_sound(pretrained: bool = False, **options: Any) -> VisionTransformer:
    """37.7 million; Mixer-Sound/1, whose tokens are frames, has 35.6."""
    sizes = {"patch_size": 8, "depth": 5, "embed_dim": 96, "num_heads": 3, "mlp_ratio": 4}
    return VisionTransformer(**_known(sizes | options))


@register_model
def baseline_resnet_sound(pretrained: bool = False, **options: Any) -> ResNet:
    """36.9 million: the blocks of `baseline_resnet_micro`, narrower."""
    return baseline_resnet_micro(channels=(24, 48, 76, 112), **options)


def _known(options: dict[str, Any]) -> dict[str, Any]:
    """Without what timm's create_model adds for its own builders."""
    return {key: value for key, value in options.items() if not key.startswith(("pretrained", "cache_dir"))}
