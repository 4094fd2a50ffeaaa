"""The training step in bfloat16 beside float32, here and in PyTorch, on this machine's cores.

The model is that of the suite train_step. Whether bfloat16 pays is the processor's: with AMX or
AVX512-BF16 it multiplies pairs at once, without either it converts to float32 and back.
"""

from __future__ import annotations

import pathlib
import statistics
import time

import numpy as np
from benchmarks import pytorch_wukong as peer
from benchmarks.own_process import OwnProcess
from benchmarks.wukong_step import per_field, random_batch, torch_weights, wukong
from tqdm import tqdm

STEPS, WARM = 5, 2
FLAGS = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")


def run() -> dict[str, float]:
  """Examples/s of either library in either type, all four in turns; medians."""
  rows = per_field(peer.ROWS) * peer.FIELDS
  ours, seconds = {}, {}
  for dtype in ("float32", "bfloat16"):
    trainer, state, step = wukong(peer.ROWS, dtype)
    weights = torch_weights(trainer, state)
    ours[dtype] = [state, step]
    seconds[f"gemjax_{dtype}"], seconds[f"pytorch_{dtype}"] = [], []
  theirs = {
    dtype: OwnProcess(peer.trainer_of, weights, rows, dtype == "bfloat16") for dtype in ours
  }
  rng = np.random.default_rng(0)
  for _ in tqdm(range(STEPS + WARM), desc="four steps"):
    batch = random_batch(rng, peer.ROWS)
    ids_BS = batch.ids_BS + per_field(peer.ROWS) * np.arange(peer.FIELDS)
    for dtype, held in ours.items():
      start = time.perf_counter()
      held[0], loss = held[1](held[0], batch)
      float(loss)
      seconds[f"gemjax_{dtype}"].append(time.perf_counter() - start)
      _, took = theirs[dtype].call("step", ids_BS, batch.label_BT[:, 0])
      seconds[f"pytorch_{dtype}"].append(took)
  for other in theirs.values():
    other.close()
  rate = {name: peer.BATCH / statistics.median(s[WARM:]) for name, s in seconds.items()}
  flags = _processor_flags()
  return {
    **{f"{name}_examples_per_second": r for name, r in rate.items()},
    "gemjax_bfloat16_over_float32": rate["gemjax_bfloat16"] / rate["gemjax_float32"],
    "pytorch_bfloat16_over_float32": rate["pytorch_bfloat16"] / rate["pytorch_float32"],
    "gemjax_over_pytorch_in_bfloat16": rate["gemjax_bfloat16"] / rate["pytorch_bfloat16"],
    **{f"processor_has_{flag}": float(flag in flags) for flag in FLAGS},
  }


def _processor_flags() -> set[str]:
  file = pathlib.Path("/proc/cpuinfo")
  lines = file.read_text().splitlines() if file.is_file() else []
  return set(next((line for line in lines if line.startswith("flags")), "").split())
