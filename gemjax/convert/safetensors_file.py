"""Files of safetensors, read and written a piece at a time.

  8 bytes, little endian: n   n bytes of JSON   the tensors, one behind the other

The JSON names dtype, shape and place of every tensor, and under __metadata__ texts of ours.
Source: the format as published with huggingface/safetensors.
"""

from __future__ import annotations

import json
import pathlib

import ml_dtypes
import numpy as np

from gemjax.convert.tensors import ConvertError, Tensor, Tensors
from gemjax.convert.torch_file import file_rows

METADATA = "__metadata__"
MAX_HEADER = 100_000_000  # Bytes; the publisher's limit.
DTYPES = {
  "F64": np.float64,
  "F32": np.float32,
  "F16": np.float16,
  "BF16": ml_dtypes.bfloat16,
  "F8_E4M3": ml_dtypes.float8_e4m3fn,
  "F8_E5M2": ml_dtypes.float8_e5m2,
  "I64": np.int64,
  "I32": np.int32,
  "I16": np.int16,
  "I8": np.int8,
  "U64": np.uint64,
  "U32": np.uint32,
  "U16": np.uint16,
  "U8": np.uint8,
  "BOOL": np.bool_,
}
NAMES = {np.dtype(dtype): name for name, dtype in DTYPES.items()}


def read_safetensors(path: pathlib.Path) -> tuple[Tensors, dict[str, str]]:
  """(tensors, metadata).

  Raises:
    ConvertError: the file is truncated, none of safetensors, or has a type that numpy has not.
  """
  size = path.stat().st_size
  with path.open("rb") as file:
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(MAX_HEADER, size - 8):
      raise ConvertError(f"{path} is truncated, or no file of safetensors")
    head = file.read(length)
  try:
    tree = json.loads(head)
    metadata = tree.pop(METADATA, None) or {}
    if not isinstance(metadata, dict):
      raise ValueError(f"its {METADATA} are no texts by name")
    tensors, ends = {}, [0]
    for name, entry in tree.items():
      if entry["dtype"] not in DTYPES:
        kinds = ", ".join(DTYPES)
        raise ConvertError(f"{path}: {name} is {entry['dtype']}, but only {kinds} are converted")
      dtype, shape = np.dtype(DTYPES[entry["dtype"]]), tuple(entry["shape"])
      begin, end = entry["data_offsets"]
      tensors[name] = Tensor(shape, dtype, file_rows(path, 8 + length + begin, shape, dtype))
      if end - begin != tensors[name].nbytes:
        raise ValueError(f"{name} has {end - begin} bytes")
      ends.append(end)
  except ConvertError:
    raise
  except (ValueError, KeyError, TypeError, AttributeError) as error:
    raise ConvertError(f"{path} is corrupt, or no file of safetensors ({error})") from error
  if size != 8 + length + max(ends):
    raise ConvertError(f"{path} is truncated: it has {size:,} bytes of {8 + length + max(ends):,}")
  return tensors, metadata


def write_safetensors(path: pathlib.Path, tensors: Tensors, metadata: dict[str, str]) -> None:
  """Raises ConvertError for a type that the format does not have."""
  tree: dict = {METADATA: metadata} if metadata else {}
  end = 0
  for name, tensor in tensors.items():
    if tensor.dtype not in NAMES:
      raise ConvertError(f"{name} is {tensor.dtype}, which safetensors does not have")
    place = [end, end := end + tensor.nbytes]
    tree[name] = {
      "dtype": NAMES[tensor.dtype],
      "shape": list(tensor.shape),
      "data_offsets": place,
    }
  head = json.dumps(tree).encode()
  head += b" " * (-len(head) % 8)  # So that the tensors are aligned.
  with path.open("wb") as file:
    file.write(len(head).to_bytes(8, "little") + head)
    for tensor in tensors.values():
      for piece in tensor.pieces():
        file.write(piece.tobytes())
