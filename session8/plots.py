"""Figures. Each function takes data and returns a matplotlib Figure; none trains, loads or prints.

Figures are about 9 inches wide, the width of a notebook, with text of at least 9 points and the colour-blind safe
palette of Okabe and Ito. Titles name the source of the data, so that synthetic data are not mistaken for CIFAR-10.
Names appear as they are, without mathematics, in a font that has their characters. A character that no installed font
has is escaped. Long names are cut in the middle.
"""

import base64
import io
import re
import statistics
from functools import cache
from pathlib import Path
from textwrap import fill

import matplotlib
import numpy as np
from matplotlib.figure import Figure
from matplotlib.font_manager import FontProperties, findfont, fontManager, get_font
from matplotlib.text import Text

from session8.console import plural
from session8.data import CLASSES

BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"


class CaptionedFigure(Figure):
    """A matplotlib Figure with a caption, which says in words what it shows.

    Jupyter displays the caption below the figure, and it is the image's alternative text.
    """

    caption = ""

    def _ipython_display_(self):
        from IPython.display import display

        buffer = io.BytesIO()
        self.savefig(buffer, format="png", bbox_inches="tight")
        image = {"image/png": base64.b64encode(buffer.getvalue()).decode(), "text/plain": str(self)}
        # Raw: IPython before version 8, which Colab has, cannot give an Image an alternative text.
        display(image, metadata={"image/png": {"alt": self.caption}}, raw=True)
        caption = re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", self.caption)
        display({"text/markdown": caption, "text/plain": self.caption}, raw=True)


# -- text ----------------------------------------------------------------------------------------------------------


@cache
def _font_with(character):
    """Return the name of an installed font that has a character: "" for the default font, None if there is none."""
    if get_font(findfont(FontProperties())).get_char_index(ord(character)):
        return ""
    fonts = [font for font in fontManager.ttflist if not font.name.startswith("Last Resort")]  # which has boxes only
    return next((font.name for font in fonts if get_font(font.fname).get_char_index(ord(character))), None)


def _drawable(text):
    """Return a text with the characters that no installed font has as escapes, such as \\u732b."""
    escaped = (c if _font_with(c) is not None else c.encode("unicode_escape").decode() for c in str(text))
    return "".join(escaped)


def _short(name, length=22):
    """Return a name as it can be drawn, without its middle if it is longer than `length`."""
    name = _drawable(name)
    return name if len(name) <= length else f"{name[: (length - 1) // 2]}…{name[-(length // 2) :]}"


def _two_lines(text, width):
    """Return a title for a figure of so many inches."""
    return fill(_short(text, int(19 * width)), int(10 * width))


def _title(figure, text):
    figure.suptitle(_two_lines(text, figure.get_figwidth()), fontsize=12)


def _legend_label(text):
    """Return a text as a label: legends leave out those that begin with an underscore."""
    return f" {text}" if text.startswith("_") else text


def _finish(figure):
    """Set the fonts of a figure's texts, and turn mathematics off in them. Returns the figure."""
    figure.caption = figure.caption.encode(errors="backslashreplace").decode()  # names of files may be no Unicode
    for text in figure.findobj(Text):
        if shown := text.get_text():  # empty: labels of numbers, which a formatter fills in
            others = sorted({_font_with(c) for c in shown if c != "\n"} - {"", None})
            text.set(parse_math=False, fontfamily=[*matplotlib.rcParams["font.family"], *others])
    return figure


# -- images --------------------------------------------------------------------------------------------------------


