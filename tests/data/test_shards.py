"""Images in tar shards: the same ones, in the same order, and no damage that goes unnoticed."""

import io
import json
import tarfile

import numpy as np
import pytest
import torch
import webdataset
from PIL import Image
from safetensors.torch import load_file

import mixlab
from benchmarks.reliability import shards as shard_trials
from mixlab.cli import run_command
from mixlab.data.audio.decode import as_wav
from mixlab.data.audio.tones import tone
from mixlab.data.dataset import Source, Split
from mixlab.data.images.decode import decode
from mixlab.data.shard_writer import index_shards, write_shards
from mixlab.data.shards import manifest_digest, open_shards, verify_shards
from mixlab.data.sources import open_source
from mixlab.errors import DataError, ExampleError, UsageError
from mixlab.report.screen import Screen
from mixlab.training.signals import Interrupted
from mixlab.training.splits import reopen_splits
from tests.training.seams import StopAfter

QUIET = Screen(quiet=True)


@pytest.fixture
def folder(tmp_path):
    draw = np.random.default_rng(0)
    for i in range(40):
        path = tmp_path / f"data/{'train' if i < 30 else 'test'}/{'cat' if i % 2 else 'dog'}/{i}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (20, 24, 3), dtype=np.uint8)).save(path)
    return tmp_path / "data"


@pytest.fixture
def shards(folder, tmp_path):
    write_shards(open_source(str(folder)), tmp_path / "shards", shard_bytes=10_000)
    return tmp_path / "shards"


def test_every_picture_is_in_a_shard_byte_for_byte_with_its_class(folder, shards):
    original, found = open_source(str(folder)), open_source(f"wds:{shards}")
    assert found.class_names == original.class_names == ("cat", "dog")
    assert len(list(shards.glob("train-*.tar"))) > 1
    for split in ("train", "test"):
        pairs = lambda part: sorted((part.read(i), int(part.labels[i])) for i in range(len(part)))  # noqa: E731
        assert pairs(found.splits[split]) == pairs(original.splits[split])
    labels = found.splits["train"].labels
    assert (
        0 < np.abs(np.diff(labels)).sum() > 5
    )  # not sorted by class, for readers that go from front to back


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its files open
def test_webdataset_reads_what_was_written(shards):
    split = open_shards(str(shards)).splits["train"]
    paths = [str(path) for path in sorted(shards.glob("train-*.tar"))]
    theirs = [
        (sample["jpg"], int(sample["cls"])) for sample in webdataset.WebDataset(paths, shardshuffle=False)
    ]
    assert theirs == [(split.read(i), split.labels[i]) for i in range(len(split))]


def test_the_same_pictures_make_the_same_bytes(folder, shards, tmp_path):
    write_shards(open_source(str(folder)), tmp_path / "again", shard_bytes=10_000)
    for path in shards.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


def test_pixels_become_png_and_unreadable_files_are_listed(tmp_path, folder):
    digits = open_source("digits")
    write_shards(digits, tmp_path / "digits")
    found = open_shards(str(tmp_path / "digits"))
    assert {name: len(split) for name, split in found.splits.items()} == {
        "train": 1078,
        "val": 362,
        "test": 357,
    }
    assert found.splits["test"].names[0] == "test-000000.tar/000000000"
    pixels = [decode(found.splits["test"].read(i))[..., :1].tobytes() for i in range(357)]
    assert sorted(pixels) == sorted(image.tobytes() for image in digits.splits["test"].arrays)
    (folder / "train/cat/broken.jpg").write_bytes(b"\xff\xd8 no more")
    result = write_shards(open_source(str(folder)), tmp_path / "some")
    assert (result.num_ok, result.num_bad) == (40, 1)
    assert "broken.jpg" in (tmp_path / "some/bad_files.csv").read_text()


def test_an_interrupted_writing_leaves_nothing(folder, tmp_path):
    with pytest.raises(ZeroDivisionError):
        write_shards(open_source("digits"), tmp_path / "out", progress=lambda done, total: 1 / 0)
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
    (tmp_path / "there").mkdir()
    with pytest.raises(UsageError, match="exists already"):
        write_shards(open_source(str(folder)), tmp_path / "there")


def test_no_cut_or_overwriting_is_silent(tmp_path):
    result = shard_trials.run(tmp_path, 60, seed=1)
    assert (result["silent"], result["missed_by_check"]) == (0, 0), result
    assert {key.split()[1] for key in result["outcomes"]} == {"harmless", "listed", "refused"}


def test_a_manifest_that_was_changed_is_refused(shards):
    text = (shards / "manifest.json").read_text()
    (shards / "manifest.json").write_text(text.replace('"cat"', '"bat"'))
    with pytest.raises(DataError, match="SHA-256 differs"):
        open_shards(str(shards))


