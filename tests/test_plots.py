"""Figures show the data they are given, name their source, have a caption, and stay legible with any names."""

import base64
import io
import re
from itertools import combinations, pairwise

import numpy as np
import pytest
import torch
from matplotlib.text import Text
from PIL import Image

from session8 import plots
from session8.analysis import calibration, class_accuracy, confusion_matrix, misclassified, most_confused
from session8.augment import augment
from session8.config import Config
from session8.data import CLASSES, Split, synthetic_cifar10
from session8.inference import Prediction
from session8.lr_finder import LRRange

HISTORY = {
    "run": "a run",
    "train_loss": [1.5, 1.0, 0.75], "test_loss": [1.25, 0.9, 0.8125], "train_accuracy": [40.0, 60.0, 71.25],
    "test_accuracy": [50.0, 65.0, 69.5], "lr": [0.02, 0.1, 0.005], "seconds": [9.0, 8.0, 9.0],
}  # fmt: skip
NO_HISTORY = {name: [] for name in HISTORY}
RANGE = LRRange([0.001, 0.01, 0.1, 1.0], [2.3, 2.0, 1.5, 5.9], 0.01, diverged=True)
RUNS = [
    {"data": data, "device": device, "group": group, "label": label,
     "history": {"test_accuracy": accuracy, "seconds": [60.0] * len(accuracy)}}
    for data, device, group, label, accuracy in (
        ("CIFAR-10", "a GPU", "B", "lr 0.2, seed 0", [53.0, 59.0, 64.0]),
        ("CIFAR-10", "a CPU", "A", "_lr 0.1, seed 0", [50.0, 61.0]),
        ("CIFAR-10", "a CPU", "A", "lr 0.1, seed 1", [52.0, 60.0]),
        ("synthetic stand-in, NOT CIFAR-10", "a CPU", "C", "lr 0.1", [45.0]),
        ("CIFAR-10", "a TPU", "D", "unfinished", []),
    )
]  # fmt: skip
SPLIT = synthetic_cifar10(200, 10)[0]
# Outputs that are right for about two thirds of the images.
LOGITS = torch.from_numpy(3 * np.eye(10)[SPLIT.labels] + np.random.default_rng(0).normal(0, 1.5, (200, 10)))
# Names that are mathematics, hidden from legends, missing from the font, no Unicode, or too long.
ODD = ("猫", "개", "$a_b$", "_under", "قط", r"$\frac{$", "😀", "tab\tnew\nline", "\udce9", "a" * 70)


def images(ax):
    return [image.get_array() for image in ax.images]


def texts(artists):
    return [text.get_text().strip() for text in artists]


