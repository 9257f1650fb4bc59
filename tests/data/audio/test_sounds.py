"""A folder of sounds and the set made by formula: trained, resumed, measured, used and exported."""

import base64
import csv
import dataclasses
import re
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import torch

import mixlab
from mixlab.checkpoint.open import open_weights
from mixlab.checkpoint.permute import permute_weights
from mixlab.data.audio.decode import as_wav, decode
from mixlab.data.audio.modality import SOUNDS
from mixlab.data.audio.tones import CLASS_NAMES, tone
from mixlab.data.check import check
from mixlab.data.modality import MOST_TOGETHER, mean_of_parts
from mixlab.data.sources import open_source
from mixlab.errors import DataError, UsageError
from mixlab.exports.card import write_card
from mixlab.exports.export import export, open_exported
from mixlab.exports.package import write_package
from mixlab.exports.push import write_repository
from mixlab.recipes import RECIPES
from mixlab.report.screen import Screen
from mixlab.studies.harness import Options, conduct
from mixlab.studies.questions import filters
from mixlab.training.evaluate import evaluate

QUIET = Screen(quiet=True)
SMALL = {"hidden_dim": 24, "token_mlp_dim": 16, "channel_mlp_dim": 48, "num_blocks": 2}
OPTIONS = {
    "screen": QUIET,
    "device": "cpu",
    "ema_decay": 0.0,
    "lr": 1e-2,
    "keep_weights": "last",
    "batch_size": 16,
}
OPTIONS |= {f"model__{key}": value for key, value in SMALL.items()}
PLAIN = {
    f"audio__{key}": 0 for key in ("speed", "noise", "time_masks", "band_masks")
}  # it learns in less time
KINDS = (0, 2, 3)  # beeps, falling, noise


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Three classes at two rates, one clip five times as long as the others, and files that are no good."""
    root = tmp_path_factory.mktemp("sounds")
    for kind in KINDS:
        (root / CLASS_NAMES[kind]).mkdir()
        for number in range(32):
            rate = 11_025 if number == 7 else 8_000
            samples = tone(8 * number + kind, rate)
            samples = np.tile(samples, 5) if number == 9 else samples
            (root / CLASS_NAMES[kind] / f"{number}.wav").write_bytes(as_wav(samples, rate))
    (root / "noise" / "nothing.wav").write_bytes(b"")
    (root / "noise" / "silent.wav").write_bytes(as_wav(np.zeros(900), 8_000))
    (root / "noise" / "cover.jpg").write_bytes(b"\xff\xd8\xff an image among sounds is left out")
    return root


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory):
    path = tmp_path_factory.mktemp("runs") / "run"
    return path, mixlab.train(folder, "small_sounds", run=path, steps=60, **OPTIONS | PLAIN)


def test_a_folder_of_sounds_is_known_and_checked(folder):
    source = open_source(folder)
    assert (source.modality, source.class_names) == (SOUNDS, ("beeps", "falling", "noise"))
    found = check(source).to_json()
    assert found["num_ok"] == 96
    assert sorted(one["reason"].partition(":")[0] for one in found["bad"]) == ["empty", "silent"]
    assert found["rates"] == {"8000": 93, "11025": 3}
    assert found["seconds"]["max"] > 1.4
    assert found["formats"] == {"WAV": 96}


def test_it_trains_and_says_what_it_heard(run):
    path, result = run
    assert result["test"]["top1"] > 0.8
    bad = csv.DictReader((path / "bad_files.csv").read_text().splitlines())
    assert {row["reason"].partition(":")[0] for row in bad} == {"empty", "silent"}
    own = open_weights(path).preprocess
    assert (own.rate, own.bands, own.tokens) == (8_000, 40, "frames")
    assert 0.55 < own.length / own.rate < 0.8  # nearly all clips fit
    assert "training sounds" in (path / "report.html").read_text()


def test_it_is_measured_as_when_it_was_trained(run):
    path, result = run
    evaluation, bad = evaluate(path, screen=QUIET)
    assert (evaluation.top1, bad) == (result["test"]["top1"], [])


def test_stopped_and_resumed_it_has_the_same_bits(folder, tmp_path, monkeypatch):
    options = OPTIONS | {"steps": 10, "checkpoint_seconds": 0.0}
    mixlab.train(folder, "small_sounds", run=tmp_path / "whole", **options)
    seen = 0

    def stop_at_six(self, *args, **kept):
        nonlocal seen
        seen += 1
        if seen == 6:
            raise KeyboardInterrupt
        return before(self, *args, **kept)

    before = SOUNDS.__class__.augment
    monkeypatch.setattr(SOUNDS.__class__, "augment", stop_at_six)
    with pytest.raises(KeyboardInterrupt):
        mixlab.train(folder, "small_sounds", run=tmp_path / "cut", **options)
    monkeypatch.undo()
    mixlab.resume(tmp_path / "cut", screen=QUIET)
    whole, cut = (open_weights(tmp_path / name).model.state_dict() for name in ("whole", "cut"))
    assert all(torch.equal(whole[name], cut[name]) for name in whole)


def test_it_predicts_files_bytes_and_what_is_longer_than_the_model(run, folder):
    classifier = mixlab.load(run[0])
    paths = [folder / "noise" / "9.wav", folder / "falling" / "7.wav"]
    rows = classifier.predict([*paths, paths[0].read_bytes()], top=3)
    assert [len(row["predictions"]) for row in rows] == [3, 3, 3]
    assert rows[2]["predictions"] == rows[0]["predictions"]
    # A clip that covers several windows has the mean of their logits.
    own = classifier.preprocess
    kept = torch.from_numpy(own.read(paths[0]))[None]
    inputs, owner = own.windows(kept)
    assert len(inputs) > 3
    assert owner.tolist() == [0] * len(inputs)
    with torch.inference_mode():
        expected = (classifier.model(inputs).mean(0) / classifier.temperature).softmax(0)
    assert rows[0]["predictions"][0]["probability"] == pytest.approx(float(expected.max()), abs=1e-5)
    assert "silent" in classifier.predict(folder / "noise" / "silent.wav")[0]["error"]


def test_a_training_starts_from_its_weights(run, folder, tmp_path):
    result = mixlab.finetune(folder, run[0], run=tmp_path / "run", steps=2, screen=QUIET, device="cpu")
    assert open_weights(tmp_path / "run").preprocess == open_weights(run[0]).preprocess
    assert result["steps"] == 2
    with pytest.raises(UsageError, match="the weights have 8000, not 16000"):
        mixlab.finetune(folder, run[0], run=tmp_path / "other", steps=2, screen=QUIET, audio__rate=16_000)


def test_keys_of_images_are_refused(folder, tmp_path):
    for key in ("augment__flip", "augment__cutmix_alpha", "data__fit"):
        value = {"augment__flip": True, "augment__cutmix_alpha": 1.0, "data__fit": "stretch"}[key]
        with pytest.raises(UsageError, match="this is for images, and the data has sounds"):
            mixlab.train(folder, "small_sounds", run=tmp_path / "run", **OPTIONS | {"steps": 1, key: value})
    for key, value in (("data__image_size", "32x32"), ("data__channels", 3)):
        with pytest.raises(UsageError, match=r"follow.* from audio\..*leave it out"):
            mixlab.train(folder, "small_sounds", run=tmp_path / "run", **OPTIONS | {"steps": 1, key: value})
    with pytest.raises(UsageError, match="this is for sounds, and the data has images"):
        mixlab.train("digits", run=tmp_path / "run", steps=1, screen=QUIET, audio__noise=0.5)


def test_what_looks_at_pixels_refuses_weights_of_sounds(run, tmp_path):
    for work in (
        lambda: conduct(filters.STUDY, Options(subject=str(run[0]), out=tmp_path / "out")),
        lambda: permute_weights(open_weights(run[0]), seed=0),
        lambda: mixlab.export(run[0], int8=True, out=tmp_path / "out"),
    ):
        with pytest.raises(UsageError, match="is for images, and these weights take sounds"):
            work()
    assert not (tmp_path / "out").exists()


def test_a_teacher_that_hears_another_rate_is_refused(folder, run, tmp_path):
    with pytest.raises(UsageError, match="the rate of the teacher is 8000, of the training 16000"):
        mixlab.train(
            folder, "small_sounds", run=tmp_path / "run", audio__rate=16_000, distill__teacher=str(run[0]), steps=1,
            **OPTIONS,
        )  # fmt: skip


def test_lengths_are_taken_as_they_were_meant(folder, run, tmp_path):
    """The model hears whole frames, somewhat more than was asked for; weights that heard less may hear more."""
    for name, keys in (
        ("equal", {"audio__seconds": 0.5, "audio__max_seconds": 0.5}),
        ("longer", {"audio__seconds": 3.0, "init_from": str(run[0])}),
    ):
        mixlab.train(
            folder, "small_sounds", run=tmp_path / name, steps=1, figures=False, **keys, **OPTIONS | PLAIN
        )
        own = open_weights(tmp_path / name).preprocess
        assert own.max_samples >= own.length >= keys["audio__seconds"] * own.rate - own.hop


def test_a_clip_whose_tones_are_all_too_high_is_silent(run):
    high = as_wav(np.tile(np.array([1, -1], dtype=np.int16), 12_000), 48_000)
    assert "silent at 8,000" in mixlab.load(run[0]).predict(high)[0]["error"]


def test_parts_of_long_clips_go_through_the_model_a_few_at_a_time(run):
    classifier, seen = mixlab.load(run[0], device="cpu"), []
    preprocess = dataclasses.replace(classifier.preprocess, max_samples=300 * classifier.preprocess.length)
    kept = torch.from_numpy(np.stack([preprocess.keep(np.tile(tone(3, 8_000), 200)) for _ in range(4)]))
    inputs, owner = preprocess.windows(kept)
    assert len(inputs) > 3 * MOST_TOGETHER

    def model(part):
        seen.append(len(part))
        return classifier.model(part)

    with torch.inference_mode():
        found = mean_of_parts(model, inputs, owner)
        assert max(seen) == MOST_TOGETHER
        expected = torch.stack([classifier.model(inputs[owner == i]).mean(0) for i in range(4)])
    assert torch.allclose(found, expected, atol=1e-4)


@pytest.mark.slow  # a training of 120 steps
def test_squares_of_the_picture_are_tokens_too(folder, tmp_path):
    options = OPTIONS | PLAIN | {"steps": 120, "audio__tokens": "patches"}
    result = mixlab.train(folder, "small_sounds", run=tmp_path / "run", **options, model__name="mixer_pico4")
    assert result["test"]["top1"] > 0.8
    own = open_weights(tmp_path / "run").preprocess
    assert (own.tokens, own.channels, own.input_size[0]) == ("patches", 1, own.bands)
    assert evaluate(tmp_path / "run", screen=QUIET)[0].top1 == result["test"]["top1"]


def test_an_exported_model_takes_waveforms_and_agrees_with_the_reader(run, folder, tmp_path):
    pytest.importorskip("onnxscript")
    weights = open_weights(run[0])
    paths = sorted(folder.rglob("[0-9].wav"))
    decoded = [SOUNDS.decode(path.read_bytes(), weights.preprocess) for path in paths]
    result = export(weights, tmp_path / "model.onnx", to="onnx", examples=decoded)
    assert (result["input"], result["same_top1"]) == ("waveform", result["num_compared"])
    kept = np.stack([weights.preprocess.keep(one) for one in decoded])
    inputs, _ = weights.preprocess.windows(torch.from_numpy(kept))
    with torch.inference_mode():
        expected = weights.model(inputs).numpy()
    found = open_exported(tmp_path / "model.onnx", "onnx")(weights.preprocess.to_graph(kept))
    assert np.abs(found - expected).max() < 1e-3
    assert (found.argmax(1) == expected.argmax(1)).all()


def test_a_package_says_the_same_without_mixlab(run, folder, tmp_path):
    pytest.importorskip("onnxscript")
    weights = open_weights(run[0])
    examples = SOUNDS.samples(4, weights.preprocess)
    card = write_card(weights, run[0])
    assert "A sound classifier of" in card
    assert "pipeline_tag: audio-classification" in card
    write_package(weights, tmp_path / "model.zip", card, examples)
    with zipfile.ZipFile(tmp_path / "model.zip") as archive:
        archive.extractall(tmp_path / "model")
        assert archive.read("requirements.txt") == b"numpy\nonnxruntime\n"
        assert b"python predict.py clip.wav" in archive.read("README.md")
    clips = [folder / "falling" / f"{number}.wav" for number in (3, 7, 9)]  # plain, another rate, longer
    program = [sys.executable, "-I", str(tmp_path / "model" / "predict.py"), *map(str, clips)]
    lines = subprocess.run(program, capture_output=True, text=True, check=True).stdout.splitlines()
    for line, row in zip(lines, mixlab.load(run[0]).predict(clips, top=1), strict=True):
        best = row["predictions"][0]
        label, percent = line.rpartition("wav: ")[2].split(", ")[0].split(" ")[:2]
        assert (label, float(percent)) == (best["label"], pytest.approx(100 * best["probability"], abs=0.2))
    whole = clips[0].read_bytes()
    bad = {
        "silent": as_wav(np.zeros(800), 8_000),
        "cut off": whole[: len(whole) // 2],
        "damaged: 0 samples": whole[:24] + bytes(4) + whole[28:],
    }
    for number, content in enumerate(bad.values()):
        (tmp_path / f"{number}.wav").write_bytes(content)
    streamed = whole[:4] + b"\xff\xff\xff\xff" + whole[8:40] + b"\xff\xff\xff\xff" + whole[44:]
    (tmp_path / "streamed.wav").write_bytes(streamed)
    files = [tmp_path / f"{number}.wav" for number in range(len(bad))] + [tmp_path / "streamed.wav"]
    done = subprocess.run([*program[:3], *map(str, files)], capture_output=True, text=True)
    assert done.returncode == 1
    for said, why in zip(done.stderr.splitlines(), bad, strict=True):
        assert why in said
    assert done.stdout.partition("wav: ")[2].strip() == lines[0].partition("wav: ")[2].strip()


def test_the_folder_for_the_hub_is_in_mixlabs_own_format(run, tmp_path):
    assert write_repository(open_weights(run[0]), tmp_path / "hub", "card")["format"] == "mixlab"
    assert open_weights(tmp_path / "hub").preprocess == open_weights(run[0]).preprocess


def test_speech_commands_lists_say_what_is_tested(tmp_path):
    for word in ("yes", "no", "_background_noise_"):
        (tmp_path / word).mkdir()
        for number in range(4):
            (tmp_path / word / f"{number}.wav").write_bytes(as_wav(tone(number, 8_000), 8_000))
    (tmp_path / "testing_list.txt").write_text("yes/0.wav\nno/0.wav\n")
    (tmp_path / "validation_list.txt").write_text("yes/3.wav\n")
    source = open_source(tmp_path)
    assert source.class_names == ("no", "yes")
    assert [path.removeprefix(f"{tmp_path}/") for path in source.splits["test"].names] == [
        "no/0.wav",
        "yes/0.wav",
    ]
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 5, "val": 1, "test": 2}
    assert any("_background_noise_" in path for one in source.skipped for path in one.examples)
    (tmp_path / "testing_list.txt").write_text("maybe/0.wav\n")
    with pytest.raises(DataError, match="none of the files that it lists is here"):
        open_source(tmp_path)


def test_the_report_plays_the_worst_mistakes(folder, tmp_path):
    options = OPTIONS | {"steps": 1, "lr": 1e-9, "with_pictures": True}
    mixlab.train(folder, "small_sounds", run=tmp_path / "run", **options)
    page = (tmp_path / "run" / "report.html").read_text()
    sounds = re.findall(r'<audio controls preload="none" src="data:audio/wav;base64,([^"]+)"', page)
    assert len(sounds) > 3
    assert decode(base64.b64decode(sounds[0])).rate == 8_000
    assert "media-src data:" in page


def test_tones_are_the_same_everywhere_and_each_can_be_read():
    source = open_source("tones")
    assert {name: len(split) for name, split in source.splits.items()} == {
        "train": 360,
        "val": 120,
        "test": 120,
    }
    clip = decode(source.splits["test"].read(0))
    assert clip.rate == 8_000
    assert 0.3 <= clip.seconds <= 0.6
    labels = source.splits["train"].labels
    assert np.bincount(labels).tolist() == [45] * 8


def test_the_set_of_tones_is_trained_by_its_own_recipe(tmp_path):
    result = mixlab.train("tones", run=tmp_path / "run", steps=1, screen=QUIET, figures=False)
    assert '\nname = "tones"\n' in (tmp_path / "run" / "recipe.toml").read_text()
    assert result["num_parameters"] < 100_000


def test_the_recipes_have_the_size_that_they_say():
    recipe = RECIPES["small_sounds"].build()
    model = mixlab.create_model(
        recipe.model.name, num_classes=35, image_size=(1, 96), in_channels=40, **_dimensions(recipe.model)
    )
    assert 0.40e6 < sum(one.numel() for one in model.parameters()) < 0.44e6


def _dimensions(model):
    return {key: getattr(model, key) for key in SMALL}
