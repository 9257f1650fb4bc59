"""Weights and what describes them: of one piece, or refused; and nothing is built that the file could not fill."""

import json
import time
import tracemalloc
from pathlib import Path

import pytest
import torch

import mixlab
from mixlab.checkpoint.convert import convert
from mixlab.checkpoint.described import check_size
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.store import NEXT_CONFIG_NAME, WITHOUT_DIGEST, Weights, load_weights, save_weights
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.errors import UsageError, WeightsError
from mixlab.models.catalog import create_model
from tests.forked import mixlab as command
from tests.untied import untie

SETTINGS = {"name": "mixer_pico4", "num_classes": 3, "image_size": (8, 8), "in_channels": 3}
OLD = Path(__file__).parents[1] / "fixtures" / "weights_without_config_digest"


def weights(settings=SETTINGS, names=("a", "b", "c")) -> Weights:
    torch.manual_seed(0)
    size = settings["image_size"]
    return Weights(
        model=create_model(**settings),
        model_settings=settings,
        preprocess=ImagePreprocess(image_size=size),
        class_names=names,
        provenance={"data": "/home/somebody/data/pictures", "teacher": "~/runs/big"},
    )


@pytest.fixture
def folder(tmp_path):
    save_weights(tmp_path / "w", weights())
    return tmp_path / "w"


def edit(folder: Path, change) -> None:
    config = json.loads((folder / "config.json").read_text())
    change(config)
    (folder / "config.json").write_text(json.dumps(config))


def test_a_config_that_was_changed_is_refused_and_one_that_was_laid_out_anew_is_not(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config, sort_keys=True))
    assert load_weights(folder).cautions == ()
    edit(folder, lambda config: config["class_names"].reverse())  # the same number: only the digest can tell
    with pytest.raises(WeightsError, match=r"not what was written with these weights.*--resume.*both"):
        load_weights(folder)


def test_weights_of_an_older_mixlab_open_and_it_is_said_once(tmp_path):
    assert load_weights(OLD).cautions == (WITHOUT_DIGEST,)
    from PIL import Image

    Image.new("L", (8, 8)).save(tmp_path / "a.png")
    done = command("predict", OLD, "a.png", "--json", cwd=tmp_path)
    assert done.returncode == 0
    assert done.stderr.count(WITHOUT_DIGEST) == 1
    assert json.loads(done.stdout)["num_ok"] == 1


def test_a_kill_between_weights_and_config_leaves_them_usable(folder, monkeypatch):
    new = weights(names=("x", "y", "z"))
    from mixlab.checkpoint import store

    real = store.write_atomically

    def killed(path, content):
        if path.name == "config.json":
            raise KeyboardInterrupt
        real(path, content)

    with monkeypatch.context() as patched:
        patched.setattr(store, "write_atomically", killed)
        with pytest.raises(KeyboardInterrupt):
            save_weights(folder, new)
    assert load_weights(folder).class_names == ("x", "y", "z")
    save_weights(folder, new)
    assert not (folder / NEXT_CONFIG_NAME).exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["class_names"].append("d"), "class names: 4, where the model has 3"),
        (lambda c: c["class_names"].pop(), "class names: 2, where the model has 3"),
        (lambda c: c.update(class_names="abc"), "class_names must be a list"),
        (lambda c: c.update(class_names=[1, 2, 3]), "class_names must be text"),
        (lambda c: c["preprocess"].update(std=[0.0, 1, 1]), "std must be above 0"),
        (lambda c: c["preprocess"].update(std=[1, 1]), "std is .* 3 channels"),
        (lambda c: c["preprocess"].update(mean=[None, 1, 1]), "mean must be a number"),
        (lambda c: c["preprocess"].update(image_size=[16, 16]), "input size: 16x16, where the model has 8x8"),
        (lambda c: c["preprocess"].update(image_size=[20000, 20000]), "image_size is 20000"),
        (lambda c: c["preprocess"].update(channels=1, mean=[0], std=[1]), "channels: 1"),
        (lambda c: c["preprocess"].update(crop_fraction=0), "crop_fraction must be"),
        (lambda c: c["preprocess"].update(interpolation="cubic"), "unknown interpolation"),
        (lambda c: c["model"].update(num_classes=4), "head.bias: has .3,., needs .4,."),
        (lambda c: c["model"].update(num_blocks=10_000_000), "10000000 blocks"),
        (lambda c: c["model"].update(stage_blocks=[10_000_000]), "10000000 blocks"),
        (lambda c: c["model"].update(hidden_dim="wide"), "hidden_dim must be a whole number"),
        (lambda c: c["model"].update(gelu="relu"), "gelu must be one of tanh, erf"),
        (lambda c: c["model"].update(name="mixer_" + "h" * 5000), "characters"),
        (lambda c: c["model"].update(image_size=[8]), "height and width"),
        (lambda c: c.update(provenance=[]), "provenance must be an object"),
    ],
)
def test_every_value_is_checked_against_the_tensors_and_its_range(folder, change, message):
    untie(folder)
    edit(folder, change)
    with pytest.raises(WeightsError, match=message) as error:
        load_weights(folder)
    assert error.value.where.endswith((".json", ".safetensors"))


