"""Rewards written for TRL, verl and OpenRLHF score here what they score there; a name that no dialect knows is
refused."""

from __future__ import annotations

import asyncio
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from foreign_rewards import CHAT, PLAIN, RIGHT, WRONG, module_of, score_all, values, write

from es_engine.config import load_config
from rewards import dialects
from rewards.base import Rollout, Score, VerifierSpec, judge_now
from workers.scoring import Scorer

# Names.


def test_importing_the_package_imports_no_dialect() -> None:
    code = "import sys, rewards; print(*({'rewards.dialects', 'trl', 'verifiers', 'reasoning_gym'} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == ""


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("trl:", "says nothing behind the prefix"),
        ("trl:acuracy_reward", "trl.rewards has no 'acuracy_reward'; accepted are accuracy_reward, "),
        ("trl:get_soft_overlong_punishment", "makes a reward of arguments"),
        ("trl:get_soft_overlong_punishment(max_len=3)", "cannot be called with the arguments given"),
        ("trl:get_soft_overlong_punishment(3, 4)", "accepted in parentheses are name=value"),
        ("trl:get_soft_overlong_punishment(max_completion_len=print(), soft_punish_cache=1)", "name=value with plain"),
        ("trl:absent.py:reward", "no file absent.py"),
        ("trl:absent.py", "names no function"),
        ("trl:rewards.base:absent", "rewards.base has no function 'absent'"),
        ("trl:rewards.base:Score(value=1.0)", "makes a Score, not a reward function"),
        ("verl:absent.py", "no file absent.py"),
        ("verl:rewards.base", "rewards.base has no function 'compute_score'"),
        ("openrlhf:rewards.base", "rewards.base has no function 'reward_func'"),
        ("openrlhf:rewards.base:as_score(verdict=1)", "takes no arguments"),
        ("verifiers:rewards.base", "neither load_environment"),
        ("verifiers:rewards.base:absent", "rewards.base has no function 'absent'"),
        ("verifiers:no-such-environment", "'no_such_environment' cannot be imported"),
        ("rg:chain_sums", "no data set 'chain_sums', perhaps chain_sum"),
    ],
)
def test_a_wrong_name_is_refused_in_one_sentence(name: str, words: str) -> None:
    with pytest.raises(ValueError, match=r"^(verifier|task\.dataset): ") as caught:
        VerifierSpec(name).load()
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, "import not_there.inside\n")
    with pytest.raises(
        ValueError, match=r"mine.py:f needs the package not-there, which is not .* pip install not-there"
    ):
        VerifierSpec(f"trl:{path}:f").load()
    monkeypatch.setitem(sys.modules, "trl.rewards", None)
    with pytest.raises(ValueError, match=r"^verifier: trl:accuracy_reward needs the package trl, .* pip install trl"):
        VerifierSpec("trl:accuracy_reward").load()


def test_paths_behind_a_prefix_are_found_beside_the_config(tmp_path: Path) -> None:
    write(tmp_path, "")
    base = {"name": "n", "model": {"source": "org/model"}, "optimizer": {"lr": 1}, "budget": {"generations": 1}}
    names = {
        "trl:mine.py:f": f"trl:{tmp_path}/mine.py:f",
        "trl:mine.py:f(x='b.py:g')": f"trl:{tmp_path}/mine.py:f(x='b.py:g')",
        "verl:mine.py": f"verl:{tmp_path}/mine.py",
        "verifiers:mine.py(n=1)": f"verifiers:{tmp_path}/mine.py(n=1)",
        "mine.py:f": f"{tmp_path}/mine.py:f",
        "trl:accuracy_reward": "trl:accuracy_reward",
        "verl:package.module:f": "verl:package.module:f",
    }
    for name, absolute in names.items():
        config = tmp_path / "config.yaml"
        config.write_text(json.dumps({**base, "task": {"verifier": name}}))
        assert load_config(config).task.verifier == absolute


# TRL.


def test_trl_rewards_score_what_trl_says() -> None:
    from trl import rewards

    completions = [[{"role": "assistant", "content": rollout.completion}] for rollout in (RIGHT, WRONG)]
    ids = [list(rollout.token_ids) for rollout in (RIGHT, WRONG)]
    solutions = [r"\frac{1}{3}"] * 2
    cosine = {"max_len": 10, "max_value_correct": 2.0}
    expected = {
        "accuracy_reward": rewards.accuracy_reward(completions, solutions),
        "reasoning_accuracy_reward": rewards.reasoning_accuracy_reward(completions, solutions),
        "think_format_reward": rewards.think_format_reward(completions),
        "get_soft_overlong_punishment(max_completion_len=5, soft_punish_cache=4)": (
            rewards.get_soft_overlong_punishment(5, 4)(ids)
        ),
        "get_repetition_penalty_reward()": rewards.get_repetition_penalty_reward()(ids),
        "get_cosine_scaled_reward(max_len=10, max_value_correct=2.0)": (
            rewards.get_cosine_scaled_reward(**cosine)(completions, solutions, ids)
        ),
    }
    for name, numbers in expected.items():
        assert len(set(numbers)) == 2, name
        assert values(f"trl:{name}", [RIGHT, WRONG]) == numbers, name
    options = {"max_completion_len": 5, "soft_punish_cache": 4}
    assert values("trl:get_soft_overlong_punishment", [RIGHT, WRONG], **options) == [-1.0, -0.75]
    assert values("trl:trl.rewards:think_format_reward", [RIGHT, WRONG]) == [1.0, 0.0]


