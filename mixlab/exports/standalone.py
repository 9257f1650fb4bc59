"""What is in images, by a model that mixlab exported: python predict.py picture.jpg ...

Needs onnxruntime, numpy and Pillow; model.onnx beside this file has its class names and preprocessing inside.
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps

MODEL = Path(__file__).with_name("model.onnx")
Image.MAX_IMAGE_PIXELS = 50_000_000  # Pillow warns above that, and refuses twice as many


def read_picture(path: str, preprocess: dict) -> np.ndarray:
    """An image file -> uint8 (height, width, channels) at model size."""
    image = ImageOps.exif_transpose(Image.open(path))
    if image.mode == "F":
        raise OSError("pixels are floating-point numbers of unknown range; save as 8 or 16 bits")
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow would clip
        grey_max = preprocess.get("grey_max", 65535)
        values = (np.asarray(image).astype(np.int64) * 255 + grey_max // 2) // grey_max
        image = Image.fromarray(values.clip(0, 255).astype(np.uint8))
    if image.has_transparency_data:  # on white
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    image = image.convert("RGB").convert("L" if preprocess["channels"] == 1 else "RGB")
    (height, width), share, box_size = preprocess["image_size"], preprocess["crop_fraction"], image.size
    if preprocess["fit"] == "resize-crop":
        box_size = (share * image.width, share * image.height)
    elif preprocess["fit"] != "stretch":
        scale = share * min(image.height / height, image.width / width)
        box_size = (min(width * scale, image.width), min(height * scale, image.height))
    left, top = (image.width - box_size[0]) / 2, (image.height - box_size[1]) / 2
    resample = Image.Resampling[preprocess["interpolation"].upper()]
    image = image.resize((width, height), resample, box=(left, top, left + box_size[0], top + box_size[1]))
    return np.asarray(image).reshape(height, width, -1)


def main(paths: list[str]) -> None:
    session = onnxruntime.InferenceSession(MODEL, providers=["CPUExecutionProvider"])
    about = json.loads(session.get_modelmeta().custom_metadata_map["mixlab"])
    failed = []
    for path in paths:
        try:
            pixels = read_picture(path, about["preprocess"])
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            failed.append(repr(f"{path}: {error}")[1:-1])  # what is not seen in names stands as an escape
            continue
        logits = session.run(["logits"], {"pixels": pixels[None]})[0][0] / about.get("temperature", 1.0)
        share = np.exp(logits.astype(np.float64) - logits.max())
        best = [(about["class_names"][i], 100 * share[i] / share.sum()) for i in np.argsort(-share)[:5]]
        print(repr(f"{path}: " + ", ".join(f"{name} {percent:.1f} %" for name, percent in best))[1:-1])
    sys.exit("\n".join(failed) or 0)  # text goes to standard error, with status 1


if __name__ == "__main__":
    main(sys.argv[1:]) if len(sys.argv) > 1 else sys.exit(__doc__)
