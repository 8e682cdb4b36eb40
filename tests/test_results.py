"""The store: nothing acknowledged is lost, nothing foreign is overwritten, one clear error where it cannot work."""

import dataclasses
import json
import math
import os
import random
import select
import signal
import sqlite3
import statistics
import tempfile
import threading
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from labkit import paths, results
from labkit.measure.measurement import Latency, Measurement, Memory, Quality
from labkit.method import Method, Recipe, knob
from labkit.results import Key, Store, StoreError

posix = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and kill")


@dataclass(frozen=True)
class Round(Method):
    """Rounds."""

    bits: int = knob(4, 2, 8)


@dataclass(frozen=True)
class Fit(Method):
    """Rounds, with calibration."""

    calibrated: ClassVar[bool] = True
    bits: int = knob(4, 2, 8)


@pytest.fixture(autouse=True)
def shipped(tmp_path, monkeypatch):
    """An empty shipped results folder, which a test may fill."""
    folder = tmp_path / "data" / "results"
    folder.mkdir(parents=True)
    monkeypatch.setattr(paths, "data", lambda: tmp_path / "data")
    return folder


@pytest.fixture
def path(tmp_path):
    return tmp_path / "cache" / "results.sqlite"


@pytest.fixture
def store(path):
    return Store(path)


def key(n=0, **change) -> Key:
    plain = Key(
        "tiny@0123", '{"manual": "ab"}', "Round", json.dumps({"bits": n}), "", results.machine(), results.versions()
    )
    return dataclasses.replace(plain, **change)


def measurement(n=0, latency=True) -> Measurement:
    manual = Quality(10.5 + n, 0.5, 4096, 0.25, 0.01, 0.875, 0.002, per_window={"kl": [0.2, 0.3]})
    quality = {"manual": manual, "prose": Quality(20.0, 1.0, 4096)}
    speed = Latency(100.0, 2.0, 512, 8.5, 0.5, 2, None, 2.5) if latency else None
    return Measurement(
        "tiny",
        f"Round(bits={n})",
        quality,
        Memory(1000 + n, 800, 4.5, 96_000, 1000),
        speed,
        "cpu",
        texts={"manual": "ab"},
    )


def asides(path) -> list[Path]:
    return sorted(
        p for p in path.parent.glob(path.name + ".broken-*") if not p.name.endswith(("-wal", "-shm", "-journal"))
    )


def intact(path) -> bool:
    con = sqlite3.connect(path)
    try:
        return con.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
    finally:
        con.close()


# ---- rows


def test_a_measurement_comes_back_equal(store, path):
    assert store.get(key()) is None and store.find(key()) is None
    store.put(key(), measurement())
    assert store.get(key()) == measurement()
    assert Store(path).get(key()) == measurement(), "and from another Store"
    store.put(key(), measurement(latency=False))
    assert store.get(key()) == measurement(latency=False) and len(store.rows()) == 1, "the same key is the same row"


@pytest.mark.parametrize("column", results.KEY)
def test_every_column_of_the_key_counts(store, column):
    store.put(key(), measurement())
    assert store.get(key(**{column: "other"})) is None


def test_find_prefers_this_machine_then_the_newest_elsewhere(store):
    store.put(key(machine="A", versions="1"), measurement(1))
    store.put(key(machine="B", versions="2"), measurement(2))
    found = store.find(key())
    assert found.measurement == measurement(2) and not found.here and not found.shipped and found.key.machine == "B"
    store.put(key(machine="A", versions="1"), measurement(3))
    assert store.find(key()).measurement == measurement(3)
    store.put(key(), measurement(4))
    store.put(key(machine="B", versions="2"), measurement(5))
    assert store.find(key()).here and store.find(key()).measurement == measurement(4), "the exact row beats a newer one"
    for column in results.KEY[:5]:
        assert store.find(key(**{column: "other"})) is None


def test_find_prefers_a_row_with_times_to_a_newer_one_without(store):
    store.put(key(machine="A"), measurement(1))
    store.put(key(machine="B"), measurement(2, latency=False))
    assert store.find(key()).measurement == measurement(1)
    store.put(key(), measurement(3, latency=False))
    assert store.find(key()).measurement == measurement(3, latency=False), "this machine's own row comes first"


