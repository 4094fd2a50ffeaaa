"""Bad arguments, places and moments: one sentence, and nothing left behind."""

import errno
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import numpy as np
import polars as pl
import pytest
from failing import GOOD, SCHEMA, fails

from gemjax.data import prepared
from gemjax.data.preparation import prepare, recognise
from gemjax.data.raw import RawDataError
from gemjax.data.schema import SchemaError
from gemjax.data.schema_file import load_schema
from gemjax.data.table import table

ROOT = pathlib.Path(__file__).parents[2]


def test_bad_arguments(tmp_path):
  schema = tmp_path / "s.toml"
  schema.write_text(SCHEMA)
  call = lambda *a, **k: prepare(*a, progress=False, **k)
  (tmp_path / "in.csv").write_bytes(GOOD)
  args = (tmp_path / "in.csv", tmp_path / "out")
  with pytest.raises(SchemaError, match=r"'frape' is unknown.*'frappe'"):
    call("frape", *args)
  with pytest.raises(SchemaError, match="needs a schema"):
    call("table", *args)
  with pytest.raises(SchemaError, match="has its own schema"):
    call("frappe", *args, schema)
  with pytest.raises(SchemaError, match=r"none.toml cannot be read: No such file"):
    call("table", *args, tmp_path / "none.toml")
  with pytest.raises(SchemaError, match=r"rows >= 3.*rows = 2"):
    call("table", *args, schema, hash_rows=2)
  with pytest.raises(SchemaError, match=r"exclude each other"):
    call("table", *args, schema, hash_rows=9, min_count=2)
  schema.write_text(SCHEMA + 'encoding = "hash"\nrows = 9\n')
  with pytest.raises(SchemaError, match=r"min_count = 2.*no vocabulary"):
    call("table", *args, schema, min_count=2)
  assert not (tmp_path / "out").exists()


def test_missing_files(tmp_path):
  assert "in.csv does not exist" in fails(tmp_path, None)
  assert "format is unknown" in fails(tmp_path, GOOD, name="in.dat")
  by_files = SCHEMA.replace('"order"', '"files"')
  folder = tmp_path / "folder"
  folder.mkdir()
  assert "holds no data file" in fails(tmp_path, None, name="folder")
  assert "'train'" in fails(tmp_path, None, by_files, name="folder")
  for split in ("train", "test"):
    (folder / f"{split}.csv").write_bytes(GOOD)
  assert "one file or folder 'valid'" in fails(tmp_path, None, by_files, name="folder")
  for dataset in ("frappe", "movielens-100k", "movielens-1m", "criteo-kaggle", "criteo-1tb"):
    (tmp_path / "empty").mkdir(exist_ok=True)
    with pytest.raises(ValueError, match=r"empty.*(must hold|train.csv does not exist)"):
      prepare(dataset, tmp_path / "empty", tmp_path / "out", progress=False)
    with pytest.raises(ValueError, match="nowhere does not exist"):
      prepare(dataset, tmp_path / "nowhere", tmp_path / "out", progress=False)
  assert recognise(tmp_path / "empty") is None and recognise(tmp_path / "nowhere") is None
  assert not (tmp_path / "out").exists()


def test_output_taken_or_unwritable(tmp_path):
  (tmp_path / "full").mkdir()
  (tmp_path / "full" / "precious").write_text("kept")
  assert "not empty; name another" in fails(tmp_path, GOOD, out="full")
  assert (tmp_path / "full" / "precious").read_text() == "kept"
  (tmp_path / "file").write_text("kept")
  for out in ("file", "file/below"):
    assert "name another --output" in fails(tmp_path, GOOD, out=out)


def test_a_file_without_a_header_is_empty(tmp_path):
  (tmp_path / "train.txt").write_bytes(b"")
  with pytest.raises(ValueError, match=r"train.txt is empty; give it rows$"):
    prepare("criteo-kaggle", tmp_path, tmp_path / "out", progress=False)


def test_no_bar_follows_the_sentence(tmp_path):
  flags = flags_for(tmp_path)
  text = (tmp_path / "in.csv").read_text().split("\n")
  text[7] = "1,tall,3"
  (tmp_path / "in.csv").write_text("\n".join(text))
  process = launch(*flags)
  _, error = process.communicate(timeout=60)
  assert process.returncode == 1
  last = error.removesuffix("\n").split("\n")[-1]
  assert last.startswith("error: ") and "'tall'" in last and "\r" not in last, error


def test_disk_full_in_the_middle(tmp_path, monkeypatch):
  def write(self, split, columns):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(prepared.PreparedWriter, "_write", write)
  assert "No space left on device; free the disk" in fails(tmp_path, GOOD)


