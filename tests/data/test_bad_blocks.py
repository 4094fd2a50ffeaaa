"""Bad blocks: one sentence that names the place and the law."""

import dataclasses
import pathlib
import shutil

import numpy as np
import pytest
from array_record.python.array_record_module import ArrayRecordWriter
from numbered import BLOCK, FEATURES, assert_equal, columns, drain, write

from gemjax.data.blocks import CorruptBlockError, encode_block
from gemjax.data.pipeline import train_batches
from gemjax.data.prepared import take
from gemjax.features import UNLABELLED


def change(name, row, value):
  """Columns with one value changed, in the second block."""

  def changed():
    out = {k: v.copy() for k, v in columns().items()}
    out[name] = out[name].astype(np.asarray(value).dtype) if name == "label" else out[name]
    out[name][row] = value
    return out

  return changed


@pytest.mark.parametrize(
  ("name", "row", "value", "words"),
  [
    ("ids", (70, 1), 7, ["'seven'", "id 7", "table of 7 rows"]),
    ("ids", (70, 0), -1, ["'row'", "id -1", "1000 rows"]),
    ("ids", (70, 0), 2**31 - 1, ["'row'", "id 2147483647"]),
    ("label", (70, 1), np.uint8(2), ["'buy'", "label 2"]),
    ("label", (70, 0), np.float32(np.nan), ["'click'", "nan"]),
    ("label", (70, 0), np.float32(0.5), ["'click'", "0.5"]),
    ("label", (70, 0), np.int8(-1), ["'click'", "-1"]),
    ("label", (70, 0), np.uint8(UNLABELLED), ["'click'", "label 255"]),
    ("dense", (70, 1), np.nan, ["'y'", "nan", "not finite"]),
    ("dense", (70, 0), -np.inf, ["'x'", "-inf", "not finite"]),
    ("group", 70, -1, ["'group'", "no user"]),
    ("h.values", 170, 60, ["'h'", "id 60", "60 rows"]),
    ("h.values", 170, -5, ["'h'", "id -5"]),
  ],
)
def test_a_bad_value_is_named(tmp_path, name, row, value, words):
  data = write(tmp_path / "p", [change(name, row, value)()])
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  text = str(error.value)
  assert "train-00000.array_record block 1" in text and "prepare again" in text
  assert "\n" not in text
  for word in words:
    assert word in text


def _lengths(row, by):
  def changed(c):
    c["h.lengths"][row] += by
    return c

  return changed


@pytest.mark.parametrize(
  ("broken", "words"),
  [
    (lambda c: c | {"dense": c["dense"][:, :1]}, ["'dense'", "(64, 1)", "(64, 2)"]),
    (lambda c: c | {"ids": np.tile(c["ids"], 2)}, ["'ids'", "(64, 4)", "(64, 2)"]),
    (lambda c: c | {"label": c["label"][:, :1]}, ["'label'", "(64, 1)", "(64, 2)"]),
    (lambda c: c | {"label": c["label"][:, 0]}, ["'label'", "(64,)", "(64, 2)"]),
    (lambda c: {k: v for k, v in c.items() if k != "ids"}, ["'ids'", "absent"]),
    (lambda c: {k: v for k, v in c.items() if k != "group"}, ["'group'"]),
    (lambda c: {k: v for k, v in c.items() if k != "h.values"}, ["'h'", "not in the block"]),
    (lambda c: c | {"dense": c["dense"].astype(np.float64)}, ["'dense'", "float64"]),
    (lambda c: c | {"ids": c["ids"].astype(np.int64)}, ["'ids'", "int64"]),
    (lambda c: c | {"h.values": c["h.values"].astype(np.int64)}, ["'h'", "int64"]),
    (_lengths(5, 1), ["'h'", "64 lengths that sum to"]),
    (_lengths(5, -9), ["'h'", "64 lengths that sum to"]),
  ],
)
def test_a_block_that_disagrees_with_the_features(tmp_path, broken, words):
  """Blocks as another program might have written them: with a good checksum."""
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: broken(c) if b == 0 else c)
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  for word in ["train-00000.array_record block 0", "prepare again", *words]:
    assert word in str(error.value)