def _image_grid(rows, columns, title, size, caption_height):
    """Return a figure with rows x columns axes for images, each `size` inches wide with a caption above it."""
    width = max(columns * size, 6)  # room for the title
    figure = CaptionedFigure(figsize=(width, rows * (size + caption_height) + 0.4), layout="constrained")
    _title(figure, title)
    axes = figure.subplots(rows, columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _show_image(ax, image, caption=""):
    ax.imshow(image, interpolation="nearest")
    ax.set_title(caption, fontsize=9, pad=3)


def plot_samples(split, rows=4, seed=0):
    """Plot `rows` random images of each class of a Split, one class per column."""
    rng = np.random.default_rng(seed)
    title, size = f"Samples of each class: {split.source}", min(0.95, 9.5 / len(CLASSES))
    figure, axes = _image_grid(rows, len(CLASSES), title, size, caption_height=0.1)
    for column, name in enumerate(CLASSES):
        members = rng.permutation(np.flatnonzero(split.labels == column))[:rows]
        for row, index in enumerate(members):
            # An inch has room for 12 characters of 9 points.
            _show_image(axes[row, column], split.images[index], _short(name, int(12 * size)) if row == 0 else "")
    shown = plural(rows, "random image")
    figure.caption = f"{shown} of each class, one class per column: {', '.join(CLASSES)}."
    return _finish(figure)


def plot_augmentations(image, draws, source):
    """Plot a training image and augmentations of it.

    image: uint8 (32, 32, 3). draws: uint8 (N, 32, 32, 3), from `augment`.
    """
    columns = 8
    title = f"One image and {plural(len(draws), 'augmentation')} of it: {source}"
    figure, axes = _image_grid(-(-(len(draws) + 1) // columns), columns, title, size=1.15, caption_height=0.12)
    _show_image(axes.flat[0], image, "original")
    for ax, draw in zip(axes.flat[1:], draws, strict=False):
        _show_image(ax, draw)
    figure.caption = f"The original image, then {plural(len(draws), 'random augmentation')} of it."
    return _finish(figure)


# -- curves --------------------------------------------------------------------------------------------------------


def _axes(title, xlabel, ylabel, height=4):
    figure = CaptionedFigure(figsize=(9, height), layout="constrained")
    ax = figure.subplots()
    ax.set_title(_two_lines(title, 9), fontsize=12)
    ax.set_xlabel(xlabel)
    ax.set_ylabel(ylabel)
    ax.grid(alpha=0.3)
    return figure, ax


def _plot_curves(title, ylabel, train, test, digits):
    """Plot a training and a test curve over the epochs, with the last values marked and in the legend."""
    figure, ax = _axes(title, "epoch", ylabel)
    for label, values, color, style in (("train", train, ORANGE, "--"), ("test", test, BLUE, "-")):
        epochs = np.arange(1, len(values) + 1)
        last = f" (last: {values[-1]:.{digits}f})" if values else " (no complete epoch)"
        ax.plot(epochs, values, style, color=color, marker="o", markersize=3, label=label + last)
        ax.plot(epochs[-1:], values[-1:], "o", color=color, markersize=8)
    ax.xaxis.get_major_locator().set_params(integer=True)
    ax.legend()
    figure.caption = "There is no complete epoch yet."
    return _finish(figure)


def plot_loss(history, source):
    """Plot the mean NLL of training and test images over the epochs."""
    train, test = history["train_loss"], history["test_loss"]
    figure = _plot_curves(f"Loss: {source}", "mean negative log-likelihood", train, test, 3)
    if test:
        best = int(np.argmin(test))
        figure.caption = (
            f"Loss after {plural(len(test), 'epoch')}: train {train[-1]:.3f}, test {test[-1]:.3f}. "
            f"The test loss was lowest after epoch {best + 1} ({test[best]:.3f})."
        )
    return _finish(figure)


def plot_accuracy(history, source):
    """Plot the accuracy on training and test images over the epochs."""
    train, test = history["train_accuracy"], history["test_accuracy"]
    figure = _plot_curves(f"Accuracy: {source}", "accuracy (%)", train, test, 2)
    if test:
        done = plural(len(test), "epoch")
        figure.caption = f"Accuracy after {done}: train {train[-1]:.2f} %, test {test[-1]:.2f} %."
    return _finish(figure)


def plot_schedule(configs):
    """Plot the learning rate over training of each recipe in `configs`, {name: Config}."""
    figure, ax = _axes("Learning rate over training", "epoch", "learning rate")
    described = []
    for number, (name, config) in enumerate(configs.items()):
        # Four styles, then the same with a marker.
        look = {"color": (ORANGE, BLUE, GREEN, SKY)[number % 4], "linestyle": ("--", "-", ":", "-.")[number % 4]}
        look |= {"marker": ["", *"os^vD*P"][number // 4 % 8], "markevery": 40}
        steps = 400 // config.epochs + 1  # per epoch
        rates = [config.lr_at(step, steps) for step in range(config.epochs * steps)]
        epochs = (np.arange(len(rates)) + 0.5) / steps
        ax.plot(epochs, rates, linewidth=2, label=_legend_label(f"{_short(name, 60)} (peak: {config.lr:.4g})"), **look)
        described.append(f"{name}: {rates[0]:.3g} at first, {max(rates):.3g} at most, {rates[-1]:.3g} at the end")
    ax.set_ylim(bottom=0)
    ax.legend()
    figure.caption = f"Learning rates. {'; '.join(described)}."
    return _finish(figure)


def plot_runs(runs):
    """Plot the test accuracy of runs over the epochs and over the minutes, one line per run.

    runs: from `records.read_runs`. Runs that differ in the seed only have one colour and line style. Minutes are
    compared between runs on the same device only: those of the device with the most runs are shown.
    """
    labels = [_legend_label(fill(_drawable(run["label"]), 110)) for run in runs]
    rows = sum(label.count("\n") + 1 for label in labels)
    figure = CaptionedFigure(figsize=(9, 3.6 + 0.2 * rows), layout="constrained")  # room for the legend
    by_epochs, by_minutes = figure.subplots(1, 2, sharey=True)
    devices = statistics.multimode(run["device"] for run in runs)
    groups = list(dict.fromkeys(run["group"] for run in runs))
    for index, run in enumerate(runs):
        group = groups.index(run["group"])
        accuracy, minutes = run["history"]["test_accuracy"], np.cumsum(run["history"]["seconds"]) / 60
        look = {"color": f"C{group % 10}", "linestyle": ("-", "--", "-.", ":")[group % 4]}
        look |= {"marker": "os^vD*P"[index % 7], "markersize": 4}
        by_epochs.plot(np.arange(1, len(accuracy) + 1), accuracy, label=labels[index], **look)
        if run["device"] == devices[0]:
            by_minutes.plot(minutes, accuracy, **look)
    synthetic = any("NOT CIFAR-10" in run["data"] for run in runs)
    figure.suptitle("Test accuracy of runs" + (", some on the synthetic stand-in, NOT CIFAR-10" if synthetic else ""))
    by_epochs.set(xlabel="epoch", ylabel="test accuracy (%)")
    by_epochs.xaxis.get_major_locator().set_params(integer=True)
    by_minutes.set(xlabel=fill(_drawable(f"minutes on {devices[0]}"), 60) if runs else "minutes")
    for ax in (by_epochs, by_minutes):
        ax.grid(alpha=0.3)
    if runs:
        figure.legend(loc="outside lower center", fontsize=9)
    finished = [run for run in runs if run["history"]["test_accuracy"]]
    finished = [run for run in finished if "NOT CIFAR-10" not in run["data"]] or finished
    best = max(finished, key=lambda run: run["history"]["test_accuracy"][-1], default=None)
    figure.caption = "There are no finished runs yet."
    if best:
        figure.caption = (
            f"Test accuracy of {plural(len(runs), 'run')}. "
            f"The highest last one is {best['history']['test_accuracy'][-1]:.2f} %: {best['label']}. "
            f"Right: only runs on {devices[0]}."
        )
    return _finish(figure)


def plot_lr_range(result, source):
    """Plot the smoothed loss against the learning rate, with the suggestion marked.

    result: from `lr_range_test`.
    """
    figure, ax = _axes(f"Learning rate range test: {source}", "learning rate", "mean negative log-likelihood")
    if not result.lr:
        ax.set_title(f"{ax.get_title()}\nno range test: the network cannot be copied", fontsize=12)
        figure.caption = "There is no range test: the network cannot be copied."
        return _finish(figure)
    marker = "o" if len(result.lr) == 1 else ""
    ax.plot(result.lr, result.loss, color=BLUE, linewidth=2, marker=marker, label="smoothed training loss")
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")  # exponents of powers of ten would be too small to read
    low, high = min(result.loss), result.loss[0]
    if result.suggestion is None:
        figure.caption = (
            f"There is no suggestion: the loss never falls below its first value, {high:.2f}, at a learning rate of "
            f"{result.lr[0]:.2g}. Check the labels, start with new weights, or call lr_range_test with a smaller start."
        )
        ax.set_title(f"{ax.get_title()}\nno suggestion: the loss never falls", fontsize=12)
    else:
        label = f"suggestion: {result.suggestion:.2g}"
        ax.axvline(result.suggestion, color=ORANGE, linestyle="--", linewidth=2, label=label)
        ax.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low) + 0.1)
        lowest = result.lr[int(np.argmin(result.loss))]
        figure.caption = (
            f"The loss falls from {high:.2f} to its minimum, {low:.2f}, at a learning rate of {lowest:.2g}. "
            f"The suggestion, in the middle of the longest valley, is {result.suggestion:.2g}."
        )
    ax.legend()
    if result.diverged:
        figure.caption += f" Above {result.lr[-1]:.2g} training diverged."
    return _finish(figure)


def plot_training(history, source):
    """Plot the difference of training and test accuracy, the learning rate and the seconds of each epoch."""
    figure = CaptionedFigure(figsize=(9, 3.2), layout="constrained")
    _title(figure, f"Training: {source}")
    gap = [a - b for a, b in zip(history["train_accuracy"], history["test_accuracy"], strict=True)]
    seconds = history["seconds"]
    curves = {
        "train minus test accuracy (points)": (gap, ORANGE),
        "learning rate": (history["lr"], BLUE),
        "seconds, with the test": (seconds, GREEN),
    }
    for ax, (title, (values, color)) in zip(figure.subplots(1, 3), curves.items(), strict=True):
        ax.plot(np.arange(1, len(values) + 1), values, color=color, marker="o", markersize=3)
        ax.set_ylabel(title)
        ax.set_xlabel("epoch")
        ax.xaxis.get_major_locator().set_params(integer=True)
        ax.grid(alpha=0.3)
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0), 1.05 * max(high, 0) or 1)  # with 0, so that a constant does not look like noise
    figure.caption = "There is no complete epoch yet."
    if seconds:
        figure.caption = (
            f"Train minus test accuracy: {gap[0]:.2f} points in the first epoch, {gap[-1]:.2f} in the last. Median "
            f"time of an epoch: {statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g} s)."
        )
    return _finish(figure)


# -- error analysis ------------------------------------------------------------------------------------------------


def plot_confusion(confusion, pairs, source, names=CLASSES):
    """Plot the confusion matrix in percent of each actual class, and list the most frequent confusions.

    confusion: int64 (C, C), from `confusion_matrix`. pairs: from `most_confused`.
    """
    n = len(confusion)
    written = n <= 20  # more numbers of 9 points would not fit
    height = max(5.2, 0.4 * n) if written else 2 + max(6, 0.17 * n)
    figure = CaptionedFigure(figsize=(height + 3.8, height), layout="constrained")
    _title(figure, f"Confusion matrix, percent of each actual class: {source}")
    ax, side = figure.subplots(1, 2, width_ratios=[height, 2.1])
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    mistakes = np.where(np.eye(n, dtype=bool), np.nan, percent)  # the diagonal would dominate the colours
    highest = max(np.nanmax(mistakes), 1e-9)
    colours = ax.imshow(mistakes, cmap="Blues", vmin=0, vmax=highest)
    if written:
        for (row, column), value in np.ndenumerate(percent):
            color = "white" if mistakes[row, column] > 0.6 * highest else "black"
            look = {"color": color, "fontweight": "bold" if row == column else "normal", "fontsize": 9}
            ax.text(column, row, f"{value:.{1 if n <= 10 else 0}f}", ha="center", va="center", **look)
    else:
        figure.colorbar(
            colours, ax=ax, label="percent of the actual class, mistakes only", location="bottom", shrink=0.5
        )
    shown = [_short(name, 14) for name in names[:n]]
    ax.set_xticks(range(n), shown, rotation=45 if written else 90, ha="right" if written else "center")
    ax.set_yticks(range(n), shown)
    ax.set_xlabel("predicted")
    ax.set_ylabel("actual")
    side.set_axis_off()
    lines = [f"{pair.count:>3}  {_short(pair.actual, 14)} as {_short(pair.predicted, 14)}" for pair in pairs]
    text = "\n".join(["most confused (images)", *lines] if lines else ["no mistakes"])
    side.text(0, 1, text, transform=side.transAxes, va="top", fontsize=10, linespacing=1.6)
    worst = [f"{pair.actual} predicted as {pair.predicted} ({plural(pair.count, 'image')})" for pair in pairs[:3]]
    figure.caption = f"Most frequent confusions: {', '.join(worst)}." if worst else "There are no mistakes."
    return _finish(figure)


def plot_class_accuracy(result, source, names=CLASSES):
    """Plot the accuracy of each class with its 95 % confidence interval, highest on top.

    result: from `class_accuracy`.
    """
    title, height = f"Accuracy per class with 95 % confidence interval: {source}", max(4, 0.2 * len(result.accuracy))
    figure, ax = _axes(title, "accuracy (%)", "", height)
    order = np.argsort(result.accuracy)
    order = order[~np.isnan(result.accuracy[order])]  # without absent classes
    accuracy, low, high = (values[order] for values in result)
    ax.errorbar(accuracy, range(len(order)), xerr=[accuracy - low, high - accuracy], fmt="o", color=BLUE, capsize=4)
    ax.set_yticks(range(len(order)), [f"{_short(names[i])}  {result.accuracy[i]:.1f}" for i in order])
    ax.set_ylim(-0.7, len(order) - 0.3)
    ends = [f"{names[order[k]]}, {accuracy[k]:.1f} % ({low[k]:.1f} to {high[k]:.1f})" for k in (0, -1)]
    figure.caption = f"Lowest accuracy: {ends[0]}. Highest accuracy: {ends[1]}."
    return _finish(figure)


def plot_calibration(result, source):
    """Plot the reliability diagram, accuracy against confidence, and the number of images per bin.

    result: from `calibration`.
    """
    figure = CaptionedFigure(figsize=(9, 5), layout="constrained")
    _title(figure, f"Calibration: {source}")
    ax, below = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    filled, centres = result.count > 0, (np.arange(len(result.count)) + 0.5) / len(result.count)
    ax.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="perfect calibration")
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
    means = [
        100 * np.average(values[filled], weights=result.count[filled])
        for values in (result.confidence, result.accuracy)
    ]
    figure.caption = (
        f"Mean confidence {means[0]:.1f} %, accuracy {means[1]:.1f} %. Expected calibration error: "
        f"{100 * result.error:.1f} points."
    )
    return _finish(figure)


