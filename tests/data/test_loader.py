"""Batches: every image once, the same for any number of workers, and bad files left out but named."""

import multiprocessing
import os
import subprocess
import sys
import time
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from mixlab.data import workers as loading
from mixlab.data.dataset import Split
from mixlab.data.images.augment import AugmentConfig
from mixlab.data.images.preprocess import ImagePreprocess
from mixlab.data.loader import TrainingDataset, evaluation_batches, training_batches
from mixlab.data.order import batch_indices, steps_per_epoch
from mixlab.data.reading import check_bad_share, load_examples
from mixlab.errors import DataError

PREPROCESS = ImagePreprocess(image_size=(8, 8))


@pytest.fixture
def files(tmp_path) -> Split:
    rng = np.random.default_rng(0)
    names = []
    for i in range(23):
        path = tmp_path / f"{i:02}.png"
        Image.fromarray(rng.integers(0, 256, (9 + i % 3, 10, 3), dtype=np.uint8)).save(path)
        names.append(str(path))
    return Split(names=tuple(names), labels=np.arange(23) % 4)


def spoil(split: Split, *numbers: int) -> None:
    for i in numbers:
        with open(split.names[i], "r+b") as file:
            file.truncate(40)


def test_evaluation_counts_every_picture_once_the_last_batch_included(files):
    images = load_examples(files, PREPROCESS)
    batches = list(evaluation_batches(images, 5))
    assert [len(batch.label) for batch in batches] == [5, 5, 5, 5, 3]
    assert np.concatenate([batch.index for batch in batches]).tolist() == list(range(23))
    assert torch.cat([batch.label for batch in batches]).tolist() == files.labels.tolist()


def test_memory_and_stream_give_the_same_pictures(files):
    in_memory = load_examples(files, PREPROCESS)
    streamed = load_examples(files, PREPROCESS, in_memory=False)
    assert streamed.kept is None
    assert torch.equal(in_memory.at(range(23)), streamed.at(range(23)))


def test_unreadable_files_are_named_and_the_rest_is_as_if_they_were_not_there(files):
    spoil(files, 3, 11)
    images = load_examples(files, PREPROCESS)
    assert [file.path for file in images.bad] == [files.names[3], files.names[11]]
    assert all(file.reason for file in images.bad)
    rest = load_examples(files.take(np.array([i for i in range(23) if i not in (3, 11)])), PREPROCESS)
    everything = range(len(rest))
    assert torch.equal(images.at(everything), rest.at(everything))
    assert images.split.names == rest.split.names
    assert np.array_equal(images.split.labels, rest.split.labels)


def test_too_many_unreadable_files_stop_with_the_list(files):
    spoil(files, 3, 11)
    bad = load_examples(files, PREPROCESS).bad
    check_bad_share(bad, 23, 0.1, "image", "images")
    with pytest.raises(DataError, match="2 of 23") as error:
        check_bad_share(bad, 23, 0.05, "image", "images")
    assert files.names[11] in str(error.value)
    with pytest.raises(DataError, match="1 of 1 image cannot be read"):
        check_bad_share(bad[:1], 1, 0.05, "image", "images")


def test_evaluation_leaves_out_a_file_that_went_bad_since_and_names_it(files):
    images = load_examples(files, PREPROCESS, in_memory=False)
    spoil(files, 7)
    bad = []
    batches = list(evaluation_batches(images, 5, on_bad=bad.append))
    assert np.concatenate([batch.index for batch in batches]).tolist() == [i for i in range(23) if i != 7]
    assert [file.path for file in bad] == [files.names[7]]


def collect(images, augment, workers, first=0, steps=12, on_bad=lambda file: None):
    dataset = TrainingDataset(examples=images, augment=augment, batch_size=5, seed=3)
    return list(
        training_batches(dataset, first_step=first, num_steps=steps, num_workers=workers, on_bad=on_bad)
    )


