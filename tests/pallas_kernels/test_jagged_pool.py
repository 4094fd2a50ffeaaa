"""Pooling: every implementation against loops in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import IMPLEMENTATIONS, check_close, layout, poisoned, with_gradient

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.dispatch import Refused
from pallas_kernels.jagged_pool.api import MODES, jagged_pool

WIDTH, K = 5, 3
SETTINGS = {mode: {"mode": mode, **({"k": K} if mode == "last" else {})} for mode in MODES}


def oracle(x_TW, offsets_S1, dy, mode, k=None):
  """y, dx and the sum of magnitudes behind each y, in float64."""
  S, W = len(offsets_S1) - 1, x_TW.shape[1]
  y = np.zeros((S, W) if k is None else (S, k, W))
  size, dx_TW = np.zeros_like(y), np.zeros(x_TW.shape)
  for s, (begin, end) in enumerate(itertools.pairwise(offsets_S1)):
    if begin == end:
      continue
    x = x_TW[begin:end]
    if mode == "last":
      kept = min(k, end - begin)
      y[s, k - kept :] = x[len(x) - kept :]
      dx_TW[end - kept : end] = dy[s, k - kept :]
    elif mode == "max":
      y[s] = x.max(0)
      dx_TW[begin + x.argmax(0), np.arange(W)] = dy[s]  # argmax: the first.
    else:
      share = 1 / (end - begin) if mode == "mean" else 1
      y[s], size[s] = share * x.sum(0), share * np.abs(x).sum(0)
      dx_TW[begin:end] = share * dy[s]
  return y, dx_TW, size


def inputs(name, settings, seed=0, width=WIDTH):
  rng = np.random.default_rng(seed)
  offsets_S1, T = layout(name)
  x_TW = poisoned(rng, offsets_S1, T, width)
  shape = (len(offsets_S1) - 1, *([settings["k"]] if "k" in settings else []), width)
  return x_TW, offsets_S1, np.round(rng.standard_normal(shape) * 16) / 16


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", LENGTHS)
def test_values_and_gradients(name, mode, implementation):
  x_TW, offsets_S1, dy = inputs(name, SETTINGS[mode])
  args = jnp.asarray(x_TW, "float32"), jnp.asarray(offsets_S1), jnp.asarray(dy, "float32")
  y, dx_TW = with_gradient(jagged_pool, implementation, **SETTINGS[mode])(*args)
  want, want_dx_TW, size = oracle(x_TW, offsets_S1, dy, **SETTINGS[mode])
  check_close(y, want, size, "float32")
  check_close(dx_TW, want_dx_TW, 0 * want_dx_TW, "float32")
  _, reference = with_gradient(jagged_pool, "reference", **SETTINGS[mode])(*args)
  np.testing.assert_allclose(dx_TW, reference, rtol=2e-7)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("mode", "dtype"), [*((mode, "bfloat16") for mode in MODES), ("mean", "float16")]
)
def test_half_precision_is_summed_in_float32(mode, dtype, implementation):
  x_TW, offsets_S1, dy = inputs("zipf", SETTINGS[mode])
  args = jnp.asarray(x_TW, dtype), jnp.asarray(offsets_S1), jnp.asarray(dy, dtype)
  y, dx_TW = with_gradient(jagged_pool, implementation, **SETTINGS[mode])(*args)
  assert y.dtype == dx_TW.dtype == dtype
  want, want_dx_TW, size = oracle(x_TW, offsets_S1, dy, **SETTINGS[mode])
  check_close(y, want, size, dtype)
  check_close(dx_TW, want_dx_TW, 0 * want_dx_TW, dtype)


@pytest.mark.parametrize("mode", MODES)
def test_two_tiles_of_columns_and_no_second_pass(mode):
  width, offsets_S1 = 130, offsets(np.array([40, 0, 60], np.int32), 1)
  rng = np.random.default_rng(3)
  x_TW = poisoned(rng, offsets_S1, 110, width)
  dy = rng.standard_normal((3, *([K] if mode == "last" else []), width)).astype(np.float32)
  args = jnp.asarray(x_TW, "float32"), jnp.asarray(offsets_S1), jnp.asarray(dy)
  y, dx_TW = with_gradient(jagged_pool, "triton", **SETTINGS[mode])(*args)
  want, want_dx_TW, size = oracle(x_TW, offsets_S1, dy.astype(np.float64), **SETTINGS[mode])
  check_close(y, want, size, "float32")
  check_close(dx_TW, want_dx_TW, 1e-1 * np.abs(want_dx_TW), "float32")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_ties_and_special_values_of_max(implementation):
  # All equal over several chunks; -inf alone; NaN before and after a larger number.
  offsets_S1, T = layout("zipf")
  x_TW = np.ones((T, WIDTH), np.float32)
  long = int(np.argmax(np.diff(offsets_S1)))
  short = [s for s in range(len(offsets_S1) - 1) if s != long][:2]
  begin, end = offsets_S1[short[0]], offsets_S1[short[0] + 1]
  x_TW[begin:end] = -np.inf
  nan = offsets_S1[short[1]] + 4
  x_TW[nan] = x_TW[nan + 2] = np.nan
  x_TW[nan + 1] = np.inf
  dy_SW = np.arange(1, 1 + (len(offsets_S1) - 1) * WIDTH, dtype=np.float32).reshape(-1, WIDTH)
  y_SW, dx_TW = with_gradient(jagged_pool, implementation, mode="max")(
    jnp.asarray(x_TW), jnp.asarray(offsets_S1), jnp.asarray(dy_SW)
  )
  want_TW = np.zeros((T, WIDTH))
  want_TW[offsets_S1[:-1]] = dy_SW
  want_TW[offsets_S1[short[1]]], want_TW[nan] = 0, dy_SW[short[1]]
  np.testing.assert_array_equal(dx_TW, want_TW)
  assert np.isneginf(y_SW[short[0]]).all() and np.isnan(y_SW[short[1]]).all()
  assert (np.asarray(y_SW[long]) == 1).all()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_the_order_of_segments_does_not_matter(implementation):
  x_TW, offsets_S1, dy_SW = inputs("zipf", SETTINGS["sum"])
  order_S = np.random.default_rng(5).permutation(len(offsets_S1) - 1)
  rows = [np.arange(offsets_S1[s], offsets_S1[s + 1]) for s in order_S]
  mixed_TW = x_TW.copy()
  mixed_TW[offsets_S1[0] : offsets_S1[-1]] = x_TW[np.concatenate(rows)]
  mixed_S1 = offsets(np.diff(offsets_S1)[order_S], offsets_S1[0])
  run = with_gradient(jagged_pool, implementation, mode="sum")
  float32 = lambda x: jnp.asarray(x, "float32")
  y_SW, _ = run(float32(x_TW), jnp.asarray(offsets_S1), float32(dy_SW))
  mixed_SW, _ = run(float32(mixed_TW), jnp.asarray(mixed_S1), float32(dy_SW))
  np.testing.assert_array_equal(mixed_SW, y_SW[order_S])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_no_rows_and_no_columns(mode, implementation):
  for shape in ((0, 4), (3, 0)):
    fn = lambda x: jagged_pool(
      x, jnp.zeros((3,), jnp.int32), implementation=implementation, **SETTINGS[mode]
    )
    y, pullback = jax.vjp(fn, jnp.ones(shape))
    assert y.shape == (2, *([K] if mode == "last" else []), shape[1]) and not y.any()
    assert pullback(y)[0].shape == shape


def test_the_formulas_in_float64():
  x_TW, offsets_S1, _ = inputs("zipf", SETTINGS["mean"])
  with jax.enable_x64():
    for implementation in ("reference", "xla"):
      pool = functools.partial(jagged_pool, mode="mean", implementation=implementation)
      y = jax.jit(pool)(x_TW, offsets_S1)
      want, _, _ = oracle(x_TW, offsets_S1, np.zeros(y.shape), "mean")
      assert y.dtype == jnp.float64
      np.testing.assert_allclose(y, want, rtol=1e-13, atol=1e-15)
    with pytest.raises(Refused, match="not float64"):
      jagged_pool(jnp.asarray(x_TW), jnp.asarray(offsets_S1), mode="sum", implementation="triton")


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"mode": "median"}, "mode must be one of sum, mean, max, last, is 'median'"),
    ({"mode": "last"}, "mode 'last' got k=None"),
    ({"mode": "last", "k": 0}, "mode 'last' got k=0"),
    ({"k": 2}, "mode 'sum' got k=2"),
    ({"x_TW": np.ones((4,), np.float32)}, r"x must be floating of shape \(rows, width\)"),
    ({"x_TW": np.ones((4, 2), np.int32)}, "is int32 of shape"),
    ({"offsets_S1": np.zeros((2,), np.float32)}, "offsets must be int32"),
    ({"implementation": "cuda"}, "'cuda' is not one of"),
  ],
)
def test_bad_arguments(change, sentence):
  args = {"x_TW": np.ones((4, 2), np.float32), "offsets_S1": np.zeros((2,), np.int32)}
  args = args | {"mode": "sum"} | change
  x_TW, offsets_S1 = jnp.asarray(args.pop("x_TW")), jnp.asarray(args.pop("offsets_S1"))
  with pytest.raises(ValueError, match=sentence):
    jagged_pool(x_TW, offsets_S1, **args)


def test_sum_is_that_of_fbgemm():
  pytest.importorskip("fbgemm_gpu", reason="fbgemm-gpu is not installed (extra `benchmark`)")
  import torch

  x_TW, offsets_S1, _ = inputs("empty_among", SETTINGS["sum"])
  x_TW = x_TW[offsets_S1[0] : offsets_S1[-1]].astype(np.float32)
  offsets_S1 = offsets_S1 - offsets_S1[0]
  y_SW = jagged_pool(jnp.asarray(x_TW), jnp.asarray(offsets_S1), mode="sum", implementation="xla")
  ends = torch.tensor(offsets_S1)
  theirs = [torch.ops.fbgemm.segment_sum_csr(1, ends, torch.tensor(x_W)) for x_W in x_TW.T.copy()]
  np.testing.assert_allclose(y_SW, torch.stack(theirs, 1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_pooling_of_everything_is_the_bag_of_torch(mode, implementation):
  """Ties too: the first largest row of a bag gets torch's gradient; an empty bag gives 0."""
  torch = pytest.importorskip("torch", reason="torch is not installed (extra `benchmark`)")
  length_S = np.array([4, 0, 7, 1], np.int32)
  offsets_S1 = offsets(length_S)
  x_TW = np.random.default_rng(2).integers(-2, 3, (12, WIDTH)).astype(np.float32)
  dy_SW = np.random.default_rng(3).standard_normal((4, WIDTH)).astype(np.float32)
  theirs = torch.tensor(x_TW, requires_grad=True)
  y = torch.nn.functional.embedding_bag(
    torch.arange(12), theirs, torch.tensor(offsets_S1[:-1]).long(), mode=mode
  )
  (y * torch.tensor(dy_SW)).sum().backward()
  ours, dx_TW = with_gradient(jagged_pool, implementation, mode=mode)(x_TW, offsets_S1, dy_SW)
  np.testing.assert_allclose(ours, y.detach(), rtol=1e-6)
  np.testing.assert_allclose(dx_TW, theirs.grad, rtol=1e-6)
