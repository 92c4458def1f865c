"""Triton kernels with every tap unrolled, for small windows.

A program owns blocks of pixels and all that is computed from them. The pixels of a block need each softmax row of the
windows on them once, so that nothing is computed twice; merged weights (see `outlook_common.taps`) stay in registers
while D is walked through. Nothing is shared between programs or through shared memory: no barriers, no atomics, the
same bits in every run.

Letters are those of `outlook_common.geometry`, with L, T, Q the columns of K, S, P. A block is one cell, S*T pixels;
with T = 1 it is G cells beside each other, which share what they read. `e` and `f` are row and column of an output
pixel in its block, `a` and `b` those of a source pixel, from the same corner on, so that they may be negative.

Tensors of one number per block and head have shape [ROWS, LANES], the same number in LANES threads, and those of
channels [ROWS, LANES, VECTOR], VECTOR of them in one thread: their product needs no exchange between threads.

Dtypes: PROBABILITY is that of the softmax, WEIGHT what its result is rounded to, SUM that of sums, INDEX of offsets.
"""

from typing import no_type_check  # Triton compiles the source of these functions: a wrapper would hide their globals

import triton
import triton.language as tl

from outlook_torch.ops.triton.pairs import (
    block_of,
    count,
    has_place,
    log2,
    output_of,
    outputs,
    pair_of,
    place_of,
    slot_of,
    slot_of_output,
    slots,
    source_of,
    tap_of,
    taps,
    windows_on,
)


