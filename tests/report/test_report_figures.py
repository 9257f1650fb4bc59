import itertools
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.transforms import Bbox

from mixlab.errors import DiskError
from mixlab.report.figures import (
    confusion_matrix,
    coverage_curve,
    learning_curves,
    picture_grid,
    reliability_diagram,
    save_figure,
    smooth,
)

LONG_NAMES = [
    "automobile_with_trailer",
    "cat",
    r"a$\frac$c",
    "a class whose name is so long that nobody says it",
]


def train_row(step: int, **values: object) -> dict[str, Any]:
    row = {"event": "train", "step": step, "epoch": step / 10, "loss": 1.0 / step, "accuracy": step / 100}
    return row | {"lr": 1e-3, "images_per_second": 900.0, "seconds": 1.0} | values


def validation_row(step: int) -> dict[str, Any]:
    return {"event": "validation", "step": step, "epoch": step / 10, "loss": 0.4, "top1": 0.8, "seconds": 1.0}


def draw(figure: Figure) -> Any:
    """Lays the figure out, as saving does, and returns the renderer that knows the sizes of texts."""
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    return canvas.get_renderer()


def boxes(texts: list[Text], renderer: Any) -> list[Bbox]:
    return [text.get_window_extent(renderer) for text in texts if text.get_text()]


def panels(figure: Figure) -> list[Any]:
    """The axes, as Any: matplotlib's stubs allow for kinds of data that are not in these figures."""
    return list(figure.axes)


def overlapping(extents: list[Bbox]) -> int:
    return sum(
        min(a.x1, b.x1) > max(a.x0, b.x0) and min(a.y1, b.y1) > max(a.y0, b.y0)
        for a, b in itertools.combinations(extents, 2)
    )


