"""A recipe: everything that decides the result of a training, in one frozen object."""

import difflib
import math
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field, fields, is_dataclass, replace
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, get_args, get_origin, get_type_hints

from mixlab.data.augment import AugmentConfig
from mixlab.data.decode import GREY16_MAX
from mixlab.data.preprocess import MAX_SIDE, Fit
from mixlab.device import check_threads
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import ModelConfig
from mixlab.records import read_toml
from mixlab.training.distill import DistillConfig
from mixlab.training.losses import LossConfig
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.schedule import ScheduleConfig

MAX_WORKERS = 256
# Beyond these a number is a mistake, or made to keep the machine busy.
LARGEST = {
    "steps": 2**40, "epochs": 1e9, "batch_size": 2**24, "accumulate": 2**24, "early_stop": 2**40, "keep": 10**6,
    "skip_nonfinite": 2**40, "virtual_shards": 4096, "coarse_factor": 4096, "checkpoint_seconds": 1e9,
    "timeout_seconds": 1e8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which pictures, and how they are brought to the model's size. None follows from the data.

    source: `digits`, a folder, a CSV file, a torchvision name, `wds:FOLDER` of shards, or `hf:NAME`. data_dir: where
        torchvision's files are. streaming: read an hf: set from front to back, without a copy on the disk; its
        pictures are then shuffled within windows only.
    image_size: model input (height, width). channels: 3 or 1. fit, crop_fraction, interpolation, mean, std: see
        Preprocess; mean and std are 0.5 unless the weights that training starts from had others.
    in_memory: keep all pixels in memory; None does so if they take less than a quarter of the machine's.
    val_fraction: share of train held out where there is no val split (at most 5,000 images); 0 for none.
    train_fraction: share of train that is used at all, by class, before anything is held out from it.
    split_seed: seed of every automatic split. max_bad_share: largest tolerated share of unreadable files.
    num_workers: decoding processes of a streamed set; None takes one a core.
    grey_max: the value of 16-bit grey pictures that counts as white; None measures how many bits train uses.
    permutation: move the pixels of every picture in one and the same way after augmentation (data/permutation.py;
        paper, section 3.4), which the weights remember; of patches of permutation_patch_size (None: the model's).
    """

    source: str = "digits"
    data_dir: str | None = None
    image_size: tuple[int, int] | None = None
    channels: int | None = None
    fit: Fit = "crop"
    crop_fraction: float = 1.0
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    in_memory: bool | None = None
    val_fraction: float = 0.1
    train_fraction: float = 1.0
    split_seed: int = 0
    max_bad_share: float = 0.05
    num_workers: int | None = None
    grey_max: int | None = None
    streaming: bool = False
    permutation: Literal["none", "patches_and_pixels", "per_patch", "global"] = "none"
    permutation_patch_size: int | None = None
    permutation_seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.val_fraction < 1.0:
            raise UsageError(
                f"val_fraction must be in [0, 1), got {self.val_fraction}", where="data.val_fraction"
            )
        for key in ("crop_fraction", "train_fraction"):
            if not 0.0 < getattr(self, key) <= 1.0:
                raise UsageError(f"{key} must be in (0, 1], got {getattr(self, key)}", where=f"data.{key}")
        for key in ("split_seed", "num_workers", "max_bad_share", "permutation_seed"):
            value = getattr(self, key)
            if value is not None and value < 0:
                raise UsageError(f"{key} cannot be negative, got {value}", where=f"data.{key}")
        if (self.num_workers or 0) > MAX_WORKERS:
            raise UsageError(
                f"num_workers is {self.num_workers}, and more than {MAX_WORKERS} processes would only wait",
                where="data.num_workers",
                hint="one a core is enough",
            )
        if self.image_size is not None and max(self.image_size) > MAX_SIDE:
            raise UsageError(
                f"image_size is {self.image_size[0]}x{self.image_size[1]}, and no side can be above {MAX_SIDE}",
                where="data.image_size",
            )
        if self.std is not None and not all(value > 0 for value in self.std):
            raise UsageError(f"std must be above 0, got {self.std}", where="data.std")
        if self.grey_max is not None and not 1 <= self.grey_max <= GREY16_MAX:
            raise UsageError(
                f"grey_max must be 1 to {GREY16_MAX}, got {self.grey_max}", where="data.grey_max"
            )
        if self.channels not in (None, 1, 3):
            raise UsageError(f"channels must be 1 or 3, got {self.channels}", where="data.channels")


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, how, and for how long. `steps`, else `epochs`, sets the length.

    batch_size: images a step; 0 or `auto` finds the largest power of two that fits in memory. accumulate: parts it
        is computed in, one after the other. checkpoint_blocks: a block keeps its input only and is computed again on
        the way back: less memory, the same bits, about a third more computation (docs/results.md).
    ema_decay: weights used are an exponential moving average of this decay; 0 is off.
    early_stop: stop after this many epochs without a better validation accuracy; 0 never.
    keep_weights: `best` on validation, or `last`. precision: of activations and products. `bf16` is faster on a
        GPU (autocast, as `fp16` is) and, for a Mixer, on some CPUs with AVX-512 BF16 (docs/results.md); weights,
        their updates and the head stay fp32. `auto` takes bf16 for a Mixer on a CPU whose products are measured to be
        faster in it, else fp32.
    threads: CPU threads of a process, part of the recipe because they change the last bits; None takes one a core,
        and 1 with virtual shards.
    checkpoint_seconds: a checkpoint after the first step that ends this long after the last one, or 60 times as long
        as that took to write if that is longer; 0 is as often as can be. keep: how many stay.
    skip_nonfinite: leave out up to this many batches whose loss or gradient is NaN or infinite, instead of stopping.
    init_from: start from the weights in this run, folder or file, or of this published name. init_grid: how
        they are fitted to another image size: `resample` for any; for whole multiples `dense` or `blocks`, the
        paper's Appendix C with the block-diagonal matrices stored whole (all of it trains) or as blocks.
    whiten_stem: a Mixer that does not start from weights begins with patches whitened (training/whitening.py); a
        model of timm as it is drawn.
    freeze: this many layers keep their initial weights: 1 the stem, 2 the first block too, and so on; -1 all but
        the head.
    coarse_share: this share of the steps, the first ones, sees patches `coarse_factor` times as large, which takes
        less time; then the weights are resampled to the model's own patches (training/curriculum.py).
    budget_seconds: a note of the --budget from which `steps` was set.
    fast: a Mixer on a CPU, in fp32 or in the CPU's own bf16, takes mixlab's own passes forward and back, a core for
        each few images: the same gradients within rounding, sooner (docs/results.md); false leaves all to torch.
    parallel: how several processes (torchrun) share the work: `ddp` has the model on each, `fsdp` spreads it.
    virtual_shards: cut every batch into this many parts and add their gradients in a fixed order, so that the result
        has the same bits on any number of processes up to this one; 0 is off, and faster.
    timeout_seconds: how long a process waits for another, or for its pictures, before it gives up.
    """

    name: str = "custom"
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    epochs: float | None = None
    steps: int | None = None
    batch_size: int = 128
    accumulate: int = 1
    checkpoint_blocks: bool = False
    ema_decay: float = 0.0
    early_stop: int = 0
    keep_weights: Literal["best", "last"] = "best"
    seed: int = 0
    threads: int | None = None
    precision: Literal["fp32", "bf16", "fp16", "auto"] = "fp32"
    compile: bool = False
    fast: bool = True
    checkpoint_seconds: float = 15.0
    keep: int = 2
    skip_nonfinite: int = 0
    coarse_share: float = 0.0
    coarse_factor: int = 2
    budget_seconds: float | None = None
    init_from: str | None = None
    init_grid: Literal["resample", "dense", "blocks"] = "resample"
    whiten_stem: bool = False
    freeze: int = 0
    parallel: Literal["ddp", "fsdp"] = "ddp"
    virtual_shards: int = 0
    timeout_seconds: float = 300.0

    def __post_init__(self) -> None:
        if self.batch_size < 0:
            raise UsageError(
                f"batch_size must be above 0, or auto, got {self.batch_size}", where="batch_size"
            )
        check_threads(self.threads)
        for key, most in LARGEST.items():
            if (getattr(self, key) or 0) > most:
                raise UsageError(f"{key} is {getattr(self, key):g}, more than {most:g}", where=key)
        for key in ("accumulate", "steps", "epochs", "threads", "timeout_seconds"):
            value = getattr(self, key)
            if value is not None and not value > 0:
                raise UsageError(f"{key} must be above 0, got {value}", where=key)
        if self.batch_size % self.accumulate:
            raise UsageError(
                f"batch_size {self.batch_size} cannot be divided into {self.accumulate} equal parts",
                where="accumulate",
            )
        if self.keep < 2:
            raise UsageError(
                f"keep must be at least 2, got {self.keep}",
                where="keep",
                hint="the newest checkpoint may be damaged, and then the one before it is needed",
            )
        if self.virtual_shards and self.batch_size % self.virtual_shards:
            raise UsageError(
                f"batch_size {self.batch_size} cannot be divided into {self.virtual_shards} equal shards",
                where="virtual_shards",
            )
        if self.virtual_shards and self.parallel == "fsdp":
            raise UsageError(
                "virtual shards need the whole model on each process", where="parallel", hint="use ddp"
            )
        for key in ("early_stop", "checkpoint_seconds", "skip_nonfinite", "virtual_shards"):
            if getattr(self, key) < 0:
                raise UsageError(f"{key} cannot be negative, got {getattr(self, key)}", where=key)
        for key in ("ema_decay", "coarse_share"):
            if not 0.0 <= getattr(self, key) < 1.0:
                raise UsageError(f"{key} must be in [0, 1), got {getattr(self, key)}", where=key)
        if self.coarse_factor < 2:
            raise UsageError(
                f"coarse_factor must be at least 2, got {self.coarse_factor}", where="coarse_factor"
            )
        if self.coarse_share and self.parallel == "fsdp":
            raise UsageError(
                "a model spread over processes cannot change its patches", where="parallel", hint="use ddp"
            )
        if self.coarse_share and self.init_from is not None:
            raise UsageError(
                "weights to start from would lose what larger patches cannot hold",
                where="coarse_share",
                hint="leave it out, or train a run with larger patches and start from its weights",
            )
        if self.distill.is_on and self.loss.name != "softmax":
            raise UsageError(
                f"a teacher's probabilities are of one class an image, the {self.loss.name} loss is not",
                where="distill.teacher",
                hint="--loss.name softmax",
            )
        if self.data.permutation != "none" and self.augment.cutmix_alpha:
            raise UsageError(
                "CutMix would paste rectangles of pictures whose pixels are permuted",
                where="data.permutation",
                hint="leave augment.cutmix_alpha out; mixup can stay",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be in [0, 2^63), got {self.seed}", where="seed")


def to_toml(recipe: Recipe, without: Callable[[Any], Any] = lambda values: values) -> str:
    """The recipe as TOML that `from_toml` reads back equal; what is None is left out.

    without: takes something out of the values, which is then not read back.
    """
    import tomli_w

    return tomli_w.dumps(without(_without_none(asdict(recipe))))


def from_toml(path: Path) -> dict[str, Any]:
    """Flat overrides, `optimizer.lr` -> value, of a TOML file; UsageError with line or key if it is wrong."""
    if not path.exists():
        raise UsageError("there is no such recipe file", where=str(path))
    try:
        values = read_toml(path, follow=True)
    except WeightsError as error:
        raise UsageError(f"the recipe file cannot be read: {error.message}", where=error.where) from error
    flat: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{key}.{inner}": inner_value for inner, inner_value in value.items()}
        else:
            flat[key] = value
    return flat


def override(recipe: Recipe, values: dict[str, Any], *, where: str | None = None) -> Recipe:
    """`recipe` with keys replaced; values may be text. UsageError names the nearest key or the type.

    A key is dotted (`optimizer.lr`), or its last part where only one key ends so (`lr`).
    """
    groups: dict[str, dict[str, Any]] = {}
    known = recipe_fields()
    for key, value in values.items():
        full = full_key(key, where=where)
        group, _, name = full.rpartition(".")
        groups.setdefault(group, {})[name] = _convert(value, known[full], full, where)
    top = groups.pop("", {})
    parts = {group: replace(getattr(recipe, group), **changes) for group, changes in groups.items()}
    return replace(recipe, **parts, **top)


def full_key(key: str, *, also: Iterable[str] = (), where: str | None = None) -> str:
    """`lr` -> `optimizer.lr`; UsageError with the nearest of the keys, and of `also`, for an unknown one."""
    known = recipe_fields()
    if key in known:
        return key
    short = [name.split(".")[-1] for name in known]
    inner = [name for name in known if name.split(".")[-1] == key.split(".")[-1]]
    if "." not in key and len(inner) == 1:
        return inner[0]
    close = difflib.get_close_matches(key, [*also, *known, *short], n=1)
    nearest = next(iter([*inner, *close]), None)
    raise UsageError(
        f"recipes have no key {key!r}",
        where=where,
        hint=f"did you mean {nearest!r}?" if nearest else "`mixlab train --help` lists the keys",
    )


@cache
def recipe_fields() -> Mapping[str, Any]:
    """Every dotted key of a recipe with its type, in order."""
    types: dict[str, Any] = {}
    hints = get_type_hints(Recipe)
    for outer in fields(Recipe):
        hint = hints[outer.name]
        if is_dataclass(hint):
            inner_hints = get_type_hints(hint)
            types |= {f"{outer.name}.{inner.name}": inner_hints[inner.name] for inner in fields(hint)}
        else:
            types[outer.name] = hint
    return MappingProxyType(types)


def _without_none(values: dict[str, Any]) -> dict[str, Any]:
    kept = {k: _without_none(v) if isinstance(v, dict) else v for k, v in values.items() if v is not None}
    return {k: list(v) if isinstance(v, tuple) else v for k, v in kept.items()}


def type_name(hint: Any) -> str:
    """A type as a person writes it: `fp32|bf16`, `number`, `on|off`, `HxW`."""
    if get_origin(hint) is Literal:
        return "|".join(str(value) for value in get_args(hint))
    if get_origin(hint) is tuple:
        return "numbers" if Ellipsis in get_args(hint) else "HxW"
    plain = [part for part in get_args(hint) if part is not type(None)]
    if plain:
        return type_name(plain[0])
    return {float: "number", int: "integer", bool: "true|false", str: "text"}[hint]


def _convert(value: Any, hint: Any, key: str, where: str | None) -> Any:
    """`value`, text or TOML, as the type `hint`; UsageError says what is expected."""
    options = get_args(hint) if get_origin(hint) is not Literal and get_origin(hint) is not tuple else (hint,)
    options = options or (hint,)
    if type(None) in options and value in (None, "none", "auto"):
        return None
    if key == "batch_size" and value == "auto":
        return 0
    target = next(option for option in options if option is not type(None))
    try:
        return _parse(value, target)
    except (ValueError, TypeError, KeyError):
        raise UsageError(f"{key} takes {type_name(target)}, got {value!r}", where=where or key) from None


def parse_image_size(text: Any) -> tuple[int, int]:
    """`64` or `64x48` -> (height, width); UsageError for anything else."""
    match = re.fullmatch(r"([1-9]\d{0,4})(?:x([1-9]\d{0,4}))?", str(text).strip().lower())
    if match is None:
        raise UsageError(
            f"{text!r} is no image size", where="image_size", hint="write 64 or 64x48 (height x width)"
        )
    return int(match[1]), int(match[2] or match[1])


def _parse(value: Any, target: Any) -> Any:
    if get_origin(target) is Literal:
        if value not in get_args(target):
            raise ValueError
        return value
    if get_origin(target) is tuple and Ellipsis in get_args(target):
        parts = value.split(",") if isinstance(value, str) else value
        return tuple(_parse(part, get_args(target)[0]) for part in parts)
    if get_origin(target) is tuple:
        return parse_image_size(
            "x".join(str(side) for side in value) if isinstance(value, list | tuple) else value
        )
    if target is bool:
        if isinstance(value, bool):
            return value
        return {"true": True, "on": True, "yes": True, "false": False, "off": False, "no": False}[
            str(value).lower()
        ]
    if isinstance(value, bool):
        raise ValueError
    if target is int and isinstance(value, float):
        raise ValueError
    if target is str and not isinstance(value, str):
        raise ValueError
    if target is float and not math.isfinite(float(value)):
        raise ValueError
    return target(value)
