"""A folder of compiled programs that outlives the process: JAX's own entries and ours.

By default it is WORKDIR/compiled: the one folder of which all hosts of a run are known to share it
and to have room in it, that one run at a time writes, and that goes when the run goes. An entry is
written whole or not at all and checked when it is read, so that a killed process, a full disk or a
flipped bit costs a compilation and no run. Entries run as code: share the folder with people whom
you trust.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import pathlib
import platform
import sys
import threading
import zlib
from collections.abc import Iterator

import jax

from gemjax.train.workdir import COMPILED

MAX_BYTES = 4 << 30  # Of all entries; the oldest give way.
_MARK = b"gemjax-1"


class Cache:
  """Entries by name; without a folder it holds nothing.

  Args:
    folder: Made with the first entry.
    writes: One process of a run does.
  """

  def __init__(self, folder: pathlib.Path | None, *, writes: bool = True):
    self.folder, self._writes = folder, writes
    self.needed = False  # Whether an entry that cannot be kept is an error.
    self._told = False
    self._aside = threading.local()

  @classmethod
  def of_run(cls, workdir: pathlib.Path, named: str = "workdir", *, writes: bool = True) -> Cache:
    """Where `config.compilation.cache` says; nowhere where JAX_COMPILATION_CACHE_DIR names a cache
    of JAX's own, which takes its place.
    """
    if named == "off" or jax.config.jax_compilation_cache_dir:
      return cls(None)
    folder = workdir / COMPILED if named == "workdir" else pathlib.Path(named).absolute()
    return cls(folder, writes=writes)

  def get(self, name: str) -> bytes | None:
    """What was put, or None where there is nothing or not that."""
    if self.folder is None:
      return None
    file = self.folder / name
    try:
      content = memoryview(file.read_bytes())
    except OSError:
      return None
    mark, crc, value = content[:8], content[8:12], content[12:]
    if mark == _MARK and int.from_bytes(crc, "little") == zlib.crc32(value):
      return bytes(value)
    self._tell(f"{file} is corrupt: compiled anew")
    if self._writes:
      file.unlink(missing_ok=True)
    return None

  def put(self, name: str, value: bytes) -> None:
    """Replaces what was there; an error of the disk is said once and is none of the run's, unless
    the entries are `needed`.
    """
    if self.folder is None or not self._writes:
      return
    partial = self.folder / f"{name}.{os.getpid()}.partial"
    try:
      self.folder.mkdir(parents=True, exist_ok=True)
      self._make_room(len(value))
      partial.write_bytes(_MARK + zlib.crc32(value).to_bytes(4, "little") + value)
      partial.replace(self.folder / name)
    except OSError as error:
      with contextlib.suppress(OSError):
        partial.unlink(missing_ok=True)
      lost = f"compiled programs are not kept in {self.folder} ({error.strerror})"
      if self.needed:
        raise OSError(f"{lost}; name another folder with --config.compilation.cache") from error
      self._tell(lost)

  def newest(self, start: str) -> bytes | None:
    """The youngest entry whose name begins so."""
    files = [] if self.folder is None else list(self.folder.glob(f"{start}*"))
    with contextlib.suppress(OSError):  # Another run may have removed one.
      if files := [f for f in files if not f.name.endswith(".partial")]:
        return self.get(max(files, key=lambda f: f.stat().st_mtime).name)
    return None

  @contextlib.contextmanager
  def behind_jax(self) -> Iterator[None]:
    """JAX looks here before it compiles anything, however small."""
    from jax._src import compilation_cache  # JAX has no public place for a cache of one's own.

    if self.folder is None:
      yield
      return
    names = {
      "jax_compilation_cache_dir": str(self.folder),
      "jax_persistent_cache_min_compile_time_secs": 0.0,
      "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in names}
    compilation_cache.reset_cache()
    for name, value in names.items():
      jax.config.update(name, value)
    compilation_cache._cache = _jax_cache(self)
    compilation_cache._cache_initialized = True
    try:
      yield
    finally:
      for name, value in before.items():
        jax.config.update(name, value)
      compilation_cache.reset_cache()

  @contextlib.contextmanager
  def aside(self) -> Iterator[None]:
    """What this thread compiles really is compiled, and not kept for JAX: of what XLA's CPU client
    has read it writes only a part, and so no executable could be made of it.
    """
    self._aside.now = True
    try:
      yield
    finally:
      self._aside.now = False

  @property
  def is_aside(self) -> bool:
    return getattr(self._aside, "now", False)

  def _make_room(self, size: int) -> None:
    found = []
    for file in filter(_is_entry, self.folder.iterdir()):
      with contextlib.suppress(FileNotFoundError):  # Another run may have removed it.
        found.append((file.stat().st_mtime, file.stat().st_size, file))
    total = size + sum(held for _, held, _ in found)
    for _, held, file in sorted(found):
      if total <= MAX_BYTES:
        break
      file.unlink(missing_ok=True)
      total -= held

  def _tell(self, sentence: str) -> None:
    if self._writes and not self._told:
      print(sentence, file=sys.stderr, flush=True)
    self._told = True


def _is_entry(file: pathlib.Path) -> bool:
  """Ours: a folder that a user names may hold other files."""
  with contextlib.suppress(OSError), open(file, "rb") as content:
    return content.read(len(_MARK)) == _MARK
  return False


def _jax_cache(cache: Cache):
  from jax._src.compilation_cache_interface import CacheInterface

  class JaxCache(CacheInterface):
    _path = cache.folder

    def get(self, key: str) -> bytes | None:
      return None if cache.is_aside else cache.get(f"{key}-{host()}")

    def put(self, key: str, value: bytes) -> None:
      if not cache.is_aside:
        cache.put(f"{key}-{host()}", value)

  return JaxCache()


@functools.cache
def host() -> str:
  """Of the processor's kind: code for a CPU runs on its like alone, and JAX calls all "cpu"."""
  text = platform.machine()
  with contextlib.suppress(OSError):
    lines = pathlib.Path("/proc/cpuinfo").read_text().splitlines()
    text += "".join(sorted({x for x in lines if x.startswith(("flags", "model name", "Features"))}))
  return hashlib.sha256(text.encode()).hexdigest()[:8]
