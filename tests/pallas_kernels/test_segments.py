"""Offsets: those that are no offsets are refused where anyone can know it, in one sentence."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import pallas_kernels as pk
from pallas_kernels.dispatch import Refused

X_TW, ID_N = np.ones((10, 4), np.float32), np.arange(10, dtype=np.int32)
OPS = {
  "jagged_pool": lambda x, o, **more: pk.jagged_pool(x, o, mode="sum", **more),
  "jagged_to_dense": lambda x, o, **more: pk.jagged_to_dense(x, o, 3, **more),
  "dense_to_jagged": lambda x, o, **more: pk.dense_to_jagged(x[None], o, 3, **more),
  "jagged_concat": lambda x, o, **more: pk.jagged_concat((x,), (o,), **more),
  "jagged_matmul": lambda x, o, **more: pk.jagged_matmul(x, x[None, :4, :4], o, **more),
  "embedding_bag": lambda x, o, **more: pk.embedding_bag(x, ID_N, o, mode="sum", **more),
  "jagged_attention": lambda x, o, **more: pk.jagged_attention(*(x[:, None],) * 3, o, **more),
}  # fmt: skip
BAD = [
  ([0, 6, 3, 10], "entry 2 is 3 behind 6"),
  ([-1, 10], "entry 0 is -1 behind 0"),
  (np.array([0, 2**32 + 4]), f"the last is {2**32 + 4}"),
  ([0.0, 10.0], r"must be int32 of shape \(segments \+ 1,\), is float64 of shape \(2,\)"),
  ([], r"is float64 of shape \(0,\)"),
  (np.zeros((1, 2), np.int32), r"is int32 of shape \(1, 2\)"),
]


@pytest.mark.parametrize("op", OPS)
def test_what_are_no_offsets_is_refused(op):
  for offsets, words in BAD:
    with pytest.raises(ValueError, match=rf"{op}: .*offsets.*{words}"):
      OPS[op](X_TW, offsets)


@pytest.mark.parametrize("op", OPS)
def test_lists_arrays_and_traced_ones_are_the_same(op):
  wanted = jax.tree.leaves(OPS[op](X_TW, [0, 10]))
  for offsets in (np.array([0, 10]), np.array([0, 10], np.int32), jnp.array([0, 10], jnp.int32)):
    for found in (OPS[op](X_TW, offsets), jax.jit(lambda o: OPS[op](X_TW, o))(jnp.array([0, 10]))):
      for x, y in zip(jax.tree.leaves(found), wanted, strict=True):
        np.testing.assert_allclose(x, y)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("rows", [0, 10])
def test_an_unknown_implementation_is_refused_whatever_there_is_to_do(op, rows):
  with pytest.raises(Refused, match=r"'cuda' is not one of .*reference"):
    OPS[op](X_TW[:rows], [0, rows], implementation="cuda")


@pytest.mark.parametrize(
  "op", ["jagged_pool", "jagged_matmul", "embedding_bag", "jagged_attention"]
)
def test_eight_bits_are_moved_and_not_computed_with(op):
  for dtype in (jnp.float8_e4m3fn, jnp.float8_e5m2):
    with pytest.raises(ValueError, match=f"{op}: .* 16 bits or more"):
      OPS[op](jnp.asarray(X_TW, dtype), [0, 10])


@pytest.mark.parametrize("dtype", [jnp.float8_e4m3fn, jnp.float8_e5m2])
def test_eight_bits_arrive_as_they_are(dtype):
  x_TW = jnp.asarray(np.random.default_rng(0).normal(size=(10, 4)), dtype)
  last = pk.jagged_pool(x_TW, [0, 4, 10], mode="last", k=2)
  np.testing.assert_array_equal(last, x_TW[jnp.array([[2, 3], [8, 9]])])
  dense = pk.jagged_to_dense(x_TW, [0, 4, 10], 3)
  np.testing.assert_array_equal(dense[1], x_TW[4:7])
  np.testing.assert_array_equal(pk.jagged_concat((x_TW,), ([0, 4, 10],))[0], x_TW)
