"""What an op is here: a kernel, its draws, and an FFCV `Operation` that holds both together.

FFCV gives an op the dataset indices of a batch but neither epoch nor slot, lets it draw from a generator whose state
belongs to a thread, and compiles its code anew in each process. Here an op's randomness is computed first, from
addresses, and its code is a function that is compiled already: C, or a cached numba `cfunc`.
`declare_state_and_memory` is FFCV's. `generate_code` gives the address of a function

    int32 kernel(uint8 *image, int32 height, int32 width, void *draw, void *scratch)

that changes one height x width x 3 image in place, reads its parameters at `draw`, and returns 0, or 8 to refuse the
sample. The loader's threads call it without the interpreter. A decoder's is `rsb_decoder` of csrc/rsb.h.
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
    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """The random parameters of a batch, C-contiguous: shape (n, ...), or (n, k, ...) with `passes` k.
        heights, widths: (n,) pixels of the images as they reach this op."""

    passes = 1  # how many times the kernel runs on an image, each time with the next of its draws

    def declare_state_and_memory(self, previous_state):
        return previous_state, None