def cam_pair(actual="cat", predicted="dog"):
    cams = np.linspace(0, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
    right = {"right": SPLIT.images[0], "right_cam": cams[0], "right_confidence": 0.91}
    wrong = {"wrong": SPLIT.images[1], "wrong_cam": cams[1], "missed_cam": cams[2], "wrong_confidence": 0.82}
    return {"actual": actual, "predicted": predicted, **right, **wrong}


def every_figure(names, source):
    """Return every figure, with these names of classes, files, recipes, runs and devices, and this source of data."""
    split = Split(SPLIT.images, SPLIT.labels, source)
    confusion = confusion_matrix(LOGITS, split.labels)
    runs = [{**RUNS[0], "data": source, "label": name + ", a setting" * 20, "device": name} for name in names]
    predictions = [Prediction(f"{name}.png", SPLIT.images[0], list(names[:3]), [0.8, 0.1, 0.1]) for name in names]
    return {
        "samples": plots.plot_samples(split),
        "augmentations": plots.plot_augmentations(SPLIT.images[0], augment(SPLIT, 0, 23), source),
        "loss": plots.plot_loss(HISTORY, source),
        "accuracy": plots.plot_accuracy(HISTORY, source),
        "learning rate range": plots.plot_lr_range(RANGE, source),
        "training": plots.plot_training(HISTORY, source),
        "schedules": plots.plot_schedule({name: Config() for name in names}),
        "runs": plots.plot_runs(runs),
        "confusion": plots.plot_confusion(confusion, most_confused(confusion, names=names), source, names),
        "class accuracy": plots.plot_class_accuracy(class_accuracy(confusion), source, names),
        "calibration": plots.plot_calibration(calibration(LOGITS, split.labels), source),
        "misclassified": plots.plot_misclassified(split, misclassified(LOGITS, split.labels), names=names),
        "Grad-CAM": plots.plot_grad_cam([cam_pair(*pair) for pair in pairwise(names[-3:])], source),
        "predictions": plots.plot_predictions(predictions, source),
    }


@pytest.mark.filterwarnings("ignore:Glyph .* missing from font")
@pytest.mark.parametrize("names, source", [(CLASSES, "synthetic stand-in, NOT CIFAR-10"), (ODD, "/a $b$ \udce9" * 20)])
def test_every_figure_names_its_source_has_a_caption_and_no_overlapping_texts(names, source, monkeypatch):
    """Mathematics that cannot be parsed and names that are no Unicode would raise an error."""
    monkeypatch.setattr(plots, "CLASSES", names)
    for name, figure in every_figure(names, source).items():
        figure.draw_without_rendering()
        assert source[:3] in figure.get_suptitle() or name == "schedules"
        assert figure.caption.endswith(".")
        shown = [t for t in figure.findobj(Text) if t.get_visible() and re.search(r"[^\W\d]{2}", t.get_text())]
        boxes = [(text.get_text(), text.get_window_extent().padded(-2)) for text in shown]
        for (one, first), (other, second) in combinations(boxes, 2):
            assert not first.overlaps(second), (name, one, other)
        for text, box in boxes:
            assert box.min.min() > -2 and (box.max <= figure.bbox.max).all(), (name, text)  # inside of the figure


@pytest.mark.parametrize("n", [2, 20, 60])
def test_names_of_any_number_of_classes_do_not_overlap(n, monkeypatch):
    names = tuple(f"a class {label}" for label in range(n))
    monkeypatch.setattr(plots, "CLASSES", names)
    samples = plots.plot_samples(SPLIT, rows=1)
    matrix = plots.plot_confusion(np.full((n, n), 10) + np.diag([1000] * n), [], "source", names).axes[0]
    samples.draw_without_rendering()
    matrix.figure.draw_without_rendering()
    titles = [ax.title for ax in samples.axes]
    for row in (titles, matrix.get_yticklabels(), matrix.get_xticklabels(), matrix.texts[:n]):
        boxes = [text.get_window_extent().padded(-2) for text in row]
        assert not any(one.overlaps(other) for one, other in pairwise(boxes))


def test_jupyter_shows_the_figure_with_its_caption_as_text_and_as_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, **options: shown.append((data, options)))
    figure = plots.plot_accuracy(HISTORY, "source")
    figure.caption = "a_b * $c \udce9"
    figure._ipython_display_()
    (image, options), (caption, _) = shown
    assert Image.open(io.BytesIO(base64.b64decode(image["image/png"]))).width > 500
    assert options["metadata"]["image/png"]["alt"] == caption["text/plain"] == r"a_b * $c \udce9"
    assert caption["text/markdown"] == r"a\_b \* \$c \\udce9"


@pytest.mark.parametrize(
    "figure, words",
    [
        (lambda: plots.plot_loss(NO_HISTORY, "source"), "no complete epoch"),
        (lambda: plots.plot_accuracy(NO_HISTORY, "source"), "no complete epoch"),
        (lambda: plots.plot_training(NO_HISTORY, "source"), "no complete epoch"),
        (lambda: plots.plot_lr_range(LRRange([], [], None, False), "source"), "no range test.* cannot be copied"),
        (lambda: plots.plot_lr_range(LRRange([1], [2.3], None, False), "source"), "no suggestion.* a smaller start"),
        (lambda: plots.plot_misclassified(SPLIT, (np.array([], int), np.zeros((0, 10)))), "no mistakes to show"),
        (lambda: plots.plot_confusion(5 * np.eye(10, dtype=int), [], "source"), "no mistakes"),
        (lambda: plots.plot_grad_cam([], "source"), "no pairs"),
        (lambda: plots.plot_runs([]), "no finished runs"),
        (lambda: plots.plot_runs(RUNS[-1:]), "no finished runs"),
    ],
)
def test_figures_say_that_there_is_nothing_to_show(figure, words):
    figure = figure()
    figure.draw_without_rendering()
    assert re.search(words, figure.caption)


def test_samples_show_each_class_under_its_name():
    axes = np.reshape(plots.plot_samples(SPLIT, rows=4).axes, (4, 10))
    assert [ax.get_title() for ax in axes[0]] == list(CLASSES)
    for label, column in enumerate(axes.T):
        drawn = {images(ax)[0].tobytes() for ax in column}
        assert len(drawn) == 4 and drawn <= {image.tobytes() for image in SPLIT.images[SPLIT.labels == label]}
    few = plots.plot_samples(synthetic_cifar10(20, 10)[0], rows=4)
    assert sum(len(ax.images) for ax in few.axes) == 20


