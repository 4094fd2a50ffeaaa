"""Trains a ranker; the same command resumes.

  python launch/train.py --config=configs/wukong_demo.py --workdir=runs/demo
  python launch/train.py --config=configs/wukong_frappe.py --workdir=runs/frappe \
    --config.data.path=RAW_OR_PREPARED --config.train.seed=1
"""

import pathlib

import cli
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A file of configs/.", lock_config=True)
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, summary.json.")


def main():
  from gemjax.config import Config, ConfigError
  from gemjax.train.workdir import WorkdirError

  flag = flags.FLAGS["config"]
  file = config_flags.get_config_filename(flag) if flag.present else ""
  if not file:
    raise ConfigError("--config is missing; name a file of configs/, as configs/wukong_demo.py")
  if not pathlib.Path(file.split(":")[0]).is_file():
    raise ConfigError(f"--config={file} is no file; name one of configs/")
  if not isinstance(_CONFIG.value, Config):
    raise ConfigError(f"get_config of {file} must return a gemjax Config, not {_CONFIG.value!r}")
  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of this run")
  from gemjax.parallel.process import join_processes

  join_processes()
  from gemjax.train.loop import train  # Seconds of imports, which wrong flags need not wait for.

  train(_CONFIG.value, _WORKDIR.value)


if __name__ == "__main__":
  cli.run(main)
