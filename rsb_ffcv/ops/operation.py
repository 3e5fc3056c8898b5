"""The interface of an op: a kernel, its draws, and a `DrawnOperation` that combines them.

FFCV's operations receive the dataset indices of a batch but neither epoch nor slot, draw from a
generator with per-thread state, and are compiled again in each process. Here the random numbers of
an op are computed first, from addresses. Its code is a function that is already compiled: C, or a
cached numba `cfunc`.

    DARKEN = 1000  # the op of its addresses: any number that ops/draws.py does not use

    class Darken(DrawnOperation):
        def draw(self, address, heights, widths):
            return np.array([draws.uniform(address.seed, address.epoch, slot, DARKEN, 0)
                             for slot in address.slots])

        def generate_code(self):
            # for a numba cfunc; for C: ctypes.cast(function, ctypes.c_void_p).value
            return darken.address

Pass an instance to the loader in `ops=[...]`. Its kernel is a function

    int32 kernel(uint8 *image, int32 height, int32 width, void *draw, void *scratch)

that changes one height x width x 3 image in place and reads its parameters from `draw`. It returns
0, or 8 to reject the sample. The loader's threads call it without the interpreter.
"""

from abc import ABC, abstractmethod
from typing import NamedTuple

import numpy as np


class Address(NamedTuple):
    """The address of a batch. slots: int64 (n,), positions in the global order of `epoch`."""

    seed: int
    epoch: int
    slots: np.ndarray


class DrawnOperation(ABC):
    """An operation on one image whose random numbers are a pure function of an `Address`."""

    passes = 1  # how often the kernel runs on an image, each time with its next draw

    @abstractmethod
    def draw(self, address: Address, heights: np.ndarray, widths: np.ndarray) -> np.ndarray:
        """Returns the random parameters of a batch, C-contiguous, with the shape (n, ...), or
        (n, k, ...) if `passes` is k.

        heights, widths: (n,), in pixels, of the images that this op receives.
        """

    @abstractmethod
    def generate_code(self) -> int:
        """Returns the address of the kernel. It must stay valid as long as the operation exists."""


class Decoder(DrawnOperation):
    """The first operation of a loader: reads a stored image and makes one of `shape` from it.

    Its draws are records whose fields are fields of `native.SAMPLE`. Its kernel is an `rsb_decoder`
    of csrc/rsb.h.
    """

    shape: tuple[int, int, int]  # of each image that it makes: height, width, 3

    def draw_into(self, samples: np.ndarray, address: Address) -> None:
        """Writes the draws into `samples`: SAMPLE records (n,) with heights and widths."""
        draws = self.draw(address, samples["height"], samples["width"])
        for name in draws.dtype.names or ():
            samples[name] = draws[name]
