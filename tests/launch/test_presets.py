"""Every flag is known to the installed jaxlib, every variable to what reads it."""

import importlib.util
import os
import pathlib
import subprocess
import sys

import pytest
from paths import PATHS

sys.path[:0] = PATHS.split(os.pathsep)
from jobs.presets import PRESETS, environment  # noqa: E402


def start_jax(flags: str) -> subprocess.CompletedProcess:
  """XLA reads its flags with the first backend, and aborts at the first that it does not know."""
  return subprocess.run(
    [sys.executable, "-c", "import jax; jax.devices()"],
    env=os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}, text=True, capture_output=True,
  )  # fmt: skip


def test_every_flag_exists_in_the_installed_jaxlib():
  flags = {s: f"{s.name}={s.value}" for preset in PRESETS.values() for s in preset}
  flags = {s: flag for s, flag in flags.items() if s.name.startswith("--")}
  done = start_jax(" ".join(sorted(set(flags.values()))))
  assert len(flags) >= 5 and done.returncode == 0, done.stderr


def test_a_flag_that_does_not_exist_would_be_found():
  assert "Unknown flag" in start_jax("--xla_gpu_enable_latency_hiding=true").stderr


def test_every_variable_is_read_by_the_installed_libraries():
  names = {s.name for preset in PRESETS.values() for s in preset if not s.name.startswith("--")}
  assert names
  jaxlib = pathlib.Path(importlib.util.find_spec("jaxlib").origin).parent
  spec = importlib.util.find_spec("nvidia.nccl") if importlib.util.find_spec("nvidia") else None
  for name in names:
    if not name.startswith("NCCL_"):
      assert name in (jaxlib / "xla_client.py").read_text()
    elif spec is None:
      pytest.skip("the CUDA wheels are not installed: no NCCL to ask")
    else:
      library = pathlib.Path(next(iter(spec.submodule_search_locations))) / "lib" / "libnccl.so.2"
      assert name.encode() in library.read_bytes()


def test_settings_say_why_and_by_whom():
  for preset in PRESETS.values():
    assert all(s.reason and s.source for s in preset)
    assert len({s.name for s in preset}) == len(preset)


def test_plans_are_scheduled_as_runs_with_overlap_are():
  from gemjax.plan.target import SCHEDULE_FLAGS

  ours = {f"{s.name}={s.value}" for s in PRESETS["overlap"]}
  # But for the costs that XLA assumes where a plan gives it none.
  assert {flag for flag in SCHEDULE_FLAGS if "estimator" not in flag} <= ours


def test_flags_that_were_there_are_kept():
  found = environment("overlap", "--xla_dump_to=x")["XLA_FLAGS"]
  assert found.startswith("--xla_dump_to=x --xla_gpu_enable_latency_hiding_scheduler=true")
  assert environment("default", "--xla_dump_to=x") == {}
