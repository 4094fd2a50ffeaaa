"""The machine code of a compiled program: how its scatters add, what its tensor cores get."""

from __future__ import annotations

import importlib.util
import math
import re
import subprocess
from pathlib import Path
from typing import NamedTuple

from pallas_kernels.deviceless.target import DevicelessError


class Code(NamedTuple):
  """Instructions counted in the text of one PTX file (a loop's once)."""

  kernels: tuple[str, ...]
  cas: int  # Compare-and-swap: a scatter that retries until nobody else wrote the same word.
  adds: int  # Atomic additions of the memory system, `red` or `atom`.
  vector_adds: int  # Of these, such as add two or more numbers (.v2, .v4, bf16x2).
  mma: int  # Tensor-core products of Ampere's form, mma.sync and wmma.
  wgmma: int  # Of Hopper's, by a group of warps.
  tcgen05: int  # Of Blackwell's.
  fp8: int  # Any instruction on e4m3 or e5m2 numbers, conversions too.

  @property
  def tensor_cores(self) -> int:
    return self.mma + self.wgmma + self.tcgen05


class Report(NamedTuple):
  """What ptxas says of one kernel."""

  kernel: str
  registers: int
  stack_bytes: int
  spill_store_bytes: int
  spill_load_bytes: int
  shared_bytes: int  # Static; what a launch asks for dynamically is not known here.


def scan(dump: str | Path, module: str = "*") -> dict[Path, Code]:
  """Counts for every PTX file of the folder that XLA dumped to (`xla_dump_to`).

  `module` is the program's name, such as "jit_step" (a glob). DevicelessError if there is no
  file, for then nothing has been checked.
  """
  files = sorted(Path(dump).glob(f"module_*.{module}.*ptx"))
  if not files:
    raise DevicelessError(
      f"{dump} holds no PTX of a program named {module!r}: was it compiled there?"
    )
  return {f: count(f.read_text()) for f in files}


def cas_loops(dump: str | Path, module: str = "*") -> list[str]:
  """Names of the kernels that compare and swap; should be empty."""
  return [k for code in scan(dump, module).values() if code.cas for k in code.kernels]


def count(text: str) -> Code:
  """Counts the instructions of one PTX file."""
  # A statement ends with a semicolon; braces group statements (and registers, which start with %).
  words = [
    re.sub(r"^(@!?%\w+\s+)", "", s.strip()).split(maxsplit=1)
    for s in re.split(r"[;{}\n]", re.sub(r"//.*", "", text))
  ]
  ops = [w[0].split(".") for w in words if w and re.match(r"[a-z]\w*(\.|$)", w[0])]
  atomic = [op for op in ops if op[0] in ("atom", "red")]
  adds = [op for op in atomic if "add" in op]
  wide = re.compile(r"v[248]$|bf?16x2$|f16x2$")
  return Code(
    kernels=kernels(text),
    cas=sum("cas" in op for op in atomic),
    adds=len(adds),
    vector_adds=sum(any(wide.match(part) for part in op) for op in adds),
    mma=sum(op[0] in ("mma", "wmma") and "mma" in op[:2] for op in ops),
    wgmma=sum(op[:2] == ["wgmma", "mma_async"] for op in ops),
    tcgen05=sum(op[:2] == ["tcgen05", "mma"] for op in ops),
    fp8=sum(any(part.startswith(("e4m3", "e5m2")) for part in op) for op in ops),
  )


def kernels(text: str) -> tuple[str, ...]:
  """Names of the kernels of a PTX text."""
  return tuple(re.findall(r"\.entry\s+([\w$]+)", text))


def arch(text: str) -> str:
  """The GPU that a PTX text is written for, such as "sm_90a"."""
  found = re.search(r"^\.target\s+(\w+)", text, re.MULTILINE)
  if not found:
    raise DevicelessError("the text names no .target, so it is no PTX")
  return found[1]


def threads(text: str) -> int:
  """Threads of a block of the kernel in a PTX text: those it requires, or the most it allows."""
  found = re.search(r"^\.(?:req|max)ntid\s+(\d+),\s*(\d+),\s*(\d+)", text, re.MULTILINE)
  if not found:
    raise DevicelessError("the PTX does not say how many threads a block has")
  return math.prod(map(int, found.groups()))


def tensor_columns(text: str) -> int:
  """Columns of tensor memory that a block of the kernel in a PTX text allocates (sm_100a)."""
  return sum(map(int, re.findall(r"tcgen05\.alloc\.[^;\]]*\],\s*(\d+);", text)))


def ptxas(path: str | Path) -> list[Report]:
  """Compiles a PTX file with the ptxas of the CUDA wheels, for the GPU that it is written for."""
  done = subprocess.run(
    [_program(), "-v", f"-arch={arch(Path(path).read_text())}", str(path), "-o", "/dev/null"],
    capture_output=True,
    text=True,
  )
  if done.returncode:
    raise DevicelessError(f"ptxas refuses {path}: {done.stderr.strip().splitlines()[-1]}")
  return parse_report(done.stderr)


def parse_report(text: str) -> list[Report]:
  """Reads the output of `ptxas -v`."""
  found = []
  for part in re.split(r"Compiling entry function", text)[1:]:
    found.append(
      Report(
        re.search(r"'([^']+)'", part)[1],
        *(
          int((re.search(pattern, part) or ["", "0"])[1])
          for pattern in (
            r"Used (\d+) registers",
            r"(\d+) bytes stack frame",
            r"(\d+) bytes spill stores",
            r"(\d+) bytes spill loads",
            r"(\d+) bytes smem",
          )
        ),
      )
    )
  return found


def _program() -> str:
  spec = importlib.util.find_spec("nvidia")
  for folder in spec.submodule_search_locations if spec else []:
    for part in ("cuda_nvcc", "cu13"):  # Of CUDA 12 and 13.
      program = Path(folder, part, "bin", "ptxas")
      if program.exists():
        return str(program)
  raise DevicelessError('ptxas comes with the CUDA wheels: pip install "gemjax[cuda12]"')
