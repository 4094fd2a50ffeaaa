"""One experiment: data, mesh, tables, a model, optimiser, loop and checkpoints."""

import dataclasses
import os
from typing import Any

from gemjax import fields
from gemjax.config.laws import one_of, real, widths
from gemjax.config.models import Fm, Logistic, Model, Wukong, validate_model
from gemjax.config.sequences import Gem
from gemjax.fields import need as _need

# Axes of the device mesh. A batch is split over both; parameters and tables are sharded over
# `model` and replicated over `data`.
DATA, MODEL = "data", "model"


@dataclasses.dataclass(kw_only=True, slots=True)
class Data:
  path: str = "demo"  # A prepared folder, a raw public set, or "demo" for the simulator.
  batch_size: int = 4096
  eval_batch_size: int = 8192
  window_blocks: int = 16  # Blocks shuffled together: 16 * 4,096 = 65,536 examples.
  history: int = 0  # Latest events of a history that a model sees; 0: as many as the data keep.
  demo_examples: int = 1_000_000  # Of the simulator, all splits together.


@dataclasses.dataclass(kw_only=True, slots=True)
class Mesh:
  """Devices as data x model; 0 is chosen by the rule of gemjax/parallel/mesh.py."""

  data: int = 0  # Groups, each with a whole copy of the parameters and tables.
  model: int = 0  # Devices of a group, which share one copy.


@dataclasses.dataclass(kw_only=True, slots=True)
class Embedding:
  dim: int = 16  # d, the width of one unit.
  units: dict[str, int] = dataclasses.field(
    default_factory=dict
  )  # Feature -> units, 1 unless named; 0 leaves it out.
  small_rows: int = 0  # Tables of fewer rows are small: narrow, grouped, projected to units.
  small_dim: int = 4  # Width of a small table.
  small_group: int = 8  # Small features whose rows are concatenated into one MLP.
  dense_mlp: tuple[int, ...] = (64,)  # Hidden widths from the dense features to their units.
  dense_units: int = 1
  dense_relu: bool = False  # A ReLU on those units.
  ages: bool = True  # Whether events say how old they are: a bucket of their age is added to them.
  init_scale: float = 0.01  # Rows are born N(0, init_scale^2).
  # Of tables: float32 | bfloat16 | float8_e4m3fn, the last with a scale a row, both narrow types
  # with stochastic rounding.
  dtype: str = "float32"
  # Between devices: float32 | bfloat16 | float8_e4m3fn, of looked-up rows and of their gradients;
  # the last with a scale a row.
  exchange_dtype: str = "float32"
  gradient_dtype: str = "float32"
  optimizer: str = "rowwise_adagrad"  # rowwise_adagrad | adagrad | sgd | lazy_adam
  learning_rate: float = 0.05
  eps: float = 1e-8
  # Tables on a mesh; see gemjax/embedding/tables.py.
  placement: dict[str, str] = dataclasses.field(
    default_factory=dict
  )  # Table -> row | replicated | column, chosen by its size unless named.
  replicated_rows: int = 1024  # Tables of at most so many rows are replicated.
  column_width: int = 2048  # Tables of at least this width are split by column.
  exchange_rows: int = 0  # Rows a pair of devices moves in one round; 0: of the first batch.
  # exact | ahead: rows are read behind the update of the step before, or in front of it, and that
  # update is left to the step behind: both exchanges hide, and a row is one update old.
  lookup: str = "exact"
  replicas: str = "exact"  # exact | average: how the copies of the `data` axis are kept alike.
  average_every: int = 20  # Steps between two averages.
  # Both shrink every row at every step, looked up or not; at most one is positive.
  weight_decay: float = 0.0  # Decoupled: w <- (1 - lr * weight_decay) w.
  l2: float = 0.0  # Of l2 |w|^2 / 2, preconditioned: w <- w exp(-lr * l2 / (sqrt(v) + eps)).


