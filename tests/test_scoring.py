"""Whatever a verifier does to its process costs the one rollout it was scoring, and what others do to it none."""

from __future__ import annotations

import ctypes
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from rewards.base import Rollout, Score, VerifierSpec
from workers.scoring import BATCH, Scorer
from workers.scoring_process import MAX_REPLY, WINDOW

DEADLINE = 0.5  # seconds: enough for an innocent verifier on a busy machine

VERIFIERS = Path(__file__).with_name("bad_verifiers.py")
GOOD = "float(len(rollout.answer))"


@pytest.fixture(scope="module")
def shared_scorer() -> Iterator[Scorer]:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), deadline=DEADLINE) as scorer:
        yield scorer


@pytest.fixture
def scorer(shared_scorer: Scorer) -> Scorer:
    """One scorer for most tests: that it outlives them all is a test too."""
    assert shared_scorer.drain() == {}
    shared_scorer.failures.clear()
    shared_scorer.rescored = 0
    return shared_scorer


def rollout(completion: str, answer: str = "abc") -> Rollout:
    return Rollout(prompt="", completion=completion, answer=answer, info={})


def score_among_neighbours(scorer: Scorer, completion: str) -> Score:
    """The score of one rollout in the middle of a batch, whose other rollouts must all have theirs."""
    keys = range(2 * WINDOW + 3)
    odd_one = WINDOW // 2
    for key in keys:
        scorer.submit(key, rollout(completion) if key == odd_one else rollout(GOOD, answer="a" * key))
    scores = scorer.drain()
    odd_score = scores.pop(odd_one)
    assert scores == {key: Score(float(key)) for key in keys if key != odd_one}
    return odd_score


def is_gone(pid: int) -> bool:
    """Whether a process has ended (a zombie that its adopter has not yet buried counts)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"
    except (FileNotFoundError, ProcessLookupError):
        return True


def wait_until(happened: Callable[[], bool], seconds: float = 5) -> None:
    give_up = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < give_up
        time.sleep(0.01)


def wait_until_gone(pid: int) -> None:
    wait_until(lambda: is_gone(pid))


def kinds(scorer: Scorer) -> dict[str, int]:
    """Failures by kind, which must all be of the verifier itself."""
    assert {verifier for verifier, _ in scorer.failures} <= {scorer._verifier.name}
    return {kind: count for (_, kind), count in scorer.failures.items()}


def children() -> set[int]:
    """This process's children, zombies too."""
    tasks = Path("/proc/self/task").iterdir()
    found: set[int] = set()
    for task in tasks:
        with suppress(FileNotFoundError):  # a thread that has just ended
            found |= {int(pid) for pid in (task / "children").read_text().split()}
    return found


