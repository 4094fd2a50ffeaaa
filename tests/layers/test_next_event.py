"""The loss of which event comes next, against its formula in float64, whole and in parts."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import PartitionSpec as P

from gemjax.layers import next_event
from gemjax.layers.next_event import NextEvent, NextEvents, next_event_loss, others
from gemjax.layers.tokens import of_lengths
from gemjax.parallel.mesh import make_mesh

B, D, AXES = 16, 4, ("data", "model")
LENGTHS = np.array([3, 0, 1, 2, 0, 0, 5, 1, 4, 2, 2, 0, 1, 1, 6, 2], np.int32)


@pytest.fixture
def few(monkeypatch):
  monkeypatch.setattr(next_event, "OTHERS", 5)


def events():
  rng = np.random.default_rng(0)
  draw = lambda: [rng.normal(size=(n, D)) for n in LENGTHS]
  return draw(), draw()


def parts(asks, items, shards):
  """`NextEvents` as `shards` devices have them, each with room for the same number of events."""
  room = max(sum(map(len, asks[s : s + B // shards])) for s in range(0, B, B // shards)) + 9
  out = []
  for s in range(0, B, B // shards):
    mine = slice(s, s + B // shards)
    lengths = LENGTHS[mine]
    behind = np.full((room - lengths.sum(), D), 1e3)
    pad = lambda xs, behind=behind: np.concatenate([*xs, behind])
    followed = np.concatenate([np.arange(n) < n - 1 for n in lengths])
    newest = [x[-1] if len(x) else np.zeros(D) for x in items[mine]]
    of = NextEvents(
      pad(asks[mine]), pad(items[mine]), np.pad(followed, (0, room - len(followed))),
      np.array(newest), lengths,
    )  # fmt: skip
    out.append(jax.tree.map(lambda x: np.float32(x) if x.dtype == np.float64 else x, of))
  return jax.tree.map(lambda *x: np.concatenate(x), *out)


def oracle(asks, items, known):
  losses = []
  for a, i in zip(asks, items):
    for e in range(len(a) - 1):
      scores = np.array([a[e] @ i[e + 1], *(a[e] @ k for k in known)])
      losses.append(np.log(np.exp(scores).sum()) - scores[0])
  return np.mean(losses)


def loss_and_others(of, shards):
  mesh = make_mesh(1, shards, jax.devices()[:shards])

  def both(of):
    total, found = jax.lax.psum(of.followed_E.sum(), AXES), others(of, AXES)
    return jax.lax.psum(next_event_loss(of, *found, total), AXES), found

  whole = jax.shard_map(both, mesh=mesh, in_specs=P(AXES), out_specs=P(), check_vma=False)
  loss, (items_KD, there_K) = jax.jit(whole)(of)
  return loss, np.asarray(items_KD)[there_K]


@pytest.mark.parametrize("shards", [1, 8])
def test_where_there_are_few_all_are_the_others(shards):
  asks, items = events()
  loss, found = loss_and_others(parts(asks, items, shards), shards)
  newest = np.float32([x[-1] for x in items if len(x)])
  np.testing.assert_array_equal(np.sort(found, 0), np.sort(newest, 0))
  np.testing.assert_allclose(loss, oracle(asks, items, newest), rtol=1e-5)


def test_neither_order_nor_parts_say_which_are(few, monkeypatch):
  """Of two examples with the same item both may be; only an item's bits and length decide."""
  asks, items = events()
  items[2], items[7] = (
    items[6][-1:].copy(),
    items[6][-1:].copy(),
  )  # One event each, as has example 6.
  loss, found = loss_and_others(parts(asks, items, 1), 1)
  assert len(found) == 5
  assert {tuple(x) for x in found} <= {tuple(np.float32(x[-1])) for x in items if len(x)}
  np.testing.assert_allclose(loss, oracle(asks, items, found), rtol=1e-5)
  for shards, seed in ((1, 1), (8, 2), (4, 3)):
    order = np.random.default_rng(seed).permutation(B)
    monkeypatch.setitem(globals(), "LENGTHS", LENGTHS[order])
    asks, items = ([xs[b] for b in order] for xs in (asks, items))
    again, others_again = loss_and_others(parts(asks, items, shards), shards)
    np.testing.assert_array_equal(others_again, found)
    np.testing.assert_allclose(again, loss, rtol=1e-5)


def test_every_example_is_as_often_among_them(few):
  """Within five deviations of K in so many of B, over batches of other items."""
  asks, _ = events()
  rng, times, batches = np.random.default_rng(3), np.zeros(B), 400
  of = parts(asks, asks, 1)
  chosen = jax.jit(
    jax.shard_map(
      lambda of: others(of, AXES)[0],
      mesh=make_mesh(1, 1, jax.devices()[:1]), in_specs=P(AXES), out_specs=P(), check_vma=False,
    )
  )  # fmt: skip
  for _ in range(batches):
    newest_BD = rng.normal(size=(B, D)).astype(np.float32) * (LENGTHS > 0)[:, None]
    found = np.asarray(chosen(of._replace(newest_BD=newest_BD)))
    times += (found[:, None] == newest_BD).all(2).any(0)
  share = 5 / (LENGTHS > 0).sum()
  error = np.abs(times[LENGTHS > 0] / batches - share)
  assert (error < 5 * np.sqrt(share * (1 - share) / batches)).all()


@pytest.mark.parametrize("known", [False, True])
def test_gradients_are_finite_where_there_is_nothing_to_learn(known):
  """No other event, or no event with a next one."""
  asks, items = events()
  of = parts(asks, items, 1)
  of = of._replace(length_B=of.length_B * known, followed_E=of.followed_E & (not known))
  loss = lambda a, i: next_event_loss(
    of._replace(asks_ED=a, item_ED=i), of.newest_BD, of.length_B > 0, jnp.sum(of.followed_E)
  )
  value, grads = jax.value_and_grad(loss, argnums=(0, 1))(of.asks_ED, of.item_ED)
  assert value == 0 and all((np.asarray(g) == 0).all() for g in grads)


def test_room_and_lengths_say_what_is_followed():
  """A layer's own `followed_E` and `newest_BD`, empty histories among them, are those above."""
  asks, items = events()
  wanted = parts(asks, items, 1)
  E = len(wanted.item_ED)
  tokens = of_lengths(jnp.ones((E, D)), jnp.asarray(LENGTHS), jnp.zeros(E, jnp.int32))
  layer = NextEvent(D, dtype="float32", rngs=nnx.Rngs(0))
  found = jax.jit(functools.partial(NextEvent.__call__, layer))(tokens, wanted.item_ED)
  for name in ("item_ED", "followed_E", "newest_BD", "length_B"):
    np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
