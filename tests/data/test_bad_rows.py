"""Bad raw files: one sentence that names file, place, field and mend."""

import os

import numpy as np
import polars as pl
import pytest
from failing import GOOD, SCHEMA, fails, with_row

from gemjax.data.preparation import prepare


def parquet(tmp_path, **columns):
  rows = {"y": [0, 1] * 10, "d": [1.0, 2.0] * 10, "c": ["a", "b"] * 10} | columns
  pl.DataFrame(rows).write_parquet(tmp_path / "x.parquet")
  data = (tmp_path / "x.parquet").read_bytes()
  (tmp_path / "x.parquet").unlink()
  return data


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
  "carriage returns alone": (GOOD.replace(b"\n", b"\r"), SCHEMA, ["in.csv, line 1", "\\r\\n"]),
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


OPTIONAL = SCHEMA.replace('"label"', '"label"\noptional = true')
PARQUET = {
  "dense text": ({"d": ["1", "x"] * 10}, SCHEMA, ["row 2", "'d'", "'x'"]),
  "dense inf": ({"d": [1.0, np.inf] * 10}, SCHEMA, ["row 2", "'d' must be finite"]),
  "inf and NA": ({"d": [1.0, np.inf] * 10}, NA, ["row 2", "'d' must be finite"]),
  "dense lists": ({"d": [[1.0], [2.0]] * 10}, SCHEMA, ["'d' must hold numbers", "List"]),
  "sparse lists": ({"c": [["a"], ["b"]] * 10}, SCHEMA, ["'c' holds List", "'sequence'"]),
  "label null": ({"y": [0, None] * 10}, SCHEMA, ["row 2", "'y' is missing"]),
  "label nan": ({"y": [0.0, np.nan] * 10}, SCHEMA, ["row 2", "'y' is missing"]),
  "label never": ({"y": [None] * 20}, OPTIONAL, ["label 'y'", "every row of the train split"]),
  "label not in valid": (
    {"y": [0, 1] * 8 + [None] * 2 + [0, 1]},
    OPTIONAL,
    [
      "no row of split 'valid'",
      "'y'",
      "'train': 16, 'valid': 0, 'test': 2",
    ],
  ),
  "optional label 3": ({"y": [None, 0, 3, 1] * 5}, OPTIONAL, ["row 3", "label 'y'", "is 3"]),
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
  assert "in.csv.gz is a truncated gzip file" in fails(tmp_path, data[:-20], name="in.csv.gz")
  assert "in.csv.gz is a corrupt gzip file" in fails(tmp_path, b"no gzip at all", name="in.csv.gz")


def test_gzip_corrupt_in_the_middle(tmp_path):
  import gzip

  data = bytearray(gzip.compress(os.urandom(1000).hex().encode()))
  data[20:60] = b"\xff" * 40  # An invalid block type, or a code that nothing has.
  sentence = fails(tmp_path, bytes(data), name="in.csv.gz")
  assert "in.csv.gz is a corrupt gzip file" in sentence and "again" in sentence
