"""Trains a sequence tower on the next item; the same command resumes.

python launch/next_item.py --config=configs/next_item_movielens.py --workdir=runs/next_item \
  --config.path=FOLDER_OF_ML_1M
"""

import json

import cli
from absl import flags
from ml_collections import config_flags

_CONFIG = config_flags.DEFINE_config_file("config", None, "A NextItem of configs/.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of this run: checkpoints, summary.json.")


def main():
  from gemjax.config.next_item import NextItem
  from gemjax.train.workdir import WorkdirError

  config = cli.experiment(_CONFIG, NextItem)
  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of this run")
  from gemjax.train.next_item import train_next_item  # Seconds of imports.

  print(json.dumps(train_next_item(config, _WORKDIR.value), indent=1))


if __name__ == "__main__":
  cli.run(main)
