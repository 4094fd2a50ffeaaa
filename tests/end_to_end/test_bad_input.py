"""Training refuses bad input: one sentence that names file or field and mend, nothing half made."""

import json
import pathlib
import shutil

import numpy as np
import pytest
import tiny
from bad import flip, refuses, sentence, truncate

from gemjax import config as c
from gemjax.data.prepared import MANIFEST, checksum
from gemjax.train.loop import train
from gemjax.train.workdir import RUN, SUMMARY, saved_steps

GOOD = f"--config={tiny.FILE}"
GEM = f"--config={pathlib.Path(__file__).parents[2] / 'configs' / 'gem_movielens.py'}"
CONFIGS = {
  "syntax.py": "def get_config(:",
  "empty.py": "",
  "raises.py": "def get_config(): return {}['absent']",
  "wrong.py": "def get_config(): return {'name': 'a dict'}",
  "typed.py": "from gemjax.config import *\ndef get_config(): return Config(name='x', train=3)",
}
FLAGS = [
  ([], ["--config is missing", "configs/"]),
  (["--config="], ["--config is missing"]),
  (["--config=absent.py", "--workdir=W"], ["absent.py is no file", "configs/"]),
  (["--config=syntax.py", "--workdir=W"], ["syntax.py", "line 1", "invalid syntax"]),
  (["--config=empty.py", "--workdir=W"], ["empty.py", "no attribute 'get_config'"]),
  (["--config=raises.py", "--workdir=W"], ["raises.py", "KeyError", "absent"]),
  (["--config=wrong.py", "--workdir=W"], ["wrong.py", "must return a gemjax Config", "a dict"]),
  (["--config=typed.py", "--workdir=W"], ["config.train is 3", "of class Train"]),
  ([f"{GOOD}:gpt", "--workdir=W"], ["tiny.py:gpt", "KeyError: 'gpt'"]),
  ([f"{GEM}:no_gem", "--workdir=W"], ["gem_movielens.py:no_gem): variant 'no_gem' is none of"]),
  ([GOOD], ["--workdir is missing"]),
  ([GOOD, "--workdir="], ["--workdir is missing"]),
  ([GOOD, "--workdir=W", "--config.train.sed=1"], ["Train has no field 'sed'", "seed"]),
  ([GOOD, "--workdir=W", "--config.trian.seed=1"], ["Config has no field 'trian'", "train"]),
  ([GOOD, "--workdir=W", "--config.model=dlrm"], ["cannot be a flag", "config file"]),
  ([GOOD, "--workdir=W", "--config.embedding.units.item=2"], ["units is a dict", "config file"]),
  ([GOOD, "--workdir=W", "--config.train.task_weights=2"], ["weights is a dict", "config"]),
  ([GOOD, "--workdir=W", "--config.train.seed.x=2"], ["seed.x", "gemjax/config/"]),
  ([GOOD, "--workdir=W", "--config.train.seed=one"], ["--config.train.seed=one", "'one'"]),
  ([GOOD, "--workdir=W", "--config.data.batch_size=0.5"], ["--config.data.batch_size=0.5"]),
  ([GOOD, "--workdir=W", "--config.model.head=(8,'x')"], ["head is (8, 'x')", "whole numbers"]),
  (["--config.train.seed=1", GOOD, "--workdir=W"], ["--config.train.seed=1", "before"]),
  ([GOOD, "--workdir=W", "--verbos"], ["Unknown command line flag 'verbos'", "--help"]),
  ([GOOD, "--workdir=W", "config.train.seed=1"], ["must be flags", "write --name=value"]),
]  # fmt: skip


@pytest.mark.parametrize("flags, words", FLAGS, ids=lambda x: " ".join(x)[-40:])
def test_flags(flags, words, tmp_path):
  for name, text in CONFIGS.items():
    (tmp_path / name).write_text(text)
  process = tiny.start_command(["train", *flags], cwd=tmp_path)
  _, error = process.communicate(timeout=300)
  assert process.returncode in (1, 2)
  assert error.startswith("error: ") and error.count("\n") == 1, error
  assert "Traceback" not in error
  for word in words:
    assert word in error
  assert sorted(f.name for f in tmp_path.iterdir() if f.suffix != "") == sorted(CONFIGS)
  assert not (tmp_path / "W").exists(), "a folder was made before the flags were checked"


