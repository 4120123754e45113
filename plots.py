"""Figures: each function takes data, returns a matplotlib Figure, and never trains, loads or prints.

They are made for notebook width (about 9 inches), with text of at least 9 points and Okabe and Ito's colour-blind
safe palette. Every title names the source of the data, so that no figure of a synthetic run passes for CIFAR-10.
"""

import numpy as np
from matplotlib.figure import Figure

from cifar10 import CLASSES

BLUE, ORANGE, GREEN = "#0072B2", "#E69F00", "#009E73"


def _image_grid(rows, columns, title, size=0.95, caption=0.22):
    """A Figure at notebook width with rows x columns axes for images, their captions above them."""
    figure = Figure(figsize=(columns * size, rows * (size + caption) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _show_image(ax, image, caption=""):
    ax.imshow(image, interpolation="nearest")
    ax.set_title(caption, fontsize=9, pad=3)


def plot_samples(split, rows=4, seed=0):
    """Samples of each class: one column a class, `rows` random images in each, class names on top."""
    rng = np.random.default_rng(seed)
    figure, axes = _image_grid(rows, len(CLASSES), f"Samples of each class: {split.source}", caption=0.1)
    for column, name in enumerate(CLASSES):
        members = rng.permutation(np.flatnonzero(split.labels == column))[:rows]
        for row, index in enumerate(members):
            _show_image(axes[row, column], split.images[index], name if row == 0 else "")
    return figure


def plot_augmentations(image, draws, source):
    """One training image, first as it is and then as training sees it.

    image: uint8 (32, 32, 3). draws: uint8 (N, 32, 32, 3), what `utils.augment` returns for it.
    """
    columns = 8
    title = f"One image and {len(draws)} draws of its augmentation: {source}"
    figure, axes = _image_grid(-(-(len(draws) + 1) // columns), columns, title, size=1.15, caption=0.12)
    _show_image(axes.flat[0], image, "original")
    for ax, draw in zip(axes.flat[1:], draws, strict=False):
        _show_image(ax, draw)
    return figure


def _plot_curves(curves, title, ylabel):
    """Curves over epochs, {label: (values, colour, format)}, each labelled with its final value where it ends."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for label, (values, color, form) in curves.items():
        epochs = np.arange(1, len(values) + 1)
        last = f" (last: {values[-1]:{form}})" if values else " (no whole epoch)"
        ax.plot(epochs, values, color=color, marker="o", markersize=3, label=label + last)
        ax.plot(epochs[-1:], values[-1:], "o", color=color, markersize=8)
    ax.set_title(title, fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel(ylabel)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_loss(history, source):
    """Loss curves: mean NLL of training and test over the epochs, final values marked."""
    curves = {"train": (history["train_loss"], ORANGE, ".3f"), "test": (history["test_loss"], BLUE, ".3f")}
    return _plot_curves(curves, f"Loss: {source}", "mean negative log-likelihood")


def plot_accuracy(history, source):
    """Accuracy curves: percent correct of training and test over the epochs, final values marked."""
    curves = {"train": (history["train_accuracy"], ORANGE, ".2f"), "test": (history["test_accuracy"], BLUE, ".2f")}
    return _plot_curves(curves, f"Accuracy: {source}", "accuracy (%)")


def plot_schedule(configs):
    """The learning rate over training of each recipe in `configs`, {name: Config}."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for (name, config), color in zip(configs.items(), (ORANGE, BLUE, GREEN), strict=False):
        progress = np.linspace(0, 1, 401)
        rates = [config.lr_at(fraction) for fraction in progress]
        ax.plot(config.epochs * progress, rates, color=color, linewidth=2, label=f"{name} (peak: {max(rates):.4g})")
    ax.set_title("Learning rate over training", fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_lr_range(result, source):
    """The smoothed loss against the learning rate, with the suggested rate marked.

    result: what `utils.lr_range_test` returns.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(result.lr, result.loss, color=BLUE, linewidth=2, label="smoothed training loss")
    label = f"suggested peak: {result.suggestion:.2g}"
    ax.axvline(result.suggestion, color=ORANGE, linestyle="--", linewidth=2, label=label)
    ax.set_xscale("log")
    low, high = min(result.loss), result.loss[0]
    ax.set_ylim(low - 0.1 * (high - low), max(high, low) + 0.6 * abs(high - low) + 0.1)
    ax.set_title(f"Learning rate range test: {source}", fontsize=12)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("mean negative log-likelihood")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_misclassified(split, mistakes, rows=4, columns=5):
    """A grid of misclassified images with predicted label, its probability and actual label.

    mistakes: what `analysis.misclassified` returns for the same split, shown in its order.
    """
    n = len(mistakes.index)
    title = f"{n:,} of {len(split):,} misclassified ({100 * n / len(split):.1f} %): {split.source}"
    figure, axes = _image_grid(rows, columns, title, size=1.75, caption=0.38)
    for ax, index, predicted, confidence in zip(axes.flat, *mistakes, strict=False):
        actual = CLASSES[split.labels[index]]
        _show_image(ax, split.images[index], f"pred. {CLASSES[predicted]}, {100 * confidence:.0f} %\nactual {actual}")
    return figure
