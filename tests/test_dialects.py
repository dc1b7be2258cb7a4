"""Rewards written for TRL, verl, OpenRLHF and verifiers score here what they score there."""

from __future__ import annotations

import asyncio
import importlib.util
import inspect
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from es_engine.config import load_config
from rewards import dialects
from rewards.base import Rollout, Score, VerifierSpec, judge_now
from workers.scoring import Scorer

CHAT = ({"role": "user", "content": "What is 1/3?"},)
RIGHT = Rollout(
    "<user>What is 1/3?", r"<think>x</think> \boxed{\frac{1}{3}}", r"\frac{1}{3}", {}, CHAT, (5, 6, 5, 6, 5)
)
WRONG = Rollout("<user>What is 1/3?", r"so \boxed{\frac{1}{2}}", r"\frac{1}{3}", {}, CHAT, (1, 2, 3, 4))
PLAIN = Rollout("2+2=", "4", "4", {"solution": "2*2", "level": 3})


def write(folder: Path, source: str, name: str = "mine.py") -> Path:
    path = folder / name
    path.write_text(source)
    return path


def score_all(name: str, rollouts: Sequence[Rollout], **options: Any) -> list[Score]:
    """The scores of a batch, which are those of its rollouts one by one wherever the reward compares none."""
    made = dialects.load_batch(name, options)(rollouts)
    return asyncio.run(_result(made)) if inspect.isawaitable(made) else made


async def _result(scores: Any) -> Any:
    return await scores


def values(name: str, rollouts: Sequence[Rollout], **options: Any) -> list[float | None]:
    return [score.value for score in score_all(name, rollouts, **options)]


