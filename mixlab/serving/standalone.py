#!/usr/bin/env python3
"""Say what is in pictures, by a model that mixlab exported: python predict.py picture.jpg ...

Needs onnxruntime, numpy and Pillow, nothing else. The model, model.onnx beside this file, carries its class names and
its preprocessing.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MODEL = Path(__file__).with_name("model.onnx")
TOP = 5


def read_picture(path: str, preprocess: dict) -> np.ndarray:
    """A picture file -> uint8 (height, width, channels) at model size."""
    with Image.open(path) as file:
        image = ImageOps.exif_transpose(file)
        if image.has_transparency_data:  # on white, as mixlab does
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
        image = image.convert("RGB")
    if preprocess["channels"] == 1:
        image = image.convert("L")
    height, width = preprocess["image_size"]
    fraction, fit = preprocess["crop_fraction"], preprocess["fit"]
    if fit == "stretch":
        box_width, box_height = image.width, image.height
    elif fit == "resize-crop":
        box_width, box_height = fraction * image.width, fraction * image.height
    else:
        scale = fraction * min(image.height / height, image.width / width)
        box_width, box_height = min(width * scale, image.width), min(height * scale, image.height)
    left, top = (image.width - box_width) / 2, (image.height - box_height) / 2
    resample = Image.Resampling[preprocess["interpolation"].upper()]
    box = (left, top, left + box_width, top + box_height)
    return np.asarray(image.resize((width, height), resample, box=box)).reshape(height, width, -1)


def main(paths: list[str]) -> None:
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixlab"])
    names, failed = about["class_names"], 0
    for path in paths:
        try:
            pixels = read_picture(path, about["preprocess"])
        except OSError as error:
            print(f"{path}: {error}", file=sys.stderr)
            failed += 1
            continue
        logits = session.run(["logits"], {"pixels": pixels[None]})[0][0].astype(np.float64)
        probability = np.exp(logits - logits.max())
        probability /= probability.sum()
        best = np.argsort(-probability)[:TOP]
        print(path + ": " + ", ".join(f"{names[i]} {100 * probability[i]:.1f} %" for i in best))
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main(sys.argv[1:])
