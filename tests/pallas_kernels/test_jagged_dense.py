"""Jagged to padded and back: every implementation against loops."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import IMPLEMENTATIONS, SHAPES, layout, poisoned, with_gradient

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.jagged_dense.api import dense_to_jagged, jagged_to_dense

WIDTH = 5
PADDING = -1.5


def oracle(x_TW, offsets_S1, length, padding):
  y_SLW = np.full((len(offsets_S1) - 1, length, x_TW.shape[1]), float(padding))
  for y_LW, (begin, end) in zip(y_SLW, itertools.pairwise(offsets_S1)):
    kept = min(length, end - begin)
    y_LW[:kept] = x_TW[begin : begin + kept]
  return y_SLW


def inverse(y_SLW, offsets_S1, T):
  x_TW = np.zeros((T, y_SLW.shape[2]))
  for y_LW, (begin, end) in zip(y_SLW, itertools.pairwise(offsets_S1)):
    kept = min(len(y_LW), end - begin)
    x_TW[begin : begin + kept] = y_LW[:kept]
  return x_TW


def length_of(name):
  """Shorter than the longest segments and longer than the shortest, but not of 16_384 events."""
  return 16_390 if name == "one_long" else 7 if name in SHAPES else 130


def dense(name, poison):
  """y_SLW, NaN in its padding where asked for."""
  offsets_S1, T = layout(name)
  rng, L = np.random.default_rng(1), length_of(name)
  y_SLW = rng.standard_normal((len(offsets_S1) - 1, L, WIDTH)).astype(np.float32)
  if poison:
    y_SLW[np.arange(L) >= np.diff(offsets_S1)[:, None]] = np.nan
  return y_SLW, offsets_S1, T


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LENGTHS)
def test_to_dense(name, implementation):
  dy_SLW, offsets_S1, T = dense(name, poison=False)
  x_TW = poisoned(np.random.default_rng(0), offsets_S1, T, WIDTH).astype(np.float32)
  L = length_of(name)
  run = with_gradient(jagged_to_dense, implementation, max_length=L, padding_value=PADDING)
  y_SLW, dx_TW = run(x_TW, offsets_S1, dy_SLW)
  np.testing.assert_array_equal(y_SLW, oracle(x_TW, offsets_S1, L, PADDING))
  np.testing.assert_array_equal(dx_TW, inverse(dy_SLW, offsets_S1, T))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LENGTHS)
def test_to_jagged(name, implementation):
  y_SLW, offsets_S1, T = dense(name, poison=True)
  dx_TW = poisoned(np.random.default_rng(0), offsets_S1, T, WIDTH).astype(np.float32)
  run = with_gradient(dense_to_jagged, implementation, rows_out=T)
  x_TW, dy_SLW = run(y_SLW, offsets_S1, dx_TW)
  np.testing.assert_array_equal(x_TW, inverse(y_SLW, offsets_S1, T))
  np.testing.assert_array_equal(dy_SLW, oracle(dx_TW, offsets_S1, length_of(name), 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_moved_bit_by_bit(dtype, implementation):
  offsets_S1 = offsets(np.array([3, 0, 9]), 2)
  x_TW = jnp.asarray(np.random.default_rng(0).standard_normal((20, 130)), dtype)
  fn = lambda x, ends: jagged_to_dense(x, ends, 5, implementation=implementation)
  y_SLW = jax.jit(fn)(x_TW, offsets_S1)
  assert y_SLW.dtype == dtype
  x64_TW = np.asarray(x_TW, np.float64)
  np.testing.assert_array_equal(np.asarray(y_SLW, np.float64), oracle(x64_TW, offsets_S1, 5, 0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_gradient_is_that_of_the_reference(implementation):
  dy_SLW, offsets_S1, T = dense("zipf", poison=False)
  x_TW = np.random.default_rng(0).standard_normal((T, WIDTH)).astype(np.float32)
  static = {"max_length": length_of("zipf"), "padding_value": PADDING}
  args = (x_TW, offsets_S1, dy_SLW)
  _, ours = with_gradient(jagged_to_dense, implementation, **static)(*args)
  _, reference = with_gradient(jagged_to_dense, "reference", **static)(*args)
  np.testing.assert_array_equal(ours, reference)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_move(implementation):
  offsets_S1 = np.zeros((3,), np.int32)
  for T, L, W in ((0, 2, 3), (4, 0, 3), (4, 2, 0)):
    x_TW, y_SLW = np.ones((T, W), np.float32), np.ones((2, L, W), np.float32)
    run = with_gradient(jagged_to_dense, implementation, max_length=L)
    y, dx = run(x_TW, offsets_S1, y_SLW)
    assert y.shape == y_SLW.shape and dx.shape == x_TW.shape and not y.any() and not dx.any()
    run = with_gradient(dense_to_jagged, implementation, rows_out=T)
    x, dy = run(y_SLW, offsets_S1, x_TW)
    assert y_SLW.shape == dy.shape and x.shape == x_TW.shape and not x.any() and not dy.any()


def test_bad_arguments():
  x_TW, y_SLW, offsets_S1 = jnp.ones((4, 2)), jnp.ones((2, 3, 2)), jnp.zeros((3,), jnp.int32)
  for call, sentence in (
    (lambda: jagged_to_dense(x_TW[0], offsets_S1, 3), "x must be floating of shape"),
    (lambda: jagged_to_dense(x_TW, offsets_S1 * 1.0, 3), "offsets must be int32"),
    (
      lambda: jagged_to_dense(x_TW, offsets_S1, -1),
      "max_length must be a whole number of 0 or more, is -1",
    ),
    (lambda: jagged_to_dense(x_TW, offsets_S1, 3, implementation="a"), "'a' is not one of"),
    (lambda: dense_to_jagged(x_TW, offsets_S1, 3), "y must be floating of shape"),
    (lambda: dense_to_jagged(y_SLW, offsets_S1[:2], 3), "y has 2 segments, offsets have 1"),
    (
      lambda: dense_to_jagged(y_SLW, offsets_S1, -3),
      "rows_out must be a whole number of 0 or more, is -3",
    ),
  ):
    with pytest.raises(ValueError, match=sentence):
      call()


@pytest.mark.parametrize("length", [3, 200])
def test_both_are_those_of_fbgemm(length):
  """Longer segments are cut and the padding value is used; what was cut comes back as zeros."""
  pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed (extra `benchmark`)")
  import torch

  offsets_S1 = offsets(LENGTHS["around_block"])
  x_TW = np.random.default_rng(0).standard_normal((offsets_S1[-1], WIDTH)).astype(np.float32)
  theirs = torch.tensor(x_TW, requires_grad=True)
  ends = torch.tensor(offsets_S1)
  y = torch.ops.fbgemm.jagged_to_padded_dense(theirs, [ends], [length], PADDING)
  run = with_gradient(jagged_to_dense, None, max_length=length, padding_value=PADDING)
  dy_SLW = np.random.default_rng(1).standard_normal(y.shape).astype(np.float32)
  y_SLW, dx_TW = run(x_TW, offsets_S1, dy_SLW)
  np.testing.assert_array_equal(y_SLW, y.detach())
  (y * torch.tensor(dy_SLW)).sum().backward()
  np.testing.assert_array_equal(dx_TW, theirs.grad)
  x, _ = torch.ops.fbgemm.dense_to_jagged(torch.tensor(dy_SLW), [ends], len(x_TW))
  back = with_gradient(dense_to_jagged, None, rows_out=len(x_TW))
  np.testing.assert_array_equal(back(dy_SLW, offsets_S1, x_TW)[0], x)
