"""Augmentation of sounds: what each change does, and that a draw belongs to a clip and not to its batch."""

import numpy as np
import pytest
import torch

from mixlab.data.audio.augment import augment, masked, noise_bank
from mixlab.data.audio.config import AudioConfig
from mixlab.data.audio.decode import as_wav
from mixlab.errors import UsageError

LENGTH, RATE = 2_080, 8_000
ALL = AudioConfig(rate=RATE, seconds=0.26, max_seconds=1.0, shift=0.2, speed=0.15, noise=0.8)


def clips(*lengths):
    kept = np.zeros((len(lengths), 8_000), dtype=np.int16)
    for row, length in zip(kept, lengths, strict=True):
        row[:length] = 10_000 * np.sin(2 * np.pi * 500 * np.arange(length) / RATE) + 1
    return torch.from_numpy(kept)


def changed(kept, epoch=0, index=None, **settings):
    config = AudioConfig(rate=RATE, seconds=0.26, max_seconds=1.0, **settings)
    index = np.arange(len(kept)) if index is None else index
    return augment(kept, config, LENGTH, RATE, seed=3, epoch=epoch, index=index)


def tone_of(samples):
    return np.abs(np.fft.rfft(samples * np.hanning(len(samples)), 65_536)).argmax() * RATE / 65_536


def test_without_changes_a_short_clip_lies_in_the_middle():
    kept = clips(1_000)
    found = changed(kept)
    assert torch.equal(found[0, 540:1540], kept[0, :1000])
    assert not found[0, :540].any()
    assert not found[0, 1540:].any()


def test_shifts_move_a_clip_whole():
    found = changed(clips(*[400] * 64), shift=0.1)
    starts = (found != 0).to(torch.uint8).argmax(1) - 840
    assert starts.abs().max() <= 208
    assert starts.unique().numel() > 20
    assert ((found != 0).sum(1) == int(clips(400).count_nonzero())).all()


def test_a_long_clip_is_cut_elsewhere_in_every_epoch():
    kept = torch.arange(1, 8_001, dtype=torch.int16)[None]
    starts = [int(changed(kept, epoch=epoch)[0, 0]) for epoch in range(50)]
    assert min(starts) < 1_000
    assert max(starts) > 5_000
    assert torch.equal(changed(kept)[0].diff(), torch.ones(LENGTH - 1, dtype=torch.int16))


def test_speed_changes_the_tone_by_so_much():
    found = changed(clips(*[8_000] * 32), speed=0.15).numpy()
    tones = np.array([tone_of(row) for row in found])
    assert tones.min() >= 0.84 * 500
    assert tones.max() <= 1.16 * 500
    assert tones.max() - tones.min() > 80


def test_noise_is_as_loud_as_said_and_in_as_many():
    kept = clips(*[2_080] * 200)
    difference = (changed(kept, noise=0.5) - changed(kept)).double()
    loud = difference.square().mean(1).sqrt() / changed(kept).double().square().mean(1).sqrt()
    hit = loud > 0
    assert 70 < int(hit.sum()) < 130
    below = -20 * torch.log10(loud[hit])
    assert below.median() > 10
    assert below.max() < 45
    assert below.min() > 0


def test_noise_comes_from_a_folder(tmp_path):
    (tmp_path / "hum.wav").write_bytes(as_wav(clips(8_000)[0].numpy(), RATE))
    beyond = as_wav(
        np.tile(np.array([1, -1], dtype=np.int16), 5_000), 48_000
    )  # nothing of it is left at RATE
    (tmp_path / "beyond.wav").write_bytes(beyond)
    bank = noise_bank(str(tmp_path), RATE)
    assert torch.isfinite(bank).all()
    assert abs(tone_of(bank.numpy()) - 500) < 2
    with pytest.raises(UsageError, match="no sounds in this folder"):
        noise_bank(str(tmp_path / "none"), RATE)


def test_a_draw_belongs_to_the_clip_whatever_its_batch():
    kept = clips(300, 2_000, 5_000, 8_000)
    whole = augment(kept, ALL, LENGTH, RATE, seed=1, epoch=2, index=np.arange(4))
    for i in (3, 0):
        alone = augment(kept[i : i + 1], ALL, LENGTH, RATE, seed=1, epoch=2, index=np.array([i]))
        assert torch.equal(whole[i : i + 1], alone)
    other = augment(kept, ALL, LENGTH, RATE, seed=1, epoch=3, index=np.arange(4))
    assert not torch.equal(whole, other)


def test_masks_blank_whole_frames_and_bands():
    config = AudioConfig(time_masks=2, time_mask=0.25, band_masks=1, band_mask=0.2)
    draws = np.random.default_rng(0).random((64, 6))
    found = masked(torch.ones(64, 40, 1, 48), draws, config)[:, :, 0]
    frames, bands = (found == 0).all(1).sum(1), (found == 0).all(2).sum(1)
    assert frames.max() <= 24
    assert bands.max() <= 8
    assert 6 < frames.float().mean() < 16
    assert ((found == 0) == ((found == 0).all(1)[:, None] | (found == 0).all(2)[:, :, None])).all()


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"rate": 100}, "audio.rate"),
        ({"seconds": 2.0, "max_seconds": 1.0}, "audio.max_seconds"),
        ({"speed": 0.9}, "audio.speed"),
        ({"bands": 2}, "audio.bands"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings, key):
    with pytest.raises(UsageError) as refused:
        AudioConfig(**settings)
    assert refused.value.where == key