FIELDS = [
  ("data.path", ""), ("data.path", 3), ("data.batch_size", 0), ("data.batch_size", "many"),
  ("data.eval_batch_size", -1), ("data.window_blocks", 0), ("data.demo_examples", 10),
  ("embedding.dim", 0), ("embedding.units", {"user": -1}), ("embedding.units", ["user"]),
  ("embedding.dense_mlp", [4]), ("embedding.init_scale", -1.0), ("embedding.learning_rate", "x"),
  ("embedding.weight_decay", 1e9), ("embedding.dtype", "float16"), ("embedding.optimizer", "adam"),
  ("model", None), ("model.head", (0,)), ("model.dropout", 1.0), ("model.fm", "fast"),
  ("model.layers", 1.5), ("optimizer", {}), ("optimizer.learning_rate", float("nan")),
  ("optimizer.warmup", 2.0), ("optimizer.schedule", "step"), ("optimizer.clip_norm", -1),
  ("train.epochs", 0.0), ("train.epochs", float("inf")), ("train.steps", -5), ("train.seed", -1),
  ("train.seed", True), ("train.dtype", "int8"), ("train.eval_every", -0.1),
  ("train.stop_metric", "accuracy"), ("train.task_weights", {"click": float("inf")}),
  ("train.patience", -1), ("train.log_every", 0), ("checkpoint.every", -1), ("checkpoint.keep", 0),
  ("checkpoint.local", "here"), ("checkpoint.local_every", -1), ("checkpoint.local_every", 5),
]  # fmt: skip


@pytest.mark.parametrize("field, value", FIELDS, ids=[f"{f}={v}" for f, v in FIELDS])
def test_a_field_outside_its_law_is_named_with_the_law(field, value, config, tmp_path, capsys):
  *sections, name = field.split(".")
  target = config
  for section in sections:
    target = getattr(target, section)
  setattr(target, name, value)
  sentence(capsys, lambda: train(config, tmp_path / "run"), f"config.{field} is", "must be")
  assert not (tmp_path / "run").exists()


def test_a_config_that_does_not_fit_the_data(config, data, tmp_path, capsys):
  """And none of these refusals ties the workdir to the wrong config."""
  run = tmp_path / "run"
  config.data.batch_size = 1501
  refuses(capsys, config, run, "batch 1501 is larger", "1500 examples", "'train'", "smaller")
  config.data.batch_size = 48
  config.embedding.units = {"usr": 2}
  refuses(capsys, config, run, "config.embedding.units", "'usr'", "'user', 'item', 'history'")
  config.embedding.units = {"item": 2, "history": 3}
  refuses(capsys, config, run, "'item' 2", "'history' 3", "share table 'item'")
  config.embedding.units = {}
  config.train.task_weights = {"buys": 1.0}
  refuses(capsys, config, run, "config.train.task_weights", "'buys'", "['click', 'buy']")
  config.train.task_weights = {}
  config.embedding.placement = {"usr": "row"}
  refuses(capsys, config, run, "config.embedding.placement", "'usr'", "'user', 'item'")
  config.embedding.placement = {}
  config.mesh = c.Mesh(data=3, model=3)
  refuses(capsys, config, run, "data 3 x model 3 = 9 devices", "there are 8")
  config.mesh = c.Mesh(data=5, model=1)
  refuses(capsys, config, run, "batch 48", "5 devices of the mesh", "config.mesh")
  config.mesh = c.Mesh(data=1, model=1)
  config.model = c.Logistic()
  refuses(capsys, config, run, "embedding.dim")
  assert not run.exists()


def spoil_manifest(folder, change, *, sealed=True):
  tree = json.loads((folder / MANIFEST).read_text())
  change(tree)
  if sealed:
    tree["crc32"] = checksum({name: tree[name] for name in tree if name != "crc32"})
  (folder / MANIFEST).write_text(json.dumps(tree))


