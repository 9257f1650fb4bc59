"""`import mixlab.timm` registers the Mixer family in timm: `timm.create_model("mixlab_mixer_b16")`.

Unlike timm's own `mixer_*` they have the authors' tanh GELU, initialisation and stochastic depth (linear over the
blocks, kept branches not rescaled), every size including H/14 and S/8, any patch side, and mixlab's tensor names.
"""

from collections.abc import Callable
from typing import Any

from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from torch import Tensor, nn

from mixlab.models.catalog import MIXER, MODELS, PYRAMID, ModelConfig, mixer_config
from mixlab.models.mixer import Mixer

PREFIX = "mixlab_"
FLAT = [name for name in MODELS if PYRAMID not in name]  # a pyramid is another class, not registered yet


class TimmMixer(Mixer):
    """A `Mixer` with the methods that timm expects of a model.

    Arguments: timm's (num_classes, in_chans, img_size, drop_path_rate, global_pool) and the fields of
    `mixlab.models.catalog.ModelConfig`, so that a config.json can say them.
    """

    def __init__(
        self,
        num_classes: int = 1000,
        in_chans: int = 3,
        img_size: int | tuple[int, int] | None = None,
        drop_path_rate: float = 0.0,
        global_pool: str = "avg",
        drop_rate: float = 0.0,
        **dimensions: Any,
    ) -> None:
        if drop_rate:
            raise ValueError(
                "a Mixer has no dropout: drop_rate must be 0; drop_path_rate is its stochastic depth"
            )
        if dimensions.get("token_mixing", "shared") != "shared":
            raise ValueError("variants of token mixing come from mixlab.create_model, not through timm")
        if global_pool not in ("", "avg"):
            raise ValueError(f"a Mixer is pooled by its mean, not by {global_pool!r}")
        size = (img_size, img_size) if isinstance(img_size, int) else img_size
        config = mixer_config(
            ModelConfig(stochastic_depth=drop_path_rate, **dimensions),
            num_classes=max(num_classes, 1),
            image_size=None if size is None else (int(size[0]), int(size[1])),
            in_channels=in_chans,
        )
        super().__init__(config)
        self.num_classes, self.in_chans, self.global_pool = num_classes, in_chans, global_pool
        self.num_features = self.head_hidden_size = self.embed_dim = config.hidden_dim
        if num_classes == 0:
            self.reset_classifier(0)

    def forward_features(self, image: Tensor) -> Tensor:
        """Images (B, in_chans, H, W) to tokens after the last norm (B, S, C)."""
        return self.encode(image)

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, S, C) to logits (B, K), or to their mean (B, C)."""
        x = x.mean(dim=1) if self.global_pool else x
        return x if pre_logits else self.head(x)

    def forward(self, image: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(image))

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """A new head, or none for 0 classes."""
        self.num_classes = num_classes
        self.global_pool = self.global_pool if global_pool is None else global_pool
        if num_classes == 0:
            self.head = nn.Identity()  # type: ignore[assignment]
            return
        weight = self.pre_head_norm.weight
        self.head = nn.Linear(self.num_features, num_classes, device=weight.device, dtype=weight.dtype)
        nn.init.zeros_(self.head.weight)
        nn.init.constant_(self.head.bias, self.config.head_bias)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.checkpoint_blocks = enable

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """timm's order of layers, for its layer-wise learning rates."""
        found: dict[str, Any] = MIXER.layers(self)
        return found

    def no_weight_decay(self) -> set[str]:
        return set()


def _default_cfg(side: int) -> dict[str, Any]:
    return {
        "url": "",
        "num_classes": 1000,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "crop_pct": 0.875,
        "interpolation": "bicubic",
        "mean": (0.5, 0.5, 0.5),
        "std": (0.5, 0.5, 0.5),
        "first_conv": "stem",
        "classifier": "head",
        "license": "apache-2.0",
    }


default_cfgs = generate_default_cfgs(
    {f"{PREFIX}{name}": _default_cfg(side) for name in FLAT for side in [MODELS[name][0]]}
)


def _register(name: str) -> None:
    def make(pretrained: bool = False, **arguments: Any) -> nn.Module:
        return build_model_with_cfg(TimmMixer, PREFIX + name, pretrained, **({"name": name} | arguments))

    make.__name__ = PREFIX + name
    make.__doc__ = f"mixlab's {name}, with the authors' numerics."
    # timm finds the function by the name of its module and files it under that.
    make.__module__ = __name__
    globals()[make.__name__] = make
    register: Callable[..., Any] = register_model
    register(make)


__all__ = ["TimmMixer"]
for _name in FLAT:
    _register(_name)
