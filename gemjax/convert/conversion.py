"""One conversion: read a run, fit it to a config, write it, and compare what was written."""

from __future__ import annotations

import contextlib
import pathlib
import shutil
import time
from collections.abc import Callable, Iterator
from typing import NamedTuple

from gemjax import config as config_lib
from gemjax.config.next_item import NextItem
from gemjax.convert.fitting import Fitted, fit, table
from gemjax.convert.next_item_run import (
  as_public_hstu,
  read_next_item,
  read_public_hstu,
  write_next_item,
)
from gemjax.convert.peers import PEERS, as_peer, read_peer, read_tensors, write_tensors
from gemjax.convert.run_folder import (
  Run,
  open_run,
  read_file,
  read_workdir,
  write_file,
  write_workdir,
)
from gemjax.convert.tensors import ConvertError, Tensors, cast, dtype_of, first_difference
from gemjax.convert.training_state import fresh, settled, table_of
from gemjax.convert.vocabulary_rows import row_maps
from gemjax.train.workdir import DATA

GEMJAX, SAFETENSORS, HSTU = "gemjax", "safetensors", "hstu"
FORMATS = (GEMJAX, SAFETENSORS, *PEERS, HSTU)
FLOATS = ("float32", "bfloat16", "float16")


class _Job(NamedTuple):
  """What comes out of a conversion."""

  fitted: dict[str, Fitted]
  left: list[str]  # Names of what the output has no place for.
  write: Callable[[pathlib.Path, Tensors], None]
  read: Callable[[pathlib.Path], Tensors]


def convert(
  *,
  source: str,
  target: str,
  input: pathlib.Path,
  output: pathlib.Path,
  config: config_lib.Config | NextItem | None = None,
  step: int | None = None,
  dtype: str = "",
  dry_run: bool = False,
  verify: bool = False,
) -> list[str]:
  """Converts a checkpoint; returns the lines of a table that says what became of every tensor.

  Args:
    source: Format of the input, one of FORMATS.
    target: Format of the output.
    input: Run's folder or file.
    output: Run's folder or file, which must not exist.
    config: Of the run that comes out, by default that of the input; a peer's file needs one, that
      of `hstu` a NextItem.
    step: Checkpoint of a run's folder, by default the best.
    dtype: Of the floats in a file, one of FLOATS; by default as they are.
    dry_run: Writes nothing.
    verify: Reads the output again and compares every tensor to the bit.

  Raises:
    ConvertError, ConfigError, WorkdirError, CheckpointError, PreparedDataError, RawDataError,
      OSError: nothing is left behind.
  """
  if output.exists():
    raise ConvertError(f"{output} exists; name another --output, or remove it")
  if not input.exists():
    raise ConvertError(f"{input} does not exist; name a checkpoint by --input")
  if dtype and dtype not in FLOATS:
    raise ConvertError(f"--dtype={dtype}, but must be one of {', '.join(FLOATS)}")
  if dtype and target == GEMJAX:
    raise ConvertError("--dtype is of files; a run's tables have config.embedding.dtype")
  job = _hstu_job if HSTU in (source, target) else _job
  fitted, left, write, read = job(source, target, input, config, step)
  if dtype:
    fitted = {name: _cast(f, dtype) for name, f in fitted.items()}
  lines = table(fitted, left)
  if dry_run:
    return lines
  tensors = {name: f.tensor for name, f in fitted.items()}
  with _whole(output) as partial:
    write(partial, tensors)
    if verify:
      cast_to = f", cast to {dtype}" if dtype else ""
      lines.append(_verified(tensors, read(partial), output) + cast_to)
  return lines


def _job(
  source: str,
  target: str,
  input: pathlib.Path,
  config: config_lib.Config | None,
  step: int | None,
) -> _Job:
  if isinstance(config, NextItem):
    raise ConvertError(f"a NextItem describes {HSTU} alone; name a config of launch/train.py")
  run, unread = _read(source, input, config, step)
  if target in PEERS:
    theirs, left = as_peer(target, run)
    write = lambda path, tensors: write_tensors(path, tensors, PEERS[target].tree)
    return _Job(_copied(theirs), unread + left, write, read_tensors)
  run, fitted, left = _fitted(run, config if source not in PEERS else None, input)
  left = unread + left
  replaced = lambda tensors: run._replace(tensors=tensors)
  if target == GEMJAX:
    write = lambda path, tensors: write_workdir(path, replaced(tensors))
    return _Job(fitted, left, write, lambda path: read_workdir(path, None).tensors)
  write = lambda path, tensors: write_file(path, replaced(tensors))
  return _Job(fitted, left, write, lambda path: read_file(path).tensors)


