"""Games of several turns on workers: what is asked turn by turn, what a bad step costs, and what is kept."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from test_environments import saying

from es_engine.config import EsMethodConfig, parse_config
from es_engine.costs import Costs
from es_engine.evaluation import evaluate_center
from es_engine.ledger import Ledger
from es_engine.methods.es import EvolutionStrategies
from es_engine.trainer import train
from rewards.base import Example, Message, Score, VerifierSpec
from rewards.environments import (
    EnvironmentSpec,
    Trajectory,
    conversation,
    next_prompt,
    play,
    score_of,
    turn_of,
)
from rewards.guess import Guess
from workers.actor import Worker
from workers.calls import Call
from workers.chunks import Chunk, Outcomes, Problem, sampling_seed
from workers.engine import CENTER, Completion, Member, Request, Sampling, Vector
from workers.games import new_game, play_chunk
from workers.games import play as play_games
from workers.perturbation import Perturber
from workers.prompts import preparer
from workers.scoring import Scorer
from workers.simulated_engine import InlineScorer

RUN_SEED, GENERATION = 3, 5
PAIR = (Member(0, 1), Member(0, -1))
DIM = 8
ROOMY = 10_000


class Characters:
    """A tokenizer of characters."""

    chat_template = "one line a message"

    def __call__(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        text.encode()  # as a real one does
        return {"input_ids": [ord(character) for character in text]}

    def apply_chat_template(self, messages: Sequence[Message], **_: object) -> str:
        return "".join(f"{message['role']}: {message['content']}\n" for message in messages) + "assistant: "


PREPARE = preparer(Characters(), ROOMY, max_tokens=4)


class ScriptedEngine:
    """Says a number that depends on the slot's theta, the prompt and the seed; `calls` are the batches it was asked."""

    def __init__(self) -> None:
        self.calls: list[list[Request]] = []
        self.perturber = Perturber(RUN_SEED, DIM, cache_bytes=10**6)
        self.thetas: list[Vector] = []

    def set_center(self, theta: Vector) -> None:
        self.perturber.center = theta.copy()

    def write_slots(self, generation: int, sigma: float, members: Sequence[Member]) -> None:
        self.thetas = [self.perturber.theta(generation, sigma, member) for member in members]

    def prepare(self, *_: object) -> None:
        pass

    def noise_sum(self, *arguments: Any) -> Vector:
        return self.perturber.noise_sum(*arguments)

    def generate(self, requests: Sequence[Request], sampling: Sampling) -> Iterator[Completion]:
        assert sampling.samples == 1
        self.calls.append(list(requests))
        for number in reversed(range(len(requests))):
            text = self.said(requests[number])
            yield Completion(number, 0, text, (0,) * len(text), "stop")

    def said(self, request: Request) -> str:
        assert request.slot is not None
        key = f"{self.thetas[request.slot].tobytes().hex()}/{request.prompt_ids}/{request.seed}"
        return str(1 + hashlib.sha256(key.encode()).digest()[0] % 10)


def small_guess(**options: Any) -> Guess:
    return Guess(low=1, high=10, span=10, **options)


def problems_of(task: Guess, count: int) -> list[Problem]:
    return [PREPARE(task.example("train", number)) for number in range(count)]


def chunk_of(problems: int, samples: int = 2, members: Sequence[Member] = PAIR, keep_text: bool = False) -> Chunk:
    sampling = Sampling(4, samples, temperature=1.0)
    places = (tuple(range(problems)),) * len(members)
    return Chunk(GENERATION, 0, 0.1, tuple(members), places, sampling, keep_text)


def written_engine(members: Sequence[Member] = PAIR) -> ScriptedEngine:
    engine = ScriptedEngine()
    engine.set_center(np.ones(DIM, np.float32))
    engine.write_slots(GENERATION, 0.1, members)
    return engine


@pytest.fixture(scope="module")
def scorers() -> Iterator[dict[str, Scorer]]:
    """A scorer of guessing games for each template."""
    made = {template: Scorer(small_guess(template=template).verifier) for template in ("plain", "chat")}
    yield made
    for scorer in made.values():
        scorer.close()


