"""The next token of each row, from logits [rows, VOCABULARY] in float32.

The same integers as qc/runtime/sampling.py, in the same order, so the same token to the last bit:
distances behind the best token in steps of 2^-24, weights 2^40 2^-distance, sums in int64. A row is
one program. A threshold is found FAN_BITS bits at a time, for a pass over the logits is what costs.
"""

from __future__ import annotations

import triton
import triton.language as tl

from qc.runtime import sampling

STEPS_BITS = tl.constexpr(24)
FARTHEST = tl.constexpr(sampling.FARTHEST)
C0, C1, C2, C3, C4, C5, C6 = (tl.constexpr(each) for each in sampling.HALVES)
FAN_BITS, FAN = tl.constexpr(3), tl.constexpr(8)
"""Bits of a threshold that one pass finds, and the values that they have."""
PASSES = tl.constexpr(10)
"""FAN_BITS PASSES bits are more than FARTHEST has."""


SCANNED = tl.constexpr(1024)
"""Logits of a step of such a pass: of more, the sums of 64 bits leave the registers."""


@triton.jit
def largest(logits, values, ids, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
            BLOCKS: tl.constexpr):  # fmt: skip
    """Keep the best logit of each block, and its token; NaN where there is any."""
    block, row = tl.program_id(0), tl.program_id(1)
    token = block * BLOCK + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    found = tl.load(logits + row.to(tl.int64) * VOCABULARY + token, mask=inside,
                    other=float("-inf"))  # fmt: skip
    best = tl.max(found, 0)
    first = tl.min(tl.where((found == best) & inside, token, VOCABULARY), 0)
    wrong = tl.max((found != found).to(tl.int32), 0)
    tl.store(values + row * BLOCKS + block, tl.where(wrong > 0, float("nan"), best))
    tl.store(ids + row * BLOCKS + block, first)


@triton.jit
def best_of(values, ids, row, BLOCKS: tl.constexpr, PADDED: tl.constexpr):
    """Return the best logit of a row and the first token that has it: -1 where one is NaN, or the
    best is infinite."""
    block = tl.arange(0, PADDED)
    inside = block < BLOCKS
    found = tl.load(values + row * BLOCKS + block, mask=inside, other=float("-inf"))
    token = tl.load(ids + row * BLOCKS + block, mask=inside, other=0x7FFFFFFF)
    best = tl.max(found, 0)
    first = tl.min(tl.where(found == best, token, 0x7FFFFFFF), 0)
    wrong = tl.max((found != found).to(tl.int32), 0)
    return best, tl.where((wrong > 0) | (tl.abs(best) == float("inf")), -1, first)


@triton.jit
def distances(logits, row, start, best, sharpness, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr):
    """Return how far behind the best some tokens are; one more than any where there is none."""
    token = start + tl.arange(0, BLOCK)
    inside = token < VOCABULARY
    found = tl.load(logits + row.to(tl.int64) * VOCABULARY + token, mask=inside, other=0.0)
    behind = (best - found) * sharpness
    steps = tl.minimum(behind, FARTHEST * 1.0).to(tl.int32)
    return tl.where(inside, steps, 0x7FFFFFFF)


@triton.jit
def weights(distance):
    """Return 2^40 2^-(distance / 2^24), rounded down; 0 where there is no token."""
    fraction = (distance & 0xFFFFFF).to(tl.int64)
    power = tl.full(distance.shape, C6, tl.int64)
    power = (power * fraction >> STEPS_BITS) + C5
    power = (power * fraction >> STEPS_BITS) + C4
    power = (power * fraction >> STEPS_BITS) + C3
    power = (power * fraction >> STEPS_BITS) + C2
    power = (power * fraction >> STEPS_BITS) + C1
    power = (power * fraction >> STEPS_BITS) + C0
    halvings = (distance >> STEPS_BITS).to(tl.int64)
    return tl.where(halvings > 63, 0, (power << 10) >> tl.minimum(halvings, 63))


@triton.jit
def part_of(total, part):
    """Return total part / 2^31, rounded down, without leaving int64."""
    low = total & 0xFFFFFFFF
    return ((total >> 32) * part << 1) + (low * part >> 31)


@triton.jit
def measured(distance, WEIGHED: tl.constexpr):
    """Return what is added up: weights, or a 1 for each token."""
    if WEIGHED:
        return weights(distance)
    else:
        return (distance <= FARTHEST).to(tl.int64)


