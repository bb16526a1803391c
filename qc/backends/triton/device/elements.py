"""Positions, loads and stores of bodies that are traced element by element."""

import triton
import triton.language as tl


@triton.jit
def positions(BLOCK: tl.constexpr):
    """The flat positions that this program writes."""
    return tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)


@triton.jit
def below(position, size):
    return position < size


@triton.jit
def between(position, start, stop):
    return (position >= start) & (position < stop)


@triton.jit
def both(a, b):
    return a & b


@triton.jit
def coordinate(position, stride, size):
    """The position along an axis of `size` whose neighbours are `stride` elements apart."""
    return (position // stride) % size


@triton.jit
def leading(position, stride):
    """The position along the first axis."""
    return position // stride


@triton.jit
def step(offset, position, stride):
    """Go `position` times `stride` elements on."""
    return offset + position * stride


@triton.jit
def shifted(position, start):
    return position + start


@triton.jit
def before(position, start):
    return position - start


@triton.jit
def scaled(position, stride):
    return position * stride


@triton.jit
def row_of_table(id, rows):
    """Limit an id to a table: memory stays safe whatever comes in."""
    return tl.minimum(tl.maximum(id, 0), rows - 1).to(tl.int32)


@triton.jit
def indices(position):
    """Positions as the int64 values that index operations yield."""
    return tl.zeros((), tl.int64) + position


@triton.jit
def size(pointer):
    """A size that changes between the calls of one graph of launches."""
    return tl.load(pointer)


@triton.jit
def load(pointer, offset, inside):
    """Values as what is computed with: half precision as float32."""
    found = tl.load(pointer + offset, mask=inside, other=0)
    if found.dtype.is_floating():
        return found.to(tl.float32)
    else:
        return found


@triton.jit
def load_one(pointer):
    """A number that is stored."""
    found = tl.load(pointer)
    if found.dtype.is_floating():
        return found.to(tl.float32)
    else:
        return found


@triton.jit
def store(pointer, offset, inside, value):
    tl.store(pointer + offset, value.to(pointer.dtype.element_ty), mask=inside)
