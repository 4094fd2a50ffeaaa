"""A preparation that must fail with one sentence and leave nothing behind."""

import pytest

from gemjax.data.preparation import prepare

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
