"""Which image stands in which slot of an epoch, and which slots a process works on. Pure functions,
no state.

An epoch's slots are cut into groups of `batch_size`: a group is one micro-batch, one mix of mixup
or cutmix, one set of batch-norm statistics. Of a step's groups a process takes every world_size-th,
from the one of its rank on, so that a step is made of the same groups whether 8 processes take one
each, 3 take three or two, or one process takes 8 in turn.
"""

from dataclasses import dataclass

import numpy as np

from rsb_ffcv.ops import draws

RUN_BYTES = (
    1 << 20
)  # what quasi_random reads in one go: enough for any disk to be near its sequential rate


@dataclass(frozen=True, eq=False)
class Order:
    """indices: the dataset index of each position, int64, every image once. The file is read window
    by window: window w begins at position starts[w] and lies in the byte ranges extents[w], int64
    (n, 2): offset, length. Where the whole file is one window, both are empty."""

    indices: np.ndarray
    starts: np.ndarray
    extents: list[np.ndarray]


def epoch_order(
    kind: str, seed: int, epoch: int, *, pointers: np.ndarray, sizes: np.ndarray, window_bytes: int
) -> Order:
    """The order of an epoch over samples that lie at `pointers` with `sizes` bytes.

    kind: "sequential"; "random": a permutation (64-bit draws sorted, ties by index);
    "quasi_random": runs of neighbouring samples, RUN_BYTES long, in random order, and a permutation
    of the samples within each window of runs that together have `window_bytes`. No process needs
    more of the file at once than its window and the next.
    """
    count = len(pointers)
    if kind == "sequential":
        return Order(np.arange(count), np.empty(0, np.int64), [])
    keys = draws.words64(seed, epoch, draws.ORDER, count)
    if kind == "random" or sizes.sum() <= window_bytes:
        return Order(np.argsort(keys, kind="stable"), np.empty(0, np.int64), [])
    by_place = np.argsort(pointers, kind="stable")
    ends = (pointers[by_place] + sizes[by_place]).astype(np.int64)
    run_of_place = ((ends - 1 - int(pointers[by_place[0]])) // RUN_BYTES).astype(np.int64)
    runs, first, run_of_place = np.unique(run_of_place, return_index=True, return_inverse=True)
    last = np.append(first[1:], count) - 1
    offsets = pointers[by_place[first]].astype(np.int64)
    lengths = ends[last] - offsets
    shuffled = np.argsort(draws.words64(seed, epoch, draws.WINDOW, len(runs)), kind="stable")
    window_of_run = np.empty(len(runs), np.int64)
    window_of_run[shuffled] = (np.cumsum(lengths[shuffled]) - 1) // window_bytes
    window_of_run = np.unique(window_of_run, return_inverse=True)[1]
    window = np.empty(count, np.int64)
    window[by_place] = window_of_run[run_of_place]
    indices = np.lexsort((np.arange(count), keys, window))
    windows = range(int(window.max()) + 1)
    extents = [
        np.stack([offsets[window_of_run == w], lengths[window_of_run == w]], 1) for w in windows
    ]
    return Order(indices, np.searchsorted(window[indices], np.array(windows)), extents)


def group_slots(
    step: int, place: int, *, batch_size: int, groups: int, repeats: int = 1
) -> np.ndarray:
    """The `batch_size` slots, int64, of the group number `place` of a step of `groups` groups.

    Consecutive slots; with `repeats` above 1, where neighbouring slots hold copies of one image,
    every groups-th slot of the step instead: copies then land in different groups, as timm's
    RepeatAugSampler deals them to its processes.
    """
    first = step * groups * batch_size
    if repeats == 1:
        first += place * batch_size
        return np.arange(first, first + batch_size)
    return first + place + groups * np.arange(batch_size)
