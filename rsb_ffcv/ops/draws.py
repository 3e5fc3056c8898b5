"""Every random number of a run is a pure function of (seed, epoch, slot, op, k).

A *slot* is a position in the epoch's global order. Two copies of one image in an epoch therefore
have different draws, and no draw depends on thread, worker, rank or history. The generator is
Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011): key = seed,
counter = (slot, epoch, op, k // 4), and draw k is output word k % 4.

The functions are numba kernels that Python can also call. They keep no state. Without fastmath, the
same address gives the same bits on all platforms with the same IEEE arithmetic and the same
log/exp/sqrt.
"""

import math

import numpy as np
from numba import int64, njit, uint32, uint64

# The op of an address. A number is never reused for another purpose, which would change every
# recorded run.
ORDER, CROP, FLIP, RAND_AUGMENT, MIX, ERASE, NOISE, STORE, INIT, DROP, JITTER, WINDOW = range(12)


@njit(cache=True, nogil=True)
def philox(seed: int, epoch: int, slot: int, op: int, block: int) -> tuple[int, int, int, int]:
    """Four uint32 words at one address. seed: 64 bits; epoch, slot, op, block: 32 bits each."""
    k0, k1 = uint32(seed), uint32(uint64(seed) >> uint64(32))
    c0, c1, c2, c3 = uint32(slot), uint32(epoch), uint32(op), uint32(block)
    for _ in range(10):
        p0 = uint64(0xD2511F53) * uint64(c0)
        p1 = uint64(0xCD9E8D57) * uint64(c2)
        c0, c1, c2, c3 = (
            uint32(p1 >> uint64(32)) ^ c1 ^ k0,
            uint32(p1),
            uint32(p0 >> uint64(32)) ^ c3 ^ k1,
            uint32(p0),
        )
        k0 = uint32(k0 + uint32(0x9E3779B9))
        k1 = uint32(k1 + uint32(0xBB67AE85))
    return c0, c1, c2, c3  # type: ignore[return-value]  # ints if called from Python


@njit(cache=True, nogil=True)
def word(seed: int, epoch: int, slot: int, op: int, k: int) -> int:
    """Draw k as a uint32."""
    words = philox(seed, epoch, slot, op, k // 4)
    lane = k % 4
    return words[0] if lane == 0 else words[1] if lane == 1 else words[2] if lane == 2 else words[3]


@njit(cache=True, nogil=True)
def uniform(seed: int, epoch: int, slot: int, op: int, k: int) -> float:
    """Draw k as a float64 in [0, 1), a multiple of 2**-32."""
    return word(seed, epoch, slot, op, k) * 2.0**-32


@njit(cache=True, nogil=True)
def below(seed: int, epoch: int, slot: int, op: int, k: int, n: int) -> int:
    """Draw k as an integer in [0, n). Bias at most n / 2**32.

    seed, epoch, slot, op: the address.
    k: number of the draw.
    n: 1 <= n < 2**31.
    """
    high = (uint64(word(seed, epoch, slot, op, k)) * uint64(n)) >> uint64(32)
    return int64(high)  # type: ignore[return-value]  # an int if called from Python


@njit(cache=True, nogil=True)
def normal(seed: int, epoch: int, slot: int, op: int, k: int) -> float:
    """A standard normal float64 from draws k and k + 1 (Box-Muller)."""
    u = (word(seed, epoch, slot, op, k) + 1.0) * 2.0**-32  # (0, 1]: its log is finite
    return math.sqrt(-2.0 * math.log(u)) * math.cos(
        2.0 * math.pi * uniform(seed, epoch, slot, op, k + 1)
    )


@njit(cache=True, nogil=True)
def log_gamma_variate(
    seed: int, epoch: int, slot: int, op: int, k: int, shape: float
) -> tuple[float, int]:
    """Returns (log of a Gamma(shape, 1) variate, first unused k). Marsaglia & Tsang 2000, boosted
    if shape < 1.

    It returns the log because a Gamma(0.1) variate underflows float64 often enough to cause 0 / 0
    in a beta.

    seed, epoch, slot, op: the address.
    k: number of the first draw.
    shape: > 0.
    """
    boosted = shape if shape >= 1.0 else shape + 1.0
    d = boosted - 1.0 / 3.0
    c = 1.0 / math.sqrt(9.0 * d)
    while True:
        x = normal(seed, epoch, slot, op, k)
        u = (word(seed, epoch, slot, op, k + 2) + 1.0) * 2.0**-32
        k += 3
        v = (1.0 + c * x) ** 3
        if v > 0.0 and math.log(u) < 0.5 * x * x + d - d * v + d * math.log(v):
            break
    result = math.log(d * v)
    if shape < 1.0:
        result += math.log((word(seed, epoch, slot, op, k) + 1.0) * 2.0**-32) / shape
        k += 1
    return result, k


@njit(cache=True, nogil=True)
def beta(seed: int, epoch: int, slot: int, op: int, k: int, a: float) -> tuple[float, int]:
    """Returns (a Beta(a, a) variate in [0, 1], first unused k).

    seed, epoch, slot, op: the address.
    k: number of the first draw.
    a: > 0.
    """
    x, k = log_gamma_variate(seed, epoch, slot, op, k, a)
    y, k = log_gamma_variate(seed, epoch, slot, op, k, a)
    return 1.0 / (1.0 + math.exp(min(y - x, 700.0))), k


@njit(cache=True, nogil=True)
def words64(seed: int, epoch: int, op: int, count: int) -> np.ndarray:
    """Returns a uint64 array of `count` words, one for each slot 0 .. count - 1."""
    out = np.empty(count, np.uint64)
    for slot in range(count):
        words = philox(seed, epoch, slot, op, 0)
        out[slot] = (uint64(words[0]) << uint64(32)) | uint64(words[1])
    return out


def torch_seed(seed: int, epoch: int, slot: int, op: int) -> int:
    """Returns a 63-bit seed for a torch.Generator that fills a tensor (noise, stochastic depth) at
    one address."""
    high, low, _, _ = philox(seed, epoch, slot, op, 0)
    return (int(high) << 32 | int(low)) & (2**63 - 1)
