"""A recipe: everything that decides the result of a training, in one frozen object."""

from collections.abc import Iterator
from dataclasses import dataclass, field, fields, is_dataclass, replace
from typing import Any, Literal

from mixlab.data.audio.config import AudioConfig
from mixlab.data.config import DataConfig
from mixlab.data.images.augment import AugmentConfig
from mixlab.data.modality import MODALITIES, Modality
from mixlab.device import check_threads
from mixlab.errors import UsageError
from mixlab.models.catalog import ModelConfig
from mixlab.settings import setting
from mixlab.training.losses import LossConfig
from mixlab.training.objectives.distillation import DistillConfig
from mixlab.training.optimizer import OptimizerConfig
from mixlab.training.schedule import ScheduleConfig

# Beyond these a number is a mistake, or made to keep the machine busy.
LARGEST = {
    "steps": 2**40, "epochs": 1e9, "batch_size": 2**24, "accumulate": 2**24, "early_stop": 2**40, "keep": 10**6,
    "skip_nonfinite": 2**40, "virtual_shards": 4096, "checkpoint_seconds": 1e9,
    "timeout_seconds": 1e8,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, repr=False)
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
    budget_seconds: a note of the --budget from which `steps` was set.
    fast: a Mixer on a CPU, in fp32 or in the CPU's own bf16, takes mixlab's own passes forward and back, a core for
        each few images: the same gradients within rounding, faster (docs/results.md); false leaves all to torch.
    parallel: how several processes (torchrun) share the work: `ddp` has the model on each, `fsdp` spreads it.
    virtual_shards: cut every batch into this many parts and add their gradients in a fixed order, so that the result
        has the same bits on any number of processes up to this one; 0 is off, and faster.
    timeout_seconds: how long a process waits for another, or for its images, before it gives up.
    """

    name: str = setting("custom", "What the recipe is called.", "expert")
    data: DataConfig = field(default_factory=DataConfig)
    augment: AugmentConfig = field(default_factory=AugmentConfig)
    audio: AudioConfig = field(default_factory=AudioConfig)
    model: ModelConfig = field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    distill: DistillConfig = field(default_factory=DistillConfig)
    epochs: float | None = setting(None, "How often every image is seen, where no steps are given.", "common")
    steps: int | None = setting(None, "How many steps are taken; goes before epochs.", "common")
    batch_size: int = setting(
        128, "Images a step; auto finds the largest power of two that fits in memory.", "common"
    )
    accumulate: int = setting(1, "Parts that a batch is computed in, one after the other, to save memory.")
    checkpoint_blocks: bool = setting(
        False,
        "A block keeps its input only and is computed again on the way back: less memory, a third more work.",
    )
    ema_decay: float = setting(0.0, "The weights that are used are a moving average of this decay; 0 is off.")
    early_stop: int = setting(
        0, "Stop after so many epochs without a better validation accuracy; 0 never.", "common"
    )
    keep_weights: Literal["best", "last"] = setting(
        "best", "Keep the weights that are best on validation, or the last."
    )
    seed: int = setting(0, "Seed of everything that is drawn; the same seed gives the same bits.", "common")
    threads: int | None = setting(
        None, "CPU threads of a process; auto is one a core. They change the last bits.", "common"
    )
    precision: Literal["fp32", "bf16", "fp16", "auto"] = setting(
        "fp32",
        "Of activations and products; auto takes bf16 on a CPU where it is measured to be faster.",
        "common",
    )
    compile: bool = setting(False, "Let torch.compile translate the model.")
    fast: bool = setting(
        True,
        "A Mixer on a CPU takes mixlab's own passes, which are faster; false leaves all to torch.",
        "expert",
    )
    checkpoint_seconds: float = setting(15.0, "Time between two checkpoints; 0 is as often as can be.")
    keep: int = setting(2, "How many checkpoints stay.")
    skip_nonfinite: int = setting(
        0, "Leave out up to so many batches whose loss or gradient is not finite, instead of stopping."
    )
    budget_seconds: float | None = setting(
        None, "A note of the --budget from which the steps were set.", "expert"
    )
    init_from: str | None = setting(
        None,
        "Start from the weights in this run, folder or file, or of this published name.",
        "common",
        is_weights=True,
    )
    init_grid: Literal["resample", "dense", "blocks"] = setting(
        "resample", "How weights are fitted to another image size (paper, Appendix C).", "expert"
    )
    whiten_stem: bool = setting(False, "A Mixer begins with patches whitened by its first layer.")
    freeze: int = setting(
        0,
        "So many layers keep their initial weights: 1 the stem, 2 the first block too; -1 all but the head.",
    )
    parallel: Literal["ddp", "fsdp"] = setting(
        "ddp", "How processes share the work: ddp has the model on each, fsdp spreads it."
    )
    virtual_shards: int = setting(
        0,
        "Parts of a batch that are added in a fixed order: the same bits on any number of processes; 0 is off.",
        "expert",
    )
    timeout_seconds: float = setting(
        300.0, "How long a process waits for another, or for its images, before it gives up."
    )

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
        if not 0.0 <= self.ema_decay < 1.0:
            raise UsageError(f"ema_decay must be in [0, 1), got {self.ema_decay}", where="ema_decay")
        if self.distill.is_on and self.loss.name != "softmax":
            raise UsageError(
                f"a teacher's probabilities are of one class an image, the {self.loss.name} loss is not",
                where="distill.teacher",
                hint="--loss.name softmax",
            )
        if self.data.permutation != "none" and self.augment.cutmix_alpha:
            raise UsageError(
                "CutMix would paste rectangles of images whose pixels are permuted",
                where="data.permutation",
                hint="leave augment.cutmix_alpha out; mixup can stay",
            )
        if not 0 <= self.seed < 2**63:
            raise UsageError(f"seed must be in [0, 2^63), got {self.seed}", where="seed")

    def __repr__(self) -> str:
        """What differs from the defaults, by key."""
        return f"Recipe({', '.join(_differences(self, Recipe()))})"

    @property
    def is_exact(self) -> bool:
        """Whether it promises the same bits on any number of processes."""
        return self.virtual_shards > 0

    def part_of(self, modality: Modality) -> Any:
        """The part that says how examples of a modality are changed in training."""
        return getattr(self, modality.part)

    def check_parts(self, modality: Modality) -> None:
        """UsageError if the recipe says how examples of another modality are changed; all of them can be mixed."""
        for other in MODALITIES.values():
            settings = getattr(self, other.part)
            changed = [key for key in _differences(settings, type(settings)()) if not key.startswith("mixup")]
            if other.part != modality.part and changed:
                key = changed[0].partition("=")[0]
                raise UsageError(
                    f"this is for {other.many}, and the data has {modality.many}",
                    where=f"{other.part}.{key}",
                    hint="leave it out, and take a recipe for them (`mixlab recipes`), or `auto`",
                )

    def num_parts(self, num_processes: int) -> int:
        """How many parts each batch is shared out in, to be computed each by itself."""
        return self.virtual_shards or num_processes

    def for_one_process(self) -> "Recipe":
        """The same for a process that takes its steps alone."""
        return replace(self, virtual_shards=0, parallel="ddp")


def _differences(values: Any, defaults: Any, part: str = "") -> Iterator[str]:
    for one in fields(values):
        own, default = getattr(values, one.name), getattr(defaults, one.name)
        if own != default and is_dataclass(own) and type(own) is type(default):
            yield from _differences(own, default, f"{part}{one.name}__")
        elif own != default:
            yield f"{part}{one.name}={own!r}"