# A chunk of games


@pytest.mark.parametrize("template", ["plain", "chat"])
def test_games_in_step_are_the_games_played_alone(scorers: dict[str, Scorer], template: Any) -> None:
    task, engine, chunk = small_guess(template=template), written_engine(), chunk_of(3)
    problems = problems_of(task, 3)
    found = play_chunk(engine, scorers[template], PREPARE, RUN_SEED, chunk, problems)
    assert len(found.rollouts) == 2 * 3 * 2
    lengths, tokens = [], 0
    for outcome in found.rollouts:
        slot, place = chunk.questions[outcome.question]
        game, read = alone(task, engine, slot, problems[place].example, outcome.sample)
        assert outcome.score == score_of(game)
        assert outcome.transcript.messages == game.messages
        assert outcome.transcript.text == conversation(problems[place].example, game)
        assert outcome.tokens == sum(len(message["content"]) for message in game.messages[1::2])
        lengths.append(game.turns)
        tokens += read
    assert found.prompt_tokens == tokens
    assert [len(call) for call in engine.calls] == [sum(n > turn for n in lengths) for turn in range(max(lengths))]
    assert {outcome.score.accuracy for outcome in found.rollouts} == {0.0, 1.0}
    assert not scorers[template].failures


def alone(task: Guess, engine: ScriptedEngine, slot: int, example: Example, sample: int) -> tuple[Trajectory, int]:
    """A game played by itself, and the tokens of its prompts."""
    read = 0

    def policy(messages: Sequence[Message]) -> str:
        nonlocal read
        problem = PREPARE(next_prompt(example, Trajectory(None, tuple(messages))))
        read += len(problem.prompt_ids)
        seed = sampling_seed(RUN_SEED, GENERATION, f"{example.id}/{sample}/{len(messages) // 2}")
        return engine.said(Request(slot, problem.prompt_ids, seed))

    return play(task.environment.load(), example, policy), read


def test_all_members_sample_alike_and_no_two_turns_do(scorers: dict[str, Scorer]) -> None:
    engine = written_engine()
    play_chunk(engine, scorers["chat"], PREPARE, RUN_SEED, chunk_of(3), problems_of(small_guess(), 3))
    seeds = [{slot: {each.seed for each in call if each.slot == slot} for slot in (0, 1)} for call in engine.calls]
    assert seeds[0][0] == seeds[0][1]
    assert all(turn[0] | turn[1] <= keyed_by_turn(number) for number, turn in enumerate(seeds))
    assert len(set.union(*(keyed_by_turn(number) for number in range(4)))) == 4 * 3 * 2


def test_a_game_that_a_batch_has_twice_is_played_otherwise_the_second_time(scorers: dict[str, Scorer]) -> None:
    engine = written_engine([CENTER])
    again = problems_of(small_guess(), 1) * 2
    play_chunk(engine, scorers["chat"], PREPARE, RUN_SEED, chunk_of(2, 2, [CENTER]), again)
    assert len({request.seed for request in engine.calls[0]}) == 2 * 2


def keyed_by_turn(turn: int) -> set[int]:
    names = [problem.example.id for problem in problems_of(small_guess(), 3)]
    return {sampling_seed(RUN_SEED, GENERATION, f"{name}/{sample}/{turn}") for name in names for sample in range(2)}


@pytest.mark.parametrize(("room", "turns"), [(9, 1), (10, 2)])
def test_a_game_without_room_for_its_next_prompt_ends_as_it_stands(
    scorers: dict[str, Scorer], room: int, turns: int
) -> None:
    """A turn adds a guess of one character and an observation of five; the next guess may have four."""
    opening = PREPARE(small_guess(template="plain").example("train", 0))
    prepare = preparer(Characters(), len(opening.prompt_ids) + room, max_tokens=4)
    engine = written_engine([CENTER])
    engine.said = lambda request: "x"  # type: ignore[method-assign]
    found = play_chunk(engine, scorers["plain"], prepare, RUN_SEED, chunk_of(1, 1, [CENTER]), [opening])
    (outcome,) = found.rollouts
    assert len(engine.calls) == turns
    assert outcome.truncated
    assert outcome.transcript.text == "x\n? 3:x\n? 2:"[: 6 * turns]
    assert outcome.score == Score(0.0, {"format": 0.0, "narrowed": 0.0, "solved": 0.0}, 0.0)


