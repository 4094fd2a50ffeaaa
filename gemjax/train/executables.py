"""Executables of a run's programs, ahead of time: loaded without tracing and without compiling.

JAX's own cache is asked with the traced and lowered program, which takes seconds to make. Here a
program is asked for by all that it follows from: config, features, mesh, devices, shapes of the
batch, versions and source. Whatever differs, another name is asked for, so that no stale
executable is ever run.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import os
import pathlib
import pickle
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

import gemjax
from gemjax import fields
from gemjax.config import FREE_ON_RESUME, Config
from gemjax.features import FeatureSet
from gemjax.train.cache import Cache, host

_PACKAGES = (
  *("jax", "jaxlib", "flax", "optax", "einops"),
  *(f"jax-cuda{v}-{part}" for v in (12, 13) for part in ("plugin", "pjrt")),
  *(f"nvidia-cudnn-cu{v}" for v in (12, 13)),
)
_SETTINGS = ("jax_default_matmul_precision", "jax_enable_x64", "jax_default_prng_impl")


class Executable(NamedTuple):
  """A program that is ready to be called."""

  call: jax.stages.Compiled
  outputs: Any  # Tree of ShapeDtypeStruct.


class Executables:
  """Those of one run, in its cache; without one nothing is kept.

  Args:
    cache: Where they are kept.
    origin: What all of them follow from.
    devices: Those of the mesh, in its order.
    say: Is told in one sentence why an older executable does not serve, and what took long.
  """

  def __init__(
    self,
    cache: Cache | None = None,
    origin: dict[str, Any] | None = None,
    devices: Sequence[jax.Device] = (),
    say: Callable[[str], None] = print,
  ):
    self._cache, self._origin = cache or Cache(None), origin or {}
    self._devices, self.say = devices, say

  def of(self, **origin: Any) -> Executables:
    """Those of programs that follow from more."""
    return Executables(self._cache, self._origin | origin, self._devices, self.say)

  def load(self, program: str, arguments: Any) -> Executable | None:
    """The executable of a program for arguments of these shapes, or None."""
    if self._cache.folder is None:
      return None
    origin = self._origin | {"arguments": arguments}
    stored = self._cache.get(_name(program, origin))
    if stored is None:
      old = self._cache.newest(f"{program}-")
      if old is not None and (found := _difference(_read(old)[0], self._origin)):
        self.say(f"{program} is compiled anew: {found}")
      return None
    try:
      serialized, in_tree, out_tree, outputs = pickle.loads(_read(stored)[1])
      from jax.experimental import serialize_executable

      call = serialize_executable.deserialize_and_load(
        serialized, in_tree, out_tree, execution_devices=self._devices
      )
      return Executable(call, out_tree.unflatten(outputs))
    except Exception as error:  # Whatever a runtime may say: it costs a compilation.
      first = (str(error) or type(error).__name__).splitlines()[0]
      self.say(f"{program} is compiled anew: its executable cannot be loaded ({first[:200]})")
      return None

  def compile(self, program: str, arguments: Any, lowered: jax.stages.Lowered) -> Executable:
    """Compiles a program and keeps it: before its first call, after which XLA's CPU client cannot
    write it any more.
    """
    outputs = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), lowered.out_info)
    if self._cache.folder is None:
      return Executable(lowered.compile(_options()), outputs)
    from jax.experimental import serialize_executable

    with self._cache.aside():
      made = Executable(lowered.compile(_options()), outputs)
    try:
      serialized, in_tree, out_tree = serialize_executable.serialize(made.call)
    except Exception as error:  # Not every backend can.
      self.say(f"{program} cannot be kept ({(str(error) or type(error).__name__)[:200]})")
      return made
    origin = self._origin | {"arguments": arguments}
    content = pickle.dumps((serialized, in_tree, out_tree, jax.tree.leaves(outputs)))
    header = json.dumps(origin).encode()
    value = len(header).to_bytes(4, "little") + header + content
    self._cache.put(_name(program, origin), value)
    return made


def origin_of(
  config: Config, features: FeatureSet, steps: int, mesh: jax.sharding.Mesh
) -> dict[str, Any]:
  """What the programs of a run follow from, beside the shapes of their arguments."""
  device = mesh.devices.flat[0]
  tree = config.to_json()
  for path in FREE_ON_RESUME:
    if path.startswith(("memory.", "compilation.unroll", "compilation.early_sums")):
      continue  # Free to change, but another program.
    section, _, name = path.rpartition(".")
    (tree[section] if section else tree).pop(name)
  tree["train"].pop("seed")  # A part of the state.
  return {
    **_versions(),
    "source": _source(),
    "flags": os.environ.get("XLA_FLAGS", ""),
    "files": _profiles(os.environ.get("XLA_FLAGS", "")),
    "settings": {name: str(getattr(jax.config, name)) for name in _SETTINGS},
    "platform": device.client.platform_version,
    "device": device.device_kind + (f" of host {host()}" if device.platform == "cpu" else ""),
    "devices": jax.device_count(),
    "processes": jax.process_count(),
    "mesh": dict(mesh.shape),
    "steps": steps,
    "config": tree,
    "features": features.to_json(),
  }


def _versions() -> dict[str, str]:
  """Of the packages whose code ends up in a program, as far as they are installed."""
  found = {}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def _profiles(flags: str) -> dict[str, str]:
  """File -> digest of what XLA's flags name and may change under its name: profiles of latencies,
  or a file of flags.
  """
  named = [f.partition("=")[2] for f in flags.split() if "profile" in f.partition("=")[0]]
  found = {}
  for path in map(pathlib.Path, filter(None, [flags.strip(), *named])):
    with contextlib.suppress(OSError):  # XLA says what it cannot read.
      for file in [path] if path.is_file() else sorted(path.glob("*.pbtxt")):
        found[str(file)] = hashlib.sha256(file.read_bytes()).hexdigest()[:16]
  return found


def _options() -> dict[str, bool] | None:
  """The first process compiles alone: it must not wait for the others' share of autotuning."""
  alone = jax.default_backend() == "gpu" and jax.process_count() > 1
  return {"xla_gpu_shard_autotuning": False} if alone else None


def _name(program: str, origin: dict[str, Any]) -> str:
  text = json.dumps(origin, sort_keys=True)
  return f"{program}-{hashlib.sha256(text.encode()).hexdigest()[:32]}"


def _read(value: bytes) -> tuple[dict[str, Any], bytes]:
  size = 4 + int.from_bytes(value[:4], "little")
  return json.loads(value[4:size]), value[size:]


def _difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
  """The first thing that differs, in words."""
  new = json.loads(json.dumps(new))
  for name, now in new.items():
    if (before := old.get(name)) == now:
      continue
    if name == "config":
      return fields.difference(before, now) or "the config differs"
    if name in ("source", "features"):
      return f"{'the code' if name == 'source' else 'the data'} has changed"
    return f"{name} was {before!r} and is now {now!r}"
  return None


@functools.cache
def _source() -> str:
  """Of all modules that a program may come from."""
  digest = hashlib.sha256()
  root = pathlib.Path(gemjax.__file__).parent
  for package in (root, root.with_name("pallas_kernels")):
    for file in sorted(package.rglob("*.py")):
      digest.update(file.read_bytes())
  return digest.hexdigest()[:16]
