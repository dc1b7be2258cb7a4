"""How verifiers are found, and what becomes of what they return."""

from __future__ import annotations

import math
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import torch

from rewards.base import InvalidScore, Rollout, Score, VerifierSpec, as_score, register

ROLLOUT = Rollout(prompt="3 7 2=27:", completion="3*(7+2)", answer="27", info={"numbers": [3, 7, 2], "target": "27"})


@pytest.mark.parametrize(
    ("verdict", "value"), [(1, 1.0), (0.5, 0.5), (True, 1.0), (Fraction(1, 4), 0.25), (None, None), (Score(0.3), 0.3)]
)
def test_a_verdict_becomes_a_score(verdict: object, value: float | None) -> None:
    score = as_score(verdict)
    assert score.value == value
    assert score.error is None


@pytest.mark.parametrize(
    "verdict",
    [math.nan, math.inf, 10**400, "1", [1.0], {"score": 1}, 1j, Score(math.nan), Score("1"), Score(10**400)],  # type: ignore[arg-type]
    ids=lambda verdict: type(verdict).__name__,
)
def test_rubbish_becomes_an_error(verdict: object) -> None:
    score = as_score(verdict)
    assert score.value is None
    assert score.error is not None


@pytest.mark.filterwarnings("error")
def test_a_number_of_numpy_or_torch_is_what_it_is() -> None:
    numbers = (np.float32(0.5), np.array(0.5), torch.tensor(0.5), np.int64(2), np.bool_(True), torch.tensor(True))
    assert [as_score(number).value for number in numbers] == [0.5, 0.5, 0.5, 2.0, 1.0, 1.0]
    for rubbish in (np.ones(1), torch.ones(2)):
        assert isinstance(as_score(rubbish), InvalidScore)
    for verdict in (np.float32("inf"), np.float32("nan"), Score(np.float32("-inf"))):
        assert isinstance(as_score(verdict), InvalidScore)


def test_a_score_that_says_why_there_is_none_is_kept() -> None:
    refused = Score(None, error="too long")
    assert as_score(refused) is refused


def test_a_registered_verifier_is_found_by_name() -> None:
    assert as_score(VerifierSpec("countdown", {"form": "plain"}).load()(ROLLOUT)).accuracy == 1


def test_a_name_is_registered_once() -> None:
    with pytest.raises(ValueError, match="'countdown' is taken"):
        register("countdown")(lambda: lambda rollout: 0.0)


def test_an_unknown_name_is_refused_with_those_known() -> None:
    with pytest.raises(ValueError, match=r"no verifier is called 'countdwn'; accepted are .*countdown"):
        VerifierSpec("countdwn").load()


def test_a_function_in_a_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text(
        "from __future__ import annotations\n"
        "from dataclasses import dataclass\n"
        "@dataclass\nclass Length:\n    value: int\n"
        "def score(rollout):\n    return Length(len(rollout.completion)).value\n"
    )
    assert VerifierSpec(f"{file}:score").load()(ROLLOUT) == len("3*(7+2)")


def test_a_file_is_loaded_once(tmp_path: Path) -> None:
    file = tmp_path / "named.py"
    file.write_text(
        "from rewards.base import verifier\n@verifier('named in a file')\ndef one(rollout):\n    return 1\n"
        "def two(rollout):\n    return 2\n"
    )
    names = ("one", "one", "two")
    verdicts = [VerifierSpec(f"{file}:{name}").load()(ROLLOUT) for name in names]  # type: ignore[arg-type]
    assert verdicts == [1, 1, 2]
    assert VerifierSpec("named in a file").load()(ROLLOUT) == 1  # type: ignore[arg-type]


def test_threads_that_load_a_file_together_all_find_the_function(tmp_path: Path) -> None:
    file = tmp_path / "slow.py"
    file.write_text("import time\ntime.sleep(0.2)\ndef f(rollout):\n    return 1\n")
    with ThreadPoolExecutor(4) as pool:
        found = [pool.submit(VerifierSpec(f"{file}:f").load) for _ in range(4)]
    assert len({future.result() for future in found}) == 1


def test_a_file_that_cannot_be_loaded_is_tried_again(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("1 / 0\n")
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            VerifierSpec(f"{file}:f").load()


def test_a_users_function_takes_no_options(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"mine\.py:f takes no options; leave out weight"):
        VerifierSpec("mine.py:f", {"weight": 1}).load()


def test_a_file_without_the_function(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("reward = 1\n")
    for name in ("score", "reward"):
        with pytest.raises(ValueError, match=f"mine.py has no function '{name}'"):
            VerifierSpec(f"{file}:{name}").load()


def test_a_file_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no file .*absent\.py"):
        VerifierSpec(f"{tmp_path}/absent.py:score").load()


def test_a_function_in_a_module() -> None:
    assert VerifierSpec("rewards.base:as_score").load()(ROLLOUT).value is None  # type: ignore[union-attr]
    with pytest.raises(ValueError, match=r"No module named 'rewards\.absent'"):
        VerifierSpec("rewards.absent:score").load()


def test_the_package_imports_only_the_standard_library() -> None:
    heavy = "{name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)"
    code = f"import sys; before = {heavy}; import rewards; print(*({heavy} - before))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["rewards"]
