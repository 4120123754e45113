"""Figures. Each function takes data and returns a matplotlib Figure; none trains, loads or prints.

Titles name the source of the data, so that synthetic data are not mistaken for CIFAR-10. Names are drawn as they are,
without mathematics, and long names are cut in the middle. A character that the font lacks appears as a box: list a font
that has it in `matplotlib.rcParams["font.family"]`.
"""

import base64
import io
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from textwrap import fill

import numpy as np
from matplotlib.figure import Figure

from session8.analysis import Calibration
from session8.config import Config
from session8.console import plural
from session8.data import CLASSES, Split
from session8.inference import Prediction
from session8.lr_finder import LRRange

# From the colour-blind safe palette of Okabe and Ito.
BLUE, ORANGE, GREEN, SKY = "#0072B2", "#E69F00", "#009E73", "#56B4E9"
LINE_STYLES = ("-", "--", "-.", ":")


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
        caption = _encodable(self.caption)
        # Raw: IPython before version 8, which Colab has, cannot give an Image an alternative text.
        display(image, metadata={"image/png": {"alt": caption}}, raw=True)
        markdown = re.sub(r"([\\`*_{}\[\]<>#|$])", r"\\\1", caption)
        display({"text/markdown": markdown, "text/plain": caption}, raw=True)


def _encodable(text):
    """Return a text in which bytes of file names that are no characters are escaped."""
    return str(text).encode(errors="backslashreplace").decode()


def _text(name, length=14):
    """Return a text as figures draw it: without its middle if it is longer than `length`, in lines of 90 characters."""
    text = _encodable(name)
    if len(text) > length:
        text = f"{text[: (length - 1) // 2]}…{text[len(text) - length // 2 :]}"
    return fill(text, 90).replace("$", r"\$")  # matplotlib reads the text between two plain ones as mathematics


def _figure(title, height, rows=1, columns=1, **options):
    """Return a figure with a title, as wide as a notebook, and its axes."""
    figure = CaptionedFigure(figsize=(9, height), layout="constrained")
    figure.suptitle(_text(title, 170))
    axes = figure.subplots(rows, columns, **options)
    for ax in figure.axes:
        ax.grid(alpha=0.3)
    return figure, axes


# -- images --------------------------------------------------------------------------------------------------------


