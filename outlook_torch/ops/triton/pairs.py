"""Which pixels of a block take from which others, along one axis: what the unrolled kernels know when compiled.

`outlook_common.taps` says the same for a cell, by phases. A block is G cells. Its pixels are numbered from its corner
on: an output pixel owns what is computed, a source pixel, which may be negative, is what it takes from. A pair is
(source, output), and pairs are numbered in the order of their sources. Transposed, a block's pixels are what is taken
from, and the pairs are (output, source).
"""

from typing import no_type_check

import triton


@triton.constexpr_function
@no_type_check
def outputs(K, S, G):
    """Return how many pixels of a block have a window; with S > K, the others behind them have none."""
    return G * min(K, S)


@triton.constexpr_function
@no_type_check
def windows_on(output, K, S):
    """Return how many windows cover an output."""
    return (K - output % S + S - 1) // S


@triton.constexpr_function
@no_type_check
def taps(output, K, S):
    """Return how many sources an output has; they are neighbours."""
    return S * (windows_on(output, K, S) - 1) + K


@triton.constexpr_function
@no_type_check
def first_source(output, K, S):
    """Return the source of an output's first tap."""
    return output // S * S - S * (windows_on(output, K, S) - 1)


@triton.constexpr_function
@no_type_check
def has_place(tap, m, M, K, S):
    """Return whether window m, cells before the output's, of the M on it, has a place at the source of a tap."""
    return 0 <= place_of(tap, m, M, S) < K


@triton.constexpr_function
@no_type_check
def place_of(tap, m, M, S):
    """Return the place in window m of the source of a tap."""
    return tap - S * (M - 1 - m)


@triton.constexpr_function
@no_type_check
def tap_of(place, m, M, S):
    """Return the tap whose source is at a place of window m."""
    return place + S * (M - 1 - m)


@triton.constexpr_function
@no_type_check
def _pairs(K, S, G, TRANSPOSED):
    found = [(first_source(e, K, S) + tap, e) for e in range(outputs(K, S, G)) for tap in range(taps(e, K, S))]
    if TRANSPOSED:  # all by whole blocks, so that the former source lies in this one
        found = [(e - a // (S * G) * S * G, a % (S * G)) for a, e in found]
    return sorted((a, e) for a, e in found if e < outputs(K, S, G))


@triton.constexpr_function
@no_type_check
def count(K, S, G):
    """Return how many pairs there are, transposed or not."""
    return len(_pairs(K, S, G, False))


@triton.constexpr_function
@no_type_check
def source_of(pair, K, S, G, TRANSPOSED):
    """Return the first pixel of a pair."""
    return _pairs(K, S, G, TRANSPOSED)[pair][0]


@triton.constexpr_function
@no_type_check
def output_of(pair, K, S, G, TRANSPOSED):
    """Return the second pixel of a pair."""
    return _pairs(K, S, G, TRANSPOSED)[pair][1]


@triton.constexpr_function
@no_type_check
def pair_of(tap, output, K, S, G):
    """Return which pair is a tap of an output."""
    return _pairs(K, S, G, False).index((first_source(output, K, S) + tap, output))


@triton.constexpr_function
@no_type_check
def block_of(pair, K, S, G, TRANSPOSED):
    """Return in which block, counted from this one, the weight of a pair is."""
    return source_of(pair, K, S, G, TRANSPOSED) // (S * G) if TRANSPOSED else 0


@triton.constexpr_function
@no_type_check
def slots(K, L, S, T, G):
    """Return how many merged weights a block has: those of each output (e, f) together, in the order of its taps."""
    return count(K, S, 1) * count(L, T, G)


@triton.constexpr_function
@no_type_check
def slot_of(x, y, K, L, S, T, G, TRANSPOSED):
    """Return where the weight of the pairs x along rows and y along columns stands among its block's."""
    tap, e = _tap_and_output(x, K, S, 1, TRANSPOSED)
    tap_j, f = _tap_and_output(y, L, T, G, TRANSPOSED)
    return slot_of_output(e, f, K, L, S, T, G) + tap * taps(f, L, T) + tap_j


@triton.constexpr_function
@no_type_check
def slot_of_output(e, f, K, L, S, T, G):
    """Return where the weights of an output begin."""
    before = sum(taps(i, K, S) for i in range(e)) * count(L, T, G)
    return before + taps(e, K, S) * sum(taps(j, L, T) for j in range(f))


@triton.constexpr_function
@no_type_check
def _tap_and_output(pair, K, S, G, TRANSPOSED):
    source, output = _pairs(K, S, G, TRANSPOSED)[pair]
    if TRANSPOSED:
        pixels = block_of(pair, K, S, G, True) * S * G
        source, output = output - pixels, source - pixels
    return source - first_source(output, K, S), output


@triton.constexpr_function
@no_type_check
def log2(n):
    """Return the logarithm of a power of two."""
    return n.bit_length() - 1
