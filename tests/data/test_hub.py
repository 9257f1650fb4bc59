"""Sets through Hugging Face `datasets`: parquet files on this disk, mapped or streamed."""

import io
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

import mixlab
from mixlab.data import hub
from mixlab.data.audio.decode import as_wav
from mixlab.data.audio.tones import tone
from mixlab.data.images.decode import decode
from mixlab.data.sources import open_source
from mixlab.errors import DataError, ExampleError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.choose_split import recipe_of
from mixlab.training.signals import Interrupted
from tests.training.seams import StopAfter

QUIET = Screen(quiet=True)
TEXT, NUMBER = datasets.Value("string"), datasets.Value("int64")
NAMES = ["cat", "dog", "fox"]
OPTIONS = {
    "batch_size": 8,
    "steps": 12,
    "epochs": None,
    "threads": 1,
    "keep_weights": "last",
    "model__patch_size": 4,
}


@pytest.fixture(autouse=True)
def _cache(tmp_path_factory, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("cache"))


def picture(i: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((16, 16, 3), i, dtype=np.uint8)).save(buffer, "png")
    return buffer.getvalue()


def write(path, rows, features=None, **columns):
    features = features or datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=NAMES)}
    )
    values = columns or {
        "image": [{"bytes": picture(i), "path": None} for i in rows], "label": [i % 3 for i in rows],
    }  # fmt: skip
    path.parent.mkdir(parents=True, exist_ok=True)
    datasets.disable_progress_bars()
    datasets.Dataset.from_dict(values, features=features).to_parquet(path)


@pytest.fixture
def folder(tmp_path):
    write(tmp_path / "set/train-00000-of-00002.parquet", range(40))
    write(tmp_path / "set/train-00001-of-00002.parquet", range(40, 60))
    write(tmp_path / "set/test-00000-of-00001.parquet", range(60, 72))
    return tmp_path / "set"


@pytest.mark.parametrize("streaming", [False, True])
def test_pictures_and_classes_are_those_of_the_set(streaming, folder):
    source = open_source(f"hf:{folder}", streaming=streaming)
    assert source.class_names == tuple(NAMES)
    assert {name: len(split) for name, split in source.splits.items()} == {"train": 60, "test": 12}
    for name, first in (("train", 0), ("test", 60)):
        split = source.splits[name]
        assert [split.read(i) for i in range(len(split))] == [picture(first + i) for i in range(len(split))]
        assert split.labels.tolist() == [(first + i) % 3 for i in range(len(split))]
    assert source.splits["train"].names[3] == "train row 3"


def test_one_file_is_a_set_without_splits(folder):
    source = open_source(f"hf:{folder / 'test-00000-of-00001.parquet'}")
    assert list(source.splits) == ["all"]


def sound(i: int) -> bytes:
    return as_wav(tone(i, 8000), 8000)


def write_sounds(path, count):
    """As the Hub has them: `datasets` itself writes sounds only with a package that decodes them."""
    stored = {"bytes": datasets.Value("binary"), "path": TEXT}
    features = datasets.Features({"text": TEXT, "audio": stored, "label": datasets.ClassLabel(names=NAMES)})
    audio = [{"bytes": sound(i), "path": f"{i}.wav"} for i in range(count)]
    columns = {"text": ["a"] * count, "audio": audio, "label": [i % 3 for i in range(count)]}
    table = datasets.Dataset.from_dict(columns, features=features)
    path.parent.mkdir(parents=True)
    table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(path)


@pytest.mark.parametrize("streaming", [False, True])
def test_a_column_of_sounds_makes_a_set_of_sounds(streaming, tmp_path):
    write_sounds(tmp_path / "s/train.parquet", 24)
    source = open_source(f"hf:{tmp_path / 's'}", streaming=streaming)
    assert (source.modality.name, source.class_names) == ("sounds", tuple(NAMES))
    assert [source.splits["train"].read(i) for i in range(24)] == [sound(i) for i in range(24)]


def test_sounds_that_are_plain_bytes_are_known_by_their_first_row(tmp_path):
    features = datasets.Features({"content": datasets.Value("binary"), "label": NUMBER})
    write(tmp_path / "s/a.parquet", (), features, content=[sound(0), sound(1)], label=[0, 1])
    assert open_source(f"hf:{tmp_path / 's'}").modality.name == "sounds"


def test_a_run_on_streamed_sounds_stopped_and_resumed_has_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.setattr(hub.StreamExamples, "window", 16)
    write_sounds(tmp_path / "s/train.parquet", 40)
    options = {"steps": 8, "batch_size": 8, "threads": 1, "keep_weights": "last", "data__streaming": True}
    options |= {"screen": QUIET, "figures": False}
    mixlab.train(f"hf:{tmp_path / 's'}", run=tmp_path / "whole", **options)
    with pytest.raises(Interrupted):
        mixlab.train(f"hf:{tmp_path / 's'}", run=tmp_path / "run", **(options | {"screen": StopAfter(4)}))
    mixlab.resume(tmp_path / "run", screen=QUIET, figures=False)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_a_stream_is_read_in_windows_and_goes_back_by_beginning_again(folder, monkeypatch):
    monkeypatch.setattr(hub.StreamExamples, "window", 16)
    split = open_source(f"hf:{folder}", streaming=True).splits["train"]
    for row in (50, 3, 17, 40, 59, 0):
        assert decode(split.read(row))[0, 0, 0] == row