@pytest.mark.parametrize(
    ("completion", "kind", "words"),
    [
        ("ignore_signals()", "timeout", "longer than 0.5 s"),
        ("time.sleep(1000)", "timeout", "longer than 0.5 s"),
        ("re.match('(a+)+$', 'a' * 60 + 'b')", "timeout", "longer than 0.5 s"),
        ("ctypes.PyDLL(None).sleep(1000)", "timeout", "longer than 0.5 s"),
        ("os.kill(os.getpid(), signal.SIGSTOP)", "timeout", "longer than 0.5 s"),
        ("1 / 0", "exception", "ZeroDivisionError: division by zero"),
        ("fail_later()", "exception", "KeyError: 'async'"),
        ("sys.exit(3)", "exception", "SystemExit: 3"),
        ("(_ for _ in ()).throw(KeyboardInterrupt())", "exception", "KeyboardInterrupt"),
        ("'rubbish'", "invalid value", "returned str"),
        ("math.nan", "invalid value", "returned nan"),
        ("-math.inf", "invalid value", "returned -inf"),
        ("10 ** 400", "invalid value", "returned int"),
        ("Score(math.inf)", "invalid value", "returned inf"),
        ("Score('1')", "invalid value", "returned str"),
        ("Score(1.0, {'format': math.nan})", "invalid value", "nan is not finite"),
        ("Score(1.0, None)", "invalid value", "NoneType"),
        ("Score(1.0, accuracy=object())", "invalid value", "must be real number"),
        ("Score(1.0, accuracy=87.5)", "invalid value", "accuracy 87.5 is not of 0 to 1"),
        ("Score(1.0, accuracy=-1)", "invalid value", "accuracy -1 is not of 0 to 1"),
        ("Score(1.0, accuracy=math.nan)", "invalid value", "nan is not finite"),
        ("Score(1.0, notes=None)", "invalid value", "notes are a NoneType"),
        ("Score(1.0, notes={'read': {1, 2}})", "invalid value", "set is not JSON serializable"),
        ("Score(1.0, notes={'read': math.nan})", "invalid value", "not JSON compliant"),
        ("Score(1.0, notes=(knot := {}) or knot.setdefault('in', knot))", "invalid value", "Circular reference"),
        ("os._exit(3)", "died", "exit code 3"),
        ("ctypes.string_at(0)", "died", "signal 11, Segmentation fault"),
        ("os.kill(os.getpid(), 40)", "died", "signal 40"),
        ("os.closerange(3, 100)", "died", "died"),
        ("bytearray(1 << 60)", "out of memory", "out of memory"),
    ],
)
def test_a_failure_costs_one_rollout(scorer: Scorer, completion: str, kind: str, words: str) -> None:
    score = score_among_neighbours(scorer, completion)
    assert score.value is None
    assert score.error is not None
    assert words in score.error
    assert kinds(scorer) == {kind: 1}


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("True", Score(1.0)),
        ("2", Score(2.0)),
        ("None", Score(None)),
        ("Score(None, error='no answer found')", Score(None, error="no answer found")),
        ("Score(1, {'format': True}, accuracy=0)", Score(1.0, {"format": 1.0}, accuracy=0.0)),
        ("Score(1.0, notes={'read': ('27', None)})", Score(1.0, notes={"read": ["27", None]})),
        ("later()", Score(0.5, {"format": 0.25}, accuracy=1.0)),
        ("noisy()", Score(1.0)),
        ("fork_and_return()", Score(0.25)),
    ],
)
def test_scores_of_sound_verdicts(scorer: Scorer, completion: str, expected: Score) -> None:
    assert score_among_neighbours(scorer, completion) == expected
    assert kinds(scorer) == ({"no score": 1} if expected.value is None else {})


def test_what_a_verifier_prints_goes_to_stderr(capfd: pytest.CaptureFixture[str]) -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score")) as scorer:
        scorer.submit("key", rollout("os.write(1, b'printed')"))
        assert scorer.drain() == {"key": Score(7.0)}
    assert capfd.readouterr() == ("", "printed")


def test_a_deadline_counts_from_the_start_of_its_rollout(scorer: Scorer) -> None:
    nap = DEADLINE / 4
    for key in range(8):
        scorer.submit(key, rollout(f"time.sleep({nap}) or 1"))
    started = time.monotonic()
    assert all(score == Score(1.0) for score in scorer.drain().values())
    assert not scorer.failures
    assert time.monotonic() - started > 1.5 * DEADLINE


def test_a_reply_that_waits_for_the_supervisor_is_not_late() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), processes=2, deadline=DEADLINE) as scorer:
        scorer.submit("wakes it", rollout(f"time.sleep({0.2 * DEADLINE})"))
        scorer.submit("waits", rollout(f"time.sleep({0.4 * DEADLINE})"))
        time.sleep(0.1 * DEADLINE)
        ctypes.PyDLL(None).usleep(int(1.5 * DEADLINE * 1e6))  # keeps the interpreter lock from the supervisor
        assert scorer.drain() == {"wakes it": Score(None), "waits": Score(None)}


