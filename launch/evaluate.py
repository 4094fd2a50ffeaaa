"""Evaluates a checkpoint of a run, which may still go on.

python launch/evaluate.py --workdir=runs/demo --split=test
python launch/evaluate.py --workdir=runs/demo --split=valid --checkpoint=300 --json=valid.json
"""

import pathlib

import cli
from absl import flags

_WORKDIR = flags.DEFINE_string("workdir", None, "Folder of the run.")
_SPLIT = flags.DEFINE_string("split", "test", "Split of the data.")
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of a checkpoint; default: the best.")
_DATA = flags.DEFINE_string("data", None, "Prepared folder; default: the data of the run.")
_JSON = flags.DEFINE_string("json", None, "File for the figures; default: none is written.")


def main():
  from gemjax.train.summary import split_summary, table
  from gemjax.train.workdir import WorkdirError, write_json

  if not _WORKDIR.value:
    raise WorkdirError("--workdir is missing; name the folder of a run")
  if _JSON.value and not pathlib.Path(_JSON.value).absolute().parent.is_dir():
    raise WorkdirError(f"--json={_JSON.value} lies in no folder; make the folder first")
  from gemjax.parallel.process import join_processes

  with join_processes() as peers:
    from gemjax.train.trained import evaluate_run  # Seconds of imports.

    found = evaluate_run(
      pathlib.Path(_WORKDIR.value), _SPLIT.value, step=_CHECKPOINT.value, data=_DATA.value
    )
  if peers.index:
    return
  examples = found.data.split(_SPLIT.value).examples
  print(f"{found.name}: step {found.step:,} on {examples:,} examples of {found.data.path}\n")
  print("\n".join(table({_SPLIT.value: found.results})))
  if _JSON.value:
    figures = {"checkpoint": found.step, _SPLIT.value: split_summary(found.results)}
    write_json(pathlib.Path(_JSON.value), figures)


if __name__ == "__main__":
  cli.run(main)