class _BarsGrid:
    """A figure with rows x columns cells, each an image with bars for its most probable classes."""

    def __init__(self, rows, columns, title, caption_height):
        self.figure = CaptionedFigure(figsize=(9, rows * (1.05 + caption_height) + 0.4), layout="constrained")
        _title(self.figure, title)
        axes = self.figure.subplots(rows, 2 * columns, squeeze=False, width_ratios=[1, 1.15] * columns)
        for number, ax in enumerate(axes.flat):
            ax.set_axis_off()
            ax.set_box_aspect(1 / 1.15 if number % 2 else 1)  # bars as high as the image
        self.cells = iter(axes.reshape(-1, 2))

    def add(self, image, caption, names, probabilities, marked=None):
        """Fill the next cell. marked: the class whose name is bold and whose bar alone is blue."""
        ax, side = next(self.cells)
        ax.imshow(image, interpolation="nearest")
        ax.set_title(caption, fontsize=9, pad=3, loc="left")
        side.barh(
            range(len(names)), probabilities, color=[SKY if marked in (None, n) else ORANGE for n in names], height=0.85
        )
        for place, name in enumerate(names):
            side.text(
                0.03,
                place,
                _short(name, 18),
                va="center",
                fontsize=9,
                fontweight="bold" if name == marked else "normal",
            )
        side.set_xlim(0, 1)
        side.set_ylim(len(names) - 0.5, -0.5)


