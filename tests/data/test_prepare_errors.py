"""Bad input: one sentence that names file, place, field and mend, and nothing left behind."""

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

from gemjax.data import prepared
from gemjax.data.preparation import prepare, recognise
from gemjax.data.schema import SchemaError

ROOT = pathlib.Path(__file__).parents[2]

SCHEMA = """
[split]
by = "order"
[columns.y]
kind = "label"
[columns.d]
kind = "dense"
[columns.c]
kind = "sparse"
"""
GOOD = b"y,d,c,u,t,s\n" + b"0,1.5,a,u1,1,a|b\n1,2.5,b,u2,2,b\n" * 10


def with_row(row: bytes, line=6, data=GOOD):
  lines = data.split(b"\n")
  lines[line - 1] = row
  return b"\n".join(lines)


def parquet(tmp_path, **columns):
  rows = {"y": [0, 1] * 10, "d": [1.0, 2.0] * 10, "c": ["a", "b"] * 10} | columns
  pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
  data = (tmp_path / "x.parquet").read_bytes()
  (tmp_path / "x.parquet").unlink()
  return data


def fails(tmp_path, data, schema=SCHEMA, name="in.csv", out="out", **options):
  """Runs a preparation that must fail; returns its sentence, having checked what it left."""
  file = tmp_path / name
  if data is not None:
    file.write_bytes(data)
  (tmp_path / "schema.toml").write_text(schema)
  before = sorted(p for p in tmp_path.rglob("*"))
  with pytest.raises((ValueError, OSError)) as caught:
    prepare("table", file, tmp_path / out, tmp_path / "schema.toml", progress=False, **options)
  assert sorted(p for p in tmp_path.rglob("*")) == before, "something was left behind"
  sentence = str(caught.value)
  assert "\n" not in sentence and len(sentence) < 700
  return sentence


USER, TIME = 'user = "u"\n', 'time = "t"\n'
BY_TIME = TIME + SCHEMA.replace('"order"', '"time"')
NA = 'missing_values = ["NA"]\n' + SCHEMA
STRICT = SCHEMA + 'missing = "error"\n'
SEQUENCE = SCHEMA + '[columns.s]\nkind = "sequence"\n'

