"""Another activation, size, family, optimizer, objective, augmentation and data set: a file each, and its line.

Done on a copy of the package, which then trains with them. Where one of these needs more places, a seam is wrong.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import mixlab

PACKAGE = Path(mixlab.__file__).parent
# The file of each, the text that it gets in place of another, and how a training asks for it.
FAMILY = """
from torch import Tensor, nn
from mixlab.models.family import Family
from mixlab.models.mixer import Mixer, MixerConfig

class GatedConfig(MixerConfig):
    pass

class GatedBlock(nn.Module):
    def __init__(self, config: MixerConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(config.hidden_dim)
        self.channels = nn.Linear(config.hidden_dim, 2 * config.hidden_dim)
        self.tokens = nn.Linear(config.num_patches, config.num_patches)

    def forward(self, x_BSC: Tensor) -> Tensor:
        value, gate = self.channels(self.norm(x_BSC)).chunk(2, dim=-1)
        return x_BSC + value * self.tokens(gate.transpose(1, 2)).transpose(1, 2)

class GatedMixer(Mixer):
    def make_block(self, index: int, drop_prob: float) -> nn.Module:
        return GatedBlock(self.config)

GATED = Family(
    title="a gated Mixer", Config=GatedConfig, Model=GatedMixer, prefix="gated_",
    sizes={"pico": {"num_blocks": 2, "hidden_dim": 16, "token_mlp_dim": 8, "channel_mlp_dim": 32}},
)
"""
OBJECTIVE = """
from dataclasses import dataclass
from typing import ClassVar
import torch.nn.functional as F
from mixlab.settings import setting
from mixlab.training.objectives.labels import Labels

@dataclass(frozen=True, kw_only=True)
class BrierConfig:
    prepared_by: ClassVar[str] = "mixlab.training.objectives.brier"
    is_on: bool = setting(False, "Minimise the squared error of probabilities.")

def brier(logits, target):
    return (logits.softmax(dim=1) - target.to(logits.dtype)).square().sum(dim=1).mean()

class Brier(Labels):
    def __init__(self, *arguments):
        super().__init__(*arguments)
        self.loss = brier

class OfBrier:
    looks_at_views = False

    def prepare(self, recipe, data, session, end=None):
        return Brier(recipe.loss, data.train.split.labels, len(data.source.class_names))

def begin(recipe, class_names, num_images):
    return OfBrier()

def reopen(run, recipe, data, session):
    return OfBrier().prepare(recipe, data, session)
"""
LAYERS, OPTIMIZER = "models/layers.py", "training/optimizer.py"
CASES = {
    "activation": ({}, {LAYERS: [
        ('ACTIVATIONS = {', 'ACTIVATIONS = {\n    "silu": Activation(F.silu),'),
        ('Gelu = Literal["tanh", "erf"]', 'Gelu = Literal["tanh", "erf", "silu"]'),
    ]}, {"model__gelu": "silu"}),
    "size": ({}, {"models/mixer.py": [('SIZES = {', 'SIZES = {\n    "femto": (2, 16, 8, 32),')]},
             {"model__name": "mixer_femto2"}),
    "family": ({"models/gated.py": FAMILY}, {"models/catalog.py": [
        ("from mixlab.models.grids import", "from mixlab.models.gated import GATED\nfrom mixlab.models.grids import"),
        ("FAMILIES = (", "FAMILIES = (GATED, "),
    ]}, {"model__name": "mixer_gated_pico2"}),
    "optimizer": ({}, {OPTIMIZER: [
        ('Literal["adamw", "sgd", "muon"]', 'Literal["adamw", "sgd", "muon", "nadam"]'),
        ("OPTIMIZERS = {", 'OPTIMIZERS = {\n    "nadam": OptimizerKind(lambda groups, config: torch.optim.NAdam('
         'groups, lr=config.lr), lambda group: {"step", "exp_avg", "exp_avg_sq", "mu_product"}),'),
    ]}, {"optimizer__name": "nadam"}),
    "objective": ({"training/objectives/brier.py": OBJECTIVE}, {"training/recipe.py": [
        ("from mixlab.training.objectives.distillation import",
         "from mixlab.training.objectives.brier import BrierConfig\n"
         "from mixlab.training.objectives.distillation import"),
        ("    distill: DistillConfig =",
         "    brier: BrierConfig = field(default_factory=BrierConfig)\n    distill: DistillConfig ="),
    ]}, {"brier__is_on": True}),
    "augmentation": ({}, {"data/images/augment.py": [
        ("    erase_prob: float = setting(",
         '    invert: bool = setting(False, "Negatives.")\n    erase_prob: float = setting('),
        ("    if config.erase_prob:\n",
         "    if config.invert:\n        pixels = 255 - pixels\n    if config.erase_prob:\n"),
    ]}, {"augment__invert": True}),
    "data set": ({}, {"data/images/known.py": [
        ('EMBEDDED: dict[str, Callable[[], Source]] = {',
         'EMBEDDED: dict[str, Callable[[], Source]] = {"tiny": lambda: replace(open_digits(), name="tiny"), '),
        ("from dataclasses import dataclass\n", "from dataclasses import dataclass, replace\n"),
    ]}, {"data": "tiny"}),
}  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_trains_resumes_and_is_loaded_again(case, tmp_path):
    new, changes, options = CASES[case]
    shutil.copytree(PACKAGE, tmp_path / "mixlab", ignore=shutil.ignore_patterns("shipped", "__pycache__"))
    for name, text in new.items():
        (tmp_path / "mixlab" / name).write_text(text)
    for name, pairs in changes.items():
        path = tmp_path / "mixlab" / name
        text = path.read_text()
        for old, replacement in pairs:
            assert text.count(old) == 1, (name, old)
            text = text.replace(old, replacement)
        path.write_text(text)
    code = f"""
import json, signal
import numpy as np
import mixlab
from mixlab.training import fit
from mixlab.training.signals import Interrupted
options = dict(steps=6, epochs=None, threads=1, with_pictures=False, figures=False, **{options!r})
data = options.pop("data", "digits")
result = mixlab.train(data, "digits", run="run", **options)
real = fit.train_step
def stopping(state, batch, clock):
    if clock.step == 3:
        signal.raise_signal(signal.SIGTERM)
    return real(state, batch, clock)
fit.train_step = stopping
try:
    mixlab.train(data, "digits", run="cut", **options)
except Interrupted:
    pass
fit.train_step = real
mixlab.resume("cut", with_pictures=False, figures=False)
same = open("runs/run/weights.safetensors", "rb").read() == open("runs/cut/weights.safetensors", "rb").read()
model = mixlab.load("run")
found = model.predict(np.zeros((8, 8), dtype=np.uint8))
facts = {{"same": same, "tested": result["test"]["num_images"], "file": mixlab.__file__, "found": str(found)}}
print(json.dumps(facts))
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert Path(found["file"]).parent.parent == tmp_path
    assert found["same"]
    assert found["tested"] > 0
    assert found["found"]
