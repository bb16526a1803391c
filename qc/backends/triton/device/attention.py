"""Attention over keys and values [batch, room, KV, DIM], of which `total` positions are filled.

Rows of scores are queries of heads that share keys; each row keeps its largest score, the sum of
its powers and the weighted values (Dao et al. 2022, FlashAttention; 2023, Flash-Decoding). Padding
rows and channels, up to powers of two, are 0 and never stored.
"""

import triton
import triton.language as tl

from qc.backends.triton.device.constants import LOWEST
from qc.backends.triton.device.elementwise import tanh
from qc.backends.triton.device.rotary import partner

# ---------------------------------------------------------------- who this program is


@triton.jit
def first():
    return tl.program_id(0)


@triton.jit
def second():
    return tl.program_id(1)


@triton.jit
def third():
    return tl.program_id(2)


@triton.jit
def group_heads(kv_head, GROUP: tl.constexpr, ROWS: tl.constexpr):
    """The query heads of a decoding program, a column: those that share a key head."""
    return kv_head * GROUP + tl.arange(0, ROWS)[:, None]


@triton.jit
def group_rows(GROUP: tl.constexpr, ROWS: tl.constexpr):
    """Which rows of a decoding program exist."""
    return tl.arange(0, ROWS)[:, None] < GROUP


@triton.jit
def block_tokens(block, ROWS: tl.constexpr):
    """The query positions of a block, a column."""
    return block * ROWS + tl.arange(0, ROWS)[:, None]


@triton.jit
def below(token, seq):
    return token < seq


@triton.jit
def row(batch, seq, token):
    """The number of a token among batch * seq."""
    return batch * seq + token


@triton.jit
def batch_of(number, seq):
    return number // seq


@triton.jit
def token_of(number, seq):
    return number % seq


# ---------------------------------------------------------------- queries


@triton.jit
def queries(
    q, number, head, exists,
    HEADS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
):  # fmt: skip
    """Rows of queries as DTYPE; `number` and `head` are columns or numbers."""
    channel = tl.arange(0, CHANNELS)[None, :]
    return load_queries(q, number, head, exists, channel, HEADS, DIM).to(DTYPE)


@triton.jit
def load_queries(q, number, head, exists, channel, HEADS: tl.constexpr, DIM: tl.constexpr):
    at = q + (number * HEADS + head) * DIM + channel
    return tl.load(at, mask=exists & (channel < DIM), other=0).to(tl.float32)


