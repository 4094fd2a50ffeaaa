"""Process set-up, called once by every binary before JAX is first used."""

from __future__ import annotations

import ctypes
import importlib.util
import os
import platform
import sys
import types


class ProcessError(RuntimeError):
  """A process that cannot find the others of its run."""


def set_up_process() -> None:
  """Chooses the platform and tunes the host allocator; both are settings of a process, so that
  only binaries call this.

  With the CUDA wheels installed but no NVIDIA driver, plain JAX prints a traceback: say so in one
  line and use the CPU.
  """
  wheels = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
  if wheels and not os.environ.get("JAX_PLATFORMS") and not _has_driver():
    print("no NVIDIA driver on this machine: training on the CPU", file=sys.stderr, flush=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Asked or not, JAX loads the wheels, and they log eight more lines: let it find none.
    for version in (12, 13):
      sys.modules[f"jax_cuda{version}_plugin"] = None
      idle = types.SimpleNamespace(initialize=lambda: None)
      sys.modules[f"jax_plugins.xla_cuda{version}"] = idle
  _keep_freed_memory()


def join_processes() -> int:
  """Joins the processes of a run that spans several, each started with the same command; this
  one's number, 0 where it is alone.

    JAX_COORDINATOR_ADDRESS=HOST:PORT JAX_NUM_PROCESSES=P JAX_PROCESS_ID=0..P-1

  Raises:
    ProcessError: some of the three are set and others not, or they are no numbers.
  """
  names = ("JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID")
  given = {name: os.environ[name] for name in names if name in os.environ}
  if not given:
    return 0
  address, count, index = (given.get(name, "") for name in names)
  if len(given) < len(names) or not (count.isdigit() and index.isdigit()):
    raise ProcessError(f"a run of several processes needs all of {', '.join(names)}; got {given}")
  if int(index) >= int(count):
    raise ProcessError(f"JAX_PROCESS_ID is {index}, but must be below JAX_NUM_PROCESSES, {count}")
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit():
    raise ProcessError(f"JAX_COORDINATOR_ADDRESS is {address!r}, but must be HOST:PORT")
  import jax

  try:
    jax.distributed.initialize(address, int(count), int(index))
  except Exception as error:
    raise ProcessError(f"process {index} of {count} cannot join at {address}: {error}") from error
  return int(index)


def _has_driver() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return False
  return True


def _keep_freed_memory() -> None:
  """Stops glibc from giving large buffers back to the kernel after every step.

  XLA's CPU client allocates each output and temporary anew. Above 32 MB glibc maps and unmaps
  them, and the page faults cost more than the arithmetic: a gather of 160,000 rows of 64 floats
  took 44 ms with the defaults and 16 ms with these settings.
  """
  if platform.libc_ver()[0] != "glibc":
    return
  trim_threshold, top_pad, mmap_max, arena_max = -1, -2, -4, -8  # From malloc.h.
  libc = ctypes.CDLL(None)
  for name, value in (
    (mmap_max, 0),
    (trim_threshold, -1),  # Never; a large number would be cut to 31 bits, 2 GB.
    (top_pad, 64 << 20),
    (arena_max, 1),
  ):
    libc.mallopt(name, value)
