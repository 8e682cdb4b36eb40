"""labkit._files: whole or not there, readable by others, replaced also where the system renames over nothing; locks."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from labkit import _files, paths

posix = pytest.mark.skipif(os.name == "nt", reason="Windows has no permission bits")


@pytest.fixture
def umask():
    """Set the umask for one test."""
    before = os.umask(0o022)
    yield os.umask
    os.umask(before)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o777


@posix
@pytest.mark.parametrize("mask, file, folder", [(0o022, 0o644, 0o755), (0o002, 0o664, 0o775), (0o077, 0o600, 0o700)])
def test_permissions_are_what_the_umask_leaves(tmp_path, umask, mask, file, folder):
    umask(mask)
    _files.write_text(tmp_path / "text", "x")
    with _files.whole_folder(tmp_path / "folder") as part:
        (part / "inside").write_text("x")
    with _files.alone(tmp_path / "text"):
        pass
    assert mode(tmp_path / "text") == mode(tmp_path / "folder" / "inside") == file
    assert mode(tmp_path / "folder") == folder
    assert mode(tmp_path / ".text.lock") & 0o077 & mask == 0


@posix
def test_a_model_that_is_saved_can_be_read_by_others(tmp_path, umask, tiny_lm):
    umask(0o022)
    folder = tiny_lm.save(tmp_path / "model")
    assert mode(folder) == 0o755 and {mode(p) for p in folder.iterdir()} == {0o644}


def test_text_is_utf8_with_unix_line_ends(tmp_path):
    _files.write_text(tmp_path / "deep" / "text", "µ → ₂\n")
    assert (tmp_path / "deep" / "text").read_bytes() == "µ → ₂\n".encode()


@pytest.mark.parametrize("error", [OSError("No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("make", [_files.whole_file, _files.whole_folder])
def test_what_is_interrupted_leaves_what_was_there(tmp_path, make, error):
    target = tmp_path / "target"
    with make(target) as part:
        ((part / "old") if part.is_dir() else part).write_text("old")
    before = sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*"))
    with pytest.raises(type(error)), make(target) as part:
        ((part / "new") if part.is_dir() else part).write_text("new")
        raise error
    assert sorted(p.relative_to(tmp_path) for p in tmp_path.rglob("*")) == before


@pytest.fixture
def windows(monkeypatch):
    """Renaming as Windows does it: never over a folder, not even an empty one; os.replace over files alone."""
    rename = os.rename

    def refuse_existing(source, target):
        if os.path.lexists(target):
            raise FileExistsError(17, "Cannot create a file when that file already exists", str(target))
        rename(source, target)

    def replace(source, target):
        if os.path.isdir(target):
            raise PermissionError(13, "Access is denied", str(target))
        if os.path.lexists(target):
            os.unlink(target)
        rename(source, target)

    monkeypatch.setattr(os, "rename", refuse_existing)
    monkeypatch.setattr(os, "replace", replace)


@pytest.mark.parametrize("content", ["full", "empty", "none"])
def test_a_folder_is_replaced_as_on_windows(tmp_path, windows, content):
    target = tmp_path / "target"
    if content != "none":
        target.mkdir()
    if content == "full":
        (target / "old").write_text("old")
    with _files.whole_folder(target) as part:
        (part / "new").write_text("new")
    assert [p.name for p in target.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [target]


def test_saving_and_exporting_take_an_empty_folder_as_on_windows(tmp_path, windows, tiny_lm):
    (tmp_path / "model").mkdir()
    assert (tiny_lm.save(tmp_path / "model") / "model.safetensors").is_file()


def test_the_old_folder_comes_back_when_the_new_one_cannot_be_moved(tmp_path, monkeypatch):
    target, made = tmp_path / "target", tmp_path / "made"
    for folder in (target, made):
        folder.mkdir()
        (folder / folder.name).touch()
    rename, calls = os.rename, []

    def second_fails(source, to):
        calls.append(to)
        if len(calls) == 2:
            raise PermissionError(13, "a virus scanner is reading it")
        rename(source, to)

    monkeypatch.setattr(os, "rename", second_fails)
    with pytest.raises(PermissionError):
        _files.replace_folder(made, target)
    assert [p.name for p in target.iterdir()] == ["target"] and len(calls) == 3


def test_writers_at_once_leave_one_whole_file(tmp_path):
    target = tmp_path / "file"
    texts = [str(n) * 100_000 for n in range(8)]
    threads = [threading.Thread(target=_files.write_text, args=(target, text)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert target.read_text() in texts and list(tmp_path.iterdir()) == [target]


def test_set_aside_keeps_everything_under_a_name_of_its_own(tmp_path):
    names = set()
    for n in range(3):
        (tmp_path / "model").mkdir()
        (tmp_path / "model" / str(n)).touch()
        names.add(_files.set_aside(tmp_path / "model", "damaged").name)
    assert len(names) == 3 and all(name.startswith("model.damaged-") for name in names)
    assert not (tmp_path / "model").exists() and {p.name for p in tmp_path.rglob("?")} == {"0", "1", "2"}


def test_a_lock_is_held_by_one_process_and_dropped_when_it_is_killed(tmp_path, capfd):
    root = Path(_files.__file__).resolve().parent
    code = (
        f"import sys; sys.path.insert(0, {str(root)!r}); import _files, pathlib, time\n"
        f"with _files.alone(pathlib.Path({str(tmp_path / 'thing')!r})):\n    print('held', flush=True)\n    time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    assert holder.stdout.readline().strip() == b"held"
    got = threading.Event()

    def wait():
        with _files.alone(tmp_path / "thing", "waiting for another process"):
            got.set()

    waiter = threading.Thread(target=wait)
    waiter.start()
    assert not got.wait(0.5)
    holder.kill()
    holder.wait()
    assert got.wait(10)
    waiter.join()
    assert "waiting for another process" in capfd.readouterr().err


# ---- a class's cache


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "shared"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "home"))
    paths._temporary.cache_clear()
    yield tmp_path
    paths._temporary.cache_clear()


def read_only(monkeypatch, *folders):
    """Root may write anywhere, so the refusal is imitated."""
    real = paths.tempfile.TemporaryFile

    def refuse(dir, **kwargs):
        if dir in folders:
            raise PermissionError(13, "Permission denied", str(dir))
        return real(dir=dir, **kwargs)

    monkeypatch.setattr(paths.tempfile, "TemporaryFile", refuse)


def test_own_files_go_to_the_cache_where_it_can_be_written_to(home):
    assert paths.own() == paths.cache() == home / "shared"
    assert not (home / "home").exists()


def test_own_files_go_home_beside_a_class_cache(home, monkeypatch):
    read_only(monkeypatch, home / "shared")
    assert paths.cache() == home / "shared" and paths.own() == home / "home" / "labkit"
    read_only(monkeypatch, home / "shared", home / "home" / "labkit")
    last = paths.own()
    assert last == paths.own() and os.access(last, os.W_OK) and last.name.startswith("labkit-")


def test_the_store_of_a_student_is_not_in_the_class_cache(home, monkeypatch):
    from labkit.results import Store

    read_only(monkeypatch, home / "shared")
    assert Store().path == home / "home" / "labkit" / "results.sqlite"


# The interpreter and the packages may lie where only root can look: all is imported first, then the rights are dropped.
AS_NOBODY = """
import os, labkit
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM
from labkit import embedded, paths
from labkit.results import Store
labkit.load()
os.setgroups([])
os.setgid(65534)
os.setuid(65534)
try:
    open(paths.cache() / "x", "w", encoding="utf-8")
    raise SystemExit("the cache can be written to")