@triton.jit
def threshold(logits, row, best, sharpness, needed, VOCABULARY: tl.constexpr, BLOCK: tl.constexpr,
              WEIGHED: tl.constexpr):  # fmt: skip
    """Return the least distance up to which tokens measure `needed` or more, and what those nearer
    than it measure. The bits of the distance are found from the highest on."""
    digit = tl.arange(0, FAN)
    low = tl.cast(0, tl.int32)
    before = tl.cast(0, tl.int64)
    for turn in range(PASSES):
        width = tl.cast(1, tl.int32) << tl.cast((PASSES - 1 - turn) * FAN_BITS, tl.int32)
        parts = tl.zeros([BLOCK, FAN], tl.int64)
        for start in tl.range(0, VOCABULARY, BLOCK, num_stages=3):
            distance = distances(logits, row, start, best, sharpness, VOCABULARY, BLOCK)
            value = measured(distance, WEIGHED)
            place = (distance - low) // width
            here = (distance >= low)[:, None] & (place[:, None] == digit[None, :])
            parts += tl.where(here, value[:, None], 0)
        sums = tl.sum(parts, 0)
        upto = before + tl.cumsum(sums, 0)
        chosen = tl.min(tl.where(upto >= needed, digit, FAN - 1), 0)
        before += tl.sum(tl.where(digit < chosen, sums, 0), 0)
        low += chosen * width
    return low, before


@triton.jit
def total_of(logits, row, best, sharpness, last, equals, VOCABULARY: tl.constexpr,
             BLOCK: tl.constexpr):  # fmt: skip
    """Return the weight of the tokens nearer than `last`, and of `equals` more at that distance."""
    sums = tl.zeros([BLOCK], tl.int64)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=3):
        distance = distances(logits, row, start, best, sharpness, VOCABULARY, BLOCK)
        sums += tl.where(distance < last, weights(distance), 0)
    single = tl.max(weights(tl.zeros([BLOCK], tl.int32) + last), 0)
    return tl.sum(sums, 0) + equals * single


@triton.jit
def drawn(logits, row, best, sharpness, last, equals, wanted, VOCABULARY: tl.constexpr,
          BLOCK: tl.constexpr):  # fmt: skip
    """Return the token at which the sum of weights passes `wanted`, by rising ids, over tokens
    nearer than `last` and the first `equals` at that distance."""
    chosen = tl.cast(VOCABULARY, tl.int32)
    passed = tl.cast(0, tl.int64)
    seen = tl.cast(0, tl.int64)
    for start in tl.range(0, VOCABULARY, BLOCK, num_stages=3):
        distance = distances(logits, row, start, best, sharpness, VOCABULARY, BLOCK)
        equal = (distance == last).to(tl.int64)
        rank = seen + tl.cumsum(equal, 0) - equal
        kept = (distance < last) | ((equal > 0) & (rank < equals))
        value = tl.where(kept, weights(distance), 0)
        upto = passed + tl.cumsum(value, 0)
        token = start + tl.arange(0, BLOCK)
        chosen = tl.minimum(chosen, tl.min(tl.where(upto > wanted, token, VOCABULARY), 0))
        passed += tl.sum(value, 0)
        seen += tl.sum(equal, 0)
    return chosen


@triton.jit
def choose(logits, values, ids, settings, chosen, VOCABULARY: tl.constexpr, BLOCKS: tl.constexpr,
           PADDED: tl.constexpr):  # fmt: skip
    """Write the token of a row: the best one, or one that is drawn from the top_k likeliest, and
    of those from the fewest that hold a share top_p. settings [rows, 4]: see runtime/sampling.py.
    """
    row = tl.program_id(0)
    best, token = best_of(values, ids, row, BLOCKS, PADDED)
    sharpness = tl.load(settings + row * 4).to(tl.float32, bitcast=True)
    top_k = tl.load(settings + row * 4 + 1)
    top_p = tl.load(settings + row * 4 + 2).to(tl.int64)
    share = tl.load(settings + row * 4 + 3).to(tl.int64)
    if (sharpness > 0) & (token >= 0):
        last = tl.cast(FARTHEST + 1, tl.int32)
        equals = tl.cast(0, tl.int64)
        if (top_k > 0) & (top_k < VOCABULARY):
            last, nearer = threshold(logits, row, best, sharpness, top_k.to(tl.int64), VOCABULARY,
                                     SCANNED, False)  # fmt: skip
            equals = top_k - nearer
        total = total_of(logits, row, best, sharpness, last, equals, VOCABULARY, SCANNED)
        if top_p > 0:
            needed = part_of(total, top_p)
            needed -= needed >> 20
            border, nearer = threshold(logits, row, best, sharpness, needed, VOCABULARY, SCANNED,
                                       True)  # fmt: skip
            single = tl.max(weights(tl.zeros([SCANNED], tl.int32) + border), 0)
            enough = (needed - nearer + single - 1) // tl.maximum(single, 1)
            total = nearer + enough * single
            last, equals = border, enough
        wanted = part_of(total, share)
        token = drawn(logits, row, best, sharpness, last, equals, wanted, VOCABULARY, SCANNED)
    tl.store(chosen + row, token)
