"""Downloads against a server on 127.0.0.1: what is wrong leaves nothing."""

import dataclasses
import hashlib
import http.server
import io
import os
import pathlib
import subprocess
import sys
import threading
import zipfile

import pytest

from gemjax.data import download as module
from gemjax.data.download import ARCHIVES, DownloadError, download

ROOT = pathlib.Path(__file__).parents[2]
LINES = b"1\t2\t3\t4\n" * 50_000


def zipped(**files):
  data = io.BytesIO()
  with zipfile.ZipFile(data, "w") as archive:  # Stored, so that half of it is still long.
    for name, content in files.items():
      archive.writestr(name.replace("__", "/"), content)
  return data.getvalue()


GOOD = zipped(**{"ml-100k__u.data": LINES, "ml-100k__README": b"hello"})


class Handler(http.server.BaseHTTPRequestHandler):
  def do_GET(self):
    self.server.asked.append(self.path)
    status, body, length = self.server.answer
    self.send_response(status)
    self.send_header("Content-Length", str(len(body) if length is None else length))
    self.end_headers()
    self.wfile.write(body)
    self.close_connection = True

  def log_message(self, *args):
    pass


@pytest.fixture
def server(monkeypatch):
  """A server that gives `answer` = (status, body, announced length) to every request."""
  known = dataclasses.replace(
    ARCHIVES["movielens-100k"], size=len(GOOD), md5=hashlib.md5(GOOD).hexdigest()
  )
  monkeypatch.setitem(module.ARCHIVES, "movielens-100k", known)
  with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as running:
    running.answer, running.asked = (200, GOOD, None), []
    running.base = f"http://127.0.0.1:{running.server_port}/some/where"
    thread = threading.Thread(target=running.serve_forever, args=(0.01,))
    thread.start()
    yield running
    running.shutdown()
    thread.join()


def names(folder):
  return sorted(str(p.relative_to(folder)) for p in folder.rglob("*"))


def fails(server, folder, words):
  with pytest.raises(DownloadError) as caught:
    download("movielens-100k", folder, base=server.base, timeout=5)
  assert words in str(caught.value) and "\n" not in str(caught.value), caught.value
  assert names(folder) == []


def test_a_good_file_arrives_whole_and_once(server, tmp_path):
  folder = tmp_path / "new" / "raw"
  for _ in range(2):
    found = download("movielens-100k", folder, base=server.base + "/")
    assert found == folder / "ml-100k" / "ml-100k"
    assert (found / "u.data").read_bytes() == LINES
  assert server.asked == ["/some/where/ml-100k.zip"]
  assert [n for n in names(folder) if "partial" in n] == []


def test_wrong_size(server, tmp_path):
  server.answer = (200, GOOD + b"x", None)
  fails(server, tmp_path, f"has {len(GOOD) + 1} bytes, but {len(GOOD)} are right")


def test_wrong_checksum(server, tmp_path):
  server.answer = (200, GOOD[:-1] + b"x", None)
  fails(server, tmp_path, f"but {hashlib.md5(GOOD).hexdigest()} is right")


def test_not_found(server, tmp_path):
  server.answer = (404, b"no", None)
  fails(server, tmp_path, "answers 404 Not Found")
  with pytest.raises(DownloadError):  # A folder that it made goes, too.
    download("movielens-100k", tmp_path / "new" / "raw", base=server.base, timeout=5)
  assert names(tmp_path) == []


