"""What an op is here: a kernel, its draws, and an FFCV `Operation` that holds both together.

FFCV gives an op the dataset indices of a batch but neither epoch nor slot, and lets it draw from a generator whose
state belongs to a thread. Here an op's randomness is computed first, from addresses, and handed to its code as one
more argument. `declare_state_and_memory` is FFCV's. The code that `generate_code` returns is called by this project's
loader, not by FFCV's compiler: it also takes `lo, hi` (the rows of the batch to work on, so that several threads may
share a batch) and `draws`.
"""
from abc import abstractmethod
from typing import NamedTuple

import numpy as np
from ffcv.pipeline.operation import Operation


class Address(NamedTuple):
    """Where a batch stands: `slots` is int64 of shape (n,), positions in the global order of `epoch`."""
    seed: int
    epoch: int
    slots: np.ndarray


class DrawnOperation(Operation):
    """An FFCV Operation whose random numbers are a pure function of an `Address`."""

    @abstractmethod
    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray):
        """The random parameters of a batch. heights, widths: (n,) pixels of the stored images."""
