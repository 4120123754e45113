import os

os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"  # before anything imports it: it would ask the package index for news

import pytest
import torch

import cifar10

# The networks of the tests are too small for threads to pay, and beside another job those would wait for each other.
torch.set_num_threads(1)

REAL_DATA = os.environ.get("CIFAR10_ROOT")


@pytest.fixture(autouse=True)
def no_data_but_the_tests_own(monkeypatch, tmp_path):
    """No test may find, or try to download, data that it did not make."""
    monkeypatch.delenv("CIFAR10_ROOT", raising=False)
    monkeypatch.delenv("CIFAR10_URL", raising=False)
    monkeypatch.setattr(cifar10, "MIRRORS", ())
    monkeypatch.setattr(cifar10, "DATA_FOLDER", tmp_path / "data")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))


@pytest.fixture
def real_root():
    if not REAL_DATA:
        pytest.skip("needs the real images: set CIFAR10_ROOT to their folder")
    return REAL_DATA


@pytest.fixture
def real_splits(real_root):
    return cifar10.load_cifar10(real_root)


@pytest.fixture(scope="session")
def synthetic():
    return cifar10.synthetic_cifar10(300, 100)
