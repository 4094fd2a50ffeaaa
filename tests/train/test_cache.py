"""The folder of compiled programs: whole entries or none, whoever else writes there."""

import multiprocessing

import pytest

from gemjax.train import cache as cache_lib
from gemjax.train.cache import Cache


def test_what_is_put_is_got(tmp_path):
  cache = Cache(tmp_path / "compiled")
  assert cache.get("a") is None and cache.newest("a") is None
  cache.put("a-1", b"one"), cache.put("a-2", b"")
  assert cache.get("a-1") == b"one" and cache.get("a-2") == b""
  cache.put("a-1", b"two")
  assert Cache(tmp_path / "compiled").get("a-1") == b"two"


def test_only_the_first_process_writes(tmp_path):
  Cache(tmp_path / "compiled", writes=False).put("a", b"x")
  assert not (tmp_path / "compiled").exists()
  Cache(None).put("a", b"x")
  assert Cache(None).get("a") is None


def test_a_killed_write_leaves_nothing_that_is_read(tmp_path, monkeypatch):
  cache = Cache(tmp_path)

  def killed(self, target):
    raise KeyboardInterrupt

  with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
    patch.setattr("pathlib.Path.replace", killed)
    cache.put("a", b"x" * 100)
  assert cache.get("a") is None and cache.newest("a") is None
  cache.put("a", b"y")
  assert cache.get("a") == b"y"


def test_every_flipped_bit_is_seen(tmp_path):
  cache = Cache(tmp_path)
  cache.put("a", b"some value")
  content = (tmp_path / "a").read_bytes()
  for at in range(len(content)):
    (tmp_path / "a").write_bytes(content[:at] + bytes([content[at] ^ 4]) + content[at + 1 :])
    assert cache.get("a") is None
    assert not (tmp_path / "a").exists()


def test_the_oldest_give_way(tmp_path, monkeypatch):
  import os

  cache = Cache(tmp_path)
  (tmp_path / "folder").mkdir()
  (tmp_path / "thesis").write_bytes(bytes(1000))  # What is no entry is not the cache's to remove.
  os.utime(tmp_path / "thesis", (0, 0))
  monkeypatch.setattr(cache_lib, "MAX_BYTES", 350)
  for i in range(5):
    cache.put(f"e{i}", bytes(80))
    os.utime(tmp_path / f"e{i}", (i, i))
  assert [cache.get(f"e{i}") is not None for i in range(5)] == [False, False, True, True, True]
  assert (tmp_path / "thesis").exists() and (tmp_path / "folder").exists()


def _put_many(folder, letter):
  for _ in range(100):
    Cache(folder).put("shared", letter * 50_000)


def test_two_writers_never_mix(tmp_path):
  context = multiprocessing.get_context("spawn")
  writers = [context.Process(target=_put_many, args=(tmp_path, x)) for x in (b"a", b"b")]
  for writer in writers:
    writer.start()
  seen = set()
  while any(writer.is_alive() for writer in writers):
    value = Cache(tmp_path, writes=False).get("shared")
    seen.add(value[:1] + value[-1:] if value else None)
  assert seen - {None} <= {b"aa", b"bb"} and Cache(tmp_path).get("shared")[:1] in (b"a", b"b")
