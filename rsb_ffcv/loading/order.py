"""Which image is in which slot of an epoch, and which slots a process loads. Pure functions, no
state.

The slots of an epoch are divided into groups of `batch_size`. A group is one micro-batch, one mix
of mixup or cutmix, and one set of batch-norm statistics. A process takes every world_size-th group
of a step, starting with the one of its rank. A step therefore consists of the same groups whether
8 processes take one each, 3 take three or two each, or one process takes 8 one after another.
"""

from dataclasses import dataclass

import numpy as np

from rsb_ffcv.ops import draws

# bytes that quasi_random reads at once: large enough to reach nearly a disk's sequential rate
CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, eq=False)
class Order:
    """The order of an epoch. The files are read window by window.

    indices: int64, the dataset index of each position; every image once.
    starts: int64, the position at which each window begins.
    extents: int64 (n, 3) per window, its byte ranges: number of the file, offset, length.

    If everything is one window, `starts` and `extents` are empty.
    """

    indices: np.ndarray
    starts: np.ndarray
    extents: list[np.ndarray]


def epoch_order(
    kind: str,
    seed: int,
    epoch: int,
    *,
    files: np.ndarray,
    pointers: np.ndarray,
    sizes: np.ndarray,
    window_bytes: int,
) -> Order:
    """The order of an epoch. It does not depend on how the samples are divided into files.

    kind: "sequential": the order of the dataset.
        "random": a permutation (64-bit draws sorted, ties by index).
        "quasi_random": chunks of neighbouring samples, CHUNK_BYTES long, in random order. A window
        is a number of chunks with `window_bytes` in total; the samples within a window are
        permuted. A process needs at most its current window and the next one in memory.
    seed, epoch: of the draws.
    files: (n,), number of each sample's file.
    pointers: uint64 (n,), offset of each sample in its file.
    sizes: uint64 (n,), bytes of each sample.
    window_bytes: see "quasi_random".
    """
    count = len(pointers)
    if kind == "sequential":
        return Order(np.arange(count), np.empty(0, np.int64), [])
    keys = draws.words64(seed, epoch, draws.ORDER, count)
    if kind == "random" or sizes.sum() <= window_bytes:
        return Order(np.argsort(keys, kind="stable"), np.empty(0, np.int64), [])
    by_place = np.lexsort((pointers, files))
    # as if the samples followed each other without gaps, in one file
    ends = np.cumsum(sizes[by_place], dtype=np.int64)
    chunks, first, chunk_of_place = np.unique(
        (ends - 1) // CHUNK_BYTES, return_index=True, return_inverse=True
    )
    lengths = np.bincount(chunk_of_place, sizes[by_place])
    shuffled = np.argsort(draws.words64(seed, epoch, draws.WINDOW, len(chunks)), kind="stable")
    window_of_chunk = np.empty(len(chunks), np.int64)
    window_of_chunk[shuffled] = (np.cumsum(lengths[shuffled]) - 1) // window_bytes
    window_of_chunk = np.unique(window_of_chunk, return_inverse=True)[1]
    window = np.empty(count, np.int64)
    window[by_place] = window_of_chunk[chunk_of_place]
    indices = np.lexsort((np.arange(count), keys, window))
    # a chunk that continues in the next file has an extent in each
    file = files[by_place].astype(np.int64)
    starts = np.union1d(first, np.flatnonzero(np.diff(file, prepend=file[:1])))
    last = by_place[np.append(starts[1:], count) - 1]
    offsets = pointers[by_place[starts]].astype(np.int64)
    ranges = np.stack(
        [file[starts], offsets, (pointers[last] + sizes[last]).astype(np.int64) - offsets], 1
    )
    window_of_range = window[by_place[starts]]
    windows = range(int(window.max()) + 1)
    extents = [ranges[window_of_range == number] for number in windows]
    return Order(indices, np.searchsorted(window[indices], np.array(windows)), extents)


def group_slots(
    step: int, place: int, *, batch_size: int, groups: int, repeats: int = 1
) -> np.ndarray:
    """Returns the `batch_size` slots, int64, of group number `place` of a step of `groups` groups.

    The slots are consecutive. With `repeats` above 1, neighbouring slots hold copies of one image.
    A group then takes every groups-th slot of the step, so that copies are in different groups, as
    timm's RepeatAugSampler distributes them to its processes.
    """
    first = step * groups * batch_size
    if repeats == 1:
        first += place * batch_size
        return np.arange(first, first + batch_size)
    return first + place + groups * np.arange(batch_size)