@pytest.mark.parametrize("crop", ["pad", "resized", "inception"])
def test_workers_and_restarts_change_nothing(files, crop):
    augment = AugmentConfig(crop=crop, flip=True, policy="randaugment", erase_prob=0.3)
    images = load_examples(files, PREPROCESS, in_memory=False)
    reference = collect(images, augment, workers=0)
    assert len(reference) == 12
    for workers in (1, 2):
        for a, b in zip(reference, collect(images, augment, workers), strict=True):
            assert torch.equal(a.inputs, b.inputs)
            assert np.array_equal(a.index, b.index)
    resumed = collect(images, augment, workers=0, first=7)
    for a, b in zip(reference[7:], resumed, strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_padded_crops_are_the_same_from_memory_and_from_files(files):
    augment = AugmentConfig(crop="pad", crop_padding=2, flip=True)
    in_memory = collect(load_examples(files, PREPROCESS), augment, 0)
    streamed = collect(load_examples(files, PREPROCESS, in_memory=False), augment, 0)
    for a, b in zip(in_memory, streamed, strict=True):
        assert torch.equal(a.inputs, b.inputs)


def test_a_file_that_goes_bad_during_training_is_left_out_and_named(files):
    images = load_examples(files, PREPROCESS, in_memory=False)
    victim = int(batch_indices(23, 5, seed=3, step=2)[1][0])
    spoil(files, victim)
    bad = []
    batches = collect(images, AugmentConfig(), 0, steps=4, on_bad=bad.append)
    assert {file.path for file in bad} == {files.names[victim]}
    seen = np.concatenate([batch.index for batch in batches])
    assert victim not in seen
    assert sorted(len(batch.label) for batch in batches) == [4, 5, 5, 5]


def test_each_epoch_visits_full_batches_of_its_own_order():
    assert steps_per_epoch(23, 5) == 4
    assert steps_per_epoch(3, 5) == 1
    visited = [batch_indices(23, 5, seed=0, step=step) for step in range(8)]
    assert [epoch for epoch, _ in visited] == [0, 0, 0, 0, 1, 1, 1, 1]
    first = np.concatenate([index for _, index in visited[:4]])
    assert len(set(first.tolist())) == 20
    assert batch_indices(3, 5, seed=0, step=2)[0] == 2


def test_pixels_already_at_model_size_are_taken_as_they_are():
    pixels = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 1), dtype=np.uint8)
    split = Split(names=tuple(f"index {i}" for i in range(6)), labels=np.arange(6), arrays=pixels)
    preprocess = replace(PREPROCESS, channels=1, mean=(0.5,), std=(0.5,))
    assert np.array_equal(load_examples(split, preprocess).kept.numpy(), pixels.transpose(0, 3, 1, 2))


def test_a_lock_that_a_dead_worker_holds_stops_nobody():
    """A worker that is killed while it looks at torch's event keeps that event's lock for good."""
    event = multiprocessing.Event()
    event._cond.acquire()
    done, began = loading._DoneEvent(event), time.monotonic()
    assert not done.is_set()
    done.set()
    assert done.is_set()
    assert time.monotonic() - began < 10
    event._cond.release()


KILLED_WITH_THE_LOCK = """
import os, signal, sys
import torch
from torch.utils.data import DataLoader, Dataset
from mixlab.data.workers import items_of_workers

class Numbers(Dataset):
    def __getitem__(self, step):
        return torch.full((3,), step)

real, taken = DataLoader.__iter__, []

def killed_while_it_looks(self):
    items = real(self)
    if not taken:  # a worker that is killed while it looks at torch's event keeps the event's lock
        taken.append(items._workers_done_event._cond.acquire())
        os.kill(items._workers[0].pid, signal.SIGKILL)
    return items

if __name__ == "__main__":
    DataLoader.__iter__ = killed_while_it_looks
    items = items_of_workers(Numbers(), 0, 12, 2, 300.0)
    seen = [int(next(items)[0]) for _ in range(int(sys.argv[1]))]
    items.close()
    print(seen, flush=True)
"""


@pytest.mark.parametrize("number", [12, pytest.param(1, marks=pytest.mark.slow)])
def test_a_training_goes_on_and_ends_though_a_killed_worker_held_a_lock(number, tmp_path):
    """number: of items taken; the others are left, as where a training ends early."""
    (tmp_path / "script.py").write_text(KILLED_WITH_THE_LOCK)
    done = subprocess.run(
        [sys.executable, "script.py", str(number)],
        cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}, capture_output=True, text=True, timeout=100,
        check=False,
    )  # fmt: skip
    assert done.stdout.strip() == str(list(range(number))), done.stderr
    assert done.returncode == 0
