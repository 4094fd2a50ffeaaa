"""Converts a checkpoint of another library to a run, a run to a file, or a run to another config.

python launch/convert_checkpoint.py --from=fuxictr --to=gemjax --input=WuKong.model \
  --output=runs/wukong --config=my_wukong.py --config.data.path=PREPARED --verify
python launch/convert_checkpoint.py --from=gemjax --to=safetensors --input=runs/wukong \
  --output=wukong.safetensors --dtype=bfloat16
"""

import os
import pathlib

import cli
from absl import flags
from ml_collections import config_flags

from gemjax.config import Config
from gemjax.config.next_item import NextItem

_FROM = flags.DEFINE_string("from", None, "Format of the input: gemjax, fuxictr, ..")
_TO = flags.DEFINE_string("to", None, "Format of the output.")
_INPUT = flags.DEFINE_string("input", None, "Folder of a run, or a file.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder or file to write; must not exist.")
_CONFIG = config_flags.DEFINE_config_file(
  "config", None, "Of the run that comes out; default: that of the input.", lock_config=True
)
_CHECKPOINT = flags.DEFINE_integer("checkpoint", None, "Step of a run's; default: the best.")
_DTYPE = flags.DEFINE_string("dtype", None, "Of floats in a file: float32, bfloat16 or float16.")
_DRY_RUN = flags.DEFINE_bool("dry_run", False, "Print the table and write nothing.")
_VERIFY = flags.DEFINE_bool("verify", False, "Read the output again and compare to the bit.")


def main():
  kinds = Config, NextItem
  config = cli.experiment(_CONFIG, *kinds) if flags.FLAGS["config"].present else None
  os.environ["JAX_PLATFORMS"] = "cpu"  # A conversion needs no device but the host.
  from gemjax.convert import FORMATS, ConvertError, convert  # Seconds of imports.

  for flag in (_FROM, _TO, _INPUT, _OUTPUT):
    if not flag.value:
      raise ConvertError(f"--{flag.name} is missing; see --help")
  for flag in (_FROM, _TO):
    if flag.value not in FORMATS:
      raise ConvertError(f"--{flag.name}={flag.value}, but must be one of {', '.join(FORMATS)}")
  lines = convert(
    source=_FROM.value,
    target=_TO.value,
    input=pathlib.Path(_INPUT.value),
    output=pathlib.Path(_OUTPUT.value),
    config=config,
    step=_CHECKPOINT.value,
    dtype=_DTYPE.value or "",
    dry_run=_DRY_RUN.value,
    verify=_VERIFY.value,
  )
  print("\n".join(lines))


if __name__ == "__main__":
  cli.run(main, accelerated=False)
