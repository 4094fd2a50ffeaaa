"""The report of the kernels: what it must catch, its arithmetic, and what it says of every op."""

import functools
import json
import math
import subprocess
import sys
import types

import jax
import jax.numpy as jnp
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu

from pallas_kernels import cli, report
from pallas_kernels.case import Case
from pallas_kernels.deviceless import target as deviceless
from pallas_kernels.deviceless.compile import Kernel
from pallas_kernels.deviceless.occupancy import occupancy_bound
from pallas_kernels.deviceless.target import TARGETS

A100, H100, B200 = TARGETS["a100"], TARGETS["h100"], TARGETS["b200"]
KEYS = {
  *("op", "implementation", "target", "direction", "shape", "kernel", "registers", "spill_bytes"),
  *("stack_bytes", "shared_memory_bytes", "tensor_core_instructions", "occupancy_bound", "threads"),
}
needs_wheels = pytest.mark.skipif(
  not deviceless.has_cuda_wheels(), reason="the CUDA wheels, which compile for GPUs, are absent"
)


def call(body, x, warps=4):
  return pl.pallas_call(
    body,
    grid=(1,),
    in_specs=[pl.no_block_spec],
    out_specs=pl.no_block_spec,
    out_shape=jax.ShapeDtypeStruct(x.shape, x.dtype),
    compiler_params=plgpu.CompilerParams(num_warps=warps, num_stages=1),
    name="by_hand",
  )(x)


def square(x_ref, o_ref):
  o_ref[...] = plgpu.dot(x_ref[...], x_ref[...]).astype(o_ref.dtype)


def greedy(x_ref, o_ref):
  """Two matrices of sums at a time: 256 registers of a thread, which has 255, for one warp."""
  y = plgpu.dot(x_ref[...], x_ref[...])
  o_ref[...] = (y * plgpu.dot(y.astype(x_ref.dtype), x_ref[...])).astype(o_ref.dtype)


def slow_square(x_ref, o_ref):
  """A matrix product as a loop of outer products, which tensor cores do not do."""
  x = x_ref[...].astype(jnp.float32)
  add = lambda i, acc: acc + x_ref[:, i][:, None] * x_ref[i, :][None, :]
  o_ref[...] = jax.lax.fori_loop(0, len(x), add, jnp.zeros_like(x)).astype(o_ref.dtype)


def case(body, *, warps=4, width=64, implementation="triton", kernels=None):
  return Case(
    op="made_up",
    implementation=implementation,
    direction="forward",
    shape=f"w{width}",
    fn=functools.partial(call, body, warps=warps),
    args=(jax.ShapeDtypeStruct((width, width), "bfloat16"),),
    kernels={"by_hand": True} if kernels is None else kernels,
  )


@needs_wheels
@pytest.mark.parametrize("target", [A100, H100, B200], ids=lambda t: t.arch)
def test_a_good_kernel_has_no_defect_and_its_figures(target):
  (row,), defects = report.examine(case(square), target)
  assert not defects and row.keys() == KEYS
  assert (row["op"], row["target"], row["kernel"]) == ("made_up", target.arch, "by_hand")
  assert row["threads"] == 128 and row["tensor_core_instructions"] > 0
  assert 0 < row["registers"] <= 255 and row["spill_bytes"] == row["stack_bytes"] == 0
  # One operand at least waits in shared memory.
  assert row["shared_memory_bytes"] >= 64 * 64 * 2
  assert 0 < row["occupancy_bound"] <= 1


@needs_wheels
def test_a_kernel_that_spills_is_caught():
  (row,), defects = report.examine(case(greedy, warps=1), A100)
  assert row["spill_bytes"] > 0 and row["stack_bytes"] > 0
  spill, stack = defects
  assert spill.startswith("made_up triton sm_80 forward w64: kernel by_hand spills ")
  assert "stack frame" in stack


