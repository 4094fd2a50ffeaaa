"""What every refusal must look like."""

import contextlib
import pathlib
import resource
import sys

import tiny
from absl import logging

from gemjax.train.loop import train

sys.path.insert(0, str(tiny.ROOT / "launch"))
import cli


def sentence(capsys, call, *words: str, workdir: pathlib.Path | None = None) -> str:
  """Runs `call` as a binary would, which must exit with 1 and one sentence that has `words`."""
  logging.set_verbosity(logging.FATAL)  # As in the binaries.
  capsys.readouterr()
  try:
    cli._guarded(call, ["binary"])
    raise AssertionError(f"nothing was refused; wanted {words}")
  except SystemExit as end:
    assert end.code == 1
  error = capsys.readouterr().err
  assert error.startswith("error: ") and error.count("\n") == 1 and len(error) < 800, error
  for word in words:
    assert str(word) in error, f"{word!r} is not in {error}"
  if workdir and workdir.is_dir():
    half = [
      f for f in workdir.rglob("*") if "partial" in f.name or "orbax-checkpoint-tmp" in f.name
    ]
    assert not half, half
  return error


@contextlib.contextmanager
def full_disk(at: int):
  """No file grows beyond `at` bytes; a write fails as it does on a full disk."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (at, hard))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def refuses(capsys, config, workdir, *words):
  return sentence(capsys, lambda: train(config, workdir), *words, workdir=workdir)


def flip(file, at=None):
  content = bytearray(file.read_bytes())
  content[len(content) // 2 if at is None else at] ^= 0x10
  file.write_bytes(content)


def truncate(file, to=0.5):
  file.write_bytes(file.read_bytes()[: int(to * file.stat().st_size)])
