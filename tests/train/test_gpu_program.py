"""What a step is lowered to for GPUs, where none is."""

import functools

import jax
import test_mesh

from gemjax.parallel.arrays import to_devices
from gemjax.train.step import plan_step, train_step


def test_no_search_is_a_loop():
  run = test_mesh.Run(1, 2, test_mesh.make_config())
  trainer = run.programs._trainer
  batch = to_devices(run.mesh, test_mesh.make_batch(test_mesh.KINDS[0], 0, run))
  ahead = jax.eval_shape(functools.partial(plan_step, trainer), batch)
  step = jax.jit(functools.partial(train_step, trainer))
  traced = step.trace(trainer.abstract(), ahead, batch, batch)
  loops = {}
  for platform in ("cpu", "cuda"):
    functions = traced.lower(lowering_platforms=(platform,)).as_text().split("func.func private @")
    searches = [text for text in functions if text.partition("(")[0].find("searchsorted") >= 0]
    loops[platform] = sum("stablehlo.while" in text for text in searches)
  assert loops["cpu"] > 0  # Else this test looks for the wrong name.
  assert loops["cuda"] == 0
