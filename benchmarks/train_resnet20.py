"""Train ResNet-20 for comparison: `python benchmarks/train_resnet20.py --recipe one_cycle`, options as of train.py."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from resnet20 import ResNet20

import train

if __name__ == "__main__":
    train.main(lambda config: ResNet20())  # which has no dropout