ROWS = {
  "label 2": (with_row(b"2,1,a,u,1,a"), SCHEMA, ["line 6", "label 'y'", "0 or 1", "is 2"]),
  "label .5": (with_row(b"0.5,1,a,u,1,a"), SCHEMA, ["line 6", "label 'y'", "is 0.5"]),
  "label missing": (with_row(b",1,a,u,1,a"), SCHEMA, ["line 6", "'y' is missing"]),
  "label nan": (with_row(b"nan,1,a,u,1,a"), SCHEMA, ["line 6", "'y' is missing"]),
  "label text": (with_row(b"yes,1,a,u,1,a"), SCHEMA, ["line 6", "'y' must be a number", "'yes'"]),
  "label in test": (with_row(b"7,1,a,u,1,a", 21), SCHEMA, ["line 21", "is 7"]),
  "dense text": (with_row(b"0,many,a,u,1,a"), SCHEMA, ["line 6", "'d'", "number", "'many'"]),
  "dense inf": (with_row(b"0,inf,a,u,1,a"), SCHEMA, ["line 6", "'d' must be finite"]),
  "dense in valid": (with_row(b"0,-,a,u,1,a", 18), SCHEMA, ["line 18", "'d'", "'-'"]),
  "dense huge": (with_row(b"0,1e300,a,u,1,a"), SCHEMA, ["in.csv", "'d'", "too large", "log1p"]),
  "dense huge later": (with_row(b"0,1e99,a,u,1,a", 20), SCHEMA, ["line 20", "'d'", "log1p"]),
  "sparse needed": (with_row(b"0,1,,u,1,a"), STRICT, ["line 6", "'c' is missing", "error"]),
  "few columns": (with_row(b"0,1,a"), SCHEMA, ["line 6 has 3 columns", "6 are expected"]),
  "many columns": (with_row(b"0,1,a,u,1,a,7"), SCHEMA, ["line 6 has 7 columns", "6 are"]),
  "few and many": (
    with_row(b"0,1,a,u,1", 9, with_row(b"0,1,a,u,1,a,7", 12)),
    SCHEMA,
    ["line 9 has 5 columns"],
  ),
  "many and few": (
    with_row(b"0,1,a,u,1", 12, with_row(b"0,1,a,u,1,a,7", 9)),
    SCHEMA,
    ["line 9 has 7 columns"],
  ),
  "blank line": (with_row(b""), SCHEMA, ["line 6 has 0 columns", "6 are expected"]),
  "open quote": (with_row(b'0,1,"a,u,1,a'), SCHEMA, ["line 6", "quoted values must be closed"]),
  "short in quotes": (with_row(b'0,1,"a,b,c"'), SCHEMA, ["line 6 has 3 columns"]),
  "not UTF-8": (with_row(b"0,1,\xff\xfe,u,1,a"), SCHEMA, ["line 6 is not utf-8", "0xff"]),
  "UTF-16": (GOOD.decode().encode("utf-16"), SCHEMA, ["line 1 is not utf-8", "convert"]),
  "empty": (b"", SCHEMA, ["in.csv is empty"]),
  "header only": (b"y,d,c,u,t,s\n", SCHEMA, ["in.csv", "header", "no rows"]),
  "names twice": (GOOD.replace(b"u,t", b"d,t", 1), SCHEMA, ["unique", "['d'] come twice"]),
  "no column": (GOOD.replace(b"y,d", b"y,D", 1), SCHEMA, ["no column 'd'", "'D'"]),
  "empty split": (b"\n".join(GOOD.split(b"\n")[:4]), SCHEMA, ["split", "is empty", "in.csv"]),
  "no user": (with_row(b"0,1,a,,1,a"), USER + SCHEMA, ["line 6", "'u' is missing", "user"]),
  "no user column": (GOOD.replace(b"u,t", b"v,t", 1), USER + SCHEMA, ["no column 'u'"]),
  "time text": (with_row(b"0,1,a,u,soon,a"), BY_TIME, ["line 6", "'t'", "number", "'soon'"]),
  "time missing": (with_row(b"0,1,a,u,,a"), BY_TIME, ["line 6", "'t' is missing", "time"]),
  "one time": (GOOD.replace(b"2,b", b"1,b"), BY_TIME.replace('"t"', '"y"'), ["is empty", "time"]),
  "no lists": (GOOD, SEQUENCE, ["'s' is a sequence", "String", "separator"]),
}


@pytest.mark.parametrize("case", ROWS)
def test_bad_text(tmp_path, case):
  data, schema, words = ROWS[case]
  sentence = fails(tmp_path, data, schema)
  for word in words:
    assert word in sentence, sentence


def test_the_good_file_is_good(tmp_path):
  (tmp_path / "in.csv").write_bytes(GOOD)
  (tmp_path / "s.toml").write_text(USER + BY_TIME.replace('"t"', '"row"'))
  data = GOOD.replace(b"y,", b"row,y,", 1).split(b"\n")
  lines = [data[0]] + [b"%d,%s" % (i, line) for i, line in enumerate(data[1:-1])]
  (tmp_path / "in.csv").write_bytes(b"\n".join(lines))
  args = ("table", tmp_path / "in.csv", tmp_path / "out", tmp_path / "s.toml")
  assert prepare(*args, progress=False).splits["train"].examples == 16


def test_line_numbers_hold_across_blocks(tmp_path, monkeypatch):
  monkeypatch.setattr("gemjax.data.raw.BLOCK_BYTES", 40)
  assert "line 17" in fails(tmp_path, with_row(b"0,x,a,u,1,a", 17))
  assert "line 17 is not utf-8" in fails(tmp_path, with_row(b"0,1,\xff,u,1,a", 17))
  assert "line 17 has 2" in fails(tmp_path, with_row(b"0,1", 17))


