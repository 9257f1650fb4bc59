"""ImageNet's names and ReaL's labels, against timm, which brings both."""

import json

import pytest
from timm.data import ImageNetInfo

from mixlab.data.images.imagenet import numbers_by_name, read_real_labels, real_labels_of, usual_class_names
from mixlab.errors import DataError

WORDS = usual_class_names(1000)


@pytest.mark.parametrize(
    ("num_classes", "subset"),
    [(1000, "imagenet-1k"), (11221, "imagenet-21k-miil"), (21843, "imagenet-21k-goog")],
)
def test_a_published_heads_classes_are_found_by_synset_whatever_the_head_calls_them(num_classes, subset):
    synsets = tuple(ImageNetInfo(subset).label_names())
    for class_names in (usual_class_names(num_classes), synsets):
        numbers = numbers_by_name(class_names)
        assert [numbers[name] for name in synsets] == list(range(num_classes))
        assert [numbers[name] for name in class_names] == list(range(num_classes))


def test_all_classes_of_imagenet_1k_but_the_teddy_are_found_in_googles_21k():
    numbers = numbers_by_name(usual_class_names(21843))
    assert [name for name in ImageNetInfo("imagenet-1k").label_names() if name not in numbers] == [
        "n04399382"
    ]


def test_words_stand_for_a_class_where_they_stand_for_one_only():
    numbers = numbers_by_name(WORDS)
    assert numbers["tench, Tinca tinca"] == numbers["tench"] == numbers["Tinca tinca"] == 0
    assert "crane" not in numbers  # a bird and a machine
    assert (WORDS[134], WORDS[517]) == ("crane (n02012849)", "crane (n03126707)")
    assert (numbers["crane (n02012849)"], numbers["n03126707"]) == (134, 517)
    # With synsets of its own a model knows the whole words too.
    by_synset = numbers_by_name(tuple(ImageNetInfo("imagenet-1k").label_names()))
    assert by_synset["tench, Tinca tinca"] == 0


def test_models_of_other_classes_know_their_own_names_only():
    assert numbers_by_name(("n01440764", "cat")) == {"n01440764": 0, "cat": 1}
    own = tuple(str(number) for number in range(1000))
    assert len(numbers_by_name(own)) == 1000


def test_timms_copy_of_the_labels_is_called_real_and_a_file_is_read_alike(tmp_path):
    labels = read_real_labels("real")
    assert len(labels) == 50_000
    assert sum(1 for row in labels if row) == 46_837  # as many as the paper measures on
    (tmp_path / "real.json").write_text(json.dumps(labels))
    assert read_real_labels(str(tmp_path / "real.json")) == labels


@pytest.mark.parametrize("text", ["{}", "[1, 2]", "[[1000]]", "[[true]]", "[[0.5]]", "[[1]", ""])
def test_what_is_no_list_of_labels_is_refused(text, tmp_path):
    (tmp_path / "real.json").write_text(text)
    with pytest.raises(DataError, match=r"no ReaL labels|cannot be read") as caught:
        read_real_labels(str(tmp_path / "real.json"))
    assert "real.json" in caught.value.where


def test_labels_follow_the_number_in_an_images_name_and_the_models_own_classes():
    labels = [[0], [], [1, 2]]
    names = [
        "x/ILSVRC2012_val_00000003.JPEG",
        "ILSVRC2012_val_00000001.png",
        "b/ILSVRC2012_val_00000002.JPEG",
    ]
    assert real_labels_of(names, labels, WORDS) == [{1, 2}, {0}, set()]
    large = real_labels_of(names, labels, usual_class_names(21843))
    google = ImageNetInfo("imagenet-21k-goog").label_names()
    assert [google[number] for number in large[1]] == ["n01440764"]
    for stranger in ("ILSVRC2012_val_00000004.JPEG", "ILSVRC2012_val_00000000.JPEG", "cat.JPEG"):
        with pytest.raises(DataError, match="1 images are none of the 3"):
            real_labels_of([*names, stranger], labels, WORDS)
    with pytest.raises(DataError, match="does not know 3 classes of the labels: n01440764, n01443537"):
        real_labels_of(names, labels, ("cat", "dog"))
