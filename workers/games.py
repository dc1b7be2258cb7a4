"""Games of several turns, all of a chunk in step: a turn is one engine call for all games that are not over.

The environment runs where verifiers do. A step that it does not survive, or that takes too long, ends that game without
a score; a game whose next prompt no longer fits the context ends as it stands.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from rewards.base import Rollout, Score
from rewards.environments import (
    Trajectory,
    after,
    announce,
    broken_off,
    conversation,
    next_prompt,
    score_of,
    turn_of,
    turn_rollout,
)
from workers.chunks import Chunk, Outcome, Outcomes, Problem, Transcript, rollout_of, sampling_keys, sampling_seed
from workers.engine import Completion, PopulationEngine, Request
from workers.prompts import Preparer, PromptTooLong
from workers.scoring import Scorer


@dataclass(slots=True)
class Game:
    """A game of a problem and what it took so far. `asked` is its latest prompt; once it is over, it has a score."""

    problem: Problem
    question: int
    sample: int
    asked: Problem
    trajectory: Trajectory
    score: Score | None = None
    tokens: int = 0
    prompt_tokens: int = 0
    truncated: bool = False
    looped: bool = False

    @property
    def outcome(self) -> Outcome:
        """What came of it."""
        assert self.score is not None, "the game is not over"
        text = conversation(self.problem.example, self.trajectory)
        return Outcome(
            question=self.question,
            sample=self.sample,
            score=self.score,
            tokens=self.tokens,
            truncated=self.truncated,
            looped=self.looped,
            transcript=Transcript(text, messages=self.trajectory.messages),
        )


def new_game(problem: Problem, question: int = 0, sample: int = 0) -> Game:
    """The game of a problem before its first turn."""
    return Game(problem, question, sample, problem, announce(problem.example))


def play_chunk(
    engine: PopulationEngine,
    scorer: Scorer,
    prepare: Preparer,
    run_seed: int,
    chunk: Chunk,
    batch: Sequence[Problem],
) -> Outcomes:
    """Play n games of each of a chunk's questions. What is sampled is keyed by generation, problem, sample and turn,
    the same for every member."""
    asked, keys = chunk.questions, sampling_keys(batch)
    games = [
        new_game(batch[place], question, sample)
        for question, (_, place) in enumerate(asked)
        for sample in range(chunk.sampling.samples)
    ]
    sampling = replace(chunk.sampling, samples=1)

    def request(game: Game) -> Request:
        key = f"{keys[asked[game.question][1]]}/{game.sample}/{game.trajectory.turns}"
        seed = sampling_seed(run_seed, chunk.generation, key)
        return Request(asked[game.question][0], game.asked.prompt_ids, seed)

    waited = play(games, scorer, prepare, lambda live: engine.generate([request(game) for game in live], sampling))
    return Outcomes([game.outcome for game in games], sum(game.prompt_tokens for game in games), waited)


def play(
    games: Sequence[Game],
    scorer: Scorer,
    prepare: Preparer,
    complete: Callable[[Sequence[Game]], Iterable[Completion]],
) -> float:
    """Play games to their ends. Each turn, `complete` completes what all live games are asked, in any order; a game
    takes its step as soon as its completion is there. Returns the seconds spent waiting for the last steps of turns."""
    waited = 0.0
    live = list(games)
    while live:
        said: dict[int, Completion] = {}
        for completion in complete(live):
            number = completion.request
            said[number] = completion
            scorer.submit_group([number], [_turn(live[number], completion)])
        generated = time.perf_counter()
        scores = scorer.drain()
        waited += time.perf_counter() - generated
        for number, game in enumerate(live):
            _count(game, said[number])
            _go_on(game, said[number].text, scores[number], scorer, prepare)
        live = [game for game in live if game.score is None]
    return waited


def _turn(game: Game, completion: Completion) -> Rollout:
    return turn_rollout(rollout_of(game.asked, completion), game.problem.example.id, game.trajectory)


def _count(game: Game, completion: Completion) -> None:
    game.tokens += len(completion.token_ids)
    game.prompt_tokens += len(game.asked.prompt_ids)
    game.truncated |= completion.finish_reason == "length"
    game.looped |= completion.finish_reason == "repetition"


def _go_on(game: Game, completion: str, score: Score, scorer: Scorer, prepare: Preparer) -> None:
    """Take in the score of a turn: the game goes on to its next prompt, or is over."""
    if score.value is not None:
        try:
            game.trajectory = after(game.trajectory, completion, turn_of(score))
        except ValueError as error:  # what a model wrote may have got the better of the environment's process
            scorer.failures["turn", "invalid value"] += 1
            score = Score(None, error=str(error))
    if score.value is None:
        game.trajectory, game.score = broken_off(game.trajectory, completion), score
    elif game.trajectory.done or not _ask(game, prepare):
        game.score = score_of(game.trajectory)


def _ask(game: Game, prepare: Preparer) -> bool:
    """Give a game its next prompt; False where there is no room for it."""
    try:
        game.asked = prepare(next_prompt(game.problem.example, game.trajectory))
    except PromptTooLong:
        game.truncated = True
        return False
    return True
