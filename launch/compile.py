"""Compiles the programs of a run ahead of time, on the kind of devices that will train.

  python launch/compile.py --config=configs/wukong_demo.py --workdir=runs/demo

`launch/train.py` with the same config, workdir, devices and number of processes loads them.
"""

import cli
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run, where they are kept.")


def main():
  from gemjax.train.workdir import WorkdirError

  config = cli.experiment(_CONFIG)
  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of the run")
  from gemjax.parallel.process import join_processes

  with join_processes() as peers:
    from gemjax.train.progress import Phases
    from gemjax.train.setup import compile_ahead

    folder, seconds = compile_ahead(config, _WORKDIR.value, Phases(peers))
    print(f"{config.name}: its programs are ready in {folder} after {seconds:.1f} s")


if __name__ == "__main__":
  cli.run(main)
