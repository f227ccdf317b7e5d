"""Kernels for GPUs, in Triton; :mod:`~spectralmetrics.sums.fused` launches them.

Observations are (samples, features, positions) in any memory layout. A program takes a chunk of the positions
of one sample, and a block of its features where there are many. Every sum is in float64 and in an order that
depends on the shape alone, without atomic operations, so that runs are reproducible.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["features", "positions", "chunks"])
def judge(
    values, valid, kept, counts,
    features, positions, chunks, sample_stride, feature_stride, position_stride,
    has_valid: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Flag observations that are valid and finite; count for each program these, and valid ones not finite."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    position = (program % chunks) * rows + tl.arange(0, rows)
    inside = position < positions
    base = values + sample * sample_stride + position.to(tl.int64)[:, None] * position_stride
    is_bad = tl.zeros([rows, width], tl.int32)
    for start in range(0, features, width):
        feature = start + tl.arange(0, width)
        mask = inside[:, None] & (feature < features)[None, :]
        x = tl.load(base + feature.to(tl.int64)[None, :] * feature_stride, mask=mask, other=0.0)
        is_bad = is_bad | (1 - (tl.abs(x.to(tl.float64)) < float("inf")).to(tl.int32))
    offered = inside
    index = sample * positions + position
    if has_valid:
        offered = offered & (tl.load(valid + index, mask=inside, other=0) != 0)
    is_kept = offered & (tl.max(is_bad, 1) == 0)
    tl.store(kept + index, is_kept.to(tl.int8), mask=inside)
    number = tl.sum(is_kept.to(tl.int64), 0)
    tl.store(counts + 2 * program, number)
    tl.store(counts + 2 * program + 1, tl.sum(offered.to(tl.int64), 0) - number)


@triton.jit(do_not_specialize=["features", "positions", "chunks", "chunk"])
def measure(
    values, kept, origin, parts,
    features, positions, chunks, chunk, sample_stride, feature_stride, position_stride,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Sum x - o, its square, abs(x) and x != 0, and find the largest abs(x), of each feature of a chunk."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program % chunks) * chunk
    feature = tl.program_id(1) * width + tl.arange(0, width)
    of_feature = feature < features
    base = values + sample * sample_stride + feature.to(tl.int64)[None, :] * feature_stride
    centre = tl.load(origin + feature, mask=of_feature, other=0.0)[None, :]
    total = tl.zeros([rows, width], tl.float64)
    squares = tl.zeros([rows, width], tl.float64)
    magnitudes = tl.zeros([rows, width], tl.float64)
    largest = tl.zeros([rows, width], tl.float64)
    nonzero = tl.zeros([rows, width], tl.int32)
    for start in range(first, tl.minimum(first + chunk, positions), rows):
        position = start + tl.arange(0, rows)
        inside = position < tl.minimum(first + chunk, positions)
        use = tl.load(kept + sample * positions + position, mask=inside, other=0) != 0
        mask = use[:, None] & of_feature[None, :]
        place = base + position.to(tl.int64)[:, None] * position_stride
        x = tl.load(place, mask=mask, other=0.0).to(tl.float64)
        x = tl.where(mask, x, 0.0)
        magnitude = tl.abs(x)
        difference = tl.where(mask, x - centre, 0.0)
        total += difference
        squares += difference * difference
        magnitudes += magnitude
        largest = tl.maximum(largest, magnitude)
        nonzero += (magnitude > 0).to(tl.int32)
    out = parts + program * 5 * features + feature
    tl.store(out, tl.sum(total, 0), mask=of_feature)
    tl.store(out + features, tl.sum(squares, 0), mask=of_feature)
    tl.store(out + 2 * features, tl.sum(magnitudes, 0), mask=of_feature)
    tl.store(out + 3 * features, tl.sum(nonzero, 0).to(tl.float64), mask=of_feature)
    tl.store(out + 4 * features, tl.max(largest, 0), mask=of_feature)


@triton.jit(do_not_specialize=["features", "positions", "chunks", "chunk"])
def centre(
    values, kept, shift, scale, out, parts,
    features, positions, chunks, chunk, sample_stride, feature_stride, position_stride,
    rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Write rows scale * x + shift, zeros for rows left out, and the sum of a chunk's rows."""
    program = tl.program_id(0).to(tl.int64)
    sample = program // chunks
    first = (program % chunks) * chunk
    feature = tl.program_id(1) * width + tl.arange(0, width)
    of_feature = feature < features
    base = values + sample * sample_stride + feature.to(tl.int64)[None, :] * feature_stride
    move = tl.load(shift + feature, mask=of_feature, other=0.0)[None, :]
    factor = tl.load(scale)
    total = tl.zeros([rows, width], tl.float64)
    for start in range(first, tl.minimum(first + chunk, positions), rows):
        position = start + tl.arange(0, rows)
        inside = position < tl.minimum(first + chunk, positions)
        index = sample * positions + position
        use = tl.load(kept + index, mask=inside, other=0) != 0
        mask = use[:, None] & of_feature[None, :]
        place = base + position.to(tl.int64)[:, None] * position_stride
        x = tl.load(place, mask=mask, other=0.0).to(factor.dtype)
        moved = tl.where(mask, x * factor + move, 0.0).to(factor.dtype)
        total += moved.to(tl.float64)
        to = out + index.to(tl.int64)[:, None] * features + feature.to(tl.int64)[None, :]
        tl.store(to, moved, mask=inside[:, None] & of_feature[None, :])
    tl.store(parts + program * features + feature, tl.sum(total, 0), mask=of_feature)


