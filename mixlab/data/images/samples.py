"""Real images that come with scikit-learn, to compare an exported model on."""

import numpy as np


def sample_images(count: int, image_size: tuple[int, int]) -> list[np.ndarray]:
    """Parts of the two photos that come with scikit-learn, at random places and sizes: (height, width, 3) each."""
    from sklearn.datasets import load_sample_images

    photos = load_sample_images().images
    draws, images = np.random.default_rng(0), []
    for number in range(count):
        photo = photos[number % len(photos)]
        smallest = min(*photo.shape[:2], 2 * max(image_size))
        height, width = (int(draws.integers(min(smallest, 16), side + 1)) for side in photo.shape[:2])
        top, left = (
            int(draws.integers(0, s - part + 1))
            for s, part in zip(photo.shape, (height, width), strict=False)
        )
        images.append(np.ascontiguousarray(photo[top : top + height, left : left + width]))
    return images
