"""Addressed draws: the generator is Philox, each address has its own number, and the distributions
are correct."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from rsb_ffcv.ops import draws

MASK = 0xFFFFFFFF


@pytest.mark.parametrize(
    "counter, key, words",
    [
        # Known-answer vectors of Random123 (kat_vectors): philox4x32, 10 rounds
        ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
        ((MASK,) * 4, (MASK, MASK), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
        (
            (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
            (0xA4093822, 0x299F31D0),
            (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
        ),
    ],
)
def test_philox_equals_the_published_vectors(counter, key, words):
    slot, epoch, op, block = counter
    seed: Any = np.uint64(key[1] << 32 | key[0])
    assert draws.philox(seed, epoch, slot, op, block) == words


def test_each_part_of_the_address_changes_the_draw():
    base = [1, 2, 3, 4, 5]
    values = {draws.word(*base)}
    for position in range(5):
        changed = list(base)
        changed[position] += 1
        values.add(draws.word(*changed))
    assert len(values) == 6


def test_draw_k_is_word_k_of_the_stream():
    stream = [word for block in range(3) for word in draws.philox(7, 1, 2, 3, block)]
    assert [draws.word(7, 1, 2, 3, k) for k in range(12)] == stream


def test_uniform_and_normal_have_the_correct_distributions():
    uniform = [draws.uniform(0, 0, slot, 0, 0) for slot in range(20000)]
    normal = [draws.normal(0, 0, slot, 0, 0) for slot in range(20000)]
    assert stats.kstest(uniform, "uniform").pvalue > 0.01
    assert stats.kstest(normal, "norm").pvalue > 0.01


@pytest.mark.parametrize("a", [0.1, 0.2, 1.0, 4.0])
def test_beta_has_the_correct_distribution(a):
    values = np.array([draws.beta(3, 0, slot, draws.MIX, 0, a)[0] for slot in range(20000)])
    # With a small alpha, most of the mass near 1 lies between two floats. The distribution is
    # symmetric, so that the lower half is enough.
    lower = values[values < 0.5]
    assert abs(len(lower) / 20000 - 0.5) < 0.02
    assert stats.kstest(lower, lambda x: 2 * stats.beta(a, a).cdf(x)).pvalue > 0.01


def test_below_reaches_every_value_evenly():
    counts = np.bincount([draws.below(0, 0, slot, 0, 0, 7) for slot in range(14000)], minlength=7)
    assert len(counts) == 7 and stats.chisquare(counts).pvalue > 0.01
