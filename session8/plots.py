"""Figures: each function takes data, returns a matplotlib Figure, and never trains, loads or prints.

They are made for notebook width (about 9 inches), with text of at least 9 points and Okabe and Ito's colour-blind
safe palette. Every title of a figure of data names their source, so that none of a synthetic run passes for CIFAR-10.
"""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from session8.data import CLASSES

BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"


def _image_grid(rows, columns, title, size, caption):
    """A Figure at notebook width with rows x columns axes for images, their captions above them."""
    width = max(columns * size, 6)  # room for the title
    figure = Figure(figsize=(width, rows * (size + caption) + 0.4), layout="constrained")
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
    title, size = f"Samples of each class: {split.source}", min(0.95, 9.5 / len(CLASSES))
    figure, axes = _image_grid(rows, len(CLASSES), title, size, caption=0.1)
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
    """Curves over epochs, {label: (values, colour, style of line, format)}, their final values marked, and named in
    the legend."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for label, (values, color, style, form) in curves.items():
        epochs = np.arange(1, len(values) + 1)
        last = f" (last: {values[-1]:{form}})" if values else " (no whole epoch)"
        ax.plot(epochs, values, style, color=color, marker="o", markersize=3, label=label + last)
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
    train, test = history["train_loss"], history["test_loss"]
    curves = {"train": (train, ORANGE, "--", ".3f"), "test": (test, BLUE, "-", ".3f")}
    return _plot_curves(curves, f"Loss: {source}", "mean negative log-likelihood")


def plot_accuracy(history, source):
    """Accuracy curves: percent correct of training and test over the epochs, final values marked."""
    train, test = history["train_accuracy"], history["test_accuracy"]
    curves = {"train": (train, ORANGE, "--", ".2f"), "test": (test, BLUE, "-", ".2f")}
    return _plot_curves(curves, f"Accuracy: {source}", "accuracy (%)")


def plot_schedule(configs):
    """The learning rate over training of each recipe in `configs`, {name: Config}."""
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    for (name, config), color, style in zip(configs.items(), (ORANGE, BLUE, GREEN), ("--", "-", ":"), strict=False):
        progress = np.linspace(0, 1, 401)
        rates = [config.lr_at(fraction) for fraction in progress]
        label = f"{name} (peak: {max(rates):.4g})"
        ax.plot(config.epochs * progress, rates, style, color=color, linewidth=2, label=label)
    ax.set_title("Learning rate over training", fontsize=12)
    ax.set_xlabel("epoch")
    ax.set_ylabel("learning rate")
    ax.set_ylim(bottom=0)
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_lr_range(result, source):
    """The smoothed loss against the learning rate, with the suggested rate marked.

    result: what `dry_run.lr_range_test` returns.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    ax = figure.subplots()
    ax.plot(result.lr, result.loss, color=BLUE, linewidth=2, label="smoothed training loss")
    label = f"suggested peak: {result.suggestion:.2g}"
    ax.axvline(result.suggestion, color=ORANGE, linestyle="--", linewidth=2, label=label)
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")  # the exponents of powers of ten would be too small to read
    low, high = min(result.loss), result.loss[0]
    ax.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low) + 0.1)
    ax.set_title(f"Learning rate range test: {source}", fontsize=12)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("mean negative log-likelihood")
    ax.grid(alpha=0.3)
    ax.legend()
    return figure


