"""The ledger on disk: whole lines or none, and when two are the same."""

from __future__ import annotations

import errno
import json
import os
import resource
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from es_engine.ledger import Ledger, Line, fingerprint, first_difference

COSTS = {"generated": 3, "processed": 9, "flops": 18_000, "worker_seconds": 0.25}
FIGURES = {
    "costs": COSTS,
    "theta": "ab",
    "lr": 0.1,
    "reward_mean": None,
    "accuracy": None,
    "components": {},
    "failures": {},
    **dict.fromkeys(("rollouts", "tokens", "truncated", "looped"), 0),
}
LINES: list[Line] = [
    {"kind": "run", "config": {"name": "étude\n", "seed": 1}, "theta": "ab"},
    {"kind": "calibration", "sigma": 0.3},
    {
        "kind": "generation",
        "step": 0,
        **FIGURES,
        "rewards": [[0.1, None], [1.0, 1 / 3]],
        "times": {"total": 1.5},
        "workers": [0],
    },
    {
        "kind": "generation",
        "step": 1,
        **FIGURES,
        "rewards": [[0.2, 0.0]],
        "times": {"total": 2.5},
        "workers": [1],
        "restarts": 1,
    },
]

json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
any_lines = st.lists(
    st.dictionaries(st.text(), json_values, max_size=4).map(lambda line: {**line, "kind": "x"}), max_size=4
)
with_files = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def written(path: Path, lines: list[Line] = LINES) -> Ledger:
    path.unlink(missing_ok=True)
    ledger = Ledger(path)
    for line in lines:
        ledger.append(line)
    return ledger


@with_files
@given(lines=any_lines)
def test_lines_come_back(tmp_path: Path, lines: list[Line]) -> None:
    path = tmp_path / "ledger.jsonl"
    assert written(path, lines).lines == lines
    if lines:
        assert Ledger(path).lines == lines
        assert path.read_bytes().count(b"\n") == len(lines)


def test_lines_by_kind(tmp_path: Path) -> None:
    written(tmp_path / "l")
    ledger = Ledger(tmp_path / "l")
    assert ledger.header == LINES[0]
    assert ledger.generations == LINES[2:]
    assert ledger.of_kind("calibration") == [LINES[1]]


def test_an_empty_ledger_has_no_header(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="the ledger is empty"):
        _ = Ledger(tmp_path / "l").header


def test_a_line_cut_off_at_any_byte_is_taken_away(tmp_path: Path) -> None:
    path = tmp_path / "l"
    written(path)
    whole = path.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    for cut in range(len(whole) + 1):
        path.write_bytes(whole[:cut])
        ledger = Ledger(path)
        complete = sum(end <= cut for end in ends)
        assert ledger.lines == LINES[:complete], cut
        for line in LINES[complete:]:
            ledger.append(line)
        assert path.read_bytes() == whole, cut


@with_files
@given(tail=st.binary(max_size=40).filter(lambda tail: b"\n" not in tail and b"\r" not in tail))
def test_rubbish_after_the_last_line_is_taken_away_by_the_next(tmp_path: Path, tail: bytes) -> None:
    """Not before: whoever only looks at a ledger may see a line that another process is writing."""
    path = tmp_path / "l"
    written(path)
    whole = path.read_bytes()
    for end in (b"", b"\n"):
        damaged = whole + b"\0" + tail + end
        path.write_bytes(damaged)
        ledger = Ledger(path)
        assert ledger.lines == LINES
        assert path.read_bytes() == damaged
        ledger.append({"kind": "x"})
        assert path.read_bytes() == whole + b'{"kind":"x"}\n'


def test_what_is_forgotten_of_single_rollouts_is_on_disk_all_the_same(tmp_path: Path) -> None:
    path = tmp_path / "l"
    ledger = written(path, [{**line} for line in LINES[:3]])
    ledger.forget_rollouts()
    ledger.append({**LINES[3]})
    ledger.forget_rollouts()
    assert ledger.lines == [{key: value for key, value in line.items() if key != "rewards"} for line in LINES]
    assert Ledger(path).lines == LINES


@pytest.mark.parametrize("damage", [b"", b"{", b"\0\0\0", b"\xff\xfe", b"17", b"[]", b"{}", b"null", b'{"kind": nul}'])
@pytest.mark.parametrize("number", [1, 2, 3])
def test_a_damaged_line_before_the_last_is_refused(tmp_path: Path, number: int, damage: bytes) -> None:
    path = tmp_path / "l"
    written(path)
    raw = path.read_bytes().splitlines(keepends=True)
    raw[number - 1] = damage + b"\n"
    path.write_bytes(b"".join(raw))
    with pytest.raises(ValueError, match=f"line {number} is damaged; the ledger cannot be used past line {number - 1}"):
        Ledger(path)
    assert path.read_bytes() == b"".join(raw)


def test_what_is_not_json_is_not_written(tmp_path: Path) -> None:
    ledger = written(tmp_path / "l")
    whole = ledger.path.read_bytes()
    for value in (float("nan"), float("inf"), object()):
        with pytest.raises((ValueError, TypeError)):
            ledger.append({"kind": "generation", "value": value})
    assert ledger.path.read_bytes() == whole
    assert ledger.lines == LINES


