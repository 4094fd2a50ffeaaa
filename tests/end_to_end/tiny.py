"""The smallest run that uses every part of the state: a data set, its config, and how to start it.

Also a config file: --config=tests/end_to_end/tiny.py:mlp
"""

import dataclasses
import os
import pathlib
import subprocess
import sys

import numpy as np

from gemjax import config as c
from gemjax.data.prepared import PreparedData, PreparedWriter
from gemjax.features import Dense, FeatureSet, Sequence, Sparse

ROOT = pathlib.Path(__file__).parents[2]
FILE = pathlib.Path(__file__)
USERS, ITEMS = 40, 30
EXAMPLES = {"train": 1500, "valid": 300, "test": 300}

MODELS = {
  "wukong": c.Wukong(
    layers=1, fmb_units=2, lcb_units=2, rank=2, mlp=(8,), head=(8,), dropout=0.1,
    feature_dropout=0.1,
  ),
  "logistic": c.Logistic(),
  "fm": c.Fm(),
  "dlrm": c.Dlrm(head=(8,)),
  "dcnv2": c.Dcnv2(layers=2, mlp=(8,)),
  "mlp": c.Mlp(head=(8,)),
}  # fmt: skip


def get_config(model: str = "wukong") -> c.Config:
  """Batches are of one event capacity each, 96 and 512, and thus of one program."""
  return c.Config(
    name=f"tiny_{model}",
    data=c.Data(path="SET BY A FLAG", batch_size=48, eval_batch_size=320, window_blocks=2),
    mesh=c.Mesh(data=1, model=1),  # Whatever devices a test process has.
    embedding=c.Embedding(
      dim=2 if model == "logistic" else 4, units={} if model in ("logistic", "fm") else {"user": 2},
      learning_rate=0.3, weight_decay=0.1, dense_mlp=(4,), dtype="bfloat16",
    ),
    model=dataclasses.replace(MODELS[model]),
    optimizer=c.Optimizer(
      learning_rate=0.01, warmup=0.1, schedule="cosine", clip_norm=1.0, l2=1e-4
    ),
    train=c.Train(epochs=2, eval_every=0.25, log_every=5, stop_metric="ne"),
  )  # fmt: skip


def features() -> FeatureSet:
  return FeatureSet(
    dense=(Dense(name="price"),),
    sparse=(
      Sparse(name="user", size=USERS, table="user"),
      Sparse(name="item", size=ITEMS, table="item"),
    ),
    sequence=(Sequence(name="history", size=ITEMS, table="item", max_length=4),),
    tasks=("click", "buy"),
    grouped=True,
  )


def columns(examples: int, rng: np.random.Generator) -> dict[str, np.ndarray]:
  """Clicks that depend on user and item, so that something can be learnt."""
  user, item = rng.integers(2, USERS, examples), rng.integers(2, ITEMS, examples)
  taste = np.random.default_rng(0).normal(size=USERS)[user]
  click = rng.random(examples) < 1 / (1 + np.exp(-2 * taste * np.where(item % 2, 1, -1)))
  lengths = rng.integers(0, 4, examples).astype(np.int32)
  return {
    "dense": rng.normal(size=(examples, 1)).astype(np.float32),
    "ids": np.stack([user, item], 1).astype(np.int32),
    "label": np.stack([click, click & (rng.random(examples) < 0.3)], 1).astype(np.uint8),
    "group": user.astype(np.int32),
    "history.values": rng.integers(2, ITEMS, lengths.sum()).astype(np.int32),
    "history.lengths": lengths,
  }


def write_data(path: pathlib.Path, features: FeatureSet | None = None, **parts) -> PreparedData:
  """The prepared data set; `parts` replace the columns of a split."""
  rng = np.random.default_rng(1)
  with PreparedWriter(path, block_size=256) as writer:
    for split, examples in EXAMPLES.items():
      writer.add(split, parts.get(split, columns(examples, rng)))
    return writer.finish(features or globals()["features"](), origin={"dataset": "tiny"})


def start(binary: str, *, cache=None, env=None, **flags) -> subprocess.Popen:
  """A process of its own, which gives the bits of this one; config__train__seed=1 is
  --config.train.seed=1.

  `cache` is a folder of compiled programs of the binary that trains, which saves time.
  """
  if cache:
    flags["config__compilation__cache"] = cache / "executables"
  given = [f"--{name.replace('__', '.')}={value}" for name, value in flags.items()]
  import compiled_quickly  # This file is a config, too: in the binaries, without pytest's paths.

  env = {"XLA_FLAGS": compiled_quickly.XLA_FLAGS} | (env or {})
  return start_command([binary, *given], env=env)


def start_command(command: list[str], *, env=None, cwd=ROOT) -> subprocess.Popen:
  binary, *flags = command
  return subprocess.Popen(
    [sys.executable, str(ROOT / "launch" / f"{binary}.py"), *flags],
    env=os.environ | {"PYTHONPATH": str(ROOT)} | (env or {}),
    cwd=cwd, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
  )  # fmt: skip


CACHE_ALL = {
  "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
  "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
}


def sentence(process: subprocess.Popen, code: int) -> str:
  """The one line on stderr of a process that must end with `code`."""
  out, err = process.communicate(timeout=300)
  assert process.returncode == code, f"{process.returncode}\n{out}\n{err}"
  assert err.startswith("error: ") and err.count("\n") == 1 and err.endswith("\n"), err
  return err