def test_connection_dropped_half_way(server, tmp_path):
  server.answer = (200, GOOD[: len(GOOD) // 2], len(GOOD))
  fails(server, tmp_path, f"broke off after {len(GOOD) // 2} of {len(GOOD)} bytes")
  server.answer = (200, GOOD, None)  # The next try starts afresh and succeeds.
  assert (download("movielens-100k", tmp_path, base=server.base) / "u.data").exists()


def test_nobody_answers(server, tmp_path):
  server.base = "http://127.0.0.1:9"
  fails(server, tmp_path, "cannot be reached")
  server.base = "not an address"
  fails(server, tmp_path, "not an address")


def test_an_archive_put_there_by_hand_is_used_and_kept(server, tmp_path):
  (tmp_path / "ml-100k.zip").write_bytes(GOOD)
  assert (download("movielens-100k", tmp_path, base=server.base) / "u.data").exists()
  assert (tmp_path / "ml-100k.zip").exists() and server.asked == []
  other = tmp_path / "other"
  other.mkdir()
  (other / "ml-100k.zip").write_bytes(GOOD[:-9])
  with pytest.raises(DownloadError, match=r"other/ml-100k.zip has .* bytes, but .* are right"):
    download("movielens-100k", other, base=server.base)
  assert names(other) == ["ml-100k.zip"]


def test_what_a_killed_download_left_is_replaced(server, tmp_path):
  (tmp_path / "ml-100k.zip.partial").write_bytes(b"half")
  (tmp_path / "ml-100k.partial").mkdir()
  (tmp_path / "ml-100k.partial" / "old").write_bytes(b"half")
  found = download("movielens-100k", tmp_path, base=server.base)
  assert sorted(p.name for p in found.iterdir()) == ["README", "u.data"]
  assert [n for n in names(tmp_path) if "zip" in n or "partial" in n] == []


def test_members_are_verified_where_only_their_checksums_are_published(
  server, tmp_path, monkeypatch
):
  md5 = hashlib.md5(b"a,b\n").hexdigest()
  members = (("train.csv", md5),)
  monkeypatch.setitem(
    module.ARCHIVES, "frappe", dataclasses.replace(ARCHIVES["frappe"], members=members)
  )
  call = lambda: download("frappe", tmp_path, base=server.base)
  server.answer = (200, zipped(**{"train.csv": b"a,c\n"}), None)
  with pytest.raises(DownloadError, match=rf"train.csv of .*Frappe_x1.zip .* but {md5} is right"):
    call()
  assert names(tmp_path) == []
  server.answer = (200, zipped(**{"valid.csv": b"a,b\n"}), None)
  with pytest.raises(DownloadError, match=r"Frappe_x1.zip holds no train.csv"):
    call()
  server.answer = (200, b"<html>Sorry</html>", None)
  with pytest.raises(DownloadError, match=r"Frappe_x1.zip is no whole zip file"):
    call()
  assert names(tmp_path) == []
  server.answer = (200, zipped(**{"deep__train.csv": b"a,b\n"}), None)
  assert (call() / "train.csv").read_bytes() == b"a,b\n"


@pytest.mark.parametrize("dataset", ["criteo-kaggle", "criteo-1tb", "table"])
def test_no_checksum_no_download(tmp_path, dataset):
  with pytest.raises(DownloadError, match=r"no checksum of it is known; get it by hand from"):
    download(dataset, tmp_path)
  assert names(tmp_path) == []


def test_unknown_set_and_unwritable_folder(server, tmp_path):
  with pytest.raises(DownloadError, match=r"'movielens' is unknown.*'movielens-100k'"):
    download("movielens", tmp_path)
  (tmp_path / "file").write_text("kept")
  with pytest.raises(DownloadError, match=r"writing the download to .*file.* failed"):
    download("movielens-100k", tmp_path / "file", base=server.base)


def test_what_is_published_is_checked_by_the_binary(server, tmp_path):
  """The real table of addresses, another file behind them: refused by size, exit code 1."""
  command = [sys.executable, str(ROOT / "launch/prepare.py"), "--dataset=movielens-1m"]
  command += ["--download", f"--download_base={server.base}", f"--input={tmp_path / 'raw'}"]
  result = subprocess.run(
    [*command, f"--output={tmp_path / 'out'}"],
    env=os.environ | {"PYTHONPATH": str(ROOT)},
    capture_output=True,
    text=True,
    timeout=60,
  )
  assert result.returncode == 1 and "Traceback" not in result.stderr
  assert f"has {len(GOOD)} bytes, but 5917549 are right" in result.stderr
  assert server.asked == ["/some/where/ml-1m.zip"]
  assert names(tmp_path) == []


def test_every_address_is_https_and_every_archive_has_a_checksum():
  for archive in ARCHIVES.values():
    assert archive.address.startswith("https://")
    assert archive.md5 or archive.members
