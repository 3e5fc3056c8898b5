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
    by_key = _argsort(keys)
    if kind == "random" or sizes.sum() <= window_bytes:
        return Order(by_key, np.empty(0, np.int64), [])
    by_place = np.lexsort((pointers, files))
    first, lengths = _chunks(sizes[by_place].astype(np.int64))
    shuffled = np.argsort(draws.words64(seed, epoch, draws.WINDOW, len(first)), kind="stable")
    window_of_chunk = np.empty(len(first), np.int64)
    window_of_chunk[shuffled] = (np.cumsum(lengths[shuffled]) - 1) // window_bytes
    windows, window_of_chunk = np.unique(window_of_chunk, return_inverse=True)
    # in few bytes, which numpy sorts in linear time
    window_of_chunk = window_of_chunk.astype(np.min_scalar_type(len(windows)))
    window = np.empty(count, window_of_chunk.dtype)
    window[by_place] = np.repeat(window_of_chunk, np.diff(first, append=count))
    indices = by_key[np.argsort(window[by_key], kind="stable")]
    # a chunk that continues in the next file has an extent in each
    file = files[by_place]
    starts = np.union1d(first, np.flatnonzero(file[1:] != file[:-1]) + 1)
    last = by_place[np.append(starts[1:], count) - 1]
    offsets = pointers[by_place[starts]].astype(np.int64)
    ranges = np.stack(
        [
            file[starts].astype(np.int64),
            offsets,
            (pointers[last] + sizes[last]).astype(np.int64) - offsets,
        ],
        1,
    )
    window_of_range = window[by_place[starts]]
    ranges = ranges[np.argsort(window_of_range, kind="stable")]
    extents = np.split(ranges, np.cumsum(np.bincount(window_of_range))[:-1])
    return Order(indices, np.cumsum(np.bincount(window)) - np.bincount(window), extents)


def _argsort(keys: np.ndarray) -> np.ndarray:
    """np.argsort(keys, kind="stable") of uint64 draws, int64, in a third of its time: sorts numbers
    instead of places. A number has the first bits of a draw, and its place instead of the others.
    """
    bits = np.uint64(int(len(keys) - 1).bit_length())
    numbers = keys >> bits << bits
    numbers |= np.arange(len(keys), dtype=np.uint64)
    numbers.sort()
    first_bits = numbers >> bits
    same = np.flatnonzero(first_bits[1:] == first_bits[:-1])
    numbers &= (np.uint64(1) << bits) - np.uint64(1)
    order = numbers.view(np.int64)
    # the few whose first bits are equal
    tied = np.union1d(same, same + 1)
    order[tied] = order[tied][np.lexsort((order[tied], keys[order[tied]]))]
    return order


def _chunks(sizes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Divides samples into chunks of CHUNK_BYTES, as if they followed each other without gaps in
    one file. Returns the first sample of each chunk, and its bytes, int64. sizes: int64."""
    number = (np.cumsum(sizes) - 1) // CHUNK_BYTES
    first = np.append(0, np.flatnonzero(number[1:] != number[:-1]) + 1)
    return first, np.add.reduceat(sizes, first)


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
