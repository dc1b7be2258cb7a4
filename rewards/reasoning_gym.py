"""The data sets of reasoning-gym (arXiv:2505.24760), which make their own problems and score the answers.

A data set is a function of a seed and an index. The two splits draw from seeds and indices that never meet; and since
two of these can still give the same question, a hash of the question assigns it to a split, as for every task.

An entry travels with the rollout, whole: some of the package's data sets walk through sets of texts, whose order
differs from process to process, so that the process that scores could not make the entry again.
"""

from __future__ import annotations

import difflib
import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal, get_args

from rewards import dialects
from rewards.base import Example, Rollout, Score, Split, VerifierSpec
from rewards.dialects import BatchVerifier, Reference
from rewards.problems import DrawnProblems, Row, below, digest

Template = Literal["chat", "plain"]
Extract = Literal["answer", "text"]

SIZE = 10_000
"""Entries of each data set that is made: some make a list as long as that, or will not take much more."""
BLOCK = 4096
"""Problems of a split that come from one data set; a multiple of the 1,024 among which held-out ones differ."""

_EXTRACT: dict[Template, Extract] = {"chat": "answer", "plain": "text"}
_MAX_TOKENS: dict[Template, int] = {"chat": 1024, "plain": 256}
_STOP: dict[Template, tuple[str, ...]] = {"chat": (), "plain": ("\nQuestion:",)}


class ReasoningGym:
    """The task of a reasoning-gym data set.

    A training problem comes from the 70 in 100 questions of a data set of 10,000 whose hash says so, another data set
    for each 4,096 indices. Unless PYTHONHASHSEED is set, isomorphic_strings, polynomial_multiplication, ransom_note and
    at times list_functions and codeio make other problems in every process, and knight_swap, word_ladder and at times
    intermediate_integration give other answers to theirs.

    Args:
        dataset: the name of the data set, such as chain_sum.
        config: its own settings, without `seed` and `size`. That of `composite` lists `datasets`, each a mapping of
            `name`, `weight` and `config`.
        template: `chat` (the last <answer>...</answer> is the answer), or `plain` (the whole completion is).
        seed: of the problems' choice and order. It does not move a problem from one split to the other.
        max_tokens, stop: for generation; left out, what suits the template.
        verifier: a user's own (see `VerifierSpec`) in place of `rg:dataset`.

    Raises ValueError, naming the field, where there is no such data set or it refuses its settings.
    """

    def __init__(
        self,
        *,
        dataset: str,
        config: Mapping[str, Any] | None = None,
        template: Template = "chat",
        seed: int = 0,
        max_tokens: int | None = None,
        stop: Sequence[str] | None = None,
        verifier: str | None = None,
    ) -> None:
        if template not in get_args(Template):
            raise ValueError(f"task.template: got {template!r}, accepted are {', '.join(get_args(Template))}")
        options = {"config": dict(config or {}), "extract": _EXTRACT[template]}
        self.max_tokens = _MAX_TOKENS[template] if max_tokens is None else max_tokens
        self.stop = _STOP[template] if stop is None else tuple(stop)
        own = f"rg:{dataset}"
        self.verifier = VerifierSpec(own, options) if verifier in (None, own) else VerifierSpec(str(verifier))
        self._template = template
        self._problems = _Entries(dataset, config or {}, seed)
        self.rows: int | None = None
        for split in get_args(Split):
            self.example(split, 0)  # settings that allow no problem are refused here, not in the middle of a run

    def example(self, split: Split, index: int) -> Example:
        """Problem number `index` (from 0) of a split; a pure function of its arguments.

        The answer is the entry's own, empty where it has none. `info` is the entry (`question`, `answer`, `metadata`)
        as `to_json` makes it, with the `dataset`, `seed` and `index` that make it.
        """
        row = self._problems.row(split, index)
        identity = f"{row['dataset']}/{row['seed']}/{row['index']}"
        answer = row["answer"] or ""
        if self._template == "plain":
            return Example(identity, answer, row, prompt=f"Question: {row['question']}\nAnswer:")
        request = "Think about it first. Then write the final answer, and nothing else, between <answer> and </answer>."
        messages = ({"role": "user", "content": f"{row['question']}\n\n{request}"},)
        return Example(identity, answer, row, messages=messages)

    def worked_solution(self, example: Example) -> str:
        """The entry's own answer in the template's form. Raises ValueError where it has none."""
        answer = example.info["answer"]
        if answer is None:
            raise ValueError(f"task: {example.info['dataset']} knows no answer to its own problem {example.id}")
        return f" {answer}" if self._template == "plain" else f"<answer>{answer}</answer>"


