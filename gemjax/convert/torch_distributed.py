"""Folders of `torch.distributed.checkpoint`, in which every process wrote its shards of a tensor.

A shard is a file of `torch.save` inside a larger one: its bytes are read where they lie, however
many processes wrote them. The folder's .metadata is a pickle, which PyTorch loads: read only
folders that you trust.
"""

from __future__ import annotations

import functools
import io
import pathlib
from typing import Any

import numpy as np

from gemjax.convert.tensors import ConvertError, Tensor, Tensors
from gemjax.convert.torch_file import fake_load, file_rows, numpy_dtype, torch_module

METADATA = ".metadata"


def read_distributed(folder: pathlib.Path) -> Tensors:
  """Every tensor by its name; what is no tensor is left.

  Raises:
    ConvertError: the folder is none of torch.distributed.checkpoint, or a file is truncated.
  """
  torch_module()
  from torch.distributed.checkpoint import FileSystemReader
  from torch.distributed.checkpoint.metadata import TensorStorageMetadata

  if not (folder / METADATA).is_file():
    raise ConvertError(f"{folder} is no folder of torch.distributed.checkpoint (no {METADATA})")
  try:
    metadata = FileSystemReader(folder).read_metadata()
  except Exception as error:  # Of the unpickler.
    raise ConvertError(f"{folder / METADATA} is truncated or corrupt ({error})") from error
  places = {(index.fqn, tuple(index.offset or ())): info
            for index, info in metadata.storage_data.items()}  # fmt: skip
  tensors: Tensors = {}
  for name, found in metadata.state_dict_metadata.items():
    if not isinstance(found, TensorStorageMetadata):
      continue
    dtype, shape = numpy_dtype(found.properties.dtype), tuple(found.size)
    shards = []
    for chunk in found.chunks:
      info = places[name, tuple(chunk.offsets)]
      shards.append((tuple(chunk.offsets), tuple(chunk.sizes), folder / info.relative_path,
                     info.offset, info.length))  # fmt: skip
    tensors[name] = Tensor(shape, dtype, functools.partial(_rows, shape, dtype, shards))
  return tensors


def _rows(
  shape: tuple[int, ...], dtype: np.dtype, shards: list[tuple], start: int, stop: int
) -> np.ndarray:
  out = np.empty((stop - start, *shape[1:]), dtype)
  for offsets, sizes, file, at, length in shards:
    if not shape:
      return file_rows(file, _data(file, at, length), (), dtype)(0, 1)
    first, last = max(start, offsets[0]), min(stop, offsets[0] + sizes[0])
    if first >= last:
      continue
    rows = file_rows(file, _data(file, at, length), sizes, dtype)
    within = tuple(slice(o, o + n) for o, n in zip(offsets[1:], sizes[1:]))
    part = rows(first - offsets[0], last - offsets[0])
    out[(slice(first - start, last - start), *within)] = part
  return out


@functools.lru_cache(4096)
def _data(file: pathlib.Path, at: int, length: int) -> int:
  """Where in `file` the bytes of a shard begin."""
  with file.open("rb") as stream:
    fake: Any = fake_load(_Part(stream, at, length), file)
  if not fake.is_contiguous() or fake.storage_offset():
    raise ConvertError(f"{file}: a shard's bytes are not in order")
  return at + fake.untyped_storage()._checkpoint_offset


class _Part(io.RawIOBase):
  """A part of a file as a file."""

  def __init__(self, stream: io.BufferedReader, at: int, length: int):
    self._stream, self._at, self._length, self._place = stream, at, length, 0

  def seekable(self) -> bool:
    return True

  def readable(self) -> bool:
    return True

  def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
    self._place = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._place}.get(whence, self._length)
    return self._place

  def tell(self) -> int:
    return self._place

  def readinto(self, buffer) -> int:
    self._stream.seek(self._at + self._place)
    found = self._stream.read(min(len(buffer), max(0, self._length - self._place)))
    buffer[: len(found)] = found
    self._place += len(found)
    return len(found)
