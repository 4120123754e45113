"""The names of the package `session8` that notebooks use, by topic."""

# fmt: off
# Data: find or download CIFAR-10; hold out training images for validation.
from session8.data import CLASSES, load_cifar10, validation_split
# The recipe, and the device.
from session8.config import RECIPES, Config
from session8.device import get_device
# Augmentation and batches.
from session8.augment import augment, test_transforms, train_transforms
from session8.loaders import make_loader
# Before training: the learning rate range test, and an estimate of the time.
from session8.lr_finder import estimate_seconds, lr_range_test
# Training and testing.
from session8.trainer import fit, run_folder
from session8.training import accuracy_by_views, collect_logits, test, train, train_step
# The same in several processes, by torchrun.
from session8.launch import run_command, torchrun_command
# Saved weights, and the record of a run.
from session8.checkpoint import load_model, save_model
from session8.records import (
    count_macs, data_fingerprint, describe_record, final_metrics, print_summary, read_runs, runs_table,
    write_record,
)
# Error analysis.
from session8.analysis import (
    calibration, class_accuracy, confusion_matrix, grad_cam_pairs, misclassified, most_confused,
)
# Inference.
from session8.inference import export_onnx, predict
# Figures.
from session8.plots import (
    plot_accuracy, plot_augmentations, plot_calibration, plot_class_accuracy, plot_confusion, plot_grad_cam, plot_loss,
    plot_lr_range, plot_misclassified, plot_predictions, plot_runs, plot_samples, plot_schedule, plot_training,
)

__all__ = [
    "CLASSES", "load_cifar10", "validation_split",
    "RECIPES", "Config", "get_device",
    "augment", "test_transforms", "train_transforms", "make_loader",
    "estimate_seconds", "lr_range_test",
    "accuracy_by_views", "collect_logits", "fit", "run_folder", "test", "train", "train_step",
    "run_command", "torchrun_command",
    "load_model", "save_model", "count_macs", "data_fingerprint", "describe_record", "final_metrics",
    "print_summary", "write_record", "read_runs", "runs_table",
    "calibration", "class_accuracy", "confusion_matrix", "grad_cam_pairs", "misclassified", "most_confused",
    "export_onnx", "predict",
    "plot_accuracy", "plot_augmentations", "plot_calibration", "plot_class_accuracy", "plot_confusion",
    "plot_grad_cam", "plot_loss", "plot_lr_range", "plot_misclassified", "plot_predictions", "plot_runs",
    "plot_samples", "plot_schedule", "plot_training",
]