PARQUET = {
  "dense text": ({"d": ["1", "x"] * 10}, SCHEMA, ["row 2", "'d'", "'x'"]),
  "dense inf": ({"d": [1.0, np.inf] * 10}, SCHEMA, ["row 2", "'d' must be finite"]),
  "inf and NA": ({"d": [1.0, np.inf] * 10}, NA, ["row 2", "'d' must be finite"]),
  "dense lists": ({"d": [[1.0], [2.0]] * 10}, SCHEMA, ["'d' must hold numbers", "List"]),
  "sparse lists": ({"c": [["a"], ["b"]] * 10}, SCHEMA, ["'c' holds List", "'sequence'"]),
  "label null": ({"y": [0, None] * 10}, SCHEMA, ["row 2", "'y' is missing"]),
  "label nan": ({"y": [0.0, np.nan] * 10}, SCHEMA, ["row 2", "'y' is missing"]),
  "label 3": ({"y": [0, 3] * 10}, SCHEMA, ["row 2", "label 'y'", "is 3"]),
  "no lists": ({"s": [1, 2] * 10}, SEQUENCE, ["'s' is a sequence", "Int64"]),
  "no rows": ({"y": [], "d": [], "c": []}, SCHEMA, ["in.parquet", "no rows"]),
  "no column": ({}, SEQUENCE, ["no column 's'"]),
}


@pytest.mark.parametrize("case", PARQUET)
def test_bad_parquet(tmp_path, case):
  columns, schema, words = PARQUET[case]
  sentence = fails(tmp_path, parquet(tmp_path, **columns), schema, "in.parquet")
  for word in words:
    assert word in sentence, sentence


@pytest.mark.parametrize("keep", [0, 3, 100, 0.5, 0.9])
def test_truncated_parquet(tmp_path, keep):
  data = parquet(tmp_path)
  sentence = fails(tmp_path, data[: int(keep if keep > 1 else keep * len(data))], name="in.parquet")
  assert "in.parquet is no whole Parquet file" in sentence


def test_corrupt_parquet(tmp_path):
  data = bytearray(parquet(tmp_path, c=[f"value {i}" for i in range(20)]))
  data[4:60] = os.urandom(56)
  assert "in.parquet is no whole Parquet file" in fails(tmp_path, bytes(data), name="in.parquet")


def test_truncated_gzip(tmp_path):
  import gzip

  data = gzip.compress(GOOD * 100)
  assert "in.csv.gz cannot be read" in fails(tmp_path, data[:-20], name="in.csv.gz")
  assert "in.csv.gz cannot be read" in fails(tmp_path, b"no gzip at all", name="in.csv.gz")


def test_gzip_corrupt_in_the_middle(tmp_path):
  import gzip

  data = bytearray(gzip.compress(os.urandom(1000).hex().encode()))
  data[20:60] = b"\xff" * 40  # An invalid block type, or a code that nothing has.
  sentence = fails(tmp_path, bytes(data), name="in.csv.gz")
  assert "in.csv.gz is a corrupt gzip file" in sentence and "again" in sentence


