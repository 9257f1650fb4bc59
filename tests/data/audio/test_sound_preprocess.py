"""The log-mel picture: against SciPy's transform, in the graph, in windows, and as JSON."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import signal

from mixlab.data.audio.preprocess import LOG_OFFSET, MEAN, STD, SoundPreprocess, clip_lengths
from mixlab.data.modality import read_preprocess
from mixlab.errors import WeightsError

OWN = SoundPreprocess(rate=8_000, window=240, hop=80, fft=256, bands=40, frames=24, max_samples=8_000)


def noise(*shape, seed=0):
    return np.random.default_rng(seed).integers(-20_000, 20_000, shape, dtype=np.int16)


def test_it_is_the_logarithm_of_mel_bands_of_scipys_spectrum():
    samples = noise(OWN.length)
    _, _, spectrum = signal.stft(
        samples / 32768, 8_000, "hann", 240, 160, 256, boundary=None, padded=False, scaling="spectrum"
    )
    power = (2 * np.abs(spectrum.T)) ** 2
    hertz = np.arange(129) * 8_000 / 256
    low, high = 2595 * np.log10(1 + 20 / 700), 2595 * np.log10(1 + 4_000 / 700)
    centres = 700 * (10 ** (np.linspace(low, high, 42) / 2595) - 1)
    bands = np.stack(
        [np.interp(hertz, centres[i : i + 3], [0.0, 1.0, 0.0], left=0, right=0) for i in range(40)], axis=1
    )
    expected = (np.log(power @ bands + LOG_OFFSET) - MEAN) / STD
    found = OWN.to_input(torch.from_numpy(samples)[None])
    assert found.shape == (1, 40, 1, 24)
    assert np.abs(found[0, :, 0].T.numpy() - expected).max() < 1e-3


def test_a_full_sine_is_loudest_in_its_band_and_as_loud_as_said():
    time = np.arange(OWN.length) / 8_000
    samples = np.rint(32767 * np.sin(2 * np.pi * 1_000 * time)).astype(np.int16)
    picture = OWN.to_input(torch.from_numpy(samples)[None])[0, :, 0]
    centres = 700 * (10 ** (np.linspace(31.75, 2146.06, 42)[1:-1] / 2595) - 1)
    assert abs(centres[int(picture.mean(1).argmax())] - 1_000) < 60
    assert abs(float(picture.max()) * STD + MEAN) < 0.7  # a power of 1, spread over two bins


@pytest.mark.parametrize("tokens", ["frames", "patches"])
def test_the_graph_gives_what_training_saw(tokens):
    own = replace(OWN, tokens=tokens)
    samples = torch.from_numpy(noise(5, own.length))
    assert own.to_input(samples).shape == (5, own.channels, *own.input_size)
    assert float((own.in_graph()(samples) - own.to_input(samples)).abs().max()) < 1e-3


def test_a_short_clip_lies_in_the_middle_and_silence_is_round_it():
    kept = torch.from_numpy(OWN.keep(noise(400)))[None]
    assert clip_lengths(kept).tolist() == [400]
    inputs, owner = OWN.windows(kept)
    assert owner is None
    silence = (np.log(LOG_OFFSET) - MEAN) / STD
    quiet = torch.isclose(inputs[0, :, 0], torch.tensor(silence, dtype=torch.float32)).all(0)
    assert quiet.tolist() == quiet.flip(0).tolist()
    assert 10 < int(quiet.sum()) < 20


def test_longer_clips_are_covered_by_windows():
    length = OWN.length
    kept = torch.from_numpy(np.stack([OWN.keep(noise(size)) for size in (length, 3 * length, length + 1)]))
    inputs, owner = OWN.windows(kept)
    counts = owner.bincount().tolist()
    assert counts == [1, 5, 2]
    first, last = OWN.to_input(kept[1:2, :length]), OWN.to_input(kept[1:2, 2 * length : 3 * length])
    assert torch.equal(inputs[1:2], first)
    assert torch.equal(inputs[5:6], last)
    assert len(OWN.to_graph(kept.numpy())) == 8


def test_it_comes_back_from_json():
    assert read_preprocess(OWN.to_json(), "config.json") == OWN


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"rate": 0}, "rate"),
        ({"tokens": "words"}, "tokens"),
        ({"frames": 4096}, "samples"),
        ({"std": 0.0}, "std"),
    ],
)
def test_numbers_that_no_sound_fits_are_refused(change, what):
    with pytest.raises(WeightsError, match=what):
        read_preprocess(OWN.to_json() | change, "config.json")


def test_its_picture_has_high_tones_above():
    time = np.arange(OWN.length) / 8_000
    samples = np.rint(20_000 * np.sin(2 * np.pi * 3_500 * time)).astype(np.int16)
    (picture,) = OWN.render(torch.from_numpy(samples)[None])
    assert (picture.shape, picture.dtype) == ((40, 24, 1), np.uint8)
    assert picture[:10].max() > picture[20:].max() + 50


@pytest.mark.parametrize("tokens", ["frames", "patches"])
@pytest.mark.parametrize("length", [500, 2_080, 5_003])
def test_a_stretch_is_blank_in_every_window_that_has_some_of_it(tokens, length):
    own = replace(OWN, tokens=tokens)
    kept = torch.from_numpy(own.keep(noise(length)))
    view = own.view(kept)
    frames = view.picture.shape[1]
    assert view.seconds == pytest.approx((240 + 80 * (frames - 1)) / 8_000)
    assert view.grid == (1, 16)
    whole, _ = own.windows(kept[None])
    hidden, owner = own.hidden(kept, range(16))
    assert owner.tolist() == [part for part in range(16) for _ in range(len(whole))]
    parts = hidden.view(16, *whole.shape)
    is_blank = (parts == 0).flatten(2, 3).all(2)  # (16, windows, frames)
    assert (is_blank | (parts == whole).flatten(2, 3).all(2)).all()
    firsts = np.linspace(0, max(length - own.length, 0), len(whole)) / 80
    for part in range(16):
        low, high = (round(edge) for edge in (part * frames / 16, (part + 1) * frames / 16))
        for window, first in enumerate(firsts):
            found = np.flatnonzero(is_blank[part, window]) + first
            inside = [one for one in np.arange(24) + first if low + 1 <= one < high - 1]
            assert set(inside) <= set(found)
            assert all(low - 1 <= one < high + 1 for one in found)
