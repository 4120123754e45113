import io

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import plots
from analysis import Misclassified
from cifar10 import CLASSES, synthetic_cifar10
from dry_run import LRRange
from utils import Config, augment

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
    return Misclassified(np.array([7, 3, 11]), np.array([1, 2, 4]), np.array([0.987, 0.8, 0.5], np.float32))


@pytest.fixture
def every_figure(split, mistakes):
    return {
        "samples": plots.plot_samples(split),
        "augmentations": plots.plot_augmentations(split.images[0], augment(split, 0, 23), split.source),
        "loss": plots.plot_loss(HISTORY, split.source),
        "accuracy": plots.plot_accuracy(HISTORY, split.source),
        "learning rate range": plots.plot_lr_range(RANGE, split.source),
        "misclassified": plots.plot_misclassified(split, mistakes),
    }


def test_every_title_names_the_source(every_figure):
    for name, figure in every_figure.items():
        assert isinstance(figure, Figure)
        assert "NOT CIFAR-10" in title(figure), name


def test_every_figure_renders_at_notebook_width_with_legible_text(every_figure):
    for name, figure in every_figure.items():
        buffer = io.BytesIO()
        figure.savefig(buffer, format="png", bbox_inches="tight")
        width, _ = Image.open(buffer).size
        assert 800 <= width <= 1000, name
        texts = [text for ax in figure.axes for text in (ax.title, ax.xaxis.label, ax.yaxis.label)]
        assert all(text.get_fontsize() >= 9 for text in texts if text.get_text()), name


def test_samples_show_each_class_under_its_name(split):
    axes = np.reshape(plots.plot_samples(split, rows=4).axes, (4, 10))
    assert [ax.get_title() for ax in axes[0]] == list(CLASSES)
    for column in range(10):
        of_class = {image.tobytes() for image in split.images[split.labels == column]}
        assert {ax.images[0].get_array().tobytes() for ax in axes[:, column]} <= of_class


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
def test_curves_of_a_run_without_a_whole_epoch(plot):
    (ax,) = plot({name: [] for name in HISTORY}, "source").axes
    assert "no whole epoch" in ax.get_legend().get_texts()[0].get_text()


def test_schedule_shows_the_rate_at_every_moment():
    configs = {"default": Config(epochs=10), "one_cycle": Config.one_cycle(epochs=20, lr=0.2, warmup=0.25)}
    (ax,) = plots.plot_schedule(configs).axes
    flat, cycle = (line.get_xydata() for line in ax.lines)
    assert (flat[:, 1] == 0.01).all() and flat[-1, 0] == 10
    assert cycle[:, 1].max() == pytest.approx(0.2) and cycle[cycle[:, 1].argmax(), 0] == pytest.approx(5)
    assert cycle[0].tolist() == [0, 0] and cycle[-1].tolist() == [20, 0]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == [
        "default (peak: 0.01)",
        "one_cycle (peak: 0.2)",
    ]


def test_range_test_is_plotted_with_the_suggested_rate_marked():
    (ax,) = plots.plot_lr_range(RANGE, "source").axes
    curve, suggested = ax.lines
    assert curve.get_xydata().tolist() == [list(pair) for pair in zip(RANGE.lr, RANGE.loss, strict=True)]
    assert set(suggested.get_xdata()) == {RANGE.suggestion} and ax.get_xscale() == "log"
    assert "suggested peak: 0.01" in [text.get_text() for text in ax.get_legend().get_texts()]
    low, high = ax.get_ylim()
    assert low < 1.5 < 2.3 < high < 5  # the explosion at the end does not flatten what matters


def test_misclassified_grid_shows_images_labels_and_confidence(split, mistakes):
    figure = plots.plot_misclassified(split, mistakes)
    images = shown(figure)
    assert len(images) == 3
    for image, ax, index, predicted, confidence in zip(images, figure.axes, *mistakes, strict=False):
        assert np.array_equal(image, split.images[index])
        caption = ax.get_title()
        assert f"pred. {CLASSES[predicted]}, {100 * confidence:.0f} %" in caption
        assert f"actual {CLASSES[split.labels[index]]}" in caption
    assert "3 of 200 misclassified (1.5 %)" in title(figure)


def test_misclassified_grid_without_mistakes(split):
    none = Misclassified(np.array([], int), np.array([], int), np.array([]))
    figure = plots.plot_misclassified(split, none)
    assert "0 of 200" in title(figure) and not shown(figure)
