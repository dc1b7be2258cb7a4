"""Which data sets of reasoning-gym can be trained on: whether they load, know their own answers, and repeat themselves.

Each data set makes a few entries, which travel as a run's do: as JSON, to the data set's own score_answer.

    own=1         entries whose own answer, as the task's worked solution in both templates, scores 1
    no answer     entries that have none
    exact         entries that are the same, tuples and all, after their way through JSON
    repeats       entries that two processes with other hash seeds agree on (questions that they agree on in brackets)
    junk          least and greatest score of wrong answers; "raises" where the data set raises for one
    ms            milliseconds an entry takes to make
"""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
import time
from typing import Any

import harness
from harness import Row

from rewards.base import Rollout, VerifierSpec, judge_now
from rewards.reasoning_gym import from_json, make_dataset, to_json

SEED = 1
JUNK = ("", "foo", "-1", "[[1, 2], [3]]", "{}", "a b\nc d", "1/0", "((", "\\frac{1}{2}")
MIXED = {"datasets": [{"name": "chain_sum", "weight": 1, "config": {}}, {"name": "gcd", "weight": 2, "config": {}}]}


EXTRACTS = ("answer", "text")
FORMS = ("<answer>{}</answer>", " {}")


def main() -> None:
    given = harness.options(str(__doc__), repeats=1)
    count = 10 if given.short else 50
    runs = [_other_process(count, hash_seed) for hash_seed in ("1", "2")]
    from reasoning_gym.factory import DATASETS

    rows = [_row(name, count, *(run[name] for run in runs)) for name in sorted(DATASETS)]
    harness.report(f"reasoning-gym, {count} entries of each data set", rows, given)
    solid = [row for row in rows if row["own=1"] == row["exact"] == count and row["repeats"] == f"{count} ({count})"]
    print(
        f"{len(rows)} data sets load; {sum(row['own=1'] == count for row in rows)} know all answers to their entries;"
    )
    print(f"{len(solid)} do that and repeat themselves; the others:")
    for row in rows:
        if row not in solid or row["junk"] == "raises":
            print("  ", *(f"{key}={value}" for key, value in row.items()))


def _row(name: str, count: int, one: list[list[str]], other: list[list[str]]) -> Row:
    dataset = make_dataset(name, config_of(name), SEED, count)
    options = ({"config": config_of(name), "extract": extract} for extract in EXTRACTS)
    forms = [(VerifierSpec(f"rg:{name}", each).load(), form) for each, form in zip(options, FORMS, strict=True)]
    started = time.perf_counter()
    entries = [dataset[index] for index in range(count)]
    milliseconds = 1000 * (time.perf_counter() - started) / count
    rows = [json.loads(json.dumps(to_json(entry))) for entry in entries]
    scores = [
        [
            judge_now(verify, [Rollout("", form.format(row["answer"]), "", row)], asyncio.run)[0].value
            for verify, form in forms
        ]
        for row in rows
    ]
    return {
        "data set": name,
        "own=1": sum(pair == [1.0, 1.0] for pair in scores),
        "no answer": sum(entry["answer"] is None for entry in entries),
        "exact": sum(from_json(row) == entry for row, entry in zip(rows, entries, strict=True)),
        "repeats": "{} ({})".format(*(sum(a[at] == b[at] for a, b in zip(one, other, strict=True)) for at in (0, 1))),
        "junk": _junk(dataset, entries),
        "ms": milliseconds,
    }


def _answered(row: dict[str, Any], form: str) -> Rollout:
    return Rollout("", form.format(row["answer"]), "", row)


def _junk(dataset: Any, entries: list[Any]) -> str:
    wrong = [(junk, entry) for entry in entries for junk in (None, *JUNK) if junk != entry["answer"]]
    try:
        scores = [dataset.score_answer(junk, entry) for junk, entry in wrong]
    except Exception:  # noqa: BLE001 - that it does is the finding
        return "raises"
    return f"{min(scores):.2g} to {max(scores):.2g}"


def _other_process(count: int, hash_seed: str) -> dict[str, list[list[str]]]:
    """[entry, question] as text of each entry of each data set, made by a process of its own."""
    code = f"import reasoning_gym_table as table; table.print_entries({count})"
    command = [sys.executable, "-c", code]
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[list[str]]] = json.loads(done.stdout.splitlines()[-1])
    return found


def config_of(name: str) -> dict[str, Any]:
    return MIXED if name == "composite" else {}


def print_entries(count: int) -> None:
    from reasoning_gym.factory import DATASETS

    made = {name: make_dataset(name, config_of(name), SEED, count) for name in sorted(DATASETS)}
    entries = {name: [dataset[index] for index in range(count)] for name, dataset in made.items()}
    print(
        "\n" + json.dumps({name: [[repr(each), each["question"]] for each in them] for name, them in entries.items()})
    )


if __name__ == "__main__":
    main()
