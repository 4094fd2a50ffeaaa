"""What cannot be converted is refused in one sentence, and nothing is left behind."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
import small
from runs import config_of, convert

ROOT = pathlib.Path(__file__).parents[2]
torch = pytest.importorskip("torch", reason="needs PyTorch: pip install -e '.[convert]'")

from fuxictr_wukong import WuKong  # noqa: E402

from gemjax.convert import ConvertError  # noqa: E402
from gemjax.convert.safetensors_file import read_safetensors  # noqa: E402


@pytest.fixture
def weights():
  model = small.get_config("fuxictr").model
  return WuKong(
    dict.fromkeys(small.DENSE, 0) | small.SIZES, shared={"seen": "item"}, dim=small.DIM,
    layers=model.layers, fmb=model.fmb_units, lcb=model.lcb_units, rank=model.rank,
    hidden=list(model.mlp), head=list(model.head), batch_norm=True,
  ).state_dict()  # fmt: skip


def refuses(tmp_path, config, *words, source="fuxictr", input=None, **options):
  """`tmp_path` has nothing more in it afterwards."""
  input, before = input or tmp_path / "x.model", sorted(tmp_path.iterdir())
  with pytest.raises(ConvertError) as caught:
    convert(source, "gemjax", input, tmp_path / "run", config=config, **options)
  for word in words:
    assert word in str(caught.value), caught.value
  assert "\n" not in str(caught.value) and sorted(tmp_path.iterdir()) == before


def test_tensors_that_do_not_fit_the_config(data, tmp_path, weights):
  config, file = config_of("fuxictr", data), tmp_path / "x.model"
  norm = "wukong_stack.1.layer_norm.weight"
  torch.save({n: t for n, t in weights.items() if n != norm}, file)
  refuses(tmp_path, config, "lacks", norm)
  torch.save(weights | {"fc.mlp.9.weight": torch.ones(2)}, file)
  refuses(tmp_path, config, "has fc.mlp.9.weight", "config has not")
  torch.save(weights | {norm: torch.ones(small.DIM + 1)}, file)
  refuses(tmp_path, config, "model.layers.0.norm.scale", "(8,)", "9")
  torch.save(weights, file)
  refuses(tmp_path, config_of("fuxictr", data, layers=4), "lacks wukong_stack.3.fmb.proj_Y")
  refuses(tmp_path, config_of("fuxictr", data, fmb_relu=False), "config.model.fmb_relu", "True")
  refuses(tmp_path, config_of("fuxictr", data, {"dense_units": 1}), "dense_units 2")
  refuses(tmp_path, config_of("gemjax", data), "config.model.fmb_relu")
  refuses(tmp_path, None, "--from=fuxictr needs --config")


def test_features_in_another_order(data, tmp_path, weights):
  first, second = (
    f"embedding_layer.embedding_layer.embedding_layers.{n}.weight" for n in small.DENSE
  )
  swapped = {second: weights[second]} | {n: t for n, t in weights.items() if n != second}
  torch.save(swapped, tmp_path / "x.model")
  refuses(
    tmp_path, config_of("fuxictr", data), f"has {second} where the data have {first}", "order"
  )


def test_files_that_are_none(data, tmp_path, weights):
  config, file = config_of("fuxictr", data), tmp_path / "x.model"
  refuses(tmp_path, config, "does not exist", "--input")
  torch.save(weights, file)
  whole = file.read_bytes()
  for size in (0, 10, len(whole) // 2, len(whole) - 30):
    file.write_bytes(whole[:size])
    refuses(tmp_path, config, str(file), "truncated")
  file.write_text("not a checkpoint")
  refuses(tmp_path, config, str(file), "no file of torch.save")
  torch.save({"weights": [print]}, file)  # What would call something when it is loaded.
  refuses(tmp_path, config, "tensors alone")
  torch.save({"step": 3}, file)
  refuses(tmp_path, config, "holds no tensors")
  folder = tmp_path / "folder"
  folder.mkdir()
  refuses(tmp_path, config, "no folder of torch.distributed.checkpoint", input=folder)


def test_files_of_safetensors_that_are_none(trained_run, tmp_path):
  file = tmp_path / "x.safetensors"
  convert("gemjax", "safetensors", trained_run, file)
  whole = file.read_bytes()
  for size in (0, 5, 1000, len(whole) - 1):
    file.write_bytes(whole[:size])
    refuses(tmp_path, None, str(file), "truncated", source="safetensors", input=file)
  file.write_bytes(whole[:8] + b"[" + whole[9:])
  refuses(tmp_path, None, "corrupt", source="safetensors", input=file)
  save_file = pytest.importorskip("safetensors.numpy").save_file
  save_file({"a": np.ones(3)}, file)
  refuses(tmp_path, None, "nothing of a config", source="safetensors", input=file)


def headed(file, header, data=b""):
  head = json.dumps(header).encode()
  file.write_bytes(len(head).to_bytes(8, "little") + head + data)


def test_headers_of_safetensors_that_say_other_things(tmp_path):
  file, refused = tmp_path / "x.safetensors", {"source": "safetensors"}
  for metadata in (None, {}, {"gemjax": 5}, {"gemjax": "[]"}, {"gemjax": "{}"}, {"gemjax": None}):
    headed(file, {"__metadata__": metadata})
    refuses(tmp_path, None, str(file), "nothing of a config", input=file, **refused)
  headed(file, {"__metadata__": ["gemjax"]})
  refuses(tmp_path, None, str(file), "corrupt", "__metadata__", input=file, **refused)
  headed(file, {"a": {"dtype": "F8_E8M0", "shape": [2], "data_offsets": [0, 2]}}, b"ab")
  refuses(tmp_path, None, "a is F8_E8M0, but only F64, F32", input=file, **refused)


@pytest.mark.parametrize("kind", ["float8_e4m3fn", "float8_e5m2"])
def test_float8_of_safetensors_is_read(tmp_path, kind):
  """Every of its 256 numbers as PyTorch has it."""
  save_file = pytest.importorskip("safetensors.torch").save_file
  every = torch.arange(256, dtype=torch.uint8).view(getattr(torch, kind)).reshape(16, 16)
  save_file({"a": every}, tmp_path / "x.safetensors")
  found = read_safetensors(tmp_path / "x.safetensors")[0]["a"].whole().astype(np.float32)
  np.testing.assert_array_equal(found, every.float().numpy())


@pytest.mark.parametrize("dtype", ["int8", "uint8", "float64", "float8_e4m3fn", "foo", "Float32"])
def test_other_types_than_those_of_files(trained_run, tmp_path, dtype):
  file = tmp_path / "x.safetensors"
  with pytest.raises(ConvertError) as caught:
    convert("gemjax", "safetensors", trained_run, file, dtype=dtype)
  want = f"--dtype={dtype}, but must be one of float32, bfloat16, float16"
  assert str(caught.value) == want and not list(tmp_path.iterdir())


def test_an_output_in_no_folder(trained_run, tmp_path):
  with pytest.raises(ConvertError, match=r"absent/x.safetensors lies in no folder; make"):
    convert("gemjax", "safetensors", trained_run, tmp_path / "absent" / "x.safetensors")
  assert not list(tmp_path.iterdir())


def test_a_run_whose_files_changed(trained_run, tmp_path):
  """Named by its file; and an output that exists stays as it is."""
  import shutil

  run = shutil.copytree(trained_run, tmp_path / "copy")
  (large,) = sorted(run.rglob("checkpoints/*/state/ocdbt.process_0/d/*"),
                    key=lambda f: f.stat().st_size)[-1:]  # fmt: skip
  content = bytearray(large.read_bytes())
  content[len(content) // 2] ^= 1
  large.write_bytes(content)
  with pytest.raises(Exception, match=f"{large.name} is corrupt") as caught:
    convert("gemjax", "safetensors", run, tmp_path / "x.safetensors")
  assert type(caught.value).__name__ == "CheckpointError"
  (tmp_path / "x.safetensors").write_text("mine")
  with pytest.raises(ConvertError, match=r"x.safetensors exists; name another --output"):
    convert("gemjax", "safetensors", trained_run, tmp_path / "x.safetensors")
  assert (tmp_path / "x.safetensors").read_text() == "mine"


def test_a_dry_run_writes_nothing(trained_run, tmp_path):
  lines = convert("gemjax", "safetensors", trained_run, tmp_path / "x.safetensors", dry_run=True)
  assert any(line.startswith("model.layers.1.fm.y_NK") and "copied" in line for line in lines)
  assert not list(tmp_path.iterdir())


def test_a_full_disk_leaves_nothing(trained_run, tmp_path):
  """Writing a file, and writing a run, of which TensorStore writes a part; then both work."""
  import resource

  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  file, run = tmp_path / "x.safetensors", tmp_path / "run"
  (tmp_path / "x.partial.safetensors").write_text("of a conversion that was killed")
  for source, target, input, output in (
    ("gemjax", "safetensors", trained_run, file),
    ("safetensors", "gemjax", file, run),
  ):
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
      with pytest.raises(OSError):
        convert(source, target, input, output)
    finally:
      resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert sorted(tmp_path.iterdir()) == ([file] if source == "safetensors" else [])
    convert(source, target, input, output, verify=True)


def command(tmp_path, *flags):
  return subprocess.run(
    [sys.executable, ROOT / "launch" / "convert_checkpoint.py", *flags], cwd=tmp_path, text=True,
    capture_output=True, timeout=300, env=os.environ | {"PYTHONPATH": str(ROOT)},
  )  # fmt: skip


def test_the_binary_converts_and_refuses(data, tmp_path, weights):
  """In processes of their own: a sentence and an exit code, no traceback."""
  torch.save(weights, tmp_path / "x.model")
  flags = ["--from=fuxictr", "--to=gemjax", "--input=x.model", "--output=run", "--verify",
           f"--config={small.__file__}:fuxictr", f"--config.data.path={data}"]  # fmt: skip
  done = command(tmp_path, *flags)
  assert done.returncode == 0, done.stderr
  assert "verified" in done.stdout and (tmp_path / "run" / "run.json").is_file()
  for wrong, words in (
    (flags, "run exists"),
    ([*flags, "--output=x", "--from=fuxi"], "--from=fuxi, but must be one of gemjax"),
  ):
    done = command(tmp_path, *wrong)
    assert done.returncode == 1 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: ") and words in done.stderr, done.stderr
  assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "x.model"]