def test_every_rollout_may_fail(scorer: Scorer) -> None:
    for key in range(8):
        scorer.submit(key, rollout(f"os._exit({key})"))
    scores = scorer.drain()
    assert all(f"exit code {key}" in (scores[key].error or "") for key in range(8))
    assert kinds(scorer) == {"died": 8}
    assert scorer.rescored == 8


def test_memory_is_limited_and_given_back() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), memory_bytes=1 << 28) as scorer:
        score = score_among_neighbours(scorer, "eat_memory()")
        assert kinds(scorer) == {"out of memory": 1}
        assert score.error == "the verifier ran out of memory"
        scorer.submit("after", rollout("bytearray(1 << 27) and 1"))
        assert scorer.drain() == {"after": Score(1.0)}


def test_large_messages_both_ways() -> None:
    large = Rollout("é\n" * 50_000, "Score(1.0, {str(i): 0.5 for i in range(8_000)})", "", {})
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), deadline=60.0) as scorer:
        for key in range(32):
            scorer.submit(key, large)
        scores = scorer.drain()
    assert [len(score.components) for score in scores.values()] == [8_000] * 32


def test_a_rollout_arrives_as_it_was() -> None:
    message = {"role": "user", "content": "\ud800 é\n"}
    info = {"numbers": [1, 2], "deep": {"x": None}}
    with Scorer(VerifierSpec(f"{VERIFIERS}:same")) as scorer:
        scorer.submit("key", Rollout("", "", "", info, messages=(message,), token_ids=(1, 2), finish_reason="length"))
        assert scorer.drain() == {"key": Score(1.0)}


@pytest.mark.parametrize(
    "forgery",
    [
        "not json\n",
        "[" * 100_000 + "\n",
        '{"job": 99, "scores": [{"value": 1.0}], "failures": [{}]}\n',
        '{"job": 0, "scores": [{"value": "1.0"}], "failures": [{}]}\n',
        '{"job": 0, "scores": [{"value": 1.0, "components": [1]}], "failures": [{}]}\n',
        '{"job": 0, "scores": [{"value": 1.0}], "failures": ["died"]}\n',
        '{"job": 0, "scores": [{"value": 1.0}], "failures": [{"another": "died"}]}\n',
        '{"job": 0, "scores": [{"value": null}], "failures": [{}]}\n',
        '{"job": 0, "scores": [{"price": 1.0}], "failures": [{}]}\n',
        '{"job": 0, "scores": [{"value": 1.0}, {"value": 1.0}], "failures": [{}, {}]}\n',
        '{"job": 0}\n[]\n',
        "\xff\n",
    ],
)
def test_a_forged_reply_costs_one_rollout(monkeypatch: pytest.MonkeyPatch, forgery: str) -> None:
    monkeypatch.setenv("FORGERY", forgery)
    with Scorer(VerifierSpec(f"{VERIFIERS}:score")) as scorer:
        scorer.submit("forged", rollout("forge()"))
        scorer.submit("after", rollout(GOOD))
        scores = scorer.drain()
        assert scores["after"] == Score(3.0)
        assert "sent rubbish" in (scores["forged"].error or "")
        assert kinds(scorer) == {"invalid value": 1}


def test_an_endless_reply_is_cut_off(scorer: Scorer) -> None:
    score = score_among_neighbours(scorer, f"Score(1.0, {{'x' * {2 * MAX_REPLY}: 1.0}})")
    assert "longer than" in (score.error or "")
    assert kinds(scorer) == {"invalid value": 1}


def test_a_child_killed_from_outside(scorer: Scorer) -> None:
    scorer.submit("pid", rollout("os.getpid()"))
    pid = int(scorer.drain()["pid"].value or 0)
    os.kill(pid, signal.SIGKILL)  # while it has nothing to do
    wait_until_gone(pid)
    scorer.submit("pid", rollout("os.getpid()"))
    pid = int(scorer.drain()["pid"].value or 0)
    assert scorer.rescored == 0
    scorer.submit("busy", rollout("time.sleep(0.2) or os.getpid()"))
    scorer.submit("next", rollout(GOOD))
    time.sleep(0.1)
    os.kill(pid, signal.SIGKILL)
    scores = scorer.drain()
    assert scores["next"] == Score(3.0)
    assert scores["busy"].value not in (None, pid)
    assert not scorer.failures
    assert scorer.rescored == 1