@triton.jit
def rotated_queries(
    q, cos, sin, number, head, exists, seq, batches,
    HEADS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr, DTYPE: tl.constexpr,
    ROTARY: tl.constexpr,
):  # fmt: skip
    """Rows of queries after rotary position embedding; cos, sin [batches, seq, ROTARY]."""
    channel = tl.arange(0, CHANNELS)[None, :]
    straight = load_queries(q, number, head, exists, channel, HEADS, DIM)
    turned = load_queries(q, number, head, exists, partner(channel, ROTARY), HEADS, DIM)
    place = tl.where(batches == 1, number % seq, number)
    inside = exists & (channel < ROTARY)
    c = tl.load(cos + place * ROTARY + channel, mask=inside, other=1.0).to(tl.float32)
    s = tl.load(sin + place * ROTARY + channel, mask=inside, other=0.0).to(tl.float32)
    rotated = straight * c + tl.where(channel < ROTARY // 2, -turned, turned) * s
    return rotated.to(DTYPE)


# ---------------------------------------------------------------- scores


@triton.jit
def no_mask(scores, mask, batch, head, token, key, exists, b, h, s, k):
    return scores


@triton.jit
def additive_mask(scores, mask, batch, head, token, key, exists, b, h, s, k):
    """Add a mask [batch, heads, seq, total] with strides b, h, s, k."""
    at = mask + batch * b + head * h + token * s + key * k
    return scores + tl.load(at, mask=exists, other=0).to(tl.float32)


@triton.jit
def boolean_mask(scores, mask, batch, head, token, key, exists, b, h, s, k):
    """Hide where a mask [batch, heads, seq, total] with strides b, h, s, k is false."""
    at = mask + batch * b + head * h + token * s + key * k
    return tl.where(tl.load(at, mask=exists, other=0) != 0, scores, LOWEST)


@triton.jit
def attend(
    rows, k, v, k_scale, v_scale, decode: tl.constexpr, mask, masking: tl.constexpr,
    batch, head, kv_head, token, exists, seq, total, room, start, stop, b, h, s, t,
    KV: tl.constexpr, DIM: tl.constexpr, DIM_V: tl.constexpr,
    CHANNELS: tl.constexpr, CHANNELS_V: tl.constexpr, BLOCK: tl.constexpr,
    SCALE: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, SOFTCAP: tl.constexpr,
    UNIT: tl.constexpr,
):  # fmt: skip
    """Attend from some rows of queries to the positions start..stop. Return the weighted values,
    the largest scores and the sums. WINDOW or SOFTCAP of 0: none. Where UNIT is not 0, keys and
    values are codes, which `decode` divides by it, with scales [batch, room, KV]."""
    ROWS: tl.constexpr = rows.shape[0]
    channel = tl.arange(0, CHANNELS)[:, None]
    channel_v = tl.arange(0, CHANNELS_V)[None, :]
    place = total - seq + token
    values = tl.zeros([ROWS, CHANNELS_V], tl.float32)
    largest = tl.full([ROWS], LOWEST, tl.float32)
    sums = tl.zeros([ROWS], tl.float32)
    base = batch.to(tl.int64) * room
    for position in tl.range(start, stop, BLOCK):
        key = position + tl.arange(0, BLOCK)
        at = ((base + key) * KV + kv_head) * DIM
        filled = (key < stop)[None, :] & (channel < DIM)
        keys = decode(tl.load(k + at[None, :] + channel, mask=filled, other=0)).to(rows.dtype)
        scores = tl.dot(rows, keys) * SCALE
        if UNIT != 0:
            scale_at = (base + key) * KV + kv_head
            scores *= tl.load(k_scale + scale_at, mask=key < stop, other=0.0)[None, :] * UNIT
        if SOFTCAP != 0:
            scores = tanh(scores * (1.0 / SOFTCAP)) * SOFTCAP
        along = key[None, :]
        visible = (along < stop) & exists
        scores = masking(scores, mask, batch, head, token, along, visible, b, h, s, t)
        if CAUSAL:
            visible = visible & (along <= place)
        if WINDOW != 0:
            visible = visible & (along > place - WINDOW)
        scores = tl.maximum(tl.where(visible, scores, LOWEST), LOWEST)
        highest = tl.maximum(largest, tl.max(scores, 1))
        powers = tl.where(visible, tl.exp(scores - highest[:, None]), 0.0)
        correction = tl.exp(largest - highest)
        sums = sums * correction + tl.sum(powers, 1)
        at_v = ((base + key) * KV + kv_head) * DIM_V
        filled_v = (key < stop)[:, None] & (channel_v < DIM_V)
        found = decode(tl.load(v + at_v[:, None] + channel_v, mask=filled_v, other=0))
        found = found.to(rows.dtype)
        if UNIT != 0:
            scale_v = tl.load(v_scale + scale_at, mask=key < stop, other=0.0) * UNIT
            found = (found.to(tl.float32) * scale_v[:, None]).to(rows.dtype)
        values = values * correction[:, None] + tl.dot(powers.to(rows.dtype), found)
        largest = highest
    return values, largest, sums


# ---------------------------------------------------------------- many queries


@triton.jit
def block_start(block, seq, total, ROWS: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """The first position that a block of queries sees."""
    if WINDOW == 0:
        return 0
    else:
        first_seen = total - seq + block * ROWS - WINDOW + 1
        return tl.maximum(first_seen, 0) // BLOCK * BLOCK


@triton.jit
def block_stop(block, seq, total, ROWS: tl.constexpr, CAUSAL: tl.constexpr):
    """Where what a block of queries sees ends."""
    if CAUSAL:
        return tl.minimum(total - seq + (block + 1) * ROWS, total)
    else:
        return total


@triton.jit
def store_block(
    result, values, sums, number, head, exists,
    HEADS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Write a block of results [batch, seq, HEADS, DIM]."""
    channel = tl.arange(0, CHANNELS)[None, :]
    at = result + (number * HEADS + head) * DIM + channel
    found = values / tl.maximum(sums, 1e-30)[:, None]
    tl.store(at, found.to(result.dtype.element_ty), mask=exists & (channel < DIM))


# ---------------------------------------------------------------- few queries, split positions


@triton.jit
def low(token, seq, total, WINDOW: tl.constexpr):
    """The first position that a query sees."""
    if WINDOW == 0:
        return 0
    else:
        return tl.maximum(total - seq + token - WINDOW + 1, 0)


@triton.jit
def high(token, seq, total, CAUSAL: tl.constexpr):
    """Where what a query sees ends."""
    if CAUSAL:
        return total - seq + token + 1
    else:
        return total


@triton.jit
def part_start(part, low, high, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    """Where a part begins: whole blocks, so that few positions make few parts."""
    blocks = (high - low + BLOCK - 1) // BLOCK
    return low + part * ((blocks + PARTS - 1) // PARTS) * BLOCK


@triton.jit
def part_stop(part, low, high, PARTS: tl.constexpr, BLOCK: tl.constexpr):
    return tl.minimum(part_start(part + 1, low, high, PARTS, BLOCK), high)


@triton.jit
def store_part(
    partial, sums_of, values, largest, sums, number, kv_head, part,
    KV: tl.constexpr, PARTS: tl.constexpr, GROUP: tl.constexpr, DIM: tl.constexpr,
    ROWS: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Keep what a part found: [tokens, KV, GROUP, PARTS, DIM], and largest scores and sums
    [tokens, KV, GROUP, PARTS, 2]."""
    channel = tl.arange(0, CHANNELS)
    row = tl.arange(0, ROWS)
    place = ((number * KV + kv_head) * GROUP + row) * PARTS + part
    inside = (row < GROUP)[:, None] & (channel < DIM)[None, :]
    tl.store(partial + place[:, None] * DIM + channel[None, :], values, mask=inside)
    tl.store(sums_of + place * 2, largest, mask=row < GROUP)
    tl.store(sums_of + place * 2 + 1, sums, mask=row < GROUP)


@triton.jit
def merge(
    result, partial, sums_of, row,
    PARTS: tl.constexpr, DIM: tl.constexpr, CHANNELS: tl.constexpr,
):  # fmt: skip
    """Combine the parts of one query head and write its result."""
    part = tl.arange(0, PARTS)
    channel = tl.arange(0, CHANNELS)
    place = row * PARTS + part
    largest = tl.load(sums_of + place * 2)
    sums = tl.load(sums_of + place * 2 + 1)
    weight = tl.exp(largest - tl.max(largest, 0))
    inside = (channel < DIM)[None, :] & (sums > 0)[:, None]
    values = tl.load(partial + place[:, None] * DIM + channel[None, :], mask=inside, other=0.0)
    total = tl.maximum(tl.sum(sums * weight, 0), 1e-30)
    found = tl.sum(values * weight[:, None], 0) / total
    tl.store(result + row * DIM + channel, found.to(result.dtype.element_ty), mask=channel < DIM)