def test_a_damaged_picture_is_listed_and_the_rest_is_trained_on(shards, tmp_path):
    source = open_shards(str(shards))
    pictures = source.splits["train"].encoded
    row = int(source.splits["train"].rows[7])
    path = pictures.paths[pictures.shard[row]]
    with path.open("r+b") as file:
        file.seek(int(pictures.offset[row]) + 40)
        file.write(b"\x00\x01\x02")
    with pytest.raises(ExampleError, match="digest differs"):
        source.splits["train"].read(7)
    assert [shard["path"] for shard in verify_shards(shards)] == [str(path)]
    options = {"batch_size": 8, "steps": 3, "epochs": None, "threads": 1, "data__val_fraction": 0.0}
    mixlab.train(
        f"wds:{shards}", "small_images", run=tmp_path / "run", screen=QUIET, figures=False, **options
    )
    rows = (tmp_path / "run/bad_files.csv").read_text().splitlines()
    assert len(rows) == 2
    assert source.splits["train"].names[7] in rows[1]
    with pytest.raises(DataError, match="more than the 0% allowed"):
        mixlab.train(
            f"wds:{shards}",
            "small_images",
            run=tmp_path / "none",
            screen=QUIET,
            figures=False,
            data__max_bad_share=0.0,
            **options,
        )


@pytest.mark.parametrize("in_memory", [pytest.param(True, marks=pytest.mark.slow), False])
def test_a_run_from_shards_stopped_and_resumed_has_the_same_bits(in_memory, shards, tmp_path, monkeypatch):
    options = {
        "batch_size": 8, "steps": 8, "epochs": None, "threads": 1, "data__num_workers": 0 if in_memory else 2,
        "data__in_memory": in_memory, "keep_weights": "last",
    }  # fmt: skip
    source = f"wds:{shards}"
    mixlab.train(source, "small_images", run=tmp_path / "whole", screen=QUIET, figures=False, **options)

    with pytest.raises(Interrupted):
        mixlab.train(
            source, "small_images", run=tmp_path / "run", screen=StopAfter(4), figures=False, **options
        )
    monkeypatch.chdir("/")  # the recipe has the whole path
    mixlab.resume(tmp_path / "run", screen=QUIET, figures=False)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert reopen_splits(open_source(source), tmp_path / "run/split.csv")["test"].names[0].startswith("test-")


@pytest.mark.parametrize(
    "pattern", ["pipe:cat x.tar", "http://example.org/x.tar", "s3://bucket/x", "file://x"]
)
def test_commands_and_urls_are_refused(pattern):
    with pytest.raises(UsageError, match="files only"):
        open_source(f"wds:{pattern}")


# Shards from elsewhere


def tar(path, members):
    with tarfile.open(path, "w") as archive:
        for name, data in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))


def jpeg(value: int = 0) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), value, dtype=np.uint8)).save(buffer, "jpeg")
    return buffer.getvalue()


def samples(label, start=0, count=6, suffix="cls"):
    for i in range(start, start + count):
        yield f"{i:04d}.jpg", jpeg(i)
        yield f"{i:04d}.{suffix}", label(i).encode()
        yield f"{i:04d}.json", b"{}"


def test_shards_from_elsewhere_get_a_manifest_once_they_are_read(tmp_path):
    tar(tmp_path / "train-000000.tar", samples(lambda i: str(i % 3 * 5)))
    tar(tmp_path / "validation-0.tar", samples(lambda i: str(i % 3 * 5), suffix="txt"))
    with pytest.raises(DataError, match="no manifest"):
        open_source(f"wds:{tmp_path}")
    assert run_command(["shard", str(tmp_path)]) == 0
    source = open_source(f"wds:{tmp_path}")
    assert source.class_names == ("0", "5", "10")
    assert source.splits.keys() == {"train", "val"}
    assert source.splits["train"].labels.tolist() == [0, 1, 2, 0, 1, 2]
    assert source.splits["train"].read(2) == jpeg(2)
    with pytest.raises(UsageError, match="already"):
        index_shards(tmp_path)


def test_sounds_from_elsewhere_make_shards_of_sounds(tmp_path):
    tar(tmp_path / "train-0.tar", [pair for i in range(6) for pair in wav_pair(i)])
    assert index_shards(tmp_path).modality == "sounds"
    source = open_source(f"wds:{tmp_path}")
    assert source.modality.name == "sounds"
    assert source.splits["train"].read(2) == as_wav(tone(2, 8000), 8000)


