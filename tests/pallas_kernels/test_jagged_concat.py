"""Jagged arrays side by side: every implementation against loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import IMPLEMENTATIONS, compiled, layout, poisoned

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.jagged_concat.api import jagged_concat

WIDTH = 5


def oracle(xs, all_offsets, rows_out):
  """y_TW, its offsets, and for each of its rows the array and row it came from."""
  parts, origin, ends = [], [], [0]
  for s in range(len(all_offsets[0]) - 1):
    for k, (x_TW, offsets_S1) in enumerate(zip(xs, all_offsets)):
      begin, end = offsets_S1[s], offsets_S1[s + 1]
      parts.append(x_TW[begin:end])
      origin += [(k, t) for t in range(begin, end)]
    ends.append(len(origin))
  y_TW = np.zeros((max(rows_out, len(origin)), xs[0].shape[1]))
  y_TW[: len(origin)] = np.concatenate([*parts, np.zeros((0, xs[0].shape[1]))])
  return y_TW[:rows_out], np.minimum(ends, rows_out), origin[:rows_out]


def inputs(name, K):
  """K arrays: as laid out, then the lengths in other orders, from other first rows on."""
  rng = np.random.default_rng(0)
  xs, all_offsets = [], []
  for k in range(K):
    offsets_S1, T = layout(name, start=3 - k)
    if k:
      offsets_S1 = offsets(rng.permutation(np.diff(offsets_S1)), 3 - k)
    all_offsets.append(offsets_S1)
    xs.append(poisoned(rng, offsets_S1, T + k, WIDTH).astype(np.float32))
  return tuple(xs), tuple(all_offsets)


_RUNS = {}


def run(implementation, rows_out, xs, all_offsets, dy):
  def both(xs, all_offsets, dy):
    fn = lambda xs: jagged_concat(xs, all_offsets, rows_out=rows_out, implementation=implementation)
    y, pullback, ends = jax.vjp(fn, xs, has_aux=True)
    return y, ends, pullback(dy)[0]

  key = implementation, rows_out
  _RUNS.setdefault(key, compiled(both))
  return _RUNS[key](xs, all_offsets, dy)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("name", "K", "room"),
  [("empty_among", 1, None), ("zipf", 2, None), *((name, 3, 1_000) for name in LENGTHS)],
)
def test_values_offsets_and_gradients(name, K, room, implementation):
  xs, all_offsets = inputs(name, K)
  rows_out = room or sum(len(x) for x in xs)
  dy_TW = np.random.default_rng(1).standard_normal((rows_out, WIDTH)).astype(np.float32)
  y_TW, ends_S1, dxs = run(implementation, room, xs, all_offsets, dy_TW)
  want_TW, want_S1, origin = oracle(xs, all_offsets, rows_out)
  np.testing.assert_array_equal(y_TW, want_TW)
  np.testing.assert_array_equal(ends_S1, want_S1)
  assert ends_S1.dtype == jnp.int32
  want_dxs = [np.zeros(x.shape) for x in xs]
  for dy_W, (k, t) in zip(dy_TW, origin):
    want_dxs[k][t] = dy_W
  for dx_TW, want_dx_TW in zip(dxs, want_dxs):
    np.testing.assert_array_equal(dx_TW, want_dx_TW)
  for dx_TW, reference in zip(dxs, run("reference", room, xs, all_offsets, dy_TW)[2]):
    np.testing.assert_array_equal(dx_TW, reference)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_half_precision_is_moved_bit_by_bit(implementation):
  offsets_S1 = jnp.asarray(offsets(np.array([3, 0, 9]), 2))
  x_TW = jnp.asarray(np.random.default_rng(0).standard_normal((20, 130)), jnp.bfloat16)
  fn = lambda xs, ends: jagged_concat(xs, ends, implementation=implementation)
  y_TW, _ = jax.jit(fn)((x_TW, x_TW), (offsets_S1,) * 2)
  assert y_TW.dtype == jnp.bfloat16 and y_TW.shape == (40, 130)
  np.testing.assert_array_equal(y_TW[3:6], x_TW[2:5])
  np.testing.assert_array_equal(y_TW[15:24], x_TW[5:14])


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_move(implementation):
  offsets_S1 = np.zeros((3,), np.int32)
  for T, W in ((0, 3), (4, 0)):
    xs = np.ones((T, W), np.float32), np.ones((2, W), np.float32)
    dy_TW = np.ones((T + 2, W), np.float32)
    y_TW, ends_S1, dxs = run(implementation, None, xs, (offsets_S1,) * 2, dy_TW)
    assert y_TW.shape == dy_TW.shape and not y_TW.any() and not ends_S1.any()
    assert [dx.shape for dx in dxs] == [(T, W), (2, W)]


def test_bad_arguments():
  x_TW, offsets_S1 = jnp.ones((4, 2)), jnp.zeros((3,), jnp.int32)
  for xs, all_offsets, static, sentence in (
    ((), (), {}, "0 arrays need as many offsets and at least one, got 0"),
    ((x_TW,), (offsets_S1,) * 2, {}, "1 arrays need as many offsets"),
    ((x_TW, x_TW[:, :1]), (offsets_S1,) * 2, {}, r"xs\[1\] is float32 of width 1, xs\[0\]"),
    ((x_TW, x_TW.astype("bfloat16")), (offsets_S1,) * 2, {}, r"xs\[1\] is bfloat16"),
    ((x_TW,) * 2, (offsets_S1, offsets_S1[:2]), {}, r"offsets\[1\] have 1 segments"),
    ((x_TW, x_TW[0]), (offsets_S1,) * 2, {}, r"xs\[1\] must be floating of shape"),
    (
      (x_TW,),
      (offsets_S1,),
      {"rows_out": -1},
      "rows_out must be a whole number of 0 or more, is -1",
    ),
    ((x_TW,), (offsets_S1,), {"implementation": "a"}, "'a' is not one of"),
  ):
    with pytest.raises(ValueError, match=sentence):
      jagged_concat(xs, all_offsets, **static)


def test_side_by_side_is_that_of_fbgemm():
  """fbgemm lists jagged arrays key by key; by sample it is our order."""
  pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed (extra `benchmark`)")
  import torch

  xs, all_offsets = inputs("zipf", 2)
  events = [x[o[0] : o[-1], 0] for x, o in zip(xs, all_offsets)]
  lengths_KS = torch.tensor(np.stack([np.diff(o) for o in all_offsets]))
  order_KS = torch.arange(lengths_KS.numel(), dtype=torch.int32).reshape(lengths_KS.shape)
  _, theirs, _ = torch.ops.fbgemm.permute_1D_sparse_data(
    order_KS.T.reshape(-1), lengths_KS.reshape(-1), torch.tensor(np.concatenate(events)), None, None
  )
  y_TW, ends_S1 = jax.jit(jagged_concat)(xs, all_offsets)
  np.testing.assert_array_equal(y_TW[: ends_S1[-1], 0], theirs)