def test_what_trl_skips_has_no_score() -> None:
    unknown = Rollout("", RIGHT.completion, "no formula", {}, CHAT)
    assert score_all("trl:accuracy_reward", [RIGHT, unknown]) == [Score(1.0), Score(None)]


TRL = """
import asyncio, math
import numpy as np

def seen(prompts, completions, completion_ids, solution, answer, level, trainer_state, log_extra, log_metric, **rest):
    assert trainer_state is None and rest == {}
    log_extra("level", level), log_metric("mean", 1.0)
    assert (prompts, completions) == (["2+2="] * 2, ["4"] * 2) and completion_ids == [[], []]
    return [float((s, a, l) == ("2*2", "4", 3)) for s, a, l in zip(solution, answer, level)]

def chat(prompts, completions, **columns):
    assert prompts == [[{"role": "user", "content": "What is 1/3?"}]] * len(completions)
    return [float(completion[0]["role"] == "assistant") for completion in completions]

def place(completions, **columns):
    lengths = [len(completion[0]["content"]) for completion in completions]
    return [sorted(lengths).index(length) for length in lengths]

def odd(completions, **columns):
    return [None, math.nan, np.float32(0.5), True, math.inf][: len(completions)]

async def later(completions, **columns):
    await asyncio.sleep(0)
    return [0.25] * len(completions)

def own_loop(completions, **columns):
    return asyncio.run(later(completions))

def short(completions, **columns):
    return []

class Longer:
    def __init__(self, than=3):
        self.than = than
    def __call__(self, completions, **columns):
        return [float(len(completion) > self.than) for completion in completions]

class Later(Longer):
    async def __call__(self, completions, **columns):
        return super().__call__(completions)

instance = Longer(0)
"""


def test_trl_functions_get_what_the_trainer_gives(tmp_path: Path) -> None:
    path = write(tmp_path, TRL)
    assert values(f"trl:{path}:seen", [PLAIN, PLAIN]) == [1.0, 1.0]
    assert values(f"trl:{path}:chat", [RIGHT, WRONG]) == [1.0, 1.0]
    assert values(f"trl:{path}:place", [RIGHT, WRONG]) == [1.0, 0.0]  # it sees the list


def test_trl_functions_may_be_async_and_objects(tmp_path: Path) -> None:
    path = write(tmp_path, TRL)
    assert values(f"trl:{path}:later", [RIGHT, WRONG]) == [0.25, 0.25]
    assert judge_now(VerifierSpec(f"trl:{path}:own_loop").load(), [RIGHT], asyncio.run) == [Score(0.25)]
    for name, value in {"Longer": 0.0, "Longer(than=0)": 1.0, "Later(than=0)": 1.0, "instance": 1.0}.items():
        assert values(f"trl:{path}:{name}", [PLAIN]) == [value], name


def test_none_and_nan_are_no_score_and_infinity_is_an_error(tmp_path: Path) -> None:
    path = write(tmp_path, TRL)
    *good, infinite = score_all(f"trl:{path}:odd", [PLAIN] * 5)
    assert good == [Score(None), Score(None), Score(0.5), Score(1.0)]
    assert infinite.value is None
    assert infinite.error is not None
    with pytest.raises(ValueError, match="returned 0 rewards for 1 completions"):
        values(f"trl:{path}:short", [PLAIN])


def test_rows_may_differ_in_their_fields(tmp_path: Path) -> None:
    path = write(
        tmp_path, "def f(completions, level, **columns):\n    return [-1 if l is None else l for l in level]\n"
    )
    assert values(f"trl:{path}:f", [RIGHT, PLAIN]) == [-1.0, 3.0]


# verl.

