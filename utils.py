"""The notebook's vocabulary: names re-exported from the package."""

from session8.checkpoint import count_macs, describe_record, load_model, save_model, write_record
from session8.config import RECIPES, Config, get_device
from session8.data import CLASSES, load_cifar10, validation_split
from session8.loaders import augment, make_loader, test_transforms, train_transforms
from session8.plots import (
    plot_accuracy,
    plot_augmentations,
    plot_calibration,
    plot_class_accuracy,
    plot_confusion,
    plot_grad_cam,
    plot_loss,
    plot_lr_range,
    plot_misclassified,
    plot_predictions,
    plot_samples,
    plot_schedule,
    plot_training,
)
from session8.training import fit, run_folder, test, train
