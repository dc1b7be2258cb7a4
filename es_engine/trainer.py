"""The loop: a batch, an estimate on the pool, a step of theta, a line in the ledger.

And its past: resume and replay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es_engine.config import Config
from es_engine.costs import Costs
from es_engine.evaluation import evaluate_center
from es_engine.ledger import Ledger, Line, fingerprint, running_costs
from es_engine.methods.base import Directions, Report
from es_engine.methods.calibration import calibrate
from es_engine.methods.es import EvolutionStrategies
from es_engine.optimizers import TorchOptimizer, build_optimizer
from es_engine.report import write_run_report
from es_engine.run import Run
from es_engine.run_folder import RunFolder, write_folder, write_json_lines
from es_engine.session import Materials, Session, gather, sampling
from es_engine.telemetry import Telemetry, open_telemetry
from workers.engine import Vector
from workers.perturbation import Perturber

REPLAY_CACHE_BYTES = 1
"""A replay meets every pair once: nothing is worth keeping."""


@dataclass(slots=True)
class State:
    """Where a run is: `step` steps are done, led to theta and had these costs together."""

    step: int
    theta: Vector
    optimizer: TorchOptimizer
    costs: Costs


def train(config: Config, run_dir: Path | str | None = None) -> Run:
    """Train to the end of the budget and leave a run folder (default: runs/NAME). Raises ValueError for bad input."""
    folder = RunFolder(Path(run_dir) if run_dir is not None else Path("runs") / config.name)
    folder.refuse_existing()
    notices = _Notices()
    with Session(config, notices) as session:
        session.settle_chunk()
        folder.create(session.materials.config)
        ledger = folder.open_ledger()
        state = _beginning(session.materials)
        ledger.append(_header(session.materials, state))
        _run(session, folder, ledger, state, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def resume(run_dir: Path | str) -> Run:
    """Go on with a run that was stopped, to the ledger it would have had.

    Raises ValueError if it cannot be continued.
    """
    folder = RunFolder(Path(run_dir))
    config = folder.load_config()
    ledger = folder.open_ledger()
    notices = _Notices()
    with Session(config, notices) as session:
        state = restore(session.materials, folder, ledger)
        if not ledger.lines:
            ledger.append(_header(session.materials, state))
        _run(session, folder, ledger, state, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def replay(run_dir: Path | str, step: int, out: Path | str | None = None) -> Path:
    """Rebuild theta after `step` steps from config, base model and ledger alone, or from a checkpoint where the method
    takes gradients; the folder of its adapter.

    Raises ValueError if the run has no such step, or no checkpoint where it needs one, or if the model or the ledger is
    not what it was.
    """
    folder = RunFolder(Path(run_dir))
    ledger = folder.open_ledger()
    if not 0 <= step <= len(ledger.generations):
        raise ValueError(f"--step: {run_dir} has steps 0 to {len(ledger.generations)}, not {step}")
    materials = gather(folder.load_config())
    _check_header(materials, ledger)
    state = _at(materials, folder, ledger, step)
    target = Path(out) if out is not None else folder.path / "replay" / f"step-{step:06d}"
    _save_adapter(materials, state.theta, target)
    return target


def _at(materials: Materials, folder: RunFolder, ledger: Ledger, step: int) -> State:
    lines = ledger.generations[:step]
    state = _beginning(materials)
    if not isinstance(materials.method, EvolutionStrategies) and step:
        found = _from_checkpoint(materials, folder, lines)
        if found is None or found.step != step:
            kept = ", ".join(map(str, folder.checkpoint_steps)) or "none"
            raise ValueError(f"--step: {materials.config.method.kind} is replayed from checkpoints; there are {kept}")
        return found
    for line in lines:
        _redo(materials, state, line)
    return state


def restore(materials: Materials, folder: RunFolder, ledger: Ledger) -> State:
    """The state at the end of the ledger: from the latest checkpoint that fits it, and replayed from there."""
    if not ledger.lines:
        return _beginning(materials)
    _check_header(materials, ledger)
    lines = ledger.generations
    state = _from_checkpoint(materials, folder, lines) or _beginning(materials)
    for line in lines[state.step :]:
        _redo(materials, state, line)
    return state


def _run(session: Session, folder: RunFolder, ledger: Ledger, state: State, notices: _Notices) -> None:
    """Generations and evaluations from `state` to the end of the budget; then the final adapter."""
    materials = session.materials
    with closing(open_telemetry(materials.config.telemetry, folder.path, state.step)) as telemetry:
        notices.deliver_to(telemetry)
        _settle_sigma(session, ledger, state, telemetry)
        while not _spent(materials.config, state):
            _evaluate_if_due(session, folder, state, telemetry)
            _generation(session, folder, ledger, state, telemetry)
        _evaluate_if_due(session, folder, state, telemetry, final=True)
        _save_adapter(materials, state.theta, folder.adapter)


def _generation(session: Session, folder: RunFolder, ledger: Ledger, state: State, telemetry: Telemetry) -> None:
    """One step: find directions, move theta, write it down."""
    started = time.perf_counter()
    materials, step = session.materials, state.step
    config = materials.config
    progress = _progress(config, state)
    lr = config.optimizer.lr * config.optimizer.lr_schedule.factor(progress)
    directions = materials.method.step(session.pool, state.theta, step, progress, materials.problems)
    report, moves = _climb(state, directions, lr)
    line = {
        "kind": "generation",
        "step": step,
        **report.record,
        "costs": report.costs.to_json(),
        "lr": lr,
        "moves": moves,
        "theta": fingerprint(state.theta),
        "restarts": session.pool.restarts,
    }
    line["times"]["total"] = time.perf_counter() - started
    if not isinstance(materials.method, EvolutionStrategies):
        _checkpoint(folder, state, config)  # before its line: without the rollouts, nothing else leads there again
    ledger.append(line)
    telemetry.generation(_telemetry_line(config, state, line, ledger))


def _climb(state: State, directions: Directions, lr: float) -> tuple[Report, int]:
    """Take a step, direction by direction; its report, and how many there were."""
    moves = 0
    try:
        direction = next(directions)
        while True:
            state.theta = state.optimizer.step(state.theta, direction, lr)
            moves += 1
            direction = directions.send(state.theta)
    except StopIteration as end:
        report: Report = end.value
    state.step += 1
    state.costs += report.costs
    return report, moves


def _redo(materials: Materials, state: State, line: Line) -> None:
    """Take a recorded step again. Raises ValueError if it does not lead where it led, or cannot be taken without the
    rollouts."""
    method = materials.method
    if not isinstance(method, EvolutionStrategies):
        raise ValueError(
            f"ledger: step {line['step']} of {materials.config.method.kind} is in no checkpoint that is left, and only "
            "steps of es can be taken again from the ledger alone"
        )
    perturber = Perturber(materials.config.seed, materials.space.dim, REPLAY_CACHE_BYTES)
    direction = method.replay(line, perturber.noise_sum)
    if direction is not None:
        state.theta = state.optimizer.step(state.theta, direction, line["lr"])
    state.step += 1
    state.costs += Costs.from_json(line["costs"])
    if fingerprint(state.theta) != line["theta"]:
        raise ValueError(
            f"ledger: step {line['step']} replayed gives another theta than was recorded; "
            "the ledger was changed, or this kind of CPU or release of torch draws other noise"
        )


def _beginning(materials: Materials) -> State:
    theta = materials.space.start()
    return State(0, theta, build_optimizer(materials.config.optimizer, theta), Costs())


def _from_checkpoint(materials: Materials, folder: RunFolder, lines: list[Line]) -> State | None:
    found = folder.load_checkpoint(most=len(lines))
    if found is None:
        return None
    step, tensors = found
    theta = tensors.pop("theta").numpy()
    if step == 0 or fingerprint(theta) != lines[step - 1]["theta"]:
        return None
    optimizer = build_optimizer(materials.config.optimizer, materials.space.start())
    optimizer.load_state({name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()})
    return State(step, theta, optimizer, running_costs(lines[:step])[-1])


def _checkpoint(folder: RunFolder, state: State, config: Config) -> None:
    moments = {f"optimizer.{name}": tensor for name, tensor in state.optimizer.state().items()}
    lasting = None if config.method.kind == "es" else config.evaluation.every
    folder.save_checkpoint(state.step, {"theta": torch.from_numpy(state.theta), **moments}, every=lasting)


def _header(materials: Materials, state: State) -> Line:
    """What the ledger's run is; equal for runs that must have equal ledgers, whatever their pool and telemetry."""
    same = materials.config.model_dump(mode="json", exclude={"name", "pool", "telemetry"})
    return {
        "kind": "run",
        "config": same,
        "model": materials.model_fingerprint,
        **({"teacher": materials.teacher.fingerprint} if materials.teacher else {}),
        "dim": materials.space.dim,
        "theta": fingerprint(state.theta),
    }


