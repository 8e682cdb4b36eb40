"""The engine's choices: measured quietly and in turns, remembered, shown, doubted, thrown away. With made-up clocks."""

from __future__ import annotations

import json
import threading
from datetime import date, timedelta
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from labkit import cli, doctor
from labkit.engine import threads as policy
from labkit.measure import busy
from labkit.measure.alone import alone

SIZE = 100_000_000  # bytes: a 135M model at 4 bits


class Box:
    """A machine whose steps take ``ms[threads]``, on which others may work, and what was built and timed on it."""

    def __init__(self):
        self.ms = {1: 5.8, 2: 3.9}
        self.now, self.used, self.hog = 0.0, 0.0, 0.0  # hog: cores' worth of time that others take
        self.built: list[int] = []
        self.steps = 0
        self.alive = 0  # models that exist now
        self.most = 0

    def go(self, seconds: float) -> None:
        self.now += seconds
        self.used += self.hog * seconds

    def build(self, threads: int):
        self.built.append(threads)
        return Model(self, threads)

    def fastest(self, nbytes: int = SIZE):
        return policy.fastest(self.build, nbytes)


class Model:
    context, nbytes, reader, reads_from = 512, SIZE, None, 0

    def __init__(self, box: Box, threads: int):
        self.box, self.threads = box, threads
        box.alive += 1
        box.most = max(box.most, box.alive)

    def __del__(self):
        self.box.alive -= 1

    def prefill(self, ids) -> None:
        """1 ms a token packed; dense weights take 20 ms, and 0.5 ms a token."""
        tokens = ids.shape[1]
        self.box.go(1e-3 * tokens if self.reader is None else 0.02 + 0.5e-3 * tokens)

    def decode(self, token: int) -> None:
        self.box.steps += 1
        cost = self.box.ms[self.threads]
        self.box.go(1e-3 * (cost() if callable(cost) else cost))

    def rewind(self, length: int) -> None:
        pass


@pytest.fixture
def box(monkeypatch, tmp_path) -> Box:
    box = Box()
    monkeypatch.setenv("LABKIT_CACHE", str(tmp_path))
    monkeypatch.setattr(policy, "cores", lambda: 2)
    monkeypatch.setattr(policy, "_tried", {})
    monkeypatch.setattr(policy, "_now", lambda: box.now)
    monkeypatch.setattr(busy, "_now", lambda: box.now)
    monkeypatch.setattr(busy, "_sleep", box.go)
    monkeypatch.setattr(busy, "machine_seconds", lambda: box.used)
    monkeypatch.setattr(busy, "cores", lambda: 2)
    monkeypatch.setattr(busy, "_limit", lambda: None)
    monkeypatch.setattr(busy.time, "process_time", lambda: 0.0)
    return box


def file(tmp_path):
    return tmp_path / "engine-threads.json"


# Choosing


def test_the_fastest_is_taken_and_remembered(box, tmp_path):
    assert box.fastest().threads == 2
    steps, built = box.steps, len(box.built)
    assert steps == 2 * policy.ROUNDS * policy.STEPS
    assert box.fastest().threads == 2 and box.steps == steps and len(box.built) == built + 1
    (choice,) = policy.choices()
    assert choice.ms == {"1": 5.8, "2": 3.9} and choice.when == date.today().isoformat() and choice.nbytes == SIZE
    assert str(choice) == f"model of 100 MB: 2 threads (3.90 ms a step against 5.80 on 1), measured {choice.when}"


@pytest.mark.parametrize(("one", "expected"), [(3.9, 2), (3.75, 2), (3.5, 1)])
def test_fewer_threads_than_all_must_win_by_a_margin(box, one, expected):
    box.ms = {1: one, 2: 3.9}
    assert box.fastest().threads == expected


def test_half_of_the_cores_is_tried_too(box, monkeypatch):
    monkeypatch.setattr(policy, "cores", lambda: 8)
    box.ms = {1: 9.0, 4: 2.0, 8: 3.0}
    assert box.fastest().threads == 4 and sorted(set(box.built)) == [1, 4, 8]


def test_one_core_leaves_nothing_to_choose(box, monkeypatch):
    monkeypatch.setattr(policy, "cores", lambda: 1)
    assert box.fastest().threads == 1 and box.built == [1] and box.steps == 0


@given(drift=st.floats(1.0, 8.0))
def test_a_drifting_machine_does_not_change_the_choice(drift):
    """Every step takes longer than the one before, up to eightfold: in turns, both choices meet the same drift."""
    count = [0]

    def seconds(n):
        count[0] += 1
        return {1: 5.8, 2: 3.9}[n] * (1 + (drift - 1) * count[0] / (2 * policy.ROUNDS))

    best, _ = policy._compare(seconds, [1, 2], policy.ROUNDS)
    assert best == 2