def module_of(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("theirs", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


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


# verifiers, up to 0.1.

ENVIRONMENT = r"""
import verifiers as vf
from datasets import Dataset

def format_reward(completion, parser):
    return 0.5 if parser.parse_answer(completion) else 0.0

async def right(parser, completion, answer, info, task, **kwargs):
    return float(parser.parse_answer(completion) == answer and info.get("unit", "m") == "m" and task == "sums")

def one_turn(state):
    step, = state["trajectory"]
    return float(state["is_completed"] and step["completion"] == state["completion"] and state["lives"] == 3)

def share(completions, **kwargs):
    return [1 / len(completions)] * len(completions)

class Game(vf.MultiTurnEnv):
    async def setup_state(self, state):
        state["lives"] = 3
        return state

    async def env_response(self, messages, state):
        return []

def load_environment(tag="answer", message_type="chat"):
    parser = vf.XMLParser([tag], answer_field=tag)
    rubric = vf.RubricGroup([
        vf.Rubric([right, format_reward], weights=[1.0, 0.2], parser=parser), vf.Rubric([one_turn], weights=[0.1]),
        vf.Rubric([share], weights=[0.01])])
    data = Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1"}], "answer": "2"}])
    return Game(dataset=data, rubric=rubric, parser=parser, env_id="sums")
"""


def test_an_environment_of_verifiers_scores_as_a_group(tmp_path: Path) -> None:
    import verifiers

    path = write(tmp_path, ENVIRONMENT)
    rollouts = [Rollout("", f"<answer>{digit}</answer>", "2", {"info": {"unit": "m"}}, CHAT) for digit in "2345"]
    rollouts[3] = Rollout("What is 1+1?", "3", "2", {})  # no chat, where the environment wants one
    scored = score_all(f"verifiers:{path}", rollouts)
    assert [score.value for score in scored] == pytest.approx([1.2025, 0.2025, 0.2025, 0.1025])
    metrics = {"right": 1.0, "format_reward": 0.5, "one_turn": 1.0, "share": 0.25, "num_turns": 1.0}
    assert scored[0].components == metrics
    assert score_all(f"verifiers:{path}(tag='other')", rollouts[:1])[0].components["right"] == 0.0

    environment = module_of(path).load_environment()
    completion = [{"role": "assistant", "content": rollouts[0].completion}]
    step = {"completion": completion, "reward": None, "advantage": None}
    state = verifiers.State(
        input={"prompt": list(CHAT), "answer": "2", "task": "sums", "info": {"unit": "m"}, "example_id": 0},
        completion=completion, trajectory=[step], is_completed=True, lives=3, timing={"scoring_ms": 0, "total_ms": 0},
    )  # fmt: skip
    asyncio.run(environment.rubric.score_group([state]))
    assert score_all(f"verifiers:{path}", rollouts[:1])[0].value == pytest.approx(state["reward"])


def test_the_rubrics_of_the_package_itself(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "import verifiers as vf\nfrom datasets import Dataset\ndef load_environment():\n"
        "    return vf.SingleTurnEnv(dataset=Dataset.from_list([{'question': 'q', 'answer': 'a'}]),"
        " rubric=vf.MathRubric())\n",
    )
    scored = score_all(f"verifiers:{path}", [RIGHT, WRONG])
    assert [score.value for score in scored] == [1.0, 0.0]
    assert scored[0].components == {"correct_answer": 1.0, "num_turns": 1.0}


def test_one_function_of_a_rubric(tmp_path: Path) -> None:
    path = write(
        tmp_path,
        "def bare(completion, answer):\n    return float(completion == answer)\n"
        "async def everything(prompt, completion, answer, state, info, task, **rest):\n"
        "    assert rest == {} and state['prompt'] == prompt and len(state['trajectory']) == 1\n"
        "    return float((info['level'], task) == (3, 'default'))\n"
        "def parsed(parser, completion):\n    return len(parser.parse_answer(completion))\n"
        "def group(prompts, answers):\n    return [float(len(prompts))] * len(answers)\n"
        "def nothing(state):\n    return None\n"
        "def fails(info):\n    return info['absent']\n",
    )
    assert values(f"verifiers:{path}:bare", [PLAIN, RIGHT]) == [1.0, 0.0]
    assert values(f"verifiers:{path}:everything", [PLAIN]) == [1.0]
    assert values(f"verifiers:{path}:parsed", [PLAIN, RIGHT]) == [1.0, float(len(RIGHT.completion))]
    assert values(f"verifiers:{path}:group", [PLAIN, PLAIN]) == [2.0, 2.0]
    assert values(f"verifiers:{path}:nothing", [PLAIN]) == [None]
    with pytest.raises(KeyError):
        values(f"verifiers:{path}:fails", [PLAIN])


# verifiers 0.4, which does not install here: its decorators and classes, as far as a task's author sees them.

TASKS = """
from types import SimpleNamespace

def mark(weight=1.0, priority=0):
    def decorator(function):
        function.reward, function._vf_weight, function.reward_priority = True, weight, priority
        return function
    return decorator

class Data(SimpleNamespace):
    @classmethod
    def model_validate(cls, fields):
        return cls(**{name: fields[name] for name in ("prompt", "answer", "level")})

class Task:
    def __init__(self, data):
        self.data = data

    @classmethod
    def data_type(cls):
        return Data

class Sums(Task):
    @mark(weight=0.5)
    async def correct(self, trace):
        return float(trace.last_reply == self.data.answer)

    @mark(weight=2.0, priority=1)
    async def style(self, task, trace, runtime=None):
        assert task is self.data and runtime is None and trace.num_turns == 1 and not trace.is_truncated
        said = [message.content for message in trace.assistant_messages]
        return {"short": float(len(said[0]) < 3), "level": task.level}

    async def no_reward(self, trace):
        raise AssertionError

class Boxed(Task):
    @mark()
    async def run(self, trace, runtime):
        return 1.0

class Sandboxless(Sums):
    async def correct(self, trace):
        raise AssertionError("an override without the mark is no reward")

class Taskset:
    @classmethod
    def task_type(cls):
        return Sums

async def plugged(task, trace):
    return float(trace.messages[0].content == task.prompt and trace.transcript.endswith(task.answer))

__all__ = ["Taskset"]
"""


def test_tasks_of_verifiers_04(tmp_path: Path) -> None:
    path = write(tmp_path, TASKS)
    terms = {"short": 2.0, "level": 6.0, "correct": 0.5}
    wrong = Rollout("2+2=", "5000", "4", {"level": 0})
    for name in ("", ":Sums"):
        scored = score_all(f"verifiers:{path}{name}", [PLAIN, wrong])
        assert scored == [Score(8.5, terms), Score(0.0, dict.fromkeys(terms, 0.0))]
    assert score_all(f"verifiers:{path}:Sandboxless", [PLAIN])[0].value == 8.0
    assert values(f"verifiers:{path}:plugged", [PLAIN]) == [1.0]
    with pytest.raises(ValueError, match=r"the reward run of .* needs a sandbox"):
        VerifierSpec(f"verifiers:{path}:Boxed").load()
    with pytest.raises(ValueError, match=r"the task Task of .* has no method marked @reward"):
        VerifierSpec(f"verifiers:{path}:Task").load()


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
    environment = write(tmp_path, ENVIRONMENT, "environment.py")
    with Scorer(VerifierSpec(f"verifiers:{environment}")) as scorer:
        scorer.submit(0, Rollout("", "<answer>2</answer>", "2", {"info": {}}, CHAT))
        scorer.submit(1, Rollout("", "<answer>2</answer>", "2", {"info": None}, CHAT))
        scored = scorer.drain()
    assert scored[0].value == pytest.approx(1.21)
    assert scored[1].value == pytest.approx(0.21)  # the rubric itself counts a function that raises as 0


def test_numbers_of_other_libraries_are_numbers() -> None:
    import torch

    parts = {"a": np.int64(2), "b": torch.tensor(0.5), "c": "text", "d": math.nan}
    assert dialects.score(torch.tensor(1.5), parts) == Score(1.5, {"a": 2.0, "b": 0.5})
    assert dialects.score(torch.tensor(math.nan)) == Score(None)
