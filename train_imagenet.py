"""Trains an image classifier on .beton files; see rsb_ffcv/commands/train.py."""

import sys

from rsb_ffcv.commands.train import main, program

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(program())
