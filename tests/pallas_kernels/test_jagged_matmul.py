"""Rows times the matrix of their segment: every implementation against loops in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_quickly import ON_GPU
from laid_out import IMPLEMENTATIONS, check_close, compiled, layout, poisoned

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.dispatch import Refused
from pallas_kernels.jagged_matmul import tiles
from pallas_kernels.jagged_matmul.api import jagged_matmul

K, N = 5, 7


def oracle(x_TK, w_SKN, offsets_S1, dy_TN):
  """(y, dx, dw), and the sums of the magnitudes behind each of their elements."""
  shapes = dy_TN.shape, x_TK.shape, w_SKN.shape
  found, sizes = [np.zeros(s) for s in shapes], [np.zeros(s) for s in shapes]
  for s, (begin, end) in enumerate(itertools.pairwise(offsets_S1)):
    of, x, dy, w = slice(begin, end), x_TK[begin:end], dy_TN[begin:end], w_SKN[s]
    for into, f in ((found, lambda a: a), (sizes, np.abs)):
      into[0][of], into[1][of], into[2][s] = f(x) @ f(w), f(dy) @ f(w).T, f(x).T @ f(dy)
  return found, sizes


def inputs(offsets_S1, T, k=K, n=N, seed=0):
  """x, w, offsets and dy; NaN in the rows of nobody, of dy as of x."""
  rng = np.random.default_rng(seed)
  x_TK, dy_TN = (poisoned(rng, offsets_S1, T, width) for width in (k, n))
  w_SKN = np.round(rng.standard_normal((len(offsets_S1) - 1, k, n)) * 16) / 16
  return x_TK, w_SKN, offsets_S1, dy_TN


@functools.cache
def run(implementation):
  def both(x_TK, w_SKN, offsets_S1, dy_TN):
    fn = lambda x, w: jagged_matmul(x, w, offsets_S1, implementation=implementation)
    y_TN, pullback = jax.vjp(fn, x_TK, w_SKN)
    return y_TN, *pullback(dy_TN)

  return compiled(both)


def cast(args, dtype="float32"):
  return tuple(jnp.asarray(a, a.dtype if a.dtype == np.int32 else dtype) for a in args)


def check(got, args, dtype="float32"):
  for one, want, size in zip(got, *oracle(*args), strict=True):
    assert one.dtype == dtype
    # Kernels on a GPU multiply float32 as TF32.
    check_close(one, want, size * (1e3 if ON_GPU and dtype == "float32" else 1), dtype)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("name", LENGTHS)
def test_values_and_gradients(name, implementation):
  """NaN in rows of nobody reaches neither y nor a gradient, and their own gradient is 0."""
  args = inputs(*layout(name))
  check(run(implementation)(*cast(args)), args)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_bits_repeat(implementation):
  args = cast(inputs(*layout("zipf")))
  for one, other in zip(run(implementation)(*args), run(implementation)(*args)):
    np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_half_precision_is_summed_in_float32(dtype, implementation):
  args = inputs(*layout("zipf"))
  check(run(implementation)(*cast(args, dtype)), args, dtype)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_long_sums_of_half_precision(implementation):
  """Of so many wide tiles that XLA adds them up in several turns of its loop."""
  args = inputs(offsets(np.array([0, 1_500, 300], np.int32), 1), 1_810, 128, 128)
  check(run(implementation)(*cast(args, "bfloat16")), args, "bfloat16")


@pytest.mark.parametrize("implementation", ["xla", "triton"])
@pytest.mark.parametrize(
  ("k", "n", "dtype"),
  [(136, 24, "float32"), (24, 200, "bfloat16"), (64, 128, "bfloat16"), (1, 1, "float32")],
)
def test_widths_of_several_pieces_whole_and_not(k, n, dtype, implementation):
  args = inputs(offsets(np.array([40, 0, 70, 3], np.int32), 2), 120, k, n)
  check(run(implementation)(*cast(args, dtype)), args, dtype)


@pytest.mark.parametrize("name", ["around_block", "zipf"])
def test_programs_may_run_in_any_order(name, monkeypatch):
  """The interpreter runs one after the other: of two that write a row, the last would win."""
  args = inputs(*layout(name))
  cut = tiles.cut
  reverse = lambda *how: tiles.Tiles(*(a[::-1] for a in cut(*how)))
  monkeypatch.setattr(tiles, "cut", reverse)
  check(run.__wrapped__("triton")(*cast(args)), args)


@pytest.mark.parametrize("implementation", ["xla", "triton"])
def test_segments_do_not_know_their_place(implementation):
  x_TK, w_SKN, offsets_S1, dy_TN = inputs(*layout("zipf"))
  order_S = np.random.default_rng(5).permutation(len(w_SKN))
  row_M = np.concatenate([np.arange(offsets_S1[s], offsets_S1[s + 1]) for s in order_S])
  inside = slice(offsets_S1[0], offsets_S1[-1])
  mixed = [x_TK.copy(), w_SKN[order_S], None, dy_TN.copy()]
  mixed[0][inside], mixed[3][inside] = x_TK[row_M], dy_TN[row_M]
  mixed[2] = offsets(np.diff(offsets_S1)[order_S], offsets_S1[0])
  y_TN, dx_TK, dw_SKN = run(implementation)(*cast((x_TK, w_SKN, offsets_S1, dy_TN)))
  mixed_y_TN, mixed_dx_TK, mixed_dw_SKN = run(implementation)(*cast(mixed))
  np.testing.assert_array_equal(mixed_y_TN[inside], y_TN[row_M])
  np.testing.assert_array_equal(mixed_dx_TK[inside], dx_TK[row_M])
  np.testing.assert_array_equal(mixed_dw_SKN, dw_SKN[order_S])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_nan_stays_in_its_segment(implementation):
  """Of a row, of a matrix and of a gradient: segments share no tile and no sum."""
  args = x_TK, w_SKN, offsets_S1, dy_TN = inputs(*layout("around_block"))
  want, _ = oracle(*args)
  x_TK[offsets_S1[1] + 2, 0] = w_SKN[4, 0, 0] = dy_TN[offsets_S1[6], 0] = np.nan
  got = [np.asarray(a) for a in run(implementation)(*cast(args))]
  row = lambda s: slice(offsets_S1[s], offsets_S1[s + 1])
  touched = {
    0: [offsets_S1[1] + 2, row(4)],  # y
    1: [row(4), offsets_S1[6]],  # dx
    2: [1, 6],  # dw
  }
  for i, places in touched.items():
    is_nan = np.isnan(got[i]).any(axis=tuple(range(1, got[i].ndim)))
    may_be = np.zeros_like(is_nan)
    for place in places:
      assert is_nan[place].all()
      may_be[place] = True
    np.testing.assert_array_equal(is_nan, may_be)
    np.testing.assert_allclose(got[i][~may_be], want[i][~may_be], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("shape", [(0, 2, 3, 4), (6, 0, 3, 4), (6, 2, 0, 4), (6, 2, 3, 0)])
def test_no_rows_no_segments_no_columns(shape, implementation):
  T, S, k, n = shape
  offsets_S1 = jnp.full((S + 1,), T // 2, jnp.int32)
  fn = lambda x, w: jagged_matmul(x, w, offsets_S1, implementation=implementation)
  y_TN, pullback = jax.vjp(fn, jnp.ones((T, k)), jnp.ones((S, k, n)))
  assert y_TN.shape == (T, n) and not y_TN.any()
  dx_TK, dw_SKN = pullback(jnp.ones((T, n)))
  assert dx_TK.shape == (T, k) and dw_SKN.shape == (S, k, n)
  assert not dx_TK.any() and not dw_SKN.any()


def test_the_formulas_in_float64():
  args = inputs(*layout("zipf"))
  with jax.enable_x64():
    for implementation in ("reference", "xla"):
      for one, want in zip(run(implementation)(*cast(args, "float64")), oracle(*args)[0]):
        assert one.dtype == jnp.float64
        np.testing.assert_allclose(one, want, rtol=1e-12, atol=1e-12)
    with pytest.raises(Refused, match="not float64"):
      jagged_matmul(*cast(args[:3], "float64"), implementation="triton")


@pytest.mark.parametrize("block", [8, 64])
@pytest.mark.parametrize("name", [name for name, length_S in LENGTHS.items() if len(length_S)])
def test_tiles_hold_every_row_of_a_segment_once(name, block):
  offsets_S1, T = layout(name)
  cut = jax.jit(tiles.cut, static_argnums=(1, 2))(offsets_S1, T, block)
  segment_N, begin_N, end_N = (np.asarray(a) for a in cut)
  held = [
    (segment, row)
    for segment, begin, end in zip(segment_N, begin_N, end_N)
    for row in range(begin, end)
  ]
  rows_S = [range(*pair) for pair in itertools.pairwise(offsets_S1)]
  assert held == [(s, row) for s, rows in enumerate(rows_S) for row in rows]
  assert (end_N - begin_N <= block).all()


def test_the_bound_of_tiles_is_reached():
  """One row more than a multiple of the block in every segment: as many tiles as the bound."""
  offsets_S1 = offsets(np.full((6,), 17, np.int32))
  cut = tiles.cut(jnp.asarray(offsets_S1), 6 * 17, 16)
  assert len(cut.begin_N) == 12 and (cut.begin_N < cut.end_N).all()


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"x_TK": np.ones((4,), np.float32)}, r"x must be floating of shape \(rows, width\)"),
    ({"x_TK": np.ones((4, 2), np.int32)}, "is int32 of shape"),
    ({"x_TK": np.ones((4, 5), np.float32)}, r"\(1, 5, \.\.\.\), is float32 of shape \(1, 2, 3\)"),
    ({"w_SKN": np.ones((2, 2, 3), np.float32)}, r"\(1, 2, \.\.\.\), is float32 of shape \(2, 2"),
    ({"w_SKN": np.ones((1, 2, 3), np.float16)}, "w must be float32 like x, .* is float16"),
    ({"w_SKN": np.ones((2, 3), np.float32)}, "width of x, width of y"),
    ({"offsets_S1": np.zeros((2,), np.float32)}, "offsets must be int32"),
    ({"implementation": "cuda"}, "'cuda' is not one of"),
  ],
)
def test_bad_arguments(change, sentence):
  args = {
    "x_TK": np.ones((4, 2), np.float32),
    "w_SKN": np.ones((1, 2, 3), np.float32),
    "offsets_S1": np.array([0, 4], np.int32),
  }
  with pytest.raises(ValueError, match=sentence):
    jagged_matmul(**(args | change))


def test_it_is_that_of_fbgemm():
  pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed (extra `benchmark`)")
  import torch

  offsets_S1 = offsets(np.array([3, 0, 20, 1], np.int32))
  x_TK, w_SKN, _, _ = (a.astype(np.float32) for a in inputs(offsets_S1, 24))
  theirs = torch.ops.fbgemm.jagged_dense_bmm(
    torch.tensor(x_TK), torch.tensor(offsets_S1).long(), torch.tensor(w_SKN), 20
  )[0]
  ours = jagged_matmul(*cast((x_TK, w_SKN, offsets_S1)), implementation="xla")
  np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-5)
