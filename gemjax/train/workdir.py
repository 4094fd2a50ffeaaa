"""The folder of one run: who owns it, what it was started with, what it leaves."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import pathlib
import secrets
from typing import Any

from gemjax import config as config_lib
from gemjax.features import FeatureSet

RUN, SUMMARY, CHECKPOINTS, DATA = "run.json", "summary.json", "checkpoints", "data"
COMPILED, LOCK = "compiled", "lock"


class WorkdirError(ValueError):
  """A folder that is in use, cannot be written, or belongs to another run."""


class Workdir:
  """Holds a lock on the folder while open, so that two runs never train into one.

  Of a run's processes the first holds it, and writes what is not a checkpoint.
  """

  def __init__(self, path: str | os.PathLike, *, first: bool = True):
    if not str(path):
      raise WorkdirError("--workdir is empty; name the folder of this run")
    self.path = pathlib.Path(path).absolute()
    self.first = first
    self.life = 0  # As `claim` finds it; of the first process only.
    if not first:
      return
    try:
      self.path.mkdir(parents=True, exist_ok=True)
      self._lock = (self.path / LOCK).open("w")
    except OSError as error:
      raise WorkdirError(
        f"{self.path} cannot be written ({error.strerror}); name another --workdir"
      ) from error
    try:
      fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
      self._lock.close()
      raise WorkdirError(
        f"{self.path} is in use by another process; wait or name another"
      ) from error

  def __enter__(self) -> Workdir:
    return self

  def __exit__(self, kind, value, trace) -> None:
    if not self.first:
      return
    if kind is not None and os.listdir(self.path) == [LOCK]:  # Refused before any work.
      (self.path / LOCK).unlink()
      self.path.rmdir()
    self._lock.close()

  def claim(
    self,
    config: config_lib.Config,
    features: FeatureSet,
    digests: dict[str, int],
  ) -> None:
    """Records config, features and the digest of every split of the data; where there are
    checkpoints, they must agree with the record.

    Where hosts keep snapshots it records a number, too, by which they are known as this run's:
    another one whenever training begins anew, as with another config or without CHECKPOINTS.

    Raises:
      WorkdirError: the field that differs, with both values.
    """
    if saved_steps(self.path):
      before = read_run(self.path)
      try:  # A field that is younger than the run had its default.
        old = config_lib.Config.from_json(before["config"]).to_json()
      except config_lib.ConfigError as error:
        raise WorkdirError(f"{self.path / RUN}: {error}; name another --workdir") from error
      if found := config_lib.difference(old, config.to_json()):
        raise WorkdirError(f"{self.path} holds a run in which {found}; name another --workdir")
      check_features(self.path, before["features"], features)
      for split, digest in before["digests"].items():
        if digests.get(split) != digest:
          raise WorkdirError(
            f"{self.path} holds a run on other data: the features agree, but split {split!r} has "
            "other examples; name the data of the run, or another --workdir"
          )
    tree = {"config": config.to_json(), "features": features.to_json(), "digests": digests}
    if not self.first:
      return
    self.life = self._life(tree)
    if config.checkpoint.local:
      self.life = self.life or secrets.randbits(31)
      (self.path / CHECKPOINTS).mkdir(exist_ok=True)
    if self.life:  # Also for a start that takes no snapshots: a later one may go on from them.
      tree["life"] = self.life
    write_json(self.path / RUN, tree)

  def _life(self, tree: dict[str, Any]) -> int:
    """That of the record, if this start can go on with it; 0 where there is none."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError):
      before, now = json.loads((self.path / RUN).read_text()), json.loads(json.dumps(tree))
      same = config_lib.difference(before["config"], now["config"]) is None and all(
        before[name] == now[name] for name in ("features", "digests")
      )
      if same and (self.path / CHECKPOINTS).is_dir():
        return int(before["life"])
    return 0


def saved_steps(path: pathlib.Path) -> list[int]:
  """Steps of the complete checkpoints of a run, ascending, without Orbax."""
  names = (file.name for file in (path / CHECKPOINTS).glob("[0-9]*"))
  return sorted(int(name) for name in names if name.isdigit())


def check_features(path: pathlib.Path, tree: dict[str, Any], features: FeatureSet) -> None:
  """Raises WorkdirError unless `tree`, the features of the run at `path`, are those of the data."""
  try:
    found = FeatureSet.from_json(tree).difference(features)
  except ValueError as error:
    raise WorkdirError(f"{path / RUN} is corrupt ({error}); name another --workdir") from error
  if found:
    raise WorkdirError(
      f"{path} holds a run on other data ('here' is the run, 'the other' the data): {found}; "
      "name the data of the run, or another --workdir"
    )


def read_run(path: pathlib.Path) -> dict[str, Any]:
  """What `claim` recorded; raises WorkdirError where there is nothing or it is damaged."""
  file = pathlib.Path(path) / RUN
  if not file.is_file():
    raise WorkdirError(f"{path} holds no run (no {RUN}); train with --workdir={path} first")
  try:
    tree = json.loads(file.read_text())
    return {name: tree[name] for name in ("config", "features", "digests")}
  except (ValueError, KeyError, TypeError) as error:
    raise WorkdirError(
      f"{file} is truncated or corrupt ({error}); name another --workdir"
    ) from error


def write_json(file: pathlib.Path, tree: Any) -> None:
  """Whole or not at all; raises OSError that names the file."""
  partial = file.with_name(file.name + ".partial")
  try:
    partial.write_text(json.dumps(tree, indent=1) + "\n")
    partial.replace(file)
  except OSError as error:
    partial.unlink(missing_ok=True)
    raise OSError(f"writing {file} failed ({error.strerror}); free the disk or the name") from error