def test_shards_of_two_kinds_of_examples_or_of_none_are_refused(tmp_path):
    tar(tmp_path / "train-0.tar", [*wav_pair(0), ("x.jpg", jpeg()), ("x.cls", b"1")])
    with pytest.raises(DataError, match="both sounds and images"):
        index_shards(tmp_path)
    tar(tmp_path / "train-0.tar", wav_pair(0))
    tar(tmp_path / "train-1.tar", samples(lambda i: str(i)))
    with pytest.raises(DataError, match="both sounds and images"):
        index_shards(tmp_path)
    tar(tmp_path / "train-0.tar", [("a.cls", b"1")])
    (tmp_path / "train-1.tar").unlink()
    with pytest.raises(DataError, match="no images or sounds"):
        index_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def wav_pair(i):
    return [(f"{i}.wav", as_wav(tone(i, 8000), 8000)), (f"{i}.cls", str(i % 2).encode())]


def test_sounds_go_into_shards_as_they_are_and_a_stopped_run_goes_on_to_the_same_bits(tmp_path):
    original = open_source("tones")
    write_shards(original, tmp_path / "shards", shard_bytes=500_000)
    source = open_source(f"wds:{tmp_path / 'shards'}")
    assert (source.modality.name, source.class_names) == ("sounds", original.class_names)
    for split, part in original.splits.items():
        pairs = lambda one: sorted((one.read(i), int(one.labels[i])) for i in range(len(one)))  # noqa: E731
        assert pairs(source.splits[split]) == pairs(part)
    options = {"steps": 6, "batch_size": 16, "threads": 1, "keep_weights": "last", "figures": False}
    options |= {"data__in_memory": False, "data__num_workers": 2}
    mixlab.train(f"wds:{tmp_path / 'shards'}", run=tmp_path / "whole", screen=QUIET, **options)
    with pytest.raises(Interrupted):
        mixlab.train(f"wds:{tmp_path / 'shards'}", run=tmp_path / "run", screen=StopAfter(3), **options)
    mixlab.resume(tmp_path / "run", screen=QUIET, figures=False)
    one, other = (load_file(tmp_path / name / "weights.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_class_names_in_shards_may_be_words(tmp_path):
    tar(tmp_path / "part-0.tar", samples(lambda i: ["cat", "dog"][i % 2]))
    index_shards(tmp_path)
    source = open_source(f"wds:{tmp_path}")
    assert (source.class_names, list(source.splits)) == (("cat", "dog"), ["all"])


@pytest.mark.parametrize(
    ("members", "words"),
    [
        ([("a.jpg", jpeg()), ("a.pyd", b"\x80")], "may hold code"),
        ([("a.jpg", jpeg()), ("a.pickle", b"\x80")], "may hold code"),
        ([("a.jpg", jpeg())], "no .cls"),
        ([("a.jpg", jpeg()), ("a.cls", b"1"), ("a.jpg", jpeg())], "two images"),
        ([("../a.jpg", jpeg()), ("../a.cls", b"1")], "no plain file"),
        ([("/etc/a.jpg", jpeg()), ("/etc/a.cls", b"1")], "no plain file"),
    ],
)
def test_odd_shards_are_refused_and_leave_no_manifest(members, words, tmp_path):
    tar(tmp_path / "x.tar", members)
    with pytest.raises(DataError, match=words):
        index_shards(tmp_path)
    assert not (tmp_path / "manifest.json").exists()


def test_links_in_shards_and_cut_archives_are_refused(tmp_path):
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        info = tarfile.TarInfo("a.jpg")
        info.type, info.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(info)
    with pytest.raises(DataError, match="no plain file"):
        index_shards(tmp_path)
    tar(tmp_path / "x.tar", samples(lambda i: str(i)))
    whole = (tmp_path / "x.tar").read_bytes()
    for end in range(512, len(whole) - 10240, 1024):  # also between two members, where tarfile sees no fault
        (tmp_path / "x.tar").write_bytes(whole[:end])
        with pytest.raises(DataError, match=r"cut|cannot be read|no \.cls"):
            index_shards(tmp_path)


@pytest.mark.parametrize("names", [[str(i) for i in range(12)], ["1", "2", "3"], ["2", "7", "cat"]])
def test_classes_whose_names_are_numbers_keep_their_pictures(names, tmp_path):
    for i, name in enumerate(names):
        path = tmp_path / f"data/{name}/{i}.png"
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((8, 8, 3), i * 10, dtype=np.uint8)).save(path)
    write_shards(open_source(str(tmp_path / "data")), tmp_path / "shards")
    found = open_source(f"wds:{tmp_path / 'shards'}")
    split = found.splits["all"]
    for i in range(len(split)):
        assert found.class_names[split.labels[i]] == names[int(decode(split.read(i))[0, 0, 0]) // 10]


def test_a_caption_is_no_class_where_there_is_one(tmp_path):
    members = [pair for i in range(6) for pair in (
        (f"{i}.jpg", jpeg(i)), (f"{i}.txt", f"a caption {i}".encode()), (f"{i}.cls", str(i % 2).encode()),
    )]  # fmt: skip
    tar(tmp_path / "train-0.tar", members)
    index_shards(tmp_path)
    assert open_source(f"wds:{tmp_path}").class_names == ("0", "1")


def test_the_split_is_a_word_of_the_name_and_none_is_left_out_silently(tmp_path):
    for name in ("imagenet1k-train-0.tar", "imagenet1k-validation-0.tar"):
        tar(tmp_path / name, samples(lambda i: str(i % 2)))
    tar(tmp_path / "others.tar", samples(lambda i: str(i % 2)))
    with pytest.raises(DataError, match="those of others do not"):
        index_shards(tmp_path)
    (tmp_path / "others.tar").unlink()
    index_shards(tmp_path)
    assert open_source(f"wds:{tmp_path}").splits.keys() == {"train", "val"}


def test_evaluate_knows_the_runs_own_shards_by_any_spelling(shards, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    mixlab.train(
        "wds:shards",
        "small_images",
        run=tmp_path / "run",
        screen=QUIET,
        figures=False,
        batch_size=8,
        steps=2,
        epochs=None,
        threads=1,
    )
    from mixlab.training.evaluate import evaluate

    for data in (None, "wds:shards", f"wds:{shards}"):
        assert evaluate("run", data, screen=QUIET)[0].num_images == 10


# Manifests that nobody vouches for


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.update(format="x"),
        lambda m: m.update(shards=[{}]),
        lambda m: m.update(shards=3),
        lambda m: m["shards"][0].update(count=10**9),
        lambda m: m["shards"][0].update(file="../../etc/passwd"),
        lambda m: m.update(class_names=["one"]),
        lambda m: m.pop("class_names"),
        lambda m: m.update(format_version=99),
        lambda m: m.update(modality="smells"),
        lambda m: m.update(modality=["images"]),
    ],
)
def test_a_manifest_that_lies_is_refused(change, shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    change(manifest)
    manifest["sha256"] = manifest_digest(manifest)  # as a forger would
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError):
        open_shards(str(shards))


def test_a_manifest_of_an_older_version_has_images(shards):
    manifest = json.loads((shards / "manifest.json").read_text())
    assert manifest.pop("modality") == "images"
    manifest["sha256"] = manifest_digest(manifest)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    assert open_shards(str(shards)).modality.name == "images"


@pytest.mark.parametrize("text", ["", "[]", "{", "null", "[" * 100_000, '{"format": "mixlab-shards"}'])
def test_a_manifest_that_is_none_is_refused(text, shards):
    (shards / "manifest.json").write_text(text)
    with pytest.raises(DataError):
        open_shards(str(shards))


@pytest.mark.parametrize("key", ["offset", "size", "label", "key", "digest"])
def test_an_index_that_points_elsewhere_is_refused(key, shards):
    path = next(shards.glob("train-*.index.json"))
    index = json.loads(path.read_text())
    index[key] = [10**12] * len(index[key]) if key in ("offset", "size", "label") else index[key][:-1]
    path.write_text(json.dumps(index))
    with pytest.raises(DataError, match="SHA-256 differs"):
        open_shards(str(shards))
    manifest = json.loads((shards / "manifest.json").read_text())
    from mixlab.files import sha256

    for shard in manifest["shards"]:
        shard["index_sha256"] = sha256((shards / shard["file"]).with_suffix(".index.json"))
    manifest["sha256"] = manifest_digest(manifest)
    (shards / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match=r"outside|too large|does not fit"):
        open_shards(str(shards))


def test_the_command_writes_shards_and_check_compares_them(folder, tmp_path, capsys):
    out = tmp_path / "out"
    assert run_command(["shard", str(folder), str(out), "--shard-mib", "1"]) == 0
    assert "40 images (30 in train, 10 in test)" in capsys.readouterr().out
    assert run_command(["check", f"wds:{out}"]) == 0
    path = out / "test-000000.tar"
    data = bytearray(path.read_bytes())
    data[600] ^= 1
    path.write_bytes(data)
    assert run_command(["check", f"wds:{out}"]) == 1
    assert "SHA-256 differ" in capsys.readouterr().out


def test_a_source_of_shards_can_be_split_like_any_other(shards):
    split = open_shards(str(shards)).splits["train"]
    part = split.take(np.array([5, 2]))
    assert isinstance(part, Split)
    assert isinstance(open_shards(str(shards)), Source)
    assert [part.read(0), part.read(1)] == [split.read(5), split.read(2)]
    assert not part.has_files
