"""What an op is here: a kernel, its draws, and a `DrawnOperation` that holds both together.

FFCV's own operations get the dataset indices of a batch but neither epoch nor slot, draw from a
generator whose state belongs to a thread, and are compiled anew in each process. Here an op's
randomness is computed first, from addresses, and its code is a function that is compiled already:
C, or a cached numba `cfunc`.

    DARKEN = 1000  # the op of its addresses: any number that ops/draws.py does not use

    class Darken(DrawnOperation):
        def draw(self, address, heights, widths):
            return np.array([draws.uniform(address.seed, address.epoch, slot, DARKEN, 0)
                             for slot in address.slots])

        def generate_code(self):
            # of a numba cfunc; for C: ctypes.cast(function, ctypes.c_void_p).value
            return darken.address

An instance goes into the loader's `ops=[...]`. Its kernel is a function

    int32 kernel(uint8 *image, int32 height, int32 width, void *draw, void *scratch)

that changes one height x width x 3 image in place, reads its parameters at `draw`, and returns 0,
or 8 to refuse the sample. The loader's threads call it without the interpreter.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Address(NamedTuple):
    """Where a batch stands: `slots` is int64 of shape (n,), positions in the global order of
    `epoch`."""

    seed: int
    epoch: int
    slots: np.ndarray


class DrawnOperation(ABC):
    """An operation on one image whose random numbers are a pure function of an `Address`."""

    passes = 1  # how many times the kernel runs on an image, each time with the next of its draws

    @abstractmethod
    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """The random parameters of a batch, C-contiguous: shape (n, ...), or (n, k, ...) with
        `passes` k. heights, widths: (n,) pixels of the images as they reach this op."""

    @abstractmethod
    def generate_code(self) -> int:
        """The kernel's address. It must stay valid as long as the operation."""


class Decoder(DrawnOperation):
    """What a loader's list of operations begins with: reads a stored image and makes one of `shape`
    from it.

    Its draws are records whose fields are fields of `native.SAMPLE`; its kernel is an `rsb_decoder`
    of csrc/rsb.h."""

    shape: tuple[int, int, int]  # of each image it makes: height, width, 3
