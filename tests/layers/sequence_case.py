"""A batch of jagged events, and what holds of every layer over it.

`Case` compares a layer with an oracle that sees one example at a time: its outputs, and its
gradients with the oracle's differences. It then changes what an output must not depend on.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from gemjax.layers import tokens as tokens_lib
from gemjax.parallel import placement

LENGTHS = (3, 0, 9, 1, 5, 0)  # 18 events.
SLOTS, DIM = 24, 8


def events(lengths=LENGTHS, slots=SLOTS, dim=DIM, seed=0):
  """x_ED, age_E; ages fall within an example, from up to a year, the oldest two events tied."""
  rng = np.random.default_rng(seed)
  age_E = np.exp(rng.uniform(0, np.log(3e7), slots)).astype(np.int32)
  for age in split(age_E, lengths):
    age[:] = -np.sort(-age)
    age[:2] = age[:1]
  return rng.normal(size=(slots, dim)).astype(np.float32), age_E


def split(x_E, lengths=LENGTHS):
  """The events of every example, as views."""
  return np.split(x_E[: sum(lengths)], np.cumsum(lengths)[:-1])


class Case:
  """A layer whose parameters are moved at random, so that none hides at 0 or 1.

  Args:
    module: The layer.
    apply: (module, tokens, extra) -> its outputs, of every slot or of every example.
    oracle: (w, x, age, extra_b) -> outputs of one example, w as nested dicts, all float64.
    extra: (B, ...), what an example brings beside its events.
  """

  def __init__(self, module, apply, oracle, *, extra=None, dim=DIM):
    graph, state = nnx.split(module)
    placement.param_specs(state, {"data": 1, "model": 1})  # Raises unless all name their axes.
    rng = np.random.default_rng(7)
    move = lambda p: np.asarray(p) + 0.3 * rng.normal(size=p.shape).astype(np.float32)
    self.params = jax.tree.map(move, nnx.to_pure_dict(state))
    self.one, self.extra = oracle, extra
    self.x_ED, self.age_E = events(dim=dim)

    @jax.jit
    def run(params, x_ED, extra, age_E, lengths_B):
      def outputs(params, x_ED, extra):
        nnx.replace_by_pure_dict(state, params)
        tokens = tokens_lib.of_lengths(x_ED, lengths_B, age_E)
        return apply(nnx.merge(graph, state), tokens, extra)

      y, pull = jax.vjp(outputs, params, x_ED, extra)
      weight = jnp.cos(jnp.arange(y.size, dtype=y.dtype)).reshape(y.shape)
      if len(y) == len(x_ED):
        weight = jnp.where(jnp.arange(len(y))[:, None] < lengths_B.sum(), weight, 0)
      return y, weight, pull(weight)

    self.compiled = run

  def run(self, lengths=LENGTHS, **changed):
    """Outputs (of events: without the room behind them), their weights, gradients of the sum."""
    given = {"x_ED": self.x_ED, "age_E": self.age_E, "extra": self.extra, **changed}
    found = self.compiled(self.params, lengths_B=np.array(lengths, np.int32), **given)
    y, weight, grads = jax.tree.map(np.asarray, found)
    cut = sum(lengths) if len(y) == SLOTS else len(y)
    return y[:cut], weight[:cut], grads

  def oracle(self, params, x_ED, extra):
    extra = [None] * len(LENGTHS) if extra is None else extra
    parts = zip(split(x_ED), split(self.age_E), extra)
    return [self.one(params, x, age, e) for x, age, e in parts]

  def check_values(self, tolerance=2e-5):
    y, _, _ = self.run()
    wanted = self.oracle(*self._inputs64())
    wanted = np.concatenate(wanted) if len(y) == sum(LENGTHS) else np.stack(wanted)
    np.testing.assert_allclose(y, wanted, rtol=tolerance, atol=tolerance)

  def check_gradients(self, step=1e-5, tolerance=2e-4):
    """Along one direction at random for every array, against the oracle's central difference."""
    _, weight, grads = self.run()
    leaves, tree = jax.tree.flatten(self._inputs64())
    weight = weight.astype(np.float64)
    rng = np.random.default_rng(3)

    def loss(leaves):
      y = self.oracle(*jax.tree.unflatten(tree, leaves))
      return (np.concatenate(y).ravel() * weight.ravel()).sum()

    for i, gradient in enumerate(jax.tree.leaves(grads)):
      way = rng.normal(size=leaves[i].shape)
      moved = lambda by, i=i, way=way: [*leaves[:i], leaves[i] + by * way, *leaves[i + 1 :]]
      wanted = (loss(moved(step)) - loss(moved(-step))) / (2 * step)
      name = jax.tree_util.keystr(jax.tree_util.tree_flatten_with_path(grads)[0][i][0])
      scale = np.linalg.norm(gradient) + abs(wanted)
      assert scale > 1e-6, f"{name}: nothing depends on it"
      assert abs((gradient * way).sum() - wanted) < tolerance * scale, name

  def check_order(self):
    """Examples in another order have the same results."""
    y, _, _ = self.run()
    order = [4, 1, 0, 2, 5, 3]
    place = np.concatenate([split(np.arange(SLOTS))[b] for b in order])
    place_E = np.append(place, np.arange(len(place), SLOTS))
    extra = None if self.extra is None else self.extra[order]
    lengths = [LENGTHS[b] for b in order]
    z, _, _ = self.run(lengths, x_ED=self.x_ED[place_E], age_E=self.age_E[place_E], extra=extra)
    wanted = y[place] if len(y) == sum(LENGTHS) else y[order]
    np.testing.assert_allclose(z, wanted, rtol=1e-5, atol=1e-6)

  def check_others(self):
    """An example's bits depend neither on other examples nor on what lies in the room behind."""
    y, _, grads = self.run()
    other, other_age = events(seed=1, dim=self.x_ED.shape[1])
    start, end = 3, 12  # The example of 9 events.
    x_ED, age_E = other * 100, other_age
    x_ED[start:end], age_E[start:end] = self.x_ED[start:end], self.age_E[start:end]
    changed = {"x_ED": x_ED, "age_E": age_E}
    if self.extra is not None:
      changed["extra"] = self.extra[::-1] * 2
      changed["extra"][2] = self.extra[2]
    z, _, _ = self.run(**changed)
    mine = slice(start, end) if len(y) == sum(LENGTHS) else slice(2, 3)
    np.testing.assert_array_equal(y[mine], z[mine])
    assert not np.array_equal(y, z)
    x_ED = np.concatenate([self.x_ED[: sum(LENGTHS)], 1e6 * other[sum(LENGTHS) :]])
    age_E = np.where(np.arange(SLOTS) < sum(LENGTHS), self.age_E, 2**31 - 1).astype(np.int32)
    z, _, z_grads = self.run(x_ED=x_ED, age_E=age_E)
    np.testing.assert_array_equal(y, z)
    jax.tree.map(np.testing.assert_array_equal, grads, z_grads)

  def check_later(self):
    """Event t of a causal layer sees none after it, to the bit."""
    y, _, _ = self.run()
    for t in (0, 4, 7):  # Of the example of 9 events, which begins at slot 3.
      x_ED = self.x_ED.copy()
      x_ED[3 + t + 1 : 12] = 9 * events(seed=2)[0][3 + t + 1 : 12]
      z, _, _ = self.run(x_ED=x_ED)
      np.testing.assert_array_equal(y[: 3 + t + 1], z[: 3 + t + 1])
      assert not np.array_equal(y[3 + t + 1 : 12], z[3 + t + 1 : 12])

  def check_none(self):
    """A batch without any event: outputs and gradients are finite."""
    y, _, grads = self.run(lengths=(0,) * len(LENGTHS))
    assert all(np.isfinite(g).all() for g in jax.tree.leaves((y, grads)))
    assert not grads[1].any()  # Of x_ED.
    return y

  def _inputs64(self):
    return jax.tree.map(lambda x: np.asarray(x, np.float64), (self.params, self.x_ED, self.extra))