@triton.jit
@no_type_check
def attend_kernel(
    value,
    logits,
    dropout_mask,
    out,
    rows,
    H,
    W,
    h,
    w,
    blocks_i,
    blocks_j,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    MASKED: tl.constexpr,
    PROBABILITY: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write outlook attention; a program has ROWS of the blocks and heads, and all of their D channels."""
    PLACES: tl.constexpr = K * L
    row, image, block_i, block_j, n = _rows(blocks_i, blocks_j, N, INDEX, ROWS, LANES)
    exists = row < rows
    first = _first_logit(image, block_i, block_j * G, n, h, w, N, PLACES)
    merged = ()
    for e in tl.static_range(outputs(K, S, 1)):
        for f in tl.static_range(outputs(L, T, G)):
            weights = ()
            for m in tl.static_range(windows_on(e, K, S)):
                for k in tl.static_range(windows_on(f, L, T)):
                    covered = _covered(exists, block_i, block_j * G, h, w, m, k - f // T)
                    entry = first + _entry(w, N, e % S + S * m, f % T + T * k, m, k - f // T, L, PLACES)
                    probabilities = _softmax(_row(logits + entry, covered, PLACES, PROBABILITY), covered, PLACES)
                    if MASKED:
                        factors = _row(dropout_mask + entry, covered, PLACES, PROBABILITY)
                        probabilities = _products(probabilities, factors, PLACES)
                    weights = weights + _rounded(probabilities, PLACES, WEIGHT, SUM)
            merged = merged + _merged(weights, e, f, K, L, S, T)
    by_pair = ()
    for x in tl.static_range(count(K, S, 1)):
        for y in tl.static_range(count(L, T, G)):
            by_pair = by_pair + (merged[slot_of(x, y, K, L, S, T, G, False)],)
    i, j = S * block_i - P, T * G * block_j - Q
    channel = _first_channel(image, i, j, n, H, W, N, D, LANES, VECTOR)
    _mix(
        value + channel,
        out + channel,
        by_pair,
        exists,
        i,
        j,
        H,
        W,
        N,
        D,
        K,
        L,
        S,
        T,
        G,
        False,
        SUM,
        ROWS,
        LANES,
        VECTOR,
    )


@triton.jit
@no_type_check
def gradient_kernel(
    cotangent,
    value,
    logits,
    dropout_mask,
    gradient,
    merged,
    rows,
    H,
    W,
    h,
    w,
    blocks_i,
    blocks_j,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    MASKED: tl.constexpr,
    PROBABILITY: tl.constexpr,
    WEIGHT: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the gradient of the logits, and for `transpose_kernel` the merged weights, `slots` for each row.

    A softmax row belongs to one pixel, and needs of it the products of its cotangent with the sources' values.
    """
    PLACES: tl.constexpr = K * L
    row, image, block_i, block_j, n = _rows(blocks_i, blocks_j, N, INDEX, ROWS, LANES)
    exists = row < rows
    i, j = S * block_i - P, T * G * block_j - Q
    channel = _first_channel(image, i, j, n, H, W, N, D, LANES, VECTOR)
    products = _gram(
        cotangent + channel, value + channel, exists, i, j, H, W, N, D, K, L, S, T, G, SUM, ROWS, LANES, VECTOR
    )

    first = _first_logit(image, block_i, block_j * G, n, h, w, N, PLACES)
    lane = tl.broadcast_to(tl.arange(0, LANES)[None, :], [ROWS, LANES])
    for e in tl.static_range(outputs(K, S, 1)):
        for f in tl.static_range(outputs(L, T, G)):
            weights = ()
            for m in tl.static_range(windows_on(e, K, S)):
                for k in tl.static_range(windows_on(f, L, T)):
                    covered = _covered(exists, block_i, block_j * G, h, w, m, k - f // T)
                    entry = first + _entry(w, N, e % S + S * m, f % T + T * k, m, k - f // T, L, PLACES)
                    probabilities = _softmax(_row(logits + entry, covered, PLACES, PROBABILITY), covered, PLACES)
                    slopes = _slopes(products, e, f, m, k, K, L, S, T, G, PROBABILITY)
                    kept = probabilities
                    if MASKED:
                        factors = _row(dropout_mask + entry, covered, PLACES, PROBABILITY)
                        slopes = _products(slopes, factors, PLACES)
                        kept = _products(probabilities, factors, PLACES)
                    _store(
                        gradient + entry, _through_softmax(probabilities, slopes, PLACES), covered, lane, PLACES, LANES
                    )
                    weights = weights + _rounded(kept, PLACES, WEIGHT, SUM)
            _store(
                merged + row * slots(K, L, S, T, G) + slot_of_output(e, f, K, L, S, T, G),
                _merged(weights, e, f, K, L, S, T),
                exists,
                lane,
                taps(e, K, S) * taps(f, L, T),
                LANES,
            )


@triton.jit
@no_type_check
def transpose_kernel(
    cotangent,
    merged,
    gradient,
    rows,
    H,
    W,
    blocks_i,
    blocks_j,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    P: tl.constexpr,
    Q: tl.constexpr,
    G: tl.constexpr,
    SUM: tl.constexpr,
    INDEX: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write the gradient of the values: what the pixels gave by their merged weights, they get back."""
    row, image, block_i, block_j, n = _rows(blocks_i, blocks_j, N, INDEX, ROWS, LANES)
    exists = row < rows
    i, j = S * block_i - P, T * G * block_j - Q
    by_pair = ()
    for x in tl.static_range(count(K, S, 1)):
        for y in tl.static_range(count(L, T, G)):
            there = _there(exists, i, j, H, W, source_of(x, K, S, 1, True), source_of(y, L, T, G, True))
            slot = merged + row * slots(K, L, S, T, G)
            slot += block_of(x, K, S, 1, True) * (blocks_j * (N * slots(K, L, S, T, G)))
            slot += block_of(y, L, T, G, True) * N * slots(K, L, S, T, G) + slot_of(x, y, K, L, S, T, G, True)
            by_pair = by_pair + (tl.load(slot, mask=there, other=0),)
    channel = _first_channel(image, i, j, n, H, W, N, D, LANES, VECTOR)
    _mix(
        cotangent + channel,
        gradient + channel,
        by_pair,
        exists,
        i,
        j,
        H,
        W,
        N,
        D,
        K,
        L,
        S,
        T,
        G,
        True,
        SUM,
        ROWS,
        LANES,
        VECTOR,
    )


# Where things lie.


@triton.jit
@no_type_check
def _rows(blocks_i, blocks_j, N: tl.constexpr, INDEX: tl.constexpr, ROWS: tl.constexpr, LANES: tl.constexpr):
    """Return row, image, row and column of the block, and head."""
    row = tl.program_id(0).to(INDEX) * ROWS + tl.arange(0, ROWS)
    row = tl.broadcast_to(row[:, None], [ROWS, LANES])
    return row, row // N // blocks_j // blocks_i, row // N // blocks_j % blocks_i, row // N % blocks_j, row % N


@triton.jit
@no_type_check
def _first_channel(image, i, j, n, H, W, N: tl.constexpr, D: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return the offsets of a thread's first channels of pixel (i, j), which may be off the map."""
    first = (((image * H + i) * W + j) * N + n) * D
    lane, vector = tl.arange(0, LANES), tl.arange(0, VECTOR)
    return first[:, :, None] + (lane[None, :, None] * VECTOR + vector[None, None, :])


@triton.jit
@no_type_check
def _first_logit(image, i, j, n, h, w, N: tl.constexpr, PLACES: tl.constexpr):
    """Return the offset of the first logit of window (i, j)."""
    return (((image * h + i) * w + j) * N + n) * (PLACES * PLACES)


@triton.jit
@no_type_check
def _entry(
    w,
    N: tl.constexpr,
    p: tl.constexpr,
    s: tl.constexpr,
    m: tl.constexpr,
    k: tl.constexpr,
    L: tl.constexpr,
    PLACES: tl.constexpr,
):
    """Return the offset of row (p, s) of the window m above and k to the left, from a window's first logit."""
    # What is known to the compiler is an offset of its own, which becomes part of the instruction.
    return -m * (w * (N * PLACES * PLACES)) + ((p * L + s) * PLACES - k * N * PLACES * PLACES)


@triton.jit
@no_type_check
def _covered(exists, i, j, h, w, m: tl.constexpr, k: tl.constexpr):
    """Return whether the window m above and k to the left of (i, j) exists."""
    return exists & (i >= m) & (i < h + m) & (j >= k) & (j < w + k)


@triton.jit
@no_type_check
def _there(exists, i, j, H, W, a: tl.constexpr, b: tl.constexpr):
    """Return whether pixel (i + a, j + b) is on the map."""
    return exists & (i >= -a) & (i < H - a) & (j >= -b) & (j < W - b)


@triton.jit
@no_type_check
def _within(there, first, D: tl.constexpr, LANES: tl.constexpr, VECTOR: tl.constexpr):
    """Return which channels from `first` on exist, where a pixel does."""
    mask = there[:, :, None]
    if D % (LANES * VECTOR) != 0:
        lane, vector = tl.arange(0, LANES), tl.arange(0, VECTOR)
        mask = mask & (first + lane[None, :, None] * VECTOR + vector[None, None, :] < D)
    return mask


@triton.jit
@no_type_check
def _load(
    pointers,
    exists,
    i,
    j,
    H,
    W,
    first,
    a: tl.constexpr,
    b: tl.constexpr,
    N: tl.constexpr,
    D: tl.constexpr,
    SUM: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Load channels of the pixel (a, b) away from that of the pointers."""
    mask = _within(_there(exists, i, j, H, W, a, b), first, D, LANES, VECTOR)
    return tl.load(pointers + first + a * (W * (N * D)) + b * (N * D), mask=mask, other=0).to(SUM)


# Softmax and merged weights: tuples of one number for each place of a window.


@triton.jit
@no_type_check
def _row(pointers, covered, PLACES: tl.constexpr, PROBABILITY: tl.constexpr):
    found = ()
    for q in tl.static_range(PLACES):
        found = found + (tl.load(pointers + q, mask=covered, other=0).to(PROBABILITY),)
    return found


@triton.jit
@no_type_check
def _softmax(exponents, covered, PLACES: tl.constexpr):
    """Return the softmax of a row; zeros where there is no window."""
    top = exponents[0]
    for q in tl.static_range(1, PLACES):
        top = tl.maximum(top, exponents[q], propagate_nan=tl.PropagateNan.ALL)
    exponentials = ()
    for q in tl.static_range(PLACES):
        exponentials = exponentials + (tl.exp2((exponents[q] - top) * 1.4426950408889634),)  # by log2(e)
    total = exponentials[0]
    for q in tl.static_range(1, PLACES):
        total += exponentials[q]
    scale = tl.where(covered, 1 / total, 0)
    probabilities = ()
    for q in tl.static_range(PLACES):
        probabilities = probabilities + (exponentials[q] * scale,)
    return probabilities


@triton.jit
@no_type_check
def _products(left, right, PLACES: tl.constexpr):
    products = ()
    for q in tl.static_range(PLACES):
        products = products + (left[q] * right[q],)
    return products


@triton.jit
@no_type_check
def _rounded(probabilities, PLACES: tl.constexpr, WEIGHT: tl.constexpr, SUM: tl.constexpr):
    weights = ()
    for q in tl.static_range(PLACES):
        weights = weights + (probabilities[q].to(WEIGHT).to(SUM),)
    return weights


@triton.jit
@no_type_check
def _merged(
    weights, e: tl.constexpr, f: tl.constexpr, K: tl.constexpr, L: tl.constexpr, S: tl.constexpr, T: tl.constexpr
):
    """Return the weight of each tap of an output, from those of all windows on it, row by row."""
    merged = ()
    for tap in tl.static_range(taps(e, K, S)):
        for tap_j in tl.static_range(taps(f, L, T)):
            merged = merged + (_tap(weights, tap, tap_j, windows_on(e, K, S), windows_on(f, L, T), K, L, S, T),)
    return merged


@triton.jit
@no_type_check
def _tap(
    weights,
    tap: tl.constexpr,
    tap_j: tl.constexpr,
    M: tl.constexpr,
    M_j: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
):
    total = None
    for m in tl.static_range(M):
        for k in tl.static_range(M_j):
            if has_place(tap, m, M, K, S) and has_place(tap_j, k, M_j, L, T):
                weight = weights[((m * M_j + k) * K + place_of(tap, m, M, S)) * L + place_of(tap_j, k, M_j, T)]
                if total is None:
                    total = weight
                else:
                    total += weight
    return total


@triton.jit
@no_type_check
def _slopes(
    products,
    e: tl.constexpr,
    f: tl.constexpr,
    m: tl.constexpr,
    k: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    PROBABILITY: tl.constexpr,
):
    """Return the gradient of the weights by which output (e, f) takes from window (m, k)."""
    slopes = ()
    for q in tl.static_range(K):
        for u in tl.static_range(L):
            product = products[
                pair_of(tap_of(q, m, windows_on(e, K, S), S), e, K, S, 1) * count(L, T, G)
                + pair_of(tap_of(u, k, windows_on(f, L, T), T), f, L, T, G)
            ]
            slopes = slopes + (product.to(PROBABILITY),)
    return slopes


@triton.jit
@no_type_check
def _through_softmax(probabilities, slopes, PLACES: tl.constexpr):
    mean = probabilities[0] * slopes[0]
    for q in tl.static_range(1, PLACES):
        mean += probabilities[q] * slopes[q]
    gradient = ()
    for q in tl.static_range(PLACES):
        gradient = gradient + (probabilities[q] * (slopes[q] - mean),)
    return gradient


@triton.jit
@no_type_check
def _store(pointers, values, mask, lane, COUNT: tl.constexpr, LANES: tl.constexpr):
    """Store a tuple of COUNT numbers for each row, each lane some of them, side by side."""
    for start in tl.static_range(0, COUNT, LANES):
        chosen = ()
        for k in tl.static_range(LANES):
            chosen = chosen + (values[min(start + k, COUNT - 1)],)
        for level in tl.static_range(log2(LANES)):
            halved = ()
            for k in tl.static_range(LANES >> (level + 1)):
                halved = halved + (tl.where((lane >> level) % 2 == 1, chosen[2 * k + 1], chosen[2 * k]),)
            chosen = halved
        kept = mask
        if start + LANES > COUNT:
            kept = mask & (lane < COUNT - start)
        tl.store(pointers + start + lane, chosen[0].to(pointers.dtype.element_ty), mask=kept)


# Sums over taps and over channels.


@triton.jit
@no_type_check
def _mix(
    pointers,
    out_pointers,
    weights,
    exists,
    i,
    j,
    H,
    W,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Write, for each output, the sum over its pairs of weight times source; weights in the order of the pairs."""
    OUTPUTS_J: tl.constexpr = outputs(L, T, G)
    PAIRS_J: tl.constexpr = count(L, T, G)
    for first in range(0, D, LANES * VECTOR):
        sums = ()
        for _ in tl.static_range(outputs(K, S, 1) * OUTPUTS_J):
            sums = sums + (tl.zeros([ROWS, LANES, VECTOR], SUM),)
        for x in tl.static_range(count(K, S, 1)):
            for y in tl.static_range(PAIRS_J):
                term = _load(
                    pointers,
                    exists,
                    i,
                    j,
                    H,
                    W,
                    first,
                    source_of(x, K, S, 1, TRANSPOSED),
                    source_of(y, L, T, G, TRANSPOSED),
                    N,
                    D,
                    SUM,
                    LANES,
                    VECTOR,
                )
                sums = _added(
                    sums,
                    output_of(x, K, S, 1, TRANSPOSED) * OUTPUTS_J + output_of(y, L, T, G, TRANSPOSED),
                    weights[x * PAIRS_J + y][:, :, None] * term,
                )
        for e in tl.static_range(outputs(K, S, 1)):
            for f in tl.static_range(OUTPUTS_J):
                mask = _within(_there(exists, i, j, H, W, e, f), first, D, LANES, VECTOR)
                total = sums[e * OUTPUTS_J + f].to(out_pointers.dtype.element_ty)
                tl.store(out_pointers + first + e * (W * (N * D)) + f * (N * D), total, mask=mask)


@triton.jit
@no_type_check
def _added(sums, at: tl.constexpr, term):
    """Add to one entry of a tuple."""
    new = ()
    for entry in tl.static_range(len(sums)):
        if entry == at:
            new = new + (sums[entry] + term,)
        else:
            new = new + (sums[entry],)
    return new


@triton.jit
@no_type_check
def _gram(
    out_pointers,
    pointers,
    exists,
    i,
    j,
    H,
    W,
    N: tl.constexpr,
    D: tl.constexpr,
    K: tl.constexpr,
    L: tl.constexpr,
    S: tl.constexpr,
    T: tl.constexpr,
    G: tl.constexpr,
    SUM: tl.constexpr,
    ROWS: tl.constexpr,
    LANES: tl.constexpr,
    VECTOR: tl.constexpr,
):
    """Return, for each pair, the product over D of output and source."""
    OUTPUTS_J: tl.constexpr = outputs(L, T, G)
    PAIRS_J: tl.constexpr = count(L, T, G)
    sums = ()
    for _ in tl.static_range(count(K, S, 1) * PAIRS_J):
        sums = sums + (tl.zeros([ROWS, LANES], SUM),)
    for first in range(0, D, LANES * VECTOR):
        mine = ()
        for e in tl.static_range(outputs(K, S, 1)):
            for f in tl.static_range(OUTPUTS_J):
                mine = mine + (_load(out_pointers, exists, i, j, H, W, first, e, f, N, D, SUM, LANES, VECTOR),)
        new = ()
        for x in tl.static_range(count(K, S, 1)):
            for y in tl.static_range(PAIRS_J):
                theirs = _load(
                    pointers,
                    exists,
                    i,
                    j,
                    H,
                    W,
                    first,
                    source_of(x, K, S, 1, False),
                    source_of(y, L, T, G, False),
                    N,
                    D,
                    SUM,
                    LANES,
                    VECTOR,
                )
                ours = mine[output_of(x, K, S, 1, False) * OUTPUTS_J + output_of(y, L, T, G, False)]
                new = new + (sums[x * PAIRS_J + y] + tl.sum(ours * theirs, axis=2),)
        sums = new
    products = ()
    for x in tl.static_range(count(K, S, 1) * PAIRS_J):
        products = products + (tl.broadcast_to(tl.sum(sums[x], axis=1, keep_dims=True), [ROWS, LANES]),)
    return products