def test_a_batch_at_which_a_process_died_is_tried_again_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Were it made larger, more than what was in it could die with it."""
    monkeypatch.setenv("ALIVE", str(tmp_path / "alive"))
    (tmp_path / "alive").touch()
    with Scorer(VerifierSpec(f"{VERIFIERS}:dies_once")) as scorer:
        scorer.submit_group(range(10), [rollout("die")] * 10)
        time.sleep(0.1)
        scorer.submit_group(range(10, 40), [rollout("")] * 30)
        scores = scorer.drain()
        assert [scores[key].value for key in (0, 9, 10, 39)] == [10, 10, 30, 30]
        assert not scorer.failures
        assert scorer.rescored == 10


def test_a_verifier_s_own_processes_die_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GRANDCHILD", str(tmp_path / "pid"))
    # Long enough for a busy machine to start the process before the deadline ends its parent.
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), deadline=5 * DEADLINE) as scorer:
        scorer.submit("key", rollout("with_grandchild()"))
        assert scorer.drain()["key"].error
        wait_until_gone(int((tmp_path / "pid").read_text()))


def test_two_processes_survive_the_death_of_one() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), processes=2, deadline=DEADLINE) as scorer:
        score_among_neighbours(scorer, "os._exit(0)")
        for key in range(4):
            scorer.submit(key, rollout("time.sleep(0.1) or os.getpid()"))
        assert len({score.value for score in scorer.drain().values()}) == 2
        score_among_neighbours(scorer, "time.sleep(1000)")


def test_processes_share_slow_rollouts() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), processes=2) as scorer:
        for key in range(4):
            scorer.submit(key, rollout("time.sleep(0.05)"))
        scorer.drain()
        started = time.monotonic()
        scorer.submit("slow", rollout("time.sleep(1.0) or os.getpid()"))
        for key in range(10):
            scorer.submit(key, rollout("time.sleep(0.1) or os.getpid()"))
        scores = scorer.drain()
        assert time.monotonic() - started < 1.4
        assert sum(score == scores["slow"] for score in scores.values()) <= 2


def test_a_batch_verifier_sees_many_rollouts_at_once() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:longest_first")) as scorer:
        scorer.submit_group(range(100), [rollout(str(key)) for key in range(100)])
        sizes = [score.value for score in scorer.drain().values()]
    assert max(size for size in sizes if size is not None) == BATCH


def test_a_group_verifier_sees_a_group() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:ranks"), deadline=DEADLINE) as scorer:
        scorer.submit_group("abc", [rollout("long"), rollout(""), rollout("longer")])
        scorer.submit_group("de", [rollout("hang"), rollout("with it")])
        scorer.submit_group("fg", [rollout("short"), rollout("with it")])
        scorer.submit("h", rollout("alone"))
        scores = scorer.drain()
    assert [scores[key].value for key in "abch"] == [1, None, 2, 0]
    assert all("took longer than 1 s" in str(scores[key].error) for key in "de")
    assert all("answered 2 rollouts with [0.0], not with a list as long" in str(scores[key].error) for key in "fg")
    assert kinds(scorer) == {"no score": 1, "timeout": 2, "exception": 2}


def test_children_are_replaced_after_a_while() -> None:
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), recycle=5) as scorer:
        for key in range(12):
            scorer.submit(key, rollout("os.getpid()"))
        pids = [score.value for score in scorer.drain().values()]
    assert sorted(Counter(pids).values()) == [2, 5, 5]


def test_the_successor_of_a_child_that_hangs_is_there_before_it_is_killed() -> None:
    before = children()
    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), deadline=2.0) as scorer:
        (first,) = children() - before
        scorer.submit("hang", rollout("time.sleep(1000)"))
        wait_until(lambda: len(children() - before) == 2)
        assert not is_gone(first)
        (second,) = children() - before - {first}
        assert "took longer" in (scorer.drain()["hang"].error or "")
        scorer.submit("pid", rollout("os.getpid()"))
        assert scorer.drain() == {"pid": Score(second)}


def test_submit_does_not_wait(scorer: Scorer) -> None:
    scorer.submit("slow", rollout("time.sleep(0.5)"))
    started = time.monotonic()
    for key in range(200):
        scorer.submit(key, rollout(GOOD))
    assert time.monotonic() - started < 0.4
    assert len(scorer.drain()) == 201
    assert scorer.drain() == {}


def test_throughput() -> None:
    """A floor far below what one process does (about 20,000 a second), for busy machines: the best of three rounds."""

    def seconds() -> float:
        started = time.monotonic()
        for key in range(5000):
            scorer.submit(key, rollout(""))
        scorer.drain()
        return time.monotonic() - started

    with Scorer(VerifierSpec(f"{VERIFIERS}:text_length")) as scorer:
        assert min(seconds() for _ in range(3)) < 2.5


def test_nothing_is_left_after_close() -> None:
    def belongings() -> tuple[int, int, set[int]]:
        return len(list(Path("/proc/self/fd").iterdir())), threading.active_count(), children()

    before = belongings()
    scorer = Scorer(VerifierSpec(f"{VERIFIERS}:score"), processes=2, deadline=DEADLINE)
    assert len(children()) == len(before[2]) + 2
    for key, completion in enumerate(["os._exit(0)", "1 / 0", "time.sleep(1000)", GOOD]):
        scorer.submit(key, rollout(completion))
    scorer.drain()
    scorer.submit("unfinished", rollout("time.sleep(1000)"))
    scorer.close()
    scorer.close()
    assert belongings() == before
    with pytest.raises(RuntimeError, match="closed"):
        scorer.submit("late", rollout(GOOD))
    with pytest.raises(RuntimeError, match="closed"):
        scorer.drain()


def test_children_die_with_their_parent() -> None:
    script = f"""
