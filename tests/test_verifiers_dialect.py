"""Environments, rubrics and tasks written for verifiers score here what they score there."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest
from foreign_rewards import CHAT, PLAIN, RIGHT, WRONG, module_of, score_all, values, write

from rewards.base import Rollout, Score, VerifierSpec
from workers.scoring import Scorer

# Up to 0.1.

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


# 0.4, which does not install here: its decorators and classes, as far as a task's author sees them.

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


def test_an_environment_in_a_process_of_its_own(tmp_path: Path) -> None:
    environment = write(tmp_path, ENVIRONMENT, "environment.py")
    with Scorer(VerifierSpec(f"verifiers:{environment}")) as scorer:
        scorer.submit(0, Rollout("", "<answer>2</answer>", "2", {"info": {}}, CHAT))
        scorer.submit(1, Rollout("", "<answer>2</answer>", "2", {"info": None}, CHAT))
        scored = scorer.drain()
    assert scored[0].value == pytest.approx(1.21)
    assert scored[1].value == pytest.approx(0.21)  # the rubric itself counts a function that raises as 0