@triton.jit(do_not_specialize=["features", "programs", "judges"])
def finish(
    parts, counts, out, number,
    features, programs, judges,
    sums: tl.constexpr, has_largest: tl.constexpr, width: tl.constexpr, many: tl.constexpr,
):  # fmt: skip
    """Combine the parts of all programs: sums, then the largest if there is one, and the counts."""
    feature = tl.program_id(0) * width + tl.arange(0, width)
    row = tl.program_id(1)
    of_feature = feature < features
    rows: tl.constexpr = sums + 1 if has_largest else sums
    total = tl.zeros([many, width], tl.float64)
    largest = tl.zeros([many, width], tl.float64)
    for start in range(0, programs, many):
        program = start + tl.arange(0, many)
        mask = (program < programs)[:, None] & of_feature[None, :]
        place = parts + (program.to(tl.int64)[:, None] * rows + row) * features + feature[None, :]
        part = tl.load(place, mask=mask, other=0.0)
        total += part
        largest = tl.maximum(largest, part)
    result = tl.sum(total, 0)
    if has_largest:
        result = tl.where(row == sums, tl.max(largest, 0), result)
    tl.store(out + row * features + feature, result, mask=of_feature)
    if (tl.program_id(0) == 0) & (row == 0):
        kept = tl.zeros([256], tl.int64)
        left = tl.zeros([256], tl.int64)
        for start in range(0, judges, 256):
            program = start + tl.arange(0, 256)
            kept += tl.load(counts + 2 * program, mask=program < judges, other=0)
            left += tl.load(counts + 2 * program + 1, mask=program < judges, other=0)
        tl.store(number, tl.sum(kept, 0))
        tl.store(number + 1, tl.sum(left, 0))


@triton.jit(do_not_specialize=["features", "forward", "step"])
def write_forward(
    totals, largest, counts, origin, row,
    features, forward, step,
    is_more: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Write a forward's row of a history from the marginals of its observations, or add more to it."""
    most = tl.zeros([width], tl.float64)
    first = tl.zeros([width], tl.float64)
    squares = tl.zeros([width], tl.float64)
    nonzero = tl.zeros([width], tl.float64)
    count = tl.load(counts).to(tl.float64)
    left = tl.load(counts + 1).to(tl.float64)
    for start in range(0, features, width):
        feature = start + tl.arange(0, width)
        mask = feature < features
        o = tl.load(origin + feature, mask=mask, other=0.0)
        one = tl.load(totals + feature, mask=mask, other=0.0)
        first += one + count * o
        squares += tl.load(totals + features + feature, mask=mask, other=0.0) + o * (2 * one + count * o)
        nonzero += tl.load(totals + 3 * features + feature, mask=mask, other=0.0)
        most = tl.maximum(most, tl.load(largest + feature, mask=mask, other=0.0))
    biggest, total, square, some = tl.max(most, 0), tl.sum(first, 0), tl.sum(squares, 0), tl.sum(nonzero, 0)
    if is_more:
        tl.store(row + 2, tl.maximum(tl.load(row + 2), biggest))
        tl.store(row + 3, tl.load(row + 3) + count)
        tl.store(row + 4, tl.load(row + 4) + left)
        tl.store(row + 5, tl.load(row + 5) + total)
        tl.store(row + 6, tl.load(row + 6) + square)
        tl.store(row + 7, tl.load(row + 7) + some)
    else:
        tl.store(row, forward.to(tl.float64))
        tl.store(row + 1, step.to(tl.float64))
        tl.store(row + 2, biggest)
        tl.store(row + 3, count)
        tl.store(row + 4, left)
        tl.store(row + 5, total)
        tl.store(row + 6, square)
        tl.store(row + 7, some)