def test_what_ends_a_completion_counts_once_a_game(scorers: dict[str, Scorer]) -> None:
    endings = iter(["length", "length", "repetition", "stop"])
    game = new_game(PREPARE(small_guess(turns=4).example("train", 0)))

    def complete(live: Sequence[Any]) -> Iterator[Completion]:
        yield Completion(0, 0, "0", (1, 2), next(endings))

    with closing(Scorer(small_guess(turns=4).verifier)) as scorer:
        play_games([game], scorer, PREPARE, complete)
    outcome = game.outcome
    assert (outcome.truncated, outcome.looped, outcome.tokens) == (True, True, 8)


# Bad steps

HOSTILE = """
import os, signal, time
from rewards.environments import Turn

class Hostile:
    max_turns = 3

    def reset(self, example):
        if example.info.get("reset") == "raises":
            raise KeyError("no such opening")
        return {"id": example.id, "answer": example.answer, "chat": example.messages is not None, "heard": []}

    def step(self, state, completion):
        state = {**state, "heard": state["heard"] + [completion]}
        if len(state["heard"]) == 2:
            if completion == "hang":
                time.sleep(1000)
            if completion == "raise":
                raise KeyError("no such move")
            if completion == "die":
                os.kill(os.getpid(), signal.SIGSEGV)
            if completion == "deep":
                for _ in range(100_000):
                    state = [state]
            if completion == "nan":
                return Turn(state, "hm", {"talk": float("nan")})
            if completion == "number":
                return Turn(state, 5, {"talk": 0.1})
            if completion == "half":
                return Turn(state, "\\ud800", {"talk": 0.1})
            if completion == "tuple":
                return state, "hm"
        return Turn(state, "hm", {"talk": 0.1}, solved=len(state["heard"]) == 3)
"""
KINDS = {
    "hang": "timeout",
    "raise": "exception",
    "die": "died",
    "deep": "exception",
    "nan": "invalid value",
    "number": "invalid value",
    "half": "invalid value",
    "tuple": "exception",
}


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> EnvironmentSpec:
    path = tmp_path_factory.mktemp("environments") / "mine.py"
    path.write_text(HOSTILE)
    return EnvironmentSpec(f"{path}:Hostile")


@pytest.fixture(scope="module")
def hostile_scorer(hostile: EnvironmentSpec) -> Iterator[Scorer]:
    with Scorer(hostile.verifier, deadline=3.0) as scorer:
        yield scorer


def played(scorer: Scorer, completions: Sequence[str], row: dict[str, Any] | None = None) -> list[Any]:
    """The outcomes of games that each say the same again and again."""
    scorer.failures.clear()
    examples = [Example(text, "a", row or {}, prompt="go:") for text in completions]
    games = [new_game(PREPARE(example), number) for number, example in enumerate(examples)]

    def complete(live: Sequence[Any]) -> Iterator[Completion]:
        for number, game in enumerate(live):
            yield Completion(number, 0, completions[game.question], (1,), "stop")

    play_games(games, scorer, PREPARE, complete)
    return [game.outcome for game in games]


@pytest.mark.parametrize("completion", KINDS)
def test_a_bad_step_costs_its_game_once_and_no_other(hostile_scorer: Scorer, completion: str) -> None:
    first, bad, last = played(hostile_scorer, ["fine", completion, "well"])
    for good in (first, last):
        assert good.score == Score(pytest.approx(0.3), {"talk": pytest.approx(0.3)}, 1.0)
        assert len(good.transcript.messages) == 7
    assert bad.score.value is None
    assert bad.score.error
    assert bad.tokens == 2
    assert bad.transcript.text == f"{completion}hm{completion}"
    assert dict(hostile_scorer.failures) == {("turn", KINDS[completion]): 1}