def plot_misclassified(split, mistakes, rows=4, columns=4, which=None, names=CLASSES):
    """Plot misclassified images with their three most probable classes; the actual class is bold and blue.

    mistakes: from `misclassified` on the same split, plotted in its order. which: description of the selected
    mistakes, for the title.
    """
    n = len(mistakes.index)
    title = f"{n:,} of {len(split):,} misclassified ({100 * n / len(split):.1f} %): {split.source}"
    if which:
        title = f"{which}, {plural(n, 'image')}: {split.source}"
    grid, described = _BarsGrid(rows, columns, title, caption_height=0.36), []
    for index, probabilities in list(zip(*mistakes, strict=True))[: rows * columns]:
        top, actual = np.argsort(-probabilities, kind="stable")[:3], names[split.labels[index]]
        predicted, confidence = names[top[0]], 100 * probabilities[top[0]]
        caption = f"pred. {_short(predicted, 14)}, {confidence:.0f} %\nactual {_short(actual, 14)}"
        grid.add(split.images[index], caption, [names[i] for i in top], probabilities[top], marked=actual)
        described.append(f"{actual} predicted as {predicted} ({confidence:.0f} %)")
    grid.figure.caption = (
        f"Shown, row by row: {', '.join(described)}." if described else "There are no mistakes to show."
    )
    return _finish(grid.figure)


