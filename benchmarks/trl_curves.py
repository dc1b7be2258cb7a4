"""Held-out accuracy after GRPO, SFT and DPO beside TRL's own trainers, from the same start at the same settings.

The tiny model learns Countdown (`configs/countdown_tiny.yaml`) for a fixed number of steps at every learning rate of a
grid, with several seeds. A seed says where LoRA starts (TRL's trainer is given our A and B), which order the rows have
and what is sampled. Both sides have the same rows in the same order: for GRPO the same prompts, 8 completions each, of
at most the task's tokens, judged by the same verifier; for SFT worked solutions; for DPO pairs of the best and the
worst of the base model's own completions, drawn once. Both have a step's rows in one batch in float32, Adam (TRL:
AdamW without decay) with the same betas and epsilon at a constant rate, and gradients of norm 1 at most.

Where TRL differs by default it is told to do as we do, or we as it does: a newline ends a completion, and is learned as
its end (TRL's tokenizer has it for its end token; the end token of the model ends a completion too); adapters on all
linear layers, both factors trained; the reference of DPO is the model without its adapter; GRPO has TRL's `dapo` loss,
advantages over their group's standard deviation, one update a step, clip 0.2, no KL, nothing masked, and no importance
correction, since TRL draws its completions with the very model it trains (here with transformers). Ours come from vLLM.

What is reported are greedy answers to the same held-out problems by the same engine, all adapters in one session; the
difference is over seeds, in pairs, with its 95% interval (Student's t). "apart" is how far the two thetas end from each
other, over how far ours has moved: of SFT and DPO, in which nothing is drawn, it should be rounding alone. Adapters and
accuracies are kept as they are found, in the folder called as the JSON file (without one: runs/trl_curves), so that a
run that was stopped goes on from there; a finished one leaves its report only. `--repeats` is the number of seeds.
"""

from __future__ import annotations

import asyncio
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from harness import Options, Row, draw, options, report
from rich.console import Console
from scipy import stats
from trl_trainers import KINDS, Kind, build_trainer

from es_engine import Config, load_config, resume, train
from es_engine.evaluation import evaluate_center
from es_engine.methods import policy
from es_engine.run_folder import write_folder, write_json_lines, write_text
from es_engine.session import Session, gather, sampling
from es_engine.spaces.lora import LoraSpace
from rewards.base import Rollout, SingleTurnTask, judge_now
from rewards.demonstrations import read_demonstrations, read_preferences
from rewards.problems import EpochOrder

Side = Literal["ours", "TRL"]
SIDES: tuple[Side, ...] = ("ours", "TRL")
CONSOLE = Console()
TINY = "configs/countdown_tiny.yaml"
GROUP, MAX_NORM, BETA = 8, 1.0, 0.1
HELD_OUT = 512
DRAWN_FOR_PAIRS = 16
"""Completions that the base model draws of each prompt for DPO's pairs."""


@dataclass(frozen=True, slots=True)
class Plan:
    """How much is learned: `batch` prompts, demonstrations or pairs in a step."""

    steps: int
    batch: int
    rates: tuple[float, ...]
    seeds: int


@dataclass(frozen=True, slots=True)
class Cell:
    """One training."""

    method: Kind
    rate: float
    seed: int
    side: Side

    @property
    def name(self) -> str:
        return f"{self.method}-{self.rate:g}-{self.seed}-{self.side}"


def main() -> None:
    given = options(__doc__.splitlines()[0], repeats=3)
    plan = Plan(6, 16, (1e-3,), 1) if given.short else Plan(20, 32, (3e-4, 1e-3, 3e-3), given.repeats)
    given = replace(given, repeats=plan.seeds)
    torch.set_num_threads(1)
    bench = Bench(plan, folder_of(given, plan))
    everything = cells(plan)
    for number, cell in enumerate(everything, start=1):
        if not bench.adapter(cell).is_dir():
            started = time.perf_counter()
            bench.train(cell)
            CONSOLE.print(f"{number}/{len(everything)} {cell.name}: {time.perf_counter() - started:.0f} s")
    accuracy = bench.accuracies(everything)
    rows = [
        row(method, rate, accuracy, plan) | {"apart": bench.apart(method, rate)}
        for method in KINDS
        for rate in plan.rates
    ]
    report(f"Held-out accuracy after {plan.steps} steps of {plan.batch}, from {bench.base_accuracy():.3f}", rows, given)
    best = replace(given, json=given.json and given.json.with_stem(f"{given.json.stem}-best"))
    report("Each at its best rate", [best_row(method, accuracy, plan) for method in KINDS], best)
    if given.plot is not None:
        lines = {
            f"{method}, {side}": [(rate, _mean(seeds_of(method, rate, side, accuracy, plan))) for rate in plan.rates]
            for method in KINDS
            for side in SIDES
        }
        draw(given.plot, "Beside TRL's trainers", "learning rate", "held-out accuracy", lines, log_x=True)
    bench.forget()


