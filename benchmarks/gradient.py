"""A training step beside TRL's, in seconds and in memory, and where a whole step of GRPO goes.

A step is loss, backward and Adam, on one thread, in one micro-batch of given completions of Countdown prompts. "ours"
goes the way of a run: samples in micro-batches to a worker's gradient model, its gradient back in theta's coordinates,
shortened to `max_norm`, and a step of theta, which the model then wears. TRL is `training_step` of its own trainers on
the same tokens, ready as tensors, and then what its loop does: the gradients' norm clipped, AdamW without decay, the
gradients dropped. "each" is ours with a prompt read anew with each of its completions, as TRL does, and not once. All
have the same float32 model and LoRA, both factors trained, and take turns in one process; "apart" is how far ours and
TRL end from each other, over how far they moved. DPO's reference is in both the model without its
adapter, whose log-probabilities are part of the step. Memory is of one further step: the tensors that it makes, at
their peak, by torch's own count, and at its own peak what else Python allocates, such as theta's vectors; the weights
and the optimizer's moments, which both have before it, are not in it.

The last table is a run's own loop with one worker, from one step's end to the next one's: its rollouts (vLLM, with
scoring), log-probabilities, which two updates a step need, and gradients, each with its way through Ray; the rest is
the driver's. Gradients are forward and backward passes over the samples of which log-probabilities are the forward
pass, so that backward is about the difference. The short form has fewer rows and steps.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
import tracemalloc
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from harness import Row, draw_bars, options, report, take_turns
from trl_trainers import KINDS, Kind, build_trainer

from es_engine import load_config, losses, past, trainer
from es_engine.config import DpoMethodConfig, GrpoMethodConfig, SftMethodConfig
from es_engine.config.optimizer import AdamConfig
from es_engine.ledger import Ledger
from es_engine.methods.dpo import DpoLoss
from es_engine.methods.grpo import GrpoLoss
from es_engine.methods.sft import SftLoss
from es_engine.methods.updates import Updates
from es_engine.optimizers import build_optimizer
from es_engine.run_folder import RunFolder
from es_engine.session import Materials, Session, gather
from es_engine.telemetry import open_telemetry
from rewards.base import SingleTurnTask
from workers.calls import Call
from workers.completions import load_completions
from workers.engine import Vector
from workers.gradient import GradientModel, Loss, PartialGradient, collate
from workers.peft_model import factor_weight
from workers.samples import Sample

Side = Literal["ours", "each", "TRL"]
SIDES: tuple[Side, ...] = ("ours", "each", "TRL")
GROUP = 8
BETA, MAX_NORM = 0.1, 1.0
WHOLE = 1 << 20
"""Tokens of a micro-batch that is the whole batch."""
PHASES = {"evaluate": "rollouts", "logprobs": "log-probabilities", "gradient": "gradients"}
LR = 1e-4


@dataclass(frozen=True, slots=True)
class Model:
    """A model, how many completions a step has, and the prompts of a step of GRPO."""

    name: str
    config: tuple[str, ...]
    rows: int
    prompts: int


MODELS = (
    Model("SmolLM2-135M", ("configs/countdown_smollm2.yaml", "engine.dtype=float32"), 16, 8),
    Model("tiny 1M", ("configs/countdown_tiny.yaml",), 64, 32),
)
SHORT = tuple(replace(model, rows=model.rows // 4, prompts=model.prompts // 4) for model in MODELS)


def main() -> None:
    given = options(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    models = SHORT if given.short else MODELS
    rows = [step(model, kind, given.repeats) for model in models for kind in KINDS]
    report("A training step, one thread, float32", rows, given)
    phases = replace(given, json=given.json and given.json.with_stem(f"{given.json.stem}-phases"))
    repeats = min(3, given.repeats) if given.short else given.repeats
    report("One worker's step of GRPO, by phase", [row for model in models for row in shares(model, repeats)], phases)
    if given.plot is not None:
        bars = {name: _bars(rows, name) for name in dict.fromkeys(row["model"] for row in rows)}
        draw_bars(given.plot, "A training step over TRL's", "time and memory, ours over TRL's", bars)


def _bars(rows: Sequence[Row], model: str) -> dict[str, float]:
    mine = [row for row in rows if row["model"] == model]
    times = {f"{row['method']} time": row["ours/TRL"] for row in mine}
    return times | {f"{row['method']} memory": row["ours, MB"] / row["TRL, MB"] for row in mine}


def step(model: Model, kind: Kind, repeats: int) -> Row:
    """A method's step in turns, ours and TRL's."""
    materials = gather(load_config(model.config[0], [*model.config[1:], "space.train=AB", "space.units=raw"]))
    samples = samples_of(materials, kind, model.rows)
    sides = {side: BUILDERS[side](materials, kind, samples) for side in SIDES}
    timings = take_turns({side: built.step for side, built in sides.items()}, repeats)
    ratio, once = timings["ours"].over(timings["TRL"]), timings["ours"].over(timings["each"])
    low, high = ratio.quartiles
    memory = {side: peak_memory(sides[side].step) for side in ("ours", "TRL")}
    ours, theirs = sides["ours"].theta(), sides["TRL"].theta()
    return {
        "model": model.name,
        "method": kind,
        "rows": len(samples),
        "tokens": sum(sample.tokens for sample in samples),
        "ours, ms": 1000 * timings["ours"].median,
        "TRL, ms": 1000 * timings["TRL"].median,
        "ours/TRL": ratio.median,
        "quartiles": f"{low:.2f} to {high:.2f}",
        "ours/each": once.median,
        "ours, MB": memory["ours"],
        "TRL, MB": memory["TRL"],
        "apart": float(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - materials.space.start())),
    }


# --- The same work for both ---


def samples_of(materials: Materials, kind: Kind, rows: int) -> list[Sample]:
    """Worked solutions, each beside its own prompt (sft), first its own and then another's (dpo), or a group of its
    own and others' with advantages (grpo)."""
    task = cast(SingleTurnTask, materials.task)
    each = {"sft": 1, "dpo": 2, "grpo": GROUP}[kind]
    problems = materials.problems("train", range(rows))
    solutions = [task.worked_solution(problem.example) for problem in problems]
    completions = load_completions(materials.model, task.stop, "task")
    samples = [
        completions.sample(problems[row // each], solutions[(row // each + row % each) % len(solutions)])
        for row in range(rows)
    ]
    if kind != "grpo":
        return samples
    advantages = np.random.default_rng(0).standard_normal(len(samples)).tolist()
    return [
        sample.with_value("advantage", advantage).with_value("learn", 1.0)
        for sample, advantage in zip(samples, advantages, strict=True)
    ]


# --- Ours ---


class OneModel:
    """A pool of one gradient model in this process."""

    size = 1

    def __init__(self, model: GradientModel) -> None:
        self._model = model

    def put(self, value: Any) -> Any:
        return value

    def run(self, calls: Sequence[Call]) -> list[Any]:
        return [self._gradient(*call.arguments) for call in calls]

    def run_until(self, calls: Sequence[Call], enough: Callable[[Collection[int]], bool]) -> list[Any]:
        return self.run(calls)

    def _gradient(self, loss: Loss, samples: Sequence[Sample], theta: Vector, version: int) -> PartialGradient:
        self._model.set_theta(theta)
        return self._model.gradient(loss, samples)


class Ours:
    """The engine's training step."""

    def __init__(self, materials: Materials, kind: Kind, samples: Sequence[Sample]) -> None:
        method = {"sft": SftMethodConfig, "dpo": DpoMethodConfig, "grpo": GrpoMethodConfig}[kind]
        config = method(micro_batch_tokens=WHOLE, max_norm=MAX_NORM)
        self._samples, self._loss = samples, loss_of(kind, samples)
        self._together = 2 if kind == "dpo" else 1
        self._updates = Updates(config, materials.space.dim, parameters=0, adapted=0)
        self.model = GradientModel(materials.model, materials.space, "float32")
        self._pool = OneModel(self.model)
        self._theta = materials.space.start()
        self._optimizer = build_optimizer(AdamConfig(lr=LR), self._theta)

    def step(self) -> None:
        found = self._updates.gradient(self._pool, self._loss, self._samples, self._theta, 0, together=self._together)
        self._theta = self._optimizer.step(self._theta, -found.gradient, LR)

    def theta(self) -> Vector:
        """Shape (D,)."""
        return self._theta


def prompts_with_each(materials: Materials, kind: Kind, samples: Sequence[Sample]) -> Ours:
    """Ours, but that nothing is shared."""
    whole = Ours(materials, kind, samples)
    whole.model._shares = False
    return whole


def loss_of(kind: Kind, samples: Sequence[Sample]) -> Loss:
    lengths = [len(sample.completion_ids) for sample in samples]
    match kind:
        case "sft":
            return SftLoss(sum(lengths))
        case "dpo":
            return DpoLoss(BETA, len(samples) // 2)
        case "grpo":
            return GrpoLoss("dapo", (0.2, 0.2), 0.0, losses.policy_normaliser("dapo", lengths, 0), 1.0, None)


# --- TRL's ---


class Theirs:
    """TRL's training step."""

    def __init__(self, materials: Materials, kind: Kind, samples: Sequence[Sample]) -> None:
        self._space = materials.space
        with tempfile.TemporaryDirectory() as folder:
            self._trainer = build_trainer(
                kind,
                materials.model,
                materials.space,
                ROWS[kind],
                Path(folder),
                reward=no_reward,
                learning_rate=LR,
                **SETTINGS[kind],
            )
        self._trainer.create_optimizer()
        self._trainer.current_gradient_accumulation_steps = 1
        if kind == "grpo":  # which would draw completions here
            self._trainer._prepare_inputs = lambda inputs: inputs
        self._inputs = INPUTS[kind](samples, self._trainer)
        self._tokens = sum(len(sample.completion_ids) for sample in samples)

    def step(self) -> None:
        trl, model = self._trainer, self._trainer.model
        trl.training_step(model, dict(self._inputs), self._tokens)
        trl.accelerator.clip_grad_norm_(model.parameters(), MAX_NORM)
        trl.optimizer.step()
        model.zero_grad()

    def theta(self) -> Vector:
        """Shape (D,)."""
        places = self._space.placements
        found = [factor_weight(self._trainer.model, place.matrix.name, place.factor) for place in places]
        return torch.cat([factor.detach().flatten() for factor in found]).numpy()


def sft_inputs(samples: Sequence[Sample], trl: Any) -> dict[str, torch.Tensor]:
    rows = [
        {"input_ids": list(ids), "labels": [-100] * len(sample.prompt_ids) + list(sample.completion_ids)}
        for sample in samples
        for ids in [sample.prompt_ids + sample.completion_ids]
    ]
    return dict(trl.data_collator(rows))


def dpo_inputs(samples: Sequence[Sample], trl: Any) -> dict[str, torch.Tensor]:
    rows = [
        {
            "prompt_ids": list(better.prompt_ids),
            "chosen_ids": list(better.completion_ids),
            "rejected_ids": list(worse.completion_ids),
        }
        for better, worse in zip(samples[::2], samples[1::2], strict=True)
    ]
    return dict(trl.data_collator(rows))


def grpo_inputs(samples: Sequence[Sample], trl: Any) -> dict[str, torch.Tensor]:
    """Prompts padded on the left and completions on the right, as TRL makes them of its own rollouts."""
    batch = collate(samples)
    prompts = [torch.tensor(sample.prompt_ids) for sample in samples]
    prompt_ids, prompt_mask = (
        torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side="left")
        for rows in (prompts, [torch.ones_like(row) for row in prompts])
    )
    return {
        "prompt_ids": prompt_ids,
        "prompt_mask": prompt_mask,
        "completion_ids": batch.completion_ids,
        "completion_mask": batch.mask.long(),
        "advantages": batch.values["advantage"],
        "num_items_in_batch": batch.mask.sum(),
    }


def no_reward(completions: Sequence[str], **_: Any) -> list[float]:
    """GRPO's trainer is not made without one; advantages are given."""
    raise AssertionError("no completions are drawn")


INPUTS = {"sft": sft_inputs, "dpo": dpo_inputs, "grpo": grpo_inputs}
SETTINGS: dict[Kind, dict[str, Any]] = {
    "sft": {"per_device_train_batch_size": 1},
    "dpo": {"per_device_train_batch_size": 1, "beta": BETA},
    "grpo": {"beta": 0.0, "loss_type": "dapo", "num_generations": 2, "per_device_train_batch_size": 2},
}
ROWS: dict[Kind, list[dict[str, Any]]] = {  # which its trainers want to be made with
    "sft": [{"prompt": "1", "completion": "2"}],
    "dpo": [{"prompt": "1", "chosen": "2", "rejected": "3"}],
    "grpo": [{"prompt": "1"}],
}
BUILDERS: dict[Side, Callable[[Materials, Kind, Sequence[Sample]], Ours | Theirs]] = {
    "ours": Ours,
    "each": prompts_with_each,
    "TRL": Theirs,
}


# --- Memory ---


def peak_memory(work: Callable[[], None]) -> float:
    """Megabytes of tensors that some work makes, at their peak, and of Python's other memory, at its own."""
    os.environ.setdefault("KINETO_LOG_LEVEL", "6")  # the profiler's, which else says when it starts and stops
    tracemalloc.start()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        work()
    _, others = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((event["ts"], event["args"]["Bytes"]) for event in events if event.get("name") == "[memory]")
    return float(max(accumulate(size for _, size in changes)) + others) / 1e6


# --- A whole step of GRPO ---


class Timed:
    """A pool that adds up the seconds of its calls by their method."""

    def __init__(self, pool: Any) -> None:
        self._pool = pool
        self.seconds: defaultdict[str, float] = defaultdict(float)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._pool, name)

    def run(self, calls: Sequence[Call]) -> list[Any]:
        started = time.perf_counter()
        found = self._pool.run(calls)
        self.seconds[calls[0].method] += time.perf_counter() - started
        return found


def shares(model: Model, repeats: int) -> list[Row]:
    """Median seconds of each phase over `repeats` steps of a run, after one to warm up."""
    method = f"{{kind: grpo, prompts: {model.prompts}, samples: 8, minibatches: 2}}"
    budget = ["pool.workers=1", f"budget.generations={1 + repeats}", "telemetry.console=false"]
    overrides = [f"method={method}", f"optimizer={{kind: adam, lr: {LR}}}", "space.train=AB", *budget]
    config = load_config(model.config[0], [*model.config[1:], *overrides])
    found = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Session(config, print) as session,
        open_telemetry(config, RunFolder(Path(folder)), 0, session.pool) as telemetry,
    ):
        ledger, state = Ledger(Path(folder) / "ledger.jsonl"), past.beginning(session.materials)
        pool = session.pool
        for _ in range(1 + repeats):
            timed = Timed(pool)
            session.pool = cast(Any, timed)
            started = time.perf_counter()
            trainer._generation(session, RunFolder(Path(folder)), ledger, state, telemetry)
            whole = time.perf_counter() - started
            rest = whole - sum(timed.seconds.values())
            found.append({PHASES[name]: spent for name, spent in timed.seconds.items()} | {"rest": rest, "all": whole})
    parts = [{phase: spent / times["all"] for phase, spent in times.items()} for times in found[1:]]
    return [
        {
            "model": model.name,
            "completions": 8 * model.prompts,
            "phase": phase,
            "ms": 1000 * statistics.median(times[phase] for times in found[1:]),
            "share": statistics.median(part[phase] for part in parts),
            "from": f"{min(part[phase] for part in parts):.3f} to {max(part[phase] for part in parts):.3f}",
        }
        for phase in found[0]
    ]


if __name__ == "__main__":
    main()
