"""GEM on a simulated ads log: no files needed. Two histories (clicks and views), two domains, two
tasks.

python launch/train.py --config=configs/gem_demo.py --workdir=runs/gem_demo
"""

from gemjax.config import (
  Attention,
  Config,
  Data,
  Embedding,
  Gem,
  Optimizer,
  Train,
  sized,
)


def get_config(variant: str = "full") -> Config:
  config = Config(
    name="gem_demo",
    data=Data(path="demo", batch_size=1024, history=20, demo_examples=400_000, window_blocks=32),
    embedding=Embedding(dim=16, learning_rate=0.02),
    model=Gem(
      layers=2,
      fmb_units=8,
      lcb_units=8,
      rank=8,
      mlp=(128,),
      strides=(1, 4),
      fine=Attention(heads=1, block=64, rope=10000.0, qk_norm=True),
      coarse=Attention(heads=1, block=512, rope=10000.0, qk_norm=True),
      domain="domain",
      head=(128,),
    ),
    optimizer=Optimizer(learning_rate=2e-3, warmup=0.05, schedule="cosine"),
    train=Train(epochs=1),
  )
  return sized(config, variant)