def folder_of(given: Options, plan: Plan) -> Path:
    """Where trainings of this size are kept."""
    whole = given.json.with_suffix("") if given.json else Path("runs/trl_curves")
    return whole / f"{plan.steps}-steps-of-{plan.batch}"


def cells(plan: Plan) -> list[Cell]:
    """All trainings; a seed's whole grid comes before the next seed's, so that a stopped run has something to say."""
    return [
        Cell(method, rate, seed, side)
        for seed in range(plan.seeds)
        for method in KINDS
        for rate in plan.rates
        for side in SIDES
    ]


def seeds_of(method: Kind, rate: float, side: Side, accuracy: dict[Cell, float], plan: Plan) -> list[float]:
    return [accuracy[Cell(method, rate, seed, side)] for seed in range(plan.seeds)]


def row(method: Kind, rate: float, accuracy: dict[Cell, float], plan: Plan) -> Row:
    ours, theirs = (seeds_of(method, rate, side, accuracy, plan) for side in SIDES)
    return {"method": method, "rate": f"{rate:g}", **compared(ours, theirs)}


def best_row(method: Kind, accuracy: dict[Cell, float], plan: Plan) -> Row:
    """Each side at the rate where its mean is highest."""
    best = {
        side: max(plan.rates, key=lambda rate: _mean(seeds_of(method, rate, side, accuracy, plan))) for side in SIDES
    }
    ours, theirs = (seeds_of(method, best[side], side, accuracy, plan) for side in SIDES)
    return {"method": method, **{f"{side}, rate": f"{best[side]:g}" for side in SIDES}, **compared(ours, theirs)}


def compared(ours: Sequence[float], theirs: Sequence[float]) -> Row:
    apart = [mine - other for mine, other in zip(ours, theirs, strict=True)]
    return {
        "ours": _mean(ours),
        "ours, sd": _deviation(ours),
        "TRL": _mean(theirs),
        "TRL, sd": _deviation(theirs),
        "difference": _mean(apart),
        "95% interval": interval(apart),
        "seeds": len(apart),
    }


def interval(values: Sequence[float]) -> str:
    """That of the mean, by Student's t."""
    if len(values) < 2:
        return ""
    half = float(stats.t.ppf(0.975, len(values) - 1)) * statistics.stdev(values) / math.sqrt(len(values))
    return f"{_mean(values) - half:+.3f} to {_mean(values) + half:+.3f}"


def _mean(values: Sequence[float]) -> float:
    return statistics.fmean(values)


def _deviation(values: Sequence[float]) -> float | str:
    return statistics.stdev(values) if len(values) > 1 else ""