def load(reference: Reference) -> BatchVerifier:
    """The verifier `rg:dataset`: a data set's own `score_answer`, 0 to 1, of rollouts whose `info` is an entry.

    Options: `config`, the data set's settings, and `extract`, which says what of the completion is the answer: what
    the last <answer>...</answer> holds ("answer", the default), or all of it ("text"). `accuracy` is 1 for a score of
    1, else 0. Raises ValueError where there is no such data set or it refuses its settings.
    """
    from reasoning_gym.utils import extract_answer

    if reference.function is not None:
        raise ValueError(f"verifier: {reference.name} names a function; accepted is such as rg:chain_sum")
    score_answer, extract = reference.call(_scoring(reference.where))

    def score(rollout: Rollout) -> Score:
        missing = [field for field in ("question", "answer", "metadata") if field not in rollout.info]
        if missing:
            raise ValueError(f"{reference.name} scores entries of reasoning-gym; this row has no `{missing[0]}`")
        answer = rollout.completion.strip() if extract == "text" else extract_answer(rollout.completion)
        value = dialects.score(score_answer(answer, from_json(dict(rollout.info))))
        return value if value.value is None else Score(value.value, accuracy=float(value.value == 1))

    return lambda rollouts: [score(rollout) for rollout in rollouts]


def _scoring(dataset: str) -> Any:
    def options(config: Mapping[str, Any] | None = None, extract: Extract = "answer") -> tuple[Any, Extract]:
        if extract not in get_args(Extract):
            raise ValueError(f"verifier: extract is {extract!r}; accepted are {', '.join(get_args(Extract))}")
        return make_dataset(dataset, config or {}, seed=0, size=1).score_answer, extract

    return options


def make_dataset(name: str, config: Mapping[str, Any], seed: int, size: int) -> Any:
    """A data set of reasoning-gym. Raises ValueError where there is none of the name, it refuses its settings or the
    package is not installed."""
    try:
        import reasoning_gym
        from reasoning_gym.composite import DatasetSpec
        from reasoning_gym.factory import DATASETS
    except ModuleNotFoundError as error:
        raise dialects.missing_package("task.dataset: reasoning_gym", error) from error

    if name not in DATASETS:
        near = difflib.get_close_matches(name, DATASETS, n=1)
        hint = f", perhaps {near[0]}" if near else ""
        raise ValueError(f"task.dataset: reasoning-gym has no data set {name!r}{hint}; it has {len(DATASETS)}")
    if reserved := [key for key in ("seed", "size") if key in config]:
        raise ValueError(f"task.config: {reserved[0]} is set by the task; leave it out")
    try:
        if name == "composite":
            config = {**config, "datasets": [DatasetSpec(**each) for each in config.get("datasets", ())]}
        return reasoning_gym.create_dataset(name, **config, seed=seed, size=size)
    except (AssertionError, TypeError, ValueError) as error:  # its configs check themselves in all three ways
        raise ValueError(f"task.config: {name} of reasoning-gym refuses its settings ({error})") from error


class _Entries:
    """Random access to the entries of both splits, as rows."""

    def __init__(self, name: str, config: Mapping[str, Any], seed: int) -> None:
        self._name, self._config, self._seed = name, config, seed
        # Data sets add the index of an entry to their seed, and numpy takes seeds below 2**32.
        self._first_seed = int.from_bytes(digest("reasoning-gym", seed)[:4], "big") // 2
        self._blocks: dict[Split, tuple[int, DrawnProblems]] = {}

    def row(self, split: Split, index: int) -> Row:
        number = index // BLOCK
        if split not in self._blocks or self._blocks[split][0] != number:
            self._blocks[split] = number, self._block(split, number)
        return self._blocks[split][1].row(split, index)

    def _block(self, split: Split, number: int) -> DrawnProblems:
        place = 2 * number + get_args(Split).index(split)
        dataset_seed = self._first_seed + place * SIZE
        dataset = make_dataset(self._name, self._config, dataset_seed, SIZE)

        def draw(numbers: random.Random) -> Row:
            index = below(numbers, SIZE)
            return {**to_json(dataset[index]), "dataset": self._name, "seed": dataset_seed, "index": index}

        return DrawnProblems(draw, lambda row: str(row["question"]), self._seed, f"data set {self._name}")


def to_json(value: Any) -> Any:
    """The same in what JSON can say: {"__tuple__": [...]} for a tuple, and so on; `from_json` takes it back.

    Raises ValueError for a value that is not made of text, numbers, lists, tuples and mappings.
    """
    match value:
        case None | bool() | int() | float() | str():
            return value
        case Fraction():
            return {"__fraction__": str(value)}
        case list():
            return [to_json(item) for item in value]
        case tuple():
            return {"__tuple__": [to_json(item) for item in value]}
        case dict() if all(isinstance(key, str) for key in value):
            return {key: to_json(item) for key, item in value.items()}
        case dict():
            return {"__items__": [[to_json(key), to_json(item)] for key, item in value.items()]}
    raise ValueError(f"task.dataset: an entry holds a {type(value).__name__}, which cannot be sent to the verifier")


def from_json(value: Any) -> Any:
    """The value of which `to_json` made this."""
    match value:
        case list():
            return [from_json(item) for item in value]
        case {"__tuple__": items, **rest} if not rest:
            return tuple(from_json(item) for item in items)
        case {"__fraction__": text, **rest} if not rest:
            return Fraction(text)
        case {"__items__": items, **rest} if not rest:
            return {from_json(key): from_json(item) for key, item in items}
        case dict():
            return {key: from_json(item) for key, item in value.items()}
    return value
