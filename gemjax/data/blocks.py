"""Blocks: thousands of examples as one ArrayRecord record, column by column.

One record an example limits a pipeline to tens of thousands of examples/s; a block is decoded by
one `np.frombuffer` a column. Layout of a record, little endian:

  b"GEMJAXB1" | uint32 crc32 of the rest | uint32 header length | header JSON | columns, raw bytes

The header is `{"examples": n, "columns": [[name, dtype, shape], ...]}`. A jagged column `x` is two
columns, `x.values` (all events) and `x.lengths` (one int32 an example).
"""

from __future__ import annotations

import json
import struct
import zlib

import numpy as np

MAGIC = b"GEMJAXB1"
_HEAD = struct.Struct("<8sII")

Columns = dict[str, np.ndarray]


class CorruptBlockError(ValueError):
  """A block that does not hold what its header says."""


def encode_block(columns: Columns) -> bytes:
  """The record of `columns`, all of which have one entry an example, `*.values` excepted."""
  examples = {n: len(c) for n, c in columns.items() if not n.endswith(".values")}
  if len(set(examples.values())) != 1:
    raise ValueError(f"the columns of a block must be of one length, got {examples}")
  arrays = [np.ascontiguousarray(c) for c in columns.values()]
  header = {
    "examples": next(iter(examples.values())),
    "columns": [[n, a.dtype.str, list(a.shape)] for n, a in zip(columns, arrays)],
  }
  head = json.dumps(header).encode()
  body = b"".join([struct.pack("<I", len(head)), head, *(a.tobytes() for a in arrays)])
  return MAGIC + struct.pack("<I", zlib.crc32(body)) + body


def decode_block(record: bytes, source: str) -> Columns:
  """Inverse of `encode_block`, without a copy; `source` names file and block in the error."""
  try:
    magic, crc, length = _HEAD.unpack_from(record)
    if magic != MAGIC:
      raise CorruptBlockError(f"{source}: not a gemjax block (it begins with {magic!r})")
    if zlib.crc32(memoryview(record)[12:]) != crc:
      raise CorruptBlockError(f"{source}: checksum mismatch, the block is corrupt; prepare again")
    header = json.loads(record[16 : 16 + length])
    columns, offset = {}, 16 + length
    for name, dtype, shape in header["columns"]:
      count = int(np.prod(shape))
      columns[name] = np.frombuffer(record, dtype, count, offset).reshape(shape)
      offset += count * np.dtype(dtype).itemsize
    return columns
  except (struct.error, KeyError, TypeError, json.JSONDecodeError) as error:
    raise CorruptBlockError(f"{source}: truncated or corrupt block ({error})") from error