VERL = """
import asyncio, math

def compute_score(data_source, solution_str, ground_truth, extra_info=None, scale=1.0):
    return scale * (solution_str == ground_truth) + len(data_source) + len(extra_info)

def full(data_source, solution_str, ground_truth, extra_info):
    return {"score": 0.5, "acc": solution_str == ground_truth, "format": 0.1, "pred": "4", "bad": math.nan}

def batch(data_sources, solution_strs, ground_truths, extra_infos, scale=1.0):
    assert data_sources == [""] * len(solution_strs) and extra_infos == [{}] * len(solution_strs)
    scores = [scale * (s == g) for s, g in zip(solution_strs, ground_truths)]
    return [{"score": score, "length": len(solution_strs)} for score in scores]

async def later(data_source, solution_str, ground_truth, extra_info):
    await asyncio.sleep(0)
    return None if solution_str == "4" else math.nan

def wrong(**kwargs):
    return {"reward": 1}
"""


def test_verl_functions_score_what_verl_calls_them_for(tmp_path: Path) -> None:
    path = write(tmp_path, VERL)
    theirs = module_of(path)
    row = {"data_source": "gsm8k", "reward_model": {"ground_truth": "5", "style": "rule"}, "extra_info": {"split": "x"}}
    other = Rollout("2+3=", "5", "not this", row)
    expected = [theirs.compute_score("", "4", "4", {}), theirs.compute_score("gsm8k", "5", "5", {"split": "x"})]
    assert values(f"verl:{path}", [PLAIN, other]) == values(f"verl:{path}:compute_score", [PLAIN, other]) == expected
    assert values(f"verl:{path}(scale=3)", [PLAIN]) == [3.0]


def test_verl_results_may_have_further_numbers(tmp_path: Path) -> None:
    path = write(tmp_path, VERL)
    assert score_all(f"verl:{path}:full", [PLAIN]) == [Score(0.5, {"format": 0.1}, accuracy=1.0)]
    assert score_all(f"verl:{path}:batch(scale=2.0)", [PLAIN, RIGHT]) == [
        Score(2.0, {"length": 2.0}),
        Score(0.0, {"length": 2.0}),
    ]
    assert score_all(f"verl:{path}:later", [PLAIN, RIGHT]) == [Score(None), Score(None)]
    with pytest.raises(ValueError, match="returned reward without `score`"):
        score_all(f"verl:{path}:wrong", [PLAIN])


# OpenRLHF.

OPENRLHF = """
import torch

def reward_func(queries, prompts, labels):
    rewards = torch.tensor([float(query == prompt + label) for query, prompt, label in zip(queries, prompts, labels)])
    return {"rewards": rewards, "scores": rewards / 2, "extra_logs": {"length": [len(q) for q in queries],
            "all": torch.tensor(7.0), "text": "no number"}}

def bare(queries, prompts, labels):
    return reward_func(queries, prompts, labels)["rewards"]

def nothing(queries, prompts, labels):
    return [None] * len(queries)

def wrong(queries, prompts, labels):
    return torch.tensor(1.0)
"""


def test_openrlhf_functions(tmp_path: Path) -> None:
    path = write(tmp_path, OPENRLHF)
    other = Rollout("2+2=", "5", "4", {})
    assert score_all(f"openrlhf:{path}", [PLAIN, other]) == [
        Score(1.0, {"scores": 0.5, "length": 5.0, "all": 7.0}),
        Score(0.0, {"scores": 0.0, "length": 5.0, "all": 7.0}),
    ]
    theirs = module_of(path).bare(["2+2=4", "2+2=5"], ["2+2="] * 2, ["4"] * 2)
    assert values(f"openrlhf:{path}:bare", [PLAIN, other]) == theirs.tolist()
    assert values(f"openrlhf:{path}:nothing", [PLAIN]) == [None]
    with pytest.raises(ValueError, match="returned float for 1 completions"):
        values(f"openrlhf:{path}:wrong", [PLAIN])


# In a child process, as in a run.


def test_each_dialect_in_a_process_of_its_own(tmp_path: Path) -> None:
    async_trl = write(tmp_path, TRL, "trl_rewards.py")
    names: dict[str, tuple[Rollout, Score]] = {
        "trl:accuracy_reward": (RIGHT, Score(1.0)),
        f"trl:{async_trl}:later": (PLAIN, Score(0.25)),
        f"verl:{write(tmp_path, VERL, 'verl_rewards.py')}:full": (PLAIN, Score(0.5, {"format": 0.1}, accuracy=1.0)),
        f"openrlhf:{write(tmp_path, OPENRLHF, 'openrlhf_rewards.py')}:bare": (PLAIN, Score(1.0)),
    }
    for name, (rollout, expected) in names.items():
        with Scorer(VerifierSpec(name)) as scorer:
            scorer.submit(0, rollout)
            assert scorer.drain() == {0: expected}, name
            assert not scorer.failures


def test_numbers_of_other_libraries_are_numbers() -> None:
    import torch

    parts = {"a": np.int64(2), "b": torch.tensor(0.5), "c": "text", "d": math.nan}
    assert dialects.score(torch.tensor(1.5), parts) == Score(1.5, {"a": 2.0, "b": 0.5})
    assert dialects.score(torch.tensor(math.nan)) == Score(None)