def test_a_reset_that_raises_costs_its_game_too(hostile_scorer: Scorer) -> None:
    (bad,) = played(hostile_scorer, ["fine"], {"reset": "raises"})
    assert bad.score.error == "the verifier raised KeyError: 'no such opening'"
    assert dict(hostile_scorer.failures) == {("turn", "exception"): 1}


def test_a_forged_turn_is_none() -> None:
    for notes in ({}, {"state": "1", "observation": "a", "done": 1}, {"state": 1, "observation": "a", "done": True}):
        with pytest.raises(ValueError, match="environment: "):
            turn_of(Score(1.0, notes=notes))


# Workers


def build_worker(scorer: Any, index: int = 0) -> Worker:
    setup: Any = SimpleNamespace(config=SimpleNamespace(seed=RUN_SEED), adapted_parameters=100)
    worker = Worker(setup, index, None)
    worker._engine, worker._scorer, worker._prepare = ScriptedEngine(), scorer, PREPARE
    return worker


class Workers:
    """A pool of these workers, in this process; calls go to them in turn, the last call first."""

    def __init__(self, *workers: Worker) -> None:
        self.workers, self.size = workers, len(workers)

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        results = {}
        for number, call in reversed(list(enumerate(calls))):
            results[number] = getattr(self.workers[number % self.size], call.method)(*call.arguments)
        return [results[number] for number in range(len(calls))]


def test_a_worker_arranges_the_games_of_a_chunk(scorers: dict[str, Scorer]) -> None:
    worker, chunk, problems = build_worker(scorers["chat"]), chunk_of(3), problems_of(small_guess(), 3)
    result = worker.evaluate(chunk, problems, np.ones(DIM, np.float32), 0)
    found = play_chunk(written_engine(), scorers["chat"], PREPARE, RUN_SEED, chunk, problems)
    assert isinstance(found, Outcomes)
    for outcome in found.rollouts:
        where = (*divmod(outcome.question, 3), outcome.sample)
        assert result.rewards[where] == outcome.score.value
        assert result.accuracy[where] == outcome.score.accuracy
        assert {name: values[where] for name, values in result.components.items()} == outcome.score.components
        assert result.tokens[where] == outcome.tokens
    assert (result.prompt_tokens, result.failures, result.error) == (found.prompt_tokens, {}, None)
    assert result.transcripts is None
    assert result.seconds.keys() == {"slots", "generate", "score"}
    assert min(result.seconds.values()) > 0
    generated = sum(outcome.tokens for outcome in found.rollouts)
    processed = found.prompt_tokens + generated
    assert result.costs == Costs(generated, processed, 2 * 100 * processed, sum(result.seconds.values()))


def test_samples_hold_the_trajectory(scorers: dict[str, Scorer]) -> None:
    task = small_guess()
    pool, theta = Workers(build_worker(scorers["chat"])), np.ones(DIM, np.float32)
    evaluation = evaluate_center(pool, theta, 0, problems_of(task, 3), Sampling(4, 2, 1.0), chunk=2)
    rows: list[dict[str, Any]] = json.loads(json.dumps(evaluation.samples))
    assert len(rows) == 6
    for row, number in zip(rows, np.repeat(range(3), 2), strict=True):
        example = task.example("train", int(number))
        said = [message["content"] for message in row["messages"][1::2]]
        game = play(task.environment.load(), example, saying(*said))
        assert row["messages"] == list(game.messages)
        assert row["completion"] == "\n".join(message["content"] for message in game.messages[1:])
        assert (row["reward"], row["accuracy"]) == (score_of(game).value, score_of(game).accuracy)
        assert "notes" not in row