class Bench:
    """The trainings of a plan and their adapters, kept in a folder."""

    def __init__(self, plan: Plan, folder: Path) -> None:
        self._plan = plan
        self._folder = folder

    def adapter(self, cell: Cell) -> Path:
        return self._folder / cell.name / "adapter"

    def train(self, cell: Cell) -> None:
        if cell.side == "ours":
            self._train_ours(cell)
        else:
            self._train_theirs(cell)

    def apart(self, method: Kind, rate: float) -> float:
        """How far both sides' thetas end from each other, over how far ours has moved; the mean over seeds."""
        found = []
        for seed in range(self._plan.seeds):
            start = gather(self.config_of(Cell(method, rate, seed, "ours"))).space
            ours, theirs = (worn(start, self.adapter(Cell(method, rate, seed, side))).start() for side in SIDES)
            found.append(float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - start.start())))
        return _mean(found)

    def forget(self) -> None:
        """Have the next run begin anew."""
        shutil.rmtree(self._folder)

    # --- What is learned ---

    @property
    def demonstrations(self) -> Path:
        """Worked solutions of as many training problems as the steps have room for."""
        file = self._folder / "demonstrations.jsonl"
        if not file.exists():
            task = self._task
            examples = [task.example("train", number) for number in range(self._plan.steps * self._plan.batch)]
            write_json_lines(
                file, [{"prompt": each.prompt, "completion": f"{task.worked_solution(each)}\n"} for each in examples]
            )
        return file

    @property
    def pairs(self) -> Path:
        """The best and the worst of the base model's completions of training prompts, where they differ in reward and
        both ended by themselves; as many as the steps have room for."""
        file = self._folder / "pairs.jsonl"
        if not file.exists():
            wanted = self._plan.steps * self._plan.batch
            config = self.config_of(Cell("grpo", 1.0, 0, "ours"))
            with Session(config, print) as session:
                found: list[Row] = []
                for step in range(10):
                    found += pairs_of(session, range(step * wanted // 4, (step + 1) * wanted // 4), step)
                    if len(found) >= wanted:
                        break
            assert len(found) >= wanted, "the base model's completions are all alike"
            write_json_lines(file, found[:wanted])
        return file

    # --- Ours ---

    def config_of(self, cell: Cell) -> Config:
        """Our run's. What generates nothing needs no vLLM."""
        plan, rate = self._plan, cell.rate
        method = {
            "grpo": f"{{kind: grpo, prompts: {plan.batch}, samples: {GROUP}, loss: dapo, importance_cap: null, "
            f"clip: [0.2, 0.2], chunk: {plan.batch}, max_norm: {MAX_NORM}, micro_batch_tokens: {1 << 20}}}",
            "sft": f"{{kind: sft, batch: {plan.batch}, max_norm: {MAX_NORM}}}",
            "dpo": f"{{kind: dpo, batch: {plan.batch}, beta: {BETA}, max_norm: {MAX_NORM}}}",
        }[cell.method]
        overrides = [
            f"name={cell.name}",
            f"seed={cell.seed}",
            f"space.seed={cell.seed}",
            "space.train=AB",
            f"method={method}",
            f"optimizer={{kind: adam, lr: {rate}, betas: [0.9, 0.999], eps: 1e-8}}",
            f"budget={{generations: {plan.steps}}}",
            f"evaluation={{every: {plan.steps}, problems: 1}}",
            "pool.workers=1",
            "telemetry.console=false",
        ]
        if cell.method != "grpo":
            data = self.demonstrations if cell.method == "sft" else self.pairs
            overrides += [f"method.data={data.absolute()}", "engine={kind: hf, dtype: float32, device: cpu}"]
        return load_config(TINY, overrides)

    def _train_ours(self, cell: Cell) -> None:
        folder = self._folder / cell.name
        if (folder / "config.yaml").exists():
            resume(folder)
        else:
            train(self.config_of(cell), folder)

    # --- TRL's ---

    def _train_theirs(self, cell: Cell) -> None:
        materials = gather(self.config_of(cell))
        plan = self._plan
        batch = plan.batch * GROUP if cell.method == "grpo" else plan.batch
        with tempfile.TemporaryDirectory() as out:
            trainer = build_trainer(
                cell.method,
                materials.model,
                materials.space,
                self._rows(cell),
                Path(out),
                end="\n",
                reward=self._reward,
                seed=cell.seed,
                learning_rate=cell.rate,
                adam_beta1=0.9,
                adam_beta2=0.999,
                adam_epsilon=1e-8,
                max_grad_norm=MAX_NORM,
                max_steps=plan.steps,
                per_device_train_batch_size=batch,
                **self._settings(cell.method),
            )
            trainer.train()
        write_folder(self.adapter(cell), lambda folder: trainer.model.save_pretrained(folder))

    def _settings(self, method: Kind) -> dict[str, Any]:
        if method == "grpo":
            return {
                "num_generations": GROUP,
                "max_completion_length": self._task.max_tokens,
                "temperature": 1.0,
                "loss_type": "dapo",
                "scale_rewards": "group",
                "epsilon": 0.2,
                "beta": 0.0,
                "mask_truncated_completions": False,
            }
        return {"beta": BETA} if method == "dpo" else {}

    def _rows(self, cell: Cell) -> list[Row]:
        """TRL's rows, in the order that our run has them in."""
        count = self._plan.steps * self._plan.batch
        if cell.method == "grpo":
            examples = [self._task.example("train", number) for number in range(count)]
            return [{"prompt": each.prompt, "answer": each.answer, "info": json.dumps(each.info)} for each in examples]
        if cell.method == "sft":
            order = EpochOrder(count, cell.seed, "demonstrations")
            demonstrations = read_demonstrations(str(self.demonstrations), "demonstrations")
            chosen = [demonstrations[order[number]] for number in range(count)]
            return [{"prompt": each.example.prompt, "completion": each.completion} for each in chosen]
        order = EpochOrder(count, cell.seed, "pairs")
        preferences = read_preferences(str(self.pairs), "pairs")
        return [
            {"prompt": each.example.prompt, "chosen": each.chosen, "rejected": each.rejected}
            for each in (preferences[order[number]] for number in range(count))
        ]

    @cached_property
    def _task(self) -> SingleTurnTask:
        return cast(SingleTurnTask, load_config(TINY).task.build())

    @cached_property
    def _reward(self) -> Callable[..., list[float | None]]:
        """The task's verifier as TRL calls it."""
        verifier = self._task.verifier.load()

        def verified(
            prompts: list[str], completions: list[str], answer: list[str], info: list[str], **_: Any
        ) -> list[float | None]:
            rollouts = [
                Rollout(prompt, completion, right, json.loads(row))
                for prompt, completion, right, row in zip(prompts, completions, answer, info, strict=True)
            ]
            return [score.value for score in judge_now(verifier, rollouts, asyncio.run)]

        return verified

    # --- How good they are ---

    def accuracies(self, everything: Sequence[Cell]) -> dict[Cell, float]:
        """Held-out accuracy of every training's adapter, and of the base model; kept beside each."""
        unknown = [cell for cell in everything if not self._accuracy_file(cell).exists()]
        if unknown:
            config = self.config_of(Cell("grpo", 1.0, 0, "ours"))
            with Session(config, print) as session:
                self._write(self._folder / "accuracy.json", evaluated(session, session.materials.space, 0))
                for number, cell in enumerate(unknown, start=1):
                    space = worn(session.materials.space, self.adapter(cell))
                    self._write(self._accuracy_file(cell), evaluated(session, space, number))
        return {cell: json.loads(self._accuracy_file(cell).read_text()) for cell in everything}

    def base_accuracy(self) -> float:
        """That of the model without an adapter."""
        return float(json.loads((self._folder / "accuracy.json").read_text()))

    def _accuracy_file(self, cell: Cell) -> Path:
        return self._folder / cell.name / "accuracy.json"

    def _write(self, file: Path, accuracy: float) -> None:
        write_text(file, json.dumps(accuracy))


def worn(space: LoraSpace, adapter: Path) -> LoraSpace:
    """The space that begins at an adapter. Both factors are theta, so that a worker of any such space can wear it."""
    assert space.train == "AB"
    return LoraSpace(
        space.matrices, rank=space.rank, alpha=space.alpha, train=space.train, units=space.units, init=adapter
    )


def evaluated(session: Session, space: LoraSpace, version: int) -> float:
    """The accuracy of where a space begins."""
    materials = session.materials
    found = evaluate_center(
        session.pool,
        session.pool.put(space.start()),
        version,
        materials.problems("heldout", range(HELD_OUT)),
        sampling(materials.config, materials.task, 1, 0.0),
        materials.config.evaluation.chunk,
    )
    return float(found.summary["accuracy"])


def pairs_of(session: Session, numbers: Sequence[int], step: int) -> list[Row]:
    """The best and the worst completion of each of these training prompts, where there is a difference."""
    materials = session.materials
    asked = materials.problems("train", numbers)
    drawn = sampling(materials.config, materials.task, DRAWN_FOR_PAIRS, 1.0)
    theta = session.pool.put(materials.space.start())
    rollouts = policy.roll_out(session.pool, theta, step, asked, drawn, len(asked))
    rows = []
    for place, problem in enumerate(asked):
        completions = rollouts.completions[place * DRAWN_FOR_PAIRS :][:DRAWN_FOR_PAIRS]
        ended = np.array([completion.finish_reason == "stop" for completion in completions])
        rewards = np.where(ended, rollouts.rewards[place], np.nan)
        if ended.any() and np.nanmax(rewards) > np.nanmin(rewards):
            better, worse = (completions[int(pick(rewards))].text for pick in (np.nanargmax, np.nanargmin))
            rows.append({"prompt": problem.prompt, "chosen": f"{better}\n", "rejected": f"{worse}\n"})
    return rows


if __name__ == "__main__":
    main()
