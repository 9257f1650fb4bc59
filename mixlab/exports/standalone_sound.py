"""What is in sounds, by a model that mixlab exported: python predict.py clip.wav ...

Needs onnxruntime and numpy; model.onnx beside this file has its class names and the log-mel picture inside. Takes
WAV files of 16 bits; others are turned into such by `ffmpeg -i clip.mp3 -ac 1 -c:a pcm_s16le clip.wav`.
"""

import json
import math
import sys
import wave
from pathlib import Path

import numpy as np
import onnxruntime

MODEL = Path(__file__).with_name("model.onnx")


def read_sound(path: str, preprocess: dict) -> np.ndarray:
    """A WAV file -> int16 (windows, samples), as the model takes them."""
    with wave.open(path, "rb") as file:
        if file.getsampwidth() != 2:
            raise ValueError(f"{8 * file.getsampwidth()} bits a sample: only WAV files of 16 bits are read")
        rate, channels, stated = file.getframerate(), file.getnchannels(), file.getnframes()
        if not 1000 <= rate <= 768000:
            raise ValueError(f"damaged: {rate:,} samples a second")
        content = file.readframes(stated)
    count = len(content) // (2 * channels)
    if count < stated < 0x7FFF0000 // (2 * channels):  # a stream, whose length was not known, states more
        raise ValueError(f"cut off: {count:,} samples of {stated:,}")
    values = np.frombuffer(content, dtype="<i2", count=count * channels).reshape(-1, channels)
    sound = values[:, 0] if channels == 1 else np.rint(values.mean(axis=1)).astype(np.int16)
    if not len(sound):
        raise ValueError("empty: there is no sample in it")
    sound = resample(sound, rate, preprocess["rate"])
    if sound.min() == sound.max():
        raise ValueError("silent: all samples are the same")
    sound = sound[: preprocess["max_samples"]]
    loud = np.flatnonzero(sound)
    sound = sound[: loud[-1] + 1] if len(loud) else sound[:1]  # zeros at the end are what is not there
    length = preprocess["window"] + (preprocess["frames"] - 1) * preprocess["hop"]
    spare = len(sound) - length
    if spare <= 0:  # shorter than the model's input: in its middle
        before = -(spare // 2)
        return np.pad(sound, (before, length - len(sound) - before))[None]
    count = 1 + (spare + length // 2 - 1) // (length // 2)  # windows that overlap by half
    starts = [number * spare // max(count - 1, 1) if count > 1 else spare // 2 for number in range(count)]
    return np.stack([sound[start : start + length] for start in starts])


def resample(sound: np.ndarray, rate: int, wanted: int) -> np.ndarray:
    """int16 (n,) at another rate, by the filter of SciPy's resample_poly."""
    if rate == wanted:
        return sound
    up, down = wanted // math.gcd(rate, wanted), rate // math.gcd(rate, wanted)
    half = 10 * max(up, down)
    places = np.arange(-half, half + 1)
    kernel = np.sinc(places / max(up, down)) * np.kaiser(2 * half + 1, 5.0)
    kernel *= up / kernel.sum()
    count, taps = -(-len(sound) * up // down), 2 * half // up + 1
    padded = np.pad(sound / 32768, (taps, taps))
    result = np.empty(count)
    for begin in range(0, count, 4096):  # a part at a time, to save memory
        at = np.arange(begin, min(begin + 4096, count)) * down
        first = -(-(at - half) // up)  # the first sample that the kernel reaches
        used = first[:, None] + np.arange(taps)
        offset = half + at[:, None] - used * up
        weights = np.where(offset >= 0, kernel[offset.clip(0, 2 * half)], 0.0)
        result[begin : begin + 4096] = (weights * padded[(used + taps).clip(0, len(padded) - 1)]).sum(axis=1)
    return np.rint(result * 32768).clip(-32768, 32767).astype(np.int16)


def main(paths: list[str]) -> None:
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixlab"])
    failed = []
    for path in paths:
        try:
            windows = read_sound(path, about["preprocess"])
        except (OSError, ValueError, EOFError, wave.Error) as error:
            failed.append(repr(f"{path}: {error}")[1:-1])  # what is not seen in names stands as an escape
            continue
        logits = session.run(["logits"], {"waveform": windows})[0].mean(axis=0) / about.get(
            "temperature", 1.0
        )
        share = np.exp(logits.astype(np.float64) - logits.max())
        best = [(about["class_names"][i], 100 * share[i] / share.sum()) for i in np.argsort(-share)[:5]]
        print(repr(f"{path}: " + ", ".join(f"{name} {percent:.1f} %" for name, percent in best))[1:-1])
    sys.exit("\n".join(failed) or 0)  # text goes to standard error, with status 1


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