@dataclasses.dataclass(kw_only=True, slots=True)
class Optimizer:
  """Adam for the dense parameters."""

  learning_rate: float = 1e-3
  warmup: float = 0.0  # Share of the steps with linear warm-up, tables included.
  schedule: str = "constant"  # constant | linear | cosine: what follows the warm-up.
  clip_norm: float = 0.0  # Of the global gradient norm; 0 is off.
  l2: float = 0.0  # Added to the gradient of kernels as l2 * w.


@dataclasses.dataclass(kw_only=True, slots=True)
class Train:
  epochs: float = 1.0
  steps: int = 0  # Overrides epochs where positive.
  seed: int = 0
  dtype: str = "float32"  # Of the computation; parameters stay float32.
  float8_mlp: bool = (
    False  # Products of Wukong's and GEM's MLPs in 8 bits; first and last maps not.
  )
  task_weights: dict[str, float] = dataclasses.field(default_factory=dict)  # 1 unless named.
  log_every: int = 50
  eval_every: float = 1.0  # In epochs; 0: only at the end.
  stop_metric: str = "auc"  # Of the first task on valid: auc | gauc | ne | log_loss.
  profile_steps: int = 0  # Steps behind the first ten that are traced into WORKDIR/profile.
  patience: int = 0  # Evaluations without a better metric before the run stops; 0: never.


@dataclasses.dataclass(kw_only=True, slots=True)
class Memory:
  """What a device holds for the backward pass of Wukong and GEM; see gemjax/layers/saved.py."""

  activations: str = "computed"  # computed | float8: as they were computed, or in 8 bits.
  recomputed_layers: int = 0  # From the first on; of these the inputs alone are kept.
  # Bytes of activations a device, up to 1 as a share of all, to fit into by recomputing as few
  # layers as possible; 0: no limit.
  activation_budget: float = 0.0


@dataclasses.dataclass(kw_only=True, slots=True)
class Checkpoint:
  every: int = 0  # Steps; 0: at every evaluation.
  keep: int = 2  # Latest kept, beside the best.
  # Snapshots between them: a folder on each host's own disk, as /dev/shm/gemjax, and steps.
  local: str = ""
  local_every: int = 0


@dataclasses.dataclass(kw_only=True, slots=True)
class Compilation:
  # Where compiled programs are kept for the next start: workdir (its folder "compiled") | off | a
  # folder, which several runs may share; see gemjax/train/cache.py.
  cache: str = "workdir"
  # Layers of equal shape that lie side by side in the program, the others being further turns of a
  # loop; 0: few, so that it does not grow with depth. Without a loop XLA hides more communication.
  unroll: int = 0
  # Of layers that all lie side by side: whether the backward pass of a layer waits until the
  # gradients of the weights two layers on are summed over the devices, which XLA may leave to the
  # end otherwise. It hides more where links have time to spare (gem_large), less where they have
  # none (wukong_paper).
  early_sums: bool = False


