"""Trains an image classifier on .beton files: python train_imagenet.py --config-file
rsb_configs/a2_300.yaml"""

import sys

from rsb_ffcv import exit_status
from rsb_ffcv.config import TrainConfig, read_config


def main() -> None:
    config = read_config(TrainConfig, __doc__)
    from rsb_ffcv.training import (
        run,
    )  # torch takes seconds to import: wrong options are told of before

    run(config)


if __name__ == "__main__":
    sys.exit(exit_status(main))
