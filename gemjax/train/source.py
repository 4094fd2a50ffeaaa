"""Where the examples of a run come from."""

from __future__ import annotations

import os
import pathlib

from gemjax import config as config_lib
from gemjax.data.prepared import MANIFEST, PreparedData, PreparedDataError, open_prepared
from gemjax.train.workdir import DATA

DEMO = "demo"


def open_data(
  config: config_lib.Config, workdir: pathlib.Path, *, make: bool = True
) -> PreparedData:
  """The prepared folder `config.data.path`; the simulator's log for "demo"; a raw public set is
  prepared on first use. What is made goes to `workdir`/data and is found there the next time.

  Raises:
    PreparedDataError: the path is neither, or `workdir`/data was made from something else, or is
      not there but should not be made.
  """
  path, wanted = config.data.path, {"dataset": DEMO, "examples": config.data.demo_examples}
  if path.startswith("none:"):
    raise config_lib.ConfigError(
      f"config.data.path is {path!r}: the config is for launch/plan.py; name data to train on"
    )
  if path != DEMO:
    if (pathlib.Path(path) / MANIFEST).exists():
      return open_prepared(path)
    wanted = {"input": os.path.abspath(path)}
  made = workdir / DATA
  if (made / MANIFEST).exists():
    data = open_prepared(made)
    found = {key: data.origin.get(key) for key in wanted}
    if found != wanted:
      raise PreparedDataError(
        f"{made} holds {found}, but config.data asks for {wanted}; name another --workdir"
      )
    # What it was made from may be gone by now, but not have changed.
    if path != DEMO and os.path.exists(path) and _changed(path, data):
      raise PreparedDataError(
        f"{made} was made from {path}, whose files have changed since; name another --workdir"
      )
    return data
  if not make:
    raise PreparedDataError(
      f"{path} is no prepared data set and {made} is missing; name a prepared folder by --data"
    )
  # Readers of raw data take a third of a second to import, which no later start needs.
  if path == DEMO:
    from gemjax.data.simulator import simulate

    print(f"simulating {config.data.demo_examples:,} ad impressions", flush=True)
    return simulate(made, examples=config.data.demo_examples)
  from gemjax.data.preparation import prepare, recognise

  dataset = recognise(path)
  if dataset is None:
    if os.path.exists(path):
      raise PreparedDataError(
        f"{path} is no prepared data set (no {MANIFEST}), nor a public one whose files are "
        f"all there and whole; `python launch/prepare.py --dataset=NAME --input={path} "
        "--output=DIR` says what is wrong, or prepares it: then name DIR"
      )
    return open_prepared(path)  # Says what is wrong with it.
  print(f"preparing {dataset} from {path}", flush=True)
  return prepare(dataset, path, made)


def _changed(path: str, data: PreparedData) -> bool:
  from gemjax.data.raw import fingerprint

  return fingerprint(path) != data.origin["fingerprint"]
