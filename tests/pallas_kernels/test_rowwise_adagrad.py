"""The row-wise update: every implementation against loops in float64, and FBGEMM's."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from laid_out import IMPLEMENTATIONS, check_bench, compiled

from pallas_kernels.case import LENGTHS
from pallas_kernels.deviceless import target
from pallas_kernels.dispatch import Refused
from pallas_kernels.rowwise_adagrad import bench, shapes
from pallas_kernels.rowwise_adagrad.api import rowwise_adagrad_update
from pallas_kernels.rowwise_adagrad.runs import sorted_runs

LR, EPS = 0.05, 1e-8


def batch(length_S, width=5, dtype="float32", seed=0):
  """A table, v, gradients in 16ths (so that their sums are exact in any order), the row of each.

  Every length is a row's number of gradients; more rows have none, some gradients no row (NaN).
  So many that most sets of lengths share a shape.
  """
  rng = np.random.default_rng(seed)
  rows = 4_103 if len(length_S) > 30 else 37
  row_N = np.repeat(rng.permutation(rows)[: len(length_S)], length_S)
  room = next(n for n in (2_103, 12_397, 16_391) if n > len(row_N) + 3) - len(row_N)
  row_N = np.concatenate([row_N, np.full(room - 3, rows), np.full(3, -1)])
  row_N = rng.permutation(row_N).astype(np.int32)
  table_RW = jnp.asarray(rng.standard_normal((rows, width)), dtype)
  v_R = rng.random(rows).astype(np.float32)
  grad_NW = np.round(rng.standard_normal((len(row_N), width)) * 16).astype(np.float32) / 16
  grad_NW[(row_N < 0) | (row_N >= rows)] = np.nan
  return np.asarray(table_RW), v_R, grad_NW, row_N


def oracle(table_RW, v_R, grad_NW, row_N, l2=0.0, accumulated=1.0):
  table_RW, v_R = table_RW.astype(np.float64), v_R.astype(np.float64)
  for r in range(len(table_RW)):
    of_r = row_N == r
    if of_r.any():
      g_W = grad_NW[of_r].astype(np.float64).sum(0) + l2 * table_RW[r]
      v_R[r] += (g_W**2).mean()
      table_RW[r] -= LR / (np.sqrt(v_R[r] / accumulated) + EPS) * g_W
  return table_RW, v_R


def step(table_RW, v_R, grad_NW, row_N, key=None, **settings):
  return stepper(**settings)(table_RW, v_R, grad_NW, row_N, key)


@functools.cache
def stepper(implementation, lr=LR, **settings):
  def fn(table_RW, v_R, grad_NW, row_N, key):
    runs = sorted_runs(row_N, len(table_RW))
    return rowwise_adagrad_update(
      table_RW, v_R, grad_NW, *runs, lr=lr, key=key, implementation=implementation, **settings
    )

  return compiled(fn)


def check(arrays, got, want):
  table_RW, v_R, _, row_N = arrays
  new_table_RW, new_v_R = map(np.asarray, got)
  assert new_table_RW.dtype == table_RW.dtype
  exact = table_RW.dtype == np.float32
  scale = np.abs(want[0]) + np.abs(table_RW.astype(np.float64))
  error = np.abs(new_table_RW.astype(np.float64) - want[0])
  assert (error <= (2e-6 if exact else 2.0**-8) * scale).all()
  np.testing.assert_allclose(new_v_R, want[1], rtol=2e-6)
  untouched = ~np.isin(np.arange(len(v_R)), row_N)
  assert untouched.any()
  assert new_table_RW[untouched].tobytes() == table_RW[untouched].tobytes()
  assert new_v_R[untouched].tobytes() == v_R[untouched].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
  ("name", "dtype"), [*((n, "float32") for n in LENGTHS), ("around_block", "bfloat16")]
)
def test_step(name, dtype, implementation):
  arrays = batch(LENGTHS[name], dtype=dtype)
  check(arrays, step(*arrays, implementation=implementation), oracle(*arrays))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_decay_and_accumulated(implementation):
  arrays, settings = batch(LENGTHS["around_block"]), {"l2": 0.3, "accumulated": 4.0}
  got = step(*arrays, implementation=implementation, **settings)
  check(arrays, got, oracle(*arrays, **settings))


@pytest.mark.parametrize("width", [1, 64, 200])
def test_widths_of_the_kernel(width):
  """Tiles of other blocks; a run of every length from 1 on, so at every place of a tile."""
  arrays = batch(np.concatenate([np.arange(1, 20), [128, 256, 129, 400]]), width)
  check(arrays, step(*arrays, implementation="triton"), oracle(*arrays))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_same_bits_in_every_run_and_for_every_order_of_rows(implementation):
  table_RW, v_R, grad_NW, row_N = batch(LENGTHS["zipf"])
  first = step(table_RW, v_R, grad_NW, row_N, implementation=implementation)
  again = step(table_RW, v_R, grad_NW, row_N, implementation=implementation)
  to_R = np.random.default_rng(5).permutation(len(v_R)).astype(np.int32)
  back_R = np.argsort(to_R)
  held_N = (row_N >= 0) & (row_N < len(v_R))
  moved_N = np.where(held_N, to_R[np.where(held_N, row_N, 0)], row_N)
  moved = step(table_RW[back_R], v_R[back_R], grad_NW, moved_N, implementation=implementation)
  for a, b, c in zip(first, again, moved):
    assert np.asarray(a).tobytes() == np.asarray(b).tobytes()
    assert np.asarray(a).tobytes() == np.asarray(c)[to_R].tobytes()


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_not_finite_stays_in_its_row(implementation):
  table_RW, v_R, grad_NW, row_N = batch(LENGTHS["zipf"])
  row = row_N[(row_N >= 0) & (row_N < len(v_R))][0]
  bad_NW = np.where((row_N == row)[:, None], np.nan, grad_NW)
  new_RW, new_v_R = step(table_RW, v_R, bad_NW, row_N, implementation=implementation)
  want_RW, want_v_R = oracle(table_RW, v_R, bad_NW, row_N)
  assert np.isnan(new_v_R).sum() == 1
  np.testing.assert_allclose(new_RW, want_RW, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(new_v_R, want_v_R, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("capacity", [40, 3_000])
def test_unique_of_another_length(capacity, implementation):
  arrays = _, v_R, _, row_N = batch(LENGTHS["zipf"])
  order_N, segment_N, unique_N = sorted_runs(jnp.asarray(row_N), len(v_R))
  unique_U = jnp.full((capacity,), len(v_R), jnp.int32)
  kept = min(capacity, len(unique_N))
  unique_U = unique_U.at[:kept].set(unique_N[:kept])
  if capacity > kept:  # A row beyond the last run: no gradient names it.
    unique_U = unique_U.at[-1].set(np.setdiff1d(np.arange(len(v_R)), row_N)[0])
  update = functools.partial(rowwise_adagrad_update, lr=LR, l2=0.3, implementation=implementation)
  runs = order_N, segment_N, unique_U
  check(arrays, compiled(update)(*arrays[:3], *runs), oracle(*arrays, l2=0.3))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_stochastic_rounding_is_unbiased(implementation):
  rows, width = 256, 64
  table_RW = jnp.ones((rows, width), jnp.bfloat16)
  # 1 + 0.3 of a step of bfloat16 at 1, whose distance there is 2^-7: g = -1, v = 1.
  lr = 0.3 * 2.0**-7
  arrays = table_RW, jnp.zeros((rows,)), -jnp.ones((rows, width)), np.arange(rows, dtype=np.int32)
  run = lambda key: step(*arrays, key, implementation=implementation, lr=lr, eps=0.0)[0]
  new_RW = np.asarray(run(jax.random.key(1)), np.float64)
  assert set(np.unique(new_RW)) == {1.0, 1 + 2.0**-7}
  deviation = 2.0**-7 * np.sqrt(0.3 * 0.7 / new_RW.size)
  assert abs(new_RW.mean() - (1 + lr)) < 5 * deviation
  assert (new_RW == np.asarray(run(jax.random.key(1)), np.float64)).all()
  other_RW = np.asarray(run(jax.random.key(2)), np.float64)
  assert 0.3 < (new_RW != other_RW).mean() < 0.54  # 2 0.3 0.7 = 0.42.


def test_double_precision():
  arrays = batch(LENGTHS["zipf"])
  with jax.enable_x64(True):
    table_RW, v_R, grad_NW = (jnp.asarray(a, jnp.float64) for a in arrays[:3])
    for implementation in ("reference", "xla"):
      got = step(table_RW, v_R, grad_NW, arrays[3], implementation=implementation)
      for new, want in zip(got, oracle(*arrays)):
        np.testing.assert_allclose(new, want, rtol=1e-13, atol=1e-15)
    with pytest.raises(Refused, match="tables of float32 and bfloat16, and this one is float64"):
      step(table_RW, v_R, grad_NW, arrays[3], implementation="triton")


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_fbgemm(implementation):
  reason = "the oracle is FBGEMM for CPUs: pip install fbgemm-gpu-cpu"
  torch = pytest.importorskip("torch", reason=reason)
  pytest.importorskip("fbgemm_gpu", reason=reason)
  from fbgemm_gpu.split_embedding_configs import EmbOptimType
  from fbgemm_gpu.split_table_batched_embeddings_ops_common import EmbeddingLocation
  from fbgemm_gpu.split_table_batched_embeddings_ops_training import (
    ComputeDevice,
    SplitTableBatchedEmbeddingBagsCodegen,
  )

  rng = np.random.default_rng(0)
  table_RW = rng.standard_normal((50, 16)).astype(np.float32)
  theirs = SplitTableBatchedEmbeddingBagsCodegen(
    [(*table_RW.shape, EmbeddingLocation.HOST, ComputeDevice.CPU)],
    optimizer=EmbOptimType.EXACT_ROWWISE_ADAGRAD,
    learning_rate=LR,
    eps=EPS,
  )
  theirs.split_embedding_weights()[0].copy_(torch.from_numpy(table_RW))
  state = jnp.asarray(table_RW), jnp.zeros((50,))
  for _ in range(3):
    row_N = np.where(rng.random(600) < 0.3, 7, rng.integers(0, 45, 600)).astype(np.int32)
    grad_NW = rng.standard_normal((600, 16)).astype(np.float32)
    rows = theirs(torch.from_numpy(row_N.astype(np.int64)), torch.arange(601))
    rows.backward(torch.from_numpy(grad_NW))
    state = step(*state, grad_NW, row_N, implementation=implementation)
  their_RW = theirs.split_embedding_weights()[0].numpy(force=True)
  np.testing.assert_allclose(state[0], their_RW, rtol=1e-5, atol=1e-5)
  their_v_R = theirs.split_optimizer_states()[0][0].numpy(force=True)
  np.testing.assert_allclose(state[1], their_v_R, rtol=1e-5)


@pytest.mark.skipif(not target.has_cuda_wheels(), reason="compiling for GPUs needs jax[cuda12]")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_compiled_for_a_gpu_the_table_is_updated_in_place(dtype):
  """Donated, nothing is as long as the table; what is needed beside it follows N W / 64."""
  mesh = jax.sharding.Mesh(target.devices(target.TARGETS["a100"]).reshape(-1), ("device",))
  there = jax.sharding.NamedSharding(mesh, jax.P())
  fn = lambda *arrays: rowwise_adagrad_update(*arrays[:-1], lr=arrays[-1])
  temporaries = []
  for rows in (1_000_000, 2_000_000):
    shape = shapes.Shape(rows, 64, 20_000, dtype=dtype)
    args = [jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there) for x in shapes.arguments(shape)]
    traced = jax.jit(fn, donate_argnums=(0, 1)).trace(*args)
    compiled = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=target.OPTIONS)
    memory = compiled.memory_analysis()
    assert "rowwise_adagrad_combine_2" in compiled.as_text()
    assert memory.alias_size_in_bytes >= rows * (64 * np.dtype(jnp.dtype(dtype)).itemsize + 4)
    temporaries.append(memory.temp_size_in_bytes)
  assert temporaries[0] == temporaries[1] < 20_000 * 64 * 4 / 32


def test_the_xla_fallback_updates_in_place():
  shape = shapes.Shape(1_000_000, 64, 1_000)
  fn = lambda *arrays: rowwise_adagrad_update(*arrays[:-1], lr=arrays[-1], l2=0.1)
  compiled = jax.jit(fn, donate_argnums=(0, 1)).lower(*shapes.arguments(shape)).compile()
  assert compiled.memory_analysis().temp_size_in_bytes < 5 * 4 * 64 * 1_000


def test_it_has_no_gradient():
  arrays = batch(LENGTHS["one_event"])
  with pytest.raises(TypeError, match="rowwise_adagrad_update has no gradient"):
    jax.grad(lambda g: step(*arrays[:2], g, arrays[3], implementation="xla")[0].sum())(arrays[2])


def test_bad_arguments():
  index_N = jnp.zeros((6,), jnp.int32)
  good = {
    "table_RW": jnp.zeros((9, 4)),
    "v_R": jnp.zeros((9,)),
    "grad_NW": jnp.zeros((6, 4)),
    "order_N": index_N,
    "segment_N": index_N,
    "unique_U": index_N,
    "lr": 0.1,
  }
  for change, message in (
    ({"table_RW": jnp.zeros((9,))}, r"table must be floating of shape .* is float32 .*\(9,\)"),
    ({"v_R": jnp.zeros((8,))}, r"v must be float32 of shape \(9,\).* \(8,\)"),
    ({"v_R": jnp.zeros((9,), jnp.bfloat16)}, "v must be float32 .* is bfloat16"),
    ({"grad_NW": jnp.zeros((6, 5))}, r"grad must be floating of shape \(6, 4\).* \(6, 5\)"),
    ({"segment_N": jnp.zeros((5,), jnp.int32)}, r"segment must be int32 of shape \(6,\).* \(5,\)"),
    ({"unique_U": jnp.zeros((6,))}, r"unique must be int32 of shape \(6,\), is float32"),
    ({"unique_U": jnp.int32(3)}, r"unique must be int32 of shape \(1,\), is int32 of shape \(\)"),
    ({"lr": jnp.zeros((2,))}, r"lr must be a scalar, is of shape \(2,\)"),
    ({"key": jax.random.key(0)}, "key rounds bfloat16 tables, and this one is float32"),
    ({"implementation": "cuda"}, "implementation 'cuda' is not one of"),
  ):
    with pytest.raises(ValueError, match=message):
      rowwise_adagrad_update(**(good | change))
  wide = {"table_RW": jnp.zeros((9, 2_000)), "grad_NW": jnp.zeros((6, 2_000))}
  with pytest.raises(Refused, match=r"rows of at most 1024, these have 2000"):
    rowwise_adagrad_update(**(good | wide), implementation="triton")


def test_nothing_to_do():
  table_RW, v_R = jnp.ones((9, 4)), jnp.ones((9,))
  none = jnp.zeros((0,), jnp.int32)
  for implementation in IMPLEMENTATIONS:
    new_RW, new_v_R = rowwise_adagrad_update(
      table_RW, v_R, jnp.zeros((0, 4)), none, none, none, lr=0.1, implementation=implementation
    )
    assert (new_RW == 1).all()
    assert (new_v_R == 1).all()
  order_N, _, _ = sorted_runs(none, 9)
  assert len(order_N) == 0


def test_bench():
  check_bench(bench.rows(quick=True), shapes.SHAPES)
