"""Figures show the data they are given, name their source, are legible, and have a caption."""

import base64
import io
from itertools import pairwise

import numpy as np
import pytest
import torch
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager
from matplotlib.text import Text
from PIL import Image

from session8 import plots
from session8.analysis import CamPair, Misclassified, calibration, class_accuracy, confusion_matrix, most_confused
from session8.augment import augment
from session8.config import Config
from session8.data import CLASSES, Split, synthetic_cifar10
from session8.inference import Prediction
from session8.lr_finder import LRRange

HISTORY = {
    "train_loss": [1.5, 1.0, 0.75], "test_loss": [1.25, 0.9, 0.8125], "train_accuracy": [40.0, 60.0, 71.25],
    "test_accuracy": [50.0, 65.0, 69.5], "lr": [0.02, 0.1, 0.005], "seconds": [9.0, 9.0, 9.0],
}  # fmt: skip
RANGE = LRRange([0.001, 0.01, 0.1, 1.0], [2.3, 2.0, 1.5, 5.9], 0.01, diverged=True)


def shown(figure):
    """The images of a figure, in the order of its axes."""
    return [ax.images[0].get_array() for ax in figure.axes if ax.images]


def title(figure):
    return figure.get_suptitle() or figure.axes[0].get_title()


@pytest.fixture(scope="module")
def split():
    return synthetic_cifar10(200, 10)[0]


@pytest.fixture(scope="module")
def mistakes():
    probabilities = np.full((3, 10), 0.001, np.float32)
    for row, (predicted, confidence) in zip(probabilities, [(1, 0.987), (2, 0.8), (4, 0.5)], strict=True):
        row[predicted] = confidence
    return Misclassified(np.array([7, 3, 11]), probabilities)


@pytest.fixture(scope="module")
def logits(split):
    """Outputs that are right for about two thirds of the images."""
    rng = np.random.default_rng(0)
    return torch.from_numpy(3 * np.eye(10)[split.labels] + rng.normal(0, 1.5, (len(split), 10)))


@pytest.fixture(scope="module")
def cams(split):
    maps = np.linspace(0, 1, 3 * 32 * 32, dtype=np.float32).reshape(3, 32, 32)
    return [
        CamPair("cat", "dog", split.images[0], maps[0], 0.91, split.images[1], maps[1], maps[2], 0.82),
        CamPair("ship", "frog", split.images[2], maps[0], 0.73, split.images[3], maps[1], maps[2], 0.64),
    ]


RUNS = [
    {
        "data": data, "device": device, "group": group, "label": f"lr {lr}, seed {seed}",
        "history": {"test_accuracy": accuracy, "seconds": [60.0] * len(accuracy)},
    }
    for data, device, group, lr, seed, accuracy in (
        ("CIFAR-10, class folders", "a CPU", "A", 0.1, 0, [50.0, 61.0]),
        ("CIFAR-10, class folders", "a CPU", "A", 0.1, 1, [52.0, 60.0]),
        ("CIFAR-10, class folders", "a GPU", "B", 0.2, 0, [53.0, 59.0, 64.0]),
        ("synthetic stand-in, NOT CIFAR-10", "a CPU", "C", 0.1, 0, [45.0]),
    )
]  # fmt: skip


def test_runs_are_compared_over_epochs_and_on_one_device_over_minutes():
    figure = plots.plot_runs(RUNS)
    by_epochs, by_minutes = figure.axes
    assert [line.get_xdata().tolist() for line in by_epochs.lines] == [[1, 2], [1, 2], [1, 2, 3], [1]]
    assert [line.get_xdata().tolist() for line in by_minutes.lines] == [[1, 2], [1, 2], [1]]  # without the GPU
    assert "a CPU" in by_minutes.get_xlabel()
    colors = [line.get_color() for line in by_epochs.lines]
    assert colors[0] == colors[1] and len(set(colors)) == 3
    looks = {(line.get_linestyle(), line.get_marker()) for line in by_epochs.lines}
    assert len(looks) == 4 and "NOT CIFAR-10" in figure.get_suptitle()
    assert "64.00 %: lr 0.2, seed 0" in figure.caption
    assert "no finished runs" in plots.plot_runs([]).caption


def test_the_legend_of_many_runs_with_long_labels_stays_in_the_figure():
    figure = plots.plot_runs([{**RUNS[0], "label": f"run {index}, " + "some setting 1, " * 12} for index in range(12)])
    figure.draw_without_rendering()
    legend, size = figure.legends[0].get_window_extent(), figure.bbox
    assert legend.x0 >= 0 and legend.x1 <= size.x1 and legend.y0 >= 0
    assert all(ax.get_window_extent().height > 0.25 * size.height for ax in figure.axes)