def test_a_bad_measurement_is_refused_by_name_not_stored(store):
    for bad in ({"weights": 1.5}, {"weights": "much"}, {"peak": True}, {"bits_per_weight": None}):
        m = dataclasses.replace(measurement(), memory=dataclasses.replace(measurement().memory, **bad))
        with pytest.raises(ValueError, match=f"measurement.memory.{next(iter(bad))} = "):
            store.put(key(), m)
    with pytest.raises(ValueError, match="key.knobs = 3"):
        key(knobs=3)
    assert store.rows() == []


def test_perplexity_may_be_infinite(store):
    m = measurement(math.inf)
    m = dataclasses.replace(m, memory=measurement().memory)
    store.put(key(), m)
    assert store.get(key()).quality["manual"].perplexity == math.inf


def test_a_row_with_another_versions_fields_counts_as_absent(store, path):
    store.put(key(), measurement())
    store.put(key(versions="older"), measurement(1))
    con = sqlite3.connect(path, isolation_level=None)
    for garbage in ('{"model": "x"}', "[]", "null", "{", '{"quality": 1}'):
        con.execute("UPDATE results SET measurement = ? WHERE versions = ?", (garbage, results.versions()))
        assert store.get(key()) is None
        assert store.find(key()).measurement == measurement(1)
        assert len(store.rows()) == 1
    con.close()


def test_rows_are_flat_and_picked_by_column(store):
    store.put(key(3), measurement(3))
    store.put(key(4, method="Fit", calib="cc"), measurement(4, latency=False))
    store.put(key(method="Recipe", knobs='[["Round", {"bits": 3}]]'), measurement(5))
    three, four, recipe = store.rows()
    assert three["knobs.bits"] == 3 and three["quality.manual.kl"] == 0.25 and three["memory.weights"] == 1003
    assert three["latency.decode_ratio"] == 2.5 and three["method"] == "Round" and three["repr"] == "Round(bits=3)"
    assert three["model"] == "tiny@0123" and three["shipped"] is False and three["when"].endswith("+00:00")
    assert four["latency"] is None and recipe["repr"] == "Round(bits=5)" and "knobs.bits" not in recipe
    assert not any(isinstance(value, dict) for row in (three, four, recipe) for value in row.values())
    assert three["quality.manual.per_window.kl"] == [0.2, 0.3] and three["memory.left"] == []
    assert [r["repr"] for r in store.rows(method="Fit", calib="cc")] == ["Round(bits=4)"]
    assert store.rows(shipped=True) == [] and len(store.rows(shipped=False)) == 3
    with pytest.raises(ValueError, match=r"'bits' is not a column to pick rows by: use model, .* or shipped"):
        store.rows(bits=3)
    with pytest.raises(ValueError, match="method = 3 is not allowed: it must be a string"):
        store.rows(method=3)


def test_the_key_of_a_method(monkeypatch):
    class Model:
        name, fingerprint = "tiny", "0123"

    import types

    text = types.SimpleNamespace(fingerprint=lambda ids: f"hash of {ids}", calibration=lambda lm: "default")
    monkeypatch.setitem(__import__("sys").modules, "labkit.text", text)
    monkeypatch.setattr("labkit.text", text, raising=False)
    base = Key.of(Model, None, {"prose": "b", "manual": "a"})
    assert (base.model, base.method, base.knobs, base.calib) == ("tiny@0123", "uncompressed", "{}", "")
    assert base.texts == '{"manual": "a", "prose": "b"}' and base == Key.of(Model, None, {"manual": "a", "prose": "b"})
    assert Key.of(Model, Round(), {}, "ids").calib == "", "windows count only where they are used"
    assert Key.of(Model, Fit(), {}, "ids").calib == "hash of ids"
    assert Key.of(Model, Fit(), {}).calib == "hash of default", "the windows that Fit()(lm) takes"
    assert Key.of(Model, Recipe(Round(), Recipe(Fit())), {}, "ids").calib == "hash of ids"
    assert (
        Key.of(Model, Recipe(Round()), {}, "ids").calib == "" and Key.of(Model, Recipe(Round()), {}).method == "Recipe"
    )
    assert Key.of(Model, Round(bits=3), {}) != Key.of(Model, Round(bits=4), {})


def test_lookups_are_fast(store, tmp_path):
    store.put(key(), measurement())
    store.export(tmp_path / "one.jsonl")
    line = json.loads((tmp_path / "one.jsonl").read_text())
    many = [
        line | {"key": line["key"] | {"knobs": json.dumps({"bits": n % 500}), "machine": f"m{n}"}} for n in range(3000)
    ]
    (tmp_path / "many.jsonl").write_text("\n".join(map(json.dumps, many)))
    assert store.load(tmp_path / "many.jsonl") == 3000

    def typical(call):
        took = []
        for n in range(100):
            start = time.thread_time()  # CPU seconds: what else runs here does not count
            assert call(key(n)) is not None or call == store.get
            took.append(time.thread_time() - start)
        return statistics.median(took)

    assert typical(store.get) < 2e-3 and typical(store.find) < 2e-3


