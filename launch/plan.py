"""Compiles the training step of a config for a GPU cluster that is not here, and says what a device
holds, computes and sends, and how long that would take. Needs the CUDA wheels
(`pip install -e ".[cuda12]"`) and no GPU.

python launch/plan.py --config=configs/wukong_paper.py --topology=h100:16x8 --mesh=1x128
"""

import functools
import json
import os
import pathlib
import runpy
import sys

import cli
from absl import flags
from ml_collections import config_flags

from gemjax.plan import target

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_TOPOLOGY = flags.DEFINE_string("topology", "h100:1x8", "GPU:HOSTSxGPUS_A_HOST.")
_MESH = flags.DEFINE_string("mesh", None, "DATAxMODEL; default: by the rule of training.")
_SEARCH = flags.DEFINE_bool("search", False, "Try meshes, 8 bits and recomputation; see --mesh.")
_SCHEDULE = flags.DEFINE_string(
  "schedule",
  None,
  "File (.pbtxt) for the estimated costs of instructions, by which the step is then scheduled.",
)
_JSON = flags.DEFINE_string("json", None, "File for the figures; default: none is written.")


def main():
  if reason := target.obstacle():
    raise target.PlanError(reason)
  config = cli.experiment(_CONFIG)
  topology = target.parse_topology(_TOPOLOGY.value)
  from gemjax.plan.report import figures, lines
  from gemjax.plan.search import search
  from gemjax.plan.training import plan_training

  if _SEARCH.value and _MESH.value:
    raise target.PlanError("--search chooses the mesh: leave --mesh out")
  if _SEARCH.value and _SCHEDULE.value:
    raise target.PlanError("--search compares many steps: give --schedule with the best of them")
  if _SEARCH.value:
    step = search(config, _features(config), topology, functools.partial(print, flush=True))
    memory = step.trainer.config.memory
    print(
      f"best: --config.train.float8_mlp={step.trainer.config.train.float8_mlp} "
      f"--config.memory.activations={memory.activations} "
      f"--config.memory.recomputed_layers={memory.recomputed_layers}"
    )
  else:
    step = plan_training(config, _features(config), topology, _mesh(), _schedule())
  found = figures(step, topology)
  print(f"{config.name} on {_TOPOLOGY.value}, mesh {found['mesh']}, a device:")
  for line in lines(found):
    print(line)
  if _JSON.value:
    pathlib.Path(_JSON.value).write_text(json.dumps(found, indent=1) + "\n")


def _mesh() -> tuple[int, int] | None:
  if not _MESH.value:
    return None
  sizes = _MESH.value.split("x")
  if len(sizes) != 2 or not all(size.isdigit() and int(size) for size in sizes):
    raise target.PlanError(f"--mesh={_MESH.value} must be DATAxMODEL, as 2x64")
  return int(sizes[0]), int(sizes[1])


def _schedule() -> pathlib.Path | None:
  file = _SCHEDULE.value
  if file and not file.endswith(".pbtxt"):
    raise target.PlanError(f"--schedule={file} must end in .pbtxt, by which XLA knows its format")
  return pathlib.Path(file).absolute() if file else None


def _features(config):
  """Those of the data, or of the config file where it defines `get_features`."""
  file = config_flags.get_config_filename(flags.FLAGS["config"]).split(":")[0]
  if get := runpy.run_path(file).get("get_features"):
    return get()
  from gemjax.data.prepared import open_prepared

  return open_prepared(config.data.path).features


if __name__ == "__main__":
  if target.has_cuda_wheels() and target.obstacle():
    # JAX and XLA read these when they are imported; XLA's warnings are about absent GPUs.
    environment = target.environment() | {"TF_CPP_MIN_LOG_LEVEL": "3"}
    os.execve(sys.executable, [sys.executable, *sys.argv], environment)
  cli.run(main)
