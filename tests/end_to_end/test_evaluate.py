"""launch/evaluate.py: the figures of the run to the bit, of a live run too, and what it refuses."""

import json
import shutil

import pytest
import tiny
from bad import sentence

from gemjax.checkpoint import Checkpoints
from gemjax.features import FeatureSet
from gemjax.train.trained import evaluate_run
from gemjax.train.workdir import CHECKPOINTS, RUN, SUMMARY, Workdir


def content(folder):
  return {f.relative_to(folder): f.read_bytes() if f.is_file() else "" for f in folder.rglob("*")}


def test_a_process_of_its_own_gives_the_figures_of_the_summary_to_the_bit(trained, tmp_path):
  """While the run holds its lock and writes a checkpoint; and nothing in its folder changes."""
  (trained / CHECKPOINTS / "000000099.orbax-checkpoint-tmp").mkdir()
  before = content(trained)
  wanted = json.loads((trained / SUMMARY).read_text())
  with Workdir(trained):
    for split in ("test", "valid"):
      figures = tmp_path / f"{split}.json"
      process = tiny.start("evaluate", workdir=trained, split=split, json=figures)
      out, err = process.communicate(timeout=300)
      assert (process.returncode, err) == (0, "")
      assert f"step {wanted['train']['best_step']}" in out and f"{split} click" in out
      found = json.loads(figures.read_text())
      assert found == {"checkpoint": wanted["train"]["best_step"], split: wanted[split]}
  assert content(trained) == before


def test_any_checkpoint_split_and_copy_of_the_data(trained, data, tmp_path):
  last = Checkpoints(trained / CHECKPOINTS, read_only=True).steps[-1]
  copy = shutil.copytree(data, tmp_path / "copy")
  found = evaluate_run(trained, "train", step=last, data=str(copy))
  assert found.step == last and found.data.path == copy
  assert found.results["click"]["examples"] == tiny.EXAMPLES["train"]


def refuses(capsys, workdir, *words, split="test", **options):
  before = content(workdir) if workdir.is_dir() else None
  sentence(capsys, lambda: evaluate_run(workdir, split, **options), *words)
  assert (content(workdir) if workdir.is_dir() else None) == before


def test_what_does_not_exist(trained, tmp_path, capsys):
  best = json.loads((trained / SUMMARY).read_text())["train"]["best_step"]
  steps = Checkpoints(trained / CHECKPOINTS, read_only=True).steps
  assert best in steps
  refuses(capsys, trained, "no split 'tset'", "['test', 'train', 'valid']", split="tset")
  refuses(capsys, trained, "no checkpoint of step 5", str(steps), step=5)
  refuses(capsys, tmp_path / "absent", "holds no run", RUN, f"--workdir={tmp_path / 'absent'}")
  refuses(capsys, trained, "nowhere is no prepared data set", data=str(tmp_path / "nowhere"))
  shutil.rmtree(trained / CHECKPOINTS)
  refuses(capsys, trained, "holds no checkpoint", "train first")
  (trained / CHECKPOINTS).mkdir()
  refuses(capsys, trained, "holds no checkpoint", "train first")


def test_data_with_other_features(trained, tmp_path, capsys):
  tree = json.loads(json.dumps(tiny.features().to_json()))
  tree["sparse"][0]["size"] = 50
  other = tiny.write_data(tmp_path / "other", FeatureSet.from_json(tree)).path
  refuses(capsys, trained, "'user' has size 40 here and 50", "data of the run", data=str(other))


def test_a_damaged_run(trained, capsys):
  text = (trained / RUN).read_text()
  for spoilt, *words in (
    (text[:100], RUN, "truncated or corrupt"),
    (text.replace('"seed"', '"sead"'), RUN, "config.train.sead does not exist", "seed"),
    (text.replace('"Wukong"', '"Wukon"'), RUN, "config.model.kind is 'Wukon'", "Wukong, Logistic"),
    (text.replace('"tasks"', '"tusks"'), RUN, "not a feature set"),
    (text.replace('"auc"', '"auk"').replace('"ne"', '"na"'), RUN, "config.train.stop_metric"),
  ):
    assert spoilt != text
    (trained / RUN).write_text(spoilt)
    refuses(capsys, trained, *words)


def test_a_corrupt_checkpoint_lists_the_others(trained, capsys):
  *others, last = Checkpoints(trained / CHECKPOINTS, read_only=True).steps
  file = trained / CHECKPOINTS / f"{last:09d}" / "state" / "_METADATA"
  file.write_bytes(file.read_bytes()[:-1] + b"]")
  refuses(capsys, trained, file, "checksum", f"choose another of the steps {others}", step=last)


@pytest.mark.parametrize(
  "flags, words",
  [
    ({}, "--workdir is missing"),
    ({"workdir": "RUN", "json": "absent/x.json"}, "make the folder first"),
    ({"workdir": "RUN", "checkpoint": "best"}, "--checkpoint=best"),
    ({"workdir": "RUN", "spilt": "test"}, "'spilt'"),
  ],
)
def test_flags(flags, words):
  process = tiny.start("evaluate", **flags)
  _, error = process.communicate(timeout=300)
  assert process.returncode in (1, 2)
  assert error.startswith("error: ") and error.count("\n") == 1 and words in error, error
