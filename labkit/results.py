"""The store of measurements: one SQLite file, one row per model, texts, method and knobs, machine and versions.

    store = Store()                                  # <cache>/results.sqlite
    store.put(Key.of(lm, RTN(bits=4), hashes), m)    # hashes: text -> text.fingerprint(ids)
    store.find(Key.of(lm, RTN(bits=4), hashes))      # this row, or the same experiment from another machine

Safe with several threads and processes at once, and after ``kill -9`` at any moment: every write is one SQLite
transaction, in WAL mode where the file system has it, and :meth:`Store.put` returns only after it is on the disk.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import sqlite3
import threading
import types
import typing
import warnings
from collections.abc import Callable, Iterable
from dataclasses import asdict, astuple, dataclass, fields, is_dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

from filelock import FileLock

from labkit import paths
from labkit._files import whole_file
from labkit.measure.machine import machine, versions
from labkit.measure.measurement import Measurement
from labkit.method import Method

APPLICATION = 0x6C61626B  # "labk": tells our file from any other SQLite database
SCHEMA = 2  # 2: a Measurement holds cache bytes at a length, values by window, quartiles of ratios
WAIT = 30.0  # seconds to wait for another writer


class StoreError(RuntimeError):
    """The store cannot be used where it is: read-only, disk full, locked, or written by a newer labkit."""


@dataclass(frozen=True)
class Key:
    """What a measurement depends on; two measurements with equal keys are the same experiment on the same machine."""

    model: str  # "name@fingerprint of the weights"
    texts: str  # canonical JSON, text -> hash of its token ids
    method: str  # class name, "uncompressed" for the baseline
    knobs: str  # Method.key()
    calib: str  # hash of the calibration windows, "" where the method uses none
    machine: str
    versions: str

    def __post_init__(self):
        _check(self, "key")

    @classmethod
    def of(cls, lm, method: Method | None, texts: dict[str, str], calib=None) -> Key:
        """The key of ``method`` applied to ``lm``; ``method=None`` is the uncompressed model.

        ``calib`` (LongTensor, windows × length) counts only for methods that use it. A calibrated method without it
        gets the windows that ``method(lm)`` would take; pass them where many keys are made, since that costs time.
        """
        hashed = ""
        if calibrated(method):
            from labkit import text

            hashed = text.fingerprint(text.calibration(lm) if calib is None else calib)
        return cls(
            model=f"{lm.name}@{lm.fingerprint}",
            texts=json.dumps(texts, sort_keys=True),
            method="uncompressed" if method is None else type(method).__name__,
            knobs="{}" if method is None else method.key(),
            calib=hashed,
            machine=machine(),
            versions=versions(),
        )

    def uncompressed(self) -> Key:
        """The key of this key's model before the method, on the same texts and machine."""
        return replace(self, method="uncompressed", knobs="{}", calib="")


def calibrated(method: Method | None) -> bool:
    """Whether ``method``, or any part of a Recipe, uses calibration windows."""
    return method is not None and method.calibrated


@dataclass(frozen=True)
class Found:
    """A stored row. ``here``: from this machine and these versions; ``shipped``: came with labkit."""

    measurement: Measurement
    key: Key
    here: bool
    shipped: bool
    when: str  # ISO 8601, UTC


KEY = tuple(f.name for f in fields(Key))
COLUMNS = (*KEY, "measurement", "created", "shipped")
CREATE = f"""
CREATE TABLE results ({", ".join(f"{c} TEXT NOT NULL" for c in COLUMNS[:-1])}, shipped INTEGER NOT NULL,
                      PRIMARY KEY ({", ".join(KEY)})) WITHOUT ROWID;
CREATE TABLE imports (sha256 TEXT PRIMARY KEY, file TEXT NOT NULL, created TEXT NOT NULL);
PRAGMA application_id = {APPLICATION};
PRAGMA user_version = {SCHEMA};
"""
# Rows that an older labkit measured and this one cannot read: kept whole, out of the way of new ones with the same key.
OLDER = f"CREATE TABLE IF NOT EXISTS older ({', '.join(COLUMNS)}, schema INTEGER NOT NULL)"
INSERT = f"""
INSERT INTO results VALUES ({", ".join("?" for _ in COLUMNS)}) ON CONFLICT ({", ".join(KEY)}) DO UPDATE SET
measurement = excluded.measurement, created = excluded.created, shipped = excluded.shipped
"""
INSERT_NEWER = INSERT + "WHERE results.shipped OR excluded.created > results.created"
# Whether a row has times: sweeps that only ask for quality leave them out. (A measurement that is no JSON has none.)
TIMED = "CASE WHEN json_valid({0}.measurement) THEN json_extract({0}.measurement, '$.latency') IS NOT NULL ELSE 0 END"
INSERT_SHIPPED = INSERT + (  # one's own rows stay, and so do times where the newer row has none
    "WHERE results.shipped AND excluded.created >= results.created "
    f"AND {TIMED.format('excluded')} >= {TIMED.format('results')}"
)


