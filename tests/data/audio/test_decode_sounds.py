"""Sound files of every kind that is read, and files that are damaged, empty or silent."""

import io
import wave

import numpy as np
import pytest

from mixlab.data.audio.decode import as_wav, decode, resample, sound_format
from mixlab.errors import ExampleError


def sine(seconds=0.5, rate=16_000, hertz=440.0):
    return np.rint(12_000 * np.sin(2 * np.pi * hertz * np.arange(round(seconds * rate)) / rate)).astype(
        np.int16
    )


def stereo(left, right, rate=16_000):
    buffer = io.BytesIO()
    with wave.open(buffer, "wb") as file:
        file.setparams((2, 2, rate, 0, "NONE", ""))
        file.writeframes(np.stack([left, right], axis=1).astype("<i2").tobytes())
    return buffer.getvalue()


def written(samples, rate, **options):
    soundfile = pytest.importorskip("soundfile", reason="soundfile writes and reads these files")
    buffer = io.BytesIO()
    soundfile.write(buffer, samples, rate, **options)
    return buffer.getvalue()


def test_a_plain_wav_file_is_read_exactly():
    clip = decode(as_wav(sine(), 8_000))
    assert (clip.rate, clip.channels, clip.format) == (8_000, 1, "WAV")
    assert np.array_equal(clip.samples, sine())


def test_channels_are_averaged():
    clip = decode(stereo(sine(), np.zeros(8_000)))
    assert clip.channels == 2
    assert np.array_equal(clip.samples, np.rint(sine() / 2))


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        ({"format": "FLAC"}, 0),
        ({"format": "WAV", "subtype": "PCM_24"}, 0),
        ({"format": "WAV", "subtype": "FLOAT"}, 0),
        ({"format": "AIFF"}, 0),
        ({"format": "OGG"}, 1500),
        ({"format": "MP3"}, 1500),
    ],
)
def test_other_files_hold_the_same_sound(options, tolerance):
    samples = sine() / 32768 if options.get("subtype") == "FLOAT" else sine()
    content = written(samples, 16_000, **options)
    assert sound_format(content[:16]) == options["format"]
    clip = decode(content)
    assert (clip.rate, clip.format) == (16_000, options["format"])
    middle = slice(2_000, 6_000)
    assert np.abs(clip.samples[middle].astype(int) - sine()[middle]).max() <= tolerance


def test_another_rate_keeps_the_tone():
    found = resample(sine(rate=44_100), 44_100, 16_000)
    assert len(found) == 8_000
    assert np.abs(found[200:-200].astype(int) - sine()[200:-200]).max() < 30


def test_what_the_lower_rate_cannot_hold_is_taken_out():
    assert np.abs(resample(sine(rate=44_100, hertz=7_000), 44_100, 8_000)[200:-200]).max() < 60


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty"),
        (as_wav(np.zeros(0), 8_000), "empty"),
        (as_wav(np.zeros(800), 8_000), "silent"),
        (as_wav(np.full(800, 7), 8_000), "silent"),
        (as_wav(sine(), 8_000)[:-4_000], "cut off"),
        (b"no sound at all, but text in a file called clip.wav", "no sound file of a known kind"),
        (b"RIFF\0\0\0\0WAVEfmt ", "damaged: "),
        (b"fLaC" + bytes(200), "damaged: "),
    ],
)
def test_what_holds_no_sound_says_why(content, reason):
    if reason == "damaged: ":
        pytest.importorskip("soundfile", reason="it is soundfile that says so")
    with pytest.raises(ExampleError, match=reason):
        decode(content)


def test_samples_that_are_no_numbers_are_damage():
    with pytest.raises(ExampleError, match="no numbers"):
        decode(written(np.array([0.1, np.nan, 0.2] * 100), 8_000, format="WAV", subtype="FLOAT"))


@pytest.mark.parametrize("size", [0x7FFFF000, 0x80000000, 0xFFFFFFFF])  # as sox, arecord and ffmpeg write it
def test_a_stream_whose_header_knows_no_size_is_read_to_its_end(size):
    content = bytearray(as_wav(sine(), 8_000))
    content[4:8] = content[40:44] = size.to_bytes(4, "little")
    assert np.array_equal(decode(bytes(content)).samples, sine())


def test_a_file_with_more_samples_than_can_be_kept_is_refused_before_it_is_decoded():
    with pytest.raises(ExampleError, match="too long"):
        decode(written(np.zeros((2**20, 33)), 8_000, format="WAV", subtype="PCM_U8"))


@pytest.mark.parametrize("format", ["AIFF", "AU", "MP3", "FLAC"])
def test_files_that_end_too_early_are_said_to(format):
    content = written(sine(), 16_000, format=format)
    with pytest.raises(ExampleError, match=r"cut off|damaged"):
        decode(content[: len(content) * 3 // 4])


def test_a_rate_that_no_recorder_has_is_damage_and_asks_for_no_memory():
    for rate in (1, 4_294_967_295):
        content = bytearray(as_wav(sine(), 8_000))
        content[24:28] = rate.to_bytes(4, "little")
        with pytest.raises(ExampleError, match=r"damaged: .* samples a second"):
            decode(bytes(content))


def test_text_of_windows_is_no_mp3():
    assert sound_format("notes".encode("utf-16")[:16]) is None
    assert sound_format(bytes.fromhex("fffb90c4")) == "MP3"


def test_samples_on_another_scale_are_not_clipped_in_silence():
    loud = written(sine().astype(float), 16_000, format="WAV", subtype="FLOAT")
    with pytest.raises(ExampleError, match=r"up to 12,000, where 1 is the loudest"):
        decode(loud)
    a_little = written(1.5 * np.sin(np.arange(8_000) / 9), 16_000, format="WAV", subtype="FLOAT")
    assert decode(a_little).samples.max() == 32767
