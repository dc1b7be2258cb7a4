"""Rollouts scored a second: in this process, and in two scoring processes with deadlines, on two cores.

A task's rollouts are worked solutions of its problems, half of them another problem's. The verifiers that only spin say
what the scoring processes themselves cost; of the last ones, one rollout in a hundred hangs until its deadline.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path

from harness import Row, draw_bars, options, report, take_turns

from es_engine.config import SingleTurnTaskConfig, load_task
from rewards.base import Rollout, VerifierSpec, judge_now
from workers.scoring import Scorer

PROCESSES = 2
HANGING_DEADLINE_S = 0.5
DATA = Path(__file__).parent.parent / "tests" / "data"
TASKS = {
    "countdown": [],
    "sudoku": ["task.size=9"],
    "math": [f"task.data={DATA / 'math500/math500_test.json'}", "task.dataset=math500"],
    "arc": [f"task.data={DATA / 'arc-agi-1/training'}"],
    "conciseness": [],
    "reasoning_gym": ["task.dataset=chain_sum"],
}
SPINS = {"20 us": 20e-6, "1 ms": 1e-3}


def spin(rollout: Rollout) -> float:
    """Keep a core busy for as many seconds as the answer says; for ever where the completion is `hang`."""
    end = time.perf_counter() + (1e9 if rollout.completion == "hang" else float(rollout.answer))
    while time.perf_counter() < end:
        pass
    return 1.0


def main() -> None:
    given = options(__doc__.splitlines()[0])
    count = 500 if given.short else 4000
    rows = [row for kind in TASKS for row in measure(kind, *task_rollouts(kind, count), given.repeats)]
    for name, seconds in SPINS.items():
        rollouts = [Rollout("", "", str(seconds), {})] * min(count * 10, round(4 / seconds))
        rows += measure(f"spins for {name}", SPIN, rollouts, given.repeats)
    rows.append(measure_hanging(given.repeats))
    report(f"Scoring in {PROCESSES} processes", rows, given)
    if given.plot is not None:
        bars = {row["verifier"]: row["rollouts/s"] for row in rows if row["where"] != "here"}
        draw_bars(given.plot, f"Rollouts scored a second in {PROCESSES} processes", "rollouts/s", {"": bars})


SPIN = VerifierSpec(f"{__file__}:spin")


def task_rollouts(kind: str, count: int) -> tuple[VerifierSpec, list[Rollout]]:
    """A task's verifier and rollouts for it: to every problem its own solution, and the next one's."""
    config = load_task(kind, TASKS[kind])
    assert isinstance(config, SingleTurnTaskConfig)
    task = config.build()
    examples = [task.example("train", index) for index in range(count // 2 + 1)]
    rollouts = [
        Rollout(example.prompt or "", task.worked_solution(answered), example.answer, example.info, example.messages)
        for example, following in pairwise(examples)
        for answered in (example, following)
    ]
    return task.verifier, rollouts


def measure(name: str, spec: VerifierSpec, rollouts: Sequence[Rollout], repeats: int) -> list[Row]:
    verifier = spec.load()
    with Scorer(spec, processes=PROCESSES) as scorer:
        timings = take_turns(
            {
                "here": lambda: judge_now(verifier, rollouts, asyncio.run),
                f"{PROCESSES} processes": partial(score_all, scorer, rollouts),
            },
            repeats,
        )
    rows = []
    for where, timing in timings.items():
        # Two processes do at best twice as much as this one.
        ratio = timing.over(timings["here"])
        low, high = ratio.quartiles
        scale = 1 if where == "here" else PROCESSES
        rows.append(
            {
                "verifier": name,
                "where": where,
                "rollouts": len(rollouts),
                "rollouts/s": len(rollouts) / timing.median,
                "time over ideal": scale * ratio.median,
                "quartiles": f"{scale * low:.2f} to {scale * high:.2f}",
            }
        )
    return rows


def measure_hanging(repeats: int) -> Row:
    """One in a hundred hangs: the time over that of as many deadlines, shared by the processes, and the work."""
    quick = [Rollout("", "", "0.001", {})] * 99
    rollouts = [*quick, Rollout("", "hang", "", {})] * 4
    with Scorer(SPIN, processes=PROCESSES, deadline=HANGING_DEADLINE_S) as scorer:
        timing = take_turns({"hanging": partial(score_all, scorer, rollouts)}, repeats)["hanging"]
    ideal = (4 * HANGING_DEADLINE_S + 4 * len(quick) * 0.001) / PROCESSES
    low, high = timing.quartiles
    return {
        "verifier": f"1 ms, 1 in 100 hangs ({HANGING_DEADLINE_S:g} s deadline)",
        "where": f"{PROCESSES} processes",
        "rollouts": len(rollouts),
        "rollouts/s": len(rollouts) / timing.median,
        "time over ideal": timing.median / ideal,
        "quartiles": f"{low / ideal:.2f} to {high / ideal:.2f}",
    }


def score_all(scorer: Scorer, rollouts: Sequence[Rollout]) -> None:
    for key, rollout in enumerate(rollouts):
        scorer.submit(key, rollout)
    scorer.drain()


if __name__ == "__main__":
    main()
