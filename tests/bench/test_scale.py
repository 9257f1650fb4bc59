"""Growth of time and memory: the models are what their names say, and a power is found where one was planted."""

import json

import pytest
import torch

from mixlab.bench import scale as module
from mixlab.bench.scale import FAMILIES, build, growth
from mixlab.cli import run_command
from mixlab.commands.context import Context
from mixlab.errors import UsageError
from mixlab.report.speed_figures import growth_curves


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_has_the_patches_and_the_width_it_is_asked_for(family):
    model = build(family, patches=4, width=128).eval()
    with torch.no_grad():
        assert model(torch.zeros(1, 3, 32, 32)).shape == (1, 1000)
    if family == "resnet":
        assert model.layer4[0].conv1.out_channels == 128
    else:
        assert len(model.blocks) == 8
        width = model.config.hidden_dim if family.startswith("mixer") else model.embed_dim
        assert width == 128


def test_the_power_of_growth_is_that_of_the_last_two_points():
    rows = [
        {"family": family, "axis": axis, axis: value, "seconds_per_image": value**time, "bytes_per_image": 8 * value}
        for axis in ("patches", "width")
        for value in (10, 20, 80)
        for family, time in (("mixer", 1.0), ("vit", 2.0))
    ]  # fmt: skip
    found = {(row["family"], row["axis"]): row for row in growth(rows)}
    assert found["mixer", "patches"]["time"] == pytest.approx(1)
    assert found["vit", "width"]["time"] == pytest.approx(2)
    assert found["vit", "patches"]["memory"] == pytest.approx(1)
    assert len(growth_curves(rows).axes) == 4


@pytest.mark.slow  # several interpreters
@pytest.mark.parametrize("train", [[], ["--train"]])
def test_the_command_measures_every_point(train, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(module, "PATCHES", (4, 16))
    monkeypatch.setattr(module, "WIDTHS", (64, 128))
    # Each point is a process.
    monkeypatch.setattr(module, "FAMILIES", ("vit",) if train else ("mixer, fast copy",))
    monkeypatch.setattr(Context, "json", True)
    figure = tmp_path / "scale.png"
    assert run_command(["bench", "--scale", "--threads", "1", "--figure", str(figure), *train]) == 0
    value = json.loads(capsys.readouterr().out)
    assert len(value["rows"]) == 4
    assert all(row["seconds_per_image"] > 0 for row in value["rows"])
    assert figure.read_bytes().startswith(b"\x89PNG")


def test_models_have_no_place_beside_scale():
    with pytest.raises(UsageError, match="models of its own"):
        run_command(["bench", "mixer_s16", "--scale"])
