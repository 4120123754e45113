"""Speed comparisons, and ResNet-20. `python -m benchmarks.train_step` and the others print a table."""
