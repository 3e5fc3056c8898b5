"""Every random number of a run: a pure function of (seed, epoch, slot, op, k).

A *slot* is a position in the epoch's global order, so two copies of one image in an epoch differ, and nothing depends
on thread, worker, rank or history. The generator is Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy
as 1, 2, 3", SC 2011): key = seed, counter = (slot, epoch, op, k // 4), and draw k is output word k % 4.

What is drawn for a whole batch (`crop`, `augment`, `loading.batch`) is drawn in `csrc/draws.c` with the same functions. No
fastmath: the same address gives the same bits wherever IEEE arithmetic and the platform's log/exp/sqrt are the same.
"""
import numpy as np

from rsb_ffcv.ops.native import library

# The op of an address. A number is never reused for another purpose: that would change every recorded run.
ORDER, CROP, FLIP, RAND_AUGMENT, MIX, ERASE, NOISE, STORE, INIT, DROP, JITTER, WINDOW = range(12)


def philox(seed, epoch, slot, op, block) -> tuple[int, int, int, int]:
    """Four 32-bit words at one address. seed: 64 bits; epoch, slot, op, block: 32 bits each."""
    words = np.empty(4, np.uint32)
    library.rsb_philox(seed, epoch, slot, op, block, words.ctypes.data)
    return tuple(words.tolist())


def word(seed, epoch, slot, op, k) -> int:
    """Draw k, 32 bits."""
    return philox(seed, epoch, slot, op, k // 4)[k % 4]


def uniform(seed, epoch, slot, op, k) -> float:
    """Draw k as a float64 in [0, 1), a multiple of 2**-32."""
    return library.rsb_uniform(seed, epoch, slot, op, k)


def below(seed, epoch, slot, op, k, n) -> int:
    """Draw k as an integer in [0, n), 1 <= n < 2**31. Bias at most n / 2**32."""
    return library.rsb_below(seed, epoch, slot, op, k, n)


def normal(seed, epoch, slot, op, k) -> float:
    """A standard normal float64 from draws k and k + 1 (Box-Muller)."""
    return library.rsb_normal(seed, epoch, slot, op, k)


def beta(seed, epoch, slot, op, k, a) -> float:
    """A Beta(a, a) variate in [0, 1] from draws k and after. a > 0."""
    return library.rsb_beta(seed, epoch, slot, op, k, a)


def words64(seed, epoch, op, count: int) -> np.ndarray:
    """uint64 array of `count` words, one for each slot 0 .. count - 1."""
    out = np.empty(count, np.uint64)
    library.rsb_words64(seed, epoch, op, count, out.ctypes.data)
    return out


def torch_seed(seed: int, epoch: int, slot: int, op: int) -> int:
    """A 63-bit seed for a torch.Generator that fills a tensor (noise, stochastic depth) at one address."""
    high, low, _, _ = philox(seed, epoch, slot, op, 0)
    return (high << 32 | low) & (2 ** 63 - 1)
