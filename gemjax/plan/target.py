"""GPU clusters that need not be there, and the environment of a process that compiles for them."""

from __future__ import annotations

import dataclasses
import os
import re
from pathlib import Path

import numpy as np

from pallas_kernels.deviceless import target as deviceless
from pallas_kernels.deviceless.target import OPTIONS, TARGETS, Target, has_cuda_wheels

REQUIRED_FLAGS = tuple(f"--{name}={str(value).lower()}" for name, value in OPTIONS.items())
# Those of launch/jobs/presets.py's `overlap` that order instructions.
SCHEDULE_FLAGS = (
  "--xla_gpu_enable_latency_hiding_scheduler=true",
  "--xla_gpu_experimental_parallel_collective_overlap_limit=4",
  "--xla_gpu_experimental_enable_heuristic_collective_combining=false",
  "--xla_gpu_reduce_scatter_combine_threshold_bytes=1048576",
  "--xla_gpu_enable_analytical_sol_latency_estimator=true",
)


class PlanError(ValueError):
  """A program cannot be planned, or what the compiler wrote is not understood."""


@dataclasses.dataclass(frozen=True, slots=True)
class Topology:
  """`hosts` machines with `gpus_per_host` GPUs of one kind each."""

  target: Target
  hosts: int
  gpus_per_host: int

  @property
  def size(self) -> int:
    return self.hosts * self.gpus_per_host


def parse_topology(text: str) -> Topology:
  """The topology written `<gpu>:<hosts>x<gpus of a host>`, such as "h100:16x8"; else PlanError."""
  match = re.fullmatch(r"([^:]*):(\d+)x(\d+)", text)
  if not match:
    raise PlanError(
      f"topology {text!r} must read <gpu>:<hosts>x<gpus of a host>, for example h100:16x8"
    )
  name, hosts, gpus = match[1], int(match[2]), int(match[3])
  if name not in TARGETS:
    raise PlanError(f"topology {text!r}: GPU {name!r} is not one of {', '.join(TARGETS)}")
  if not hosts or not gpus:
    raise PlanError(
      f"topology {text!r} must have at least one host and one GPU, has {hosts}x{gpus}"
    )
  return Topology(TARGETS[name], hosts, gpus)


def environment(dump: str | Path | None = None) -> dict[str, str]:
  """The environment in which a new Python process can plan; for `subprocess.run(env=...)`.

  XLA_FLAGS of the caller come last and so win. With `dump`, XLA writes its buffer assignment,
  PTX and schedule into that folder; nothing is then taken from a compilation cache, for what
  comes from there is not dumped.
  """
  flags = [*REQUIRED_FLAGS, *SCHEDULE_FLAGS]
  found = dict(os.environ, JAX_PLATFORMS="cpu")
  if dump is not None:
    if re.search(r"\s", str(dump)):
      raise PlanError(
        f"dump folder {str(dump)!r} has a space in its name, which XLA_FLAGS cannot hold"
      )
    flags += [f"--xla_dump_to={dump}", "--xla_dump_latency_hiding_schedule=true"]
    found["JAX_ENABLE_COMPILATION_CACHE"] = "false"
  found["XLA_FLAGS"] = " ".join([*flags, *os.environ.get("XLA_FLAGS", "").split()])
  return found


def obstacle() -> str | None:
  """Why this process cannot plan, in one sentence that says what to do; None where it can."""
  if not has_cuda_wheels():
    return 'planning needs the CUDA wheels and no GPU: pip install "gemjax[cuda12]"'
  flags = os.environ.get("XLA_FLAGS", "").split()
  missing = [f for f in REQUIRED_FLAGS if f not in flags]
  if missing:
    return (
      f"planning needs XLA_FLAGS={' '.join(missing)!r} before JAX is imported: "
      "start a process with env=gemjax.plan.target.environment()"
    )
  if (
    os.environ.get("JAX_PLATFORMS") != "cpu" and "JAX_SKIP_CUDA_CONSTRAINTS_CHECK" not in os.environ
  ):
    return (
      "planning needs JAX_PLATFORMS=cpu before JAX is imported: "
      "start a process with env=gemjax.plan.target.environment()"
    )
  return None


def devices(topology: Topology) -> np.ndarray:
  """Abstract devices [hosts, gpus_per_host] to compile for, in the order of their ids."""
  why = obstacle()
  if why:
    raise PlanError(why)
  return deviceless.devices(topology.target, topology.hosts, topology.gpus_per_host)