from rewards.base import Rollout, VerifierSpec
from workers.scoring import Scorer
scorer = Scorer(VerifierSpec("{VERIFIERS}:score"), deadline=1000.0)
scorer.submit("pid", Rollout("", "os.getpid()", "", {{}}))
print(int(scorer.drain()["pid"].value), flush=True)
scorer.submit("hang", Rollout("", "ctypes.PyDLL(None).sleep(1000)", "", {{}}))
scorer.drain()
"""
    parent = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    with parent.stdout:
        child = int(parent.stdout.readline())
    time.sleep(0.2)
    assert not is_gone(child)
    parent.kill()
    parent.wait()
    wait_until_gone(child)


def test_a_verifier_s_own_processes_die_with_the_parent(tmp_path: Path) -> None:
    """Which is killed, as Ray's actors are, and can end nobody."""
    script = f"""
from rewards.base import Rollout, VerifierSpec
from workers.scoring import Scorer
scorer = Scorer(VerifierSpec("{VERIFIERS}:score"), deadline=1000.0)
scorer.submit("hang", Rollout("", "with_grandchild()", "", {{}}))
scorer.drain()
"""
    pid = tmp_path / "pid"
    parent = subprocess.Popen([sys.executable, "-c", script], env=os.environ | {"GRANDCHILD": str(pid)})
    wait_until(lambda: pid.is_file() and pid.read_text() != "", seconds=60)
    grandchild = int(pid.read_text())
    assert not is_gone(grandchild)
    parent.kill()
    parent.wait()
    wait_until_gone(grandchild)


def test_a_module_in_the_current_directory_hides_none_of_the_engine_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "rewards.py").write_text("from rewards.base import Score\ndef score(rollout): return Score(0.5)\n")
    (tmp_path / "mine.py").write_text("def score(rollout):\n    return 0.25\n")
    monkeypatch.chdir(tmp_path)
    for name, value in (("rewards.py:score", 0.5), ("mine:score", 0.25)):
        with Scorer(VerifierSpec(name)) as scorer:
            scorer.submit("key", rollout("x"))
            assert scorer.drain()["key"].value == value


