"""A run from the data to the summary."""

import dataclasses
import json
import os
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from bad import flip

from gemjax import config as c
from gemjax.checkpoint import Checkpoints
from gemjax.data.prepared import PreparedDataError
from gemjax.features import UNLABELLED
from gemjax.train.loop import train
from gemjax.train.source import open_data
from gemjax.train.trained import evaluate_run
from gemjax.train.workdir import CHECKPOINTS, SUMMARY

PUBLIC = pathlib.Path(os.environ.get("GEMJAX_DATA", tiny.ROOT.parent / "shared" / "data"))


def summary(workdir):
  return json.loads((workdir / SUMMARY).read_text())


def test_the_summary_has_every_key_that_other_tools_read(trained):
  found = summary(trained)
  assert set(found) >= {"train", "valid", "test", "start_up_seconds", "params"}
  assert set(found) >= {"gflop_per_example", "device", "seed"}
  assert set(found["train"]) >= {"loss", "steps", "examples_per_second", "seconds"}
  for split in ("valid", "test"):
    metrics = found[split]
    assert set(metrics) >= {"auc", "gauc", "log_loss", "ne", "calibration"}
    assert metrics["examples"] == tiny.EXAMPLES[split]
    assert set(metrics["tasks"]) == {"click", "buy"}
    assert all(np.isfinite(metrics[m]) for m in ("auc", "gauc", "log_loss", "ne", "calibration"))
  phases = {"data", "trainer", "state", "first batch", "wait for programs", "compile"}
  assert set(found["start_up_seconds"]) == phases | {"first step"}
  assert found["params"] == {"dense": found["params"]["dense"], "embedding": 40 * 8 + 30 * 4}
  assert found["params"]["dense"] > 0 and found["gflop_per_example"] > 0
  assert found["train"]["steps"] == 63  # ceil(2 * 1500 / 48)
  assert found["device"].startswith("cpu x")


def test_examples_of_one_domain_teach_and_count_its_objectives_alone(tmp_path):
  """Items of odd number have no purchases; no label, no loss."""
  rng = np.random.default_rng(1)
  parts = {split: tiny.columns(n, rng) for split, n in tiny.EXAMPLES.items()}
  features = dataclasses.replace(tiny.features(), optional=("buy",))
  for part in parts.values():
    part["label"][part["ids"][:, 1] % 2 == 1, 1] = UNLABELLED
  config = tiny.get_config()
  config.data.path = str(tiny.write_data(tmp_path / "data", features, **parts).path)
  config.train.epochs = 1
  train(config, tmp_path / "run")
  tasks = summary(tmp_path / "run")["test"]["tasks"]
  sold = parts["test"]["label"][:, 1] != UNLABELLED
  assert tasks["click"]["examples"] == 300 and tasks["buy"]["examples"] == sold.sum() < 200
  assert tasks["buy"]["base_rate"] == parts["test"]["label"][sold, 1].mean()
  assert np.isfinite(tasks["buy"]["ne"])


def test_the_clock_of_training_stands_still_during_compilation(tmp_path, config, monkeypatch):
  """Compilation made 50 times as long is seen at start-up, not in seconds."""
  import time

  from gemjax.train.compiled import Compiled

  prepare = Compiled.prepare

  def slow(self, *args):
    before = self.compilations
    out = prepare(self, *args)
    if self.compilations > before:
      time.sleep(20)  # Not waited for: see the clock below.
      self.seconds += 20
    return out

  clock, slept = time.perf_counter, [0.0]
  monkeypatch.setattr(time, "sleep", lambda s: slept.__setitem__(0, slept[0] + s))
  monkeypatch.setattr(time, "perf_counter", lambda: clock() + slept[0])
  monkeypatch.setattr(Compiled, "prepare", slow)
  config.train.steps = 4
  found = train(config, tmp_path / "run")
  assert found["start_up_seconds"]["compile"] > 40  # Birth, plan and step.
  assert found["train"]["seconds"] < 20


