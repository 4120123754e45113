"""CIFAR-10: data, training, analysis and figures behind `Session_8.ipynb`."""