TRAIN = "train-00000.array_record"
VALID = TRAIN.replace("train", "valid")
TEST = TRAIN.replace("train", "test")
DATA = {
  "no such folder": (shutil.rmtree, ["data is no prepared", "not exist", "launch/prepare.py"]),
  "no manifest": (lambda d: (d / MANIFEST).unlink(), ["data is no prepared", MANIFEST]),
  "manifest truncated": (
    lambda d: truncate(d / MANIFEST),
    [MANIFEST, "truncated", "prepare again"],
  ),
  "manifest empty": (lambda d: (d / MANIFEST).write_text(""), [MANIFEST, "truncated or corrupt"]),
  "manifest a list": (lambda d: (d / MANIFEST).write_text("[]"), [MANIFEST, "corrupt"]),
  "version": (lambda d: spoil_manifest(d, lambda t: t.update(version=9)), ["version 9", "reads 4"]),
  "edited": (
    lambda d: spoil_manifest(d, lambda t: t["splits"]["valid"].update(files=[]), sealed=False),
    [MANIFEST, "edited", "prepare again"],
  ),
  "unknown feature field": (
    lambda d: spoil_manifest(d, lambda t: t["features"]["dense"][0].update(colour=1)),
    [MANIFEST, "colour"],
  ),
  "feature twice": (
    lambda d: spoil_manifest(d, lambda t: t["features"]["dense"][0].update(name="user")),
    [MANIFEST, "unique", "user"],
  ),
  "split missing": (lambda d: spoil_manifest(d, lambda t: t["splits"].pop("valid")), ["'valid'"]),
  "split empty": (
    lambda d: spoil_manifest(d, lambda t: t["splits"]["test"].update(blocks=[[]])),
    ["'test'", "empty"],
  ),
  "block file missing": (lambda d: (d / TRAIN).unlink(), [TRAIN, "missing", "prepare again"]),
  "block file empty": (lambda d: (d / TRAIN).write_bytes(b""), [TRAIN, "prepare again"]),
  "block file truncated": (lambda d: truncate(d / TRAIN), [TRAIN, "corrupt", "prepare again"]),
  "test file truncated": (lambda d: truncate(d / TEST), [TEST, "corrupt", "prepare again"]),
  "valid file empty": (lambda d: (d / VALID).write_bytes(b""), [VALID, "prepare again"]),
  "block file flipped": (lambda d: flip(d / TRAIN, 1000), [TRAIN, "corrupt", "prepare again"]),
  "valid file swapped": (
    lambda d: shutil.copy(d / TRAIN, d / TRAIN.replace("train", "valid")),
    ["valid-00000.array_record", "manifest"],
  ),
}


@pytest.mark.parametrize("case", DATA)
def test_a_spoiled_data_folder(case, config, data, tmp_path, capsys):
  spoil, words = DATA[case]
  shutil.copytree(data, tmp_path / "data")
  spoil(tmp_path / "data")
  config.data.path = str(tmp_path / "data")
  refuses(capsys, config, tmp_path / "run", *words)
  assert not (tmp_path / "run" / SUMMARY).exists()
  if case in ("block file truncated", "test file truncated", "valid file empty"):
    assert not (tmp_path / "run" / RUN).exists(), "work was done before files were looked at"


def test_raw_data_of_which_a_file_is_broken(config, tmp_path, capsys):
  """It is told from a public set by what is in the files: preparing says which is broken."""
  config.data.path = str(tmp_path / "raw")
  (tmp_path / "raw").mkdir()
  (tmp_path / "raw" / "part.parquet").write_bytes(b"PAR1 cut off")
  words = (
    f"{tmp_path / 'raw'} is no prepared data set",
    "all there and whole",
    "--dataset=NAME",
    "--output=DIR",
  )
  refuses(capsys, config, tmp_path / "run", *words)


def columns(name, value):
  out = tiny.columns(300, np.random.default_rng(2))
  out[name] = out[name].astype(np.float32) if name == "label" else out[name]
  out[name][7] = value
  return out


VALUES = {
  "label nan": (columns("label", np.nan), ["label", "nan"]),
  "label 2": (columns("label", 2), ["label", "2"]),
  "dense nan": (columns("dense", np.nan), ["price", "nan"]),
  "dense inf": (columns("dense", np.inf), ["price", "inf"]),
  "id beyond the table": (columns("ids", tiny.USERS), ["user", str(tiny.USERS)]),
  "id negative": (columns("ids", -1), ["user", "-1"]),
  "event beyond the table": (columns("history.values", 99), ["history", "99"]),
  "no user": (columns("group", -1), ["group", "no user"]),
}


# At the first evaluation two of them: each compiles a step.
@pytest.mark.parametrize(
  "split, case",
  [*(("train", case) for case in VALUES), ("valid", "label nan"), ("valid", "id beyond the table")],
)
def test_a_value_no_model_can_take(split, case, config, tmp_path, capsys):
  """Found before the first step or at the first evaluation, whose step is saved."""
  part, words = VALUES[case]
  path = tiny.write_data(tmp_path / "data", **{split: part}).path
  config.data.path, config.data.batch_size = str(path), 48
  file = path / f"{split}-00000.array_record"
  refuses(capsys, config, tmp_path / "run", f"{file} block 0", "prepare again", *words)
  assert saved_steps(tmp_path / "run") == ([8] if split == "valid" else [])
