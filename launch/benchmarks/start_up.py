"""Cold against warm starts of the training, and how long compiling takes by depth.

Every start is a process of its own, from its birth to the line that says that the first step is
done. A cold one has an empty workdir but for prepared data, a warm one what the cold one before it
compiled; they take turns, and figures are medians. `resumed` goes on from a checkpoint.
"""

from __future__ import annotations

import functools
import pathlib
import re
import runpy
import shutil
import statistics
import subprocess
import sys
import tempfile
import time

import jax
from tqdm import tqdm

from gemjax.config import Config
from gemjax.data.pipeline import train_batches
from gemjax.parallel.arrays import to_devices
from gemjax.train.programs import Programs
from gemjax.train.source import open_data
from gemjax.train.state import make_trainer
from gemjax.train.step import plan_step, train_step
from gemjax.train.workdir import saved_steps

ROOT = pathlib.Path(__file__).parents[2]
CONFIGS = ("wukong_demo", "gem_demo")
REPEATS, EXAMPLES = 3, 40_000
# All layers of Wukong but the first, and all of GEM, are turns of one loop, unrolled by two.
DEPTHS = {"wukong_demo": (5, 9, 17, 33), "gem_demo": (4, 8, 16)}
FIRST_STEP = re.compile(r"first step after .* compile ([0-9.]+) s")


def run() -> dict[str, object]:
  """Ratios of cold over warm, the smaller of both configs, and all that they come from."""
  with tempfile.TemporaryDirectory() as name:
    folders = {config: pathlib.Path(name) / config for config in CONFIGS}
    found = {config: cold_and_warm(config, folder) for config, folder in folders.items()}
    seconds = by_depth("wukong_demo", folders["wukong_demo"], compiled=True)
    lines = by_depth("gem_demo", folders["gem_demo"], compiled=False)
  least = lambda what: min(figures[what] for figures in found.values())
  return {
    "cold_over_warm_first_step": least("cold_over_warm_first_step"),
    "cold_over_warm_compile": least("cold_over_warm_compile"),
    **found,
    "wukong_demo_compile_seconds_by_layers": seconds,
    "gem_demo_program_lines_by_layers": lines,
  }


def cold_and_warm(config: str, folder: pathlib.Path, repeats: int = REPEATS) -> dict[str, float]:
  """Medians of seconds from a process' birth to its first step, and of its compiling."""
  seconds: dict[str, list[float]] = {}
  open_data(_config(config), folder)
  for _ in tqdm(range(repeats), desc=config):
    for left in ("compiled", "checkpoints"):
      shutil.rmtree(folder / left, ignore_errors=True)
    for kind in ("cold", "warm", "resumed"):
      first_step, compiling = _start(config, folder, until_saved=kind == "warm")
      seconds.setdefault(f"{kind}_first_step_seconds", []).append(first_step)
      seconds.setdefault(f"{kind}_compile_seconds", []).append(compiling)
  median = {name: statistics.median(values) for name, values in seconds.items()}
  ratios = {
    f"cold_over_warm_{what}": median[f"cold_{what}_seconds"] / median[f"warm_{what}_seconds"]
    for what in ("first_step", "compile")
  }
  return median | ratios


def by_depth(config: str, folder: pathlib.Path, *, compiled: bool) -> dict[str, float]:
  """Layers -> seconds of tracing and compiling plan and step, or lines of the traced step."""
  found = {}
  for layers in tqdm(DEPTHS[config], desc=f"{config} by depth"):
    tree = _config(config)
    tree.model.layers = layers
    data = open_data(tree, folder)
    trainer = make_trainer(tree, data.features, 1000)
    batches = train_batches(
      data, batch_size=tree.data.batch_size, seed=0, history_length=tree.data.history
    )
    batch = to_devices(trainer.mesh, next(iter(batches)))
    if compiled:
      programs = Programs(trainer)
      programs.prepare(batch, batch)
      found[str(layers)] = programs.compile_seconds
    else:
      plans = jax.eval_shape(functools.partial(plan_step, trainer), batch)
      step = jax.jit(functools.partial(train_step, trainer))
      text = step.lower(trainer.abstract(), plans, batch, batch).as_text()
      found[str(layers)] = float(text.count("\n"))
  return found


def _start(config: str, folder: pathlib.Path, *, until_saved: bool) -> tuple[float, float]:
  """(seconds to the first step, seconds of compiling); killed there, or once a step is saved."""
  command = [
    sys.executable, str(ROOT / "launch/train.py"), f"--config={ROOT}/configs/{config}.py",
    f"--workdir={folder}", f"--config.data.demo_examples={EXAMPLES}", "--config.train.steps=1000",
    "--config.train.eval_every=0", "--config.checkpoint.every=2",
  ]  # fmt: skip
  start = time.perf_counter()
  with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
    line = next((line for line in process.stdout if FIRST_STEP.match(line)), "")
    seconds = time.perf_counter() - start
    while until_saved and process.poll() is None and not saved_steps(folder):
      time.sleep(0.05)
    process.kill()
  if not line:
    raise RuntimeError(f"{' '.join(command)} ended before its first step")
  return seconds, float(FIRST_STEP.match(line)[1])


def _config(name: str) -> Config:
  config = runpy.run_path(str(ROOT / "configs" / f"{name}.py"))["get_config"]()
  config.data.demo_examples = EXAMPLES
  return config