def test_a_finished_run_started_again_gives_the_same_summary(trained, config):
  before = summary(trained)
  again = train(config, trained)
  for key in set(before) - {"start_up_seconds"}:
    assert again[key] == before[key], key


def test_early_stopping_tests_the_best_checkpoint_and_more_patience_goes_on(
  tmp_path, config, capsys
):
  config.train.epochs, config.train.patience, config.checkpoint.keep = 3, 1, 1
  config.optimizer.learning_rate = 0.1  # Overfits.
  run = tmp_path / "run"
  found = train(config, run)
  best, last = found["train"]["best_step"], found["train"]["steps"]
  assert best < last < 94
  checkpoints = Checkpoints(run / CHECKPOINTS, read_only=True)
  assert checkpoints.steps == [best, last]
  notes = checkpoints.notes(last)
  assert notes["best"]["since"] == 1 and notes["best"]["value"] == found["valid"]["ne"]
  for split in ("valid", "test"):
    assert evaluate_run(run, split, step=best).results == found[split]["tasks"]
  results = evaluate_run(run, "valid", step=last).results
  assert results != found["valid"]["tasks"]

  file = max(
    (run / CHECKPOINTS / f"{best:09d}" / "state").rglob("d/*"), key=lambda f: f.stat().st_size
  )
  flip(file)
  found = train(config, run)
  assert f"the best checkpoint cannot be tested, the last one is: {file} is corrupt" in (
    capsys.readouterr().out
  )
  assert found["train"]["best_step"] == last and found["valid"]["tasks"] == results
  flip(file)

  config.train.patience = 0
  assert train(config, run)["train"]["steps"] == 94


@pytest.mark.parametrize("model", [m for m in tiny.MODELS if m != "wukong"])
def test_every_baseline_trains(model, data, tmp_path):
  config = tiny.get_config(model)
  config.data.path, config.train.epochs, config.train.eval_every = str(data), 6.0, 0.0
  config.embedding.optimizer, config.embedding.dtype = "sgd", "float32"  # Quick to compile.
  config.embedding.weight_decay = 0.0
  found = train(config, tmp_path / "run")
  assert found["train"]["steps"] == 188
  assert 0 < found["valid"]["log_loss"] < 1


def test_the_demo_is_simulated_once_and_prints_the_optimum(tmp_path, capsys):
  config = tiny.get_config("fm")
  config.embedding.units, config.data = {}, c.Data(demo_examples=20_000, batch_size=4096)
  config.train.epochs, config.train.eval_every = 1.0, 0.0
  train(config, tmp_path / "run")
  assert "simulating 20,000" in capsys.readouterr().out
  found = summary(tmp_path / "run")
  assert 0.5 < found["test"]["bayes_ne"] < found["test"]["ne"]
  train(config, tmp_path / "run")
  out = capsys.readouterr().out
  assert "simulating" not in out and "Bayes-optimal NE" in out


def test_a_raw_public_set_is_prepared_on_first_use(tmp_path, capsys):
  raw = PUBLIC / "ml-100k"
  if not raw.is_dir():
    pytest.skip(f"the raw files of MovieLens 100K are not at {raw}; set GEMJAX_DATA")
  config = tiny.get_config("fm")
  config.data = c.Data(path=str(raw), batch_size=4096)
  config.train.steps = 3
  found = train(config, tmp_path / "run")
  assert "preparing movielens-100k" in capsys.readouterr().out
  assert found["test"]["examples"] == 10_000
  train(config, tmp_path / "run")
  assert "preparing" not in capsys.readouterr().out
  config.data.path = str(shutil.copytree(raw, tmp_path / "raw"))
  open_data(config, tmp_path / "copied")
  rated = max((tmp_path / "raw").iterdir(), key=lambda file: file.stat().st_size)
  rated.chmod(0o644)
  rated.write_bytes(rated.read_bytes()[:-1] + b"\r")  # As long as before.
  with pytest.raises(PreparedDataError, match=r"made from .*raw, whose files have changed since"):
    open_data(config, tmp_path / "copied")
  shutil.rmtree(tmp_path / "run" / "data")
