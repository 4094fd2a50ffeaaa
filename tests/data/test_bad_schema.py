"""Bad schemas: one sentence that names file, column, entry and what it may be."""

import pytest
from failing import SCHEMA, fails, with_row

TIMED = 'user = "u"\ntime = "t"\n' + SCHEMA
PAST = TIMED + '[histories.h]\nfile = "e.csv"\n[histories.h.columns.x]\n'

SCHEMAS = {
  "no label": (
    SCHEMA.replace('"label"', '"sparse"'),
    ["schema.toml", "no label", "kind = 'label'"],
  ),
  "no feature": ('[columns.y]\nkind = "label"\n', ["no feature"]),
  "unknown kind": (SCHEMA.replace('"dense"', '"danse"'), ["column 'd'", "'danse'", "'dense'"]),
  "kind a table": (SCHEMA.replace('"dense"', "{a = 1}"), ["column 'd'", "{'a': 1}", "'dense'"]),
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
  "optional in words": (
    SCHEMA.replace('"label"', '"label"\noptional = "yes"'),
    ["column 'y'", "optional must be true or false", "'yes'"],
  ),
  "optional feature": (SCHEMA + "optional = true\n", ["column 'c'", "no field 'optional'"]),
  "min_count 0": (SCHEMA + "min_count = 0\n", ["column 'c'", "min_count", "at least 1"]),
  "shared sizes": (
    SCHEMA + 'table = "t"\n[columns.u]\nkind = "sparse"\ntable = "t"\nrows = 9\n',
    ["'c' and 'u' share table 't'", "rows is 0 for one and 9"],
  ),
  "shared with none": (
    SCHEMA + '[columns.u]\nkind = "sparse"\ntable = "cc"\n',
    ["column 'u'", "no other column has rows in table 'cc'", "of ['c']"],
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
  "history named like a column": (
    PAST.replace("histories.h", "histories.c") + 'kind = "sparse"\n',
    ["schema.toml", "history 'c'", "rename"],
  ),
  "history without user": (PAST.replace('user = "u"', ""), ["history 'h'", "`user = COLUMN`"]),
  "history without time": (PAST.replace('time = "t"', ""), ["history 'h'", "`time = COLUMN`"]),
  "history without file": (PAST.replace('file = "e.csv"', ""), ["history 'h'", "file is missing"]),
  "history without column": (
    TIMED + '[histories.h]\nfile = "e.csv"\n',
    ["history 'h'", "no column", "[histories.NAME.columns.X]"],
  ),
  "history of another kind": (
    PAST + 'kind = "dense"\n',
    ["history 'h'", "column 'x' must be sparse", "'dense'"],
  ),
  "unknown field of a history": (
    PAST.replace('"e.csv"', '"e.csv"\nlength = 3'),
    ["history 'h'", "'length'", "'max_length'"],
  ),
  "field of an event's column": (PAST + "rows = -1\n", ["history 'h'", "column 'x'", "rows"]),
  "no room for an event": (
    PAST.replace('"e.csv"', '"e.csv"\nmax_length = 0'),
    ["history 'h'", "max_length must be at least 1, got 0"],
  ),
  "history in words": (
    PAST.replace('"e.csv"', '"e.csv"\nmax_length = "all"'),
    ["history 'h'", "max_length must be a whole number", "'all'"],
  ),
  "column named time": (PAST.replace("s.x]", "s.time]"), ["history 'h'", "'time'", "not time"]),
  "name of no file": (PAST.replace("histories.h", 'histories."a/b"'), ["history 'a/b'", "letters"]),
  "histories a list": ("histories = [3]\n" + SCHEMA, ["[histories.NAME]"]),
  "history like a table": (
    PAST + 'table = "c"\nmin_count = 2\n',
    ["'c' and 'h.x' share table 'c'", "min_count is 1 for one and 2"],
  ),
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