def in_child(work: Callable[[], Any]) -> None:
    """Run in a forked child, whose limits are its own, and raise what it raised."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work()
        except BaseException as error:  # noqa: BLE001 - the parent raises it again
            os.write(writer, repr(error).encode())
        finally:
            os._exit(0)
    os.close(writer)
    os.waitpid(child, 0)
    with os.fdopen(reader, "rb") as pipe:
        failure = pipe.read().decode()
    assert not failure, failure


@pytest.mark.parametrize("room", [0, 1, 100, 8192, 20_000])
def test_of_a_line_that_does_not_fit_nothing_is_left(tmp_path: Path, room: int) -> None:
    """The system refuses to let the file grow, as it does when a disk is full."""
    ledger = written(tmp_path / "l")
    whole = ledger.path.read_bytes()

    def append_too_much() -> None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (len(whole) + room, resource.RLIM_INFINITY))
        with pytest.raises(OSError, match="File too large"):
            ledger.append({"kind": "generation", "step": 2, "text": "x" * 30_000})
        assert ledger.lines == LINES

    in_child(append_too_much)
    assert ledger.path.read_bytes() == whole


def test_of_a_line_that_cannot_be_synced_nothing_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger = written(tmp_path / "l")
    whole = ledger.path.read_bytes()

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            ledger.append({**LINES[3], "step": 2})
    assert ledger.path.read_bytes() == whole
    ledger.append({**LINES[3], "step": 2})
    assert Ledger(ledger.path).lines == ledger.lines == [*LINES, {**LINES[3], "step": 2}]


def compare(tmp_path: Path, one: list[Line], other: list[Line]) -> str | None:
    for name, lines in (("one", one), ("other", other)):
        written(tmp_path / name, lines)
    return first_difference(tmp_path / "one", tmp_path / "other")


def test_times_and_places_are_no_difference(tmp_path: Path) -> None:
    elsewhere = [{**line, "times": {"total": 99.0}, "workers": [7], "restarts": 3} for line in LINES]
    elsewhere[2]["costs"] = {**COSTS, "worker_seconds": 99.0}
    assert compare(tmp_path, LINES, elsewhere) is None


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    other = [*LINES[:2], {**LINES[2], "rewards": [[0.1, 0.0]]}, {**LINES[3], "step": 9}]
    found = compare(tmp_path, LINES, other)
    assert found is not None
    assert found.startswith("line 3 (step 0): rewards is [[0.1, null], ")  # of another length: shown whole
    assert f"in {tmp_path / 'one'} and [[0.1, 0.0]] in {tmp_path / 'other'}" in found


def test_other_costs_are_a_difference_but_for_the_seconds(tmp_path: Path) -> None:
    other = [*LINES[:2], {**LINES[2], "costs": {**COSTS, "flops": 18_001, "worker_seconds": 99.0}}, LINES[3]]
    found = compare(tmp_path, LINES, other)
    assert found is not None
    assert found.startswith("line 3 (step 0): costs.flops is 18000 in ")


def test_a_difference_deep_in_a_line_is_named_by_its_place(tmp_path: Path) -> None:
    rewards = [[0.1] * 50 for _ in range(9)]
    one = [{"kind": "x", "step": 0, "record": {"same": 1, "rewards": rewards}}]
    other = [{"kind": "x", "step": 0, "record": {"same": 1, "rewards": [*rewards[:-1], [0.1] * 49 + [0.2]]}}]
    found = compare(tmp_path, one, other)
    assert found is not None
    assert found.startswith("line 1 (step 0): record.rewards[8][49] is 0.1 in ")


@pytest.mark.parametrize("missing", [1, 2])
def test_a_shorter_ledger_is_a_difference(tmp_path: Path, missing: int) -> None:
    for one, other, longer in ((LINES, LINES[:-missing], "one"), (LINES[:-missing], LINES, "other")):
        found = compare(tmp_path, one, other)
        assert found is not None
        assert found.startswith(f"{tmp_path / longer} has {missing} more line")


@pytest.mark.parametrize(("extra", "said"), [(1, "1"), (None, "null")])
def test_a_missing_key_is_a_difference_and_a_missing_ledger_an_error(tmp_path: Path, extra: object, said: str) -> None:
    found = compare(tmp_path, [{"kind": "run", "extra": extra}], [{"kind": "run"}])
    assert found is not None
    assert f"line 1: extra is {said}" in found
    with pytest.raises(ValueError, match="no such ledger"):
        first_difference(tmp_path / "one", tmp_path / "nowhere")


def test_the_fingerprint_sees_every_bit() -> None:
    theta = np.linspace(-1, 1, 101, dtype=np.float32)
    bits = theta.view(np.uint32)
    seen = {fingerprint(theta)}
    for place in (0, 50, 100):
        for bit in range(32):
            other = bits.copy()
            other[place] ^= np.uint32(1 << bit)
            seen.add(fingerprint(other.view(np.float32)))
    assert len(seen) == 1 + 3 * 32
    assert fingerprint(np.zeros(1, np.float32)) != fingerprint(-np.zeros(1, np.float32))
    strided = np.repeat(theta, 2)[::2]
    assert fingerprint(strided) == fingerprint(theta)
    assert json.loads(json.dumps(fingerprint(theta))) == fingerprint(theta)
