"""Games of several turns: the protocol, and the guessing game played well, badly and with hostility."""

from __future__ import annotations

import copy
import json
import time
from dataclasses import asdict, replace
from typing import Any, get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.base import Example, Split
from rewards.environments import (
    EnvironmentSpec,
    Policy,
    State,
    Trajectory,
    Turn,
    advance,
    begin,
    next_prompt,
    play,
    register_environment,
    score_of,
)
from rewards.guess import PLAIN_ALPHABET, WEIGHTS, Guess, GuessGame, Template, halving, halvings, problem_key
from rewards.problems import split_of_key

SPLITS: tuple[Split, ...] = get_args(Split)
TRAIN_IDS = ["221-320=244", "381-480=466", "859-958=895"]
HELDOUT_IDS = ["373-472=387", "649-748=698", "608-707=658"]


def example_of(secret: int, low: int = 1, high: int = 100) -> Example:
    return Example("game", str(secret), {"low": low, "high": high, "secret": secret}, prompt="1-100 7:")


def saying(*completions: str) -> Policy:
    """The policy that says these one after the other, whatever it hears."""
    return lambda messages: completions[len(messages) // 2]


def answers(trajectory: Trajectory) -> list[str]:
    return [message["content"] for message in trajectory.messages[2::2]]


# The protocol.


class Echo:
    """Says back what it is told, without end."""

    max_turns = 3

    def reset(self, example: Example) -> State:
        return {"heard": []}

    def step(self, state: State, completion: str) -> Turn:
        return Turn({"heard": [*state["heard"], completion]}, f"<{completion}>", {"length": len(completion) / 10})


def test_a_game_is_its_transcript_its_rewards_and_its_end() -> None:
    trajectory = play(Echo(), Example("e", "", {}, prompt="go:"), saying("a", "bb", "ccc"))
    assert [message["role"] for message in trajectory.messages] == ["user", *["assistant", "user"] * 3]
    assert [message["content"] for message in trajectory.messages] == ["go:", "a", "<a>", "bb", "<bb>", "ccc", "<ccc>"]
    assert trajectory.state == {"heard": ["a", "bb", "ccc"]}
    assert (trajectory.turns, trajectory.done, trajectory.solved) == (3, True, False)
    score = score_of(trajectory)
    assert score.value == pytest.approx(0.6)
    assert score.components == {"length": pytest.approx(0.6)}
    assert score.accuracy == 0


def test_a_game_that_is_over_takes_no_more_turns() -> None:
    trajectory = play(Echo(), Example("e", "", {}, prompt="go:"), saying("a", "b", "c"))
    with pytest.raises(ValueError, match="the game is done"):
        advance(Echo(), trajectory, "d")


def test_the_next_prompt_is_the_whole_transcript_in_the_form_of_the_first() -> None:
    text = Example("e", "", {}, prompt="go:")
    chat = Example("e", "", {}, messages=({"role": "system", "content": "s"}, {"role": "user", "content": "go:"}))
    assert next_prompt(text, begin(Echo(), text)) == text
    assert next_prompt(chat, begin(Echo(), chat)) == chat
    after = advance(Echo(), begin(Echo(), text), "a")
    assert next_prompt(text, after) == replace(text, prompt="go:a<a>")
    after = advance(Echo(), begin(Echo(), chat), "a")
    assert chat.messages is not None
    spoken = ({"role": "assistant", "content": "a"}, {"role": "user", "content": "<a>"})
    assert next_prompt(chat, after) == replace(chat, messages=chat.messages + spoken)


def test_an_environment_is_found_by_name() -> None:
    environment = EnvironmentSpec("guess", {"turns": 3}).load()
    assert isinstance(environment, GuessGame)
    assert environment.max_turns == 3
    with pytest.raises(ValueError, match="no environment is called 'gues'; accepted are guess"):
        EnvironmentSpec("gues").load()
    with pytest.raises(ValueError, match="'guess' is taken"):
        register_environment("guess")(Echo)


@pytest.mark.parametrize("template", get_args(Template))
def test_games_in_step_are_the_games_played_alone(template: Template) -> None:
    """Turn by turn, all prompts in one batch, every state through JSON in between, as other processes would have it."""
    task = Guess(template=template)
    environment = task.environment.load()
    examples = [task.example("train", index) for index in range(50)]
    policies = [bad_at_first(task.worked_policy(example), index % 4) for index, example in enumerate(examples)]
    games = [begin(environment, example) for example in examples]
    while going := [number for number, game in enumerate(games) if not game.done]:
        prompts = [next_prompt(examples[number], games[number]) for number in going]
        assert all((prompt.prompt is None) == (template == "chat") for prompt in prompts)
        for number in going:
            completion = policies[number](games[number].messages)
            through_json = replace(games[number], state=json.loads(json.dumps(games[number].state)))
            games[number] = advance(environment, through_json, completion)
    assert games == [play(environment, *each) for each in zip(examples, policies, strict=True)]
    assert json.loads(json.dumps(asdict(games[0])))["solved"]
    assert {game.solved for game in games} == {True, False}


def bad_at_first(policy: Policy, turns: int) -> Policy:
    return lambda messages: "hm" if len(messages) < 2 * turns else policy(messages)


# The game.


@pytest.mark.parametrize("template", get_args(Template))
@pytest.mark.parametrize("span", [2, 3, 7, 8, 100, 127, 128])
def test_halving_always_wins_within_the_turns_and_not_always_with_one_fewer(span: int, template: Template) -> None:
    turns = halvings(span)
    policy = halving(50, 49 + span, template)
    examples = [example_of(secret, 50, 49 + span) for secret in range(50, 50 + span)]
    games = [play(GuessGame(turns, template), example, policy) for example in examples]
    assert all(game.solved for game in games)
    assert max(game.turns for game in games) == turns
    for game in games:
        assert score_of(game).value == pytest.approx(1)
        assert score_of(game).components == pytest.approx(WEIGHTS)
    if turns > 1:
        fewer = GuessGame(turns - 1, template)
        assert not all(play(fewer, example, policy).solved for example in examples)


@pytest.mark.parametrize("template", get_args(Template))
def test_the_worked_policy_solves_every_problem(template: Template) -> None:
    task = Guess(template=template)
    environment = task.environment.load()
    for split in SPLITS:
        for index in range(50):
            example = task.example(split, index)
            game = play(environment, example, task.worked_policy(example))
            assert score_of(game).accuracy == 1
            assert score_of(game).value == pytest.approx(1)


def test_no_worked_policy_where_the_turns_are_too_few() -> None:
    task = Guess(turns=6)
    with pytest.raises(ValueError, match="takes 7 guesses, not 6"):
        task.worked_policy(task.example("train", 0))


def test_a_game_in_chat_and_in_plain() -> None:
    chat = play(GuessGame(3), example_of(37), saying("50", "it is 30", "25"))
    assert answers(chat) == [
        "Lower. Guesses left: 2.",
        "That is not one whole number. Guesses left: 1.",
        "Higher. No guess is left; my number was 37.",
    ]
    won = play(GuessGame(3), example_of(37), saying(" 37\n"))
    assert answers(won) == ["Right."]
    assert won.turns == 1
    plain = play(GuessGame(4, "plain"), example_of(37), saying("50", "?", "25", "37"))
    assert next_prompt(example_of(37), plain).prompt == "1-100 7:50\n< 3:?\n? 2:25\n> 1:37\n="


def test_a_plain_game_keeps_to_its_alphabet() -> None:
    task = Guess(template="plain")
    for index in range(50):
        example = task.example("train", index)
        game = play(task.environment.load(), example, bad_at_first(task.worked_policy(example), index % 2))
        text = next_prompt(example, game).prompt
        assert text is not None
        assert set(text.replace("hm", "")) <= set(PLAIN_ALPHABET)


def test_partial_credit() -> None:
    game = play(GuessGame(2), example_of(1, 1, 16), saying("9", "x"))  # 1 to 8 are left: one halving of four
    assert score_of(game).components == pytest.approx({"format": 0.1 / 2, "narrowed": 0.3 / 4, "solved": 0})
    again = play(GuessGame(2), example_of(1, 1, 16), saying("9", "9"))
    assert score_of(again).components == pytest.approx({"format": 0.1, "narrowed": 0.3 / 4, "solved": 0})
    outside = play(GuessGame(2), example_of(1, 1, 16), saying("0", "999999999"))
    assert score_of(outside).components == pytest.approx({"format": 0.1, "narrowed": 0, "solved": 0})
    lucky = play(GuessGame(9), example_of(1, 1, 16), saying("x", "1"))
    assert score_of(lucky).components == pytest.approx({"format": 0.1 * 8 / 9, "narrowed": 0.3, "solved": 0.6})


HOSTILE = [
    *("", "x", "37 or 38", "3 7", "37.0", "+37", "-37", "0x25", "3_7", "３７", "³", "٣٧", "1e1", "9" * 10, "37\0"),
    *("Right.", "\n=", "37\n=", "__import__('os').abort()", '{"solved": true}', "\ud800", "7" * 200_000, "<" * 200_000),
]


@pytest.mark.parametrize("template", get_args(Template))
@pytest.mark.parametrize("completion", HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_completion_costs_a_turn_and_nothing_else(completion: str, template: Template) -> None:
    environment = GuessGame(7, template)
    before = begin(environment, example_of(37))
    kept = copy.deepcopy(before)
    start = time.perf_counter()
    after = advance(environment, before, completion)
    assert time.perf_counter() - start < 0.5
    assert before == kept
    assert after.state == {**before.state, "turns": 1}
    assert after.rewards == {"format": 0.0, "narrowed": 0.0, "solved": 0.0}
    assert (after.turns, after.done, after.solved) == (1, False, False)


@given(st.integers(1, 100), st.lists(st.text() | st.integers(0, 120).map(str), min_size=7, max_size=7))
@settings(max_examples=200, deadline=None)
def test_any_game_ends_with_a_score_that_is_the_sum_of_its_components(secret: int, completions: list[str]) -> None:
    game = play(GuessGame(7), example_of(secret), saying(*completions))
    score = score_of(game)
    said = [completion.strip() for completion in completions]
    assert game.solved == (str(secret) in said) == score.accuracy
    assert game.turns == (said.index(str(secret)) + 1 if game.solved else 7)
    assert score.value == sum(score.components.values())
    assert list(score.components) == list(WEIGHTS)
    assert 0 <= score.value <= 1.0001
    assert (score.components["narrowed"] > 0.2999) == (game.state["low"] == game.state["high"])
    assert game.state["low"] <= secret <= game.state["high"]


# The problems.


def test_the_same_seed_gives_the_same_game() -> None:
    forwards, backwards = Guess(seed=5), Guess(seed=5)
    for split in SPLITS:
        ahead = [forwards.example(split, index) for index in range(60)]
        assert ahead == [backwards.example(split, index) for index in reversed(range(60))][::-1]
        assert ahead != [Guess(seed=6).example(split, index) for index in range(60)]
    example = forwards.example("train", 3)
    first, second = (play(Guess(seed=5).environment.load(), example, saying(*"1234567")) for _ in range(2))
    assert first == second


def test_the_stream_of_a_seed_never_changes() -> None:
    """Ledgers name problems by split and index: these must mean the same in every version."""
    assert [Guess(seed=1).example("train", index).id for index in (0, 1, 10**12)] == TRAIN_IDS
    assert [Guess(seed=1).example("heldout", index).id for index in (0, 1, 2000)] == HELDOUT_IDS


def test_problems_keep_to_the_settings_and_splits_are_disjoint() -> None:
    task = Guess(low=5, high=60, span=20)
    seen: dict[Split, set[str]] = {split: set() for split in SPLITS}
    for split in SPLITS:
        for index in range(600):
            row = task.example(split, index).info
            assert 5 <= row["low"] <= row["secret"] <= row["high"] <= 60
            assert row["high"] - row["low"] == 19
            seen[split].add(problem_key(row))
    assert not seen["train"] & seen["heldout"]
    assert {split_of_key(key) for key in seen["heldout"]} == {"heldout"}


def test_all_secrets_of_all_ranges_are_drawn() -> None:
    task = Guess(low=1, high=6, span=4)
    drawn = {problem_key(task.example(split, index).info) for split in SPLITS for index in range(200)}
    assert drawn == {f"{low}-{low + 3}={low + offset}" for low in (1, 2, 3) for offset in range(4)}


@pytest.mark.parametrize(
    ("field", "options"),
    [
        ("low", {"low": -1}),
        ("low", {"low": 9, "high": 9}),
        ("low", {"high": 10**9}),
        ("span", {"span": 1}),
        ("span", {"low": 1, "high": 99}),
        ("turns", {"turns": 0}),
        ("template", {"template": "r1"}),
        ("weights", {"weights": {"solve": 1.0}}),
        ("weights", {"weights": {"solved": -1.0}}),
    ],
)
def test_what_makes_no_sense_is_refused_by_field(field: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"^task.{field}: "):
        Guess(**options)
