"""Settings of a process, each in one of its own: barriers last in what XLA compiles for the CPU."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import os
from gemjax.parallel.process import set_up_process
set_up_process()
import jax
from gemjax.layers.norm import written_once
step = jax.jit(lambda x: written_once(x.T * 2) + 1)
text = step.lower(jax.numpy.ones((4, 8))).compile().as_text()
print("opt-barrier" in text, os.environ["XLA_FLAGS"])
"""


@pytest.mark.parametrize("flags", ["", "--xla_cpu_enable_fast_min_max=true"])
def test_barriers_last_beside_flags_of_the_user(flags):
  assert run(flags) == ["True", *flags.split(), "--xla_disable_hlo_passes=cse_barrier_expander"]


def test_whoever_disables_passes_keeps_the_choice():
  flags = "--xla_disable_hlo_passes=constant_folding"
  assert run(flags) == ["False", flags]


def test_a_file_of_flags_is_left_alone(tmp_path):
  (tmp_path / "flags").write_text("--xla_cpu_enable_fast_min_max=true")
  assert run(f"{tmp_path}/flags") == ["False", f"{tmp_path}/flags"]


def test_a_process_with_gpus_keeps_its_flags():
  """XLA for GPUs takes barriers out itself, where it no longer needs them."""
  program = "\n".join([*PROGRAM.splitlines()[:4], "print(os.environ['XLA_FLAGS'])"])
  assert run("--xla_gpu_autotune_level=0", "cuda", program) == ["--xla_gpu_autotune_level=0"]


def run(flags, platforms="cpu", program=PROGRAM):
  environment = os.environ | {"JAX_PLATFORMS": platforms, "XLA_FLAGS": flags}
  done = subprocess.run(
    [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
  )
  return done.stdout.split()
