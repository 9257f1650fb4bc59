"""Images that look nearly like another one without being the same: resized, saved again."""

import numpy as np

SMALLEST_SIDE = 16  # pixels; below it the hash says nothing


def near_hash(pixels: np.ndarray) -> int | None:
    """64 bits that hardly change with size, compression or brightness: imagehash's dhash.

    pixels: uint8 (H, W, 3 or 1). None for an image too small or too plain to be told from others.
    """
    if min(pixels.shape[:2]) < SMALLEST_SIDE:
        return None
    import imagehash
    from PIL import Image

    image = Image.fromarray(pixels[..., 0] if pixels.shape[2] == 1 else pixels)
    bits = np.packbits(imagehash.dhash(image, hash_size=8).hash)
    value = int.from_bytes(bits.tobytes(), "big")
    return value if 8 <= value.bit_count() <= 56 else None