@pytest.fixture(scope="module")
def every_figure(split, mistakes, logits, cams):
    confusion = confusion_matrix(logits, split.labels)
    return {
        "samples": plots.plot_samples(split),
        "augmentations": plots.plot_augmentations(split.images[0], augment(split, 0, 23), split.source),
        "loss": plots.plot_loss(HISTORY, split.source),
        "accuracy": plots.plot_accuracy(HISTORY, split.source),
        "learning rate range": plots.plot_lr_range(RANGE, split.source),
        "training": plots.plot_training(HISTORY, split.source),
        "confusion": plots.plot_confusion(confusion, most_confused(confusion), split.source),
        "class accuracy": plots.plot_class_accuracy(class_accuracy(confusion), split.source),
        "misclassified": plots.plot_misclassified(split, mistakes),
        "Grad-CAM": plots.plot_grad_cam(cams, split.source),
        "calibration": plots.plot_calibration(calibration(logits, split.labels), split.source),
        "runs": plots.plot_runs(RUNS),
        "predictions": plots.plot_predictions([Prediction("one.png", split.images[0], ["cat"], [0.8])], split.source),
    }


@pytest.fixture
def font_with_a_cat(tmp_path):
    """Install a font that has one character, the Chinese for cat."""
    font = FontBuilder(1000)
    font.setupGlyphOrder([".notdef", "cat"])
    font.setupCharacterMap({ord("猫"): "cat"})
    pen = TTGlyphPen(None)
    for number, point in enumerate([(0, 0), (0, 800), (800, 800), (800, 0)]):
        pen.lineTo(point) if number else pen.moveTo(point)
    pen.closePath()
    glyph = pen.glyph()
    font.setupGlyf({".notdef": glyph, "cat": glyph})
    font.setupHorizontalMetrics({name: (900, 0) for name in (".notdef", "cat")})
    font.setupHorizontalHeader(ascent=800, descent=0)
    font.setupNameTable({"familyName": "Only Cats", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "cats.ttf")
    before = list(fontManager.ttflist)
    fontManager.addfont(tmp_path / "cats.ttf")
    plots._font_with.cache_clear()
    yield
    fontManager.ttflist[:] = before
    plots._font_with.cache_clear()


ODD = ("猫", "개", "$a_b$", "_under", "قط", r"$\frac{", "😀", "tab\tnew\nline", "\udce9", "a" * 70)


def figures_of_odd_names(split, mistakes, cams, monkeypatch):
    """Return every figure that draws names, with odd names of classes, files, data, recipes, runs and devices."""
    monkeypatch.setattr(plots, "CLASSES", ODD)
    source = "/a $folder$ of_猫" * 9
    split = Split(split.images, split.labels, source)
    confusion = np.ones((10, 10), int)
    return {
        "samples": plots.plot_samples(split),
        "loss": plots.plot_loss(HISTORY, source),
        "training": plots.plot_training(HISTORY, source),
        "confusion": plots.plot_confusion(confusion, most_confused(confusion, names=ODD), source, ODD),
        "class accuracy": plots.plot_class_accuracy(class_accuracy(confusion), source, ODD),
        "misclassified": plots.plot_misclassified(split, mistakes, names=ODD),
        "Grad-CAM": plots.plot_grad_cam([cams[0]._replace(actual=name, predicted=name) for name in ODD], source),
        "runs": plots.plot_runs([{**RUNS[0], "label": name, "device": name} for name in ODD]),
        "schedules": plots.plot_schedule({name: Config() for name in ODD}),
        "predictions": plots.plot_predictions([Prediction(n, split.images[0], [n], [0.8]) for n in ODD], source),
    }


def test_figures_draw_any_name(split, mistakes, cams, monkeypatch):
    """A warning, such as that of a missing glyph, and mathematics that cannot be parsed are errors here."""
    for name, figure in figures_of_odd_names(split, mistakes, cams, monkeypatch).items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        width, height = Image.open(buffer).size
        assert width < 1400 and height < 3000, name
        figure.caption.encode()
    shown = [text.get_text() for text in plots.plot_schedule({n: Config() for n in ODD}).axes[0].get_legend().texts]
    assert len(shown) == len(ODD)
    assert [text.removesuffix(" (peak: 0.01)") for text in shown[:4]] == [r"\u732b", r"\uac1c", "$a_b$", " _under"]


def test_a_font_that_has_the_characters_is_used(font_with_a_cat, split):
    figure = plots.plot_predictions([Prediction("猫.png", split.images[0], ["猫 개"], [0.8])], "猫")
    figure.savefig(io.BytesIO(), format="png")
    assert figure.axes[0].get_title(loc="left") == "猫.png" and title(figure) == "Predictions: 猫"
    (label,) = figure.axes[1].texts
    assert label.get_text() == r"猫 \uac1c 80 %" and label.get_fontfamily()[-1] == "Only Cats"


def test_every_title_names_the_source(every_figure):
    for name, figure in every_figure.items():
        assert isinstance(figure, Figure)
        assert "NOT CIFAR-10" in title(figure), name


def test_every_figure_has_a_caption_in_words(every_figure):
    captions = [figure.caption for figure in every_figure.values()]
    assert all(len(caption) > 20 and caption.endswith(".") for caption in captions)
    assert len(set(captions)) == len(captions)


@pytest.mark.parametrize(
    "name, said",
    [
        ("loss", "Loss after 3 epochs: train 0.750, test 0.812. The test loss was lowest after epoch 3 (0.812)."),
        ("accuracy", "Accuracy after 3 epochs: train 71.25 %, test 69.50 %."),
        ("training", "Train minus test accuracy: -10.00 points in the first epoch, 1.75 in the last. Median time of an "
                     "epoch: 9 s (9 to 9 s)."),
        ("learning rate range", "The loss falls from 2.30 to its minimum, 1.50, at a learning rate of 0.1. The "
                                "suggestion, in the middle of the longest valley, is 0.01. Above 1 training diverged."),
        ("predictions", "Most probable class per file. one.png: cat 80 %."),
        ("Grad-CAM", "Rows: cat, and cat predicted as dog; ship, and ship predicted as frog."),
    ],
)  # fmt: skip
def test_captions_state_what_the_figure_shows(every_figure, name, said):
    assert every_figure[name].caption == said


def test_captions_of_the_error_analysis_agree_with_the_data(every_figure, split, logits, mistakes):
    confusion = confusion_matrix(logits, split.labels)
    worst = most_confused(confusion)[0]
    expected = f"Most frequent confusions: {worst.actual} predicted as {worst.predicted} ({worst.count} images), "
    assert every_figure["confusion"].caption.startswith(expected)
    accuracy = 100 * confusion.diagonal() / confusion.sum(1)
    low = int(accuracy.argmin())
    assert f"Lowest accuracy: {CLASSES[low]}, {accuracy[low]:.1f} % (" in every_figure["class accuracy"].caption
    overall = 100 * confusion.trace() / confusion.sum()
    assert f", accuracy {overall:.1f} %. Expected" in every_figure["calibration"].caption
    first = CLASSES[split.labels[mistakes.index[0]]]
    assert every_figure["misclassified"].caption.startswith(
        f"Shown, row by row: {first} predicted as automobile (99 %)"
    )


def test_jupyter_shows_the_figure_with_its_caption_as_text_and_as_alternative_text(monkeypatch):
    shown = []
    monkeypatch.setattr("IPython.display.display", lambda data, raw, **options: shown.append((data, options)))
    figure = plots.plot_accuracy(HISTORY, "source")
    figure.caption = "a_b * c"
    figure._ipython_display_()
    (image, options), (caption, _) = shown
    assert Image.open(io.BytesIO(base64.b64decode(image["image/png"]))).width > 500
    assert options["metadata"]["image/png"]["alt"] == "a_b * c"
    assert caption == {"text/markdown": r"a\_b \* c", "text/plain": "a_b * c"}


def test_no_two_curves_of_an_axis_differ_in_colour_alone(every_figure):
    schedules = {"default": Config(), "one_cycle": Config.named("one_cycle")}
    for name, figure in {**every_figure, "schedules": plots.plot_schedule(schedules)}.items():
        for ax in figure.axes:
            styles = [
                (style, line.get_marker() if name == "runs" else None)  # runs of one kind have one style
                for line in ax.lines
                if (style := line.get_linestyle()) != "None" and len(line.get_xdata()) > 1
            ]
            assert len(set(styles)) == len(styles), name


def test_every_figure_renders_at_notebook_width_with_legible_text(every_figure):
    for name, figure in every_figure.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        width, _ = Image.open(buffer).size
        assert 800 <= width <= 1000, name
        texts = [text for text in figure.findobj(Text) if text.get_text() and text.get_visible()]
        assert texts and all(text.get_fontsize() >= 9 for text in texts), name
        assert not any("^{" in text.get_text() for text in texts), name  # an exponent is set smaller than its text


def test_samples_show_each_class_under_its_name(split):
    axes = np.reshape(plots.plot_samples(split, rows=4).axes, (4, 10))
    assert [ax.get_title() for ax in axes[0]] == list(CLASSES)
    for column in range(10):
        of_class = {image.tobytes() for image in split.images[split.labels == column]}
        assert {ax.images[0].get_array().tobytes() for ax in axes[:, column]} <= of_class


@pytest.mark.parametrize("names", [("cat", "dog"), tuple(map(str, range(20)))])
def test_samples_of_other_classes_fit_the_notebook(names, split, monkeypatch):
    monkeypatch.setattr(plots, "CLASSES", names)
    width, height = plots.plot_samples(split).get_size_inches()
    assert 6 <= width <= 9.5 and height <= 6


def test_samples_of_a_class_with_few_images():
    few = synthetic_cifar10(20, 10)[0]
    assert len(shown(plots.plot_samples(few, rows=4))) == 20


def test_augmentations_show_the_original_and_every_draw(split):
    draws = augment(split, 5, 23)
    images = shown(plots.plot_augmentations(split.images[5], draws, split.source))
    assert np.array_equal(images[0], split.images[5])
    assert np.array_equal(images[1:], draws)


@pytest.mark.parametrize(
    "plot, names, finals",
    [
        (plots.plot_loss, ("train_loss", "test_loss"), ("0.750", "0.812")),
        (plots.plot_accuracy, ("train_accuracy", "test_accuracy"), ("71.25", "69.50")),
    ],
)
def test_curves_show_the_history_and_its_final_values(plot, names, finals):
    (ax,) = plot(HISTORY, "source").axes
    curves = [line for line in ax.lines if len(line.get_xdata()) == 3]
    assert [list(line.get_ydata()) for line in curves] == [HISTORY[name] for name in names]
    assert all(list(line.get_xdata()) == [1, 2, 3] for line in curves)
    marks = [line.get_ydata()[0] for line in ax.lines if len(line.get_xdata()) == 1]
    assert marks == [HISTORY[name][-1] for name in names]
    labels = [text.get_text() for text in ax.get_legend().get_texts()]
    assert all(final in label for final, label in zip(finals, labels, strict=True))
    assert ax.get_xlabel() == "epoch" and ax.get_ylabel()


@pytest.mark.parametrize("plot", [plots.plot_loss, plots.plot_accuracy])
def test_curves_of_a_run_without_a_complete_epoch(plot):
    (ax,) = plot({name: [] for name in HISTORY}, "source").axes
    assert "no complete epoch" in ax.get_legend().get_texts()[0].get_text()


def test_schedule_shows_the_rate_at_every_moment():
    configs = {"default": Config(epochs=10), "one_cycle": Config(schedule="one_cycle", epochs=20, lr=0.2)}
    (ax,) = plots.plot_schedule(configs).axes
    flat, cycle = (line.get_xydata() for line in ax.lines)
    assert (flat[:, 1] == 0.01).all() and flat[-1, 0] == 10
    assert cycle[:, 1].max() == pytest.approx(0.2) and cycle[cycle[:, 1].argmax(), 0] == pytest.approx(5)
    assert cycle[0].tolist() == [0, 0] and cycle[-1].tolist() == [20, 0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "default (peak: 0.01)",
        "one_cycle (peak: 0.2)",
    ]


def test_every_schedule_is_shown():
    configs = {f"recipe {number}": Config(lr=0.01 * (number + 1)) for number in range(9)}
    figure = plots.plot_schedule(configs)
    (ax,) = figure.axes
    assert [line.get_ydata()[0] for line in ax.lines] == [config.lr for config in configs.values()]
    assert len({(line.get_linestyle(), line.get_marker()) for line in ax.lines}) == 9
    assert all(name in figure.caption for name in configs)


def test_range_test_without_a_suggestion_says_why():
    figure = plots.plot_lr_range(LRRange([0.001, 0.01], [2.3, 2.4], None, diverged=False), "source")
    (ax,) = figure.axes
    assert len(ax.lines) == 1 and "no suggestion: the loss never falls" in ax.get_title()
    assert figure.caption.startswith("There is no suggestion: the loss never falls below its first value, 2.30, at")
    assert "call lr_range_test with a smaller start" in figure.caption


def test_range_test_is_plotted_with_the_suggested_rate_marked():
    (ax,) = plots.plot_lr_range(RANGE, "source").axes
    curve, suggested = ax.lines
    assert curve.get_xydata().tolist() == [list(pair) for pair in zip(RANGE.lr, RANGE.loss, strict=True)]
    assert set(suggested.get_xdata()) == {RANGE.suggestion} and ax.get_xscale() == "log"
    assert "suggestion: 0.01" in [text.get_text() for text in ax.get_legend().get_texts()]
    low, high = ax.get_ylim()
    assert low < 1.5 < 2.3 < high < 5  # the explosion at the end does not flatten what matters


def bars(ax):
    """The names and lengths of a bar chart, from top to bottom."""
    return [(text.get_text(), bar.get_width()) for text, bar in zip(ax.texts, ax.patches, strict=True)]


def test_misclassified_grid_shows_images_labels_and_the_three_likeliest_classes(split, mistakes):
    figure = plots.plot_misclassified(split, mistakes)
    assert len(shown(figure)) == 3
    cells = zip(figure.axes[::2], figure.axes[1::2], *mistakes, strict=False)
    for ax, side, index, probabilities in cells:
        assert np.array_equal(ax.images[0].get_array(), split.images[index])
        predicted, actual = int(probabilities.argmax()), CLASSES[split.labels[index]]
        caption = ax.get_title(loc="left")
        assert f"pred. {CLASSES[predicted]}, {100 * probabilities.max():.0f} %" in caption
        assert f"actual {actual}" in caption
        names, lengths = zip(*bars(side), strict=True)
        assert names[0] == CLASSES[predicted] and len(names) == 3
        assert lengths == pytest.approx([probabilities[CLASSES.index(name)] for name in names])
    assert "3 of 200 misclassified (1.5 %)" in title(figure)


def test_the_actual_class_has_another_colour_among_the_likeliest(split):
    probabilities = np.zeros((1, 10), np.float32)
    actual = split.labels[5]
    wrong = (actual + 1) % 10
    probabilities[0, wrong], probabilities[0, actual] = 0.7, 0.3
    side = plots.plot_misclassified(split, Misclassified(np.array([5]), probabilities)).axes[1]
    first, second, third = (bar.get_facecolor() for bar in side.patches)
    assert first == third != second
    assert [text.get_fontweight() for text in side.texts] == ["normal", "bold", "normal"]


def test_misclassified_grid_of_some_says_which(split, mistakes):
    figure = plots.plot_misclassified(split, mistakes, which="cat taken for dog")
    assert title(figure) == f"cat taken for dog, 3 images: {split.source}"


def test_misclassified_grid_without_mistakes(split):
    none = Misclassified(np.array([], int), np.zeros((0, 10)))
    figure = plots.plot_misclassified(split, none)
    assert "0 of 200" in title(figure) and not shown(figure)


def test_training_shows_gap_rate_and_seconds():
    gap, rate, seconds = axes = plots.plot_training(HISTORY, "source").axes
    assert "points" in gap.get_ylabel() and "seconds" in seconds.get_ylabel()
    assert {ax.get_xlabel() for ax in axes} == {"epoch"}
    assert list(gap.lines[0].get_ydata()) == [-10.0, -5.0, 1.75]
    assert list(rate.lines[0].get_ydata()) == HISTORY["lr"] and list(seconds.lines[0].get_ydata()) == HISTORY["seconds"]
    assert seconds.get_ylim()[0] == 0  # a constant is drawn as one
    plots.plot_training({name: [] for name in HISTORY}, "source")
    gap = plots.plot_training({**HISTORY, "train_accuracy": [30.0, 50.0, 60.0]}, "source").axes[0]
    low, high = gap.get_ylim()
    assert low < -20 and high >= 0  # test above training, as in early epochs


def test_confusion_shows_percent_of_each_row_and_the_pairs(split, logits):
    confusion = confusion_matrix(logits, split.labels)
    pairs = most_confused(confusion)
    matrix, side = plots.plot_confusion(confusion, pairs, "source").axes
    percent = 100 * confusion / confusion.sum(1, keepdims=True)
    assert [text.get_text() for text in matrix.texts] == [f"{value:.1f}" for value in percent.flat]
    assert np.isnan(np.diag(matrix.images[0].get_array().filled(np.nan))).all()  # hits are not coloured
    assert f"{pairs[0].count}  {pairs[0].actual} as {pairs[0].predicted}" in side.texts[0].get_text()
    assert (matrix.get_xlabel(), matrix.get_ylabel()) == ("predicted", "actual")


@pytest.mark.parametrize("n, written", [(2, True), (20, True), (21, False), (100, False)])
def test_texts_of_a_confusion_matrix_do_not_overlap(n, written):
    confusion = np.full((n, n), 10) + np.diag(np.full(n, 1000))
    names = [f"a class {index}" for index in range(n)]
    figure = plots.plot_confusion(confusion, most_confused(confusion, names=names), "source", names)
    figure.draw_without_rendering()
    matrix = figure.axes[0]
    rows = [label.get_window_extent() for label in matrix.get_yticklabels()]
    assert len(rows) == n and all(above.y0 > below.y1 - 3 for above, below in pairwise(rows))  # 3: descenders
    numbers = [text.get_window_extent() for text in matrix.texts[:n]]
    assert len(matrix.texts) == (n * n if written else 0)
    assert all(left.x1 < right.x0 for left, right in pairwise(numbers))


def test_confusion_without_mistakes():
    _, side = plots.plot_confusion(5 * np.eye(10, dtype=int), [], "source").axes
    assert side.texts[0].get_text() == "no mistakes"


def test_class_accuracy_shows_every_class_with_its_interval(split, logits):
    result = class_accuracy(confusion_matrix(logits, split.labels))
    (ax,) = plots.plot_class_accuracy(result, "source").axes
    order = np.argsort(result.accuracy)
    assert [text.get_text() for text in ax.get_yticklabels()] == [
        f"{CLASSES[i]}  {result.accuracy[i]:.1f}" for i in order
    ]
    (segments,) = [collection.get_segments() for collection in ax.collections]
    assert [segment[:, 0].tolist() for segment in segments] == [
        pytest.approx([result.low[i], result.high[i]]) for i in order
    ]


def test_class_accuracy_leaves_out_an_absent_class():
    (ax,) = plots.plot_class_accuracy(class_accuracy(np.array([[3, 1], [0, 0]])), "source").axes
    assert [text.get_text() for text in ax.get_yticklabels()] == ["airplane  75.0"]


def test_calibration_shows_the_filled_bins_and_the_error(split, logits):
    result = calibration(logits, split.labels, bins=10)
    assert (result.count == 0).any()
    ax, below = plots.plot_calibration(result, "source").axes
    filled = result.count > 0
    curve = ax.lines[1].get_xydata()
    assert np.allclose(curve, 100 * np.stack([result.confidence, result.accuracy], 1)[filled])
    assert f"{100 * result.error:.1f} points" in ax.get_legend().get_texts()[1].get_text()
    assert [bar.get_height() for bar in below.patches] == result.count.tolist()


def test_grad_cam_shows_right_beside_wrong(cams):
    axes = np.reshape(plots.plot_grad_cam(cams, "source").axes, (2, 5))
    for row, pair in zip(axes, cams, strict=True):
        images = [[image.get_array() for image in ax.images] for ax in row]
        expected = [[pair.right], [pair.right, pair.right_cam], [pair.wrong], [pair.wrong, pair.wrong_cam],
                    [pair.wrong, pair.missed_cam]]  # fmt: skip
        for cell, arrays in zip(images, expected, strict=True):
            assert len(cell) == len(arrays) and all(map(np.array_equal, cell, arrays))
    assert [ax.get_title() for ax in axes[0]] == [
        "cat, correct", "for cat, 91 %", "cat, mistake", "for dog, 82 %", "for cat",
    ]  # fmt: skip


def test_predictions_show_each_image_with_its_classes(split):
    name = "a $very_long$ name of a file indeed.jpg"
    predictions = [
        Prediction("folder/one.png", split.images[0], ["cat", "dog"], [0.8, 0.15]),
        Prediction(name, split.images[1], ["ship", "frog"], [0.6, 0.4]),
    ]
    figure = plots.plot_predictions(predictions, "my photos")
    assert title(figure) == "Predictions: my photos"
    assert [ax.get_title(loc="left") for ax in figure.axes[:4:2]] == ["one.png", "a $very_lo… indeed.jpg"]
    assert bars(figure.axes[1]) == [("cat 80 %", 0.8), ("dog 15 %", 0.15)]
    assert all(map(np.array_equal, shown(figure), split.images[:2]))
