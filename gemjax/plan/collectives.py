"""The collectives of a compiled program: what travels, along which mesh axis, hidden or not.

Axes are named by position: device p of the program is `mesh.devices.flat[p]`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import NamedTuple

import numpy as np

from gemjax.plan import hlo
from gemjax.plan.target import PlanError

KINDS = (
  "all-gather",
  "all-reduce",
  "all-to-all",
  "collective-broadcast",
  "collective-permute",
  "ragged-all-to-all",
  "reduce-scatter",
)
_MATMUL = re.compile(r"matmul|gemm|^dot$|cudnn")

Groups = tuple[tuple[int, ...], ...]


class Collective(NamedTuple):
  """One collective of the program, as one device sees it in one execution.

  `bytes` is what a device receives, from S bytes of operands in a group of n devices:

    all-gather           (n - 1) S
    reduce-scatter       (n - 1) / n S
    all-reduce           2 (n - 1) / n S     ring: a reduce-scatter, then an all-gather
    all-to-all           (n - 1) / n S       its own share stays
    ragged-all-to-all    (n - 1) / n S       the most that fits; lengths are known at run time
    collective-permute   S, or 0 if every device sends to itself
    collective-broadcast S, or 0 for n = 1

  A collective over several arrays counts them all. Everything a step moves through `c` is
  `c.bytes * c.trips`, unless `c.dynamic`.
  """

  kind: str  # One of KINDS.
  bytes: int
  axes: tuple[str, ...]  # The mesh axes along which the members of a group differ.
  groups: Groups  # Device positions; of a collective-permute its (source, target) pairs.
  async_: bool  # Compute may run between start and done; XLA did not make it synchronous.
  overlapped_ops: dict[str, int]  # Scheduled in between, by custom-call target or opcode.
  trips: int  # Executions in one run of the program: product of the loops' trip counts.
  dynamic: bool  # In a branch or in a loop of unknown count: runs `trips` times each turn.
  name: str
  op_name: str  # Where in the JAX program, e.g. "jit(step)/shard_map/all_to_all".

  @property
  def matmuls(self) -> int:
    """Matrix products scheduled between start and done."""
    return sum(n for op, n in self.overlapped_ops.items() if _MATMUL.search(op))


def collectives(text: str, mesh_shape: Mapping[str, int]) -> list[Collective]:
  """All collectives in `compiled.as_text()`, for a mesh such as {"data": 16, "model": 8}.

  Raises PlanError if the mesh has another number of devices than the program, or if a
  collective is written in a way that is not understood: none is passed over.
  """
  module = hlo.parse(text)
  if np.prod([*mesh_shape.values()], dtype=int) != module.partitions:
    raise PlanError(
      f"the mesh {dict(mesh_shape)} and module {module.name}, compiled for {module.partitions} "
      "devices, differ in size"
    )
  found = []
  for here in hlo.reached(module):
    for at, ins in enumerate(here.computation.instructions):
      inner = list(_communications(module, here.computation, ins))
      if not inner:
        continue
      starts = ins.opcode.endswith("-start")
      ops = _overlapped(module, here.computation.instructions, at) if starts else Counter()
      for kind, each, operand_bytes in inner:
        groups = parse_groups(each.attributes, kind, module.partitions)
        found.append(
          Collective(
            kind,
            _wire_bytes(kind, operand_bytes, groups),
            _axes(groups, mesh_shape),
            groups,
            starts and '"is_sync":true' not in ins.attributes,
            dict(ops),
            here.trips,
            here.dynamic,
            ins.name,
            each.op_name or ins.op_name,
          )
        )
  return found


def parse_groups(attributes: str, kind: str, devices: int) -> Groups:
  """Device groups (or source-target pairs) among the attributes of a collective.

  Reads {{0,1},{2,3}}, the iota forms [2,4]<=[8] and [2,4]<=[4,2]T(1,0) (an arange of the right
  shape, transposed, reshaped to the left one), the mesh form mesh['a'=2,'b'=4], device_ids=(IOTA)
  {'b'} (groups along the axes in braces), and {}, which is one group of all.
  """
  if kind == "collective-permute":
    pairs = re.search(r"source_target_pairs=\{((?:\{\d+,\d+\},?)*)\}", attributes)
    if not pairs:
      raise PlanError(f"a collective-permute has no source_target_pairs: {attributes[:160]!r}")
    return _braces(pairs[1])
  everyone = (tuple(range(devices)),)
  by_partition = kind in ("all-to-all", "collective-broadcast", "ragged-all-to-all")
  if not by_partition and "use_global_device_ids=true" not in attributes:
    # Groups are of replicas, of which there is one: with a channel all its partitions take part.
    return everyone if "channel_id=" in attributes else tuple((i,) for i in range(devices))
  explicit = re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", attributes)
  if explicit:
    return _braces(explicit[1]) or everyone
  if named := re.search(r"replica_groups=mesh\[([^\]]*)\](.*?)\{([^}]*)\}", attributes):
    return _along_axes(named[1], named[2], named[3])
  iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
  if not iota:
    raise PlanError(f"the groups of {kind} are written in an unknown form: {attributes[:160]!r}")
  shape, dims, order = (_numbers(part or "") for part in iota.groups())
  ids = np.arange(np.prod(dims)).reshape(dims)
  ids = (ids.transpose(order) if order else ids).reshape(shape)
  return tuple(tuple(row) for row in ids.tolist())


def _along_axes(axes: str, ids: str, along: str) -> Groups:
  """Groups of a mesh with the named sizes `axes`, along the names `along`."""
  sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
  order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", ids)
  grid = np.arange(np.prod(list(sizes.values())))
  if order:
    grid = grid.reshape(_numbers(order[1]))
    grid = grid.transpose(_numbers(order[2])) if order[2] else grid
  grid = grid.reshape(list(sizes.values()))
  inside = [list(sizes).index(name) for name in re.findall(r"'([^']*)'", along)]
  outside = [i for i in range(len(sizes)) if i not in inside]
  count = int(np.prod([grid.shape[i] for i in inside]))
  rows = grid.transpose(outside + inside).reshape(-1, count)
  return tuple(tuple(row) for row in rows.tolist())


def _communications(
  module: hlo.Module, computation: hlo.Computation, ins: hlo.Instruction
) -> Iterator[tuple[str, hlo.Instruction, int]]:
  """(kind, instruction, operand bytes) of `ins`, or of what it wraps (async-start, a fusion)."""
  kind = ins.opcode.removesuffix("-start")
  if kind in KINDS:
    arrays = computation.named()
    operands = ins.operands[:1] if kind == "ragged-all-to-all" else ins.operands
    yield kind, ins, sum(s.bytes for name in operands for s in arrays[name].shapes)
  elif kind in ("send", "recv") and "is_host_transfer=true" not in ins.attributes:
    raise PlanError(f"{ins.name} is a {kind} between devices, whose bytes cannot be told")
  elif kind in ("async", "fusion"):
    for name in ins.called("calls"):
      inside = module.computations[name]
      for wrapped in inside.instructions:
        yield from _communications(module, inside, wrapped)


def _overlapped(
  module: hlo.Module, instructions: tuple[hlo.Instruction, ...], at: int
) -> Counter[str]:
  """What is scheduled between the start at index `at` and its done."""
  start, ops = instructions[at], Counter()
  chain = {start.name}
  for ins in instructions[at + 1 :]:
    if chain.intersection(ins.operands):
      if ins.opcode.endswith("-done"):
        return ops
      chain.add(ins.name)
    ops += _work(module, ins)
  raise PlanError(f"{start.name} has no done in its computation")


def _work(module: hlo.Module, ins: hlo.Instruction) -> Counter[str]:
  """The operations `ins` stands for: a loop or branch stands for what is inside."""
  if ins.opcode in ("while", "conditional", "call"):
    names = ins.called(
      "body", "branch_computations", "true_computation", "false_computation", "to_apply"
    )
    ops = Counter()
    for name in names:
      for inner in module.computations[name].instructions:
        ops += _work(module, inner)
    turns = (hlo.trip_count(ins) or 1) if ins.opcode == "while" else 1
    return Counter({op: n * turns for op, n in ops.items()})
  opcode = ins.opcode
  if opcode in hlo.NAMES or opcode in KINDS or re.search(r"-(start|update|done)$", opcode):
    return Counter()
  if opcode == "custom-call":
    target = re.search(r'custom_call_target="([^"]*)"', ins.attributes)
    return Counter({target[1] if target else opcode: 1})
  return Counter({opcode: 1})


def _wire_bytes(kind: str, operand_bytes: int, groups: Groups) -> int:
  if kind == "collective-permute":
    return operand_bytes if any(a != b for a, b in groups) else 0
  n = max(len(g) for g in groups)
  if kind == "all-gather":
    return (n - 1) * operand_bytes
  if kind == "collective-broadcast":
    return operand_bytes if n > 1 else 0
  return (2 if kind == "all-reduce" else 1) * (n - 1) * operand_bytes // n


def _axes(groups: Groups, mesh_shape: Mapping[str, int]) -> tuple[str, ...]:
  sizes = tuple(mesh_shape.values())
  spans = np.zeros(len(sizes), bool)
  for group in groups:
    at = np.stack(np.unravel_index(np.array(group), sizes))
    spans |= (at != at[:, :1]).any(axis=1)
  return tuple(name for name, spanned in zip(mesh_shape, spans) if spanned)


def _braces(text: str) -> Groups:
  return tuple(_numbers(group) for group in re.findall(r"\{([\d,]+)\}", text))


def _numbers(text: str) -> tuple[int, ...]:
  return tuple(int(n) for n in text.split(",") if n)
