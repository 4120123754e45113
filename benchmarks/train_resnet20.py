"""Train ResNet-20 for comparison: `python -m benchmarks.train_resnet20 --recipe one_cycle`, options as of train.py."""

import train
from benchmarks.resnet20 import ResNet20

if __name__ == "__main__":
    train.main(lambda config: ResNet20())  # which has no dropout
