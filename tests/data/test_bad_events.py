"""Bad files of events: one sentence that names the file, the row and the law, and nothing left."""

import datetime

import numpy as np
import polars as pl
import pytest
from failing import SCHEMA, fails

from gemjax.data.preparation import prepare

PAST = (
  'user = "u"\ntime = "t"\n' + SCHEMA + '[histories.h]\nfile = "e.csv"\n[histories.h.columns.x]\n'
)
LOG = b"y,d,c,u,t\n" + b"0,1.5,a,u1,10\n1,2.5,b,u2,20\n" * 10
EVENTS = b"u,t,x\nu1,5,a\nu2,6,b\nu1,7,\n"

CASES = {
  "no file": (None, LOG, PAST, ["history 'h'", "e.csv does not exist", "relative to"]),
  "no column": (EVENTS.replace(b",x", b",z"), LOG, PAST, ["e.csv has no column 'x'", "'z'"]),
  "no user": (EVENTS.replace(b"u2", b""), LOG, PAST, ["e.csv, line 3", "'u' is missing"]),
  "no time": (EVENTS.replace(b"6", b""), LOG, PAST, ["e.csv, line 3", "'t' is missing"]),
  "time in words": (EVENTS.replace(b"6", b"noon"), LOG, PAST, ["e.csv, line 3", "'t'", "'noon'"]),
  "time too large": (EVENTS.replace(b"6", b"1e300"), LOG, PAST, ["e.csv, line 3", "seconds"]),
  "no value": (
    EVENTS,
    LOG,
    PAST + 'missing = "error"\n',
    ["e.csv, line 4", "'x' is missing", "missing = 'error'"],
  ),
  "example without time": (
    EVENTS,
    LOG.replace(b"u1,10", b"u1,", 1),
    PAST,
    ["in.csv, line 2", "'t' is missing"],
  ),
  "example with a word for time": (
    EVENTS,
    LOG.replace(b"u1,10", b"u1,now", 1),
    PAST,
    ["in.csv, line 2", "'t' must be a number", "'now'"],
  ),
  "no rows": (b"u,t,x\n", LOG, PAST, ["e.csv", "no rows"]),
  "other users": (
    EVENTS.replace(b"\nu", b"\nx"),
    LOG,
    PAST,
    ["no example", "history 'h' before it", "users of both alike"],
  ),
  "times in milliseconds": (
    b"u,t,x\nu1,5000,a\nu2,6000,b\n",
    LOG,
    PAST,
    ["no example", "history 'h' before it", "times in one unit"],
  ),
  "unknown format": (
    EVENTS,
    LOG,
    PAST.replace("e.csv", "schema.toml"),
    ["schema.toml", "format is unknown"],
  ),
}


@pytest.mark.parametrize("case", CASES)
def test_bad_events(tmp_path, case):
  events, log, schema, words = CASES[case]
  if events is not None:
    (tmp_path / "e.csv").write_bytes(events)
  (tmp_path / "in.csv").touch()
  (tmp_path / "schema.toml").touch()
  sentence = fails(tmp_path, log, schema)
  for word in words:
    assert word in sentence, sentence


def test_times_of_parquet_and_a_folder_that_holds_both(tmp_path):
  """Dates become seconds; the file of events is not read as examples."""
  begin = datetime.datetime(2024, 1, 1)
  hours = lambda *h: [begin + datetime.timedelta(hours=x) for x in h]
  of = lambda n: {"y": [0, 1] * n, "d": [1.0, 2.0] * n, "c": ["a", "b"] * n, "u": ["p", "q"] * n}
  folder = tmp_path / "in"
  folder.mkdir()
  pl.DataFrame(of(10) | {"t": hours(*range(10, 30))}).write_parquet(folder / "log.parquet")
  events = {"u": ["q", "p", "q"], "t": hours(12, 3, 1), "x": ["late", "p", "early"]}
  pl.DataFrame(events).write_parquet(folder / "e.parquet")
  (tmp_path / "schema.toml").write_text(PAST.replace("e.csv", "e.parquet"))
  data = prepare("table", folder, tmp_path / "out", tmp_path / "schema.toml", progress=False)
  assert sum(split.examples for split in data.splits.values()) == 20
  seconds = int(begin.replace(tzinfo=datetime.UTC).timestamp())
  time, offsets = (np.load(data.path / f"h.{part}.npy") for part in ("time", "offsets"))
  assert [(x - seconds) / 3600 for x in time] == [1, 12, 3] and offsets.tolist() == [0, 2, 3]


@pytest.mark.parametrize("options", [{"hash_rows": 9}, {"min_count": 2}])
def test_options_for_all_categories_hold_for_events(tmp_path, options):
  (tmp_path / "e.csv").write_bytes(b"u,t,x\nu1,5,a\nu2,6,b\nu1,7,a\n")
  (tmp_path / "in.csv").write_bytes(LOG)
  (tmp_path / "schema.toml").write_text(PAST)
  made = prepare(
    "table",
    tmp_path / "in.csv",
    tmp_path / "out",
    tmp_path / "schema.toml",
    progress=False,
    **options,
  )
  assert made.features.tables["h.x"] == options.get("hash_rows", 3)  # Only `a` came twice.


def test_a_disk_that_fills_up_on_the_events(tmp_path, monkeypatch):
  def save(path, array, **_):
    path.write_bytes(b"x")
    raise OSError("3 requested and 0 written")  # What numpy says.

  (tmp_path / "e.csv").write_bytes(EVENTS)
  (tmp_path / "in.csv").touch()
  (tmp_path / "schema.toml").touch()
  monkeypatch.setattr("gemjax.data.histories.np.save", save)
  sentence = fails(tmp_path, LOG, PAST)
  assert "h.x.npy failed (3 requested and 0 written); free the disk" in sentence
