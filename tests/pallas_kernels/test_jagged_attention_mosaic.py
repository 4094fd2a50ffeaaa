"""The Mosaic kernel of jagged_attention: numbers in the interpreter, machine code for Hopper."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret import interpret_pallas_call
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from mosaic_cases import MASKS, STARTS, inputs, interpreted, plan_of  # noqa: F401

from pallas_kernels.deviceless import ptx
from pallas_kernels.deviceless.target import OPTIONS, TARGETS, devices, has_cuda_wheels
from pallas_kernels.jagged_attention import mosaic, mosaic_rows, mosaic_shapes
from pallas_kernels.jagged_attention.form import Form, Plan


def function(activation: str, x):
  match activation:
    case "silu":
      return x / (1 + np.exp(-x))
    case "gelu":
      return x / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))
    case "relu2":
      return np.maximum(x, 0) ** 2


def oracle(form: Form, plan: Plan, q_THD, k_EHD, v_EHD):
  """(out, log, what sums to out without signs) in float64, query by query."""
  q, k, v = (np.asarray(x, np.float64) for x in (q_THD, k_EHD, v_EHD))
  out, size, log = np.zeros_like(q), np.zeros_like(q), np.zeros(q.shape[:2])
  for t in range(len(q)):
    lo, hi = int(plan.lo_T[t]), int(plan.hi_T[t])
    for h in range(q.shape[1] if lo < hi else 0):
      score = form.scale * (k[lo:hi, h] @ q[t, h])
      if form.softmax:
        log[t, h] = score.max() + np.log(np.exp(score - score.max()).sum())
        weight = np.exp(score - log[t, h])
      else:
        weight = function(form.activation, score) * float(plan.gain_T[t])
      out[t, h], size[t, h] = weight @ v[lo:hi, h], np.abs(weight) @ np.abs(v[lo:hi, h])
  return out, log, size


@functools.cache
def kernel(form: Form):
  return jax.jit(functools.partial(mosaic.forward, form, interpret=True))


def check(form: Form, width: int, dtype, mask: str):
  plan = plan_of(*MASKS[mask])
  q_THD, k_EHD, v_EHD, _ = inputs(plan, width, dtype)
  STARTS.clear()
  saved = kernel(form)(q_THD, k_EHD, v_EHD, (), plan)
  assert saved.out_THD.dtype == dtype
  out, log, size = oracle(form, plan, q_THD, k_EHD, v_EHD)
  # Every weight and every output is rounded once to `dtype`.
  off = np.abs(np.asarray(saved.out_THD, np.float64) - out)
  assert (off <= 1.1 * float(jnp.finfo(dtype).eps) * size + 1e-6).all(), (mask, off.max())
  if form.softmax:
    np.testing.assert_allclose(saved.log_TH, log, atol=2e-5, rtol=1e-5)
  else:
    assert saved.log_TH.shape == (0, 0)
  assert STARTS and all(start % 8 == 0 for start in STARTS)


@pytest.mark.parametrize("mask", MASKS)
def test_softmax(mask):
  check(Form("softmax", 0.125), 64, jnp.bfloat16, mask)


def test_an_activation():
  check(Form("silu", 0.5), 128, jnp.float16, "cross")


def test_two_parts_of_columns_and_a_negative_scale():
  check(Form("softmax", -0.1), 256, jnp.float16, "block")


def gap(body, scratch, x):
  """What the interpreter makes of a body(x, out, *scratch)."""
  try:
    kernel = plgpu.kernel(
      body,
      out_type=jax.ShapeDtypeStruct((64, 64), jnp.float32),
      scratch_types=scratch,
      interpret=mosaic_rows.interpreter(),
    )
    return jax.block_until_ready(jax.jit(kernel)(x))
  finally:
    interpret_pallas_call.reset_gpu_interpret_mode_state()


def _layout_cast(x_ref, out_ref, x_smem):
  out_ref[...] = plgpu.layout_cast(x_ref[...].astype(jnp.float32), plgpu.Layout.WGMMA)


def _load(x_ref, out_ref, x_smem):
  out_ref[...] = plgpu.load(x_ref, ()).astype(jnp.float32)


def _product(a, b, out_ref):
  def multiply(sum_ref):
    plgpu.wgmma(sum_ref, a, b)
    return sum_ref[...]

  out_ref[...] = pl.run_scoped(multiply, plgpu.ACC((64, 64), jnp.float32))


def _plain(x_ref, out_ref, x_smem):
  x_smem[...] = x_ref[...]
  _product(x_smem, x_smem, out_ref)


def _from_registers(x_ref, out_ref, x_smem):
  x_smem[...] = x_ref[...]
  _product(x_ref[...], x_smem, out_ref)


def _transposed(x_ref, out_ref, x_smem):
  x_smem[...] = x_ref[...]
  _product(x_smem, plgpu.transpose_ref(x_smem, (1, 0)), out_ref)


def _run_state(x_ref, out_ref, x_smem):
  x_smem[...] = x_ref[...]
  start = plgpu.ACC.init(jnp.zeros((64, 64), jnp.float32))
  out_ref[...] = pl.run_state(lambda ref: plgpu.wgmma(ref, x_smem, x_smem))(start)


STOPS = {
  _plain: None,
  _layout_cast: "rule for primitive 'layout_cast' not found",
  _load: None,  # An assertion.
  _from_registers: r"Expected shape \(5,\) but got \(64, 64\)",
  _transposed: "'TransposeTransform' object has no attribute 'indices'",
  _run_state: "Higher-order primitive run_state",
}


@pytest.mark.parametrize("body", STOPS)
def test_where_the_interpreter_stops(body):
  """Where one of these no longer fails, `warpgroup.Interpreted` can lose what stands for it."""
  tiled = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
  x = jnp.asarray(np.random.default_rng(0).normal(size=(64, 64)), jnp.bfloat16)
  run = functools.partial(gap, body, [plgpu.SMEM((64, 64), jnp.bfloat16, transforms=tiled)], x)
  if body is _plain:
    x = np.asarray(x, np.float64)
    np.testing.assert_allclose(run(), x @ x, atol=1e-3)
  else:
    stop = AssertionError if body is _load else Exception
    with pytest.raises(stop, match=STOPS[body]):
      run()


@pytest.mark.skipif(not has_cuda_wheels(), reason="the CUDA wheels, which compile, are absent")
def test_the_machine_code_of_hopper(monkeypatch, tmp_path):
  """A shape of its own: Mosaic dumps nothing that this process has compiled before."""
  for name in ("MOSAIC_GPU_DUMP_PTX", "MOSAIC_GPU_DUMP_PTXAS"):
    monkeypatch.setenv(name, "1")
  monkeypatch.setenv("MOSAIC_GPU_DUMP_TO", str(tmp_path))
  monkeypatch.setattr(mosaic_shapes, "ROWS", 4_097)
  mesh = jax.sharding.Mesh(devices(TARGETS["h100"]).reshape(-1), ("device",))
  there = jax.sharding.NamedSharding(mesh, jax.P())
  args = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there),
    mosaic_shapes.arguments(128, "bfloat16"),
  )
  forward = functools.partial(mosaic.forward, Form("softmax", 0.1), interpret=False)
  lowered = jax.jit(forward).trace(*args).lower(lowering_platforms=("cuda",))
  lowered.compile(compiler_options=OPTIONS)
  (path,) = tmp_path.glob("*.ptx")
  code = path.read_text()
  assert ptx.arch(code) == "sm_90a" and ptx.threads(code) == 3 * 128
  (report,) = ptx.parse_report(path.with_suffix(".ptxas").read_text())
  assert report.stack_bytes == report.spill_store_bytes == report.spill_load_bytes == 0
  # 16 columns of queries at a time for the scores, 16 keys for the sums.
  assert ptx.count(code).wgmma == 128 // 16 + mosaic.launch(128).keys // 16
  assert code.count("cp.async.bulk.tensor.5d.shared::cluster.global") >= 2  # Tiles of keys, values.
  # Boxes of outputs, and logarithms.
  assert code.count(".global.shared::cta.bulk_group") == mosaic_rows.ROWS.bit_length() + 1
  assert code.count("setmaxnreg.dec") == code.count("setmaxnreg.inc") == 1


def test_refusals():
  q_THD = jnp.zeros((8, 2, 64), jnp.bfloat16)
  assert mosaic.refusal(q_THD, q_THD, ()) is None
  assert "not float32" in mosaic.refusal(q_THD.astype(jnp.float32), q_THD, ())
  assert "is 96" in mosaic.refusal(jnp.zeros((8, 2, 96), jnp.bfloat16), q_THD, ())
  assert "there are 1" in mosaic.refusal(q_THD, q_THD, (jnp.zeros((2, 9)),))
  assert "8 queries and 0 keys" in mosaic.refusal(q_THD, q_THD[:0], ())