def test_augmentations_show_the_original_and_every_draw():
    draws = augment(SPLIT, 5, 23)
    axes = plots.plot_augmentations(SPLIT.images[5], draws, "source").axes
    assert np.array_equal([images(ax)[0] for ax in axes], [SPLIT.images[5], *draws])


def test_misclassified_grid_shows_images_labels_and_the_three_likeliest_classes():
    mistakes = misclassified(LOGITS, SPLIT.labels)
    figure = plots.plot_misclassified(SPLIT, mistakes)
    assert f"{len(mistakes[0])} of 200 misclassified ({len(mistakes[0]) / 2:.1f} %)" in figure.get_suptitle()
    marked = 0
    for ax, side, index, probabilities in zip(figure.axes[::2], figure.axes[1::2], *mistakes, strict=False):
        assert np.array_equal(images(ax)[0], SPLIT.images[index])
        actual, top = CLASSES[SPLIT.labels[index]], sorted(zip(-probabilities, CLASSES, strict=True))[:3]
        caption = f"pred. {top[0][1]}, {100 * probabilities.max():.0f} %\nactual {actual}"
        assert ax.get_title(loc="left") == caption
        assert [(-bar.get_width(), text.get_text()) for bar, text in zip(side.patches, side.texts, strict=True)] == top
        bold = [text.get_text() for text in side.texts if text.get_fontweight() == "bold"]
        assert bold == [actual] * (actual in texts(side.texts))
        marked += len(bold)
    assert marked > 3
    chosen = plots.plot_misclassified(SPLIT, mistakes, rows=1, which="cat taken for dog")
    assert f"cat taken for dog, {len(mistakes[0])} images: " in chosen.get_suptitle() and len(chosen.axes) == 8


def test_grad_cam_shows_right_beside_wrong():
    pair = cam_pair()
    right, wrong = pair["right"], pair["wrong"]
    expected = [
        ("cat, correct", [right]), ("for cat, 91 %", [right, pair["right_cam"]]), ("cat, mistake", [wrong]),
        ("for dog, 82 %", [wrong, pair["wrong_cam"]]), ("for cat", [wrong, pair["missed_cam"]]),
    ]  # fmt: skip
    for ax, (title, arrays) in zip(plots.plot_grad_cam([pair], "source").axes, expected, strict=True):
        assert ax.get_title() == title and len(images(ax)) == len(arrays)
        assert all(map(np.array_equal, images(ax), arrays))


def test_predictions_show_each_image_with_its_classes():
    one = Prediction("folder/one.png", SPLIT.images[0], ["cat", "dog"], [0.8, 0.15])
    other = Prediction("a very long name of a file indeed.jpg", SPLIT.images[1], ["ship", "frog"], [0.6, 0.4])
    figure = plots.plot_predictions([one, other], "my photos")
    left, bars, right, *_ = figure.axes
    assert left.get_title(loc="left") == "one.png" and right.get_title(loc="left") == "a very lon… indeed.jpg"
    assert np.array_equal(images(left)[0], one.image) and np.array_equal(images(right)[0], other.image)
    assert texts(bars.texts) == ["cat 80 %", "dog 15 %"] and [bar.get_width() for bar in bars.patches] == [0.8, 0.15]
    assert "one.png: cat 80 %; a very long name of a file indeed.jpg: ship 60 %" in figure.caption


@pytest.mark.parametrize(
    "plot, curves, words",
    [
        (plots.plot_loss, [HISTORY["train_loss"], HISTORY["test_loss"]], "3 epochs: train 0.750, test 0.812"),
        (plots.plot_accuracy, [HISTORY["train_accuracy"], HISTORY["test_accuracy"]], "train 71.25 %, test 69.50 %"),
        (plots.plot_training, [[-10.0, -5.0, 1.75], HISTORY["lr"], HISTORY["seconds"]], "1.75 in the last. .* 9 s"),
    ],
)
def test_curves_show_the_history(plot, curves, words):
    figure = plot(HISTORY, "source")
    lines = [line for ax in figure.axes for line in ax.lines if len(line.get_xdata()) == 3]
    assert [line.get_ydata().tolist() for line in lines] == curves and re.search(words, figure.caption)
    assert all(line.get_xdata().tolist() == [1, 2, 3] for line in lines)