@pytest.mark.parametrize("text", ["NaN", "Infinity", "1e999"])
def test_numbers_that_are_none_are_refused_also_in_folders_of_timm(folder, text, tmp_path):
    untie(folder)
    path = folder / "config.json"
    path.write_text(path.read_text().replace("0.5", text))
    with pytest.raises(WeightsError):
        load_weights(folder)
    convert(weights(), tmp_path / "timm", format="mixlab-timm")
    path = tmp_path / "timm" / "config.json"
    path.write_text(path.read_text().replace("0.5", text))
    with pytest.raises(WeightsError):
        open_weights(tmp_path / "timm")


@pytest.mark.parametrize("name", ["timm/vit_giant_patch14_224", "timm/vit_base_patch16_224", "mixer_h14"])
def test_a_model_far_larger_than_its_weights_is_not_built(folder, name):
    untie(folder)
    edit(folder, lambda config: config["model"].update(name=name, image_size=[224, 224]))
    edit(folder, lambda config: config["preprocess"].update(image_size=[224, 224]))
    began = time.monotonic()
    with pytest.raises(WeightsError, match=r"larger than its weights|another model"):
        load_weights(folder)
    assert time.monotonic() - began < 10
    with pytest.raises(WeightsError, match=r"larger than its weights|describes a model"):
        check_size({"name": name, "num_classes": 3, "image_size": (224, 224)}, 10_000, "recipe.toml")


def test_models_of_timm_still_open(tmp_path):
    settings = {
        "name": "timm/vit_tiny_patch16_224",
        "num_classes": 3,
        "image_size": (32, 32),
        "in_channels": 3,
    }
    save_weights(tmp_path, weights(settings))
    loaded = load_weights(tmp_path)
    assert loaded.model_settings["name"] == settings["name"]


def test_what_is_written_names_no_place_and_is_the_same_bytes_each_time(folder, tmp_path):
    text = (folder / "config.json").read_text()
    assert "/home" not in text
    assert '"pictures"' in text
    save_weights(tmp_path / "again", weights())
    for name in ("weights.safetensors", "config.json"):
        assert (tmp_path / "again" / name).read_bytes() == (folder / name).read_bytes()
    header = (folder / "weights.safetensors").read_bytes()[8:200]
    assert header.index(b"mixlab_config_sha256") < header.index(b"mixlab_sha256")


@pytest.mark.parametrize(
    "arguments", [("train", "digits", "--threads", "100000"), ("train", "digits", "--num-workers", "100000")]
)
def test_numbers_of_threads_and_workers_that_no_machine_has_are_refused_at_the_door(arguments, tmp_path):
    done = command(*arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert "more than" in done.stderr
    with pytest.raises(UsageError, match="100000 threads"):
        mixlab.train("digits", "digits", run=tmp_path / "run", threads=100_000)


def test_an_index_of_parts_cannot_ask_for_more_memory_than_it_has_bytes(tmp_path):
    from mixlab.checkpoint.sharded import read_index

    for content in (
        b"\x80\x04}r\xff\xff\xff\x0f.",  # an object numbered 268,435,455: the list of them would take gigabytes
        b"\x80\x05\x96\x00\x00\x00\x10\x00\x00\x00\x00.",  # 256 MiB of nothing
        b"\x80\x04(" + b"]" * 5_000_000 + b"l.",
    ):
        (tmp_path / ".metadata").write_bytes(content)
        tracemalloc.start()
        with pytest.raises(WeightsError, match="index cannot be read"):
            read_index(tmp_path)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert peak < 64 * 2**20


@pytest.mark.parametrize(
    ("key", "value"), [("validation_top1", "high"), ("assumed", [1]), ("notes", "a note")]
)
def test_of_the_provenance_what_is_made_use_of_has_its_type(folder, key, value):
    untie(folder)
    edit(folder, lambda config: config["provenance"].update({key: value}))
    with pytest.raises(WeightsError, match=f"{key} must be"):
        load_weights(folder)
