"""The report of a traced run: intervals written by hand, and a trace of this CPU."""

import json
import types

import jax
import jax.numpy as jnp
import pytest

from gemjax.train import profile


def plane(name, **lines):
  events = lambda spans: [
    types.SimpleNamespace(
      name=n, start_ns=a, end_ns=b, duration_ns=b - a, stats=[("correlation_id", 7), *named]
    )
    for n, a, b, *named in spans
  ]
  found = [types.SimpleNamespace(name=n.replace("_", " "), events=events(s))
           for n, s in lines.items()]  # fmt: skip
  return types.SimpleNamespace(name=name, lines=found)


def test_communication_is_exposed_where_no_other_kernel_runs():
  """Of 1 us: products from 0 to 400 and 300 to 500, NCCL from 450 to 700; the rest is idle."""
  product = ("hlo_op", "custom-call.3")
  compute = [("gemm", 0, 400, product), ("fusion", 300, 500)]
  gpu = plane(
    "/device:GPU:0",
    Stream_1=compute,
    Stream_2=[("ncclDevKernel_AllGather", 450, 700)],
    XLA_Modules=[("jit_train_step", 0, 1000)],
  )
  found = profile.of_devices([plane("/host:CPU", Stream_9=compute), gpu], 1e-6, steps=2)
  assert found["exposed_communication_share"] == pytest.approx(0.2)
  assert found["idle_share"] == pytest.approx(0.3)
  assert found["kernel_seconds"] == pytest.approx(
    {"gemm": 200e-9, "ncclDevKernel_AllGather": 125e-9, "fusion": 100e-9}
  )
  assert next(iter(found["kernel_seconds"])) == "gemm"
  assert found["operation_seconds"] == pytest.approx({"custom-call.3": 200e-9, "": 225e-9})


def test_without_a_gpu_nothing_is_said_of_devices():
  assert profile.of_devices([plane("/host:CPU", Stream_1=[("gemm", 0, 5)])], 1.0, 1) == {}


def test_steps_behind_the_first_are_traced(tmp_path):
  traced = profile.Profile(tmp_path, steps=2)
  step = jax.jit(lambda x: x + 1)
  x, ran = jnp.zeros(4), profile.Ran("HloModule f", "cpu", {"data": 1, "model": 1}, 1, 7.0)
  for count in range(profile.BEFORE + 4):
    traced.before(x)
    x = step(x)
    traced.after(x, lambda: ran)
    assert (tmp_path / profile.REPORT).exists() == (count >= profile.BEFORE + 1)
  report = json.loads((tmp_path / profile.REPORT).read_text())
  assert report["steps"] == 2 and report["step_seconds"] > 0
  assert report["device"] == "cpu" and report["kernel_flops"] == 7.0
  assert (tmp_path / profile.PROGRAM).read_text() == "HloModule f"
  assert len(list((tmp_path / profile.TRACE).rglob("*.xplane.pb"))) == 1
