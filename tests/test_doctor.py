"""labkit doctor: every failure is simulated and has to be named, with what to do, as a problem or only as a note."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import shutil
import subprocess
import sys
import threading
import types
from collections import Counter
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

import pytest
import torch

from labkit import assets, cli, doctor, embedded, install, paths
from labkit.results import Store, StoreError

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("LABKIT_CACHE", str(folder))
    return folder


@pytest.fixture
def without(monkeypatch):
    """``without[name] = None``: that package is not installed; a version in place of None: it is that version."""
    faked: dict[str, str | None] = {}
    version, spec = doctor.version, importlib.util.find_spec
    monkeypatch.setattr(doctor, "version", lambda name: faked.get(name, version(name)))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *a: None if name in faked else spec(name, *a))
    return faked


def line(check, what: str | None = None) -> doctor.Line:
    """The line called ``what`` of a check, or its only one."""
    lines = [found for found in check() if what in (None, found.what)]
    assert len(lines) == 1, lines
    return lines[0]


# ---- the report


@pytest.mark.model
def test_the_command_for_real(tmp_path):
    """This environment has everything that `make test` sets up; without a network nothing but the hub is missing."""
    command = [sys.executable, "-m", "labkit", "doctor"]
    done = subprocess.run(
        command,
        env=os.environ | {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Everything that labkit needs is here" in done.stdout
    assert f"{embedded.NAME} loads" in done.stdout and "packed weights of 2, 4, 8 bits" in done.stdout
    hub = next(found for found in done.stdout.splitlines() if found.startswith("note     hub"))
    assert "127.0.0.1:9 does not answer" in hub
    assert not list(tmp_path.iterdir())


def test_it_runs_where_torch_is_what_is_missing(tmp_path):
    """As a file, for `import labkit` needs torch. It says so, gives the command, and looks at the rest."""
    (tmp_path / "torch.py").write_text("raise ImportError('no torch here')")
    done = subprocess.run(
        [sys.executable, ROOT / "labkit" / "doctor.py", "--no-network"],
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 1, done.stderr
    assert "no torch here" in done.stdout and "memory" in done.stdout and not done.stderr
    assert "To be put right: device" in done.stdout


def test_the_exit_code_and_the_flag(monkeypatch, capsys):
    asked = []
    bad = doctor.Line("model", doctor.PROBLEM, "it is not fetched", "labkit fetch")
    monkeypatch.setattr(doctor, "CHECKS", {"model": lambda: [bad], "hub": lambda: asked.append(1) or []})
    assert cli.main(["doctor", "--no-network"]) == 1 and not asked
    said = capsys.readouterr().out
    assert "-> labkit fetch" in said and "To be put right: model." in said
    monkeypatch.setattr(doctor, "CHECKS", {"hub": lambda: asked.append(1) or []})
    assert cli.main(["doctor"]) == 0 and asked


def test_a_check_that_breaks_is_a_problem_and_the_others_go_on(monkeypatch):
    def broken():
        raise RuntimeError("the floor\nis wet")

    fine = doctor.Line("memory", doctor.OK, "plenty")
    monkeypatch.setattr(doctor, "CHECKS", {"device": broken, "memory": lambda: [fine]})
    found = doctor.report()
    assert not found.ok and found.lines[1] == fine
    assert found.lines[0].status == doctor.PROBLEM and "RuntimeError: the floor is wet" in found.lines[0].found


def test_notes_are_no_failure_and_are_counted():
    lines = [doctor.Line("hub", doctor.NOTE, "asleep"), doctor.Line("browser", doctor.NOTE, "none")]
    assert doctor.Report(tuple(lines)).ok
    assert doctor.Report(tuple(lines)).verdict.endswith("(2 notes).")
    assert doctor.Report(tuple(lines[:1])).verdict.endswith("(1 note).")
    assert doctor.Report(()).verdict.endswith("here.")


def test_a_command_to_copy_is_never_wrapped_and_html_is_escaped():
    command = "pip install " + " ".join(f'"package{i}>=1.0"' for i in range(30))
    found = doctor.Report((doctor.Line("<b>", doctor.PROBLEM, "a < b & " + "word " * 60, command),))
    lines = str(found).splitlines()
    assert any(text.endswith(command) for text in lines) and max(len(t) for t in lines if "->" not in t) <= 120
    page = found._repr_html_()
    assert "&lt;b&gt;</td>" in page and "a &lt; b &amp; word" in page and "<b></td>" not in page
    assert "problem" in page and "&quot;package0&gt;=1.0&quot;" in page


# ---- Python and packages


def test_the_bounds_are_those_of_pyproject():
    needed = doctor.needed()
    assert {"core", "kernels", "lab", "test"} <= needed.keys()
    assert {"torch", "transformers", "numpy"} <= {r.name for r in needed["core"]}
    assert all(str(r.specifier).startswith(">=") for group in needed.values() for r in group)
    assert not any(r.name.startswith("labkit") for group in needed.values() for r in group)


def test_an_installed_labkit_tells_the_same_bounds(monkeypatch):
    """Without a pyproject.toml the bounds come from the installed metadata."""
    listed = {group: {str(r) for r in found} for group, found in doctor.needed().items()}
    monkeypatch.setattr(install, "__file__", str(Path(os.devnull).parent / "site-packages" / "labkit" / "install.py"))
    lines = []
    for group, found in listed.items():
        for text in found:
            base, _, marker = text.partition("; ")
            extra = f"extra == '{group}'" if group != "core" else ""
            marker = " and ".join(filter(None, [marker, extra]))
            lines.append(f"{base}; {marker}" if marker else base)
    about = type("About", (), {"get_all": lambda self, name: lines, "__getitem__": lambda self, name: ">=3.10"})()
    monkeypatch.setattr(importlib.metadata, "metadata", {install.DISTRIBUTION: about}.get)
    found = doctor.needed()
    assert {group: {r.name for r in requirements} for group, requirements in found.items()} == {
        group: {r.split(">")[0] for r in requirements} for group, requirements in listed.items()
    }


def test_a_missing_core_package_is_a_problem_with_its_command(without):
    without |= {"tqdm": None, "numpy": "1.20.0"}
    found = line(doctor.packages, "packages")
    assert found.status == doctor.PROBLEM
    assert "tqdm is missing" in found.found and "numpy 1.20.0 is too old (needed: >=1.26)" in found.found
    assert '-m pip install "tqdm>=' in found.todo and '"numpy>=1.26"' in found.todo and "torch" not in found.todo


def test_a_missing_extra_is_a_note_an_old_one_a_problem(without):
    without["papermill"] = None
    found = line(doctor.packages, "packages [lab]")
    assert found.status == doctor.NOTE and '"papermill>=' in found.todo
    without["papermill"] = "1.0"
    assert line(doctor.packages, "packages [lab]").status == doctor.PROBLEM


@pytest.mark.parametrize(
    ("have", "status"),
    [("3.9.18", doctor.PROBLEM), ("3.10.4", doctor.NOTE), ("3.11.7", doctor.OK), ("3.14.0rc1", doctor.OK)],
)
def test_pythons(monkeypatch, have, status):
    monkeypatch.setattr(doctor.platform, "python_version", lambda: have)
    found = line(doctor.python)
    assert found.status == status and have in found.found


# ---- the machine


def gpu(monkeypatch, ones):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A GPU")
    monkeypatch.setattr(torch, "ones", ones)


def test_a_gpu_that_works(monkeypatch):
    ones = torch.ones
    gpu(monkeypatch, lambda n, device: ones(n))
    found = line(doctor.device)
    assert found.status == doctor.OK and "A GPU" in found.found


def test_a_gpu_whose_kernels_fail(monkeypatch):
    def fail(n, device):
        raise RuntimeError("CUDA error: no kernel image\nis available")

    gpu(monkeypatch, fail)
    found = line(doctor.device)
    assert found.status == doctor.PROBLEM and "no kernel image is available" in found.found and found.todo


@pytest.mark.parametrize("cuda", [None, "12.4"])
def test_a_gpu_that_this_torch_cannot_use(monkeypatch, cuda):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", cuda)
    monkeypatch.setattr(doctor.shutil, "which", lambda name: "/bin/" + name)
    found = line(doctor.device)
    assert found.status == doctor.NOTE and ("has no CUDA" if cuda is None else "CUDA 12.4") in found.found


@pytest.mark.parametrize(
    ("value", "status"),
    [
        ("2", doctor.OK),
        ("4", doctor.OK),
        ("5", doctor.NOTE),
        ("64", doctor.NOTE),
        ("2,1", doctor.OK),
        ("many", doctor.NOTE),
        ("0", doctor.NOTE),
        ("", doctor.NOTE),
    ],
)
@pytest.mark.parametrize("name", doctor.THREADS)
def test_thread_settings(monkeypatch, name, value, status):
    for other in doctor.THREADS:
        monkeypatch.delenv(other, raising=False)
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    monkeypatch.setattr(doctor, "share", lambda: None)
    monkeypatch.setenv(name, value)
    found = line(doctor.processor, "threads")
    assert found.status == status and f"{name}=" in found.found
    assert (f"unset {name}" in found.todo) == (status == doctor.NOTE)


@pytest.mark.parametrize(("limit", "status"), [(None, doctor.OK), (4.0, doctor.OK), (1.5, doctor.NOTE)])
def test_a_container_with_less_than_its_cores(monkeypatch, limit, status):
    monkeypatch.setattr(doctor, "cores", lambda: 4)
    monkeypatch.setattr(doctor, "share", lambda: limit)
    found = line(doctor.processor, "cores")
    assert found.status == status
    if status == doctor.NOTE:
        assert "1.5" in found.found and "OMP_NUM_THREADS=1" in found.todo


@pytest.mark.parametrize(
    ("files", "expected"),
    [
        ({"cpu.max": "150000 100000\n"}, 1.5),
        ({"cpu.max": "max 100000\n"}, None),
        ({"cpu/cpu.cfs_quota_us": "200000\n", "cpu/cpu.cfs_period_us": "100000\n"}, 2.0),
        ({"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, None),
        ({}, None),
        ({"cpu.max": "rubbish"}, None),
    ],
)
def test_the_limit_of_a_container_is_read(monkeypatch, tmp_path, files, expected):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(doctor, "Path", lambda path: tmp_path / str(path).removeprefix("/sys/fs/cgroup/"))
    assert doctor.share() == expected


@pytest.mark.parametrize(
    ("free", "status"), [(0.9e9, doctor.PROBLEM), (1.5e9, doctor.NOTE), (2.5e9, doctor.OK), (None, doctor.NOTE)]
)
def test_memory(monkeypatch, free, status):
    monkeypatch.setattr(doctor, "available", lambda: free and (free, 8e9))
    found = line(doctor.memory)
    assert found.status == status and bool(found.todo) == (status != doctor.OK)


def test_memory_is_really_read():
    free, total = doctor.available()
    assert 0 < free <= total and total > 1e8


# ---- labkit's own files


def disk_with(monkeypatch, free):
    monkeypatch.setattr(doctor.shutil, "disk_usage", lambda path: types.SimpleNamespace(free=free))


def test_a_full_disk_is_a_problem_only_before_the_model_is_there(cache, monkeypatch):
    disk_with(monkeypatch, 5e8)
    found = line(doctor.disk)
    assert found.status == doctor.PROBLEM and "0.5 GB free" in found.found and "LABKIT_CACHE" in found.todo
    monkeypatch.setattr(doctor, "_converted", lambda: cache)
    assert line(doctor.disk).status == doctor.NOTE
    disk_with(monkeypatch, 5e9)
    assert line(doctor.disk).status == doctor.OK


def test_a_cache_that_cannot_be_made(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    found = line(doctor.disk)
    assert found.status == doctor.PROBLEM and "LABKIT_CACHE" in found.todo


def test_a_cache_that_cannot_be_written_to(cache, monkeypatch):
    def refuse(**_):
        raise PermissionError(13, "Permission denied", str(cache))

    monkeypatch.setattr(doctor.tempfile, "TemporaryFile", refuse)
    found = line(doctor.disk)
    assert found.status == doctor.PROBLEM and "Permission denied" in found.found


def test_a_model_that_is_not_fetched_and_looking_fetches_nothing(cache):
    found = line(doctor.model)
    assert (found.status, found.todo) == (doctor.PROBLEM, "labkit fetch")
    assert [p for p in cache.rglob("*") if p.is_file()] == []


def test_a_model_that_is_fetched_but_not_converted(cache):
    asset = assets.assets()[embedded.ASSET]
    asset.path.parent.mkdir(parents=True)
    with asset.path.open("wb") as file:
        file.truncate(asset.file_size)  # a hole: it takes no room on the disk
    assert line(doctor.model).status == doctor.NOTE
    with asset.path.open("wb") as file:
        file.truncate(asset.file_size // 2)
    found = line(doctor.model)
    assert found.status == doctor.PROBLEM and "is damaged" in found.found


def converted(cache: Path) -> Path:
    """A complete folder with the three files that a converted model has, all of them rubbish."""
    folder = cache / f"{embedded.NAME}-v{embedded.VERSION}"
    folder.mkdir(parents=True)
    for name in embedded.FILES:
        (folder / name).write_text("rubbish")
    embedded.seal(folder)
    return folder


def test_a_converted_model_that_is_damaged_is_told_and_left_as_it_is(cache):
    folder = converted(cache)
    found = line(doctor.model)
    assert found.status == doctor.PROBLEM and "cannot be read" in found.found and found.todo == "labkit fetch"
    assert sorted(p.name for p in folder.iterdir()) == sorted([*embedded.FILES, embedded.MADE])


def test_a_model_that_predicts_nan(cache, monkeypatch, tiny_lm):
    folder = converted(cache)
    monkeypatch.setattr("labkit.model.load", lambda path, device: tiny_lm)
    assert line(doctor.model).status == doctor.OK
    tiny_lm.model.model.layers[0].mlp.up_proj.weight[0, 0] = float("nan")
    found = line(doctor.model)
    assert found.status == doctor.PROBLEM and "NaN" in found.found and str(folder) in found.todo


# ---- the texts, and the results that come with labkit


@pytest.fixture
def data(tmp_path, monkeypatch) -> Path:
    """A copy of the shipped data, which a test may damage."""
    shutil.copytree(paths.data(), tmp_path / "data")
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    return tmp_path / "data"


def test_a_shipped_text_that_is_damaged(cache, data):
    (data / "prose" / "03_maps.md").write_text("no maps")
    found = line(doctor.texts)
    assert found.status == doctor.PROBLEM and found.found.startswith("prose in ") and "git checkout data" in found.todo


def test_texts_before_the_model_is_there(cache):
    found = line(doctor.texts)
    assert (found.status, found.todo) == (doctor.NOTE, "labkit fetch")
    assert "manual (113,108 tokens) and prose (13,938 tokens) are as shipped" in found.found
    found = line(doctor.shipped_rows)
    assert (found.status, found.todo) == (doctor.NOTE, "labkit fetch")
    assert not cache.exists() or not [p for p in cache.rglob("*") if p.is_file()], "nothing is made or fetched"


@pytest.mark.model
def test_the_texts_for_real():
    found = line(doctor.texts)
    assert found.status == doctor.OK and "the same ids as on every machine" in found.found


def test_a_tokenizer_that_splits_otherwise(cache, monkeypatch, tiny_lm):
    import transformers

    folder = converted(cache)
    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", lambda *_, **__: tiny_lm.tokenizer)
    found = line(doctor.texts)
    assert found.status == doctor.PROBLEM and "splits manual and prose into other ids" in found.found
    assert f"remove {folder}, then labkit fetch" in found.todo


@pytest.mark.parametrize(
    ("counts", "status", "says", "todo"),
    [
        ({"here": 9}, doctor.OK, "all 9 answer here", ""),
        ({"here": 7, "model": 2}, doctor.NOTE, "7 of 9 answer here; 2 are of other weights", "then labkit fetch"),
        ({"texts": 9}, doctor.NOTE, "0 of 9 answer here; 9 are on other token ids", "see the line on texts"),
        ({"calibration": 1, "labkit": 1}, doctor.NOTE, "0 of 2 answer here", "update labkit; see the line on texts"),
    ],
)
def test_how_many_shipped_results_answer_here(cache, monkeypatch, tiny_lm, counts, status, says, todo):
    converted(cache)
    monkeypatch.setattr("labkit.model.load", lambda path, **_: tiny_lm)
    monkeypatch.setattr("labkit.reproduce.serving", lambda lm: Counter(counts))
    found = line(doctor.shipped_rows)
    assert found.status == status and says in found.found and todo in found.todo


def test_rows_of_an_older_labkit_are_told(cache):
    from test_results import old_store

    old_store(cache / "results.sqlite", own=3)
    found = line(doctor.store)
    assert found.status == doctor.NOTE and "3 rows of an older labkit are kept" in found.found


def test_kernels_for_real():
    found = line(doctor.kernels)
    assert found.status == doctor.OK and "2, 4, 8 bits" in found.found


@pytest.mark.parametrize("wrong", ["fails", "is wrong", "is nan"])
def test_a_kernel_that_fails_at_one_width(monkeypatch, wrong):
    from labkit.linear import matmulnbits

    real = matmulnbits.Kernel

    def kernel(weight, **kwargs):
        if weight.bits != 2:
            return real(weight, **kwargs)
        if wrong == "fails":
            raise RuntimeError("MatMulNBits: only 4 and 8 bits\nare implemented")
        return lambda x: real(weight)(x) * (float("nan") if wrong == "is nan" else 1.5)

    monkeypatch.setattr(matmulnbits, "Kernel", kernel)
    found = line(doctor.kernels)
    assert found.status == doctor.PROBLEM and "MatMulNBits fails at 2 bits: " in found.found
    assert "4 bits:" not in found.found and "8 bits:" not in found.found
    assert "--upgrade" in found.todo and "onnxruntime" in found.todo
    monkeypatch.setattr(doctor.platform, "python_version", lambda: "3.10.12")  # whose onnxruntime has no 2 bits
    found = line(doctor.kernels)
    assert found.status == doctor.NOTE and "Python 3.11" in found.found


def test_without_onnxruntime_there_is_a_note(monkeypatch):
    from labkit.linear import matmulnbits

    monkeypatch.setattr(matmulnbits, "widths", lambda: ())
    found = line(doctor.kernels)
    assert found.status == doctor.NOTE and "onnxruntime" in found.todo


def test_the_store_opens(cache):
    found = line(doctor.store)
    assert found.status == doctor.OK and str(cache) in found.found


def test_a_broken_store_is_set_aside_and_told(cache):
    cache.mkdir()
    (cache / "results.sqlite").write_bytes(b"this was never a database" * 100)
    found = line(doctor.store)
    assert found.status == doctor.NOTE and "broken" in found.found
    assert [p for p in cache.iterdir() if ".broken-" in p.name]


def test_a_store_that_cannot_be_used(cache, monkeypatch):
    def refuse(self, **_):
        raise StoreError("The store is locked.")

    monkeypatch.setattr(Store, "rows", refuse)
    found = line(doctor.store)
    assert found.status == doctor.PROBLEM and "is locked" in found.found


# ---- notebooks, browser, hub


def test_the_widgets_for_real():
    found = line(doctor.lab)
    assert found.status == doctor.OK and all(name in found.found for name in ("jupyterlab", *doctor.WIDGETS))


@pytest.mark.parametrize("name", ["jupyterlab", "ipykernel", *doctor.WIDGETS])
def test_a_missing_part_of_the_lab_is_a_note(without, name):
    without[name] = None
    found = line(doctor.lab)
    assert found.status == doctor.NOTE and name in found.found and f'"{name}>=' in found.todo


def test_a_widget_that_cannot_be_made_is_a_problem(monkeypatch):
    import ipywidgets

    def broken():
        raise ImportError("traitlets is too old\nfor this ipywidgets")

    monkeypatch.setattr(ipywidgets, "IntSlider", broken)
    found = line(doctor.lab)
    assert found.status == doctor.PROBLEM and "too old for this" in found.found and "--force-reinstall" in found.todo


@pytest.mark.parametrize("name", doctor.CHROMIUMS)
def test_any_chromium_will_do(monkeypatch, name):
    monkeypatch.setattr(doctor.shutil, "which", lambda wanted: "/usr/bin/" + name if wanted == name else None)
    assert line(doctor.browser).status == doctor.OK


def test_without_a_chromium_or_playwright_there_is_a_note(monkeypatch, without):
    monkeypatch.setattr(doctor.shutil, "which", lambda wanted: None)
    found = line(doctor.browser)
    assert found.status == doctor.NOTE and "make browser" in found.todo
    monkeypatch.setattr(doctor.shutil, "which", lambda wanted: "/usr/bin/" + wanted)
    without["playwright"] = None
    found = line(doctor.browser)
    assert found.status == doctor.NOTE and '"playwright>=' in found.todo


def test_the_chromiums_are_those_of_the_makefile():
    makefile = ROOT / "Makefile"
    if not makefile.exists():
        pytest.skip("needs a checkout")
    assert f"for b in {' '.join(doctor.CHROMIUMS)};" in makefile.read_text()


@pytest.fixture
def site(monkeypatch):
    """A hub on this machine that answers every request with ``site.status``."""
    from huggingface_hub import constants

    class Answer(BaseHTTPRequestHandler):
        def do_HEAD(self):
            server.wait.wait(120)
            self.send_response(server.status)
            self.end_headers()

        def log_message(self, *args):
            pass

    server = HTTPServer(("127.0.0.1", 0), Answer)
    server.status, server.wait = 200, threading.Event()
    server.wait.set()
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    yield server
    server.wait.set()
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize(("status", "expected"), [(200, doctor.OK), (403, doctor.NOTE), (502, doctor.NOTE)])
def test_a_hub_that_answers(site, status, expected):
    site.status = status
    found = line(doctor.hub)
    assert found.status == expected
    assert expected == doctor.OK or f"answers {status}" in found.found


def test_a_hub_that_is_silent_costs_little_and_is_only_a_note(site, monkeypatch):
    monkeypatch.setattr(doctor, "PATIENCE", 0.2)
    site.wait.clear()
    found = line(doctor.hub)
    assert not site.wait.is_set(), "it has not waited for the answer, which never came"
    assert found.status == doctor.NOTE and "does not answer" in found.found and "need no network" in found.found


def test_offline_by_choice(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    found = line(doctor.hub)
    assert found.status == doctor.NOTE and "HF_HUB_OFFLINE" in found.found
