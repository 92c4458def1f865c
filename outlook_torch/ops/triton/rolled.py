"""Triton kernels with loops over the places of a window, for windows of any size.

They read a value once for each window and place, and repeat each softmax row for each place: slower than those of
`kernels`, which hold all merged weights of a block in registers. Both gather: a program owns what it writes, so there
are no atomics and every run gives the same bits.

Letters are those of `outlook_common.geometry`, with L, T, Q the columns of K, S, P. A place of a window is numbered row
by row; PLACES is K*L, PADDED the power of two that holds it. Dtypes: PROBABILITY is that of the softmax, WEIGHT what
its result is rounded to, SUM that of sums, INDEX that of offsets.
"""

from typing import no_type_check  # Triton compiles the source of these functions: a wrapper would hide their globals

import triton
import triton.language as tl


@triton.jit
@no_type_check
def rolled_mix_kernel(
    source,
    logits,
    dropout_mask,
    tops,
    totals,
    out,
    rows,
    H,
    W,
    h,
    w,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    MASKED: tl.constexpr,
    PROBABILITY: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Sum, for each pixel, over the windows on it: A[its place, place] * source[pixel at that place].

    TRANSPOSED takes A[place, its place] instead, and reads the largest logit and the sum of the exponentials of each
    row of A from `tops` and `totals`; otherwise a pixel's rows of A are its own, and their softmax is made here.

    One program has ROWS of the B*h*w*N pixels and heads of one phase, and COLUMNS of their D channels.
    """
    PLACES: tl.constexpr = K * L
    phase, tile = tl.program_id(0) % (S * T), tl.program_id(0) // (S * T)
    r, t = phase // T, phase % T
    row = tile.to(INDEX) * ROWS + tl.arange(0, ROWS)
    channel = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    place = tl.arange(0, PADDED)

    n = row % N
    image = row // N // w // h
    # Cell c of phase r is pixel S*c + r - P; the first cell on the map is ceil((P - r) / S).
    cell_i = row // N // w % h + (P - r + S - 1) // S
    cell_j = row // N % w + (Q - t + T - 1) // T
    i = S * cell_i + r - P
    j = T * cell_j + t - Q
    on_map = (row < rows) & (i < H) & (j < W)

    total = tl.zeros([ROWS, COLUMNS], SUM)
    for m in range((K + S - 1) // S):
        for k in range((L + T - 1) // T):
            # The pixel is place (p, s) of this window.
            p = r + S * m
            s = t + T * k
            if (p < K) & (s < L):  # phases have fewer windows, the later they are
                window_i = cell_i - m
                window_j = cell_j - k
                covered = on_map & (window_i >= 0) & (window_i < h) & (window_j >= 0) & (window_j < w)
                window = ((image * h + window_i) * w + window_j) * N + n
                own = p * L + s
                if not TRANSPOSED:
                    first = (window * PLACES + own) * PLACES
                    here = covered[:, None] & (place < PLACES)[None, :]
                    exponents = tl.load(logits + first[:, None] + place[None, :], mask=here, other=float("-inf"))
                    exponents = exponents.to(PROBABILITY)
                    top = tl.where(covered, tl.max(exponents, axis=1), 0)
                    scale = tl.where(covered, tl.sum(tl.exp(exponents - top[:, None]), axis=1), 1)
                for q in range(K):
                    for u in range(L):
                        other = q * L + u
                        source_i = i + q - p
                        source_j = j + u - s
                        there = covered & (source_i >= 0) & (source_i < H) & (source_j >= 0) & (source_j < W)
                        if TRANSPOSED:
                            matrix_row = window * PLACES + other
                            entry = matrix_row * PLACES + own
                            top = tl.load(tops + matrix_row, mask=there, other=0)
                            scale = tl.load(totals + matrix_row, mask=there, other=1)
                        else:
                            entry = (window * PLACES + own) * PLACES + other
                        exponent = tl.load(logits + entry, mask=there, other=float("-inf")).to(PROBABILITY)
                        weight = tl.exp(exponent - top) / scale
                        if MASKED:
                            weight *= tl.load(dropout_mask + entry, mask=there, other=0).to(PROBABILITY)
                        weight = tl.where(there, weight.to(WEIGHT).to(SUM), 0)
                        pixel = ((image * H + source_i) * W + source_j) * N + n
                        term = tl.load(
                            source + pixel[:, None] * D + channel[None, :],
                            mask=there[:, None] & (channel < D)[None, :],
                            other=0,
                        )
                        total += weight[:, None] * term.to(SUM)

    pixel = ((image * H + i) * W + j) * N + n
    tl.store(
        out + pixel[:, None] * D + channel[None, :],
        total.to(out.dtype.element_ty),
        mask=on_map[:, None] & (channel < D)[None, :],
    )


@triton.jit
@no_type_check
def rolled_gradient_kernel(
    cotangent,
    value,
    logits,
    dropout_mask,
    tops,
    totals,
    gradient,
    rows,
    H,
    W,
    h,
    w,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    MASKED: tl.constexpr,
    PROBABILITY: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    PADDED: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Write the gradient of the logits, and of each row the largest logit and the sum of exponentials.

    One program has ROWS of the B*h*w*N*PLACES rows of `logits`.
    """
    PLACES: tl.constexpr = K * L
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    place = tl.arange(0, PADDED)
    own = row % PLACES
    window = row // PLACES
    n = window % N
    image = window // N // w // h
    top_i = S * (window // N // w % h) - P
    left_j = T * (window // N % w) - Q
    i = top_i + own // L
    j = left_j + own % L
    exists = row < rows
    on_map = exists & (i >= 0) & (i < H) & (j >= 0) & (j < W)
    pixel = ((image * H + i) * W + j) * N + n

    # The gradient of the row's weights: at each place, the product of cotangent and value.
    slope = tl.zeros([ROWS, PADDED], SUM)
    for first in range(0, D, COLUMNS):
        channel = first + tl.arange(0, COLUMNS)
        mine = tl.load(
            cotangent + pixel[:, None] * D + channel[None, :],
            mask=on_map[:, None] & (channel < D)[None, :],
            other=0,
        ).to(SUM)
        for q in range(K):
            for u in range(L):
                source_i = top_i + q
                source_j = left_j + u
                there = on_map & (source_i >= 0) & (source_i < H) & (source_j >= 0) & (source_j < W)
                source = ((image * H + source_i) * W + source_j) * N + n
                theirs = tl.load(
                    value + source[:, None] * D + channel[None, :],
                    mask=there[:, None] & (channel < D)[None, :],
                    other=0,
                ).to(SUM)
                product = tl.sum(mine * theirs, axis=1)
                slope += tl.where((place == q * L + u)[None, :], product[:, None], 0)

    here = exists[:, None] & (place < PLACES)[None, :]
    entry = row[:, None] * PLACES + place[None, :]
    exponents = tl.load(logits + entry, mask=here, other=float("-inf")).to(PROBABILITY)
    top = tl.where(exists, tl.max(exponents, axis=1), 0)
    exponentials = tl.exp(exponents - top[:, None])
    total = tl.where(exists, tl.sum(exponentials, axis=1), 1)
    tl.store(tops + row, top, mask=exists)
    tl.store(totals + row, total, mask=exists)

    probabilities = exponentials / total[:, None]
    slope = slope.to(PROBABILITY)
    if MASKED:
        slope *= tl.load(dropout_mask + entry, mask=here, other=0).to(PROBABILITY)
    mean = tl.sum(probabilities * slope, axis=1)
    tl.store(gradient + entry, (probabilities * (slope - mean[:, None])).to(gradient.dtype.element_ty), mask=here)
