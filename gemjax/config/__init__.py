"""The experiment: nested typed dataclasses, overridden by flags, validated before any work.

`--config=configs/x.py --config.train.seed=2` overrides a field by its path; a misspelt field is an
error. The classes are mutable for that reason alone: after `validate` nobody writes to them.
ml_collections reads the annotations as types: no `from __future__ import annotations` here.
"""

from gemjax.config.experiment import DATA as DATA
from gemjax.config.experiment import FREE_ON_RESUME as FREE_ON_RESUME
from gemjax.config.experiment import MODEL as MODEL
from gemjax.config.experiment import Checkpoint as Checkpoint
from gemjax.config.experiment import Compilation as Compilation
from gemjax.config.experiment import Config as Config
from gemjax.config.experiment import Data as Data
from gemjax.config.experiment import Embedding as Embedding
from gemjax.config.experiment import Memory as Memory
from gemjax.config.experiment import Mesh as Mesh
from gemjax.config.experiment import Optimizer as Optimizer
from gemjax.config.experiment import Train as Train
from gemjax.config.experiment import difference as difference
from gemjax.config.light import light as light
from gemjax.config.light import sized as sized
from gemjax.config.models import Dcnv2 as Dcnv2
from gemjax.config.models import Dlrm as Dlrm
from gemjax.config.models import Fm as Fm
from gemjax.config.models import Logistic as Logistic
from gemjax.config.models import Mlp as Mlp
from gemjax.config.models import Model as Model
from gemjax.config.models import Wukong as Wukong
from gemjax.config.sequences import Attention as Attention
from gemjax.config.sequences import Din as Din
from gemjax.config.sequences import Gem as Gem
from gemjax.config.sequences import Hstu as Hstu
from gemjax.config.sequences import InterFormer as InterFormer
from gemjax.config.sequences import Sasrec as Sasrec
from gemjax.fields import ConfigError as ConfigError