@dataclasses.dataclass(kw_only=True, slots=True)
class Config:
  """One experiment."""

  name: str
  data: Data = dataclasses.field(default_factory=Data)
  mesh: Mesh = dataclasses.field(default_factory=Mesh)
  embedding: Embedding = dataclasses.field(default_factory=Embedding)
  model: Model = dataclasses.field(default_factory=Wukong)
  optimizer: Optimizer = dataclasses.field(default_factory=Optimizer)
  train: Train = dataclasses.field(default_factory=Train)
  memory: Memory = dataclasses.field(default_factory=Memory)
  checkpoint: Checkpoint = dataclasses.field(default_factory=Checkpoint)
  compilation: Compilation = dataclasses.field(default_factory=Compilation)

  def to_json(self) -> dict[str, Any]:
    return fields.to_json(self)

  @classmethod
  def from_json(cls, tree: dict[str, Any]) -> "Config":
    """Inverse of `to_json`; a field that is absent keeps its default.

    Raises:
      ConfigError: a field or a kind of model that does not exist, or a value out of its law.
    """
    config = fields.from_json(cls, tree, "config")
    config.validate()
    return config

  def validate(self) -> None:
    """Raises ConfigError for the first field outside its law."""
    fields.check_types(self)
    data, emb, opt, train = self.data, self.embedding, self.optimizer, self.train
    memory = self.memory
    for name in ("batch_size", "eval_batch_size", "window_blocks"):
      _need(getattr(data, name) > 0, f"data.{name}", getattr(data, name), "positive")
    _need(data.path, "data.path", data.path, "a folder, or 'demo'")
    _need(data.demo_examples >= 20_000, "data.demo_examples", data.demo_examples, "at least 20000")
    for name in ("dim", "small_dim", "small_group", "dense_units"):
      _need(getattr(emb, name) > 0, f"embedding.{name}", getattr(emb, name), "positive")
    for name in ("small_rows", "replicated_rows", "exchange_rows"):
      _need(getattr(emb, name) >= 0, f"embedding.{name}", getattr(emb, name), "at least 0")
    _need(
      all(u >= 0 for u in emb.units.values()),
      "embedding.units", emb.units, "at least 0 for every feature",
    )  # fmt: skip
    _need(data.history >= 0, "data.history", data.history, "at least 0")
    for axis in (DATA, MODEL):
      size = getattr(self.mesh, axis)
      _need(size >= 0, f"mesh.{axis}", size, "at least 0")
    kinds = ("row", "replicated", "column")
    _need(
      all(kind in kinds for kind in emb.placement.values()),
      "embedding.placement", emb.placement, f"one of {', '.join(kinds)} for every table",
    )  # fmt: skip
    for name in ("column_width", "average_every"):
      _need(getattr(emb, name) > 0, f"embedding.{name}", getattr(emb, name), "positive")
    one_of(emb.lookup, "embedding.lookup", "exact", "ahead")
    one_of(emb.replicas, "embedding.replicas", "exact", "average")
    law = "positive where embedding.replicas is 'average', whose step depends on it"
    _need(emb.replicas == "exact" or self.mesh.data, "mesh.data", self.mesh.data, law)
    widths(emb.dense_mlp, "embedding.dense_mlp")
    for name in ("init_scale", "learning_rate", "eps", "weight_decay", "l2"):
      value = getattr(emb, name)
      _need(real(value), f"embedding.{name}", value, "a finite number of at least 0")
    _need(emb.eps > 0 or emb.optimizer == "sgd", "embedding.eps", emb.eps, "positive")
    if isinstance(self.model, Logistic | Fm):  # A small table would pass an MLP.
      law = "0 for a linear model"
      _need(not emb.small_rows, "embedding.small_rows", emb.small_rows, law)
    both = emb.weight_decay and emb.l2
    _need(not both, "embedding.l2", emb.l2, "0 where embedding.weight_decay is positive")
    decay = emb.learning_rate * emb.weight_decay
    _need(
      decay < 1, "embedding.weight_decay", emb.weight_decay, "below 1 / embedding.learning_rate"
    )
    one_of(emb.dtype, "embedding.dtype", "float32", "bfloat16", "float8_e4m3fn")
    for name in ("exchange_dtype", "gradient_dtype"):
      one_of(getattr(emb, name), f"embedding.{name}", "float32", "bfloat16", "float8_e4m3fn")
    one_of(emb.optimizer, "embedding.optimizer", "rowwise_adagrad", "adagrad", "sgd", "lazy_adam")
    validate_model(self.model, emb.dim)
    for name in ("learning_rate", "clip_norm", "l2"):
      value = getattr(opt, name)
      _need(real(value), f"optimizer.{name}", value, "a finite number of at least 0")
    _need(real(opt.warmup, high=1.0), "optimizer.warmup", opt.warmup, "a share of steps in [0, 1]")
    one_of(opt.schedule, "optimizer.schedule", "constant", "linear", "cosine")
    _need(train.steps >= 0, "train.steps", train.steps, "at least 0")
    positive = train.steps or (real(train.epochs) and train.epochs)
    _need(positive, "train.epochs", train.epochs, "a finite number above 0")
    _need(
      all(real(w) for w in train.task_weights.values()),
      "train.task_weights", train.task_weights, "a finite number of at least 0 for every task",
    )  # fmt: skip
    _need(real(train.eval_every), "train.eval_every", train.eval_every, "at least 0")
    _need(0 <= train.seed < 2**31, "train.seed", train.seed, "in [0, 2^31)")
    _need(train.log_every > 0, "train.log_every", train.log_every, "positive")
    _need(train.profile_steps >= 0, "train.profile_steps", train.profile_steps, "at least 0")
    _need(train.patience >= 0, "train.patience", train.patience, "at least 0")
    one_of(memory.activations, "memory.activations", "computed", "float8")
    budget = memory.activation_budget
    _need(real(budget), "memory.activation_budget", budget, "a finite number of at least 0")
    layers = getattr(self.model, "layers", 0) + isinstance(self.model, Gem)
    recomputed, most = memory.recomputed_layers, layers * isinstance(self.model, Wukong | Gem)
    law = f"at least 0 and at most {most}, the layers of this model that can be recomputed"
    _need(0 <= recomputed <= most, "memory.recomputed_layers", recomputed, law)
    law = "computed, and without a budget, for models other than Wukong and Gem"
    _need(most or memory == Memory(), "memory.activations", memory.activations, law)
    law = "false for models other than Wukong and Gem"
    _need(most or not train.float8_mlp, "train.float8_mlp", train.float8_mlp, law)
    one_of(train.dtype, "train.dtype", "float32", "bfloat16")
    one_of(train.stop_metric, "train.stop_metric", "auc", "gauc", "ne", "log_loss")
    _need(self.checkpoint.every >= 0, "checkpoint.every", self.checkpoint.every, "at least 0")
    _need(self.checkpoint.keep >= 1, "checkpoint.keep", self.checkpoint.keep, "at least 1")
    local, every = self.checkpoint.local, self.checkpoint.local_every
    law = "positive where checkpoint.local is a folder, and 0 where it is empty"
    absolute = not local or os.path.isabs(local)
    _need(absolute, "checkpoint.local", local, "an absolute path: runs start anywhere")
    _need(every > 0 if local else every == 0, "checkpoint.local_every", every, law)
    unroll, law = self.compilation.unroll, "at least 0, and 0 for models other than Wukong and Gem"
    _need(unroll >= 0 and (most or not unroll), "compilation.unroll", unroll, law)
    early = self.compilation.early_sums
    _need(unroll > 1 or not early, "compilation.early_sums", early, "False where unroll is below 2")
    law = "workdir, off or a folder"
    _need(self.compilation.cache, "compilation.cache", self.compilation.cache, law)


# Fields that may change between the start of a run and its resumption: they move no weight, the
# mesh by rounding alone.
FREE_ON_RESUME = (
  "name",
  "mesh.data",
  "mesh.model",
  "embedding.exchange_rows",
  "data.path",
  "data.eval_batch_size",
  "memory.recomputed_layers",
  "memory.activation_budget",
  "train.log_every",
  "train.profile_steps",
  "train.patience",
  "checkpoint.every",
  "checkpoint.keep",
  "checkpoint.local",
  "checkpoint.local_every",
  "compilation.cache",
  "compilation.unroll",
  "compilation.early_sums",
)  # fmt: skip


def difference(old: dict[str, Any], new: dict[str, Any]) -> str | None:
  """The first field in which two `to_json` trees differ, in words; free fields excepted."""
  averaged = new["embedding"]["replicas"] == "average"  # Then c = data scales the step.
  bound = {"mesh.data"} if averaged else set()
  if new["embedding"]["lookup"] == "ahead":  # Rows are read anew at every checkpoint and snapshot.
    bound |= {"checkpoint.every", "checkpoint.local_every"}
  free = tuple(f for f in FREE_ON_RESUME if f not in bound)
  return fields.difference(old, new, free=free)