def test_who_plays_which_games_changes_nothing(scorers: dict[str, Scorer]) -> None:
    es = EvolutionStrategies(EsMethodConfig(population=8, prompts=3, sigma=0.1), chunk=2, sampling=Sampling(4))
    theta, problems = np.ones(DIM, np.float32), problems_of(small_guess(), 3)
    found = []
    for count in (1, 2, 3):
        pool = Workers(*(build_worker(scorers["chat"], index) for index in range(count)))
        estimate = es.estimate(pool, theta, 0, problems, 0, 0.1, len(theta))
        assert estimate.direction is not None
        record = {key: value for key, value in estimate.record.items() if key not in ("times", "workers")}
        found.append((estimate.direction.tobytes(), record))
    assert found[0] == found[1] == found[2]


def test_an_environment_that_fails_in_most_games_ends_the_run(hostile_scorer: Scorer) -> None:
    hostile_scorer.failures.clear()
    es = EvolutionStrategies(EsMethodConfig(population=4, prompts=3, sigma=0.1), chunk=2, sampling=Sampling(4))
    problems = [PREPARE(Example(str(number), "", {"reset": "raises"}, prompt="go:")) for number in range(3)]
    sentence = r"^task: 12 of 12 rollouts could not be scored \(turn: exception 12\); one error: .*no such opening"
    with pytest.raises(ValueError, match=sentence):
        es.estimate(Workers(build_worker(hostile_scorer)), np.ones(DIM, np.float32), 0, problems, 0, 0.1, DIM)


def test_samples_of_one_turn_hold_the_notes_of_the_verifier(tmp_path: Path) -> None:
    (tmp_path / "mine.py").write_text(
        "from rewards.base import Score\n\ndef noted(rollout):\n"
        "    return Score(0.5, notes={'read': rollout.completion} if rollout.answer == '0' else {})\n"
    )
    worker = build_worker(InlineScorer(VerifierSpec(f"{tmp_path / 'mine.py'}:noted")))
    worker._prepare = None
    problems = [PREPARE(Example(str(number), str(number), {}, prompt="go:")) for number in range(2)]
    noted, bare = evaluate_center(Workers(worker), np.ones(DIM, np.float32), 0, problems, Sampling(4), 2).samples
    assert noted["completion"]
    assert noted["notes"] == {"read": noted["completion"]}
    assert not {"notes", "messages"} & bare.keys()


# Whole runs


def run_config(model: Path, **fields: Any) -> Any:
    config: dict[str, Any] = {
        "name": "guessing",
        "model": {"source": str(model)},
        "space": {"rank": 4, "alpha": 8.0},
        "method": {"population": 8, "sigma": 0.3, "prompts": 4, "temperature": 1.0},
        "optimizer": {"kind": "adam", "lr": 0.1},
        "task": {"kind": "guess", "template": "plain", "high": 9, "span": 9, "turns": 3, "max_tokens": 1},
        "pool": {"workers": 1},
        "engine": {"kind": "vllm", "dtype": "float32", "chunk": 4, "max_model_len": 64, "kv_cache_gib": 0.0625},
        "budget": {"generations": 2},
        "evaluation": {"every": 2, "problems": 8, "chunk": 8},
    }
    return parse_config(config | fields)


@pytest.mark.vllm
@pytest.mark.ray
def test_a_run_of_games_on_real_engines(random_llama: Path, tmp_path: Path) -> None:
    """The first evaluation, greedy and of the same theta, is the same game for game in vLLM and in transformers."""
    hf = {"kind": "hf", "dtype": "float32", "chunk": 4}
    runs = {
        "vllm": train(run_config(random_llama), tmp_path / "vllm"),
        "hf": train(run_config(random_llama, engine=hf, budget={"generations": 1}), tmp_path / "hf"),
    }
    rows = {
        name: [json.loads(line) for line in run.folder.samples_file(0).read_text().splitlines()]
        for name, run in runs.items()
    }
    assert rows["vllm"] == rows["hf"]
    assert all(3 <= len(row["messages"]) <= 7 for row in rows["vllm"])
    for run in runs.values():
        for line in Ledger(run.folder.ledger_file).generations:
            assert line["moves"]
            assert line["failures"] == {}
            assert 8 * 4 < line["tokens"] <= 8 * 4 * 3
            assert set(line["components"]) == {"format", "narrowed", "solved"}
