"""The memory of a compiled program: how much a device holds, and whether a table is held twice.

Two witnesses. The text of the program (`buffers_like`) shows every instruction that writes a
whole array, even in place: a dense update of a table. XLA's buffer assignment (`allocations`)
shows what is really allocated.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from gemjax.plan import hlo
from gemjax.plan.target import PlanError

# They name or carry a buffer that another instruction has made. The start of an asynchronous
# operation names its operands and its result; the result is counted at the done.
_CARRIERS = {
  "bitcast",
  "call",
  "conditional",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "tuple",
  "while",
}
_IN_PLACE = {"scatter", "dynamic-update-slice"}


class Memory(NamedTuple):
  """Bytes of one device. An aliased output lies in a donated argument."""

  arguments: int
  outputs: int
  aliased: int
  temporaries: int
  code: int

  @property
  def total(self) -> int:
    return self.arguments + self.outputs - self.aliased + self.temporaries + self.code


class Buffer(NamedTuple):
  """An array that an instruction of the program writes."""

  name: str
  opcode: str
  shape: hlo.Shape
  op_name: str


class Value(NamedTuple):
  """What lies in an allocation for a while. A tuple (of pointers) has no shape."""

  name: str
  bytes: int
  offset: int
  shape: hlo.Shape | None


class Allocation(NamedTuple):
  """One piece of device memory. A `parameter` that is `live_out` holds an output too: aliased."""

  index: int
  kind: str  # parameter | output | temporary | constant | thread-local
  bytes: int
  parameter: int | None
  live_out: bool
  values: tuple[Value, ...]


def memory(compiled: Any) -> Memory:
  """What `compiled.memory_analysis()` says of one device."""
  m = compiled.memory_analysis()
  if m is None:
    raise PlanError("the compiler gives no memory analysis for this program")
  return Memory(
    m.argument_size_in_bytes,
    m.output_size_in_bytes,
    m.alias_size_in_bytes,
    m.temp_size_in_bytes,
    m.generated_code_size_in_bytes,
  )


def temporary_shapes(text: str) -> list[Buffer]:
  """Every array an instruction of the program makes, parameters and mere names for one left out.

  Loop bodies and branches are looked into, fusions are not: inside them nothing is materialised.
  """
  return [buffer for buffer, _ in _written(hlo.parse(text))]


def buffers_like(text: str, rows: Collection[int]) -> list[Buffer]:
  """Arrays with a dimension in `rows` that the program writes as a whole; should be empty.

  Give the rows of every table, global and per device. A scatter or dynamic-update-slice, bare or
  as the end of a fusion whose parameter it updates, and a custom call that aliases its operand
  write only some rows of a buffer that is there already: a parameter, or else another
  instruction has made it and is found. So a dense gradient (a broadcast of zeros), a copy, a
  dense optimiser update and a gather of all shards are found.
  """
  return [
    buffer
    for buffer, in_place in _written(hlo.parse(text))
    if not in_place and not set(rows).isdisjoint(buffer.shape.dims)
  ]


def largest_buffers(text: str) -> list[Buffer]:
  """Arrays that the program writes as a whole, the largest first; not all live at one time."""
  found = [buffer for buffer, in_place in _written(hlo.parse(text)) if not in_place]
  return sorted(found, key=lambda b: -b.shape.bytes)


def allocations(dump: str | Path, module: str = "*") -> list[Allocation]:
  """XLA's buffer assignment from the folder given to `environment(dump)`.

  `module` is the program's name, such as "jit_step" (a glob), where several were compiled;
  PlanError unless exactly one program has that name.
  """
  files = sorted(Path(dump).glob(f"module_*.{module}.*buffer-assignment.txt"))
  if len(files) != 1:
    raise PlanError(
      f"{dump} holds {len(files)} buffer assignments of programs named {module!r}, must be 1: "
      f"{[f.name for f in files]}"
    )
  return parse_allocations(files[0].read_text())


def parse_allocations(text: str) -> list[Allocation]:
  """Reads the text of a buffer assignment."""
  found: list[Allocation] = []
  for line in text.splitlines():
    head = re.match(r"allocation (\d+): size (\d+)(.*):$", line)
    value = re.match(r" value: <\d+ (.+) @\d+> \(size=(\d+),offset=(\d+)\): (.*)$", line)
    if head:
      number = re.search(r"\bparameter (\d+)", head[3])
      live_out = "maybe-live-out" in head[3]
      kind = (
        "parameter"
        if number
        else next((k for k in ("constant", "thread-local") if f", {k}" in head[3]), None)
        or ("output" if live_out else "temporary")
      )
      parameter = int(number[1]) if number else None
      found.append(Allocation(int(head[1]), kind, int(head[2]), parameter, live_out, ()))
    elif value and found:
      shapes = () if value[4].startswith("(") else hlo.shapes(value[4])
      made = Value(value[1], int(value[2]), int(value[3]), shapes[0] if shapes else None)
      found[-1] = found[-1]._replace(values=(*found[-1].values, made))
    elif line.startswith(" value:"):
      raise PlanError(f"a line of the buffer assignment is not understood: {line[:160]!r}")
    elif found and not line.startswith(" "):
      break  # Behind the allocations come totals and the uses of each value.
  if not found:
    raise PlanError("the text of the buffer assignment holds no allocation")
  return found


def allocated_like(found: list[Allocation], rows: Collection[int]) -> list[Value]:
  """Values with a dimension in `rows` that lie outside the parameters; should be empty."""
  return [
    v
    for a in found
    if a.kind != "parameter"
    for v in a.values
    if v.shape and not set(rows).isdisjoint(v.shape.dims)
  ]


def _written(module: hlo.Module) -> Iterator[tuple[Buffer, bool]]:
  """Every array that is written, and whether only a part of it, in place."""
  for here in hlo.reached(module):
    for ins in here.computation.instructions:
      if ins.opcode in _CARRIERS or ins.opcode.endswith(("-start", "-update")):
        continue
      for leaf, shape in enumerate(ins.shapes):
        buffer = Buffer(ins.name, ins.opcode, shape, ins.op_name)
        yield buffer, _is_in_place(module, ins, leaf)


def _is_in_place(module: hlo.Module, ins: hlo.Instruction, leaf: int) -> bool:
  if ins.opcode in _IN_PLACE:
    return True
  if ins.opcode == "custom-call":
    return leaf in ins.aliases
  if ins.opcode != "fusion":
    return False
  inside = module.computations[ins.called("calls")[0]]
  made = inside.root
  if made.opcode == "tuple":
    made = inside.named()[made.operands[leaf]]
  made = _behind_names(inside, made)
  return (
    made.opcode in _IN_PLACE
    and _behind_names(inside, inside.named()[made.operands[0]]).opcode == "parameter"
  )


def _behind_names(computation: hlo.Computation, ins: hlo.Instruction) -> hlo.Instruction:
  while ins.opcode in ("bitcast", "get-tuple-element"):
    ins = computation.named()[ins.operands[0]]
  return ins
