"""Our kernels in a program that is compiled for a GPU that is not here, and what each takes.

The program's module names the custom calls that Pallas made; XLA's dump holds the PTX of each (one
file a kernel) and, in its sequence of thunks, the shared memory of each launch. Mosaic compiles by
itself and dumps elsewhere, and only what this process has not yet compiled.
"""

from __future__ import annotations

import contextlib
import os
import re
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from pallas_kernels.deviceless import ptx
from pallas_kernels.deviceless.target import OPTIONS, DevicelessError, Target, devices

# Whatever XLA_FLAGS this process has: what is reported is what users get.
_OPTIMISED = {"xla_backend_optimization_level": 3, "xla_llvm_disable_expensive_passes": False}
_TRITON, _MOSAIC = "__gpu$xla.gpu.triton", "mosaic_gpu_v2"  # Targets of the custom calls.


class Kernel(NamedTuple):
  """What one kernel takes, and what of it goes to the tensor cores."""

  name: str  # As given to pallas_call; in Mosaic that of the Python function.
  arch: str
  registers: int  # Of a thread.
  stack_bytes: int
  spill_bytes: int  # Stores and loads.
  shared_bytes: int  # Of a block, static and dynamic.
  threads: int  # Of a block.
  tensor_cores: int  # Instructions; a loop's once.
  tensor_columns: int  # Of tensor memory, of a block (sm_100a).


def compile_kernels(fn: Callable[..., Any], args: Sequence[Any], target: Target) -> list[Kernel]:
  """Compiles `fn(*args)` for one GPU and reads our kernels out of what the compilers wrote.

  `args` are pytrees of ShapeDtypeStruct. Raises DevicelessError without the CUDA wheels, or where
  a dump is not understood, and jax.errors.JaxRuntimeError where XLA refuses the program.
  """
  mesh = jax.sharding.Mesh(devices(target).reshape(-1), ("device",))
  there = jax.sharding.NamedSharding(mesh, jax.P())
  args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
  with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):  # Pallas of 0.11 asks for the GPU.
    lowered = jax.jit(fn).trace(*args).lower(lowering_platforms=("cuda",))
  with tempfile.TemporaryDirectory() as folder:
    dump = Path(folder)
    with _mosaic_dumps_to(dump):
      compiled = lowered.compile(compiler_options=OPTIONS | _OPTIMISED | {"xla_dump_to": folder})
    text = compiled.as_text()
    # Two calls of one kernel on equal shapes may be compiled twice.
    return sorted({*_triton(text, dump), *_mosaic(text, dump)})


def _triton(text: str, dump: Path) -> Iterator[Kernel]:
  """The kernels of the Triton lowering."""
  calls = [line for line in text.splitlines() if f'custom_call_target="{_TRITON}"' in line]
  names = {_first(r', name = "(\w+)"', call) for call in calls}
  thunks = "".join(path.read_text() for path in dump.glob("*thunk_sequence.txt"))
  shared = dict(re.findall(r"(\w+) grid: .* shared_memory: (\d+) bytes", thunks))
  for path in sorted(dump.glob("module_*.ptx")):
    code = path.read_text()
    for entry in ptx.kernels(code):
      name = re.sub(r"__\d+$", "", entry)  # XLA numbers kernels of one name: `name`, `name__1`.
      if name not in names:
        continue  # A fusion of XLA's own.
      if entry not in shared:
        raise DevicelessError(f"XLA's sequence of thunks does not launch the kernel {entry!r}")
      yield _kernel(name, code, ptx.ptxas(path), int(shared[entry]))


def _mosaic(text: str, dump: Path) -> Iterator[Kernel]:
  """The kernels of the Mosaic GPU lowering.

  Mosaic compiles a module once in a process and dumps nothing the second time, so they are kept.
  """
  calls = [line for line in text.splitlines() if f'custom_call_target="{_MOSAIC}"' in line]
  hashes = dict.fromkeys(_first(r'kernel_hash = "([^"]*)"', call) for call in calls)
  new = [h for h in hashes if h not in _compiled_by_mosaic]
  found = sorted(set(dump.glob("*.ptx")) - set(dump.glob("module_*.ptx")))
  if len(new) != len(found):
    raise DevicelessError(f"Mosaic compiled {len(new)} kernels but dumped {len(found)}")
  for h, path in zip(new, found):
    code, passes = path.read_text(), path.with_suffix(".mlir-passes.log").read_text()
    dynamic = _first(r"dynamic_shared_memory_size (%\w+)", passes)
    dynamic = _first(rf"{dynamic} = arith.constant (\d+) :", passes)
    (entry,) = ptx.kernels(code)
    taken = ptx.parse_report(path.with_suffix(".ptxas").read_text())
    name = entry.removesuffix("_mosaic_gpu_kernel")
    _compiled_by_mosaic[h] = _kernel(name, code, taken, int(dynamic))
  yield from (_compiled_by_mosaic[h] for h in hashes)


_compiled_by_mosaic: dict[str, Kernel] = {}  # By the hash of its module.


@contextlib.contextmanager
def _mosaic_dumps_to(dump: Path) -> Iterator[None]:
  """Mosaic reads its environment at every compilation. (Its call of nvdisasm may fail.)"""
  settings = {
    "MOSAIC_GPU_DUMP_PTX": "1",
    "MOSAIC_GPU_DUMP_PTXAS": "1",
    "MOSAIC_GPU_DUMP_TO": str(dump),
  }
  before = {name: os.environ.get(name) for name in settings}
  os.environ |= settings
  try:
    yield
  finally:
    for name, value in before.items():
      if value is None:
        del os.environ[name]
      else:
        os.environ[name] = value


def _first(pattern: str, text: str) -> str:
  """The group of the pattern's first match."""
  found = re.search(pattern, text)
  if not found:
    raise DevicelessError(f"what the compiler wrote has no {pattern!r}: {text[:160]!r}")
  return found[1]


def _kernel(name: str, code: str, taken: list[ptx.Report], dynamic_shared_bytes: int) -> Kernel:
  (report,) = taken
  return Kernel(
    name=name,
    arch=ptx.arch(code),
    registers=report.registers,
    stack_bytes=report.stack_bytes,
    spill_bytes=report.spill_store_bytes + report.spill_load_bytes,
    shared_bytes=report.shared_bytes + dynamic_shared_bytes,
    threads=ptx.threads(code),
    tensor_cores=ptx.count(code).tensor_cores,
    tensor_columns=ptx.tensor_columns(code),
  )