@pytest.mark.parametrize(
    ("source", "function", "sentence"),
    [
        (None, "score", r"^verifier: no file .*user\.py$"),
        ("", "score", r"^verifier: .*user\.py has no function 'score'$"),
        ("def score(", "score", r"cannot be loaded: SyntaxError: .*user\.py, line 1"),
        ("import no_such_module", "score", r"cannot be loaded: ModuleNotFoundError: No module named 'no_such_module'$"),
        ("raise SystemExit(2)", "score", r"cannot be loaded: SystemExit: 2$"),
        ("import os; os._exit(2)", "score", r"^verifier: the process of .*user\.py:score died \(exit code 2\)$"),
    ],
)
def test_a_verifier_that_cannot_be_loaded(tmp_path: Path, source: str | None, function: str, sentence: str) -> None:
    threads = threading.active_count()
    if source is not None:
        (tmp_path / "user.py").write_text(source)
    with pytest.raises(ValueError, match=sentence):
        Scorer(VerifierSpec(f"{tmp_path}/user.py:{function}"), processes=2)
    assert threading.active_count() == threads


def test_a_verifier_that_takes_too_long_to_load(tmp_path: Path) -> None:
    threads = threading.active_count()
    (tmp_path / "user.py").write_text("import time; time.sleep(1000)")
    with pytest.raises(ValueError, match=r"user\.py:score took longer than 1.5 s to load$"):
        Scorer(VerifierSpec(f"{tmp_path}/user.py:score"), processes=2, start_timeout=1.5)
    assert threading.active_count() == threads


def test_a_verifier_that_cannot_be_loaded_again(tmp_path: Path) -> None:
    path = tmp_path / "user.py"
    path.write_text("import os\ndef score(rollout): os._exit(1)")
    with Scorer(VerifierSpec(f"{path}:score")) as scorer:
        path.unlink()
        for key in range(3):
            scorer.submit(key, rollout(""))
        scores = scorer.drain()
    assert all("no file" in (score.error or "") for score in scores.values())
    assert kinds(scorer) == {"died": 3}
    assert scorer.rescored == 1


def test_a_key_is_used_once(scorer: Scorer) -> None:
    scorer.submit("key", rollout(GOOD))
    with pytest.raises(ValueError, match="'key' was submitted twice"):
        scorer.submit("key", rollout(GOOD))
    assert scorer.drain() == {"key": Score(3.0)}


def test_a_process_that_outlives_a_kill_is_left_to_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    """As one that is stuck in a driver; `wait` never sees it end."""
    waits: list[float] = []

    def wait(process: subprocess.Popen[bytes], timeout: float) -> int:
        waits.append(timeout)
        raise subprocess.TimeoutExpired(process.args, timeout)

    with Scorer(VerifierSpec(f"{VERIFIERS}:score"), deadline=0.5) as scorer:
        with monkeypatch.context() as stuck:
            stuck.setattr(subprocess.Popen, "wait", wait)
            scorer.submit(0, rollout("time.sleep(1000)"))
            assert scorer.drain()[0].error is not None
        assert waits
        scorer.submit(1, rollout(GOOD))
        assert scorer.drain()[1] == Score(3.0)


def test_a_broken_supervisor_is_heard(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_process() -> None:
        raise OSError("no more processes")

    with Scorer(VerifierSpec(f"{VERIFIERS}:score")) as scorer:
        monkeypatch.setattr(scorer, "_start_child", no_process)
        for key in range(2):
            scorer.submit(key, rollout("os._exit(0)"))
        with pytest.raises(OSError, match="no more processes"):
            scorer.drain()
        with pytest.raises(OSError, match="no more processes"):
            scorer.submit("late", rollout(GOOD))
