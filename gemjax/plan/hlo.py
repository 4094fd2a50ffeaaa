"""The text of a compiled HLO module, read into instructions.

Of an instruction only its shapes, opcode, operands and raw attributes are kept. In a scheduled
module the order of the text is the order of execution.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import NamedTuple

from gemjax.plan.target import PlanError

# They make no kernel.
NAMES = {
  "after-all",
  "bitcast",
  "constant",
  "get-tuple-element",
  "opt-barrier",
  "parameter",
  "partition-id",
  "tuple",
}


class Shape(NamedTuple):
  """An array's type, e.g. Shape("bf16", (512, 64))."""

  dtype: str
  dims: tuple[int, ...]

  @property
  def bytes(self) -> int:
    """Product of the dims times the bits that the dtype's name tells, in whole bytes."""
    bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or ["0"])[0])
    for d in self.dims:
      bits *= d
    return (bits + 7) // 8


_ALIAS = re.compile(r"\{(\d*)\}: \((\d+), ")


class Instruction(NamedTuple):
  """One line. `shapes` are the leaves of the result, from left to right."""

  name: str
  shapes: tuple[Shape, ...]
  opcode: str
  operands: tuple[str, ...]
  attributes: str
  root: bool

  @property
  def op_name(self) -> str:
    """Where in the JAX program it comes from, e.g. "jit(step)/shard_map/all_to_all"."""
    return _first(r'op_name="([^"]*)"', self.attributes) or ""

  @property
  def aliases(self) -> dict[int, int]:
    """Leaf of the result -> the operand whose memory a custom call writes it into."""
    text = self.attributes.partition("output_to_operand_aliasing=")[2]
    return {int(leaf or 0): int(operand) for leaf, operand in _ALIAS.findall(text)}

  def called(self, *attributes: str) -> list[str]:
    """Names of the computations that the given attributes (`body`, `calls`, ...) refer to."""
    found = []
    for attribute in attributes:
      for one, many in re.findall(rf"\b{attribute}=(?:%([^\s,]+)|{{([^}}]*)}})", self.attributes):
        found += [one] if one else re.findall(r"%([^\s,]+)", many)
    return found


class Computation(NamedTuple):
  """Instructions in the order of execution."""

  name: str
  instructions: tuple[Instruction, ...]

  @property
  def root(self) -> Instruction:
    return next(i for i in self.instructions if i.root)

  def named(self) -> dict[str, Instruction]:
    return {i.name: i for i in self.instructions}


class Module(NamedTuple):
  """All computations of a program for one of `partitions` devices."""

  name: str
  partitions: int
  entry: str
  computations: dict[str, Computation]


class Reached(NamedTuple):
  """A computation whose instructions the device runs one by one (so not the inside of a fusion).

  `trips` is the product of the known trip counts of the loops around it. `dynamic` says that it
  also lies in a loop whose count the compiler does not know, or in a branch.
  """

  computation: Computation
  trips: int
  dynamic: bool


def shapes(text: str) -> tuple[Shape, ...]:
  """Array types in a type's text: "(f32[2,3]{1,0}, s32[])" has two. (A token has no bytes.)"""
  text = re.sub(r"/\*.*?\*/", "", text)
  found = re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", text)
  return tuple(
    Shape(dtype, tuple(int(d.strip(" <=")) for d in dims.split(",") if d)) for dtype, dims in found
  )


def parse(text: str) -> Module:
  """Reads `compiled.as_text()`; PlanError if it is not a scheduled module."""
  header = text[: text.find("\n")]
  if not header.startswith("HloModule ") or "is_scheduled=true" not in header:
    raise PlanError(f"not the text of a scheduled HLO module, but {header[:80]!r}")
  if int(_first(r"\breplica_count=(\d+)", header) or 1) != 1:
    raise PlanError("the module has replicas (pmap): only programs of jit can be read")
  computations, name, entry, lines = {}, "", "", []
  for line in text.splitlines():
    head = re.match(r"(ENTRY )?%(\S+) \(.*\{$", line)
    if head:
      name, lines = head[2], []
      entry = name if head[1] else entry
    elif line == "}" and name:
      computations[name] = Computation(name, tuple(lines))
      name = ""
    elif name:
      lines.append(_instruction(line))
  if entry not in computations:
    raise PlanError(f"the text of module {header[:80]!r} has no whole entry computation")
  partitions = int(_first(r"\bnum_partitions=(\d+)", header) or 1)
  return Module(header.split()[1].rstrip(","), partitions, entry, computations)


def reached(module: Module) -> Iterator[Reached]:
  """Every computation that runs instruction by instruction, once per place that calls it."""
  todo = [Reached(module.computations[module.entry], 1, False)]
  while todo:
    here = todo.pop()
    yield here
    for ins in here.computation.instructions:
      trips, dynamic = here.trips, here.dynamic
      if ins.opcode == "while":
        names, known = ins.called("body", "condition"), trip_count(ins)
        trips, dynamic = trips * (known or 1), dynamic or known is None
      elif ins.opcode == "conditional":
        names = ins.called("branch_computations", "true_computation", "false_computation")
        dynamic = True
      else:
        names = ins.called("to_apply") if ins.opcode == "call" else []
      todo += [Reached(module.computations[n], trips, dynamic) for n in names]


def trip_count(loop: Instruction) -> int | None:
  """How often a `while` turns, where the compiler knows it."""
  known = _first(r'"known_trip_count":\{"n":"(\d+)"', loop.attributes)
  return None if known is None else int(known)


def _instruction(line: str) -> Instruction:
  head = re.match(r"\s+(ROOT )?%(\S+) = ", line)
  if not head:
    raise PlanError(f"a line of the HLO text is not an instruction: {line.strip()[:120]!r}")
  rest = line[head.end() :]
  end = _closing(rest) if rest.startswith("(") else rest.index(" ")
  type_text, rest = rest[:end], rest[end:].lstrip()
  opcode, rest = rest[: rest.index("(")], rest[rest.index("(") :]
  end = _closing(rest)
  operands = tuple(re.findall(r"%([^\s,()]+)", rest[:end]))
  return Instruction(head[2], shapes(type_text), opcode, operands, rest[end:], bool(head[1]))


def _closing(text: str) -> int:
  """Index behind the bracket that closes the one `text` begins with; quotes are skipped."""
  depth, quoted = 0, False
  for i, c in enumerate(text):
    if c == '"' and text[i - 1] != "\\":
      quoted = not quoted
    elif not quoted and c in "()":
      depth += 1 if c == "(" else -1
      if not depth:
        return i + 1
  raise PlanError(f"a bracket of the HLO text is not closed: {text[:120]!r}")


def _first(pattern: str, text: str) -> str | None:
  match = re.search(pattern, text)
  return match[1] if match else None