def test_a_stream_gives_each_window_shuffled_within_itself_every_epoch_anew(folder, monkeypatch):
    from mixlab.data.order import batch_indices

    rows = np.arange(60)
    seen = [batch_indices(60, 10, seed=1, step=step, rows=rows, window=16)[1] for step in range(12)]
    for epoch in (seen[:6], seen[6:]):
        order = np.concatenate(epoch)
        assert sorted(order) == list(range(60))
        assert (np.diff(order // 16) >= 0).all()
        assert (order != np.arange(60)).any()
    assert not np.array_equal(seen[0], seen[6])


@pytest.mark.parametrize("streaming", [pytest.param(False, marks=pytest.mark.slow), True])
def test_a_run_stopped_and_resumed_has_the_same_bits(streaming, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(hub.StreamExamples, "window", 16)
    options = {"data__streaming": streaming, "data__in_memory": None if streaming else False}
    mixlab.train(
        f"hf:{folder}",
        "small_images",
        run=tmp_path / "whole",
        screen=QUIET,
        figures=False,
        **(OPTIONS | options),
    )
    whole = load_file(tmp_path / "whole/weights.safetensors")
    with pytest.raises(Interrupted):
        mixlab.train(
            f"hf:{folder}",
            "small_images",
            run=tmp_path / "run",
            screen=StopAfter(6),
            figures=False,
            **(OPTIONS | options),
        )
    mixlab.resume(tmp_path / "run", screen=QUIET, figures=False)
    found = load_file(tmp_path / "run/weights.safetensors")
    assert all(torch.equal(whole[name], found[name]) for name in whole)
    assert recipe_of(tmp_path / "run").data.streaming is streaming


def test_within_one_window_streaming_changes_nothing(folder, tmp_path):
    found = []
    for streaming in (False, True):
        run = tmp_path / str(streaming)
        mixlab.train(
            f"hf:{folder}",
            "small_images",
            run=run,
            screen=QUIET,
            figures=False,
            data__streaming=streaming,
            **OPTIONS,
        )
        found.append(load_file(run / "weights.safetensors"))
    assert all(torch.equal(found[0][name], found[1][name]) for name in found[0])


@pytest.mark.parametrize("streaming", [False, True])
def test_a_damaged_picture_is_listed(streaming, tmp_path):
    values = [{"bytes": picture(i) if i != 7 else picture(i)[:50], "path": None} for i in range(30)]
    write(tmp_path / "s/train.parquet", (), image=values, label=[i % 3 for i in range(30)])
    run = tmp_path / "run"
    options = OPTIONS | {"data__val_fraction": 0.0, "data__streaming": streaming}
    mixlab.train(f"hf:{tmp_path / 's'}", "small_images", run=run, screen=QUIET, figures=False, **options)
    rows = (run / "bad_files.csv").read_text().splitlines()
    assert [row.split(",")[0] for row in rows] == ["path", "train row 7"]


def test_text_labels_and_plain_bytes_are_understood(tmp_path):
    features = datasets.Features({"img": datasets.Value("binary"), "label": datasets.Value("string")})
    write(tmp_path / "s/a.parquet", (), features, img=[picture(1), picture(2)], label=["zebra", "ant"])
    source = open_source(f"hf:{tmp_path / 's'}")
    assert source.class_names == ("ant", "zebra")
    assert source.splits["all"].labels.tolist() == [1, 0]
    assert source.splits["all"].read(1) == picture(2)


@pytest.mark.parametrize(
    ("features", "columns", "words"),
    [
        ({"text": TEXT, "label": NUMBER}, {"text": ["a"], "label": [1]}, "column of images or sounds"),
        ({"image": datasets.Image()}, {"image": [{"bytes": picture(1), "path": None}]}, "labels"),
        (
            {"image": datasets.Image(), "label": NUMBER},
            {"image": [{"bytes": picture(1), "path": None}], "label": [None]},
            "have no label",
        ),
    ],
)  # fmt: skip
def test_sets_without_pictures_or_labels_are_refused(features, columns, words, tmp_path):
    write(tmp_path / "s/a.parquet", (), datasets.Features(features), **columns)
    with pytest.raises(DataError, match=words):
        open_source(f"hf:{tmp_path / 's'}")


def test_a_row_that_names_a_file_is_not_followed(tmp_path):
    secret = tmp_path / "secret.png"
    secret.write_bytes(picture(9))
    features = datasets.Features(
        {"image": {"bytes": datasets.Value("binary"), "path": TEXT}, "label": NUMBER}
    )  # fmt: skip
    write(
        tmp_path / "s/a.parquet", (), features, image=[{"bytes": None, "path": str(secret)}] * 2, label=[0, 1]
    )
    split = open_source(f"hf:{tmp_path / 's'}").splits["all"]
    with pytest.raises(ExampleError, match="names a file"):
        split.read(0)


def test_what_is_not_there_or_damaged_is_said_at_once(tmp_path):
    with pytest.raises(DataError, match="cannot be opened") as error:
        open_source("hf:no-such/set")
    assert "--download" in str(error.value)
    (tmp_path / "x.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(DataError, match="cannot be opened"):
        open_source(f"hf:{tmp_path / 'x.parquet'}")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"no \.parquet"):
        open_source(f"hf:{tmp_path / 'empty'}")
    with pytest.raises(UsageError, match="only hf: sets"):
        open_source("digits", streaming=True)


def test_a_loading_script_in_a_folder_is_never_run(folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (folder / "set.py").write_text("open('CANARY', 'w')")
    open_source(f"hf:{folder}")
    assert not (tmp_path / "CANARY").exists()


def test_a_streamed_set_is_streamed_also_where_the_recipe_is_chosen(folder, monkeypatch):
    from mixlab import recipes

    recipes.compose(f"hf:{folder}", overrides={"streaming": "true"})
    cache = Path(datasets.config.HF_DATASETS_CACHE)
    assert not list(cache.rglob("*.arrow"))
    recipes.compose(f"hf:{folder}")
    assert list(cache.rglob("*.arrow"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UsageError, match="at once"):
        recipes.compose(f"hf:{folder}", download=True)