# ---- JSON lines


def test_export_and_load_round_trip(store, tmp_path):
    for n in range(3):
        store.put(key(n), measurement(n))
    assert store.export(tmp_path / "out.jsonl") == 3
    other = Store(tmp_path / "other.sqlite")
    assert other.load(tmp_path / "out.jsonl") == 3
    assert other.rows() == store.rows(), "times and the shipped flag too"
    assert other.load(tmp_path / "out.jsonl") == 0, "nothing new"
    assert store.export(tmp_path / "two.jsonl", knobs='{"bits": 2}') == 1
    assert not list(tmp_path.glob(".*.part"))


def test_load_keeps_the_newer_row(store, tmp_path):
    store.put(key(), measurement(1))
    store.export(tmp_path / "old.jsonl")
    store.put(key(), measurement(2))
    store.export(tmp_path / "new.jsonl")
    assert store.load(tmp_path / "old.jsonl") == 0 and store.get(key()) == measurement(2)
    other = Store(tmp_path / "other.sqlite")
    assert other.load(tmp_path / "old.jsonl") == other.load(tmp_path / "new.jsonl") == 1
    assert other.get(key()) == measurement(2)


def test_times_with_another_zone_are_compared_as_times(store, tmp_path):
    for when, n in (("2026-01-01T12:00:00+00:00", 1), ("2026-01-01T13:30:00+02:00", 2)):  # the second is 11:30 UTC
        store.put(key(), measurement(n))
        store.export(tmp_path / f"{n}.jsonl")
        row = json.loads((tmp_path / f"{n}.jsonl").read_text()) | {"when": when}
        (tmp_path / f"{n}.jsonl").write_text(json.dumps(row))
    other = Store(tmp_path / "other.sqlite")
    assert other.load(tmp_path / "1.jsonl") == 1 and other.load(tmp_path / "2.jsonl") == 0


def test_export_that_fails_leaves_the_old_file(store, tmp_path, monkeypatch):
    store.put(key(), measurement())
    target = tmp_path / "out.jsonl"
    target.write_text("old")
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        store.export(target)
    assert target.read_text() == "old" and not list(tmp_path.glob(".*.part"))


def example_row() -> dict:
    return {
        "key": dataclasses.asdict(key()),
        "measurement": measurement().to_dict(),
        "when": "2026-01-01T00:00:00+00:00",
    }


@pytest.mark.parametrize(
    "bad, says",
    [
        ("{", "Expecting property name"),
        ("[]", "must be an object with key, measurement and when"),
        ("3", "must be an object"),
        (b"\xff\xfe", "decode"),
        ({"extra": 1}, "must be an object with key, measurement and when"),
        ({"key": {"model": "x"}}, "its key must have model, texts"),
        ({"key": dataclasses.asdict(key()) | {"machine": None}}, "key.machine = None is not str"),
        ({"key": dataclasses.asdict(key()) | {"knobs": "{"}}, "Expecting property name"),
        ({"measurement": {}}, "no measurement of this labkit"),
        ({"measurement": []}, "no measurement of this labkit"),
        ({"measurement": measurement().to_dict() | {"device": 3}}, "measurement.device = 3 is not str"),
        ({"measurement": measurement().to_dict() | {"texts": {"manual": 1}}}, "measurement.texts.manual = 1"),
        ({"measurement": measurement().to_dict() | {"new": 3}}, "no measurement of this labkit"),
        ({"when": "yesterday"}, "yesterday"),
        ({"when": 3}, "when = 3 is not a time"),
        ({"when": "2026-01-01T00:00:00"}, "no time zone"),
        ({"when": "0001-01-01T00:00:00+14:00"}, "out of range"),
    ],
)
def test_a_bad_line_is_named_and_nothing_is_added(store, tmp_path, bad, says):
    good = json.dumps(example_row()).encode()
    line = (
        bad
        if isinstance(bad, bytes)
        else bad.encode()
        if isinstance(bad, str)
        else json.dumps(example_row() | bad).encode()
    )
    (tmp_path / "in.jsonl").write_bytes(b"\n".join([good, b"", line, good]))
    with pytest.raises(ValueError, match=r"in.jsonl, line 3 is not a stored result: .*") as caught:
        store.load(tmp_path / "in.jsonl")
    assert says in str(caught.value) and "\n" not in str(caught.value)
    assert store.rows() == []