def plot_training(history, source):
    """How training went besides loss and accuracy: over the epochs, the gap between training and test accuracy, the
    learning rate, and the seconds."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    figure.suptitle(f"Training: {source}", fontsize=12)
    pairs = zip(history["train_accuracy"], history["test_accuracy"], strict=True)
    curves = {
        "train minus test accuracy (points)": ([train - test for train, test in pairs], ORANGE),
        "learning rate": (history["lr"], BLUE),
        "seconds, test included": (history["seconds"], GREEN),
    }
    for ax, (title, (values, color)) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        ax.plot(np.arange(1, len(values) + 1), values, color=color, marker="o", markersize=3)
        ax.set_ylabel(title)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0), 1.05 * max(high, 0) or 1)  # from 0, lest a constant look like noise
    return figure


def plot_confusion(confusion, pairs, source, names=CLASSES):
    """The confusion matrix in percent of each actual class, and beside it the most confused pairs by name.

    confusion: int64 (C, C), of `analysis.confusion_matrix`. pairs: what `analysis.most_confused` returns for it.
    """
    figure = Figure(figsize=(9, 5.2), layout="constrained")
    figure.suptitle(f"Confusion matrix, percent of each actual class: {source}", fontsize=12)
    ax, beside = figure.subplots(1, 2, width_ratios=[5, 2])
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    mistakes = np.where(np.eye(len(percent), dtype=bool), np.nan, percent)  # coloured alone: hits would drown them
    highest = max(np.nanmax(mistakes), 1e-9)
    ax.imshow(mistakes, cmap="Blues", vmin=0, vmax=highest)
    for (row, column), value in np.ndenumerate(percent):
        hit, dark = row == column, mistakes[row, column] > 0.6 * highest
        ax.text(column, row, f"{value:.1f}", ha="center", va="center", fontsize=9,
                color="white" if dark else "black", fontweight="bold" if hit else "normal")  # fmt: skip
    ax.set_xticks(range(len(percent)), names[: len(percent)], rotation=45, ha="right")
    ax.set_yticks(range(len(percent)), names[: len(percent)])
    ax.set_xlabel("predicted")
    ax.set_ylabel("actual")
    beside.set_axis_off()
    lines = [f"{pair.count:>3}  {pair.actual} as {pair.predicted}" for pair in pairs]
    text = "\n".join(["most confused (images)", *lines] if lines else ["no mistakes"])
    beside.text(0, 1, text, transform=beside.transAxes, va="top", fontsize=10, linespacing=1.6)
    return figure


def plot_class_accuracy(result, source, names=CLASSES):
    """The accuracy of each class with its 95 % interval, the best on top.

    result: what `analysis.class_accuracy` returns.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    ax = figure.subplots()
    order = np.argsort(result.accuracy)
    order = order[~np.isnan(result.accuracy[order])]  # without classes of which there is no image
    accuracy, low, high = (values[order] for values in result)
    ax.errorbar(accuracy, range(len(order)), xerr=[accuracy - low, high - accuracy], fmt="o", color=BLUE, capsize=4)
    ax.set_yticks(range(len(order)), [f"{names[i]}  {result.accuracy[i]:.1f}" for i in order])
    ax.set_title(f"Accuracy of each class with its 95 % interval: {source}", fontsize=12)
    ax.set_xlabel("accuracy (%)")
    ax.grid(alpha=0.3)
    return figure


def plot_calibration(result, source):
    """The reliability diagram, accuracy against confidence, and below it how many images each bin holds.

    result: what `analysis.calibration` returns.
    """
    figure = Figure(figsize=(9, 5), layout="constrained")
    figure.suptitle(f"Calibration: {source}", fontsize=12)
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled, centres = result.count > 0, (np.arange(len(result.count)) + 0.5) / len(result.count)
    ax.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="as often right as it is confident")
    label = f"this network (expected calibration error: {100 * result.error:.1f} points)"
    ax.plot(100 * result.confidence[filled], 100 * result.accuracy[filled], "o-", color=BLUE, label=label)
    ax.set_ylabel("accuracy (%)")
    ax.grid(alpha=0.3)
    ax.legend()
    below.bar(100 * centres, result.count, width=90 / len(centres), color=ORANGE)
    below.set_yscale("log")
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_ylim(bottom=0.8)
    below.set_ylabel("images")
    below.set_xlabel("confidence: probability of the predicted class (%)")
    return figure


def _bars_grid(rows, columns, title, caption):
    """A Figure at notebook width with rows x columns pairs of axes: for an image, and for the bars beside it."""
    figure = Figure(figsize=(9, rows * (1.05 + caption) + 0.4), layout="constrained")
    figure.suptitle(title, fontsize=12)
    axes = figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.15] * columns)
    for number, ax in enumerate(axes.flat):
        ax.set_axis_off()
        ax.set_box_aspect(1 / 1.15 if number % 2 else 1)  # bars as tall as the image
    return figure, axes.reshape(-1, 2)


