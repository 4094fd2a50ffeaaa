"""Forms, arrays and programs that the tests of jagged_attention share."""

import functools

import attention_oracle as oracle
import jax
import jax.numpy as jnp
import numpy as np
from compiled_quickly import ON_GPU

from pallas_kernels.case import LENGTHS, offsets
from pallas_kernels.jagged_attention.api import jagged_attention
from pallas_kernels.jagged_attention.bias import Buckets, RelativeBias

# Most of the time goes into compiling.
QUICKLY = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
if ON_GPU:
  QUICKLY = {}
IMPLEMENTATIONS = ("reference", "xla", "triton")
# These share one program a form: the last segments are empty.
TOGETHER = ("all_empty", "one_event", "empty_among", "around_block", "zipf")
SEGMENTS, ROOM = 24, 2_100
BEFORE = 3  # Rows before the first segment.

# Options, and the (bits, signed, buckets) of every bias; coordinates are made for each.
FORMS = {
  "softmax": ({}, ()),
  "hstu": ({"activation": "silu", "causal": True, "norm": 512.0}, ((3, False, 40), (1, False, 16))),
  "gelu_window": ({"activation": "gelu", "window": 40, "norm": "length", "scale": 0.3}, ()),
  "relu2_blocks": ({"activation": "relu2", "block": 64, "causal": True, "norm": 64.0}, ()),
  "softmax_signed": ({"causal": False, "window": 100}, ((2, True, 24),)),
}
# Of the greatest entry; kernels on a GPU multiply float32 as TF32.
TOLERANCE = {"float32": 3e-3 if ON_GPU else 1e-5, "bfloat16": 2e-2, "float16": 3e-3}


def jagged(length_S, heads=2, width=16, dtype="float32", room=0, kv_length_S=None, seed=0):
  """(q, k, v, g, q_offsets, kv_offsets), with NaN in all rows outside the segments."""
  rng = np.random.default_rng(seed)
  made = []
  for lengths in (length_S, length_S if kv_length_S is None else kv_length_S):
    offset_S1 = offsets(lengths, BEFORE)
    made.append((offset_S1, max(room, offset_S1[-1] + 5)))
  (q_offsets, T), (kv_offsets, E) = made
  arrays = []
  for rows, offset_S1 in ((T, q_offsets), (E, kv_offsets), (E, kv_offsets), (T, q_offsets)):
    x = rng.standard_normal((rows, heads, width))
    x[:BEFORE] = x[offset_S1[-1] :] = np.nan
    arrays.append(np.asarray(jnp.asarray(x, dtype)))
  return *arrays, q_offsets, kv_offsets


def padded(length_S):
  return np.pad(length_S, (0, SEGMENTS - len(length_S)))


def make_biases(specs, T, E, heads, seed=1):
  rng = np.random.default_rng(seed)
  return [
    (
      rng.standard_normal((heads, count)).astype(np.float32),
      np.cumsum(rng.integers(0, 9, T)).astype(np.int32),
      np.cumsum(rng.integers(0, 9, E)).astype(np.int32),
      bits,
      signed,
    )
    for bits, signed, count in specs
  ]


@functools.cache
def program(implementation, options, buckets):
  """(out, gradients of q, k, v and tables), jitted once for all lengths of one shape."""

  def run(q, k, v, g, q_offsets, kv_offsets, tables, coordinates):
    def out_of(q, k, v, tables):
      biases = [RelativeBias(t, *x, b) for t, x, b in zip(tables, coordinates, buckets)]
      found = dict(options, biases=biases, implementation=implementation)
      return jagged_attention(q, k, v, q_offsets, kv_offsets, **found)

    out, pull = jax.vjp(out_of, q, k, v, tables)
    return out, *pull(g)

  return jax.jit(run, compiler_options=QUICKLY)


def with_gradient(fn, g):
  """args -> (fn(*args), its gradients for the loss sum(fn * g))."""

  def both(*args):
    out, pull = jax.vjp(fn, *args)
    return out, *pull(g)

  return jax.jit(both, compiler_options=QUICKLY)


def run(implementation, form, case):
  options, specs = FORMS[form]
  q, k, *_ = case
  biases = make_biases(specs, len(q), len(k), q.shape[1])
  fn = program(implementation, tuple(options.items()), tuple(Buckets(b[3], b[4]) for b in biases))
  tables, coordinates = tuple(b[0] for b in biases), tuple(b[1:3] for b in biases)
  *found, dtables = fn(*case, tables, coordinates)
  return [np.asarray(x.astype(jnp.float32)) for x in found], [np.asarray(d) for d in dtables]


@functools.cache
def expected(form, name, dtype="float32", width=16, heads=2):
  options, specs = FORMS[form]
  case = case_of(name, dtype, width, heads)
  biases = make_biases(specs, len(case[0]), len(case[1]), heads)
  *found, dtables = oracle.attend(*case, biases=biases, **options)
  return found, dtables


@functools.cache
def case_of(name, dtype="float32", width=16, heads=2):
  length_S = LENGTHS[name]
  together = name in TOGETHER
  return jagged(
    padded(length_S) if together else length_S,
    heads=heads,
    width=width,
    dtype=dtype,
    room=ROOM if together else 0,
  )


def assert_close(found, wanted, tolerance):
  (arrays, tables), (wanted_arrays, wanted_tables) = found, wanted
  # Entries of a table are sums over thousands of pairs that cancel.
  pairs = [(x, y, 1) for x, y in zip(arrays, wanted_arrays)]
  pairs += [(x, y, 10) for x, y in zip(tables, wanted_tables)]
  for i, (x, y, times) in enumerate(pairs):
    assert x.shape == y.shape
    if x.size:
      assert np.isfinite(x).all(), f"array {i} is not finite"
      np.testing.assert_allclose(x, y, rtol=0, atol=times * tolerance * max(1, np.abs(y).max()))
