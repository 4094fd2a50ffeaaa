"""A run that looks rows up ahead goes on from a checkpoint as the one that was never stopped."""

import json
import shutil

import tiny

from gemjax.train.loop import train
from gemjax.train.workdir import CHECKPOINTS


def test_a_resumed_run_ends_with_the_bits_of_the_unbroken_one(data, tmp_path, capsys):
  config = tiny.get_config("logistic")
  config.data.path, config.train.steps, config.train.eval_every = str(data), 6, 0.0
  config.checkpoint.every, config.embedding.lookup = 3, "ahead"
  summary = train(config, tmp_path / "run")
  shutil.rmtree(tmp_path / "run" / CHECKPOINTS / f"{6:09d}")
  again = train(config, tmp_path / "run")
  assert "resuming from the checkpoint of step 3" in capsys.readouterr().out
  for name in ("valid", "test"):
    assert json.dumps(again[name]) == json.dumps(summary[name])
  config.embedding.lookup = "exact"
  assert train(config, tmp_path / "exact")["test"] != summary["test"]
