"""GEM for one host: half the depth of gem_base, narrower, and shorter histories, for planning.

python launch/plan.py --config=configs/gem_small.py --topology=h100:1x8
"""

import dataclasses
import pathlib
import runpy

from gemjax import config as c

BASE = runpy.run_path(str(pathlib.Path(__file__).with_name("gem_base.py")))


def get_config(variant: str = "full") -> c.Config:
  base = BASE["get_config"]()
  model = dataclasses.replace(
    base.model, layers=2, fmb_units=32, lcb_units=32, rank=32, mlp=(2048,), width=1, head=(512,),
  )  # fmt: skip
  config = dataclasses.replace(
    base,
    name="gem_small",
    data=dataclasses.replace(base.data, history=256, batch_size=2048, eval_batch_size=2048),
    embedding=dataclasses.replace(base.embedding, dim=64),
    model=model,
  )
  for attention in (model.fine, model.coarse):
    attention.heads = 2
  return c.sized(config, variant)


get_features = BASE["get_features"]
