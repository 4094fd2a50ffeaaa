"""Runs that keep snapshots and are broken off go on from the last one, or from what is sound, and
end as the run that never was, to the bit.
"""

import dataclasses
import json
import re
import shutil

import pytest
from bad import flip, full_disk
from snapshotting import EVERY, assert_same_end, broken, snapshots

from gemjax import config as c
from gemjax.train import recovery
from gemjax.train.feed import Feed
from gemjax.train.loop import train
from gemjax.train.workdir import CHECKPOINTS, RUN, saved_steps

SLOW = [pytest.param(mode, marks=pytest.mark.slow) for mode in ("exact", "average")]


@pytest.mark.parametrize("mode", ["ahead", *SLOW])
def test_a_broken_run_goes_on_from_its_snapshot(
  mode, kept, unbroken, tmp_path, local, capsys, monkeypatch
):
  """Before the first checkpoint, and then between two; nothing is left in the end."""
  if mode != "ahead":
    kept.embedding.lookup = "exact"
  if mode == "average":
    kept.mesh = c.Mesh(data=2, model=2)
    kept.embedding.replicas, kept.embedding.average_every = "average", 5
    kept.checkpoint.local_every = 5
  if mode == "ahead":
    whole = unbroken(1, 1)
  else:
    whole = tmp_path / "unbroken"
    train(kept, whole)
  every, workdir = kept.checkpoint.local_every, tmp_path / "run"
  broken(monkeypatch, kept, workdir, behind=13)
  assert saved_steps(workdir) == [] and max(snapshots(local)) == 13 // every * every
  capsys.readouterr()
  broken(monkeypatch, kept, workdir, behind=33)
  assert (
    f"resuming from the local snapshot of step {13 // every * every}\n" in capsys.readouterr().out
  )
  saved, newest = saved_steps(workdir)[-1], max(snapshots(local))
  assert 0 < saved < newest == 13 // every * every + 33 // every * every
  train(kept, workdir)
  assert f"resuming from the local snapshot of step {newest}\n" in capsys.readouterr().out
  assert_same_end(workdir, whole)
  assert not list(local.iterdir())


def test_snapshots_of_another_life_do_not_count(kept, tmp_path, local, capsys, monkeypatch):
  """Where training begins anew for another config, or as its checkpoints were deleted."""
  workdir = tmp_path / "run"
  for change in ("config", "checkpoints"):
    broken(monkeypatch, kept, workdir, behind=5)
    assert snapshots(local)
    if change == "config":
      kept.train.seed = 1
    else:
      shutil.rmtree(workdir / CHECKPOINTS)
    capsys.readouterr()
    broken(monkeypatch, kept, workdir, behind=1)
    assert "resuming" not in capsys.readouterr().out
  assert json.loads((workdir / RUN).read_text())["life"] > 0


def test_none_is_taken_while_the_best_checkpoint_is_being_written(
  kept, tmp_path, local, capsys, monkeypatch
):
  """It would be missing in the end."""
  workdir = tmp_path / "run"
  monkeypatch.setattr(recovery, "saved_steps", lambda path: [])
  broken(monkeypatch, kept, workdir, behind=40)
  (best,) = saved_steps(workdir)
  assert best < 40 - EVERY and max(snapshots(local)) < best


def test_a_full_disk_does_not_end_the_run(kept, unbroken, tmp_path, local, capsys, monkeypatch):
  advance, asked, limit = Feed.advance, iter(range(1000)), full_disk(5_000)

  def full(self):
    number = next(asked)
    if number == 3:
      limit.__enter__()
    elif number == 7:  # Before the first checkpoint, which would not fit either.
      limit.__exit__(None, None, None)
    return advance(self)

  monkeypatch.setattr(Feed, "advance", full)
  train(kept, tmp_path / "run")
  out = capsys.readouterr().out
  assert out.count("no snapshot of step") == 1
  assert re.search(rf"no snapshot of step [24] could be written to {local}", out)
  assert "(File too large); training goes on without\n" in out
  assert_same_end(tmp_path / "run", unbroken(1, 1))


def test_another_mesh_goes_on_from_the_checkpoint(kept, tmp_path, local, capsys, monkeypatch):
  workdir, kept.mesh = tmp_path / "run", c.Mesh(data=1, model=2)
  broken(monkeypatch, kept, workdir, behind=36)
  saved, steps = saved_steps(workdir)[-1], sorted(snapshots(local))
  kept.mesh = c.Mesh(data=1, model=1)
  train(kept, workdir)
  out = capsys.readouterr().out
  for step in steps:
    assert f"lacks shards, of another mesh or half written: step {step} is passed over\n" in out
  assert len(steps) == 2 and f"resuming from the checkpoint of step {saved}\n" in out


def test_a_start_that_saves_nothing_costs_no_snapshot(kept, tmp_path, local, capsys, monkeypatch):
  """On another mesh, as with a GPU that is missing, and without snapshots."""
  workdir, kept.embedding.lookup = tmp_path / "run", "exact"
  broken(monkeypatch, kept, workdir, behind=36)
  saved, newest = saved_steps(workdir)[-1], max(snapshots(local))
  for other in (
    dataclasses.replace(
      kept, mesh=c.Mesh(data=1, model=2), checkpoint=c.Checkpoint(local=str(local), local_every=50)
    ),
    dataclasses.replace(kept, checkpoint=c.Checkpoint()),
  ):
    capsys.readouterr()
    broken(monkeypatch, other, workdir, behind=1)
    assert f"resuming from the checkpoint of step {saved}\n" in capsys.readouterr().out
  broken(monkeypatch, kept, workdir, behind=1)
  assert f"resuming from the local snapshot of step {newest}\n" in capsys.readouterr().out


def test_who_takes_a_checkpoint_away_takes_what_came_behind_it(
  kept, tmp_path, local, capsys, monkeypatch
):
  """Of two the newer one, and then all: as the first start."""
  workdir, kept.checkpoint.every = tmp_path / "run", 12
  broken(monkeypatch, kept, workdir, behind=34)
  older, last = saved_steps(workdir)
  newest = max(snapshots(local))
  assert newest > last
  for gone, goes_on in ((last, f"resuming from the checkpoint of step {older}\n"), (older, "")):
    shutil.rmtree(workdir / CHECKPOINTS / f"{gone:09d}")
    capsys.readouterr()
    broken(monkeypatch, kept, workdir, behind=1)
    out = capsys.readouterr().out
    assert f"the checkpoint of step {last} is gone: the local snapshot of step {newest}" in out
    assert goes_on in out and ("resuming" in out) == bool(goes_on)


@pytest.mark.parametrize("hurt", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_corrupt_snapshot_is_passed_over(
  hurt, kept, unbroken, tmp_path, local, capsys, monkeypatch
):
  """For the one before, and where that is corrupt as well for the checkpoint."""
  workdir = tmp_path / "run"
  broken(monkeypatch, kept, workdir, behind=36)
  saved, newest = saved_steps(workdir)[-1], sorted(snapshots(local), reverse=True)
  files = [next(local.glob(f"*/{step:09d}.0/state/arrays")) for step in newest[:hurt]]
  for file in files:
    flip(file)
  train(kept, workdir)
  out = capsys.readouterr().out
  for step, file in zip(newest, files):
    assert f"{file} is corrupt (its checksum differs): step {step} is passed over\n" in out
  kind, step = ("local snapshot", newest[1]) if hurt == 1 else ("checkpoint", saved)
  assert f"resuming from the {kind} of step {step}\n" in out
  assert_same_end(workdir, unbroken(1, 1))
