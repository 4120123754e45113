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
# Before training: what the network is, and the learning rate range test.
from session8.network import count_macs, print_summary
from session8.lr_finder import lr_range_test
# Training and testing.
from session8.start import run_folder
from session8.training import fit, train_step
from session8.evaluation import accuracy_by_views, collect_logits, test
# Saved weights, the record of a run, and runs side by side.
from session8.checkpoint import load_model, save_model
from session8.records import data_fingerprint, describe_record, final_metrics, write_record
from session8.runs import read_runs, runs_table
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
    "count_macs", "print_summary", "lr_range_test",
    "fit", "run_folder", "train_step", "accuracy_by_views", "collect_logits", "test",
    "load_model", "save_model",
    "data_fingerprint", "describe_record", "final_metrics", "read_runs", "runs_table", "write_record",
    "calibration", "class_accuracy", "confusion_matrix", "grad_cam_pairs", "misclassified", "most_confused",
    "export_onnx", "predict",
    "plot_accuracy", "plot_augmentations", "plot_calibration", "plot_class_accuracy", "plot_confusion",
    "plot_grad_cam", "plot_loss", "plot_lr_range", "plot_misclassified", "plot_predictions", "plot_runs",
    "plot_samples", "plot_schedule", "plot_training",
]
