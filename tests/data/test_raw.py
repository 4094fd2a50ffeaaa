"""The same rows in every format and dialect give the same prepared data."""

import gzip
import json

import polars as pl
import pytest
from oracle import columns
from userrows import NAMES, SCHEMA, equal, make_rows, run, simple, write_csv

from gemjax.data import raw
from gemjax.data.preparation import prepare


def write_parquet(path, rows):
  text = {n: [None if r[n] in ("", "NA") else r[n] for r in rows] for n in NAMES}
  number = lambda n, kind: pl.Series(n, text[n], dtype=pl.String).cast(kind)
  # As pandas writes whole numbers with gaps: floats. Users as numbers, labels as booleans.
  pl.DataFrame(
    [
      number("click", pl.Int8).cast(pl.Boolean),
      number("stars", pl.Int32),
      number("price", pl.Float64),
      number("age", pl.Float64),
      number("user", pl.Float64),
      pl.Series("ad", text["ad"], dtype=pl.Categorical),
      pl.Series("past", [r["past"].split("|") if r["past"] else [] for r in rows]),
      number("when", pl.Int64),
      pl.Series("unused", text["unused"]),
    ]
  ).write_parquet(path, row_group_size=100)


def test_parquet_and_csv_are_read_alike(tmp_path):
  rows = make_rows()
  a = run(tmp_path, rows)
  equal(a, run(tmp_path, rows, name="data.parquet", write=write_parquet, out="parquet"))


@pytest.mark.parametrize("kind", [pl.String, pl.Int64, pl.Float64, pl.Categorical])
def test_missing_values_and_numbers_of_every_type(tmp_path, kind):
  numbers = pl.Series("y", ["0", "1"] * 5), pl.Series("d", ["-1", "7"] * 5)
  pl.DataFrame(numbers).cast(kind).write_parquet(tmp_path / "d.parquet")
  schema = 'missing_values = ["-1"]\n' + simple(by="order").replace("x]", "d]")
  (tmp_path / "s.toml").write_text(schema.replace("sparse", "dense"))
  args = ("table", tmp_path / "d.parquet", tmp_path / "out", tmp_path / "s.toml")
  data = prepare(*args, progress=False)
  assert [(f.name, f.mean) for f in data.features.dense] == [("d", 7), ("d.missing", 0)]
  assert columns(data, "train")["label"][:, 0].tolist() == [0, 1] * 4


def test_small_reads_change_nothing(tmp_path, monkeypatch):
  rows = make_rows(100)
  a = run(tmp_path, rows)
  monkeypatch.setattr(raw, "BLOCK_BYTES", 37)  # Less than a line.
  equal(a, run(tmp_path, rows, out="small"))
  monkeypatch.setattr(raw, "BATCH_ROWS", 13)
  equal(a, run(tmp_path, rows, name="data.parquet", write=write_parquet, out="parquet"))


def write_crlf(path, rows):
  write_csv(path, rows, end="\r\n")


def write_bom(path, rows):
  write_csv(path, rows)
  path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())


def write_quoted(path, rows):
  quoted = [r | {"ad": f'"{r["ad"]}"' if r["ad"] else "", "unused": '"a, ""b"""'} for r in rows]
  write_csv(path, quoted)


def write_unended(path, rows):
  write_csv(path, rows)
  path.write_bytes(path.read_bytes().rstrip(b"\n"))


def write_gzip(path, rows):
  write_csv(path, rows)
  path.write_bytes(gzip.compress(path.read_bytes()))


def write_tsv(path, rows):
  path.write_text("\n".join("\t".join(r[n] for n in NAMES) for r in [{n: n for n in NAMES}, *rows]))


@pytest.mark.parametrize(
  "name, write",
  [
    ("crlf.csv", write_crlf),
    ("bom.csv", write_bom),
    ("quoted.csv", write_quoted),
    ("unended.csv", write_unended),
    ("data.csv.gz", write_gzip),
    ("data.tsv", write_tsv),
  ],
)
def test_dialects_are_read_alike(tmp_path, name, write):
  rows = make_rows(200)
  a = run(tmp_path, rows, name="plain.csv")
  equal(a, run(tmp_path, rows, name=name, write=write, out="other"))


@pytest.mark.parametrize("delimiter", [";", "::"])
@pytest.mark.parametrize("header", [True, False])
def test_another_delimiter_with_and_without_header(tmp_path, delimiter, header):
  rows = make_rows(200)
  a = run(tmp_path, rows)

  def write(path, rows):
    rows = [dict(zip(NAMES, NAMES)), *rows] if header else rows
    path.write_text("".join(delimiter.join(r[n] for n in NAMES) + "\n" for r in rows))

  names = [] if header else NAMES
  schema = f'delimiter = "{delimiter}"\nnames = {json.dumps(names)}\n' + SCHEMA
  equal(a, run(tmp_path, rows, schema, name="bare.txt", write=write, out="other"))