except PermissionError:
    pass
print(labkit.load().fingerprint, paths.own(), Store().path)
"""


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() != 0, reason="needs root, to become somebody else")
@pytest.mark.model
def test_another_user_loads_the_model_from_a_folder_that_is_not_theirs(lm):
    """For real: a process without rights loads from the cache of root and writes nothing there."""
    import shutil
    import tempfile

    from labkit import embedded

    with tempfile.TemporaryDirectory() as name:  # not below pytest's own folder, which is its user's alone
        top, shared, student = Path(name), Path(name, "shared"), Path(name, "student")
        top.chmod(0o755)
        shutil.copytree(embedded.place(), shared / embedded.place().name, copy_function=os.link)
        student.mkdir()
        student.chmod(0o777)
        before = sorted(p.name for p in shared.rglob("*"))
        env = os.environ | {"LABKIT_CACHE": str(shared), "XDG_CACHE_HOME": str(student), "HOME": str(student)}
        done = subprocess.run([sys.executable, "-c", AS_NOBODY], env=env, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-2000:]
        fingerprint, own, store = done.stdout.splitlines()[-1].split()
        assert fingerprint == lm.fingerprint
        assert Path(own) == student / "labkit" and Path(store).parent == Path(own)
        assert sorted(p.name for p in shared.rglob("*")) == before
