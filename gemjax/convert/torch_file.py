"""Files of `torch.save`, read and written a piece at a time.

PyTorch says where in the file the bytes of every tensor lie, in reading (under FakeTensorMode) as
in writing (`skip_data` leaves them out); the bytes themselves never pass through it. What is
written this way has no checksums inside its zip archive, which `torch.load` does not look at.
"""

from __future__ import annotations

import pathlib
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from gemjax.convert.tensors import ConvertError, Tensor, Tensors

Tree = dict[str, Any]  # Names to tensors or further trees.


def torch_module():
  """PyTorch; raises ConvertError where it is not installed."""
  try:
    import torch
  except ImportError as error:
    raise ConvertError("files of PyTorch need PyTorch: pip install 'gemjax[convert]'") from error
  return torch


def file_rows(
  path: pathlib.Path, at: int, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[int, int], np.ndarray]:
  """`Tensor.read` of an array that lies in a file from byte `at` on, row after row."""
  row = shape[1:]
  count = int(np.prod(row, dtype=np.int64))

  def read(start: int, stop: int) -> np.ndarray:
    # Not mapped into memory, where what was read would stay.
    begin = at + start * count * dtype.itemsize
    values = np.fromfile(path, dtype, (stop - start) * count, offset=begin)
    if len(values) < (stop - start) * count:
      raise ConvertError(f"{path} is truncated")
    return values.reshape(stop - start, *row)

  return read


def read_torch(path: pathlib.Path) -> Tensors:
  """Every tensor of a file, names of dicts inside dicts joined by dots; what is no tensor is left.

  Raises:
    ConvertError: the file is truncated, none of `torch.save`, or holds more than plain tensors.
  """
  torch, tree = torch_module(), fake_load(path, path)
  tensors: Tensors = {}

  def visit(prefix: str, value: Any) -> None:
    if isinstance(value, dict):
      for key, inner in value.items():
        visit(f"{prefix}.{key}" if prefix else str(key), inner)
    elif isinstance(value, torch.Tensor):
      tensors[prefix] = _stored(path, prefix, value)

  visit("", tree)
  if not tensors:
    raise ConvertError(f"{path} holds no tensors")
  return tensors


def write_torch(path: pathlib.Path, tree: Tree) -> None:
  """Writes what `torch.load` reads as the same tree of tensors."""
  torch = torch_module()
  from torch.serialization import skip_data

  def empty(value: Any) -> Any:
    if isinstance(value, dict):
      return {key: empty(inner) for key, inner in value.items()}
    # Memory that is never touched takes no room.
    return torch.empty(value.shape, dtype=_torch_dtype(value.dtype))

  def fill(file, value: Any, place: Any) -> None:
    if isinstance(value, dict):
      for key, inner in value.items():
        fill(file, inner, place[key])
      return
    file.seek(place.untyped_storage()._checkpoint_offset)
    for piece in value.pieces():
      file.write(piece.tobytes())

  with skip_data():
    torch.save(empty(tree), path)
  places = fake_load(path, path)
  with path.open("r+b") as file:
    fill(file, tree, places)


def fake_load(file: Any, path: pathlib.Path) -> Any:
  """What `torch.load` returns of a file or of its path, its tensors without their bytes.

  Raises:
    ConvertError: it is truncated, none of `torch.save`, or holds more than plain tensors.
  """
  torch = torch_module()
  from torch._subclasses.fake_tensor import FakeTensorMode

  try:
    with FakeTensorMode():
      return torch.load(file, weights_only=True, map_location="cpu")
  except Exception as error:  # Of the zip reader, the unpickler, and PyTorch's own kinds.
    raise ConvertError(
      f"{path} is truncated, or no file of torch.save that holds tensors alone "
      f"({type(error).__name__}); save the model's state_dict()"
    ) from error


def _stored(path: pathlib.Path, name: str, fake: Any) -> Tensor:
  dtype = numpy_dtype(fake.dtype)
  shape, strides = tuple(fake.shape), fake.stride()
  at = fake.untyped_storage()._checkpoint_offset
  if at is None:
    raise ConvertError(f"{path} is of PyTorch before 1.6; load and save it again")
  if fake.is_contiguous():
    return Tensor(shape, dtype, file_rows(path, at + fake.storage_offset() * dtype.itemsize,
                                          shape, dtype))  # fmt: skip
  whole = file_rows(path, at, (fake.untyped_storage().nbytes() // dtype.itemsize,), dtype)

  def read(start: int, stop: int) -> np.ndarray:
    values = whole(0, fake.untyped_storage().nbytes() // dtype.itemsize)
    steps = tuple(s * dtype.itemsize for s in strides)
    return np.lib.stride_tricks.as_strided(values[fake.storage_offset() :], shape, steps)[
      start:stop
    ]

  return Tensor(shape, dtype, read)


def numpy_dtype(dtype: Any) -> np.dtype:
  """numpy's type of one of PyTorch; raises ConvertError where there is none."""
  name = str(dtype).removeprefix("torch.")
  try:
    return np.dtype(getattr(ml_dtypes, name, None) or name)
  except TypeError as error:
    raise ConvertError(f"tensors of {dtype} cannot be converted") from error


def _torch_dtype(dtype: np.dtype) -> Any:
  return getattr(torch_module(), dtype.name)
