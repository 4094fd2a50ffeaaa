"""Trains a ranker; the same command resumes.

  python launch/train.py --config=configs/wukong_demo.py --workdir=runs/demo
  python launch/train.py --config=configs/wukong_frappe.py --workdir=runs/frappe \
    --config.data.path=RAW_OR_PREPARED --config.train.seed=1
"""

import gc
import pathlib
import time

import cli
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, summary.json.")
_JOIN_SECONDS = flags.DEFINE_float(
  "join_seconds", 300, "How long to wait for the other processes of the run.", lower_bound=1
)
_STALL_SECONDS = flags.DEFINE_float(
  "stall_seconds", 600, "How long a process may stay in one phase before all stop.", lower_bound=1
)


def main():
  from gemjax.train.workdir import WorkdirError

  config = cli.experiment(_CONFIG)
  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of this run")
  start = time.perf_counter()
  from gemjax.parallel.process import join_processes

  with join_processes(
    join_seconds=_JOIN_SECONDS.value, stall_seconds=_STALL_SECONDS.value
  ) as peers:
    # Seconds of imports, which wrong flags need not wait for. What they make stays: collections,
    # a fifth of that time, would look through it in vain, now and later.
    gc.disable()
    cli.import_without("grain", "orbax.checkpoint")  # .3 s, needed with the first save.
    cli.import_without("tensorboardX", "torch")  # 2 s, where there is PyTorch.
    import jax

    from gemjax.train.loop import train
    from gemjax.train.progress import Phases

    gc.freeze()
    gc.enable()
    phases = Phases(peers)
    phases.add("imports", time.perf_counter() - start)
    train(config, _WORKDIR.value, phases)
    if config.train.profile_steps and not jax.process_index():
      from gemjax.plan import measured

      print(*measured.lines(pathlib.Path(_WORKDIR.value)), sep="\n")


if __name__ == "__main__":
  cli.run(main)