def _show_bars(ax, names, probabilities, colors, marked=None):
    """The likeliest classes as bars, the likeliest on top, their names on them, the one `marked` in bold."""
    ax.barh(range(len(names)), probabilities, color=colors, height=0.85)
    for place, name in enumerate(names):
        ax.text(0.03, place, name, va="center", fontsize=9, fontweight="bold" if name == marked else "normal")
    ax.set_xlim(0, 1)
    ax.set_ylim(len(names) - 0.5, -0.5)


def plot_misclassified(split, mistakes, rows=4, columns=4, which=None, names=CLASSES):
    """A grid of misclassified images with predicted label, its probability and actual label; beside each the three
    likeliest classes as bars, the actual one in bold and in another colour.

    mistakes: what `analysis.misclassified` returns for the same split, shown in its order. which: in words, which
    mistakes these are, if not all.
    """
    n = len(mistakes.index)
    title = f"{n:,} of {len(split):,} misclassified ({100 * n / len(split):.1f} %): {split.source}"
    if which:
        title = f"{which}, {n:,} image{'s' if n != 1 else ''}: {split.source}"
    figure, axes = _bars_grid(rows, columns, title, caption=0.36)
    for (ax, beside), index, probabilities in zip(axes, *mistakes, strict=False):
        likeliest, actual = np.argsort(-probabilities, kind="stable")[:3], split.labels[index]
        caption = f"pred. {names[likeliest[0]]}, {100 * probabilities[likeliest[0]]:.0f} %\nactual {names[actual]}"
        _show_image(ax, split.images[index])
        ax.set_title(caption, fontsize=9, pad=3, loc="left")
        colors = [SKY if i == actual else ORANGE for i in likeliest]
        _show_bars(beside, [names[i] for i in likeliest], probabilities[likeliest], colors, marked=names[actual])
    return figure


def plot_predictions(predictions, source, columns=4):
    """Images as the network saw them, their names above, and beside each its likeliest classes as bars.

    predictions: what `inference.predict` returns. source: where the images are from, in words.
    """
    title = f"What the network takes {'this' if len(predictions) == 1 else 'these'} for: {source}"
    figure, axes = _bars_grid(-(-len(predictions) // columns), columns, title, caption=0.2)
    for (ax, beside), (source, image, classes, probabilities) in zip(axes, predictions, strict=False):
        _show_image(ax, image)
        name = Path(source).name
        name = name if len(name) <= 22 else f"{name[:10]}…{name[-11:]}"
        ax.set_title(name, fontsize=9, pad=3, loc="left", parse_math=False)
        _show_bars(beside, [f"{name} {100 * p:.0f} %" for name, p in zip(classes, probabilities, strict=True)],
                   probabilities, [SKY] * len(classes))  # fmt: skip
    return figure


def plot_grad_cam(pairs, source):
    """Where the network looks when it is right and when it is wrong: a row for each pair of images of one class.

    On the left a right prediction and what spoke for it; on the right a wrong one, what spoke for the class predicted,
    and what spoke for the actual class. pairs: what `analysis.grad_cam_pairs` returns.
    """
    figure, axes = _image_grid(max(len(pairs), 1), 5, f"Grad-CAM, right and wrong: {source}", size=1.8, caption=0.25)
    for row, pair in zip(axes, pairs, strict=False):
        shown = [
            (pair.right, None, f"{pair.actual}, recognised"),
            (pair.right, pair.right_cam, f"for {pair.actual}, {100 * pair.right_confidence:.0f} %"),
            (pair.wrong, None, f"{pair.actual}, missed"),
            (pair.wrong, pair.wrong_cam, f"for {pair.predicted}, {100 * pair.wrong_confidence:.0f} %"),
            (pair.wrong, pair.missed_cam, f"for {pair.actual}"),
        ]
        for ax, (image, cam, caption) in zip(row, shown, strict=True):
            _show_image(ax, image, caption)
            if cam is not None:
                ax.imshow(cam, cmap="viridis", vmin=0, vmax=1, alpha=0.55, extent=ax.images[0].get_extent())
    return figure
