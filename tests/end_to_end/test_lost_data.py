"""Data that cannot be read in the middle of a run: no step that was trained is lost."""

import json

import pytest
from bad import refuses

from gemjax.checkpoint import Checkpoints
from gemjax.data.block_reader import BlockReader
from gemjax.data.blocks import CorruptBlockError
from gemjax.train.loop import train
from gemjax.train.workdir import CHECKPOINTS, SUMMARY

EVERY = 8  # Steps between evaluations of the tiny run.


def saved(workdir):
  checkpoints = Checkpoints(workdir / CHECKPOINTS, read_only=True)
  return checkpoints.steps, checkpoints.notes()


@pytest.fixture
def lost(monkeypatch):
  """Blocks of a split cannot be read after so many; returns what makes them whole again."""
  read = BlockReader.read

  def lose(split: str, after: int):
    reads = iter(range(1, 1_000_000))

    def failing(self, block):
      if split in self._files[0].name and next(reads) > after:
        raise CorruptBlockError(f"{self._files[0]} block {block}: hurt; prepare again")
      return read(self, block)

    monkeypatch.setattr(BlockReader, "read", failing)
    return lambda: monkeypatch.setattr(BlockReader, "read", read)

  return lose


def assert_goes_on(config, workdir, trained):
  """To the bits of a run whose data was never hurt."""
  train(config, workdir)
  found, wanted = (json.loads((w / SUMMARY).read_text()) for w in (workdir, trained))
  for key in ("valid", "test"):
    assert found[key] == wanted[key]
  for key in ("loss", "steps", "best_step"):
    assert found["train"][key] == wanted["train"][key]


def test_an_evaluation_that_failed_is_made_when_its_data_is_sound(
  trained, config, lost, tmp_path, capsys
):
  run = tmp_path / "hurt"
  mend = lost("valid", after=0)
  refuses(capsys, config, run, "valid-00000", "hurt; prepare again")
  steps, notes = saved(run)
  assert steps == [EVERY] and notes["pending"]
  refuses(capsys, config, run, "valid-00000", "hurt; prepare again")  # As often as one tries.
  assert saved(run)[0] == [EVERY]
  mend()
  assert_goes_on(config, run, trained)


def test_steps_before_a_batch_that_cannot_be_read_are_saved(
  trained, config, lost, tmp_path, capsys
):
  run = tmp_path / "hurt"
  mend = lost("train", after=12)
  refuses(capsys, config, run, "train-00000", "hurt; prepare again")
  (*_, last), notes = saved(run)
  assert last % EVERY and not notes["pending"]
  mend()
  assert_goes_on(config, run, trained)
