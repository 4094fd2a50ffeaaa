"""What a traced run measured on its GPUs, beside what a plan says of the very program that ran."""

from __future__ import annotations

import json
import pathlib
from collections.abc import Iterator

from gemjax.plan.collectives import collectives
from gemjax.plan.estimate import estimate
from gemjax.plan.rates import RATES
from gemjax.plan.report import MODEL
from gemjax.train.profile import PROGRAM, REPORT

COUNT = 20  # Of the costliest modules.


def lines(folder: pathlib.Path) -> Iterator[str]:
  """For a person, of the workdir of a run with `train.profile_steps`.

  Instructions are of the step alone: what else ran while it was traced, and what the trace names no
  instruction for (kernels inside CUDA graphs), has a line without an estimate.
  """
  if not all((folder / name).is_file() for name in (REPORT, PROGRAM)):
    yield "the run ended before train.profile_steps were traced: nothing was measured"
    return
  found = json.loads((folder / REPORT).read_text())
  if "operation_seconds" not in found:
    yield f"no GPU was traced ({found['device']}): steps took {found['step_seconds'] * 1e3:.1f} ms"
    return
  text, device = (folder / PROGRAM).read_text(), found["device"]
  known = next((rates for name, rates in RATES.items() if name.upper() in device), None)
  mesh, gpus = found["mesh"], found["gpus_per_host"]
  # Modules do not depend on the rates.
  rates, flops = known or RATES["h100"], found["kernel_flops"]
  planned = estimate(text, collectives(text, mesh), rates, gpus, flops)
  share = found["exposed_communication_share"]
  yield f"measured on {device}:"
  yield (
    f"  step {found['step_seconds'] * 1e3:.1f} ms, exposed communication {share:.1%}, "
    f"no kernel {found['idle_share']:.1%}"
  )
  if known:
    exposed = planned.exposed / planned.seconds
    yield f"estimated for the same program ({MODEL}):"
    yield f"  step {planned.seconds * 1e3:.1f} ms, exposed communication {exposed:.1%}"
  else:
    yield f"no estimate: the plan has no rates of it, only of {', '.join(RATES)}"
  yield "costliest modules, ms measured and estimated:"
  module_of = {o.name: o.module for o in planned.operations}
  module_of |= {t.collective.name: "collectives" for t in planned.transfers}
  modules: dict[str, list[float]] = {}
  for name, seconds in found["operation_seconds"].items():
    module = module_of.get(name, "not in the program's text")
    modules.setdefault(module, [0.0, 0.0])[0] += seconds
  for o in planned.operations:
    modules.setdefault(o.module, [0.0, 0.0])[1] += o.seconds
  for module, (measured, estimated) in sorted(modules.items(), key=lambda m: -m[1][0])[:COUNT]:
    beside = f"{estimated * 1e3:9.3f}" if known and estimated else " " * 9
    yield f"  {measured * 1e3:9.3f} {beside}  {module}"
