"""Where a process stands among those of its run, read from its environment.

The first of these that is there decides, whole:

  1. JAX_COORDINATOR_ADDRESS=HOST:PORT, JAX_NUM_PROCESSES, JAX_PROCESS_ID. In a pod of an indexed
     job of Kubernetes JOB_COMPLETION_INDEX stands for the last where it is absent. GEMJAX_HOSTS
     may name the hosts, comma-separated, each with equally many consecutive processes.
  2. A step of Slurm, thus a process of `srun`: SLURM_PROCID and SLURM_STEP_*. A batch script
     itself is no step, and trains alone.
  3. Nothing: the process is alone.

Sources: Slurm's srun(1), "OUTPUT ENVIRONMENT VARIABLES"; Kubernetes, "Indexed Job".
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"
HOSTS = "GEMJAX_HOSTS"
POD = "JOB_COMPLETION_INDEX"
# Above the ports that Linux gives to clients, 32,768 to 60,999.
FIRST_PORT, PORTS = 61_440, 4_096


class ProcessError(RuntimeError):
  """A process that cannot find, or has lost, the others of its run."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Place:
  """One of `count` processes; the first one is reached at `address`."""

  index: int = 0
  count: int = 1
  address: str = ""  # HOST:PORT
  source: str = "alone"  # Who said so.
  hosts: tuple[str, ...] = ()  # Of every process, where they are known.
  devices: tuple[int, ...] | None = None  # Of the visible GPUs these; None: all.

  def name(self, index: int, host: str = "") -> str:
    """How a person calls process `index`; `host` is where it said that it runs."""
    host = host or (self.hosts[index] if self.hosts else "")
    return f"rank {index} ({host})" if host else f"rank {index}"


def resolve(environ: Mapping[str, str]) -> Place:
  """This process' place.

  Raises:
    ProcessError: variables that are missing or contradict each other.
  """
  if any(name in environ for name in (ADDRESS, COUNT, INDEX)):
    return _named(environ)
  if "SLURM_PROCID" in environ and "SLURM_STEP_NODELIST" in environ:
    return _slurm(environ)
  return Place()


def visible_gpus(environ: Mapping[str, str]) -> list[str] | None:
  """The names in CUDA_VISIBLE_DEVICES; none behind one that hides GPUs. None: it is not set.

  Source: CUDA's programming guide: an invalid index hides itself and all behind it, so that -1 is
  the usual way to hide all; Slurm writes NoDevFiles.
  """
  if "CUDA_VISIBLE_DEVICES" not in environ:
    return None
  names = (name.strip() for name in environ["CUDA_VISIBLE_DEVICES"].split(","))
  return list(itertools.takewhile(lambda name: name not in ("", "-1", "NoDevFiles"), names))


def expand_hosts(text: str) -> list[str]:
  """Slurm's list of hosts: `node[001-003,007],login` -> node001, node002, node003, node007, login.

  Raises:
    ProcessError: it is no such list.
  """
  hosts = []
  # Commas inside of brackets do not separate hosts.
  for part in re.findall(r"(?:[^,\[\]]|\[[^\]]*\])+", text):
    pieces = re.split(r"\[([^\]]*)\]", part)
    choices = [[p] if i % 2 == 0 else _numbers(p, text) for i, p in enumerate(pieces)]
    hosts += ["".join(name) for name in itertools.product(*choices)]
  if not hosts:
    raise ProcessError(f"SLURM_STEP_NODELIST is {text!r}, which names no host")
  return hosts


def split_address(address: str) -> tuple[str, int]:
  """(host, port) of HOST:PORT; raises ProcessError where it is none."""
  host, _, port = address.rpartition(":")
  if not host or not port.isdigit() or not 0 < int(port) < 1 << 16:
    raise ProcessError(f"{ADDRESS} is {address!r}, but must be HOST:PORT")
  return host.strip("[]"), int(port)