def confusion(num_classes: int, most: int = 300) -> Figure:
    random = np.random.default_rng(0)
    counts = random.poisson(0.3, (num_classes, num_classes))
    np.fill_diagonal(counts, random.integers(most // 2, most, num_classes))
    return confusion_matrix(counts, [f"{LONG_NAMES[i % 4]} {i}" for i in range(num_classes)])


def test_learning_curves_show_training_and_validation_by_epoch() -> None:
    figure = learning_curves(
        [train_row(10), train_row(20), validation_row(20), {"event": "resume", "step": 20}]
    )
    loss, accuracy, lr, speed = panels(figure)
    assert [line.get_label() for line in loss.lines] == ["training loss", "validation loss"]
    assert loss.lines[0].get_xydata().tolist() == [[1.0, 0.1], [2.0, 0.05]]
    assert accuracy.lines[1].get_xydata().tolist() == [[2.0, 0.8]]
    assert lr.lines[0].get_ydata().tolist() == [1e-3, 1e-3]
    assert speed.lines[0].get_ydata().tolist() == [900.0, 900.0]
    draw(figure)
    assert all(label.get_text().endswith("%") for label in accuracy.get_yticklabels())


def test_a_single_validation_point_can_be_seen() -> None:
    figure = learning_curves([train_row(1), train_row(2), validation_row(2)])
    draw(figure)
    assert panels(figure)[0].lines[1].get_marker() not in ("", "None", None)


def test_rows_without_a_value_are_skipped_in_that_panel_only() -> None:
    figure = learning_curves([train_row(1, accuracy=None), train_row(2, loss=None), train_row(3, lr=None)])
    draw(figure)
    assert panels(figure)[0].lines[0].get_xdata().tolist() == [0.1, 0.3]
    assert panels(figure)[1].lines[0].get_xdata().tolist() == [0.2, 0.3]


def test_panels_without_any_value_say_so() -> None:
    figure = learning_curves([train_row(1, accuracy=None, lr=0.0, images_per_second=0)])
    draw(figure)
    said = [[text.get_text() for text in ax.texts] for ax in panels(figure)]
    assert said == [[], ["not recorded"], [], []]


@pytest.mark.parametrize("num_classes", [2, 20, 100])
def test_no_texts_of_the_confusion_figure_overlap(num_classes: int) -> None:
    figure = confusion(num_classes)
    renderer = draw(figure)
    ax = panels(figure)[0]
    horizontal = boxes(ax.get_xticklabels(), renderer)
    vertical = boxes(ax.get_yticklabels(), renderer)
    assert len(horizontal) == len(vertical) == num_classes
    axis_labels = boxes([ax.xaxis.label, ax.yaxis.label], renderer)
    assert overlapping(horizontal + vertical + axis_labels + boxes(list(ax.texts), renderer)) == 0
    texts: list[Any] = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    assert min(text.get_fontsize() for text in texts) >= 8
    inside = Bbox.from_extents(0, 0, *figure.canvas.get_width_height())
    assert all(
        inside.contains(box.x0, box.y0) and inside.contains(box.x1, box.y1) for box in horizontal + vertical
    )


def test_counts_stay_inside_their_cells_however_many_images_there_are() -> None:
    figure = confusion(20, most=900_000)
    renderer = draw(figure)
    ax = panels(figure)[0]
    cell = ax.get_window_extent(renderer).width / 20
    assert max(box.width for box in boxes(list(ax.texts), renderer)) < cell


def test_beyond_what_a_page_can_hold_only_some_classes_are_labelled() -> None:
    num_classes = 200
    figure = confusion_matrix(np.eye(num_classes, dtype=int), [f"class {i}" for i in range(num_classes)])
    renderer = draw(figure)
    labels = boxes(panels(figure)[0].get_yticklabels(), renderer)
    assert len(labels) == 100
    assert overlapping(labels) == 0
    assert max(figure.get_size_inches()) < 35


def test_confusion_colours_are_shares_of_the_row_and_counts_are_written() -> None:
    figure = confusion_matrix(np.array([[8, 2], [0, 0]]), ["cat", "dog"])
    ax = panels(figure)[0]
    assert ax.images[0].get_array().tolist() == [[0.8, 0.2], [0.0, 0.0]]
    assert {(text.get_position(), text.get_text()) for text in ax.texts} == {((0, 0), "8"), ((1, 0), "2")}
    assert [label.get_text() for label in ax.get_yticklabels()] == ["cat", "dog"]


def test_confusion_counts_must_fit_the_class_names() -> None:
    with pytest.raises(ValueError, match="3 class names"):
        confusion_matrix(np.eye(2, dtype=int), ["a", "b", "c"])


def test_long_curves_are_smoothed_with_the_values_thin_behind() -> None:
    rows = [train_row(step, loss=1.0 + step % 2) for step in range(1, 201)]
    behind, line = panels(learning_curves(rows))[0].lines
    assert sorted(set(behind.get_ydata())) == [1.0, 2.0]
    assert len(line.get_ydata()) == 200
    assert np.ptp(line.get_ydata()) < 0.2
    assert line.get_label() == "training loss"
    assert len(panels(learning_curves(rows))[2].lines) == 1


def test_smoothing_is_numpys_mean_of_the_neighbours() -> None:
    values = np.random.default_rng(0).normal(size=30)
    smoothed = smooth(values, 5)
    assert smoothed[2:-2] == pytest.approx(np.convolve(values, np.ones(5) / 5, "valid"))
    assert smoothed[0] == pytest.approx(values[:3].mean())
    assert smooth(values, 1) == pytest.approx(values)


def test_the_coverage_curve_ends_at_the_accuracy_of_all() -> None:
    confidence, correct = np.array([0.9, 0.5, 0.8, 0.6]), np.array([True, False, True, True])
    figure = coverage_curve(confidence, correct, (0.75, 1.0))
    draw(figure)
    curve, chosen = panels(figure)[0].lines
    assert curve.get_xydata().tolist() == [[0.25, 1.0], [0.5, 1.0], [0.75, 1.0], [1.0, 0.75]]
    assert chosen.get_xydata().tolist() == [[0.75, 1.0]]


def test_the_reliability_diagram_skips_empty_bins() -> None:
    bins: list[dict[str, Any]] = [
        {"lower": 0.0, "upper": 0.5, "num_images": 0, "accuracy": None, "confidence": None},
        {"lower": 0.5, "upper": 0.75, "num_images": 4, "accuracy": 0.75, "confidence": 0.6},
        {"lower": 0.75, "upper": 1.0, "num_images": 9, "accuracy": 0.8, "confidence": 0.95},
    ]
    figure = reliability_diagram(bins, 0.123)
    draw(figure)
    top, bottom = panels(figure)
    accuracy, gap = top.containers
    assert [bar.get_height() for bar in accuracy] == [0.75, 0.8]
    assert [(bar.get_y(), bar.get_height()) for bar in gap] == [
        (0.6, pytest.approx(0.15)),
        (0.8, pytest.approx(0.15)),
    ]
    assert [(bar.get_x(), bar.get_height()) for bar in bottom.containers[0]] == [(0.5, 4), (0.75, 9)]
    assert "12.3 points" in top.get_title(loc="left")


def test_a_reliability_diagram_without_any_image_can_be_drawn() -> None:
    draw(reliability_diagram([], 0.0))


def test_captions_of_the_gallery_never_overlap_each_other_or_a_picture() -> None:
    shapes = [(8, 8, 1), (32, 32, 3), (40, 20, 3), (300, 500, 3)]
    images = [np.zeros(shapes[i % 4], dtype=np.uint8) for i in range(19)]
    captions = [r"true: $\frac$" + "\nsaid: " + "W" * 200 + r" $\frac$ 97 %", "short", "W " * 90]
    figure = picture_grid(images, [captions[i % 3] for i in range(19)])
    renderer = draw(figure)
    pictures = [ax.get_window_extent(renderer) for ax in panels(figure)]
    texts = boxes(list(figure.texts), renderer)
    assert len(pictures) == len(texts) == 19
    assert overlapping(pictures + texts) == 0
    assert min(box.y0 for box in texts) >= 0
    assert min(box.x0 for box in texts) >= 0


def test_grey_and_coloured_pictures_are_shown_with_their_own_values() -> None:
    grey, colour = np.full((2, 2, 1), 100, np.uint8), np.full((2, 3, 3), 7, np.uint8)
    figure = picture_grid([grey, colour], ["grey", "colour"])
    first, second = (ax.images[0] for ax in panels(figure))
    assert (first.get_clim(), first.get_array().shape) == ((0, 255), (2, 2))
    assert np.array_equal(second.get_array(), colour)
    assert first.get_interpolation() == "nearest"
    assert [text.get_text() for text in figure.texts] == ["grey", "colour"]


def test_a_gallery_needs_a_caption_for_each_picture() -> None:
    with pytest.raises(ValueError, match="1 images and 2 captions"):
        picture_grid([np.zeros((2, 2, 1), np.uint8)], ["a", "b"])


def test_a_saved_figure_is_a_png_with_the_same_bytes_each_time(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        save_figure(confusion_matrix(np.eye(2, dtype=int), ["cat", "猫"]), tmp_path / name)
    content = (tmp_path / "a.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert content == (tmp_path / "b.png").read_bytes()
    assert b"tEXt" not in content
    assert sorted(os.listdir(tmp_path)) == ["a.png", "b.png"]


def test_a_figure_that_cannot_be_saved_leaves_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.png"
    path.write_bytes(b"old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(DiskError, match="No space left"):
        save_figure(learning_curves([]), path)
    assert path.read_bytes() == b"old"
    assert os.listdir(tmp_path) == ["a.png"]
