"""Schema files: the TOML that schema.py explains, read entry by entry."""

from __future__ import annotations

import dataclasses
import os
import tomllib
from typing import Any

from gemjax.data.schema import (
  FIELDS,
  Column,
  HistoryRule,
  Schema,
  SchemaError,
  SplitRule,
  check_value,
)


def load_schema(path: str | os.PathLike) -> Schema:
  """Reads a TOML schema; raises SchemaError naming the file, the entry and what it may be."""
  try:
    with open(path, "rb") as file:
      tree = tomllib.load(file)
    made = {"columns": _columns(tree.pop("columns", {}), "columns", "kind = ...", {})}
    made["histories"] = {}
    for name, rule in _tables(tree.pop("histories", {}), "histories", "file = ...").items():
      try:
        made["histories"][name] = _history(rule)
      except SchemaError as error:
        raise SchemaError(f"history {name!r}: {error}") from error
    split = tree.pop("split", {})
    if not isinstance(split, dict):
      raise SchemaError("split must be a table: write [split] and below it by = ...")
    schema = _make(Schema, tree | made | {"split": _make(SplitRule, split)})
    _check_tables(schema)
    return schema
  except (SchemaError, tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
    raise SchemaError(f"schema {path}: {error}") from error
  except OSError as error:
    raise SchemaError(f"schema {path} cannot be read: {error.strerror}") from error


def _check_tables(schema: Schema) -> None:
  """Whoever writes `table` means another column's."""
  tables = [column.table or name for name, column in schema.categories.items()]
  for name, column in schema.categories.items():
    if column.table not in ("", name) and tables.count(column.table) == 1:
      raise SchemaError(
        f"column {name!r}: no other column has rows in table {column.table!r}; name one whose rows "
        f"it shares, of {sorted({*tables} - {column.table})}, or drop it"
      )


def _tables(tree: Any, name: str, first: str) -> dict[str, dict[str, Any]]:
  if not isinstance(tree, dict) or not all(isinstance(x, dict) for x in tree.values()):
    raise SchemaError(f"{name} must be tables: write [{name}.NAME] and below it {first}")
  return tree


def _columns(tree: Any, name: str, first: str, default: dict[str, str]) -> dict[str, Column]:
  made = {}
  for column, fields in _tables(tree, name, first).items():
    try:
      made[column] = _make(Column, default | fields)
    except SchemaError as error:
      raise SchemaError(f"column {column!r}: {error}") from error
  return made


def _history(tree: dict[str, Any]) -> HistoryRule:
  columns = _columns(tree.pop("columns", {}), "columns", "table = ...", {"kind": "sparse"})
  if not tree.get("file"):
    raise SchemaError("file is missing; name the file of its events, relative to the table")
  return _make(HistoryRule, tree | {"columns": columns})


def _make(kind: type, tree: dict[str, Any]) -> Any:
  fields = {f.name: f for f in dataclasses.fields(kind)}
  for name in tree:
    if name not in fields:
      raise SchemaError(f"unknown field {name!r}; choose from {list(fields)}")
  if kind is Column and "kind" not in tree:
    raise SchemaError(f"kind is missing; choose from {list(FIELDS)}")
  if kind is not Column:  # A column checks its own, by kind.
    for name, value in tree.items():
      check_value(name, value, fields[name].default)
  return kind(**{n: tuple(v) if isinstance(v, list) else v for n, v in tree.items()})
