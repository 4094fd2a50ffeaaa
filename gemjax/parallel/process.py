"""Process set-up, called once by every binary before JAX is first used."""

from __future__ import annotations

import ctypes
import importlib.util
import mmap
import os
import platform
import socket
import sys
import types

from gemjax.parallel.peers import Peers
from gemjax.parallel.place import Place, ProcessError, resolve, visible_gpus
from gemjax.parallel.rollcall import Roll, answer_roll

HUGE_PAGE = 2 << 20  # Bytes.


def set_up_process() -> None:
  """Chooses the platform and tunes the host allocator; both are settings of a process, so that
  only binaries call this.

  With the CUDA wheels installed but no NVIDIA driver, plain JAX prints a traceback: say so in one
  line and use the CPU.
  """
  wheels = any(importlib.util.find_spec(f"jax_cuda{v}_plugin") for v in (12, 13))
  if wheels and not os.environ.get("JAX_PLATFORMS") and not _has_driver():
    print("no NVIDIA driver on this machine: computing on the CPU", file=sys.stderr, flush=True)
    os.environ["JAX_PLATFORMS"] = "cpu"
    # Asked or not, JAX loads the wheels, and they log eight more lines: let it find none.
    for version in (12, 13):
      sys.modules[f"jax_cuda{version}_plugin"] = None
      idle = types.SimpleNamespace(initialize=lambda: None)
      sys.modules[f"jax_plugins.xla_cuda{version}"] = idle
  _keep_freed_memory()


def join_processes(*, join_seconds: float = 300.0, stall_seconds: float = 600.0) -> Peers:
  """Joins the processes of a run that spans several, each started with the same command.

  Who they are is read from the environment, see gemjax/parallel/place.py.

  Args:
    join_seconds: How long to wait for all of them.
    stall_seconds: How long one may stay in a phase before all stop.

  Raises:
    ProcessError: the environment contradicts itself, or some process did not come, with its name.
  """
  place = resolve(os.environ)
  if place.count == 1:
    return Peers()
  host, first = socket.gethostname(), place.address.rpartition(":")[0]
  print(
    f"{place.name(place.index, host)} of {place.count} by {place.source}: the first is at "
    f"{place.address}; {_devices(place)}",
    flush=True,
  )
  if place.index == 0:
    roll = Roll(place)
    roll.call(join_seconds)
    port = _free_port()
    roll.tell(port=port)
    connections, hosts = roll.came, roll.hosts
  else:
    connection, port = answer_roll(place, join_seconds)
    connections, hosts = {0: connection}, {0: first, place.index: host}
  peers = Peers(place, connections, hosts, stall_seconds=stall_seconds)
  import jax

  try:
    jax.distributed.initialize(
      f"{first}:{port}",
      place.count,
      place.index,
      local_device_ids=place.devices,
      # Slurm found by JAX itself would give a process the GPU of its local number, come what may.
      cluster_detection_method="deactivate",
    )
  except Exception as error:
    raise ProcessError(f"JAX cannot join at port {port} of {place.address}: {error}") from error
  return peers


def _devices(place: Place) -> str:
  """Which devices a process will have, before JAX is asked, which starts them."""
  visible = os.environ.get("CUDA_VISIBLE_DEVICES")
  if os.environ.get("JAX_PLATFORMS") == "cpu":
    return "on the CPU"
  if visible_gpus(os.environ) == []:
    return f"no GPU, by CUDA_VISIBLE_DEVICES={visible}"
  if place.devices is not None:
    return f"GPUs number {', '.join(map(str, place.devices))} of CUDA_VISIBLE_DEVICES={visible}"
  return f"all GPUs of CUDA_VISIBLE_DEVICES={visible}" if visible else "all devices of the host"


def _free_port() -> int:
  with socket.socket() as found:
    found.bind(("", 0))
    return found.getsockname()[1]


def _has_driver() -> bool:
  try:
    ctypes.CDLL("libcuda.so.1")
  except OSError:
    return False
  return True


def _keep_freed_memory() -> None:
  """Stops glibc from giving large buffers back to the kernel after every step, and puts its heap
  into huge pages where the kernel gives them to those that ask.

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
  libc.malloc.argtypes, libc.malloc.restype = [ctypes.c_size_t], ctypes.c_void_p
  libc.free.argtypes = [ctypes.c_void_p]
  libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
  # The heap keeps the address space that this makes it take, of which no page is touched.
  size = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
  if heap := libc.malloc(size):
    start = -(-heap // HUGE_PAGE) * HUGE_PAGE
    libc.madvise(start, heap + size - start, mmap.MADV_HUGEPAGE)  # Where refused, all is as before.
    libc.free(heap)
