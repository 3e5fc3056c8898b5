"""Which image stands in which slot of an epoch, and which slots a process works on. Pure functions, no state.

An epoch's slots are cut into groups of `batch_size` consecutive ones: a group is one micro-batch, one mix of mixup or
cutmix, one set of batch-norm statistics. Batch b of a process is group b x world_size + rank, so that a step of G
slots is made of the same groups whether 8 processes take one each or one process takes 8 in turn.
"""
import numpy as np

from rsb_ffcv.ops import draws


def epoch_order(seed: int, epoch: int, num_samples: int) -> np.ndarray:
    """Dataset index of each slot: a permutation of 0 .. num_samples - 1, int64. Sorts 64-bit draws, ties by index."""
    return np.argsort(draws.words64(seed, epoch, draws.ORDER, num_samples), kind="stable")


def group_slots(batch: int, batch_size: int, rank: int, world_size: int) -> np.ndarray:
    """The `batch_size` slots, int64, of batch number `batch` of process `rank`."""
    first = (batch * world_size + rank) * batch_size
    return np.arange(first, first + batch_size)
