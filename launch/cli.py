"""What every binary does around its `main`: one sentence for an error, an exit code for all."""

import dataclasses
import importlib
import os
import pathlib
import pydoc
import re
import signal
import sys
import threading
import traceback
import warnings
from collections.abc import Callable
from typing import Any

from absl import app, flags, logging
from ml_collections import config_flags

from gemjax.config import Config, ConfigError
from gemjax.parallel.peers import TOLD
from gemjax.parallel.process import set_up_process
from gemjax.train.termination import Terminated

_DICTS = ("embedding.units", "embedding.placement", "train.task_weights")
# Forms of config_flags, and where in them the field and its dataclass stand.
_NO_FIELD = (
  (r"Field (\w+) not found on dataclass <class '([\w.]+)'>", 1, 2),
  (r"Attribute <class '([\w.]+)'>\.(\w+) does not exist", 2, 1),
)


def run(
  main: Callable[..., int | None], *, accelerated: bool = True, takes_command: bool = False
) -> None:
  """Parses the flags and calls `main`; errors that a user can mend leave no traceback.

  `accelerated` is for binaries that compute with JAX, on a GPU where there is one;
  with `takes_command`, `main` is given what stands behind `--`.

  Exit codes: 0 done, 1 an error in one sentence, 2 wrong flags, 130 Ctrl-C, 143 SIGTERM.
  """
  if accelerated:
    set_up_process()
  logging.set_verbosity(logging.FATAL)  # Orbax logs a traceback beside every error it raises.
  sys.unraisablehook = _unraisable
  # What a failed save of Orbax leaves behind; its error is ours to tell.
  warnings.filterwarnings("ignore", "coroutine .* was never awaited", RuntimeWarning)
  app.run(lambda argv: _guarded(main, argv, takes_command), flags_parser=_parse)


def experiment(holder: flags.FlagHolder, *kinds: type) -> Any:
  """The config of the flag --config, validated; raises ConfigError where it is none of `kinds`, by
  default a Config.
  """
  kinds = kinds or (Config,)
  flag = flags.FLAGS["config"]
  file = config_flags.get_config_filename(flag) if flag.present else ""
  if not file:
    raise ConfigError("--config is missing; name a file of configs/, as configs/wukong_demo.py")
  if not pathlib.Path(file.split(":")[0]).is_file():
    raise ConfigError(f"--config={file} is no file; name one of configs/")
  if not isinstance(holder.value, kinds):
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ConfigError(f"get_config of {file} must return a gemjax {names}, not {holder.value!r}")
  holder.value.validate()
  return holder.value


def import_without(module: str, unwanted: str) -> None:
  """Imports a module that would import an `unwanted` one for parts of it that are not used here."""
  absent = unwanted not in sys.modules
  if absent:
    sys.modules[unwanted] = None  # An ImportError, which the module expects.
  importlib.import_module(module)
  if absent:
    del sys.modules[unwanted]


def _parse(argv: list[str]) -> list[str]:
  try:
    return flags.FLAGS(argv)
  except Exception as error:  # config_flags runs the config file, which may raise anything.
    config = next((f" ({arg})" for arg in argv if arg.startswith("--config=")), "")
    _fail(2, f"wrong flags{config}: {_told(error, argv)}")


def _told(error: Exception, argv: list[str]) -> str:
  """What is wrong with the flags, and the mend; config_flags has classes and keys for it."""
  text = _sentence(error)
  for form, name, of in _NO_FIELD:
    found = re.search(form, text)
    kind = found and pydoc.locate(found[of])
    if dataclasses.is_dataclass(kind):
      fields = ", ".join(field.name for field in dataclasses.fields(kind))
      return f"{kind.__name__} has no field {found[name]!r}; it has {fields}"
  if found := re.search(r"earlier failure to load: \[Errno \d+\] (.*): '(.*)'", text):
    return f"{found[2]} cannot be read ({found[1]}); make it readable or name another"
  if "ambiguous type" in text:
    return "which model it is cannot be a flag; set it in a config file, by a variant for example"
  for name in _DICTS:
    if any(re.match(rf"--config\.{name}\b", arg) for arg in argv):
      return f"config.{name} is a dict, which no flag can set; set it in a config file"
  kind = "" if isinstance(error, flags.Error) else f"{type(error).__name__}: "
  see = ", and gemjax/config/ for the fields" if "config" in flags.FLAGS else ""
  return f"{kind}{text}; see --help{see}"


def _guarded(
  main: Callable[..., int | None], argv: list[str], takes_command: bool = False
) -> int | None:
  if argv[1:] and not takes_command:
    _fail(2, f"arguments must be flags, but got {argv[1:]}; write --name=value")
  try:
    return main(argv[1:]) if takes_command else main()
  except Terminated as stop:
    _fail(143, str(stop))
  except KeyboardInterrupt:
    _fail(130, "interrupted; the same command goes on, or begins anew")
  except Exception as error:
    if _is_ours(error):
      _fail(1, _sentence(error))
    if TOLD:
      traceback.print_exc()
      _end(1)
    raise


def _is_ours(error: Exception) -> bool:
  """An error raised by this project, or by the operating system about a user's file."""
  return isinstance(error, OSError) or type(error).__module__.startswith(
    ("gemjax", "pallas_kernels", "jobs")
  )


def _unraisable(found) -> None:
  """TensorStore's threads still report to the event loop of a save or restore that has failed; and
  a SIGTERM that met a destructor, where Python drops what is raised, comes again a moment later.
  """
  if isinstance(found.exc_value, Terminated):
    again = threading.Timer(0.01, os.kill, (os.getpid(), signal.SIGTERM))
    again.daemon = True  # A binary that has done all by then ends as ever.
    again.start()
  elif str(found.exc_value) != "Event loop is closed":
    sys.__unraisablehook__(found)


def _sentence(error: Exception) -> str:
  if isinstance(error, OSError) and error.strerror and error.filename:
    return f"{error.filename} cannot be used ({error.strerror}); mend that or name another"
  lines = [line.strip() for line in str(error).splitlines()]
  if any(line.endswith("Traceback (most recent call last):") for line in lines):
    # How config_flags tells what a config file raised: where, and in the last line what.
    where = next((line for line in reversed(lines) if line.startswith("File ")), "a config file")
    kind, _, told = [line for line in lines if line][-1].partition(": ")
    return told if kind.endswith(".ConfigError") else f"{where}: {kind}: {told}"
  return " ".join(" ".join(lines).split()) or type(error).__name__


def _fail(code: int, message: str) -> None:
  print(f"error: {message}", file=sys.stderr, flush=True)
  _end(code)


def _end(code: int) -> None:
  if TOLD:
    sys.stdout.flush()
    for peers in TOLD:
      peers.leave()
    os._exit(code)
  sys.exit(code)
