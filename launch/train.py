"""Trains a ranker; the same command resumes.

  python launch/train.py --config=configs/wukong_demo.py --workdir=runs/demo
  python launch/train.py --config=configs/wukong_frappe.py --workdir=runs/frappe \
    --config.data.path=RAW_OR_PREPARED --config.train.seed=1
"""

import time

import cli
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, summary.json.")


def main():
  from gemjax.train.workdir import WorkdirError

  config = cli.experiment(_CONFIG)
  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of this run")
  start = time.perf_counter()
  from gemjax.parallel.process import join_processes

  join_processes()
  from gemjax.train.loop import train  # Seconds of imports, which wrong flags need not wait for.

  train(config, _WORKDIR.value, imports=time.perf_counter() - start)


if __name__ == "__main__":
  cli.run(main)