@needs_wheels
def test_a_matrix_product_without_tensor_cores_is_caught():
  (row,), (defect,) = report.examine(case(slow_square), H100)
  assert row["tensor_core_instructions"] == 0
  assert defect.endswith("kernel by_hand multiplies matrices without tensor cores")
  assert not report.examine(case(slow_square, kernels={"by_hand": False}), H100)[1]


@needs_wheels
def test_kernels_that_are_absent_or_unnamed_are_caught():
  _, defects = report.examine(case(square, kernels={"other": True}), H100)
  assert any("kernel other was not compiled, only by_hand" in d for d in defects)
  assert any("kernel by_hand is not named by its case" in d for d in defects)


@needs_wheels
def test_a_program_that_does_not_compile_is_a_defect_and_no_end():
  """Two operands of 512 x 512 do not fit into shared memory."""
  rows, (defect,) = report.examine(case(square, warps=16, width=512), H100)
  assert not rows and "does not compile: " in defect and "hared memory" in defect


def test_limits_of_the_target_are_judged():
  kernel = Kernel("by_hand", "sm_80", 64, 0, 0, 232_449, 128, 1, 0)
  arch, shared = report._defects(case(square), [kernel], H100)
  assert arch == "kernel by_hand was compiled for sm_80"
  assert "asks for 232449 bytes of shared memory, a block can have 232448" in shared


@needs_wheels
def test_mosaic_kernels_are_read_on_hopper_and_left_out_elsewhere():
  """JAX's own attention; the second time Mosaic compiles nothing and dumps nothing."""
  from jax.experimental.pallas.ops.gpu import attention_mgpu as attention

  config = attention.TuningConfig(block_q=64, block_kv=64, max_concurrent_steps=2)
  mosaic = Case(
    op="attention",
    implementation="mosaic",
    direction="forward",
    shape="short",
    fn=lambda q, k, v: attention.attention(q, k, v, config),
    args=(jax.ShapeDtypeStruct((1, 512, 2, 64), "float16"),) * 3,
    kernels={"entry": True},
  )
  (row,), defects = report.examine(mosaic, H100)
  assert not defects and row["tensor_core_instructions"] > 0
  # Two tiles of queries and of results, two of keys and of values, 64 x 64 halves each.
  assert row["shared_memory_bytes"] > 6 * 64 * 64 * 2
  assert row["threads"] == 3 * 128  # Two groups of warps that compute, one that loads.
  assert report.examine(mosaic, H100) == ([row], [])
  assert report.examine(mosaic, A100) == ([], [])


@pytest.mark.parametrize(
  "target, warps, taken",
  [
    # 40 registers: 1,280 a warp, 51 warps of which 48 in fours; 12 blocks of 4.
    (H100, 48, {"registers": 40, "shared_bytes": 0, "threads": 128}),
    # 33 registers take the room of 40.
    (H100, 48, {"registers": 33, "shared_bytes": 0, "threads": 128}),
    # 168 registers: 5,376 a warp, 12 warps, one block of three groups of warps.
    (H100, 12, {"registers": 168, "shared_bytes": 51_289, "threads": 384}),
    # 41 KB with the reserved one: exactly 4 blocks in 164 KB, a byte more and it is 3.
    (A100, 32, {"registers": 64, "shared_bytes": 40 * 1024, "threads": 256}),
    (A100, 24, {"registers": 64, "shared_bytes": 40 * 1024 + 1, "threads": 256}),
    # 228 KB hold 5.
    (H100, 40, {"registers": 32, "shared_bytes": 40 * 1024, "threads": 256}),
    # No more than 32 blocks, and 64 warps.
    (A100, 32, {"registers": 16, "shared_bytes": 0, "threads": 32}),
    (A100, 64, {"registers": 32, "shared_bytes": 0, "threads": 1024}),
    # 128 + 1 threads are 5 warps: 12 blocks of 64 warps.
    (A100, 60, {"registers": 32, "shared_bytes": 0, "threads": 129}),
    # 512 columns of tensor memory, 256 a block.
    (B200, 8, {"registers": 64, "shared_bytes": 0, "threads": 128, "tensor_columns": 256}),
    # Not one block fits.
    (H100, 0, {"registers": 255, "shared_bytes": 0, "threads": 1024}),
    (H100, 0, {"registers": 64, "shared_bytes": 233_472, "threads": 128}),
  ],
)
def test_occupancy_is_that_of_the_vendors_calculator(target, warps, taken):
  assert occupancy_bound(target, **taken) == warps / 64


