"""ImageNet by its names: WordNet synsets (n01440764) and words, in the order of published heads; and ReaL's labels.

The lists are timm's. ReaL: Beyer et al. 2020, "Are we done with ImageNet?" (arXiv 2006.07159).
"""

import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from mixlab.errors import DataError

_SUBSETS = {1000: "imagenet-1k", 11221: "imagenet-21k-miil", 21843: "imagenet-21k-goog"}


def _lists(num_classes: int) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """The synsets and the words of the ImageNet with that many classes, a key of _SUBSETS."""
    from timm.data import ImageNetInfo  # importing timm takes more than a second

    info = ImageNetInfo(_SUBSETS[num_classes])
    return tuple(info.label_names()), tuple(info.label_descriptions())


def usual_class_names(num_classes: int) -> tuple[str, ...]:
    """ImageNet's words where the number of classes is one of ImageNet's, else '0' ... 'K-1'."""
    if num_classes not in _SUBSETS:
        return tuple(str(number) for number in range(num_classes))
    synsets, names = _lists(num_classes)
    # Some words stand for two classes (a crane is a bird and a machine): those get their WordNet number too.
    count = Counter(names)
    return tuple(f"{n} ({s})" if count[n] > 1 else n for n, s in zip(names, synsets, strict=True))


def numbers_by_name(class_names: tuple[str, ...]) -> dict[str, int]:
    """Every name that a data set may have for a model's classes, with the class's number.

    Those are the model's own; and for ImageNet's classes, whether the model has them by synset or by words, the
    synset, the words, and each single word that stands for one class only.
    """
    numbers = {name: number for number, name in enumerate(class_names)}
    if len(class_names) not in _SUBSETS:
        return numbers
    synsets, words = _lists(len(class_names))
    if class_names not in (synsets, usual_class_names(len(class_names))):
        return numbers
    single = [(number, word) for number, text in enumerate(words) for word in text.split(", ")]
    for named in (list(enumerate(synsets)), list(enumerate(words)), single):
        count = Counter(name for _, name in named)
        for number, name in named:
            if count[name] == 1:
                numbers.setdefault(name, number)
    return numbers


def read_real_labels(name: str) -> list[list[int]]:
    """For each of ImageNet's validation images, in order, the classes (of the 1,000) that its image shows.

    name: a file in the published format, or `real` for the copy that timm brings. DataError if it is none.
    """
    if name == "real" and not os.path.exists(name):
        import timm.data

        path = Path(timm.data.__file__).parent / "_info" / "imagenet_real_labels.json"
    else:
        path = Path(os.path.expanduser(name))
    try:
        labels = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise DataError(f"the labels cannot be read: {error}", where=str(path)) from None
    is_whole = isinstance(labels, list) and all(
        isinstance(row, list) and all(type(label) is int and 0 <= label < 1000 for label in row)
        for row in labels
    )
    if not is_whole:
        hint = (
            "a list with a list of classes, 0 to 999, for each of the 50,000 validation images in their order"
        )
        raise DataError("these are no ReaL labels", where=str(path), hint=hint)
    return labels


def real_labels_of(
    names: Sequence[str], labels: Sequence[Sequence[int]], class_names: tuple[str, ...]
) -> list[frozenset[int]]:
    """For each image of these names what `labels` says, by the model's own class numbers.

    DataError for images that are not ImageNet's validation images, and for classes that the model does not have.
    """
    numbers, (synsets, _) = numbers_by_name(class_names), _lists(1000)
    found, strangers, unknown = [], [], set()
    for name in names:
        match = re.search(r"ILSVRC2012_val_(\d{8})", os.path.basename(name))
        if match is None or not 1 <= int(match[1]) <= len(labels):
            strangers.append(name)
            continue
        of_image = [synsets[label] for label in labels[int(match[1]) - 1]]
        unknown |= {synset for synset in of_image if synset not in numbers}
        found.append(frozenset(numbers.get(synset, -1) for synset in of_image))
    if strangers:
        raise DataError(
            f"{len(strangers)} images are none of the {len(labels)} that the labels are for",
            where=strangers[0],
            hint="they are found by their names, ILSVRC2012_val_00000001.JPEG and on",
        )
    if unknown:
        some = ", ".join(sorted(unknown)[:10]) + (", ..." if len(unknown) > 10 else "")
        raise DataError(
            f"the model does not know {len(unknown)} classes of the labels: {some}", where="--labels"
        )
    return found