def _check_header(materials: Materials, ledger: Ledger) -> None:
    """Raises ValueError, naming the difference, unless the ledger belongs to this config and this base model."""
    expected = _header(materials, _beginning(materials))
    found = ledger.header
    if found.get("kind") != "run":
        raise ValueError(f"{ledger.path}: the first line is not a run's")
    for key, value in _flat(expected):
        if dict(_flat(found)).get(key) != value:
            was = dict(_flat(found)).get(key)
            raise ValueError(f"{ledger.path}: {key} is {value} now, but was {was} when the run began; it cannot go on")


def _flat(line: Line, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in line.items():
        if isinstance(value, dict):
            yield from _flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _settle_sigma(session: Session, ledger: Ledger, state: State, telemetry: Telemetry) -> None:
    """Have ES begin with the calibrated sigma where the config asks for one; it is found once a run."""
    method = session.materials.method
    if not isinstance(method, EvolutionStrategies) or method.config.sigma != "auto":
        return
    recorded = ledger.of_kind("calibration")
    if not recorded:
        batch = session.materials.problems("train", range(method.config.prompts))
        found = calibrate(method, session.pool, session.pool.put(state.theta), state.step, batch)
        ledger.append({"kind": "calibration", **found})
        recorded = ledger.of_kind("calibration")
    chosen = float(recorded[0]["sigma"])
    session.materials = replace(session.materials, method=method.with_sigma(chosen))
    telemetry.message(f"sigma {chosen:g}, calibrated")


def _evaluate_if_due(
    session: Session, folder: RunFolder, state: State, telemetry: Telemetry, final: bool = False
) -> None:
    """Evaluate the center at the start, at intervals and at the end, keep its completions, the best adapter and
    theta."""
    config = session.materials.config
    evaluations = folder.open_evaluations()
    done = {line["step"] for line in evaluations.lines}
    if state.step in done or not (final or state.step % config.evaluation.every == 0):
        return
    wanted = config.evaluation
    evaluation = evaluate_center(
        session.pool,
        session.pool.put(state.theta),
        state.step,
        session.materials.problems("heldout", range(wanted.problems)),
        sampling(config, session.materials.task, wanted.samples, wanted.temperature),
        wanted.chunk,
    )
    line = {"kind": "evaluation", "step": state.step, "theta": fingerprint(state.theta), **evaluation.summary}
    write_json_lines(folder.samples_file(state.step), evaluation.samples)
    if _is_best(line, evaluations.lines):
        _save_adapter(session.materials, state.theta, folder.best)
    if state.step:
        _checkpoint(folder, state, config)
    evaluations.append(line)
    telemetry.evaluation(line)


def _is_best(line: Line, before: list[Line]) -> bool:
    rewards = [other["reward"] for other in before if other["reward"] is not None]
    return line["reward"] is not None and (not rewards or line["reward"] > max(rewards))


def _save_adapter(materials: Materials, theta: Vector, folder: Path) -> None:
    write_folder(folder, lambda partial: materials.space.save(theta, partial, materials.config.model.source))


def _spent(config: Config, state: State) -> bool:
    return _progress(config, state) >= 1


def _progress(config: Config, state: State) -> float:
    return config.budget.progress(state.step, state.costs)


def _telemetry_line(config: Config, state: State, line: Line, ledger: Ledger) -> dict[str, Any]:
    spent = _progress(config, state)
    elapsed = sum(other["times"]["total"] for other in ledger.generations)
    return {
        **{key: line[key] for key in ("step", "reward_mean", "accuracy", "components", "rollouts")},
        **{key: line[key] for key in ("tokens", "lr", "failures")},
        **{key: line.get(key) for key in ("reward_best", "fitness_spread", "constant_members", "sigma")},
        "learning": line.get("learning", {}),
        "generations": config.budget.generations,
        "spent": state.costs.to_json(),
        "seconds": line["times"]["total"],
        "seconds_rollouts": line["times"]["rollouts"],
        "seconds_update": line["times"]["update"],
        "theta_rms": float(np.sqrt(np.mean(np.square(state.theta, dtype=np.float64)))),
        "worker_restarts": line["restarts"],
        "eta_seconds": elapsed * (1 - spent) / spent,
    }


class _Notices:
    """Messages from the pool, kept until there is somebody to tell."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._telemetry: Telemetry | None = None

    def __call__(self, text: str) -> None:
        if self._telemetry is None:
            self._kept.append(text)
        else:
            self._telemetry.message(text)

    def deliver_to(self, telemetry: Telemetry) -> None:
        self._telemetry = telemetry
        for text in self._kept:
            telemetry.message(text)
