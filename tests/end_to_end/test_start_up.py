"""Later starts load what an earlier one compiled; whatever is wrong with it costs no run."""

import json
import os
import pathlib
import re
import shutil

import pytest
import tiny
from test_processes import start_all

from gemjax.train.executables import Executables
from gemjax.train.loop import train
from gemjax.train.setup import compile_ahead
from gemjax.train.workdir import CHECKPOINTS, COMPILED, SUMMARY

WATCHED = pathlib.Path(__file__).with_name("watched.py")
PATHS = {"PYTHONPATH": os.pathsep.join(map(str, (tiny.ROOT, WATCHED.parent)))}
OURS = ("born", "plan", "step", "predict", "no_sums")


@pytest.fixture(autouse=True)
def cached():
  """In place of this folder's: no cache of JAX's own, which would take the place of ours."""


@pytest.fixture
def config(data):
  config = tiny.get_config("logistic")
  config.data.path, config.train.steps, config.train.eval_every = str(data), 6, 0.0
  config.checkpoint.every = 3
  return config


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
  return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def run(kept, config, tmp_path):
  """(a copy of the workdir of a finished run, its summary)"""
  if not kept.exists():
    train(config, kept)
  workdir = shutil.copytree(kept, tmp_path / "run")
  return workdir, json.loads((workdir / SUMMARY).read_text())


def anew(workdir):
  """Only what was compiled is left."""
  shutil.rmtree(workdir / CHECKPOINTS)
  (workdir / SUMMARY).unlink()


def results(summary):
  return {name: summary[name] for name in ("valid", "test", "params")}


def never(*args, **kwargs):
  raise AssertionError("a program was traced and compiled")


def test_a_second_start_traces_and_compiles_no_program(run, config, monkeypatch, capsys):
  workdir, summary = run
  anew(workdir)
  monkeypatch.setattr(Executables, "compile", never)
  again = train(config, workdir)
  assert results(again) == results(summary)
  assert again["train"]["loss"] == summary["train"]["loss"]
  out = capsys.readouterr().out
  assert "first step after" in out and "anew" not in out
  assert {"data", "trainer", "state", "first batch", "compile"} <= again["start_up_seconds"].keys()


def test_a_resumed_start_compiles_nothing_either(run, config, monkeypatch, capsys):
  workdir, summary = run
  shutil.rmtree(workdir / CHECKPOINTS / f"{6:09d}")
  monkeypatch.setattr(Executables, "compile", never)
  assert results(train(config, workdir)) == results(summary)
  assert "resuming from the checkpoint of step 3" in capsys.readouterr().out


def test_what_was_compiled_ahead_is_all_that_training_needs(config, tmp_path, monkeypatch, run):
  ahead = tmp_path / "ahead"
  compile_ahead(config, ahead)
  assert not (ahead / CHECKPOINTS).exists()
  names = [file.name for file in (ahead / COMPILED).iterdir()]
  for program in OURS:
    assert any(name.startswith(f"{program}-") for name in names), program
  monkeypatch.setattr(Executables, "compile", never)
  assert results(train(config, ahead)) == results(run[1])


def test_another_config_is_told_why_it_compiles(run, config, tmp_path, capsys):
  workdir, _ = run
  config.compilation.cache = str(workdir / COMPILED)
  rate = config.embedding.learning_rate
  config.embedding.learning_rate = 2 * rate
  other = train(config, tmp_path / "other")
  sentence = (
    f"step is compiled anew: config.embedding.learning_rate was {rate} and is now {2 * rate}"
  )
  assert capsys.readouterr().out.count(sentence) == 1
  config.compilation.cache = "off"
  assert results(train(config, tmp_path / "off")) == results(other)
  assert not (tmp_path / "off" / COMPILED).exists() and not (tmp_path / "other" / COMPILED).exists()


def test_another_seed_is_another_run_of_the_same_programs(run, config, tmp_path, monkeypatch):
  workdir, summary = run
  config.train.seed = 1
  config.compilation.cache = "off"
  compiled = train(config, tmp_path / "compiled")
  assert results(compiled) != results(summary)
  config.compilation.cache = str(workdir / COMPILED)
  monkeypatch.setattr(Executables, "compile", never)
  assert results(train(config, tmp_path / "loaded")) == results(compiled)


