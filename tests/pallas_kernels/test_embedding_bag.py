"""Bags: every implementation against loops in float64."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import IMPLEMENTATIONS, check_close, compiled, layout

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.dispatch import Refused
from pallas_kernels.embedding_bag.api import MODES, embedding_bag, embedding_bag_gradients

R, WIDTH = 23, 5


def inputs(name, seed=0):
  """table, ids (some missing, wild outside the bags), offsets, weights (NaN where missing), dy."""
  rng = np.random.default_rng(seed)
  offsets_S1, N = layout(name)
  table_RW = np.round(rng.standard_normal((R, WIDTH)) * 16) / 16
  table_RW[R - 1] = np.nan  # No id names it.
  id_N = rng.integers(0, R - 1, N).astype(np.int32)
  wild_N = rng.choice(np.array([-(2**31), -1, R, 2**31 - 1], np.int32), N)
  outside_N = (np.arange(N) < offsets_S1[0]) | (np.arange(N) >= offsets_S1[-1])
  missing_N = rng.random(N) < 0.2
  id_N[missing_N] = wild_N[missing_N]
  weight_N = np.round(rng.standard_normal(N) * 16) / 16
  weight_N[missing_N | outside_N] = np.nan
  dy_SW = np.round(rng.standard_normal((len(offsets_S1) - 1, WIDTH)) * 16) / 16
  return table_RW, id_N, offsets_S1, weight_N, dy_SW


def oracle(table_RW, id_N, offsets_S1, weight_N, dy_SW, mode):
  """y, grad_row, grad_weight, and the sum of magnitudes behind y and grad_weight, in float64."""
  y_SW, size_SW = np.zeros(dy_SW.shape), np.zeros(dy_SW.shape)
  grad_row_NW = np.zeros((len(id_N), dy_SW.shape[1]))
  grad_weight_N, size_N = np.zeros(len(id_N)), np.zeros(len(id_N))
  for s, (begin, end) in enumerate(itertools.pairwise(offsets_S1)):
    present = [n for n in range(begin, end) if 0 <= id_N[n] < len(table_RW)]
    scale = 1 / len(present) if mode == "mean" and present else 1
    for n in present:
      row_W, weight = table_RW[id_N[n]], 1 if weight_N is None else weight_N[n]
      y_SW[s] += scale * weight * row_W
      size_SW[s] += np.abs(scale * weight * row_W)
      grad_row_NW[n] = scale * weight * dy_SW[s]
      grad_weight_N[n] = scale * row_W @ dy_SW[s]
      size_N[n] = scale * np.abs(row_W) @ np.abs(dy_SW[s])
  return y_SW, grad_row_NW, grad_weight_N, size_SW, size_N


@functools.cache
def run(implementation, mode):
  """(y, grad_row, grad_weight, grad_weight by JAX), compiled once a shape."""

  def everything(table_RW, id_N, offsets_S1, weight_N, dy_SW):
    static = {"mode": mode, "implementation": implementation}
    bag = lambda weight_N: embedding_bag(table_RW, id_N, offsets_S1, weight_N, **static)
    args = table_RW, id_N, offsets_S1, weight_N
    grads = embedding_bag_gradients(dy_SW, *args, **static)
    if weight_N is None:
      return bag(None), *grads, None
    y_SW, pullback = jax.vjp(bag, weight_N)
    return y_SW, *grads, pullback(dy_SW)[0]

  return compiled(everything)


def check(got, want, dtype, weighted):
  y_SW, grad_row_NW, grad_weight_N, by_jax_N = got
  want_SW, want_NW, want_N, size_SW, size_N = want
  assert y_SW.dtype == grad_row_NW.dtype == dtype
  check_close(y_SW, want_SW, size_SW, dtype)
  check_close(grad_row_NW, want_NW, 0.1 * np.abs(want_NW), dtype)
  if weighted:
    check_close(grad_weight_N, want_N, size_N, "float32")
    check_close(by_jax_N, want_N, size_N, "float32")
  else:
    assert grad_weight_N is None


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(("mode", "weighted"), [("sum", False), ("mean", True)])
@pytest.mark.parametrize("name", LENGTHS)
def test_values_and_gradients(name, mode, weighted, implementation):
  table_RW, id_N, offsets_S1, weight_N, dy_SW = inputs(name)
  weight_N = weight_N if weighted else None
  want = oracle(table_RW, id_N, offsets_S1, weight_N, dy_SW, mode)
  weight_N = None if weight_N is None else jnp.asarray(weight_N, "float32")
  args = jnp.asarray(table_RW, "float32"), id_N, offsets_S1, weight_N, jnp.asarray(dy_SW, "f")
  got = run(implementation, mode)(*args)
  check(got, want, "float32", weighted)
  for ours, reference in zip(got[1:], run("reference", mode)(*args)[1:]):
    if ours is not None:
      np.testing.assert_allclose(ours, reference, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("mode", "weighted", "dtype"),
  [("sum", True, "bfloat16"), ("mean", False, "float16"), ("mean", True, "bfloat16")],
)
def test_half_precision_is_summed_in_float32(mode, weighted, dtype, implementation):
  table_RW, id_N, offsets_S1, weight_N, dy_SW = inputs("zipf")
  weight_N = weight_N if weighted else None
  want = oracle(table_RW, id_N, offsets_S1, weight_N, dy_SW, mode)
  weight_N = None if weight_N is None else jnp.asarray(weight_N, "float32")
  args = jnp.asarray(table_RW, dtype), id_N, offsets_S1, weight_N, jnp.asarray(dy_SW, dtype)
  check(run(implementation, mode)(*args), want, dtype, weighted)


def test_two_tiles_of_columns():
  rng = np.random.default_rng(0)
  offsets_S1 = offsets(np.array([40, 0, 50], np.int32), 1)
  table_RW = rng.standard_normal((R, 130)).astype(np.float32)
  id_N = rng.integers(-1, R + 1, 99).astype(np.int32)
  weight_N, dy_SW = rng.random(99, "f"), rng.standard_normal((3, 130)).astype("f")
  args = table_RW, id_N, offsets_S1, weight_N, dy_SW
  want = oracle(*(np.asarray(a, np.float64) if a.dtype == "f" else a for a in args), "mean")
  check(run("triton", "mean")(*args), want, "float32", weighted=True)


@pytest.mark.parametrize("implementation", [None, "xla", "triton"])
def test_no_dense_gradient_of_the_table(implementation):
  table_RW, id_N, offsets_S1, _, _ = inputs("empty_among")
  loss = lambda table_RW, implementation: embedding_bag(
    table_RW, id_N, offsets_S1, mode="sum", implementation=implementation
  ).sum()
  with pytest.raises(ValueError, match=r"would be dense, of its shape \(23, 5\).*_gradients"):
    jax.grad(loss)(jnp.asarray(table_RW), implementation)
  assert jax.grad(loss)(jnp.asarray(table_RW), "reference").shape == table_RW.shape


def test_rows_of_the_gradient_add_up_to_the_dense_one():
  table_RW, id_N, offsets_S1, weight_N, dy_SW = inputs("zipf")
  args = jnp.asarray(table_RW, "f"), id_N, offsets_S1, jnp.asarray(weight_N, "f")
  bag = lambda table: embedding_bag(table, *args[1:], mode="mean", implementation="reference")
  dense_RW = jax.jit(lambda table, dy: jax.vjp(bag, table)[1](dy)[0])(
    args[0], jnp.asarray(dy_SW, "f")
  )
  grad_NW = run("xla", "mean")(*args, jnp.asarray(dy_SW, "f"))[1]
  summed_RW = np.zeros(table_RW.shape)
  present_N = (id_N >= 0) & (id_N < R)
  np.add.at(summed_RW, id_N[present_N], np.asarray(grad_NW)[present_N])
  np.testing.assert_allclose(summed_RW, dense_RW, rtol=1e-4, atol=1e-5)


def _bag_and_gradients(dy_SW, *args, **static):
  return embedding_bag(*args, **static), *embedding_bag_gradients(dy_SW, *args, **static)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_nothing_to_look_up(implementation):
  offsets_S1 = jnp.zeros((3,), jnp.int32)
  for rows, N, width in ((4, 0, 3), (4, 2, 0)):
    args = jnp.ones((rows, width)), jnp.zeros((N,), jnp.int32), offsets_S1, jnp.ones((N,))
    static = {"mode": "mean", "implementation": implementation}
    fn = compiled(functools.partial(_bag_and_gradients, **static))
    y_SW, grad_NW, grad_N = fn(jnp.ones((2, width)), *args)
    assert y_SW.shape == (2, width) and not y_SW.any()
    assert grad_NW.shape == (N, width) and grad_N.shape == (N,)


def test_the_formula_in_float64():
  table_RW, id_N, offsets_S1, weight_N, dy_SW = inputs("zipf")
  want = oracle(table_RW, id_N, offsets_S1, weight_N, dy_SW, "mean")
  with jax.enable_x64():
    args = [jnp.asarray(a) for a in (table_RW, id_N, offsets_S1, weight_N)]
    for implementation in ("reference", "xla"):
      static = {"mode": "mean", "implementation": implementation}
      got = jax.jit(functools.partial(_bag_and_gradients, **static))(dy_SW, *args)
      for ours, exact in zip(got, want):
        np.testing.assert_allclose(ours, exact, rtol=1e-12, atol=1e-14)
    with pytest.raises(Refused, match="not float64"):
      embedding_bag(*args, mode="sum", implementation="triton")


@pytest.mark.parametrize(
  ("change", "sentence"),
  [
    ({"mode": "max"}, "mode must be one of sum, mean, is 'max'"),
    ({"table_RW": jnp.ones((4,))}, r"table must be floating of shape \(rows, width\)"),
    ({"id_N": jnp.zeros((5,))}, "ids must be int32 of shape"),
    ({"offsets_S1": jnp.zeros((3,))}, "offsets must be int32"),
    ({"weight_N": jnp.ones((4,))}, r"weights must be floating of the ids' shape \(5,\)"),
    ({"implementation": "a"}, "'a' is not one of"),
  ],
)
def test_bad_arguments(change, sentence):
  int32 = lambda n: jnp.zeros((n,), jnp.int32)
  args = {"table_RW": jnp.ones((4, 2)), "id_N": int32(5), "offsets_S1": int32(3), "mode": "sum"}
  with pytest.raises(ValueError, match=sentence):
    embedding_bag(**(args | change))


def test_bad_cotangent():
  int32 = lambda n: jnp.zeros((n,), jnp.int32)
  with pytest.raises(ValueError, match=r"dy must be of y's shape \(2, 2\), is of \(3, 2\)"):
    embedding_bag_gradients(jnp.ones((3, 2)), jnp.ones((4, 2)), int32(5), int32(3), mode="sum")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mode", MODES)
def test_bags_are_those_of_torch(mode, implementation):
  """Torch knows weights for sums alone, and no missing ids."""
  torch = pytest.importorskip("torch", reason="torch is not installed (extra `benchmark`)")
  rng = np.random.default_rng(0)
  table_RW, id_N, offsets_S1, weight_N, dy_SW = inputs("zipf")
  id_N = rng.integers(0, R - 1, len(id_N)).astype(np.int32)
  last = offsets_S1[-1]
  weight_N = rng.random(len(id_N), "f") if mode == "sum" else None
  table = torch.tensor(table_RW, dtype=torch.float32, requires_grad=True)
  weights = None if weight_N is None else torch.tensor(weight_N[3:last], requires_grad=True)
  y = torch.nn.functional.embedding_bag(
    torch.tensor(id_N[3:last]),
    table,
    torch.tensor(offsets_S1[:-1] - 3),
    mode=mode,
    per_sample_weights=weights,
  )
  (y * torch.tensor(dy_SW)).sum().backward()
  args = jnp.asarray(table_RW, "f"), id_N, offsets_S1, weight_N, jnp.asarray(dy_SW, "f")
  y_SW, grad_NW, grad_N, _ = run(implementation, mode)(*args)
  np.testing.assert_allclose(y_SW, y.detach(), rtol=1e-4, atol=1e-5)
  grad_RW = np.zeros(table_RW.shape)
  np.add.at(grad_RW, id_N, grad_NW)
  np.testing.assert_allclose(grad_RW, table.grad, rtol=1e-4, atol=1e-4)
  if weights is not None:
    np.testing.assert_allclose(grad_N[3:last], weights.grad, rtol=1e-4, atol=1e-5)