class Store:
    """The measurements kept at ``path`` (default: ``results.sqlite`` in labkit's cache), shipped rows included.

    A file that is corrupt, or is not a labkit store, is renamed to ``….broken-<time>`` with a warning, never
    overwritten. Rows of an older labkit that this one cannot read stay in the file, in a table of their own; a warning
    says so, once. Every method raises :class:`StoreError` where the file can be neither read nor made.
    """

    def __init__(self, path: str | os.PathLike | None = None):
        try:
            self.path = Path(path or paths.own() / "results.sqlite").expanduser().resolve()
        except OSError as error:
            raise StoreError(f"The folder for results cannot be made: {error}. {_hint('readonly')}") from error
        self._shipped_into = None  # identity of the file that has the shipped rows
        self._local = threading.local()

    def __repr__(self) -> str:
        return f"Store({str(self.path)!r})"

    # ---- rows

    def put(self, key: Key, m: Measurement) -> None:
        """Store ``m``, in place of an earlier row with the same key. On return it is on the disk.

        Without its times where other programs disturbed them (``Measurement.kept``).
        """
        _check(m, "measurement")
        row = _row(key, m.kept(), _now(), shipped=False)
        self._run(lambda con: con.execute(INSERT, row))

    def get(self, key: Key) -> Measurement | None:
        """The measurement with exactly this key, or None."""
        found = self._find(key, KEY)
        return found.measurement if found else None

    def find(self, key: Key) -> Found | None:
        """The row with this key, else the same experiment from other machines or versions, or None.

        Of several others those with times come first, then the newest.
        """
        return self._find(key, KEY[:5])  # all but machine and versions; the primary key starts with them

    def _find(self, key: Key, same: tuple[str, ...]) -> Found | None:
        sql = f"""SELECT *, machine = ? AND versions = ? AS here FROM results
                  WHERE {" AND ".join(f"{c} = ?" for c in same)}
                  ORDER BY here DESC, {TIMED.format("results")} DESC, created DESC"""
        values = (key.machine, key.versions, *(getattr(key, c) for c in same))
        for *row, here in self._run(lambda con: con.execute(sql, values).fetchall()):
            found = _found(row, bool(here))
            if found:
                return found
        return None

    def rows(self, **where) -> list[dict]:
        """Flat dictionaries, oldest first, for pandas and plots; ``where`` picks by key column or ``shipped``.

        The key's columns, ``shipped`` and ``when``, then ``knobs.bits``, ``quality.manual.kl``, ``memory.weights``,
        ``latency.decode_ms`` and so on; ``repr`` is the method as one would type it. Values by window, quartiles and
        notes stay lists.
        """
        rows = []
        for found in self._select(where):
            m = found.measurement.to_dict()
            del m["model"], m["texts"]  # the key has them
            row = asdict(found.key) | {"shipped": found.shipped, "when": found.when, "repr": m.pop("method")}
            knobs = json.loads(found.key.knobs)
            if isinstance(knobs, dict):  # a Recipe's is a list: its repr says it all
                row |= _flat(knobs, "knobs.")
            rows.append(row | _flat(m))
        return rows

    def export(self, path: str | os.PathLike, **where) -> int:
        """Write the rows picked by ``where`` as JSON lines, whole or not at all; returns how many."""
        return _write_rows(path, self._select(where))

    def export_keys(self, path: str | os.PathLike, keys: Iterable[Key]) -> int:
        """Write the rows with exactly these keys, those that are there, in their order."""
        return _write_rows(path, [f for f in (self._find(key, KEY) for key in keys) if f])

    def load(self, path: str | os.PathLike) -> int:
        """Add the rows of a JSON lines file that are new, or newer than ours; returns how many.

        Raises ValueError with the file and line of the first bad row, and then adds none.
        """
        rows = _read(Path(path).read_bytes(), path, shipped=False)
        return self._run(lambda con: _transaction(con, (INSERT_NEWER, rows)))

    def close(self) -> None:
        """Close this thread's connection; the next call opens it again."""
        con, self._local.con = getattr(self._local, "con", None), None
        if con is not None:
            con.close()

    def _select(self, where: dict) -> list[Found]:
        for name, value in where.items():
            if name not in (*KEY, "shipped"):
                raise ValueError(f"{name!r} is not a column to pick rows by: use {', '.join(KEY)} or shipped.")
            if not isinstance(value, bool if name == "shipped" else str):
                kind = "True or False" if name == "shipped" else "a string"
                raise ValueError(f"{name} = {value!r} is not allowed: it must be {kind}.")
        sql = "SELECT * FROM results " + ("WHERE " if where else "") + " AND ".join(f"{c} = ?" for c in where)
        values = tuple(where.values())
        rows = self._run(lambda con: con.execute(sql + " ORDER BY created", values).fetchall())
        mine = (machine(), versions())
        found = (_found(row, tuple(row[5:7]) == mine) for row in rows)
        return [f for f in found if f]

    # ---- the file

    def _run(self, work: Callable[[sqlite3.Connection], typing.Any]):
        """``work(connection)``, again on a new file where the old one turns out broken or was moved away."""
        for _ in range(3):  # another process may move the file once more
            try:
                con = self._connection()
            except (OSError, sqlite3.Error) as error:
                raise self._error(error) from error
            try:
                return work(con)
            except sqlite3.Error as error:
                file = self._local.file
                moved = file != _identity(self.path)
                if not _broken(error) and not moved:
                    raise self._error(error) from error
                try:
                    if not moved:
                        self._locked(self._set_aside, con, str(error), file)
                except OSError as unmovable:
                    raise self._error(unmovable) from error
                finally:
                    self.close()
        raise StoreError(f"{self.path} breaks again each time it is made anew: check the disk.")

    def _error(self, error: Exception) -> StoreError:
        return StoreError(f"{self.path} cannot be used: {error}. {_hint(str(error))}")

    def _connection(self) -> sqlite3.Connection:
        """This thread's connection to the file that now has our name."""
        here = self._local
        con = getattr(here, "con", None)
        if con is not None and here.pid != os.getpid():
            _inherited.append(con)  # SQLite connections do not survive a fork: kept, never touched again
            con = here.con = None
        if con is not None and here.file != _identity(self.path):
            self.close()  # someone deleted the file, or set it aside
            con = None
        if con is None:
            con = here.con = self._locked(self._open)
            here.pid = os.getpid()
        return con

    def _locked(self, work: Callable, *args):
        """Making, checking and renaming the file happen in one thread of one process at a time."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.path}-lock", timeout=WAIT):
            return work(*args)

    def _open(self) -> sqlite3.Connection:
        # Never open() this file ourselves: closing it would drop SQLite's locks on it (POSIX locks are per process).
        for last in (False, True):
            con = self._connect()
            try:
                schema = _ready(con, self.path)
                if not schema:
                    _create(con)
                elif schema < SCHEMA:
                    _upgrade(con, self.path)
                con.execute("PRAGMA synchronous = FULL")  # what put() has acknowledged outlives a power cut
                self._local.file = _identity(self.path)
                if self._shipped_into != self._local.file:
                    _import_shipped(con)
                    self._shipped_into = self._local.file
                return con
            except BaseException as error:
                try:
                    if last or not _broken(error):
                        raise
                    self._set_aside(con, str(error), _identity(self.path))
                finally:
                    con.close()

    def _connect(self) -> sqlite3.Connection:
        return sqlite3.connect(self.path, timeout=WAIT, isolation_level=None)

    def _set_aside(self, con: sqlite3.Connection, why: str, file: tuple | None) -> None:
        """Rename the broken ``file``, with its log, unless another process has done so already."""
        if _identity(self.path) != file:
            return
        if os.name == "nt":
            con.close()  # Windows renames no open file. Elsewhere it stays open: closing would remove the file's log
        aside = f"{self.path}.broken-{datetime.now():%Y%m%d-%H%M%S-%f}"
        for end in ("-wal", "-shm", "-journal", ""):  # the file itself last: killed half-way, this is done again
            if os.path.exists(f"{self.path}{end}"):
                os.rename(f"{self.path}{end}", aside + end)
        warnings.warn(f"{self.path} is not a labkit store ({why}); kept as {aside}, starting anew.", stacklevel=2)


def _write_rows(path: str | os.PathLike, found: list[Found]) -> int:
    """JSON lines, whole or not at all; returns how many."""
    with whole_file(path) as part, open(part, "w", encoding="utf-8", newline="\n") as file:
        for f in found:
            line = {"key": asdict(f.key), "measurement": f.measurement.to_dict(), "when": f.when}
            file.write(json.dumps(line) + "\n")
    return len(found)


_inherited: list[sqlite3.Connection] = []


def _identity(path: Path) -> tuple[int, int] | None:
    """Which file has this name now; None when there is none."""
    try:
        found = os.stat(path)
    except FileNotFoundError:
        return None
    return found.st_dev, found.st_ino


def _broken(error: BaseException) -> bool:
    # Python gives SQLITE_NOTADB and SQLITE_CORRUPT the plain class, and every other failure a class of its own.
    return type(error) is sqlite3.DatabaseError


def _hint(reason: str) -> str:
    reason = reason.lower()
    if "full" in reason or "space" in reason or "i/o" in reason:
        return "See that the disk is there and has free space, then try again; what was stored before is safe."
    if "locked" in reason or "acquired" in reason:
        return f"Another program has held it for {WAIT:.0f} seconds: close that program and try again."
    return "It must be a file in a writable folder: set LABKIT_CACHE to one."


def _ready(con: sqlite3.Connection, path: Path) -> int:
    """The schema of a labkit store; 0 for an empty file, to be made one. Anything else raises, as a corrupt file does."""
    application, version, tables = (
        con.execute(sql).fetchone()[0]
        for sql in ("PRAGMA application_id", "PRAGMA user_version", "SELECT count(*) FROM sqlite_master")
    )
    if (application, version, tables) == (0, 0, 0):
        if path.exists() and path.stat().st_size == 1:  # for SQLite that is an empty file, which it would overwrite
            raise sqlite3.DatabaseError("file is not a database")
        return 0
    if application != APPLICATION:
        raise sqlite3.DatabaseError("it is another program's database")
    if version > SCHEMA:
        raise StoreError(
            f"The store was written by a newer labkit (schema {version}; this labkit knows {SCHEMA}). "
            "Upgrade labkit, or set LABKIT_CACHE to another folder."
        )
    if tuple(column[1] for column in con.execute("PRAGMA table_info(results)")) != COLUMNS:
        raise sqlite3.DatabaseError("its table is not the one labkit makes")
    return version


def _upgrade(con: sqlite3.Connection, path: Path) -> None:
    """Make an older store one of this schema: what cannot be read any more moves to the table ``older``; once, and told."""
    with con:
        con.execute("BEGIN IMMEDIATE")
        schema = con.execute("PRAGMA user_version").fetchone()[0]
        if schema >= SCHEMA:
            return  # another process was faster
        stale = [row for row in con.execute("SELECT * FROM results").fetchall() if _found(row, here=False) is None]
        con.execute(OLDER)
        con.executemany(f"INSERT INTO older VALUES ({', '.join('?' * len(COLUMNS))}, {schema})", stale)
        same = " AND ".join(f"{c} = ?" for c in KEY)
        con.executemany(f"DELETE FROM results WHERE {same}", [row[: len(KEY)] for row in stale])
        con.execute(f"PRAGMA user_version = {SCHEMA}")
    if own := sum(not row[-1] for row in stale):  # shipped ones come again with each labkit
        rows = "1 row of an older labkit is" if own == 1 else f"{own:,} rows of an older labkit are"
        warnings.warn(f"{rows} kept in {path} but not shown: measure again.", stacklevel=2)


def _create(con: sqlite3.Connection) -> None:
    try:
        con.execute("PRAGMA journal_mode = WAL")  # where the file system has no shared memory, the mode stays "delete"
    except sqlite3.OperationalError:
        con.execute("PRAGMA journal_mode = DELETE")  # as safe; readers then wait for writers
    _transaction(con, *((sql, [()]) for sql in CREATE.split(";") if sql.strip()))


def _transaction(con: sqlite3.Connection, *batches: tuple[str, Iterable[tuple]]) -> int:
    """Run each (sql, rows), all or nothing; returns how many rows the inserts added or changed."""
    changed = 0
    with con:  # commits, or rolls back
        con.execute("BEGIN IMMEDIATE")
        for sql, rows in batches:
            for row in rows:
                changed += max(con.execute(sql, row).rowcount, 0)
    return changed


def _import_shipped(con: sqlite3.Connection) -> None:
    """Add the rows of every ``data/results/*.jsonl`` whose content this file has not seen."""
    for file in sorted((paths.data() / "results").glob("*.jsonl")):
        try:
            content = file.read_bytes()
            digest = hashlib.sha256(content).hexdigest()
            if con.execute("SELECT 1 FROM imports WHERE sha256 = ?", (digest,)).fetchone():
                continue
            rows = _read(content, file, shipped=True)
        except (OSError, ValueError) as error:
            warnings.warn(f"Shipped results are left out: {error}", stacklevel=2)
            continue
        done = ("INSERT INTO imports VALUES (?, ?, ?)", [(digest, file.name, _now())])
        _transaction(con, (INSERT_SHIPPED, rows), done)


# ---- one row


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="microseconds")


def _row(key: Key, m: Measurement, when: str, shipped: bool) -> tuple:
    return (*astuple(key), json.dumps(m.to_dict()), when, int(shipped))


def _found(row: tuple, here: bool) -> Found | None:
    """None for a row that this labkit cannot read (another version's fields): it counts as absent."""
    *key, measurement, when, shipped = row
    try:
        return Found(_measurement(json.loads(measurement)), Key(*key), here, bool(shipped), when)
    except ValueError:
        return None


def _flat(tree: dict, prefix: str = "") -> dict:
    """``{"memory": {"weights": 1}}`` -> ``{"memory.weights": 1}``."""
    flat = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat


def _read(content: bytes, file: str | os.PathLike, shipped: bool) -> list[tuple]:
    """The rows of a JSON lines file; ValueError with file and line for the first one that is not a row."""
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            rows.append(_parse(json.loads(line.decode()), shipped))
        except (ValueError, RecursionError) as error:
            json_error = isinstance(error, json.JSONDecodeError)
            why = f"{error.msg} at column {error.colno}" if json_error else str(error)
            raise ValueError(f"{file}, line {number} is not a stored result: {why}.") from error
    return rows


def _parse(row: dict, shipped: bool) -> tuple:
    if not isinstance(row, dict) or set(row) != {"key", "measurement", "when"}:
        raise ValueError("it must be an object with key, measurement and when")
    if not isinstance(row["key"], dict) or set(row["key"]) != set(KEY):
        raise ValueError(f"its key must have {', '.join(KEY)}")
    key = Key(**row["key"])
    json.loads(key.knobs)
    m = _measurement(row["measurement"])
    _check(m, "measurement")
    return _row(key, m, _utc(row["when"]), shipped)


def _utc(when: str) -> str:
    """An ISO 8601 time with its zone, in the form that :func:`_now` writes, so that times sort as text."""
    try:
        time = datetime.fromisoformat(when)
    except TypeError as error:
        raise ValueError(f"when = {when!r} is not a time") from error
    if time.tzinfo is None:
        raise ValueError(f"when = {when!r} has no time zone")
    try:
        return time.astimezone(timezone.utc).isoformat(timespec="microseconds")
    except OverflowError as error:
        raise ValueError(f"when = {when!r} is out of range") from error


def _measurement(row: dict) -> Measurement:
    try:
        return Measurement.from_dict(row)
    except (TypeError, KeyError, AttributeError, ValueError) as error:
        raise ValueError(f"it is no measurement of this labkit ({error})") from error


@functools.cache
def _types(cls: type) -> dict[str, typing.Any]:
    return typing.get_type_hints(cls)


def _check(value, where: str) -> None:
    """Raise ValueError where a field of this dataclass, or of one inside it, is not of its declared type."""
    for name, hint in _types(type(value)).items():
        _check_one(getattr(value, name), hint, f"{where}.{name}")


def _check_one(value, hint, where: str) -> None:
    if typing.get_origin(hint) is dict:
        if not isinstance(value, dict):
            raise ValueError(f"{where} = {value!r} is not a dictionary")
        for name, inner in value.items():
            _check_one(inner, typing.get_args(hint)[1], f"{where}.{name}")
        return
    if typing.get_origin(hint) is types.UnionType or typing.get_origin(hint) is typing.Union:
        inside = [h for h in typing.get_args(hint) if typing.get_origin(h) is list]  # list[float] | None
        if inside:
            if value is not None:
                _check_one(value, inside[0], where)
            return
    if typing.get_origin(hint) is list:
        if not isinstance(value, list):
            raise ValueError(f"{where} = {value!r} is not a list")
        for at, inner in enumerate(value):
            _check_one(inner, typing.get_args(hint)[0], f"{where}[{at}]")
        return
    allowed = typing.get_args(hint) or (hint,)  # float | None -> (float, NoneType)
    if isinstance(value, bool) or not isinstance(value, (*allowed, int) if float in allowed else allowed):
        raise ValueError(f"{where} = {value!r} is not {' or '.join(t.__name__ for t in allowed)}")
    if is_dataclass(value):
        _check(value, where)