def test_schedule_shows_the_rate_at_every_moment():
    configs = {"default": Config(epochs=10), "one_cycle": Config(schedule="one_cycle", epochs=20, lr=0.2)}
    flat, cycle = (line.get_xydata() for line in plots.plot_schedule(configs).axes[0].lines)
    assert (flat[:, 1] == 0.01).all() and flat[-1, 0] == pytest.approx(10, abs=0.01)
    expected = np.interp(cycle[:, 0], [0, 5, 20], [0, 0.2, 0])  # warm-up over a quarter, then down to zero
    np.testing.assert_allclose(cycle[:, 1], expected, atol=1e-3)
    assert cycle[0, 0] < 0.01 and cycle[-1, 0] > 19.99


def test_runs_are_compared_over_epochs_and_on_one_device_over_minutes():
    figure = plots.plot_runs(RUNS)
    by_epochs, by_minutes = figure.axes
    assert [list(line.get_ydata()) for line in by_epochs.lines] == [run["history"]["test_accuracy"] for run in RUNS]
    assert [line.get_xdata().tolist() for line in by_epochs.lines] == [[1, 2, 3], [1, 2], [1, 2], [1], []]
    assert [line.get_xdata().tolist() for line in by_minutes.lines] == [[1, 2], [1, 2], [1]]  # without the GPU
    assert "a CPU" in by_minutes.get_xlabel() and "only runs on a CPU" in figure.caption
    colors = [line.get_color() for line in by_epochs.lines]
    assert colors[1] == colors[2] and len(set(colors)) == 4  # the seed alone makes no other colour
    assert texts(figure.legends[0].texts) == [run["label"] for run in RUNS]
    assert "NOT CIFAR-10" in figure.get_suptitle() and "lr 0.1, seed 1: 60.00 %; lr 0.1: 45.00 %." in figure.caption


def test_range_test_is_plotted_with_the_suggested_rate_marked():
    figure = plots.plot_lr_range(RANGE, "source")
    (ax,) = figure.axes
    curve, suggested = ax.lines
    assert curve.get_xydata().T.tolist() == [RANGE.lr, RANGE.loss]
    assert set(suggested.get_xdata()) == {RANGE.suggestion} and ax.get_xscale() == "log"
    low, high = ax.get_ylim()
    assert low < 1.5 < 2.3 < high < 5  # the explosion at the end does not flatten what matters
    assert re.search("2.30 to .*, 1.50, at .* 0.1. .* is 0.01. Above 1 training diverged", figure.caption)


def test_confusion_shows_percent_of_each_row_and_the_pairs():
    confusion = confusion_matrix(LOGITS, SPLIT.labels)
    pairs = most_confused(confusion)
    figure = plots.plot_confusion(confusion, pairs, "source")
    matrix, side = figure.axes
    percent = 100 * confusion / confusion.sum(1, keepdims=True)
    assert texts(matrix.texts) == [f"{value:.1f}" for value in percent.flat]
    assert np.isnan(np.diag(images(matrix)[0].filled(np.nan))).all()  # hits are not coloured
    assert texts(matrix.get_yticklabels()) == texts(matrix.get_xticklabels()) == list(CLASSES)
    actual, predicted, count = pairs[0]
    assert f"{count}  {actual} as {predicted}" in side.texts[0].get_text()
    assert f": {actual} predicted as {predicted} ({count} images), " in figure.caption


def test_class_accuracy_shows_every_class_with_its_interval():
    confusion = confusion_matrix(LOGITS, SPLIT.labels)
    confusion[4] = 0  # an absent class
    accuracy, low, high = class_accuracy(confusion)
    figure = plots.plot_class_accuracy((accuracy, low, high), "source")
    (ax,) = figure.axes
    worst, *_ = order = [label for label in np.argsort(accuracy) if label != 4]
    assert texts(ax.get_yticklabels()) == [f"{CLASSES[label]}  {accuracy[label]:.1f}" for label in order]
    segments = ax.collections[0].get_segments()
    assert np.allclose([segment[:, 0] for segment in segments], np.stack([low, high], 1)[order])
    assert f": {CLASSES[worst]}, {accuracy[worst]:.1f} % ({low[worst]:.1f} to {high[worst]:.1f}). " in figure.caption


def test_calibration_shows_the_filled_bins_and_the_error():
    result = calibration(LOGITS, SPLIT.labels, bins=10)
    assert (result.count == 0).any()
    figure = plots.plot_calibration(result, "source")
    ax, below = figure.axes
    shown = 100 * np.stack([result.confidence, result.accuracy], 1)[result.count > 0]
    assert np.allclose(ax.lines[1].get_xydata(), shown)
    assert [bar.get_height() for bar in below.patches] == result.count.tolist()
    accuracy = 100 * (LOGITS.argmax(1).numpy() == SPLIT.labels).mean()
    assert f", accuracy {accuracy:.1f} %. Expected calibration error: {100 * result.error:.1f} points" in figure.caption