def _hstu_job(
  source: str, target: str, input: pathlib.Path, config: NextItem | None, step: int | None
) -> _Job:
  """Between generative-recommenders and a run of launch/next_item.py."""
  if {source, target} != {HSTU, GEMJAX}:
    raise ConvertError(f"{HSTU} is converted to {GEMJAX} and from it alone")
  if target == HSTU:
    if config is not None:
      raise ConvertError(f"--to={HSTU} takes no --config: it is that of the run")
    theirs = as_public_hstu(read_next_item(input, step))
    return _Job(_copied(theirs), ["what the optimiser accumulated"], write_tensors, read_tensors)
  if step is not None:
    raise ConvertError("--checkpoint names a checkpoint of a run's folder (--from=gemjax)")
  if not isinstance(config, NextItem):
    raise ConvertError(f"--from={HSTU} needs --config, a NextItem that describes {input}")
  run = read_public_hstu(read_tensors(input), config, str(input))
  write = lambda path, tensors: write_next_item(path, run._replace(tensors=tensors))
  return _Job(_copied(run.tensors), [], write, lambda path: read_next_item(path, None).tensors)


def _copied(tensors: Tensors) -> dict[str, Fitted]:
  return {name: Fitted(tensor, "copied") for name, tensor in tensors.items()}


def _read(
  source: str, input: pathlib.Path, config: config_lib.Config | None, step: int | None
) -> tuple[Run, list[str]]:
  """(the run, names of what the input has and a run has no place for)."""
  if source == GEMJAX:
    return read_workdir(input, step), []
  if step is not None:
    raise ConvertError("--checkpoint names a checkpoint of a run's folder (--from=gemjax)")
  if source == SAFETENSORS:
    return read_file(input), []
  if config is None:
    raise ConvertError(f"--from={source} needs --config, which describes the model in {input}")
  return read_peer(source, input, open_run(config))


def _fitted(
  run: Run, config: config_lib.Config | None, input: pathlib.Path
) -> tuple[Run, dict[str, Fitted], list[str]]:
  """(the run that comes out, its tensors, names of those that it has no place for)."""
  new = open_run(config) if config else run
  tensors = run.tensors
  if _law(run) != _law(new):
    tensors = settled(run.trainer, tensors)
  wanted = fresh(new.trainer)
  left = [name for name in tensors if name not in wanted]
  rows = {}
  if config:
    # The data of a run lie where its config says, or in its folder.
    folders = [pathlib.Path(run.trainer.config.data.path)] + [input / DATA] * input.is_dir()
    old, now = run.trainer, new.trainer
    tables = [t for t in now.tables.layout.tables if t in old.tables.layout.tables]
    maps = row_maps(tables, old.features, now.features, folders, pathlib.Path(config.data.path))
    rows = {n: maps[t] for n in wanted if (t := table_of(n)) in maps}
  return new._replace(kept=run.kept), fit(tensors, wanted, rows), left


def _law(run: Run) -> tuple:
  """What the shrinking that is still due depends on."""
  emb = run.trainer.config.embedding
  return emb.optimizer, emb.weight_decay, emb.l2, emb.eps


def _cast(fitted: Fitted, dtype: str) -> Fitted:
  old, new = fitted.tensor.dtype, dtype_of(dtype)
  if old.name not in FLOATS or old == new:
    return fitted
  return Fitted(cast(fitted.tensor, new), f"{fitted.action}, {old} cast")


def _verified(wanted: Tensors, found: Tensors, output: pathlib.Path) -> str:
  if wanted.keys() != found.keys():
    raise ConvertError(f"{output} came out with other tensors: {wanted.keys() ^ found.keys()}")
  for name, tensor in wanted.items():
    if difference := first_difference(tensor, found[name]):
      raise ConvertError(f"{output} differs from the input in {name}: {difference}")
  return f"verified: all {len(wanted)} tensors, read again, are equal to the bit"


@contextlib.contextmanager
def _whole(output: pathlib.Path) -> Iterator[pathlib.Path]:
  """Where to write: it becomes `output` at the end, or vanishes where the body raises."""
  partial = output.with_name(f"{output.stem}.partial{output.suffix}")
  _remove(partial)  # Of a conversion that was killed.
  try:
    if not output.parent.is_dir():
      raise ConvertError(f"--output={output} lies in no folder; make the folder first")
    yield partial
    partial.rename(output)
  except BaseException:
    # Threads of Orbax live on a little when a save has failed, and may write until then.
    for _ in range(10):
      _remove(partial)
      time.sleep(0.05)
    raise


def _remove(path: pathlib.Path) -> None:
  if path.is_dir():
    shutil.rmtree(path, ignore_errors=True)
    return
  path.unlink(missing_ok=True)
