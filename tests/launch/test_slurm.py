"""The written script runs, with real processes, on a Slurm made of this host."""

import json
import os
import pathlib
import subprocess
import sys

import compiled_quickly
import pytest
from paths import PATHS, ROOT

FAKE = pathlib.Path(__file__).parent / "fake_slurm.py"
SHRUNK = (
  "--config.data.demo_examples=20000", "--config.data.batch_size=512", "--config.train.steps=6",
  "--config.model.layers=1", "--config.model.mlp=(8,)", "--config.model.head=(8,)",
  "--config.embedding.dim=4", "--config.mesh.model=2",
)  # fmt: skip


def submit(script, **env):
  done = subprocess.run(
    [sys.executable, str(FAKE), str(script)], env=os.environ | {"PYTHONPATH": PATHS} | env,
    cwd=ROOT, text=True, capture_output=True, timeout=300,
  )  # fmt: skip
  return done.returncode, done.stdout + done.stderr


def written(launch, tmp_path, *flags):
  script = tmp_path / "job.sbatch"
  code, out, err = launch("slurm", f"--output={script}", *flags)
  assert code == 0, err
  assert f"sbatch {script}" in out
  return script


def test_the_demo_trains_on_two_nodes(launch, tmp_path):
  workdir = tmp_path / "run"
  script = written(
    launch, tmp_path, "--nodes=2", "--gpus=0", f"--python={sys.executable}",
    "--config=configs/wukong_demo.py", f"--workdir={workdir}", "--", *SHRUNK,
  )  # fmt: skip
  code, out = submit(script, XLA_FLAGS=compiled_quickly.XLA_FLAGS)
  assert code == 0, out
  assert "0: rank 0 (" in out and "1: rank 1 (" in out and "of 2 by Slurm" in out
  assert "the first is at 127.0.0.1:" in out
  summary = json.loads((workdir / "summary.json").read_text())
  assert summary["train"]["steps"] == 6 and summary["mesh"] == {"data": 1, "model": 2}


@pytest.mark.parametrize(
  ("process", "lines"),
  [
    ("node", [f"{i}: {i} 2 127.0.0.{i + 1} 0,1,2,3 None" for i in range(2)]),
    ("gpu", [f"{i}: {i} 8 127.0.0.{i // 4 + 1} 0,1,2,3 ({i % 4},)" for i in range(8)]),
  ],
)
def test_every_process_has_its_place_and_its_gpus(process, lines, launch, stub, tmp_path):
  script = written(
    launch, tmp_path, "--nodes=2", "--gpus=4", f"--process={process}", f"--python={stub}",
    "--config=c.py", "--workdir=a b", "--", "--config.train.seed=1",
  )  # fmt: skip
  code, out = submit(script)
  assert code == 0, out
  command = " launch/train.py --config=c.py --workdir=a b --config.train.seed=1"
  assert sorted(out.splitlines()) == [line + command for line in lines]


@pytest.mark.parametrize("before", ["", "--xla_dump_to='a b' --xla_c=$HOME"])
@pytest.mark.parametrize("preset", ["default", "overlap"])
def test_flags_of_xla_follow_the_submitters(preset, before, launch, tmp_path, monkeypatch):
  monkeypatch.delenv("XLA_FLAGS", raising=False)
  show = tmp_path / "show"
  show.write_text('#!/bin/sh\necho "<$XLA_FLAGS>"\n')
  show.chmod(0o755)
  script = written(
    launch, tmp_path, "--gpus=0", f"--xla={preset}", f"--python={show}", "--config=c",
    "--workdir=w",
  )  # fmt: skip
  code, out = submit(script, **({"XLA_FLAGS": before} if before else {}))
  assert code == 0, out
  flags = out.strip().removeprefix("0: <").removesuffix(">")
  assert flags.startswith(before)
  added = flags.removeprefix(before)
  if preset == "default":
    assert not added
  else:
    space = " " * bool(before)
    assert added.startswith(f"{space}--xla_gpu_enable_latency_hiding_scheduler=true --xla_gpu")


@pytest.mark.parametrize("folder", ["code", "my code", "it's", 'a"b', "a\\b c\\", "a #b", "$HOME"])
def test_the_folder_of_the_code_may_have_any_name(folder, launch, tmp_path):
  code = tmp_path / folder
  code.mkdir()
  where = tmp_path / "where"
  where.write_text("#!/bin/sh\npwd\n")
  where.chmod(0o755)
  script = written(
    launch, tmp_path, "--gpus=0", f"--code={code}", f"--python={where}", "--config=c", "--workdir=w"
  )
  assert submit(script) == (0, f"0: {code}\n")


def test_a_failure_is_the_jobs(launch, tmp_path):
  script = written(
    launch, tmp_path, "--nodes=2", "--gpus=0", f"--python={sys.executable}",
    "--config=no_such.py", f"--workdir={tmp_path / 'run'}",
  )  # fmt: skip
  code, out = submit(script)
  assert code == 1 and "error: --config=no_such.py is no file" in out


def test_a_dry_run_prints_the_same_and_writes_nothing(launch, tmp_path):
  flags = ("--config=c.py", "--workdir=w", "--image=i:1", "--mount=/a:/b", "--code=/gemjax")
  script = written(launch, tmp_path, *flags)
  before = sorted(tmp_path.iterdir())
  code, out, _ = launch("slurm", "--dry_run", *flags)
  assert code == 0 and out == script.read_text()
  assert "--container-image=i:1 --container-mounts=/a:/b --container-workdir=/gemjax" in out
  assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize(
  ("flags", "words"),
  [
    (("--workdir=w",), "--config is missing"),
    (("--config=c",), "--workdir is missing"),
    (("--config=c", "--workdir=w", "--name=A_b"), "--name=A_b must be of a-z"),
    (("--config=c", "--workdir=w", "--gpus=0", "--process=gpu"), "--process=gpu needs --gpus"),
    (("--config=c", "--workdir=w", "--", "seed=1"), "'seed=1' behind -- must be a flag"),
    (("--config=c", "--workdir=w", "--directive=partition=x"), "must be an option of sbatch"),
    (("--config=c", "--workdir=w", "--time=a day"), "--time=a day must be minutes"),
    (("--config=c", "--workdir=w", "--time=24:60:00"), "--time=24:60:00 must be minutes"),
    (("--config=c", "--workdir=w", "--time=1-2:00:99"), "--time=1-2:00:99 must be minutes"),
    (("--config=c", "--workdir=w", "--image=i", "--mount=x"), "--mount=x must be HOST:/CONTAINER"),
    (("--config=c", "--workdir=w", "--image=i", "--mount=/a:b"), "--mount=/a:b must be HOST:/CONT"),
    (("--config=c", "--workdir=w", "--image=i", "--mount=/a:/b,/c"), "--mount=/a:/b,/c must be"),
    (("--config=c", "--workdir=w", "--code=/a\nb"), "--code='/a\\nb' must be a folder's name"),
    (("--config=c", "--workdir=w", "--mount=/a:/b"), "--mount=/a:/b needs --image"),
    (("--config=c", "--workdir=w"), "--output is missing"),
    (("--config=c", "--workdir=w", "--output=/no/such/folder/x"), "writing /no/such/folder/x"),
  ],
)
def test_what_no_cluster_would_take(flags, words, launch):
  code, out, err = launch("slurm", *flags)
  assert code == 1 and not out
  assert err.startswith("error: ") and words in err and err.count("\n") == 1
