"""Training refuses a workdir, a checkpoint, a disk or a value that it cannot go on with."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
import tiny
from bad import flip, full_disk, refuses, truncate

from gemjax import config as c
from gemjax.checkpoint import Checkpoints
from gemjax.features import Dense
from gemjax.train.loop import train
from gemjax.train.progress import Progress
from gemjax.train.workdir import CHECKPOINTS, RUN, SUMMARY, Workdir


def test_the_workdir_of_another_run(trained, config, data, tmp_path, capsys):
  config.train.seed = 1
  refuses(capsys, config, trained, "config.train.seed was 0 and is now 1", "another --workdir")
  config.train.seed = 0
  config.model = c.Mlp(head=(8,))
  refuses(capsys, config, trained, "config.model.kind was 'Wukong' and is now 'Mlp'")
  config.model = tiny.MODELS["wukong"]
  other = tiny.features()
  other = type(other).from_json(
    other.to_json() | {"dense": [{"name": "price", "mean": 1.0}]}
  )  # Fitted on other data.
  tiny.write_data(tmp_path / "other", other)
  config.data.path = str(tmp_path / "other")
  refuses(capsys, config, trained, "'price' has mean 0.0 here and 1.0", "another --workdir")
  assert other.dense == (Dense(name="price", mean=1.0),)


def test_other_examples_with_the_same_features(trained, config, tmp_path, capsys):
  """Hashed features say nothing of the data: the digests of the splits do."""
  tiny.write_data(tmp_path / "other", test=tiny.columns(300, np.random.default_rng(9)))
  config.data.path = str(tmp_path / "other")
  refuses(capsys, config, trained, "features agree", "split 'test' has other examples")


def test_a_metric_that_the_data_cannot_have(config, tmp_path, capsys):
  features = dataclasses.replace(tiny.features(), grouped=False)
  tiny.write_data(tmp_path / "other", features)
  config.data.path, config.train.stop_metric = str(tmp_path / "other"), "gauc"
  refuses(capsys, config, tmp_path / "run", "config.train.stop_metric is 'gauc'", "no user")


def test_a_workdir_whose_data_was_made_from_something_else(config, data, tmp_path, capsys):
  shutil.copytree(data, tmp_path / "run" / "data")
  config.data.path = "demo"
  words = "run/data holds {'dataset': 'tiny'", "asks for {'dataset': 'demo'", "another --workdir"
  refuses(capsys, config, tmp_path / "run", *words)


def test_a_workdir_that_cannot_be_used(trained, config, tmp_path, capsys):
  with Workdir(trained):
    refuses(capsys, config, trained, str(trained), "in use by another process", "name another")
  (tmp_path / "file").write_text("")
  refuses(capsys, config, tmp_path / "file", "file cannot be written", "File exists")
  refuses(capsys, config, tmp_path / "file" / "run", "cannot be written", "Not a directory")
  (tmp_path / "taken" / "lock").mkdir(parents=True)
  refuses(capsys, config, tmp_path / "taken", "taken cannot be written", "directory")
  truncate(trained / RUN)
  refuses(capsys, config, trained, str(trained / RUN), "truncated or corrupt", "another --workdir")
  (trained / RUN).unlink()
  refuses(capsys, config, trained, "holds no run", RUN)


def state_file(folder):
  """The largest file of the state: the arrays."""
  files = [f for f in (folder / "state").rglob("*") if f.is_file()]
  return max(files, key=lambda f: f.stat().st_size)


CHECKPOINT = {
  "arrays flipped": (lambda f: flip(state_file(f)), "checksum"),
  "notes missing": (lambda f: shutil.rmtree(f / "notes"), "notes/digest.json is missing"),
}


@pytest.mark.parametrize("case", CHECKPOINT)
def test_a_corrupt_checkpoint_is_passed_over(case, trained, config, capsys):
  """Training reaches its step again and ends with the result of the run that was never hurt."""
  spoil, words = CHECKPOINT[case]
  before = json.loads((trained / SUMMARY).read_text())
  *_, sound, last = Checkpoints(trained / CHECKPOINTS, read_only=True).steps
  folder = trained / CHECKPOINTS / f"{last:09d}"
  spoil(folder)
  assert train(config, trained)["test"] == before["test"]
  out = capsys.readouterr().out
  (line,) = (line for line in out.splitlines() if str(folder) in line)
  aside = f"step {last} is set aside as {folder.name}.corrupt-1"
  assert words in line and aside in line and line.endswith(f"goes on from step {sound}")
  assert f"resuming from the checkpoint of step {sound}" in out
  assert folder.is_dir() and folder.with_name(f"{folder.name}.corrupt-1").is_dir()


def test_no_sound_checkpoint_is_refused_and_nothing_begins_anew(trained, config, capsys):
  steps = Checkpoints(trained / CHECKPOINTS, read_only=True).steps
  for step in steps:
    truncate(state_file(trained / CHECKPOINTS / f"{step:09d}"))
  for _ in range(2):
    words = (f"no other of the steps {steps} is sound", f"delete {trained / CHECKPOINTS}")
    refuses(capsys, config, trained, "is truncated", *words)
  assert Checkpoints(trained / CHECKPOINTS, read_only=True).steps == steps


def test_a_disk_that_fills_during_a_save(trained, config, tmp_path, capsys, monkeypatch):
  """The save fails in a thread; earlier checkpoints stay, and a rerun ends as if nothing was."""
  run, save, saved = tmp_path / "full", Checkpoints.save, []

  def fill(self, step, *args, **kwargs):
    saved.append(step)
    if len(saved) == 3:
      self.wait()
      full.__enter__()
    save(self, step, *args, **kwargs)

  full = full_disk(at=10_000)  # Less than the state, more than anything else.
  monkeypatch.setattr(Checkpoints, "save", fill)
  try:
    error = refuses(capsys, config, run, "step", "failed", "free the disk", "goes on from there")
  finally:
    full.__exit__(None, None, None)
  left = Checkpoints(run / CHECKPOINTS, read_only=True).steps
  assert left == saved[:2] and f"the last complete one is step {left[-1]}" in error
  monkeypatch.undo()
  assert train(config, run)["test"] == json.loads((trained / SUMMARY).read_text())["test"]


def test_a_full_disk_is_one_sentence_on_stderr(data, tmp_path):
  """Orbax and TensorStore, left alone, add pages of tracebacks."""
  flags = {"config__data__path": data, "config__compilation__cache": "off"}  # Cut short as well.
  with full_disk(at=10_000):
    process = tiny.start("train", config=tiny.FILE, workdir=tmp_path / "w", **flags)
  error = tiny.sentence(process, 1)
  assert "checkpoints failed" in error and "File too large" in error and "free the disk" in error
  assert not list((tmp_path / "w" / CHECKPOINTS).iterdir())


def test_a_disk_that_fills_elsewhere(config, tmp_path, capsys):
  with full_disk(at=100):
    refuses(capsys, config, tmp_path / "run", RUN, "File too large", "free the disk")
    assert not (tmp_path / "run" / RUN).exists()
    progress = Progress(tmp_path, 10, 10)
    progress.begin(0)
    with pytest.raises(OSError, match=r"tensorboard failed .*free the disk"):
      for step in range(10):
        progress.log(step, {"loss": 1.0})
    progress.close()


def test_a_loss_that_is_not_finite(config, tmp_path, capsys):
  """Step, part and rates are named, the checkpoint before stays, and a rerun says the same."""
  run = tmp_path / "run"
  config.optimizer = c.Optimizer(learning_rate=1e30)
  config.checkpoint.every = 1
  words = "step 2: not finite: ", "gradient of model.", "loss", "clip_norm"
  words += ("the learning rates were 1e+30 (dense) and 0.3 (tables)",)
  error = refuses(capsys, config, run, *words, "the checkpoint of step 1 is intact")
  kept = Checkpoints(run / CHECKPOINTS, read_only=True)
  assert kept.steps == [1] and kept.notes()["best"]["step"] is None
  assert refuses(capsys, config, run, *words) == error
  assert not (run / SUMMARY).exists()


def test_predictions_that_are_not_finite_and_a_second_try(config, tmp_path, capsys):
  """Nothing was saved, so that the workdir may be used again with a mended config."""
  config.optimizer = c.Optimizer(learning_rate=1e30)
  config.train.steps = 1
  refuses(capsys, config, tmp_path / "run", "step 1", "valid: ", "predictions are not finite")
  config.optimizer.learning_rate = 1e-3
  assert train(config, tmp_path / "run")["train"]["steps"] == 1
