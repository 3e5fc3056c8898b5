"""Writes labelled images to .beton files; see rsb_ffcv/commands/write.py."""

import sys

from rsb_ffcv.commands.write import main, program

__all__ = ["main"]

if __name__ == "__main__":
    sys.exit(program())