def _image_grid(title, rows, columns, row_height):
    """Return a figure with a grid of axes for images and the captions above them."""
    figure, axes = _figure(title, rows * row_height + 0.4, max(rows, 1), columns, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    return figure, axes


def _show_image(ax, image, caption="", loc="center"):
    ax.imshow(image, interpolation="nearest")
    ax.set_title(caption, fontsize=9, pad=3, loc=loc)


def plot_samples(split: Split, rows: int = 4, seed: int = 0) -> Figure:
    """Plot `rows` random images of each class, one class per column."""
    rng = np.random.default_rng(seed)
    columns = len(CLASSES)
    row_height = min(1, 9 / columns + 0.1)
    figure, axes = _image_grid(f"Samples of each class: {split.source}", rows, columns, row_height)
    for label, (name, column) in enumerate(zip(CLASSES, axes.T, strict=True)):
        members = rng.permutation(np.flatnonzero(split.labels == label))
        for ax, index in zip(column, members, strict=False):
            _show_image(ax, split.images[index])
        column[0].set_title(_text(name, 108 // columns), fontsize=9, pad=3)  # an inch has room for 12 characters
    figure.caption = f"{plural(rows, 'random image')} of each class, one class per column: {', '.join(CLASSES)}."
    return figure


def plot_augmentations(image: np.ndarray, draws: np.ndarray, source: str) -> Figure:
    """Plot a training image and augmentations of it.

    image: uint8 (32, 32, 3). draws: uint8 (N, 32, 32, 3), from `augment`.
    """
    columns = 8
    rows = -(-(len(draws) + 1) // columns)
    drawn = plural(len(draws), "augmentation")
    figure, axes = _image_grid(f"One image and {drawn} of it: {source}", rows, columns, row_height=1.25)
    _show_image(axes.flat[0], image, "original")
    for ax, draw in zip(axes.flat[1:], draws, strict=False):
        _show_image(ax, draw)
    figure.caption = f"The original image, then {drawn} of it."
    return figure


# -- curves --------------------------------------------------------------------------------------------------------


def _plot_over_epochs(ax, values, **look):
    ax.plot(np.arange(1, len(values) + 1), values, **look)
    ax.set_xlabel("epoch")
    ax.xaxis.get_major_locator().set_params(integer=True)


def _plot_train_and_test(history, quantity, ylabel, unit, source):
    """Plot a training and a test curve over the epochs, with the last values in the legend. unit: format of a value."""
    figure, ax = _figure(f"{quantity.capitalize()}: {source}", 4)
    lasts = []
    for part, look in (("train", {"color": ORANGE, "linestyle": "--"}), ("test", {"color": BLUE})):
        values = history[f"{part}_{quantity}"]
        last = unit.format(values[-1]) if values else "no complete epoch"
        _plot_over_epochs(ax, values, marker=".", label=f"{part} (last: {last})", **look)
        lasts.append(f"{part} {last}")
    ax.set_ylabel(ylabel)
    ax.legend()
    figure.caption = "There is no complete epoch yet."
    if values:
        figure.caption = f"{quantity.capitalize()} after {plural(len(values), 'epoch')}: {', '.join(lasts)}."
    return figure


def plot_loss(history: dict, source: str) -> Figure:
    """Plot the mean NLL of training and test images over the epochs."""
    return _plot_train_and_test(history, "loss", "mean negative log-likelihood", "{:.3f}", source)


def plot_accuracy(history: dict, source: str) -> Figure:
    """Plot the accuracy on training and test images over the epochs."""
    return _plot_train_and_test(history, "accuracy", "accuracy (%)", "{:.2f} %", source)


def plot_training(history: dict, source: str) -> Figure:
    """Plot the difference of training and test accuracy, the learning rate and the seconds of each epoch."""
    figure, axes = _figure(f"Training: {source}", 3.2, columns=3)
    gap = [train - test for train, test in zip(history["train_accuracy"], history["test_accuracy"], strict=True)]
    seconds = history["seconds"]
    curves = {
        "train minus test accuracy (points)": (gap, ORANGE),
        "learning rate": (history["lr"], BLUE),
        "seconds, with the test": (seconds, GREEN),
    }
    for ax, (ylabel, (values, color)) in zip(axes, curves.items(), strict=True):
        _plot_over_epochs(ax, values, color=color, marker=".")
        ax.set_ylabel(ylabel)
        ax.axhline(0, color="black", linewidth=0.8)  # with 0, a constant does not look like noise
    figure.caption = "There is no complete epoch yet."
    if seconds:
        figure.caption = (
            f"Train minus test accuracy: {gap[0]:.2f} points in the first epoch, {gap[-1]:.2f} in the last. Median "
            f"time of an epoch: {statistics.median(seconds):.3g} s ({min(seconds):.3g} to {max(seconds):.3g} s)."
        )
    return figure


def plot_schedule(configs: dict[str, Config]) -> Figure:
    """Plot the learning rate over training of each recipe in `configs`, {name: Config}."""
    figure, ax = _figure("Learning rate over training", 4)
    steps_per_epoch = 100  # of the curves; in training it depends on the batch size
    described = []
    for number, (name, config) in enumerate(configs.items()):
        steps = range(config.epochs * steps_per_epoch)
        epochs = [(step + 0.5) / steps_per_epoch for step in steps]
        rates = [config.lr_at(step, steps_per_epoch) for step in steps]
        # The space: a legend leaves out labels that begin with an underscore.
        label = f" {_text(name, 60)} (peak: {config.lr:.4g})"
        ax.plot(epochs, rates, LINE_STYLES[number % 4], color=f"C{number}", linewidth=2, label=label)
        described.append(f"{name}: {rates[0]:.3g} at first, {config.lr:.3g} at most, {rates[-1]:.3g} at the end")
    ax.set(xlabel="epoch", ylabel="learning rate")
    ax.set_ylim(bottom=0)
    ax.legend()
    figure.caption = f"Learning rates. {'; '.join(described)}."
    return figure


def plot_runs(runs: list[dict]) -> Figure:
    """Plot the test accuracy of runs over the epochs and over the minutes, one line per run.

    runs: from `read_runs`. Runs that differ in the seed only have one colour and line style. Minutes are
    compared on one device only, the one with the most runs.
    """
    sources = ", ".join(dict.fromkeys(run["data"] for run in runs)) or "no runs"
    height = 3.6 + 0.2 * len(runs)  # room for the legend
    figure, (by_epochs, by_minutes) = _figure(f"Test accuracy of runs: {sources}", height, columns=2, sharey=True)
    groups = list(dict.fromkeys(run["group"] for run in runs))
    devices = [run["device"] for run in runs]
    device = max(devices, key=devices.count, default="a device")
    lasts = []
    for index, run in enumerate(runs):
        group = groups.index(run["group"])
        look = dict(color=f"C{group}", linestyle=LINE_STYLES[group % 4], marker="os^vD*P"[index % 7], markersize=4)
        accuracy, minutes = run["history"]["test_accuracy"], np.cumsum(run["history"]["seconds"]) / 60
        label = f" {_text(run['label'], 90)}"  # the space: as in plot_schedule
        _plot_over_epochs(by_epochs, accuracy, label=label, **look)
        if run["device"] == device:
            by_minutes.plot(minutes, accuracy, **look)
        if accuracy:
            lasts.append(f"{run['label']}: {accuracy[-1]:.2f} %")
    by_epochs.set_ylabel("test accuracy (%)")
    by_minutes.set_xlabel(f"minutes on {_text(device, 40)}")
    if runs:
        figure.legend(loc="outside lower center", fontsize=9)
    figure.caption = "There are no finished runs yet."
    if lasts:
        figure.caption = f"Test accuracy after the last epoch: {'; '.join(lasts)}. Right: only runs on {device}."
    return figure


def plot_lr_range(result: LRRange, source: str) -> Figure:
    """Plot the smoothed loss of `lr_range_test` against the learning rate, with the suggestion marked."""
    figure, ax = _figure(f"Learning rate range test: {source}", 4)
    ax.plot(result.lr, result.loss, color=BLUE, marker=".", label="smoothed training loss")
    ax.set(xscale="log", xlabel="learning rate", ylabel="mean negative log-likelihood")
    ax.xaxis.set_major_formatter("{x:g}")  # exponents of powers of ten would be too small to read
    if not result.lr:
        ax.set_title("no range test: the network cannot be copied")
        figure.caption = "There is no range test: the network cannot be copied."
    elif result.suggestion is None:
        ax.set_title("no suggestion: the loss never falls")
        figure.caption = (
            "There is no suggestion: the loss never falls. Check the labels, start with new weights, or call "
            "lr_range_test with a smaller start."
        )
    else:
        low, high = min(result.loss), result.loss[0]
        ax.axvline(result.suggestion, color=ORANGE, linestyle="--", label=f"suggestion: {result.suggestion:.2g}")
        ax.set_ylim(low - 0.1 * (high - low), high + 0.6 * (high - low) + 0.1)  # without the explosion at the end
        lowest = result.lr[int(np.argmin(result.loss))]
        figure.caption = (
            f"The loss falls from {high:.2f} to its minimum, {low:.2f}, at a learning rate of {lowest:.2g}. "
            f"The suggestion, in the middle of the longest valley, is {result.suggestion:.2g}."
        )
    ax.legend()
    if result.diverged:
        figure.caption += f" Above {result.lr[-1]:.2g} training diverged."
    return figure


# -- error analysis ------------------------------------------------------------------------------------------------


def plot_confusion(confusion: np.ndarray, pairs: list, source: str, names: Sequence = CLASSES) -> Figure:
    """Plot the confusion matrix in percent of each actual class, and list the most frequent confusions.

    confusion: int64 (C, C), from `confusion_matrix`. pairs: from `most_confused`.
    """
    n = len(confusion)
    height = max(5.2, 0.4 * min(n, 20), 0.2 * n)
    title = f"Confusion matrix, percent of each actual class: {source}"
    figure, (ax, side) = _figure(title, height, columns=2, width_ratios=[height, 2.1])
    figure.set_figwidth(height + 3.8)
    percent = 100 * confusion / np.maximum(confusion.sum(1, keepdims=True), 1)
    mistakes = np.where(np.eye(n, dtype=bool), np.nan, percent)  # the diagonal would dominate the colours
    highest = max(np.nanmax(mistakes), 1e-9)
    ax.imshow(mistakes, cmap="Blues", vmin=0, vmax=highest)
    if n <= 20:  # more numbers would not fit
        for (row, column), value in np.ndenumerate(percent):
            weight = "bold" if row == column else "normal"
            color = "white" if mistakes[row, column] > 0.6 * highest else "black"
            number = f"{value:.{1 if n <= 10 else 0}f}"
            ax.text(column, row, number, ha="center", va="center", fontsize=9, fontweight=weight, color=color)
    shown = [_text(name) for name in names[:n]]
    ax.set_xticks(range(n), shown, rotation=90)
    ax.set_yticks(range(n), shown)
    ax.set(xlabel="predicted", ylabel="actual")
    ax.grid(False)
    side.set_axis_off()
    lines = [f"{count:>3}  {_text(actual)} as {_text(predicted)}" for actual, predicted, count in pairs]
    side.text(0, 1, "\n".join(["most confused (images)", *lines] if lines else ["no mistakes"]), va="top")
    worst = [f"{actual} predicted as {predicted} ({plural(count, 'image')})" for actual, predicted, count in pairs[:3]]
    figure.caption = f"Most frequent confusions: {', '.join(worst)}." if worst else "There are no mistakes."
    return figure


def plot_class_accuracy(result: tuple, source: str, names: Sequence = CLASSES) -> Figure:
    """Plot the accuracy of each class with its 95 % confidence interval, highest on top.

    result: from `class_accuracy`.
    """
    order = np.argsort(result[0])
    order = order[~np.isnan(result[0][order])]  # without absent classes
    accuracy, low, high = (values[order] for values in result)
    title = f"Accuracy per class with 95 % confidence interval: {source}"
    figure, ax = _figure(title, max(4, 0.2 * len(order)))
    ax.errorbar(accuracy, range(len(order)), xerr=[accuracy - low, high - accuracy], fmt="o", color=BLUE, capsize=4)
    shown = [f"{_text(names[label], 22)}  {value:.1f}" for label, value in zip(order, accuracy, strict=True)]
    ax.set_yticks(range(len(order)), shown)
    ax.set(xlabel="accuracy (%)", ylim=(-0.7, len(order) - 0.3))
    ends = [f"{names[order[k]]}, {accuracy[k]:.1f} % ({low[k]:.1f} to {high[k]:.1f})" for k in (0, -1)]
    figure.caption = f"Lowest accuracy: {ends[0]}. Highest accuracy: {ends[1]}."
    return figure


def plot_calibration(result: Calibration, source: str) -> Figure:
    """Plot the reliability diagram, accuracy against confidence, and the number of images per bin."""
    count, confidence, accuracy, error = result
    filled, bins = count > 0, len(count)
    figure, (ax, below) = _figure(f"Calibration: {source}", 5, rows=2, sharex=True, height_ratios=[3, 1])
    ax.plot([0, 100], [0, 100], "--", color="black", linewidth=1, label="perfect calibration")
    label = f"this network (expected calibration error: {100 * error:.1f} points)"
    ax.plot(100 * confidence[filled], 100 * accuracy[filled], "o-", color=BLUE, label=label)
    ax.set_ylabel("accuracy (%)")
    ax.legend()
    below.bar(100 * (np.arange(bins) + 0.5) / bins, count, width=90 / bins, color=ORANGE)
    below.set(xlabel="confidence: probability of the predicted class (%)", ylabel="images", yscale="log")
    below.yaxis.set_major_formatter("{x:,.0f}")
    below.set_ylim(bottom=0.8)
    means = [100 * np.average(values[filled], weights=count[filled]) for values in (confidence, accuracy)]
    figure.caption = (
        f"Mean confidence {means[0]:.1f} %, accuracy {means[1]:.1f} %. Expected calibration error: "
        f"{100 * error:.1f} points."
    )
    return figure


def _plot_images_with_bars(title, cells, rows, columns, row_height):
    """Plot images with bars for their most probable classes beside them.

    cells: (image, caption, names, probabilities, position of the class whose name is bold and whose bar is blue).
    """
    figure, axes = _image_grid(title, rows, 2 * columns, row_height)
    for (ax, side), (image, caption, names, probabilities, marked) in zip(axes.reshape(-1, 2), cells, strict=False):
        _show_image(ax, image, caption, loc="left")
        for place, (name, probability) in enumerate(zip(names, probabilities, strict=True)):
            color, weight = (SKY, "bold") if place == marked else (ORANGE, "normal")
            side.barh(place, probability, height=0.85, color=color)
            side.text(0.03, place, name, va="center", fontsize=9, fontweight=weight)
        side.set(xlim=(0, 1), ylim=(len(names) - 0.5, -0.5), box_aspect=1)  # as high as the image
    return figure


def plot_misclassified(
    split: Split, mistakes: tuple, rows: int = 4, columns: int = 4, which: str | None = None, names: Sequence = CLASSES
) -> Figure:
    """Plot misclassified images with their three most probable classes; the actual class is bold and blue.

    mistakes: from `misclassified` on the same split, plotted in its order. which: description of the selected
    mistakes, for the title.
    """
    n = len(mistakes[0])
    title = f"{n:,} of {len(split):,} misclassified ({100 * n / len(split):.1f} %): {split.source}"
    if which:
        title = f"{which}, {plural(n, 'image')}: {split.source}"
    cells, described = [], []
    for index, probabilities in list(zip(*mistakes, strict=True))[: rows * columns]:
        top, label = np.argsort(-probabilities, kind="stable")[:3].tolist(), split.labels[index]
        actual, predicted, confidence = names[label], names[top[0]], f"{100 * probabilities[top[0]]:.0f} %"
        caption = f"pred. {_text(predicted)}, {confidence}\nactual {_text(actual)}"
        marked = top.index(label) if label in top else None
        cells.append((split.images[index], caption, [_text(names[i]) for i in top], probabilities[top], marked))
        described.append(f"{actual} predicted as {predicted} ({confidence})")
    figure = _plot_images_with_bars(title, cells, rows, columns, row_height=1.4)
    figure.caption = f"Shown, row by row: {', '.join(described)}." if described else "There are no mistakes to show."
    return figure


def plot_predictions(predictions: list[Prediction], source: str, columns: int = 4) -> Figure:
    """Plot images as the network received them, with their most probable classes.

    predictions: from `predict`. source: where the images come from, for the title.
    """
    cells, described = [], []
    for path, image, classes, probabilities in predictions:
        file, shares = Path(path).name, [f"{100 * probability:.0f} %" for probability in probabilities]
        names = [f"{_text(name)} {share}" for name, share in zip(classes, shares, strict=True)]
        cells.append((image, _text(file, 22), names, probabilities, None))
        described.append(f"{file}: {classes[0]} {shares[0]}")
    rows = -(-len(cells) // columns)
    figure = _plot_images_with_bars(f"Predictions: {source}", cells, rows, columns, row_height=1.25)
    figure.caption = f"Most probable class per file. {'; '.join(described)}."
    return figure


def plot_grad_cam(pairs: list[dict], source: str) -> Figure:
    """Plot Grad-CAM maps of a correct prediction (left) and a mistake (right) of the same class, one pair per row.

    The mistake has two maps: for the predicted class and for the actual class. pairs: from `grad_cam_pairs`.
    """
    title = f"Grad-CAM of correct predictions and mistakes: {source}"
    figure, axes = _image_grid(title, len(pairs), 5, row_height=2.05)
    described = []
    for row, pair in zip(axes, pairs, strict=False):
        actual, predicted = _text(pair["actual"]), _text(pair["predicted"])
        cells = [
            (pair["right"], None, f"{actual}, correct"),
            (pair["right"], pair["right_cam"], f"for {actual}, {100 * pair['right_confidence']:.0f} %"),
            (pair["wrong"], None, f"{actual}, mistake"),
            (pair["wrong"], pair["wrong_cam"], f"for {predicted}, {100 * pair['wrong_confidence']:.0f} %"),
            (pair["wrong"], pair["missed_cam"], f"for {actual}"),
        ]
        for ax, (image, cam, caption) in zip(row, cells, strict=True):
            _show_image(ax, image, caption)
            if cam is not None:
                ax.imshow(cam, cmap="viridis", vmin=0, vmax=1, alpha=0.55, extent=ax.images[0].get_extent())
        described.append(f"{pair['actual']}, and {pair['actual']} predicted as {pair['predicted']}")
    figure.caption = f"Rows: {'; '.join(described)}." if described else "There are no pairs to compare."
    return figure
