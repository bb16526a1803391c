"""Permutes, flattening reshapes and expands move towards the outputs and vanish."""

from qc.ir import ops
from qc.ir.node import make
from qc.passes.lift.layout import SinkLayout
from tests.passes.lift.drawing import (
    BATCH,
    SEQ,
    add,
    becomes,
    concat,
    cut,
    expand,
    mul,
    permute,
    reshape,
    stays,
    stored,
    unary,
    value,
)

X, Y = value("x", BATCH, SEQ, 4, 8), value("y", BATCH, SEQ, 4, 8)
SWAP = (0, 2, 1, 3)


def test_inverse_permutes_vanish() -> None:
    becomes(SinkLayout(), unary("exp", permute(permute(X, *SWAP), *SWAP)), unary("exp", X))


def test_permutes_join() -> None:
    becomes(SinkLayout(), permute(permute(X, *SWAP), 0, 1, 3, 2), permute(X, 0, 2, 3, 1))


def test_a_permute_of_single_axes_is_a_reshape() -> None:
    x = value("x", 1, SEQ, 1, 8)
    becomes(SinkLayout(), permute(x, *SWAP), reshape(x, 1, 1, SEQ, 8))


def test_permutes_sink_below_functions() -> None:
    becomes(
        SinkLayout(),
        add(permute(X, *SWAP), unary("neg", permute(Y, *SWAP))),
        permute(add(X, unary("neg", Y)), *SWAP),
    )


def test_tables_are_reshaped_where_a_permute_sinks() -> None:
    cos = value("cos", 1, SEQ, 8)
    written = mul(permute(X, *SWAP), reshape(cos, 1, 1, SEQ, 8))
    becomes(SinkLayout(), written, permute(mul(X, reshape(cos, 1, SEQ, 1, 8)), *SWAP))


def test_vectors_and_numbers_stay_as_they_are() -> None:
    gain = stored(8)
    written = mul(mul(permute(X, *SWAP), 2.0), gain)
    becomes(SinkLayout(), written, permute(mul(mul(X, 2.0), gain), *SWAP))


def test_permutes_sink_below_norms_slices_and_joins() -> None:
    gain = stored(8)
    turned = make(ops.RMSNorm(1e-6), permute(X, *SWAP), gain)
    halves = concat(unary("neg", cut(turned, 4, 8)), cut(turned, 0, 4))
    plain = make(ops.RMSNorm(1e-6), X, gain)
    expected = permute(concat(unary("neg", cut(plain, 4, 8)), cut(plain, 0, 4)), *SWAP)
    becomes(SinkLayout(), halves, expected)


def test_flattened_rows_are_kept_apart() -> None:
    x, w, b = value("x", BATCH, SEQ, 8), stored(16, 8), stored(16)
    flat = reshape(x, BATCH * SEQ, 8)
    linear = make(ops.Linear(), flat, w, b)
    written = reshape(unary("relu", linear), BATCH, SEQ, 16)
    becomes(SinkLayout(), written, unary("relu", make(ops.Linear(), x, w, b)))


def test_heads_that_are_flattened_with_their_rows_are_joined_alone() -> None:
    w = stored(16, 32)
    linear = make(ops.Linear(), reshape(X, BATCH * SEQ, 32), w)
    expected = make(ops.Linear(), reshape(X, BATCH, SEQ, 32), w)
    becomes(SinkLayout(), reshape(linear, BATCH, SEQ, 16), expected)


def test_a_residual_of_flattened_rows() -> None:
    x, w = value("x", BATCH, SEQ, 8), stored(8, 8)
    flat = reshape(x, BATCH * SEQ, 8)
    written = reshape(add(flat, make(ops.Linear(), flat, w)), BATCH, SEQ, 8)
    becomes(SinkLayout(), written, add(x, make(ops.Linear(), x, w)))


def test_expanded_positions_are_embedded_once() -> None:
    ids, positions, w = value("x", BATCH, SEQ, 8), make(ops.Arange(SEQ)), stored(40, 8)
    single = reshape(positions, 1, SEQ)
    written = add(ids, make(ops.Embedding(), expand(single, BATCH, SEQ), w))
    becomes(SinkLayout(), written, add(ids, make(ops.Embedding(), single, w)))


def test_empty_parts_of_a_join_vanish() -> None:
    becomes(SinkLayout(), unary("exp", concat(X, cut(X, 8, 8))), unary("exp", X))


def test_what_would_take_a_copy_stays() -> None:
    whole = value("whole", BATCH, 4, SEQ, 8)
    stays(SinkLayout(), add(permute(X, *SWAP), whole))
    stays(SinkLayout(), add(permute(X, *SWAP), permute(value("z", SEQ, 4, 8), 1, 0, 2)))
    stays(SinkLayout(), make(ops.LayerNorm(1e-6), permute(X, 0, 1, 3, 2), stored(4), stored(4)))
    stays(SinkLayout(), concat(permute(X, *SWAP), value("z", BATCH, 1, SEQ, 8), axis=1))