PATHS = [(), ("key",), ("measurement",), ("when",), ("key", "model"), ("key", "knobs"), ("measurement", "quality")]
PATHS += [("measurement", "quality", "manual"), ("measurement", "quality", "manual", "kl"), ("measurement", "memory")]
PATHS += [
    ("measurement", "memory", "weights"),
    ("measurement", "latency"),
    ("measurement", "texts"),
    ("measurement", "label"),
]
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=5,
)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(where=st.sampled_from(PATHS), value=JSON)
def test_a_fuzzed_line_is_either_refused_or_can_be_read_back(tmp_path, where, value):
    row = example_row()
    if where:
        inner = row
        for name in where[:-1]:
            inner = inner[name]
        inner[where[-1]] = value
    else:
        row = value
    try:
        parsed = results._read(json.dumps(row).encode(), tmp_path / "in.jsonl", shipped=False)
    except ValueError as error:
        assert "line 1 is not a stored result" in str(error)
    else:
        assert all(results._found(p, here=True) for p in parsed)


def test_a_load_that_fails_half_way_adds_nothing(store, tmp_path):
    rows = [example_row() | {"key": dataclasses.asdict(key(n))} for n in range(200)]
    (tmp_path / "in.jsonl").write_text("\n".join(map(json.dumps, rows)))
    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count = {pages + 5}")  # the disk is full after a few rows
    with pytest.raises(StoreError, match="full"):
        store.load(tmp_path / "in.jsonl")
    assert store.rows() == []
    store.close()
    assert store.load(tmp_path / "in.jsonl") == 200


def test_shipped_rows_are_imported_once_per_content(path, shipped, tmp_path, monkeypatch):
    def ship(name, *rows):
        (shipped / name).write_text("\n".join(json.dumps(row) for row in rows))

    row = example_row()
    ship("a.jsonl", row, row | {"key": row["key"] | {"machine": "elsewhere", "knobs": '{"bits": 8}'}})
    reads = []
    real = results._read
    monkeypatch.setattr(
        results, "_read", lambda content, file, shipped: reads.append(file) or real(content, file, shipped)
    )
    found = Store(path).find(key(8))
    assert found.shipped and not found.here and found.key.machine == "elsewhere" and found.when.startswith("2026-01-01")
    assert Store(path).find(key()).here and len(Store(path).rows(shipped=True)) == 2 and len(reads) == 1
    store = Store(path)
    store.put(key(), measurement(7))
    assert not store.find(key()).shipped
    newer = {"when": "2050-01-01T00:00:00+00:00"}
    ship("a.jsonl", row | newer, row | newer | {"key": row["key"] | {"knobs": '{"bits": 6}'}})
    store = Store(path)
    assert store.get(key()) == measurement(7), "one's own row stays, even when an update ships a newer one"
    assert store.find(key(6)).shipped and len(reads) == 2
    ship("b.jsonl", {"key": 1})
    with pytest.warns(UserWarning, match=r"Shipped results are left out: .*b.jsonl, line 1"):
        assert Store(path).get(key()) == measurement(7)


def test_a_shipped_row_without_times_does_not_replace_one_with_times(path, shipped):
    row = example_row()
    assert row["measurement"]["latency"]
    bare = row | {"when": "2050-01-01T00:00:00+00:00", "measurement": row["measurement"] | {"latency": None}}
    for name, rows in {"a.jsonl": [row], "b.jsonl": [bare]}.items():
        (shipped / name).write_text("\n".join(map(json.dumps, rows)))
    assert Store(path).get(Key(**row["key"])).latency is not None


def test_the_default_store_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "mine"))
    store = Store()
    store.put(key(), measurement())
    assert store.path == tmp_path / "mine" / "results.sqlite" and store.path.exists()


# ---- two writers, and kill -9


def test_threads_share_a_store(store):
    errors = []

    def work(thread):
        try:
            for n in range(25):
                store.put(key(n, machine=f"thread {thread}"), measurement(n))
                assert store.get(key(n, machine=f"thread {thread}")) == measurement(n)
                store.put(key(), measurement(n))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == [] and len(store.rows()) == 4 * 25 + 1