SCHEMAS = {
  "no label": (
    SCHEMA.replace('"label"', '"sparse"'),
    ["schema.toml", "no label", "kind = 'label'"],
  ),
  "no feature": ('[columns.y]\nkind = "label"\n', ["no feature"]),
  "unknown kind": (SCHEMA.replace('"dense"', '"danse"'), ["column 'd'", "'danse'", "'dense'"]),
  "no kind": (SCHEMA + "[columns.z]\nrows = 3\n", ["column 'z'", "kind is missing"]),
  "unknown field": (SCHEMA + "colour = 3\n", ["column 'c'", "'colour'", "'min_count'"]),
  "field of another kind": (SCHEMA + 'transform = "log1p"\n', ["column 'c'", "'transform'"]),
  "unknown encoding": (SCHEMA + 'encoding = "hush"\n', ["column 'c'", "'hush'", "'hash'"]),
  "unknown missing": (SCHEMA + 'missing = "guess"\n', ["column 'c'", "'guess'", "'keep'"]),
  "mean of a category": (SCHEMA + 'missing = "mean"\n', ["column 'c'", "'mean'", "dense"]),
  "hash of 2 rows": (SCHEMA + 'encoding = "hash"\nrows = 2\n', ["column 'c'", "rows >= 3", "= 2"]),
  "hash of no rows": (SCHEMA + 'encoding = "hash"\n', ["column 'c'", "rows >= 3", "= 0"]),
  "no room": (SCHEMA + "rows = 2\n", ["column 'c'", "rows = 2", "no room"]),
  "useless seed": (SCHEMA + "seed = 2\n", ["column 'c'", "seed = 2"]),
  "rows in words": (SCHEMA + 'rows = "many"\n', ["column 'c'", "rows", "whole number", "'many'"]),
  "rows over 2^40": (
    SCHEMA + f"rows = {2**40 + 1}\n",
    ["column 'c'", "rows", "2^40", "1099511627777"],
  ),
  "threshold": (SCHEMA.replace('"label"', '"label"\nthreshold = nan'), ["'y'", "finite", "nan"]),
  "min_count 0": (SCHEMA + "min_count = 0\n", ["column 'c'", "min_count", "at least 1"]),
  "shared sizes": (
    SCHEMA + 'table = "t"\n[columns.u]\nkind = "sparse"\ntable = "t"\nrows = 9\n',
    ["'c' and 'u' share table 't'", "rows is 0 for one and 9"],
  ),
  "shared with a name": (
    SCHEMA + '[columns.u]\nkind = "sparse"\ntable = "c"\nmin_count = 2\n',
    ["'c' and 'u' share table 'c'", "min_count is 1 for one and 2"],
  ),
  "time split without time": (SCHEMA.replace('"order"', '"time"'), ["split.by = 'time'", "`time"]),
  "unknown split": (SCHEMA.replace('"order"', '"chance"'), ["'chance'", "'random'"]),
  "fractions": (SCHEMA.replace('"order"', '"order"\nfractions = [0.8, 0.1, 0.2]'), ["add up"]),
  "fractions of two": (SCHEMA.replace('"order"', '"order"\nfractions = [0.8, 0.2]'), ["three"]),
  "unknown entry": ("color = 3\n" + SCHEMA, ["'color'", "'user'"]),
  "delimiter": ('delimiter = "§"\n' + SCHEMA, ["schema.toml", "delimiter", "'§'", "ASCII"]),
  "missing -1": ("missing_values = [-1]\n" + SCHEMA, ["missing_values", "list of texts", "[-1]"]),
  "names 1, 2": ("names = [1, 2]\n" + SCHEMA, ["names must be a list of texts", "[1, 2]"]),
  "user twice": ("user = 3\n" + SCHEMA, ["user must be a text", "3"]),
  "no TOML": ("[columns\n", ["schema.toml", "line 1"]),
  "column twice": (SCHEMA + '[columns.y]\nkind = "dense"\n', ["schema.toml", "line"]),
  "columns a list": ("columns = [3]\n", ["[columns.NAME]"]),
  "dense.missing taken": (
    '[split]\nby = "order"\n[columns.y]\nkind = "label"\n[columns.d]\nkind = "dense"\n'
    '[columns."d.missing"]\nkind = "dense"\n',
    ["unique", "d.missing"],
  ),
}


@pytest.mark.parametrize("case", SCHEMAS)
def test_bad_schema(tmp_path, case):
  schema, words = SCHEMAS[case]
  data = (
    with_row(b"0,,a,u1,1,a") if "taken" not in case else b"y,d,d.missing\n0,,1\n" + b"0,1,1\n" * 9
  )
  sentence = fails(tmp_path, data, schema)
  for word in words:
    assert word in sentence, sentence


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


def test_disk_full_in_the_middle(tmp_path, monkeypatch):
  def write(self, split, columns):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

  monkeypatch.setattr(prepared.PreparedWriter, "_write", write)
  assert "No space left on device; free the disk" in fails(tmp_path, GOOD)


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


@pytest.mark.parametrize("sign", [signal.SIGINT, signal.SIGKILL])
def test_killed_in_the_middle(tmp_path, sign):
  flags = flags_for(tmp_path, 300_000)
  process = launch(*flags)
  while process.poll() is None and not (tmp_path / "out.partial").exists():
    time.sleep(0.01)
  assert process.poll() is None, process.stderr.read()
  process.send_signal(sign)
  process.communicate(timeout=60)
  assert process.returncode == (130 if sign == signal.SIGINT else -signal.SIGKILL)
  assert not (tmp_path / "out").exists()
  if sign == signal.SIGINT:
    assert not (tmp_path / "out.partial").exists()
  else:  # The same command starts afresh over what the killed one left.
    process = launch(*flags_for(tmp_path, 400))
    stdout, _ = process.communicate(timeout=60)
    assert process.returncode == 0 and "train 320" in stdout
    assert not (tmp_path / "out.partial").exists()


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
    assert process.returncode == 1 and not stdout
    assert words in stderr and "Traceback" not in stderr and stderr.count("\n") == 1, stderr
  assert not (tmp_path / "out").exists()