def rewrite(data, change_block, change_record=lambda b, record: record, blocks=16):
  """Writes the block file anew, one block after the other changed."""
  path = data.path / data.splits["train"].files[0]
  whole = columns()
  writer = ArrayRecordWriter(str(path), "group_size:1")
  for b in range(blocks):
    block = {k: v.copy() for k, v in take(whole, slice(b * BLOCK, (b + 1) * BLOCK)).items()}
    writer.write(change_record(b, encode_block(change_block(b, block))))
  writer.close()


def test_an_event_list_longer_than_its_maximum(tmp_path):
  short = dataclasses.replace(FEATURES.sequence[0], max_length=4)
  features = dataclasses.replace(FEATURES, sequence=(short, FEATURES.sequence[1]))
  with pytest.raises(CorruptBlockError, match=r"'h': 5 events, but max_length is 4"):
    drain(write(tmp_path / "p", [columns()], features))


def _flipped(record):
  return record[:-1] + bytes([record[-1] ^ 1])


@pytest.mark.parametrize(
  ("change_record", "words"),
  [
    (lambda b, r: _flipped(r) if b == 3 else r, ["block 3", "checksum"]),
    (lambda b, r: r[: len(r) // 2] if b == 3 else r, ["block 3", "checksum"]),
    (lambda b, r: r[:10] if b == 3 else r, ["block 3", "truncated or corrupt"]),
    (lambda b, r: b"" if b == 3 else r, ["block 3", "truncated or corrupt"]),
    (lambda b, r: b"X" * len(r) if b == 3 else r, ["block 3", "not a gemjax block"]),
  ],
)
def test_a_corrupt_record(tmp_path, change_record, words):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: c, change_record)
  with pytest.raises(CorruptBlockError) as error:
    drain(data)
  for word in words:
    assert word in str(error.value)


def test_a_block_of_another_size_than_the_manifest_says(tmp_path):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: take(c, slice(0, 63)) if b == 2 else c)
  with pytest.raises(CorruptBlockError, match=r"block 2: .*holds 63 examples.*says 64"):
    drain(data)


def test_a_file_with_fewer_blocks_than_the_manifest_says(tmp_path):
  data = write(tmp_path / "p", [columns()])
  rewrite(data, lambda b, c: c, blocks=10)
  with pytest.raises(CorruptBlockError, match=r"holds 10 of the 16 blocks"):
    drain(data)


@pytest.mark.parametrize("keep", [0, 100, 0.3, 0.9, -1])
def test_a_truncated_file(tmp_path, keep):
  data = write(tmp_path / "p", [columns()])
  path = data.path / data.splits["train"].files[0]
  whole = path.read_bytes()
  path.write_bytes(whole[: keep if isinstance(keep, int) else int(keep * len(whole))])
  with pytest.raises(CorruptBlockError, match=r"train-00000.*prepare again"):
    drain(data)


def test_a_flipped_byte_is_noticed_or_harmless(tmp_path):
  good = write(tmp_path / "good", [columns()])
  expected = drain(good)
  whole = (good.path / good.splits["train"].files[0]).read_bytes()
  shutil.copytree(good.path, tmp_path / "bad")
  bad = dataclasses.replace(good, path=tmp_path / "bad")
  noticed = 0
  for position in np.random.default_rng(0).integers(0, len(whole), 40):
    flipped = bytes([whole[position] ^ 0x10])
    path = pathlib.Path(bad.path / bad.splits["train"].files[0])
    path.write_bytes(whole[:position] + flipped + whole[position + 1 :])
    try:
      for a, b in zip(drain(bad), expected, strict=True):
        assert_equal(a, b)
    except CorruptBlockError:
      noticed += 1
  assert noticed > 0


@pytest.mark.parametrize("threads", [0, 4])
def test_an_error_reaches_the_trainer_and_nobody_waits_for_ever(tmp_path, threads):
  data = write(tmp_path / "p", [change("ids", (70, 1), 7)()])
  iterator = iter(train_batches(data, batch_size=100, seed=0, threads=threads, prefetch=8))
  with pytest.raises(CorruptBlockError, match="'seven'"):
    for _ in range(20):
      next(iterator)
  iterator.close()