def test_another_source_makes_other_programs(run, config, monkeypatch, capsys):
  workdir, summary = run
  anew(workdir)
  monkeypatch.setattr("gemjax.train.executables._source", lambda: "edited")
  assert results(train(config, workdir)) == results(summary)
  assert "step is compiled anew: the code has changed" in capsys.readouterr().out


@pytest.mark.parametrize("damage", ["flipped", "truncated", "empty"])
def test_corrupt_entries_are_compiled_anew(damage, run, config, capsys):
  workdir, summary = run
  anew(workdir)
  files = list((workdir / COMPILED).iterdir())
  assert len(files) >= len(OURS)  # And of JAX what this process had not compiled before.
  for file in files:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    cut = {"flipped": len(content), "truncated": len(content) // 2, "empty": 0}[damage]
    file.write_bytes(content[:cut])
  again = train(config, workdir)
  assert results(again) == results(summary)
  assert capsys.readouterr().err.count("is corrupt: compiled anew\n") == 1
  anew(workdir)
  train(config, workdir)
  assert "corrupt" not in capsys.readouterr().err  # The new ones took their place.


def test_what_a_runtime_does_not_load_is_compiled_anew(run, config, monkeypatch, capsys):
  workdir, summary = run
  anew(workdir)

  def refuse(*args, **kwargs):
    raise ValueError("another runtime")

  monkeypatch.setattr("jax.experimental.serialize_executable.deserialize_and_load", refuse)
  assert results(train(config, workdir)) == results(summary)
  assert "step is compiled anew: its executable cannot be loaded" in capsys.readouterr().out


def test_a_place_that_cannot_be_written_is_said_and_no_error(run, config, tmp_path, capsys):
  (tmp_path / "file").write_text("")
  config.compilation.cache = str(tmp_path / "file" / "below")
  assert results(train(config, tmp_path / "new")) == results(run[1])
  err = capsys.readouterr().err
  assert err.count("compiled programs are not kept in") == 1


def compiled(out):
  return {line.removeprefix("compiles ") for line in out.splitlines() if "compiles" in line}


@pytest.mark.slow
def test_two_processes_share_what_the_first_compiles(data, tmp_path):
  workdir = tmp_path / "run"
  flags = {
    "config": f"{WATCHED}:logistic", "workdir": workdir, "config__data__path": data,
    "config__mesh__data": 1, "config__mesh__model": 2, "config__embedding__replicated_rows": 0,
    "config__train__steps": 4, "config__train__eval_every": 0,
  }  # fmt: skip
  found, losses = [], []
  for _ in range(2):
    processes = start_all(2, None, PATHS, **flags)
    ended = [(*p.communicate(timeout=300), p.returncode) for p in processes]
    assert [code for _, _, code in ended] == [0, 0], ended
    found.append([compiled(out) for out, _, _ in ended])
    losses.append(json.loads((workdir / SUMMARY).read_text())["test"]["log_loss"])
    shutil.rmtree(workdir / CHECKPOINTS)
  assert found == [[set(OURS), set()], [set(), set()]]
  assert losses[0] == losses[1]


def test_launch_compile_makes_train_start_at_once(data, tmp_path):
  workdir = tmp_path / "run"
  flags = {"config": f"{WATCHED}:logistic", "workdir": workdir, "config__data__path": data}
  process = tiny.start("compile", env=PATHS, **flags)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert f"its programs are ready in {workdir / 'compiled'} " in out and compiled(out) == set(OURS)
  process = tiny.start("train", env=PATHS, **flags)
  out, err = process.communicate(timeout=300)
  assert process.returncode == 0, err
  assert compiled(out) == set() and "first step after" in out


def test_launch_compile_refuses_what_it_cannot_keep(data, tmp_path):
  flags = {"config": f"{tiny.FILE}:logistic", "workdir": tmp_path / "run"}
  process = tiny.start("compile", **flags, config__compilation__cache="off")
  assert "config.compilation.cache is 'off'" in tiny.sentence(process, 1)
  assert not (tmp_path / "run").exists()
  (tmp_path / "file").write_text("no folder")
  flags["config__data__path"] = data
  process = tiny.start("compile", **flags, config__compilation__cache=tmp_path / "file")
  law = f"not kept in {tmp_path / 'file'} .*; name another folder with --config.compilation.cache"
  assert re.search(law, tiny.sentence(process, 1))
