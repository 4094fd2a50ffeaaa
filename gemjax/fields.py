"""Typed fields of nested dataclasses: checked, written as JSON, read back, and compared.

A field is a whole number, a number, true or false, text, a tuple of whole numbers, a dict from
names to numbers or text, or another dataclass: one, or where the annotation is a union one of
several "kinds".
"""

import dataclasses
import typing
from typing import Any


class ConfigError(ValueError):
  """A field with a value that breaks the law named in the message."""


def need(holds: bool, field: str, value: Any, law: str) -> None:
  """Raises ConfigError unless `holds`."""
  if not holds:
    raise ConfigError(f"config.{field} is {value!r}, but must be {law}")


def _whole(value: Any) -> bool:
  return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
  return isinstance(value, int | float) and not isinstance(value, bool)


def _named(value: Any, of) -> bool:
  return isinstance(value, dict) and all(isinstance(k, str) and of(v) for k, v in value.items())


# Annotation: (how its values are called, whether a value is one).
_PLAIN = {
  bool: ("true or false", lambda v: isinstance(v, bool)),
  int: ("a whole number", _whole),
  float: ("a number", _number),
  str: ("text", lambda v: isinstance(v, str)),
  tuple[int, ...]: (
    "a tuple of whole numbers",
    lambda v: isinstance(v, tuple) and all(map(_whole, v)),
  ),
  dict[str, str]: ("a dict from names to text", lambda v: _named(v, lambda x: isinstance(x, str))),
  dict[str, int]: ("a dict from names to whole numbers", lambda v: _named(v, _whole)),
  dict[str, float]: ("a dict from names to numbers", lambda v: _named(v, _number)),
}


def check_types(section: Any, prefix: str = "") -> None:
  """Raises ConfigError; flags convert what they are given, but a file may assign anything."""
  for field in dataclasses.fields(section):
    name, value = prefix + field.name, getattr(section, field.name)
    if field.type in _PLAIN:
      law, holds = _PLAIN[field.type]
      need(holds(value), name, value, law)
    else:
      kinds = _kinds(field.type)
      need(isinstance(value, tuple(kinds.values())), name, value, f"of class {' or '.join(kinds)}")
      check_types(value, name + ".")


def to_json(section: Any) -> dict[str, Any]:
  """A tree of what JSON knows; where a field may be of several kinds, `kind` names the class."""
  tree = {}
  for field in dataclasses.fields(section):
    value = getattr(section, field.name)
    if field.type not in _PLAIN:
      kind = {"kind": type(value).__name__} if len(_kinds(field.type)) > 1 else {}
      value = kind | to_json(value)
    tree[field.name] = list(value) if isinstance(value, tuple) else value
  return tree


def from_json(annotation: Any, tree: Any, path: str) -> Any:
  """Inverse of `to_json`; a field that is absent keeps its default.

  Raises:
    ConfigError: a field or a kind that does not exist, or a name without a default that is absent.
  """
  if annotation in _PLAIN:
    return tuple(tree) if isinstance(tree, list) else tree
  if not isinstance(tree, dict):
    raise ConfigError(f"{path} is {tree!r}, but must be an object of fields")
  kinds = _kinds(annotation)
  kind, given = next(iter(kinds.values())), dict(tree)
  if len(kinds) > 1:
    name = given.pop("kind", None)
    if name not in kinds:
      raise ConfigError(f"{path}.kind is {name!r}, but must be one of {', '.join(kinds)}")
    kind = kinds[name]
  known = {field.name: field for field in dataclasses.fields(kind)}
  for name in given:
    if name not in known:
      raise ConfigError(f"{path}.{name} does not exist; the fields are {', '.join(known)}")
  try:
    return kind(**{n: from_json(known[n].type, v, f"{path}.{n}") for n, v in given.items()})
  except TypeError as error:
    raise ConfigError(f"{path} lacks a field ({error})") from error


def difference(
  old: dict[str, Any], new: dict[str, Any], free: tuple[str, ...] = (), prefix: str = ""
) -> str | None:
  """The first field in which two `to_json` trees differ, in words; `free` ones excepted."""
  for key in [*old, *(k for k in new if k not in old)]:
    path = prefix + key
    a, b = old.get(key), new.get(key)
    if isinstance(a, dict) and isinstance(b, dict) and a and b:
      if found := difference(a, b, free, path + "."):
        return found
    elif a != b and path not in free:
      return f"config.{path} was {a!r} and is now {b!r}"
  return None


def _kinds(annotation: Any) -> dict[str, type]:
  return {kind.__name__: kind for kind in typing.get_args(annotation) or (annotation,)}