def test_large_models_are_held_one_at_a_time(box):
    assert box.fastest(nbytes=500_000_000).threads == 2 and box.most <= 2  # the old one goes when the new one is there
    box.most = box.alive
    assert box.fastest(nbytes=SIZE).threads == 2
    assert box.alive == 0, "none is kept"


def test_models_of_another_size_have_a_choice_of_their_own(box):
    box.fastest()
    box.ms = {1: 1.0, 2: 2.0}
    assert box.fastest(nbytes=1_000_000).threads == 1 and box.fastest().threads == 2


def test_cores_are_what_can_be_used_at_once(monkeypatch):
    for free, expected in ((4.0, 4), (1.5, 1), (0.5, 1)):
        monkeypatch.setattr(policy, "available", lambda free=free: free)
        assert policy.cores() == expected


# Healing


def test_a_busy_machine_is_not_remembered_and_heals_when_it_is_quiet(box, tmp_path):
    """The founding fault: one busy moment, and one thread was used for good."""
    box.hog, box.ms = 1.0, {1: 5.8, 2: 9.0}
    assert box.fastest().threads == 2, "the default, for nothing can be measured now"
    assert box.steps == 0 and not file(tmp_path).exists() and box.now < 2 * policy.PATIENCE
    waited = box.now
    assert box.fastest().threads == 2 and box.now == waited, "who has just waited in vain does not wait again"
    box.hog, box.ms = 0.0, {1: 5.8, 2: 3.9}
    box.now += policy.AGAIN + 1
    assert box.fastest().threads == 2 and policy.choices()[0].ms["2"] == 3.9


def test_others_who_come_meanwhile_spoil_it_too(box, tmp_path):
    def noisy():
        box.hog = 1.0
        return 9.0

    box.ms = {1: 5.8, 2: noisy}
    assert box.fastest().threads == 2 and not file(tmp_path).exists()


def test_noise_that_nobody_saw_heals_at_the_next_compile(box, monkeypatch):
    """Counters say nothing, two threads were slow once: one thread is used, but looked at again before it is believed."""
    monkeypatch.setattr(busy, "machine_seconds", lambda: None)
    box.ms = {1: 5.8, 2: 9.0}
    assert box.fastest().threads == 1
    box.ms = {1: 5.8, 2: 3.9}
    assert box.fastest().threads == 2, "healed"
    steps = box.steps
    assert box.fastest().threads == 2 and box.steps == steps, "and settled"


def test_one_thread_that_is_really_faster_settles_after_two_measurements(box):
    box.ms = {1: 1.0, 2: 2.0}
    counts = []
    for _ in range(4):
        assert box.fastest().threads == 1
        counts.append(box.steps)
    assert counts[0] < counts[1] == counts[2] == counts[3]


def test_an_old_choice_is_measured_again_and_kept_while_the_machine_is_busy(box, tmp_path):
    box.ms = {1: 1.0, 2: 2.0}
    box.fastest(), box.fastest()
    row = json.loads(file(tmp_path).read_text())
    (key,) = row
    for when in (date.today() - policy.OLD, date.today() + timedelta(days=2)):  # a clock that was wrong
        row[key]["when"] = when.isoformat()
        file(tmp_path).write_text(json.dumps(row))
        box.hog, steps = 1.0, box.steps
        policy._tried.clear()
        assert box.fastest().threads == 1 and box.steps == steps, "busy: the old one is better than none"
        policy._tried.clear()
        box.hog, box.ms = 0.0, {1: 5.8, 2: 3.9}
        assert box.fastest().threads == 2 and box.steps > steps
        box.ms = {1: 1.0, 2: 2.0}


def test_a_contradiction_forgets(box):
    model = box.fastest()
    assert not policy.contradict(model, 4.5e-3, context=16), "within a quarter"
    assert not policy.contradict(model, 9e-3, context=16, disturbed=True), "not on a busy machine"
    assert not policy.contradict(model, 9e-3, context=1000), "not where the cache is long"
    assert not policy.contradict(SimpleNamespace(threads=2, nbytes=90_000_000), 9e-3, context=16), "not another size"
    assert not policy.contradict(SimpleNamespace(threads=7, nbytes=SIZE), 9e-3, context=16), "not what was not measured"
    assert not policy.contradict(model, float("nan"), context=16)
    assert len(policy.choices()) == 1
    assert policy.contradict(model, 5.8e-3, context=16) and policy.choices() == []
    box.ms = {1: 5.0, 2: 5.8}
    assert box.fastest().threads == 1
    assert policy.contradict(SimpleNamespace(threads=1, nbytes=SIZE), 3.9e-3, context=16), "faster contradicts as well"


