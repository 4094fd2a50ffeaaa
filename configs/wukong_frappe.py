"""Wukong and baselines on Frappe.

  python launch/train.py --config=configs/wukong_frappe.py --workdir=runs/frappe \
    --config.data.path=FRAPPE_FOLDER
"""

import dataclasses

from gemjax.config import (
  Config, Data, Dcnv2, Dlrm, Embedding, Fm, Logistic, Mlp, Optimizer, Train, Wukong,
)  # fmt: skip


def get_config(variant: str = "wukong") -> Config:
  """`--config=configs/wukong_frappe.py:dcnv2` trains a baseline."""
  config = Config(
    name=f"{variant}_frappe",
    data=Data(path="frappe", batch_size=2048),
    embedding=Embedding(
      dim=16, optimizer="lazy_adam", learning_rate=1e-3, weight_decay=1.0, init_scale=0.01
    ),
    optimizer=Optimizer(learning_rate=1e-3),
    train=Train(epochs=30, patience=3, stop_metric="auc"),
  )
  models = {
    "wukong": Wukong(
      layers=2, fmb_units=16, lcb_units=16, rank=16, mlp=(400, 400), head=(400,), dropout=0.2
    ),
    "logistic": Logistic(),
    "fm": Fm(),
    "dlrm": Dlrm(head=(400, 400, 400)),
    "dcnv2": Dcnv2(layers=3, mlp=(400, 400, 400)),
    "mlp": Mlp(head=(400, 400, 400)),
  }
  return dataclasses.replace(config, model=models[variant])
