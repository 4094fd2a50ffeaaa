"""The sums of runs: every implementation against additions in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_quickly import ON_GPU
from laid_out import IMPLEMENTATIONS, check_bench, compiled

from pallas_kernels import run_tiles, sorted_runs, sum_runs
from pallas_kernels.case import LENGTHS
from pallas_kernels.deviceless import target
from pallas_kernels.dispatch import Refused
from pallas_kernels.sum_runs import bench, shapes, triton

EVERY = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


def batch(length_S, width=5, dtype="float32", seed=0):
  """Summands in 16ths, so that sums are exact in any order, and the id of each, shuffled."""
  rng = np.random.default_rng(seed)
  id_N = rng.permutation(np.repeat(rng.permutation(len(length_S)), length_S)).astype(np.int32)
  x_NW = np.round(rng.standard_normal((len(id_N), width)) * 16) / 16
  return np.asarray(jnp.asarray(x_NW, dtype)), id_N


def oracle(x_NW, id_N, count):
  """Sums in the order of the ids, zeros behind them."""
  sum_UW = np.zeros((count, x_NW.shape[1]))
  unique, run_N = np.unique(id_N, return_inverse=True)
  np.add.at(sum_UW, run_N, x_NW.astype(np.float64))
  return sum_UW, len(unique)


@functools.cache
def summer(implementation, count):
  def fn(x_NW, id_N):
    order_N, segment_N, _ = sorted_runs(id_N, 1 << 20)
    return sum_runs(x_NW, order_N, segment_N, count=count, implementation=implementation)

  return compiled(fn)


@EVERY
@pytest.mark.parametrize(
  ("name", "dtype"), [*((n, "float32") for n in LENGTHS), ("around_block", "bfloat16")]
)
def test_sums(name, dtype, implementation):
  x_NW, id_N = batch(LENGTHS[name], dtype=dtype)
  count = len(id_N) + 3  # Room for runs that do not occur.
  got = summer(implementation, count)(x_NW, id_N)
  assert got.dtype == jnp.float32
  np.testing.assert_array_equal(got, oracle(x_NW, id_N, count)[0])


@pytest.mark.parametrize("width", [1, 33, 64, 160, 300])
def test_widths_of_the_kernel(width):
  """One tile of columns and several; a run of every length from 1 on, so at every place."""
  x_NW, id_N = batch(np.concatenate([np.arange(1, 20), [128, 256, 129, 400]]), width)
  got = summer("triton", len(id_N))(x_NW, id_N)
  np.testing.assert_array_equal(got, oracle(x_NW, id_N, len(id_N))[0])


def test_columns_of_a_program_waste_few():
  assert [triton.columns_of(w) for w in (1, 20, 32, 40, 64, 96, 128, 160, 256)] == [
    1, 32, 32, 64, 64, 32, 128, 32, 128,
  ]  # fmt: skip


def test_the_partial_sums_of_a_long_run_are_summed_in_levels():
  assert run_tiles.level_entries(100_000) == [100_000, 1_564, 26]
  assert run_tiles.level_entries(128) == [128]
  segment_E = np.repeat(np.arange(4), [100, 300, 56, 200]).astype(np.int32)
  # Tiles of 128: run 1 crosses into tiles 1, 2 and 3, and run 3 from 3 into 4 and 5.
  want = [-1, 1, 1, 1, 1, 1, 1, 3, 3, 3, 3, -1]
  assert run_tiles.crossing(jnp.asarray(segment_E)).tolist() == want


@EVERY
def test_fewer_sums_than_runs_and_many_more(implementation):
  x_NW, id_N = batch(LENGTHS["zipf"])
  want_UW, runs = oracle(x_NW, id_N, len(id_N))
  few = summer(implementation, runs - 3)(x_NW, id_N)
  np.testing.assert_array_equal(few, want_UW[: runs - 3])
  many = np.asarray(summer(implementation, 2 * len(id_N) + 7)(x_NW, id_N))
  np.testing.assert_array_equal(many[:runs], want_UW[:runs])
  assert not many[runs:].any()


@EVERY
def test_what_is_not_finite_stays_in_its_run(implementation):
  x_NW, id_N = batch(LENGTHS["zipf"])
  bad = id_N[5]
  x_NW = np.where((id_N == bad)[:, None], np.nan, x_NW)
  got = summer(implementation, len(id_N))(x_NW, id_N)
  np.testing.assert_array_equal(got, oracle(x_NW, id_N, len(id_N))[0])


@EVERY
def test_entries_of_no_sum_are_not_read(implementation):
  x_NW, id_N = batch(LENGTHS["zipf"])
  want_UW, runs = oracle(x_NW, id_N, len(id_N))
  x_NW = np.where((id_N == id_N.max())[:, None], np.nan, x_NW)
  got = summer(implementation, runs - 1)(x_NW, id_N)
  np.testing.assert_array_equal(got, want_UW[: runs - 1])


@pytest.mark.skipif(ON_GPU, reason="on a GPU XLA adds atomically, in any order")
@pytest.mark.parametrize(("size", "different"), [(1, 1), (300, 1), (300, 20), (300, 300)])
def test_the_xla_form_adds_in_the_order_of_the_batch(size, different):
  """To the bit, whatever the magnitudes."""
  rng = np.random.default_rng(size + different)
  id_N = rng.integers(0, different, size).astype(np.int32)
  x_NW = (10.0 ** rng.uniform(-6, 6, (size, 5))).astype(np.float32)
  want_UW = np.zeros((size, 5), np.float32)
  np.add.at(want_UW, np.unique(id_N, return_inverse=True)[1], x_NW)
  np.testing.assert_array_equal(summer("xla", size)(x_NW, id_N), want_UW)


def test_the_kernel_is_as_exact_as_float32():
  rng = np.random.default_rng(0)
  id_N = np.minimum(rng.zipf(1.2, 20_000) - 1, 400).astype(np.int32)
  x_NW = rng.standard_normal((20_000, 3)).astype(np.float32)
  want_UW, _ = oracle(x_NW, id_N, 20_000)
  size_UW, _ = oracle(np.abs(x_NW), id_N, 20_000)
  got = np.asarray(summer("triton", 20_000)(x_NW, id_N), np.float64)
  assert (np.abs(got - want_UW) <= 1e-6 * size_UW).all()


def test_double_precision():
  x_NW, id_N = batch(LENGTHS["around_block"])
  order_N, segment_N, _ = sorted_runs(id_N, len(id_N))
  want_UW, _ = oracle(x_NW, id_N, 50)
  with jax.enable_x64(True):
    got = sum_runs(x_NW, order_N, segment_N, count=50, implementation="triton")
    np.testing.assert_array_equal(got, want_UW)  # float32 where 64 bits are switched on.
    x_NW = jnp.asarray(x_NW, jnp.float64) / 3
    for implementation in ("reference", "xla"):
      got = sum_runs(x_NW, order_N, segment_N, count=50, implementation=implementation)
      want_UW, _ = oracle(np.asarray(x_NW), id_N, 50)
      np.testing.assert_allclose(got, want_UW, rtol=1e-13, atol=1e-13)
    with pytest.raises(Refused, match="the kernels take float32, bfloat16, float16, not float64"):
      sum_runs(x_NW, order_N, segment_N, count=50, implementation="triton")


@pytest.mark.skipif(not target.has_cuda_wheels(), reason="compiling for GPUs needs jax[cuda12]")
def test_compiled_for_a_gpu_its_temporaries_are_partial_sums():
  mesh = jax.sharding.Mesh(target.devices(target.TARGETS["h100"]).reshape(-1), ("device",))
  there = jax.sharding.NamedSharding(mesh, jax.P())
  args = [
    jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there)
    for x in shapes.arguments(shapes.SHAPES["zipf_w160_bf16"])
  ]
  traced = jax.jit(lambda *x: sum_runs(*x, count=65_536)).trace(*args)
  done = traced.lower(lowering_platforms=("cuda",)).compile(compiler_options=target.OPTIONS)
  assert "sum_runs_combine_2" in done.as_text()
  assert done.memory_analysis().temp_size_in_bytes < 65_536 * 160 * 4 / 32


def test_it_has_no_gradient():
  x_NW, id_N = batch(LENGTHS["one_event"])
  order_N, segment_N, _ = sorted_runs(id_N, 100)
  with pytest.raises(TypeError, match="sum_runs has no gradient"):
    jax.grad(lambda x: sum_runs(x, order_N, segment_N, count=3).sum())(jnp.asarray(x_NW))


def test_bad_arguments():
  good = {
    "x_NW": jnp.zeros((6, 4)),
    "order_N": jnp.zeros((6,), jnp.int32),
    "segment_N": jnp.zeros((6,), jnp.int32),
    "count": 6,
  }
  for change, message in (
    ({"x_NW": jnp.zeros((6,))}, r"x must be floating of shape .* is float32 of shape \(6,\)"),
    ({"order_N": jnp.zeros((5,), jnp.int32)}, r"order must be int32 of shape \(6,\).* \(5,\)"),
    ({"segment_N": jnp.zeros((6,))}, r"segment must be int32 of shape \(6,\).* is float32"),
    ({"count": -1}, "count must be 0 or more, is -1"),
    ({"implementation": "cuda"}, "implementation 'cuda' is not one of"),
  ):
    with pytest.raises(ValueError, match=message):
      sum_runs(**(good | change))


@EVERY
def test_nothing_to_sum(implementation):
  none = jnp.zeros((0,), jnp.int32)
  got = sum_runs(jnp.zeros((0, 4)), none, none, count=3, implementation=implementation)
  np.testing.assert_array_equal(got, np.zeros((3, 4)))
  x_NW, order_N = jnp.ones((2, 4)), jnp.arange(2)
  assert sum_runs(x_NW, order_N, order_N, count=0, implementation=implementation).shape == (0, 4)


def test_bench():
  check_bench(bench.rows(quick=True), shapes.SHAPES)
