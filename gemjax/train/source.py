"""Where the examples of a run come from."""

from __future__ import annotations

import pathlib

from gemjax import config as config_lib
from gemjax.data.preparation import prepare, recognise
from gemjax.data.prepared import MANIFEST, PreparedData, open_prepared
from gemjax.data.simulator import simulate
from gemjax.train.workdir import DATA

DEMO = "demo"


def open_data(config: config_lib.Config, workdir: pathlib.Path) -> PreparedData:
  """The prepared folder `config.data.path`; the simulator's log for "demo"; a raw public set is
  prepared on first use. What is made goes to `workdir`/data and is found there the next time.

  Raises:
    PreparedDataError: the path is neither.
  """
  path = config.data.path
  made = workdir / DATA
  if path != DEMO and (pathlib.Path(path) / MANIFEST).exists():
    return open_prepared(path)
  if (made / MANIFEST).exists():
    return open_prepared(made)
  if path == DEMO:
    print(f"simulating {config.data.demo_examples:,} ad impressions", flush=True)
    return simulate(made, examples=config.data.demo_examples)
  dataset = recognise(path)
  if dataset is None:
    return open_prepared(path)  # Says what is wrong with it.
  print(f"preparing {dataset} from {path}", flush=True)
  return prepare(dataset, path, made)
