"""Plans, arrays and fixtures that the tests of the Mosaic kernels of jagged_attention share."""

import functools
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiled_quickly import ON_GPU
from jax._src import core
from jax._src.pallas.mosaic.interpret import thread_map
from jax._src.pallas.mosaic_gpu.core import UntilingTransform
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks

from pallas_kernels.case import offsets
from pallas_kernels.jagged_attention.form import Plan
from pallas_kernels.jagged_attention.visible import visible

QUERIES, KEYS, HEADS = 203, 229, 2  # Neither is a multiple of 8.
START = 5
MASKS = {
  "self": ([140, 0, 20, 1, 7, 20], None, {}),
  "long": ([0, 0, 190, 0, 0, 0], None, {"causal": True, "window": 70}),
  "block": ([140, 20, 0, 0, 3, 20], None, {"block": 64}),
  "cross": ([90, 3, 30, 0, 50, 5], [1, 131, 0, 40, 20, 30], {"causal": True}),
  "empty": ([0] * 6, None, {}),
}


STARTS = []  # Of all copies since it was cleared: the first row of tiles, the first column of all.


@pytest.fixture(autouse=True, scope="module")
def interpreted():
  """JAX's interpreter compiles a kernel anew for every group of every program; here once.

  And it says where copies start: TMA would leave out rows of a tile of 8 that it starts amid, and
  refuse what starts amid 16 bytes, neither of which the interpreter imitates.
  """
  if ON_GPU:
    pytest.skip("it is of JAX's interpreter; test_jagged_attention.py runs these kernels on a GPU")
  lock, programs = threading.Lock(), {}

  def run(jaxpr, consts, *args):
    with lock:
      if jaxpr not in programs:
        program = jax.jit(functools.partial(core.eval_jaxpr, jaxpr))
        programs[jaxpr] = program.lower(consts, *args).compile()
    jax.block_until_ready(programs[jaxpr](consts, *args))

  execute = gpu_callbacks._execute_device_local_memory_transfer

  def watch(*, src_transforms, dst_transforms, **kwargs):
    indices = src_transforms[-1].indices if src_transforms else ()
    tiled = any(isinstance(t, UntilingTransform) for t in dst_transforms)
    for index in (*indices[:1],) * tiled + (*indices[-1:],):
      STARTS.append(int(getattr(index, "start", 0)))
    return execute(src_transforms=src_transforms, dst_transforms=dst_transforms, **kwargs)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(thread_map, "_run_jaxpr", run)
    patch.setattr(gpu_callbacks, "_execute_device_local_memory_transfer", watch)
    yield


def plan_of(lengths, kv_lengths, options) -> Plan:
  q_offsets_S1 = offsets(np.array(lengths), START)
  kv_offsets_S1 = q_offsets_S1 if kv_lengths is None else offsets(np.array(kv_lengths), START)
  seen = visible(jnp.asarray(q_offsets_S1), jnp.asarray(kv_offsets_S1), None, QUERIES, **options)
  gain_T = np.random.default_rng(1).uniform(0.01, 0.1, QUERIES).astype(np.float32)
  arrays = (q_offsets_S1, kv_offsets_S1, seen.lo_T, seen.hi_T, gain_T)
  return Plan(*(jnp.asarray(x) for x in arrays), (), ())


def inputs(plan: Plan, width: int, dtype):
  """(q, k, v, g); NaN outside of the segments."""
  rng, found = np.random.default_rng(0), []
  queries, keys = (QUERIES, plan.q_offsets_S1), (KEYS, plan.kv_offsets_S1)
  for count, edges in (queries, keys, keys, queries):
    x = rng.normal(size=(count, HEADS, width))
    x[: edges[0]] = x[edges[-1] :] = np.nan
    found.append(jnp.asarray(x, dtype))
  return found