def widest_of_each_kind():
  """The whole report takes minutes; wide rows and many arguments need the most registers."""
  found = {}
  for module in cli.modules("shapes", cli.OPS):
    for case in module.report_cases():
      args = jax.tree.leaves(case.args)
      rows = [x for x in args if x.ndim > 1]
      size = max(((x.size, x.dtype.itemsize) for x in rows), default=(0, 0))[1]
      width = max(((x.shape[-1], math.prod(x.shape[1:])) for x in rows), default=(0, 0))
      width += (len(args),)
      kind = (case.op, case.implementation, case.direction, size, *sorted(case.kernels))
      if kind not in found or width > found[kind][0]:
        found[kind] = (width, case)
  return [case for _, case in found.values()]


@needs_wheels
def test_kernels_of_every_op_are_sound_on_hopper():
  directions, defects = {}, []
  for case in widest_of_each_kind():
    rows, found = report.examine(case, H100)
    assert {row["kernel"] for row in rows} == {*case.kernels} or found
    defects += found
    directions.setdefault(case.op, set()).add(case.direction)
  assert not defects
  assert len(directions) >= len(cli.OPS)
  one_way = {op for op, seen in directions.items() if seen == {"forward"}}
  assert one_way == {"sum_runs", "rowwise_adagrad", "quantize_fp8"}


@needs_wheels
def test_a_defect_fails_the_report_after_all_was_compiled(monkeypatch, capsys, tmp_path):
  module = types.SimpleNamespace(report_cases=lambda: [case(greedy, warps=1), case(square)])
  monkeypatch.setattr(cli, "modules", lambda part, ops: [module])
  file = tmp_path / "report.json"
  assert report.main(["--target=sm_80,sm_90a", f"--json={file}"]) == 1
  rows = json.loads(file.read_text())
  assert all(row.keys() == KEYS for row in rows)
  assert [row["target"] for row in rows] == ["sm_80"] * 2 + ["sm_90a"] * 2
  assert [row["spill_bytes"] > 0 for row in rows[:2]] == [True, False]
  said = capsys.readouterr()
  assert said.err.count("DEFECT made_up triton sm_80 forward w64: kernel by_hand ") == 2
  assert "4 kernels, " in said.out


@needs_wheels
def test_a_sound_report_ends_with_zero(monkeypatch):
  module = types.SimpleNamespace(report_cases=lambda: [case(square)])
  monkeypatch.setattr(cli, "modules", lambda part, ops: [module])
  assert report.main(["--target=sm_90a"]) == 0


@pytest.mark.parametrize(
  "flag, says",
  [
    ("--target=sm_70", "'sm_70' is not one of sm_80, sm_90a, sm_100a"),
    ("--target=sm_80,", "'' is not one of"),
    ("--op=attention", "'attention' is not one of jagged_attention, "),
    ("--json=nowhere/x.json", "the folder nowhere does not exist; create it first"),
    ("--json=.", "must name a file, not a folder"),
  ],
)
def test_bad_flags_are_refused_in_one_sentence(flag, says, tmp_path):
  done = subprocess.run(
    [sys.executable, "-m", "pallas_kernels.report", flag],
    cwd=tmp_path,
    capture_output=True,
    text=True,
  )
  assert done.returncode == 1 and not done.stdout
  assert says in done.stderr and done.stderr.count("\n") == 1


def test_without_the_cuda_wheels_a_sentence_says_what_to_install(monkeypatch):
  monkeypatch.setattr(deviceless, "has_cuda_wheels", lambda: False)
  with pytest.raises(deviceless.DevicelessError, match=r'pip install "gemjax\[cuda12\]"'):
    report.main(["--target=sm_90a"])
