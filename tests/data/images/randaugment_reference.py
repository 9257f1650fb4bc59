"""Makes randaugment_reference.npz: what the authors' RandAugment operations give, each on its own.

    python randaugment_reference.py PATH/big_vision/pp/archive

run once with TensorFlow 2.15.1, tensorflow-addons 0.23.0 and NumPy 1.26.4 on big_vision 0127fb6, unmodified but for
what is drawn: signs and the place of a cutout are given. It is no part of the tests, which read the file only.
"""

import sys
from pathlib import Path

import numpy as np

HEIGHT, WIDTH = 24, 32
CENTRE = (6, 21)  # of a cutout
NUM_POSITIONS = 150  # of 768, to keep the file small
MAGNITUDES = (15, 20)  # of the Mixer's recipes


def picture() -> np.ndarray:
    """uint8 (H, W, 3): coarse colours under some noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(0, 256, (3, 4, 3)).repeat(8, 0).repeat(8, 1)
    return np.clip(0.8 * coarse + rng.integers(0, 52, (HEIGHT, WIDTH, 3)), 0, 255).astype(np.uint8)


def positions() -> np.ndarray:
    """Where results are looked at: numbers of pixels, row by row."""
    return np.sort(np.random.default_rng(1).permutation(HEIGHT * WIDTH)[:NUM_POSITIONS])


def main(folder: str) -> None:
    sys.path.insert(0, folder)
    import autoaugment
    import tensorflow

    names = list(autoaugment.NAME_TO_FUNC)
    signed = ("Rotate", "ShearX", "ShearY", "TranslateX", "TranslateY")
    cases: list[str] = []
    pixels: list[np.ndarray] = []
    for name in names:
        side = {"TranslateX": WIDTH, "TranslateY": HEIGHT}.get(name, min(HEIGHT, WIDTH))
        constants = autoaugment.HParams(cutout_const=40 * side / 224, translate_const=100 * side / 224)
        for magnitude in MAGNITUDES:
            for sign in (1, -1) if name in signed else (1,):
                autoaugment._randomly_negate_tensor = lambda tensor, sign=sign: sign * tensor
                function, _, values = autoaugment._parse_policy_info(
                    name, 0.5, float(magnitude), [128] * 3, constants
                )
                draw, places = autoaugment.tf.random_uniform, iter(CENTRE)
                autoaugment.tf.random_uniform = lambda *a, places=places, **k: tensorflow.constant(
                    next(places)
                )
                result = function(tensorflow.constant(picture()), *values).numpy()
                autoaugment.tf.random_uniform = draw
                cases.append(f"{name}/{magnitude}/{sign}")
                pixels.append(result.reshape(-1, 3)[positions()])
    # With their own constants: what each operation is handed at 224 pixels, 0 for nothing.
    autoaugment._randomly_negate_tensor = lambda tensor: tensor
    handed = autoaugment.level_to_arg(autoaugment.HParams(cutout_const=40, translate_const=100))
    arguments = [[sum(handed[name](float(magnitude))) for magnitude in MAGNITUDES] for name in names]
    shares = np.array([crop(tensorflow) for _ in range(20_000)]) / (375, 500)
    shares = np.column_stack([shares, shares.prod(axis=1)])  # height, width and area, of the image's
    np.savez_compressed(
        Path(__file__).with_suffix(".npz"),
        picture=picture(),
        positions=positions(),
        cases=cases,
        pixels=pixels,
        names=names,
        magnitudes=MAGNITUDES,
        arguments=arguments,
        crop_quantiles=np.quantile(shares, np.linspace(0.05, 0.95, 19), axis=0),
    )


def crop(tensorflow) -> tuple[int, int]:
    """Height and width of one Inception crop of a 375 x 500 image, with the authors' arguments."""
    _, size, _ = tensorflow.image.sample_distorted_bounding_box(
        (375, 500, 3),
        tensorflow.zeros([0, 0, 4], tensorflow.float32),
        area_range=(0.05, 1.0),
        aspect_ratio_range=(0.75, 1.33),
        min_object_covered=0,
        use_image_if_no_bounding_boxes=True,
    )
    return int(size[0]), int(size[1])


if __name__ == "__main__":
    main(sys.argv[1])
