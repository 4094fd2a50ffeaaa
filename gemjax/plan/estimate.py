"""How long a compiled program would take: a roofline along XLA's schedule. Never a measurement.

    kernel      2 us + max(matrix FLOPs / peak of their type, bytes / memory bandwidth) / reached
    collective  a latency + bytes / bandwidth of its slowest link / reached (rates.py), one at a
                time, beside the kernels that the schedule has between its start and its done

with the share of the datasheet's rates that an H100 reached. Loops count by their trips; those
whose trips only data tell count nothing (further rounds of an exchange, of which there are none as
a rule); of branches the costliest counts. XLA's own estimates serve less: there a scatter touches
its whole table, and loops take no time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple

from gemjax.plan import hlo
from gemjax.plan.collectives import Collective
from gemjax.plan.rates import KERNEL_SECONDS, Rates, link_seconds
from gemjax.plan.work import FREE, Work, multiplies, work

# What JAX's transformations, loops and the equations of products add to an op_name.
_WRAPPERS = re.compile(r"jit\([^()]*\)|\b(jvp|transpose|vmap|checkpoint|remat)\(|[()]")
_PLUMBING = re.compile(
  r".*->.*|shard_map|while|body|cond|closed_call|eval_jaxpr|checkpoint|rematted_computation"
  r"|branch_\d+_fun|custom_vjp_call.*"
)


class Operation(NamedTuple):
  """A kernel of the program."""

  name: str
  module: str
  seconds: float  # Of all its executions.
  trips: int
  work: Work  # Of one.

  @property
  def flops(self) -> int:
    return self.work.flops * self.trips


class Transfer(NamedTuple):
  """A collective on its links."""

  collective: Collective
  seconds: float  # Of all its executions.
  exposed: float  # In which the device had nothing else to do.


class Estimate(NamedTuple):
  """Of one run of the program."""

  seconds: float
  exposed: float  # Seconds in which a device only waits for links.
  operations: tuple[Operation, ...]
  transfers: tuple[Transfer, ...]
  costs: dict[str, float]  # Instruction -> seconds of one execution, of a collective on its links.

  def profile(self, queued: float = 1) -> str:
    """The costs in the form in which XLA's scheduler takes measured ones (ProfiledInstructionsProto
    as text), by which it hides more than by those it assumes itself.

    Args:
      queued: Collectives are given so many times their cost, for XLA believes that those which are
        under way at a time do not slow each other.
    """
    links = {t.collective.name for t in self.transfers}
    costs = {n: s * (queued if n in links else 1) for n, s in self.costs.items()}
    lines = (f'costs {{ name: "{n}" cost_us: {1e6 * s:.4f} }}' for n, s in costs.items())
    return "\n".join(lines) + "\n"

  def flops(self, dtype: str = "") -> int:
    """Matrix FLOPs on tensor cores, of operands whose type begins so."""
    return sum(o.flops for o in self.operations if o.work.tensor_cores
               and o.work.dtype.startswith(dtype))  # fmt: skip


def estimate(
  text: str,
  collectives: list[Collective],
  rates: Rates,
  gpus_per_host: int,
  kernel_flops: float = 0.0,
) -> Estimate:
  """Walks the scheduled `text` of a program.

  Args:
    text: `compiled.as_text()`.
    collectives: Of this text.
    rates: Of its GPU.
    gpus_per_host: Devices that NVLink joins.
    kernel_flops: Matrix FLOPs of the Pallas kernels of a run, whose loops follow the data; they
      are shared out by the bytes that those move which multiply.
  """
  return _Walk(hlo.parse(text), collectives, rates, gpus_per_host, kernel_flops).done()


def module_of(op_name: str) -> str:
  """The named scopes of an op_name, such as "wukong_layer/mlp", and whether it runs backward."""
  path = _WRAPPERS.sub("", op_name.split(":")[0]).split("/")[:-1]
  named = [part for part in path if part and not _PLUMBING.fullmatch(part)]
  backward = " (backward)" if "transpose(" in op_name else ""
  return ("/".join(dict.fromkeys(named)) or "step") + backward


class _Spent(NamedTuple):
  """Of one execution of a computation."""

  seconds: float
  exposed: float
  links: float  # While its collectives have them.


def _late(end: float, now: float, inside: _Spent) -> float:
  """When a transfer ends that would end at `end`, but has the links from `now` on only while what
  runs beside it has not.
  """
  return end if end <= now + inside.seconds - inside.links else end + inside.links


class _Walk:
  def __init__(self, module, collectives, rates: Rates, gpus_per_host: int, kernel_flops: float):
    self.module, self.rates = module, rates
    self.links: dict[str, float] = {}
    self.by_name: dict[str, Collective] = {c.name: c for c in collectives}
    for c in collectives:
      if self.by_name[c.name] is c:
        self.links[c.name] = link_seconds(c, rates, gpus_per_host)
    self.waits: dict[str, float] = dict.fromkeys(self.links, 0.0)
    self.costs = dict(self.links)
    self.operations: dict[str, Operation] = {}
    moved = sum(self._kernel_bytes(here) for here in hlo.reached(module))
    self.flops_a_byte = kernel_flops / moved if moved else 0.0

  def done(self) -> Estimate:
    spent = self._run(self.module.computations[self.module.entry], 1, "step")
    transfers = tuple(
      Transfer(c, 0.0 if c.dynamic else c.trips * self.links[name], self.waits[name])
      for name, c in self.by_name.items()
    )
    operations = tuple(self.operations.values())
    return Estimate(spent.seconds, spent.exposed, operations, transfers, self.costs)

  def _run(self, computation: hlo.Computation, trips: int, scope: str) -> _Spent:
    """Of one execution, of which the program has `trips`; what has no name belongs to the module
    `scope`.
    """
    now = free = exposed = links = 0.0
    ends: dict[str, tuple[float, str]] = {}  # Of starts and what passes them on.
    for ins in computation.instructions:
      chain = next((ends[o] for o in ins.operands if o in ends), None)
      wait = 0.0
      if ins.name in self.links:
        free, links = max(now, free) + self.links[ins.name], links + self.links[ins.name]
        if ins.opcode.endswith("-start") and self.by_name[ins.name].async_:
          ends[ins.name] = (free, ins.name)
        else:
          wait, name = free - now, ins.name
      elif chain and ins.opcode.endswith("-done"):
        wait, name = max(0.0, chain[0] - now), chain[1]
      elif chain and ins.opcode.endswith("-update"):
        ends[ins.name] = chain
      elif ins.opcode in ("while", "conditional", "call"):
        inside = self._control(ins, trips, scope)
        free = _late(free, now, inside)
        ends = {name: (_late(end, now, inside), start) for name, (end, start) in ends.items()}
        links += inside.links
        now, exposed = now + inside.seconds, exposed + inside.exposed
        self.costs[ins.name] = inside.seconds - inside.exposed
      elif ins.opcode not in FREE:
        now += self._kernel(computation, ins, trips, scope)
      if wait:
        now, exposed = now + wait, exposed + wait
        self.waits[name] += trips * wait
    return _Spent(now, exposed, links)

  def _control(self, ins: hlo.Instruction, trips: int, scope: str) -> _Spent:
    scope = module_of(ins.op_name) if ins.op_name else scope
    if ins.opcode == "while":
      turns = hlo.trip_count(ins) or 0
      if not turns:
        return _Spent(KERNEL_SECONDS, 0.0, 0.0)
      one = self._run(self._named(ins, "body")[0], trips * turns, scope)
      return _Spent(*(turns * x for x in one))
    names = ("branch_computations", "true_computation", "false_computation", "to_apply")
    return max(self._run(inner, trips, scope) for inner in self._named(ins, *names))

  def _named(self, ins: hlo.Instruction, *attributes: str) -> list[hlo.Computation]:
    return [self.module.computations[name] for name in ins.called(*attributes)]

  def _kernel(
    self, computation: hlo.Computation, ins: hlo.Instruction, trips: int, scope: str
  ) -> float:
    done = work(self.module, computation, ins)
    if not done.bytes:
      return 0.0
    if multiplies(ins):
      done = Work(int(self.flops_a_byte * done.bytes), "bf16", True, done.bytes)
    seconds = done.bytes / self.rates.memory
    if done.flops:
      seconds = max(seconds, done.flops / self.rates.flops[done.dtype])
    seconds = KERNEL_SECONDS + seconds / self.rates.reached
    name = module_of(ins.op_name) if ins.op_name else scope
    self.operations[ins.name] = Operation(ins.name, name, trips * seconds, trips, done)
    self.costs[ins.name] = seconds
    return seconds

  def _kernel_bytes(self, here: hlo.Reached) -> int:
    kernels = [i for i in here.computation.instructions if multiplies(i)]
    each = [work(self.module, here.computation, i).bytes for i in kernels]
    return 0 if here.dynamic else here.trips * sum(each)


def by_module(operations: tuple[Operation, ...]) -> Mapping[str, float]:
  """Module -> seconds, the costliest first."""
  found: dict[str, float] = {}
  for o in operations:
    found[o.module] = found.get(o.module, 0.0) + o.seconds
  return dict(sorted(found.items(), key=lambda item: -item[1]))