def child(work) -> int:
    """Fork, run ``work()``, and leave without pytest's clean-up; exit status 1 when it raises."""
    pid = os.fork()
    if pid == 0:
        try:
            work()
            os._exit(0)
        except BaseException as error:
            os.write(2, f"child: {error!r}\n".encode())
            os._exit(1)
    return pid


@posix
def test_processes_share_a_store_from_its_very_first_moment(path):
    for round in range(5):  # each round races to make the file
        file = path.with_name(f"{round}.sqlite")

        def work(who, file=file):
            store = Store(file)
            for n in range(20):
                store.put(key(n, machine=who), measurement(n))

        pids = [child(lambda w=f"process {i}": work(w)) for i in range(4)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
        assert len(Store(file).rows()) == 80 and intact(file)


@posix
def test_a_connection_is_not_carried_over_a_fork(store):
    store.put(key(1), measurement(1))
    parents = store._connection()

    def work():
        store.put(key(2), measurement(2))
        assert store._connection() is not parents

    assert os.waitpid(child(work), 0)[1] == 0
    assert store._connection() is parents
    store.put(key(3), measurement(3))
    assert len(store.rows()) == 3 and intact(store.path)


@posix
def test_kill_9_loses_nothing_that_was_acknowledged(path):
    """Writers in pairs, killed at random moments: while making the file, inside a transaction, at a checkpoint."""
    seed = random.randrange(1 << 30)
    rng = random.Random(seed)
    acknowledged = {}
    killed = 0
    for round in range(25):
        read, write = os.pipe()

        def work(who, write=write):
            store = Store(path)
            for n in range(100_000):
                m = measurement(n)
                store.put(key(n, machine=who), m)
                os.write(write, f"{who}:{n}\n".encode())  # only after put() has returned

        pids = [child(lambda w=f"writer {round}.{i}": work(w)) for i in range(2)]
        os.close(write)
        for pid in pids:
            # The first rounds are killed while they open or make the file, the others while they write.
            if round >= 8:
                select.select([read], [], [], 60)  # the first row is stored, however busy the machine is
            time.sleep(rng.uniform(0, 0.02) if round < 8 else rng.uniform(0.02, 0.15))
            os.kill(pid, signal.SIGKILL)
            status = os.waitpid(pid, 0)[1]
            killed += os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL
        with os.fdopen(read) as pipe:
            for line in pipe.read().splitlines():
                who, n = line.rsplit(":", 1)
                acknowledged[who, int(n)] = True
        with warnings.catch_warnings():
            warnings.simplefilter("error")  # nothing may be taken for broken
            store = Store(path)
            for who, n in acknowledged:
                assert store.get(key(n, machine=who)) == measurement(n), f"seed {seed}: {who} lost row {n}"
            store.close()
        assert intact(path) and asides(path) == [], f"seed {seed}"
    assert killed == 50 and len(acknowledged) >= 17, "the writers really wrote, and were really killed"
    assert len(Store(path).rows()) - len(acknowledged) <= killed, "at most one row each in flight"


@posix
def test_killed_before_any_single_statement_the_store_is_sound(path, shipped):
    """Every step of making the file, importing the shipped rows and storing one: kill -9 exactly there."""
    (shipped / "a.jsonl").write_text(
        "\n".join(json.dumps(example_row() | {"key": dataclasses.asdict(key(n))}) for n in (1, 2))
    )

    class Killed(Store):
        def _connect(self):
            con = super()._connect()
            con.set_trace_callback(self.step)
            return con

        def step(self, sql):
            self.left -= 1
            if self.left == 0:
                os.kill(os.getpid(), signal.SIGKILL)

    survived = False
    for n in range(1, 100):
        file = path.with_name(f"{n}.sqlite")
        store = Killed(file)
        store.left = n
        status = os.waitpid(child(lambda store=store: store.put(key(3), measurement(3))), 0)[1]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            rows = {row["knobs.bits"] for row in Store(file).rows()}
        assert intact(file) and asides(file) == [] and {1, 2} <= rows, f"killed before statement {n}"
        if status == 0:
            survived = True
            assert rows == {1, 2, 3}
            break
    assert survived and n > 10, "killed at every statement, until there was none left"


# ---- files that are not ours


def sqlite_of_another_program(path):
    con = sqlite3.connect(path)
    con.executescript("CREATE TABLE recipes (name TEXT); INSERT INTO recipes VALUES ('bread');")
    con.close()


def same_id_other_table(path):
    con = sqlite3.connect(path)
    con.executescript(
        f"PRAGMA application_id = {results.APPLICATION}; CREATE TABLE results (a); PRAGMA user_version = 1;"
    )
    con.close()


def ours_with_a_damaged_page(path):
    store = Store(path)
    for n in range(200):
        store.put(key(n), measurement(n))
    store.close()
    content = bytearray(path.read_bytes())
    content[8192:-4096] = os.urandom(len(content) - 4096 - 8192)
    path.write_bytes(content)


def ours_cut_short(path):
    ours_with_a_damaged_page(path)
    path.write_bytes(path.read_bytes()[: 3 * 4096 + 100])


FOREIGN = {
    "text": lambda path: path.write_text("my holiday notes\n"),
    "one byte": lambda path: path.write_bytes(b"x"),
    "noise": lambda path: path.write_bytes(os.urandom(10_000)),
    "header and noise": lambda path: path.write_bytes(b"SQLite format 3\0" + os.urandom(10_000)),
    "another program": sqlite_of_another_program,
    "same id, other table": same_id_other_table,
    "damaged page": ours_with_a_damaged_page,
    "cut short": ours_cut_short,
}


@pytest.mark.parametrize("make", FOREIGN.values(), ids=FOREIGN)
def test_a_foreign_or_broken_file_is_set_aside_whole(path, make):
    path.parent.mkdir(parents=True)
    make(path)
    before = path.read_bytes()
    store = Store(path)
    with pytest.warns(UserWarning, match="is not a labkit store .* kept as .*broken-.* starting anew") as caught:
        store.put(key(100), measurement(1))
        store.rows()
        store.put(key(100), measurement(2))
    assert len(caught) == 1 and "\n" not in str(caught[0].message)
    assert [p.read_bytes() for p in asides(path)] == [before]
    assert store.get(key(100)) is None or store.get(key(100)) == measurement(2)
    store.put(key(5), measurement(5))
    assert Store(path).get(key(5)) == measurement(5) and intact(path)


def test_the_log_of_a_broken_file_goes_with_it(path):
    path.parent.mkdir(parents=True)
    path.write_text("not a database at all, " * 100)
    path.with_name(path.name + "-wal").write_bytes(b"its log")
    with pytest.warns(UserWarning, match="starting anew"):
        Store(path).put(key(), measurement())
    (aside,) = asides(path)
    assert aside.with_name(aside.name + "-wal").read_bytes() == b"its log"


def test_an_empty_file_becomes_a_store(path):
    path.parent.mkdir(parents=True)
    path.touch()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        Store(path).put(key(), measurement())
    assert asides(path) == []


def test_a_newer_schema_is_refused_and_left_alone(store, path):
    store.put(key(), measurement())
    store.close()
    con = sqlite3.connect(path)
    con.execute(f"PRAGMA user_version = {results.SCHEMA + 1}")
    con.close()
    with pytest.raises(
        StoreError, match=r"written by a newer labkit \(schema 3; this labkit knows 2\). Upgrade labkit"
    ):
        Store(path).get(key())
    assert asides(path) == []


OLD = {"kv_per_token": 46080}  # in place of kv_bytes and kv_tokens, as labkit wrote it under schema 1


def old_store(path, own=3, shipped=2) -> list[tuple]:
    """A store of schema 1; returns its rows."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rows = []
    for n in range(own + shipped):
        m = measurement(n).to_dict()
        m["memory"] = {k: v for k, v in m["memory"].items() if not k.startswith("kv_")} | OLD
        rows.append(
            (*dataclasses.astuple(key(n)), json.dumps(m), f"2026-01-0{n + 1}T00:00:00.000000+00:00", int(n >= own))
        )
    con = sqlite3.connect(path)
    con.executescript(results.CREATE)
    con.executemany(results.INSERT, rows)
    con.execute("PRAGMA user_version = 1")
    con.commit()
    con.close()
    return rows


def kept(path) -> list[tuple]:
    con = sqlite3.connect(path)
    try:
        return con.execute(f"SELECT {', '.join(results.COLUMNS)}, schema FROM older ORDER BY created").fetchall()
    finally:
        con.close()


def test_rows_of_an_older_labkit_are_kept_and_told_once(path):
    rows = old_store(path)
    with pytest.warns(UserWarning) as caught:
        store = Store(path)
        assert store.rows() == [] and store.get(key(1)) is None and store.find(key(1)) is None
    (said,) = [str(w.message) for w in caught]
    assert said == f"3 rows of an older labkit are kept in {path} but not shown: measure again."
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store.put(key(1), measurement(1))
        assert store.get(key(1)) == measurement(1)
        assert Store(path).get(key(1)) == measurement(1) and store.export(path.with_name("out.jsonl")) == 1
    assert kept(path) == [(*row, 1) for row in rows], "byte for byte, also the one that was measured again"
    assert asides(path) == [] and intact(path)


def test_what_can_be_read_of_an_older_store_stays_in_it(path):
    old_store(path, own=1, shipped=0)
    con = sqlite3.connect(path)
    new = (*dataclasses.astuple(key(7)), json.dumps(measurement(7).to_dict()), results._now(), 0)
    with con:
        con.execute(results.INSERT, new)
    con.close()
    with pytest.warns(UserWarning, match="1 row of an older labkit is kept"):
        assert Store(path).get(key(7)) == measurement(7)
    assert len(kept(path)) == 1


def test_shipped_rows_of_an_older_labkit_go_without_a_word_and_new_ones_come(path, shipped):
    old_store(path, own=0, shipped=2)
    (shipped / "a.jsonl").write_text(json.dumps(example_row() | {"key": dataclasses.asdict(key(0))}))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert Store(path).get(key(0)) == measurement()


def test_an_old_row_of_ones_own_does_not_keep_a_shipped_one_out(path, shipped):
    old_store(path, own=1, shipped=0)
    row = example_row() | {"key": dataclasses.asdict(key(0)), "when": "2020-01-01T00:00:00+00:00"}
    (shipped / "a.jsonl").write_text(json.dumps(row))
    with pytest.warns(UserWarning, match="1 row of an older labkit"):
        assert Store(path).find(key(0)).shipped


@posix
def test_processes_that_meet_an_older_store_upgrade_it_once(path):
    rows = old_store(path)

    def work(who):
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            Store(path).put(key(0, machine=who), measurement())
        path.with_name(who).write_text(str(len(said)))

    pids = [child(lambda w=f"process {i}": work(w)) for i in range(4)]
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
    assert sum(int(path.with_name(f"process {i}").read_text()) for i in range(4)) == 1
    assert len(kept(path)) == len(rows) and len(Store(path).rows()) == 4 and intact(path)


def test_a_line_of_an_older_labkit_is_refused_by_name(store, tmp_path):
    row = example_row()
    row["measurement"]["memory"] = {"weights": 1, "linears": 1, "bits_per_weight": 4.0} | OLD
    (tmp_path / "in.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match=r"in.jsonl, line 1 is not a stored result: .*kv_per_token"):
        store.load(tmp_path / "in.jsonl")


@posix
def test_processes_that_meet_a_broken_file_set_it_aside_once(path):
    path.parent.mkdir(parents=True)
    for round in range(5):
        file = path.with_name(f"{round}.sqlite")
        file.write_text("broken")

        def work(who, file=file):
            warnings.simplefilter("ignore")
            Store(file).put(key(machine=who), measurement())

        pids = [child(lambda w=f"process {i}": work(w)) for i in range(4)]
        assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * 4
        assert len(asides(file)) == 1 and len(Store(file).rows()) == 4, "no fresh store was taken for the broken one"


def test_a_store_that_is_deleted_or_replaced_under_way_is_opened_anew(store, path):
    store.put(key(1), measurement(1))
    done = []

    def elsewhere():  # a second connection stays open on the old file
        store.put(key(2), measurement(2))
        first.set()
        second.wait(10)
        store.put(key(3), measurement(3))
        done.append(True)

    first, second = threading.Event(), threading.Event()
    thread = threading.Thread(target=elsewhere)
    thread.start()
    first.wait(10)
    for end in ("", "-wal", "-shm"):
        Path(f"{path}{end}").unlink(missing_ok=True)
    store.put(key(4), measurement(4))
    second.set()
    thread.join()
    assert done and {r["knobs.bits"] for r in store.rows()} == {3, 4} and intact(path)


# ---- places where it cannot work


@pytest.fixture
def plain_user(monkeypatch):
    """Not root, for whom no folder is read-only. (Effective user only; given back afterwards.)"""
    if not hasattr(os, "geteuid"):
        pytest.skip("needs POSIX users")
    was = os.geteuid()
    folder = Path(tempfile.mkdtemp())
    monkeypatch.setattr(paths, "data", lambda: folder / "data")
    if was == 0:
        os.chown(folder, 65534, 65534)
        os.seteuid(65534)
    yield folder
    os.seteuid(was)
    folder.chmod(0o700)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()


def test_a_read_only_folder_is_one_clear_error(plain_user):
    plain_user.chmod(0o500)
    store = Store(plain_user / "results.sqlite")
    for call in (lambda: store.put(key(), measurement()), lambda: store.get(key()), store.rows):
        with pytest.raises(StoreError, match=r"results.sqlite cannot be used: .*set LABKIT_CACHE to one") as caught:
            call()
        assert "\n" not in str(caught.value)


def test_a_read_only_file_is_one_clear_error(plain_user):
    store = Store(plain_user / "results.sqlite")
    store.put(key(), measurement())
    store.close()
    store.path.chmod(0o400)
    with pytest.raises(StoreError, match=r"results.sqlite cannot be used: .*readonly.*set LABKIT_CACHE to one"):
        store.put(key(1), measurement())
    store.path.chmod(0o600)
    assert store.get(key()) == measurement()


@pytest.mark.parametrize("where", ["a folder", "below a file"])
def test_an_impossible_path_is_one_clear_error(tmp_path, where):
    (tmp_path / "a folder").mkdir()
    (tmp_path / "file").touch()
    path = tmp_path / "a folder" if where == "a folder" else tmp_path / "file" / "results.sqlite"
    with pytest.raises(StoreError, match="cannot be used: .*must be a file in a writable folder"):
        Store(path).put(key(), measurement())
    assert not asides(path)


def test_a_cache_that_cannot_be_made_is_one_clear_error(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(StoreError, match="folder for results cannot be made: .*LABKIT_CACHE"):
        Store()


def test_a_full_disk_is_one_clear_error_and_the_rows_stay(store, path):
    store.put(key(), measurement())
    pages = store._connection().execute("PRAGMA page_count").fetchone()[0]
    store._connection().execute(f"PRAGMA max_page_count = {pages + 2}")  # SQLite then fails as on a full disk
    with pytest.raises(StoreError, match="cannot be used: database or disk is full. .*free space"):
        for n in range(1, 100):
            store.put(key(n), measurement(n))
    rows = len(store.rows())
    assert store.get(key()) == measurement() and rows == len(Store(path).rows()) and intact(path)
    store.close()
    store.put(key(99), measurement(99))  # space again
    assert store.get(key(99)) == measurement(99) and asides(path) == []


@posix
@pytest.mark.parametrize("limit", [0, 3000, 60_000])
def test_writes_that_the_system_refuses_leave_a_sound_store(path, limit):
    """A real refusal by the kernel (file size limit), from the first byte on or in the middle."""

    import resource

    def work():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
        for n in range(300):
            try:
                Store(path).put(key(n), measurement(n))
            except StoreError as error:
                assert "free space" in str(error), error
                os._exit(7)

    assert os.waitstatus_to_exitcode(os.waitpid(child(work), 0)[1]) == 7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        store = Store(path)
        assert len(store.rows()) > 0 or limit < 60_000
        store.put(key(), measurement())
    assert intact(path) and asides(path) == []


def test_a_locked_store_says_so(store, path, monkeypatch):
    monkeypatch.setattr(results, "WAIT", 0.2)
    store.put(key(), measurement())
    store.close()
    other = sqlite3.connect(path, isolation_level=None)
    other.execute("BEGIN IMMEDIATE")
    with pytest.raises(StoreError, match="cannot be used: database is locked. Another program has held it"):
        store.put(key(1), measurement())
    assert store.get(key()) == measurement(), "reading goes on while another writes"
    other.execute("ROLLBACK")
    other.close()
    store.put(key(1), measurement())


@pytest.mark.skipif(os.name != "posix", reason="a POSIX flavour of SQLite's file layer")
def test_without_shared_memory_the_store_works_in_rollback_mode(path):
    class NetworkStore(Store):
        def _connect(self):  # SQLite's own file layer for file systems that have neither shared memory nor locks
            return sqlite3.connect(f"file:{self.path}?vfs=unix-dotfile", uri=True, timeout=5, isolation_level=None)

    store = NetworkStore(path)
    store.put(key(), measurement())
    assert store._connection().execute("PRAGMA journal_mode").fetchone() == ("delete",)
    assert store.get(key()) == measurement()
    assert Store(path.with_name("local.sqlite"))._connection().execute("PRAGMA journal_mode").fetchone() == ("wal",)
