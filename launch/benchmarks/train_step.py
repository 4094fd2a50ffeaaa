"""The training step on this machine: against table size, plain PyTorch, and FBGEMM on the CPU.

Peers take turns with gemjax within one run on the same cores; figures are medians.
"""

from __future__ import annotations

import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
from benchmarks import fbgemm_table as fbgemm
from benchmarks import pytorch_wukong as peer
from benchmarks.own_process import OwnProcess
from benchmarks.turns import REPEATS, stepper, take_turns
from benchmarks.wukong_step import per_field, random_batch, torch_weights, wukong
from tqdm import tqdm

from gemjax.embedding.held import Held
from gemjax.embedding.replicated import Replicated
from gemjax.embedding.row_optimizers import rowwise_adagrad
from gemjax.embedding.stack import StackRule

LOSSES = 20


def run() -> dict[str, float]:
  """Every figure of the suite; the ratios are above 1 where gemjax is faster."""
  # Peers are new processes: this one takes its turn with them before its heap has held gigabytes.
  return against_fbgemm() | against_pytorch() | table_size()


def table_size() -> dict[str, float]:
  """Seconds of a step on the very same batch with 10^4, 10^6 and 10^7 table rows."""
  sizes = {"1e4": 10_000, "1e6": 1_000_000, "1e7": 10_000_000}
  batch = random_batch(np.random.default_rng(0), rows=min(sizes.values()))
  steps, temporaries = {}, {}
  for name, rows in sizes.items():
    _, state, step = wukong(rows)
    steps[name], temporaries[name] = stepper(step, state, batch)
  seconds = take_turns(steps, "table size")
  figures = {f"step_seconds_{name}_rows": s for name, s in seconds.items()}
  figures |= {f"temporary_bytes_{name}_rows": float(b) for name, b in temporaries.items()}
  return figures | {"step_time_1e7_over_1e4_rows": seconds["1e7"] / seconds["1e4"]}


def against_pytorch() -> dict[str, float]:
  """Examples/s of the same Wukong, and how far the first losses are apart from equal weights.

  Plain PyTorch runs in a process of its own. The same with the allocator that gemjax's binaries set
  tells how much of the ratio is the allocator's.
  """
  trainer, state, step = wukong(peer.ROWS)
  rows = per_field(peer.ROWS) * peer.FIELDS
  weights = torch_weights(trainer, state)
  plain = OwnProcess(peer.trainer_of, weights, rows)
  tuned = OwnProcess(peer.trainer_of, weights, rows, tuned=True)
  rng = np.random.default_rng(0)
  # Labels that can be learnt: every row has a true effect.
  effect_R = 0.5 * rng.standard_normal(rows)
  apart, seconds = [], {"gemjax": [], "plain": [], "tuned": []}
  for _ in tqdm(range(LOSSES), desc="gemjax and PyTorch"):
    batch = random_batch(rng, peer.ROWS)
    ids_BS = batch.ids_BS + per_field(peer.ROWS) * np.arange(peer.FIELDS)
    chance_B = 1 / (1 + np.exp(1 - effect_R[ids_BS].sum(1)))
    label_B = (rng.random(peer.BATCH) < chance_B).astype(np.float32)
    batch = batch._replace(label_BT=label_B[:, None])
    start = time.perf_counter()
    state, loss = step(state, batch)
    loss = float(loss)
    seconds["gemjax"].append(time.perf_counter() - start)
    for name, other in (("plain", plain), ("tuned", tuned)):
      other_loss, other_seconds = other.call("step", ids_BS, label_B)
      seconds[name].append(other_seconds)
      apart.append(abs(loss / other_loss - 1))
  plain.close(), tuned.close()
  rates = {name: peer.BATCH / statistics.median(s[2:]) for name, s in seconds.items()}
  return {
    "gemjax_examples_per_second": rates["gemjax"],
    "pytorch_examples_per_second": rates["plain"],
    "examples_per_second_over_pytorch": rates["gemjax"] / rates["plain"],
    "pytorch_with_our_allocator_examples_per_second": rates["tuned"],
    "examples_per_second_over_pytorch_with_our_allocator": rates["gemjax"] / rates["tuned"],
    "first_losses_apart": max(apart),
  }


def against_fbgemm() -> dict[str, float]:
  """Lookup and row-wise AdaGrad of 160 thousand rows, and how far the weights end apart.

  FBGEMM as PyTorch above: plain, and with our allocator.
  """
  figures = {}
  for kind in ("uniform", "zipf"):
    rng = np.random.default_rng(0)
    weights_RD = rng.standard_normal((fbgemm.ROWS, fbgemm.DIM), np.float32)
    grad_MD = rng.standard_normal((fbgemm.LOOKUPS, fbgemm.DIM), np.float32)
    ids_M = fbgemm.draw_ids(rng, kind)
    plain = OwnProcess(fbgemm.FbgemmTable, weights_RD)
    tuned = OwnProcess(fbgemm.FbgemmTable, weights_RD, tuned=True)
    held = Held.whole(fbgemm.ROWS, fbgemm.DIM)
    stack, lookup, update = _table(held)
    stack = stack._replace(rows_RW=jnp.array(weights_RD))
    ids, grad = jnp.asarray(ids_M, jnp.int32), jnp.asarray(grad_MD)
    seconds = {"gemjax": [], "plain": [], "tuned": []}
    for _ in tqdm(range(REPEATS + 2), desc=f"gemjax and FBGEMM, {kind}"):
      start = time.perf_counter()
      _, plan = jax.block_until_ready(lookup(stack, ids))
      stack = jax.block_until_ready(update(stack, plan, grad, jnp.float32(fbgemm.RATE)))
      seconds["gemjax"].append(time.perf_counter() - start)
      for name, other in (("plain", plain), ("tuned", tuned)):
        seconds[name].append(sum(other.call("step", ids_M, grad_MD)[0]))
    ours, theirs, tuned_theirs = (statistics.median(s[2:]) for s in seconds.values())
    figures |= {
      f"gemjax_{kind}_ms": 1e3 * ours,
      f"fbgemm_{kind}_ms": 1e3 * theirs,
      f"fbgemm_with_our_allocator_{kind}_ms": 1e3 * tuned_theirs,
      f"weights_apart_{kind}": float(
        np.abs(np.asarray(stack.rows_RW) - plain.call("weights")[0]).max()
      ),
      f"sparse_speed_over_fbgemm_{kind}": theirs / ours,
    }
    plain.close(), tuned.close()
  ratios = [figures[f"sparse_speed_over_fbgemm_{k}"] for k in ("uniform", "zipf")]
  return figures | {"sparse_speed_over_fbgemm": min(ratios)}


def _table(held: Held):
  """(stack, jitted look-up of ids, jitted update) of one table on one device."""
  rule, table = StackRule(optimizer=rowwise_adagrad(fbgemm.EPS)), Replicated(held=held, axes=())
  key = jax.random.key(0)

  def lookup(stack, ids):
    plan = table.plan(ids)
    return table.lookup(rule, stack, plan), plan

  update = lambda stack, plan, grad, rate: table.update(rule, stack, plan, grad, rate, key)
  return rule.init(key, held), jax.jit(lookup), jax.jit(update, donate_argnums=0)