def test_one_who_measures_elsewhere_is_not_waited_for_long(box, monkeypatch, tmp_path):
    monkeypatch.setattr(policy, "PATIENCE", 0.2)
    held, done = threading.Event(), threading.Event()

    def hold():
        with alone("a sweep"):
            held.set()
            done.wait(60)

    other = threading.Thread(target=hold)
    other.start()
    try:
        assert held.wait(60)
        assert box.fastest().threads == 2 and box.steps == 0 and not file(tmp_path).exists()
    finally:
        done.set()
        other.join()


# The file


@pytest.mark.parametrize(
    "damage",
    [
        lambda row: "{",
        lambda row: "",
        lambda row: "[]",
        lambda row: "null",
        lambda row: json.dumps(dict.fromkeys(row, 64)),  # as it was written once: the number alone
        lambda row: json.dumps({k: v | {"choice": 64} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"choice": "two"} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"choice": True} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"ms": [1, 2]} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"ms": {"1": "fast"}} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"when": "yesterday"} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"when": 5} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"nbytes": 0} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"agreed": None} for k, v in row.items()}),
        lambda row: json.dumps({k: v | {"surprise": 1} for k, v in row.items()}),
        lambda row: json.dumps({k: {} for k in row}),
    ],
)
def test_a_damaged_or_older_file_is_measured_again_and_mended(box, tmp_path, damage):
    box.fastest()
    good = file(tmp_path).read_text()
    file(tmp_path).write_text(damage(json.loads(good)))
    steps = box.steps
    assert box.fastest().threads == 2 and box.steps == 2 * steps
    assert policy._read() == {key: policy.Choice(**row) for key, row in json.loads(good).items()}


def test_a_file_that_is_no_text_or_a_folder(box, tmp_path):
    file(tmp_path).write_bytes(b"\xff\x00{")
    assert box.fastest().threads == 2
    policy.forget()
    file(tmp_path).mkdir()
    assert box.fastest().threads == 2 and policy.choices() == [] and policy.forget() == 0
    assert [p.name for p in tmp_path.iterdir() if p.suffix == ".part"] == []


def test_a_cache_that_cannot_be_written(box, monkeypatch, tmp_path):
    def refuse(*args, **kwargs):
        raise PermissionError(13, "read-only")

    monkeypatch.setattr("os.replace", refuse)
    assert box.fastest().threads == 2 and box.fastest().threads == 2


# Prompts with dense weights


def test_the_crossover_is_where_all_longer_prompts_are_faster(box):
    """Packed 1 ms a token, dense 20 ms and 0.5 ms a token: equal at 40, so 64 is the first length that is faster."""
    model = Model(box, 2)
    assert policy.crossover(model, object(), SIZE) == 64 and model.reader is None
    now = box.now
    assert policy.crossover(model, object(), SIZE) == 64 and policy.crossover(model, object(), SIZE) == 64
    assert box.now > now, "one that is not the default is measured twice"
    now = box.now
    assert policy.crossover(model, object(), SIZE) == 64 and box.now == now
    (choice,) = policy.choices()
    assert choice.ms["64 dense"] == pytest.approx(52) and choice.ms["64 packed"] == pytest.approx(64)
    assert str(choice).startswith("prompts with dense weights beside a model of 100 MB: from 64 tokens on, measured ")


def test_no_crossover_is_remembered_as_well(box):
    model = Model(box, 2)
    model.context = 32
    assert policy.crossover(model, object(), SIZE) is None
    now = box.now
    assert policy.crossover(model, object(), SIZE) is None and box.now == now
    assert "never faster" in str(policy.choices()[0])


def test_no_crossover_on_a_busy_machine(box, tmp_path):
    box.hog = 1.0
    assert policy.crossover(Model(box, 2), object(), SIZE) is None and not file(tmp_path).exists()


# Shown and thrown away


def test_the_doctor_shows_the_choices_and_one_command_forgets_them(box, capsys, tmp_path):
    box.fastest()
    (line,) = doctor.engine()
    assert line.status == doctor.OK and "model of 100 MB: 2 threads (3.90 ms a step against 5.80 on 1)" in line.found
    assert cli.main(["doctor", "--forget-choices"]) == 0
    assert "1 choice forgotten" in capsys.readouterr().out
    (line,) = doctor.engine()
    assert "nothing is remembered" in line.found and not file(tmp_path).exists()
    assert cli.main(["doctor", "--forget-choices"]) == 0 and "0 choices forgotten" in capsys.readouterr().out


def test_choices_of_another_machine_are_not_shown(box, monkeypatch):
    box.fastest()
    monkeypatch.setattr(policy, "machine", lambda: "another machine, 2 cores")
    assert policy.choices() == []
