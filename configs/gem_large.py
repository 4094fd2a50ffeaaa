"""GEM with billions of dense parameters and thousands of events, for planning on 128 H100s.

  python launch/plan.py --config=configs/gem_large.py --topology=h100:16x8 --mesh=1x128

`gem_base` with twice the width, half as many layers more, histories twice as long, and 128 examples
a GPU: with 32 a step is 115 ms of links beside 80 ms of kernels.
"""

import dataclasses
import pathlib
import runpy

from gemjax import config as c

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("gem_base.py")))


def get_config(variant: str = "full") -> c.Config:
  base = BASE["get_config"]()
  model = dataclasses.replace(
    base.model, layers=6, fmb_units=64, lcb_units=64, rank=64, mlp=(8192, 8192), width=2,
  )  # fmt: skip
  config = dataclasses.replace(
    base,
    name="gem_large",
    data=dataclasses.replace(base.data, batch_size=16_384, eval_batch_size=16_384),
    embedding=dataclasses.replace(base.embedding, dim=256),
    model=model,
    compilation=c.Compilation(unroll=6, early_sums=True),
  )
  return c.sized(config, variant)


def get_features():
  """Those of `gem_base`, with twice the events."""
  features = BASE["get_features"]()
  longer = tuple(dataclasses.replace(h, max_length=2 * h.max_length) for h in features.history)
  return dataclasses.replace(features, history=longer)
