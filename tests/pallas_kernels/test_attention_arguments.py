"""jagged_attention: which implementation runs, what it takes, and what it refuses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import Buckets, RelativeBias, embedding_bag, jagged_attention, jagged_pool
from pallas_kernels.jagged_attention import bench, shapes


def test_a_gpu_gets_the_kernel_and_a_cpu_xla():
  q = np.ones((9, 2, 16), np.float32)
  fn = jax.jit(jagged_attention).trace(q, q, q, np.array([0, 9], np.int32))
  assert "__gpu$xla.gpu.triton" in fn.lower(lowering_platforms=("cuda",)).as_text()
  assert "triton" not in fn.lower(lowering_platforms=("cpu",)).as_text()
  wide = np.zeros((4, 1, 320), np.float32)
  refused = jax.jit(jagged_attention).trace(wide, wide, wide, np.array([0, 4], np.int32))
  assert "triton" not in refused.lower(lowering_platforms=("cuda",)).as_text()


def test_memory_follows_events_and_not_pairs():
  """16,384 queries and keys: their scores alone would be a gigabyte."""
  shape = jax.ShapeDtypeStruct((16_384, 1, 32), jnp.float32)
  offset_S1 = jax.ShapeDtypeStruct((5,), jnp.int32)
  loss = lambda q, k, v, o: jagged_attention(q, k, v, o, implementation="xla").sum()
  done = jax.jit(jax.grad(loss, (0, 1, 2))).lower(shape, shape, shape, offset_S1).compile()
  assert done.memory_analysis().temp_size_in_bytes < 64 * 2**20


def bias(columns, bits=1, signed=False):
  x = np.arange(9, dtype=np.int32)
  return RelativeBias(np.ones((2, columns), np.float32), x, x, Buckets(bits, signed))


q_gain = np.ones(16, np.float32)
BAD = {
  "shapes": (lambda q, o: (q[:, 0], q, q, o), {}, r"q must be \(queries, heads, width\)"),
  "heads": (lambda q, o: (q, q[:, :1], q[:, :1], o), {}, r"width, at least 1, have \(2, 16\)"),
  "dtypes": (lambda q, o: (q, q.astype(np.float16), q, o), {}, "one float dtype"),
  "integers": (lambda q, o: (q.astype(int),) * 3 + (o,), {}, "of 16 bits or more, have int32"),
  "offsets": (lambda q, o: (q, q, q, o.astype(float)), {}, "q_offsets must be int32"),
  "segments": (lambda q, o: (q, q, q, o, o[:-1]), {}, "3 segments and keys 2; give kv_segment"),
  "activation": (lambda q, o: (q, q, q, o), {"activation": "relu"}, "'relu' is not one of softmax"),
  "norm": (lambda q, o: (q, q, q, o), {"norm": 2.0}, "softmax sums to 1, so norm=2.0"),
  "norm_0": (lambda q, o: (q, q, q, o), {"norm": 0, "activation": "silu"}, "positive number"),
  "window": (lambda q, o: (q, q, q, o), {"window": 0}, "window must be at least 1 position, is 0"),
  "rope": (lambda q, o: (q[..., :15],) * 3 + (o,), {"rope": 10.0}, "base 10.0 and width 15"),
  "fewer_keys": (lambda q, o: (q, q[:5], q[:5], o), {}, "queries as keys, here .9,. and .5,."),
  "window_type": (lambda q, o: (q, q, q, o), {"window": 2.5}, "at least 1 position, is 2.5"),
  "qk_norm": (lambda q, o: (q, q, q, o), {"qk_norm": (q_gain,)}, "gains of queries and of keys"),
  "biases": (lambda q, o: (q, q, q, o), {"biases": bias(8)}, "a sequence of RelativeBias"),
  "bits": (lambda q, o: (q, q, q, o), {"biases": [bias(8, bits=9)]}, "must lie in 0 to 8, is 9"),
  "odd": (lambda q, o: (q, q, q, o), {"biases": [bias(1, signed=True)]}, "where signed; it has 1"),
  "unknown": (lambda q, o: (q, q, q, o), {"implementation": "cuda"}, "'cuda' is not one of"),
  "refused": (
    lambda q, o: (np.repeat(q, 20, 2),) * 3 + (o,),
    {"implementation": "triton"},
    "must lie in 1 to 256, is 320",
  ),
}  # fmt: skip


@pytest.mark.parametrize("implementation", ("reference", "xla", "triton"))
def test_a_window_wider_than_all_keys_hides_none(implementation):
  q, offset_S1 = (
    np.random.default_rng(0).standard_normal((9, 2, 16), np.float32),
    np.array([0, 4, 9]),
  )
  of = lambda **options: jagged_attention(
    q, q, q, offset_S1.astype(np.int32), implementation=implementation, **options
  )
  for wide in ({"window": 2**31 - 1}, {"block": 2**31 - 1}, {"window": 2**40}):
    np.testing.assert_array_equal(of(**wide), of())


@pytest.mark.parametrize("implementation", (None, "xla", "triton"))
def test_offsets_beyond_the_arrays_are_cut_there(implementation):
  q = np.random.default_rng(0).standard_normal((9, 2, 16), np.float32)
  of = lambda *o: jagged_attention(q, q, q, np.array(o, np.int32), implementation=implementation)
  np.testing.assert_array_equal(of(0, 4, 13), of(0, 4, 9))


@pytest.mark.parametrize("implementation", ("xla", "triton"))
def test_64_bit_integers_may_be_switched_on(implementation):
  rng = np.random.default_rng(0)
  q, offset_S1 = rng.standard_normal((9, 2, 16)).astype(np.float32), np.array([0, 4, 9], np.int32)
  attend = lambda q: jagged_attention(q, q, q, offset_S1, implementation=implementation).sum()
  pool = lambda q: jagged_pool(q[:, 0], offset_S1, mode="mean", implementation=implementation).sum()
  for fn in (attend, pool):
    expected = jax.jit(jax.grad(fn))(q)
    with jax.enable_x64(True):
      np.testing.assert_allclose(jax.jit(jax.grad(fn))(q), expected, atol=1e-6)


def test_distances_at_the_ends_of_int32():
  distance = jnp.array([-(2**31), 2**31 - 1, -1, 0], jnp.int32)
  assert [*map(int, Buckets(3, True)(distance, 40))] == [39, 19, 21, 0]


def test_share_of_pairs_that_are_seen_among_those_visited():
  """A causal segment of 256 events costs tiles of 64 x 64 on its diagonal: 80 %, and no more."""
  least = {
    "from_256_to_2048": 0.9,
    "all_256_softmax": 0.9,
    "zipf_mean100": 0.6,
    "all_256_hstu": 0.8,
  }
  for shape, (name, options) in shapes.TIMED.items():
    for start, share in least.items():
      if shape.startswith(start):
        assert bench.work(shapes.lengths(name, False), options)["useful_tile_share"] >= share, shape


def test_the_recipe_of_embedding_bag_trains():
  from pallas_kernels import embedding_bag_gradients, rowwise_adagrad_update, sorted_runs

  table_RW, v_R = jnp.ones((7, 4)), jnp.zeros((7,))
  id_N, offsets_S1 = jnp.array([5, 2, 5], jnp.int32), jnp.array([0, 2, 3], jnp.int32)
  y_SW = embedding_bag(table_RW, id_N, offsets_S1, mode="sum")
  dy_SW = jax.grad(lambda y: (y**2).sum() / 2)(y_SW)
  grad_NW, _ = embedding_bag_gradients(dy_SW, table_RW, id_N, offsets_S1, mode="sum")
  runs = sorted_runs(id_N, len(table_RW))
  table_RW, v_R = rowwise_adagrad_update(table_RW, v_R, grad_NW, *runs, lr=0.1)
  np.testing.assert_allclose(v_R, [0, 0, 4, 0, 0, 9, 0])
  np.testing.assert_allclose(table_RW[:, 0], [1, 1, 0.9, 1, 1, 0.9, 1], atol=1e-6)


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments_get_one_sentence(name):
  make, options, message = BAD[name]
  args = make(np.zeros((9, 2, 16), np.float32), np.array([0, 2, 5, 9], np.int32))
  with pytest.raises(ValueError, match=message) as caught:
    jagged_attention(*args, **options)
  assert "\n" not in str(caught.value)