def test_stopped_while_the_folder_is_made(tmp_path, monkeypatch):
  def mkdir(path, *args, **options):
    os.mkdir(path)
    raise KeyboardInterrupt

  monkeypatch.setattr(pathlib.Path, "mkdir", mkdir)
  with pytest.raises(KeyboardInterrupt), prepared.PreparedWriter(tmp_path / "out"):
    pass
  assert not list(tmp_path.iterdir())


def launch(*flags, **options):
  environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, str(ROOT / "launch/prepare.py"), *map(str, flags)]
  return subprocess.Popen(
    command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
  )


def flags_for(tmp_path, rows=40):
  data = np.random.default_rng(0).integers(0, 10**9, (rows, 2))
  frame = pl.DataFrame({"y": data[:, 0] % 2, "d": data[:, 0], "c": data[:, 1]})
  frame.write_csv(tmp_path / "in.csv")
  (tmp_path / "s.toml").write_text(SCHEMA)
  places = {"input": "in.csv", "schema": "s.toml", "output": "out"}
  return ["--dataset=table", *(f"--{k}={tmp_path / v}" for k, v in places.items())]


def test_disk_that_really_refuses(tmp_path):
  """A file size limit makes every write beyond 64 KiB fail, inside ArrayRecord too."""
  limit = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, 1 << 16))
  process = launch(*flags_for(tmp_path, 50_000), preexec_fn=limit)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1 and "Traceback" not in stderr
  assert "out" in stderr.splitlines()[-1]
  assert sorted(p.name for p in tmp_path.iterdir()) == ["in.csv", "s.toml"]


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_killed_in_the_middle(tmp_path, sign):
  flags = flags_for(tmp_path, 3_000_000)  # Seconds of work, however late we are.
  process = launch(*flags)
  while process.poll() is None and not (tmp_path / "out.partial").exists():
    time.sleep(0.01)
  assert process.poll() is None, process.stderr.read()
  process.send_signal(sign)
  _, stderr = process.communicate(timeout=60)
  codes = {signal.SIGINT: 130, signal.SIGTERM: 143}
  assert process.returncode == codes.get(sign, -signal.SIGKILL)
  assert not (tmp_path / "out").exists()
  if sign in codes:
    assert "error: " in stderr and "command" in stderr and "Traceback" not in stderr
    assert not (tmp_path / "out.partial").exists()
  else:  # The same command starts afresh over what the killed one left.
    process = launch(*flags_for(tmp_path, 400))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "train 320" in stdout
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("name", ["b.CSV", "b.csv.bz2", "b.tsv.zst"])
def test_data_in_a_folder_is_never_left_out(tmp_path, name):
  folder = tmp_path / "folder"
  folder.mkdir()
  (folder / "a.csv").write_bytes(GOOD)
  (folder / ".a.csv.crc").write_text("hidden")
  (tmp_path / "s.toml").write_text(SCHEMA)
  schema = load_schema(tmp_path / "s.toml")
  assert len(table(folder, schema).files[""]) == 1
  (folder / name).write_text("x")
  with pytest.raises(RawDataError, match=f"{name} would not be read: .* unpack it or move it"):
    table(folder, schema)


def test_data_below_a_folder_is_never_left_out(tmp_path):
  folder = tmp_path / "folder"
  for name in ("a.csv", "_old/a.csv", "notes/a.md"):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(GOOD)
  (tmp_path / "s.toml").write_text(SCHEMA)
  schema = load_schema(tmp_path / "s.toml")
  assert len(table(folder, schema).files[""]) == 1
  (folder / "day=1" / "hour=2").mkdir(parents=True)
  (folder / "day=1" / "hour=2" / "b.csv").write_bytes(GOOD)
  with pytest.raises(RawDataError, match=r"day=1 is a folder whose data would not be read: move"):
    table(folder, schema)


def test_a_folder_in_the_way_is_kept(tmp_path):
  flags = flags_for(tmp_path, 400)
  mine = tmp_path / "out.partial" / "in.csv"
  mine.parent.mkdir()
  mine.write_text("mine")
  process = launch(*flags)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 1 and mine.read_text() == "mine"
  assert f"{mine} is where {tmp_path / 'out'} is to be made; move it away" in stderr


def test_launch_says_one_sentence(tmp_path):
  flags = flags_for(tmp_path)
  cases = [
    ([*flags, "--dataset=nothing"], "'nothing' is unknown"),
    (flags[1:], "--dataset is missing"),
    ([*flags, f"--input={tmp_path / 'none'}"], "does not exist"),
    ([*flags, "loose"], "arguments must be flags"),
    ([*flags, "--dataset=criteo-1tb", "--download"], "by hand"),
  ]
  running = [(launch(*case), words) for case, words in cases]
  for process, words in running:
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == (2 if "flags" in words else 1) and not stdout
    assert words in stderr and "Traceback" not in stderr and stderr.count("\n") == 1, stderr
  assert not (tmp_path / "out").exists()