def plot_predictions(predictions, source, columns=4):
    """Plot images as the network received them, with their most probable classes.

    predictions: from `predict`. source: where the images come from, for the title.
    """
    title = f"Predictions: {source}"
    grid, described = _BarsGrid(-(-len(predictions) // columns), columns, title, caption_height=0.2), []
    for source, image, classes, probabilities in predictions:
        name = Path(source).name
        labels = [f"{_short(label, 13)} {100 * p:.0f} %" for label, p in zip(classes, probabilities, strict=True)]
        grid.add(image, _short(name), labels, probabilities)
        described.append(f"{name}: {classes[0]} {100 * probabilities[0]:.0f} %")
    grid.figure.caption = f"Most probable class per file. {'; '.join(described)}."
    return _finish(grid.figure)


def plot_grad_cam(pairs, source):
    """Plot Grad-CAM maps of a correct prediction (left) and a mistake (right) of the same class, one pair per row.

    The mistake has two maps: for the predicted class and for the actual class. pairs: from `grad_cam_pairs`.
    """
    title = f"Grad-CAM of correct predictions and mistakes: {source}"
    figure, axes = _image_grid(max(len(pairs), 1), 5, title, size=1.8, caption_height=0.25)
    described = []
    for row, pair in zip(axes, pairs, strict=False):
        cells = [
            (pair.right, None, f"{_short(pair.actual, 14)}, correct"),
            (pair.right, pair.right_cam, f"for {_short(pair.actual, 14)}, {100 * pair.right_confidence:.0f} %"),
            (pair.wrong, None, f"{_short(pair.actual, 14)}, mistake"),
            (pair.wrong, pair.wrong_cam, f"for {_short(pair.predicted, 14)}, {100 * pair.wrong_confidence:.0f} %"),
            (pair.wrong, pair.missed_cam, f"for {_short(pair.actual, 14)}"),
        ]
        for ax, (image, cam, caption) in zip(row, cells, strict=True):
            _show_image(ax, image, caption)
            if cam is not None:
                ax.imshow(cam, cmap="viridis", vmin=0, vmax=1, alpha=0.55, extent=ax.images[0].get_extent())
        described.append(f"{pair.actual}, and {pair.actual} predicted as {pair.predicted}")
    figure.caption = f"Rows: {'; '.join(described)}." if described else "There are no pairs to compare."
    return _finish(figure)