def _named(environ: Mapping[str, str]) -> Place:
  names = (ADDRESS, COUNT, INDEX)
  given = {name: environ[name] for name in names if name in environ}
  source = "JAX_*"
  if INDEX not in given and POD in environ:
    given[INDEX], source = environ[POD], f"JAX_*, {POD}"
  address, count, index = (given.get(name, "") for name in names)
  if len(given) < len(names) or not (count.isdigit() and index.isdigit()):
    raise ProcessError(f"a run of several processes needs all of {', '.join(names)}; got {given}")
  if int(index) >= int(count):
    raise ProcessError(f"{INDEX} is {index}, but must be below {COUNT}, {count}")
  split_address(address)
  hosts = tuple(filter(None, environ.get(HOSTS, "").split(",")))
  pod = re.fullmatch(r"(.*-)0(\..*)?", address.rpartition(":")[0])
  if not hosts and source != "JAX_*" and pod:
    # Pods of an indexed job differ in the number at the end of their names.
    hosts = tuple(f"{pod[1]}{i}" for i in range(int(count)))
  if hosts and int(count) % len(hosts):
    raise ProcessError(f"{HOSTS} names {len(hosts)} hosts, which {COUNT}, {count}, must divide by")
  each = int(count) // max(1, len(hosts))
  return Place(
    index=int(index),
    count=int(count),
    address=address,
    source=source,
    hosts=tuple(host for host in hosts for _ in range(each)),
  )


def _slurm(environ: Mapping[str, str]) -> Place:
  def number(name: str) -> int:
    if not environ.get(name, "").isdigit():
      raise ProcessError(f"{name} is {environ.get(name)!r} in a step of Slurm; start with srun")
    return int(environ[name])

  index, count, local = (
    number(f"SLURM_{name}") for name in ("PROCID", "STEP_NUM_TASKS", "LOCALID")
  )
  nodes = expand_hosts(environ["SLURM_STEP_NODELIST"])
  tasks = _tasks(environ.get("SLURM_STEP_TASKS_PER_NODE", ""))
  blocks = environ.get("SLURM_DISTRIBUTION", "block").startswith("block")
  hosts = [node for node, n in zip(nodes, tasks) for _ in range(n)] if blocks else []
  node = number("SLURM_NODEID")
  # Steps of one job, and jobs of one node, shall not meet.
  port = FIRST_PORT + (number("SLURM_JOB_ID") * 16 + number("SLURM_STEP_ID")) % PORTS
  return Place(
    index=index,
    count=count,
    address=f"{nodes[0]}:{port}",
    source="Slurm",
    hosts=tuple(hosts) if len(hosts) == count else (),
    devices=_own_gpus(environ, local, tasks[node] if node < len(tasks) else 1),
  )


def _own_gpus(environ: Mapping[str, str], local: int, tasks: int) -> tuple[int, ...] | None:
  """Which of the visible GPUs are this task's, the `local`-th of `tasks` on its node.

  Slurm shows a task its own GPUs alone (`--gpus-per-task`, `--gpu-bind`), or all of the node's
  (`--gpus-per-node`, `--gres`): only in the second case they have to be divided here.
  """
  visible = visible_gpus(environ)
  if visible is None:
    return None
  seen = len(visible)
  asked = re.search(r"(\d+)$", environ.get("SLURM_GPUS_PER_TASK", ""))
  on_node = environ.get("SLURM_GPUS_ON_NODE", "")
  due = int(asked[1]) if asked else (int(on_node) if on_node.isdigit() else seen) // tasks
  if seen <= max(1, due):
    return None
  if not due:
    raise ProcessError(
      f"{tasks} tasks of Slurm share {seen} GPUs of a node; start one a GPU (--ntasks-per-node="
      f"{seen}) or one a node"
    )
  return tuple(range(local * due, (local + 1) * due))


def _tasks(text: str) -> list[int]:
  """Slurm's tasks of every node: `4(x2),3` -> 4, 4, 3."""
  found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
  return [int(n) for n, times in found for _ in range(int(times or 1))]


def _numbers(text: str, whole: str) -> list[str]:
  """`001-003,007` -> 001, 002, 003, 007."""
  found = []
  for part in text.split(","):
    first, _, last = part.partition("-")
    last = last or first
    if not (first.isdigit() and last.isdigit()):
      raise ProcessError(f"SLURM_STEP_NODELIST is {whole!r}, whose part {part!r} is no range")
    found += [f"{i:0{len(first)}d}" for i in range(int(first), int(last) + 1)]
  return found
