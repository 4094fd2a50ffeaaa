"""Download: public sets from their publishers, checked before anything reads them."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import http.client
import os
import pathlib
import shutil
import urllib.error
import urllib.request
import zipfile
import zlib

import tqdm


class DownloadError(OSError):
  """A download that failed or brought something else than what was published."""


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class Archive:
  """A published zip: where it lies and what it must be."""

  address: str
  holds: str  # A file that lies where the data does.
  size: int = 0  # Bytes; 0 where only the checksums of the members were published.
  md5: str = ""
  members: tuple[tuple[str, str], ...] = ()  # (file, md5) after unpacking.


ARCHIVES = {
  "movielens-100k": Archive(
    address="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
    size=4_924_029,
    md5="0e33842e24a9c977be4e0107933c0723",
    holds="u.data",
  ),
  "movielens-1m": Archive(
    address="https://files.grouplens.org/datasets/movielens/ml-1m.zip",
    size=5_917_549,
    md5="c4d9eecfca2ab87c1945afe126590906",
    holds="ratings.dat",
  ),
  "frappe": Archive(  # BARS publishes the checksums of the files inside.
    address="https://zenodo.org/record/5700987/files/Frappe_x1.zip",
    holds="train.csv",
    members=(
      ("train.csv", "ba7306e6c4fc19dd2cd84f2f0596d158"),
      ("valid.csv", "88d51bf2173505436d3a8f78f2a59da8"),
      ("test.csv", "3470f6d32713dc5f7715f198ca7c612a"),
    ),
  ),
}
_BY_HAND = {
  "criteo-kaggle": "https://ailab.criteo.com/ressources/ (Kaggle Display Advertising Challenge)",
  "criteo-1tb": "https://ailab.criteo.com/download-criteo-1tb-click-logs-dataset/",
  "table": "wherever you keep it",
}


def download(
  dataset: str, folder: str | os.PathLike, *, base: str | None = None, timeout: float = 60
) -> pathlib.Path:
  """Fetches and unpacks a public set into `folder`, returns the folder that holds its files.

  What is there already is not fetched again. A file gets its name only when its size and md5 are
  right, a folder only when it is whole, so that a failed or killed download starts afresh. `base`
  replaces the publisher's address up to the file name. Raises DownloadError with one sentence.
  """
  if dataset in _BY_HAND:
    raise DownloadError(
      f"{dataset!r} cannot be downloaded, since no checksum of it is known; get it by hand from "
      f"{_BY_HAND[dataset]} and name its place by --input"
    )
  if dataset not in ARCHIVES:
    raise DownloadError(f"data set {dataset!r} is unknown; --download knows {list(ARCHIVES)}")
  archive = ARCHIVES[dataset]
  name = archive.address.rpartition("/")[2]
  unpacked = pathlib.Path(folder) / name.removesuffix(".zip")
  if not unpacked.exists():
    address = f"{base.rstrip('/')}/{name}" if base else archive.address
    made = [f for f in (unpacked.parent, *unpacked.parent.parents) if not f.exists()]
    try:
      unpacked.parent.mkdir(parents=True, exist_ok=True)
      file = unpacked.with_name(name)
      fetch = not file.exists()
      if fetch:
        _fetch(address, file, archive, timeout)
      try:
        _unpack(file, unpacked, archive)
      finally:
        if fetch:  # An archive put there by hand is not ours to remove.
          file.unlink()
    except DownloadError:
      raise
    except OSError as error:
      raise DownloadError(
        f"writing the download to {folder} failed: {error.strerror or error}; "
        "free the disk or name another --input"
      ) from error
    finally:
      with contextlib.suppress(OSError):  # Not empty: it has what was asked for.
        for folder_made in made:
          folder_made.rmdir()
  return next(p.parent for p in sorted(unpacked.rglob(archive.holds)))


def _fetch(address: str, file: pathlib.Path, archive: Archive, timeout: float) -> None:
  partial = file.with_name(file.name + ".partial")
  try:
    try:
      response = urllib.request.urlopen(address, timeout=timeout)
    except urllib.error.HTTPError as error:
      raise DownloadError(f"{address} answers {error.code} {error.reason}; {_MEND}") from error
    except (OSError, ValueError, http.client.HTTPException) as error:
      reason = getattr(error, "reason", error)
      raise DownloadError(f"{address} cannot be reached ({reason}); {_MEND}") from error
    announced = int(response.headers.get("Content-Length", 0))
    expected = archive.size or announced
    bar = tqdm.tqdm(total=expected, desc=file.name, unit="B", unit_scale=True)
    with response, bar, open(partial, "wb") as out:
      while block := _read(response, address):
        out.write(block)
        bar.update(len(block))
    if partial.stat().st_size < announced:
      raise DownloadError(
        f"{address} broke off after {partial.stat().st_size} of {announced} bytes; {_MEND}"
      )
    _check(partial, address, archive.size, archive.md5)
    partial.rename(file)
  finally:
    partial.unlink(missing_ok=True)


_MEND = "try again, or get the file by hand and name its place by --input"


def _read(response, address: str) -> bytes:
  try:
    return response.read(1 << 20)
  except (OSError, http.client.HTTPException) as error:
    raise DownloadError(f"the connection to {address} broke ({error}); {_MEND}") from error


def _check(file: pathlib.Path, name: str, size: int, md5: str) -> None:
  """Raises DownloadError if size or md5 (where known) are not those that were published."""
  if size and file.stat().st_size != size:
    raise DownloadError(f"{name} has {file.stat().st_size} bytes, but {size} are right; {_MEND}")
  with open(file, "rb") as stream:
    found = hashlib.file_digest(stream, "md5").hexdigest()
  if md5 and found != md5:
    raise DownloadError(f"{name} has md5 {found}, but {md5} is right; {_MEND}")


def _unpack(file: pathlib.Path, target: pathlib.Path, archive: Archive) -> None:
  partial = target.with_name(target.name + ".partial")
  shutil.rmtree(partial, ignore_errors=True)
  try:
    _check(file, str(file), archive.size, archive.md5)
    try:
      with zipfile.ZipFile(file) as content:
        content.extractall(partial)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError) as error:
      raise DownloadError(f"{file} is no whole zip file ({error}); {_MEND}") from error
    for name, md5 in archive.members:
      found = next(iter(partial.rglob(name)), None)
      if found is None:
        raise DownloadError(f"{file} holds no {name}; {_MEND}")
      _check(found, f"{name} of {file}", 0, md5)
    partial.rename(target)
  finally:
    shutil.rmtree(partial, ignore_errors=True)
