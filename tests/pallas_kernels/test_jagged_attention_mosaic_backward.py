"""The backward pass of the Mosaic kernels: numbers in the interpreter, machine code for Hopper."""

import functools

import attention_oracle
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from attention_cases import TOLERANCE, assert_close, jagged, with_gradient
from mosaic_cases import MASKS, STARTS, inputs, interpreted, plan_of  # noqa: F401
from test_jagged_attention_mosaic import function

from pallas_kernels.deviceless.compile import compile_kernels
from pallas_kernels.deviceless.target import TARGETS, has_cuda_wheels
from pallas_kernels.jagged_attention import mosaic_backward, mosaic_shapes
from pallas_kernels.jagged_attention.api import jagged_attention
from pallas_kernels.jagged_attention.form import Form, Plan, Saved


def oracle(form: Form, plan: Plan, q_THD, k_EHD, v_EHD, g_THD):
  """((out, log), gradients, what sums to each without signs) in float64, query by query."""
  q, k, v, g = (np.asarray(x, np.float64) for x in (q_THD, k_EHD, v_EHD, g_THD))
  out, log = np.zeros_like(q), np.zeros(q.shape[:2])
  sums = [np.zeros_like(x) for x in (q, k, v)]
  sizes = [np.zeros_like(x) for x in (q, k, v)]
  for t in range(len(q)):
    lo, hi = int(plan.lo_T[t]), int(plan.hi_T[t])
    for h in range(q.shape[1] if lo < hi else 0):
      keys, values = k[lo:hi, h], v[lo:hi, h]
      score, pull = form.scale * (keys @ q[t, h]), values @ g[t, h]
      if form.softmax:
        log[t, h] = score.max() + np.log(np.exp(score - score.max()).sum())
        weight = np.exp(score - log[t, h])
        slope = weight * (pull - weight @ pull)
        # delta comes from a rounded output.
        size = weight * (np.abs(pull) + np.abs(g[t, h]) @ np.abs(weight @ values))
      else:
        weight = function(form.activation, score) * float(plan.gain_T[t])
        # The complex step: exact to the last bit.
        slope = function(form.activation, score + 1e-30j).imag * 1e30 * float(plan.gain_T[t])
        # The gain is rounded into g.
        slope, size = slope * pull, np.abs(slope) * (np.abs(values) @ np.abs(g[t, h]))
      out[t, h] = weight @ values
      sums[0][t, h] = form.scale * slope @ keys
      sums[1][lo:hi, h] += form.scale * np.outer(slope, q[t, h])
      sums[2][lo:hi, h] += np.outer(weight, g[t, h])
      sizes[0][t, h] = abs(form.scale) * size @ np.abs(keys)
      sizes[1][lo:hi, h] += abs(form.scale) * np.outer(size, np.abs(q[t, h]))
      sizes[2][lo:hi, h] += np.outer(np.abs(weight), np.abs(g[t, h]))
  return (out, log), sums, sizes


@pytest.mark.parametrize(
  ("activation", "scale", "width", "dtype", "mask"),
  [
    ("softmax", 0.125, 64, "bfloat16", "cross"),
    ("softmax", 0.125, 64, "bfloat16", "empty"),
    ("softmax", -0.1, 128, "float16", "block"),
    ("silu", 0.3, 128, "bfloat16", "self"),
    ("gelu", 0.3, 64, "bfloat16", "long"),
  ],
)
def test_gradients(activation, scale, width, dtype, mask):
  form, plan = Form(activation, scale), plan_of(*MASKS[mask])
  q_THD, k_EHD, v_EHD, g_THD = inputs(plan, width, dtype)
  (out, log), sums, sizes = oracle(form, plan, q_THD, k_EHD, v_EHD, g_THD)
  saved = Saved(jnp.asarray(out, dtype), jnp.asarray(log, jnp.float32))
  if not form.softmax:
    saved = saved._replace(log_TH=jnp.zeros((0, 0), jnp.float32))
  STARTS.clear()
  run = jax.jit(functools.partial(mosaic_backward.backward, form, interpret=True))
  found = run(q_THD, k_EHD, v_EHD, (), plan, saved, g_THD)
  assert found.tables == ()
  for x, wanted, size in zip(found, sums, sizes):
    assert x.dtype == dtype
    # Gains with g, weights or slopes, and gradients: each rounded once to `dtype`, by half an eps.
    off = np.abs(np.asarray(x, np.float64) - wanted)
    assert (off <= 1.6 * float(jnp.finfo(dtype).eps) * size + 1e-6).all(), off.max()
  assert STARTS and all(start % 8 == 0 for start in STARTS)


def test_segments_that_share_keys_through_the_op():
  q_length_S, kv_length_S = np.array([2, 9, 70, 1, 65, 4]), np.array([65, 130, 7])
  kv_segment_S = np.array([2, 0, 0, 1, 1, 0], np.int32)
  *arrays, q_offsets, kv_offsets = jagged(
    q_length_S, kv_length_S=kv_length_S, width=64, dtype="bfloat16"
  )
  options = {"activation": "relu2", "norm": "length", "scale": 0.1, "window": 60}
  fn = lambda q, k, v: jagged_attention(
    q, k, v, q_offsets, kv_offsets, kv_segment_S=kv_segment_S, implementation="mosaic", **options
  )
  found = with_gradient(fn, arrays[3])(*arrays[:3])
  *wanted, _ = attention_oracle.attend(
    *arrays, q_offsets, kv_offsets, kv_segment=kv_segment_S, **options
  )
  assert_close((map(np.asarray, found), ()), (wanted, ()), TOLERANCE["bfloat16"])


def test_triton_has_the_other_gradients():
  q_THD = jnp.zeros((8, 2, 64), jnp.float16)
  softmax, silu = Form("softmax", 1.0), Form("silu", 1.0)
  assert mosaic_backward.serves(softmax, q_THD) and not mosaic_backward.serves(silu, q_THD)
  assert mosaic_backward.serves(silu, q_THD.astype(jnp.bfloat16))
  assert not mosaic_backward.serves(softmax, jnp.zeros((8, 2, 256), jnp.float16))


@pytest.mark.skipif(not has_cuda_wheels(), reason="the CUDA wheels, which compile, are absent")
def test_the_machine_code_of_hopper(monkeypatch):
  """A shape of its own: Mosaic dumps nothing that this process has compiled before."""
  monkeypatch.setattr(mosaic_shapes, "ROWS", 4_105)
  args = mosaic_shapes.arguments(128, "bfloat16")
  saved = Saved(args[0], jax.ShapeDtypeStruct((0, 0), jnp.float32))
  backward = functools.partial(mosaic_backward.backward, Form("silu", 0.1), interpret=False)
  kernels = compile_kernels(backward, (*args, saved, args[0]), TARGETS["h100"])
  found = {kernel.name: kernel for kernel in kernels}
  assert found.keys() == set(mosaic_backward.KERNELS)
  for keyed, name in enumerate(mosaic_backward.KERNELS):
    kernel, rows = found[name], mosaic_backward.launch(128, bool(keyed)).rows
    assert kernel.arch == "sm_90a" and kernel.threads == 3 * 128
    assert kernel.stack_bytes == kernel.spill_bytes == 0
    # Two products over the width's columns, and one or two over the rows of the ring, by 16.
    assert kernel.tensor_cores == 2 * 128 // 16 + (1 + keyed) * rows // 16
