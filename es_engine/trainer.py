"""The loop: a batch, an estimate on the pool, a step of theta, a line in the ledger.

And its past: resume and replay.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from es_engine.config import Config, EsMethodConfig
from es_engine.config.base import flat
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
from es_engine.run_lock import locked
from es_engine.session import Materials, Session, gather, sampling
from es_engine.telemetry import Telemetry, open_telemetry
from workers.engine import Vector
from workers.perturbation import Perturber

REPLAY_CACHE_BYTES = 1
"""A replay meets every pair once: nothing is worth keeping."""


@dataclass(slots=True)
class State:
    """Where a run is: `step` steps are done, led to theta and had these costs together. Its present stage began after
    `first_step` of them."""

    step: int
    theta: Vector
    optimizer: TorchOptimizer
    costs: Costs
    stage: int = 0
    first_step: int = 0
    first_costs: Costs = field(default_factory=Costs)


class Stages:
    """The materials of a run's stages by their numbers, each gathered when it is first asked for; of a run without
    stages, its own as those of stage 0."""

    def __init__(self, config: Config, known: Materials | None = None) -> None:
        """`known` are those of one of them."""
        self.config = config
        self._configs = config.by_stage
        self._known = [] if known is None else [known]

    def __len__(self) -> int:
        return len(self._configs)

    def __getitem__(self, number: int) -> Materials:
        config = self._configs[number]
        found = next((each for each in self._known if each.config == config), None)
        if found is None:
            found = gather(config, self._known[0].base if self._known else None)
            self._known.append(found)
        return found


def train(config: Config, run_dir: Path | str | None = None) -> Run:
    """Train to the end of the budget and leave a run folder (default: runs/NAME). Raises ValueError for bad input."""
    folder = RunFolder(Path(run_dir) if run_dir is not None else Path("runs") / config.name)
    folder.refuse_existing()
    notices = Notices()
    with Session(config.by_stage[0], notices, config.by_stage[1:]) as session:
        begin(session, config, folder, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def resume(run_dir: Path | str) -> Run:
    """Go on with a run that was stopped, to the ledger it would have had.

    Raises ValueError if it cannot be continued.
    """
    folder = RunFolder(Path(run_dir))
    notices = Notices()
    config = folder.load_config()
    with locked(folder.path), Session(present_stage(folder), notices, config.by_stage) as session:
        go_on(session, folder, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def begin(session: Session, config: Config, folder: RunFolder, notices: Notices) -> None:
    """Train to the end of the budget in a new run folder, on a session that serves the run's first stage."""
    config = _with_settled_chunk(session, config)
    folder.create(config)
    with locked(folder.path):
        _run(session, config, folder, folder.open_ledger(), notices)


def go_on(session: Session, folder: RunFolder, notices: Notices) -> None:
    """Train from wherever a run is to the end of its budget, on a session that serves its present stage; the caller
    has locked the folder."""
    _run(session, folder.load_config(), folder, folder.open_ledger(), notices)


def present_stage(folder: RunFolder) -> Config:
    """The config of the stage that a run has begun last."""
    return folder.load_config().by_stage[max(0, len(folder.open_ledger().stages) - 1)]


def replay(run_dir: Path | str, step: int, out: Path | str | None = None) -> Path:
    """Rebuild theta after `step` steps from config, base model and ledger alone, or from a checkpoint where a method
    took gradients; the folder of its adapter.

    Raises ValueError if the run has no such step, or no checkpoint where it needs one, or if the model or the ledger is
    not what it was.
    """
    folder = RunFolder(Path(run_dir))
    ledger = folder.open_ledger()
    if not 0 <= step <= len(ledger.generations):
        raise ValueError(f"--step: {run_dir} has steps 0 to {len(ledger.generations)}, not {step}")
    stages = Stages(folder.load_config())
    _check_header(stages, ledger)
    state = _at_the_end(_past(ledger, step), stages, folder)
    if state.step != step:
        kind = stages[state.stage].config.method.kind
        kept = ", ".join(map(str, folder.checkpoint_steps)) or "none"
        raise ValueError(f"--step: {kind} is replayed from checkpoints; there are {kept}")
    target = Path(out) if out is not None else folder.path / "replay" / f"step-{step:06d}"
    _save_adapter(stages[state.stage], state.theta, target)
    return target


def restore(stages: Stages, folder: RunFolder, ledger: Ledger) -> State:
    """The state at the end of the ledger: from the latest checkpoint that fits it, and replayed from there.

    Raises ValueError if that is not possible.
    """
    if not ledger.lines:
        return _beginning(stages[0])
    _check_header(stages, ledger)
    state = _at_the_end(_past(ledger), stages, folder)
    if state.step < len(ledger.generations):
        raise ValueError(
            f"ledger: step {state.step} of {stages[state.stage].config.method.kind} is in no checkpoint that is left, "
            "and only steps of es can be taken again from the ledger alone"
        )
    if ledger.stages:
        _check_teacher(stages[state.stage], ledger)
    return state


def _past(ledger: Ledger, steps: int | None = None) -> list[Line]:
    """The beginnings of stages and the generations of a ledger, in order; up to the generation of so many steps."""
    past = [line for line in ledger.lines if line["kind"] in ("stage", "generation")]
    if steps is None:
        return past
    places = [place for place, line in enumerate(past, start=1) if line["kind"] == "generation"]
    return past[: places[steps - 1]] if steps else []


def _at_the_end(past: list[Line], stages: Stages, folder: RunFolder) -> State:
    """The state at the end of a past, or before the first step that cannot be taken again from its line."""
    state, known = _from_checkpoint(past, stages, folder) or (_beginning(stages[0]), 0)
    for line in past[known:]:
        if line["kind"] == "stage":
            number = line["stage"]
            state = _in_stage(number, state, stages[state.stage], stages[number])
            _check_theta(state, line, f"stage {number}")
        elif isinstance(stages[state.stage].method, EvolutionStrategies):
            _redo(stages[state.stage], state, line)
        else:
            break
    return state


def _run(session: Session, config: Config, folder: RunFolder, ledger: Ledger, notices: Notices) -> None:
    """All stages from the end of the ledger on; then the final adapter."""
    stages = Stages(config, session.materials)
    state = restore(stages, folder, ledger)
    if not ledger.lines:
        ledger.append(_header(stages, state))
    with (
        open_telemetry(config, folder, state.step, session.pool) as telemetry,
        notices.delivered_to(telemetry),
    ):
        for number in range(state.stage, len(stages)):
            if config.stages:
                state = _begin_stage(number, session, config, ledger, state)
                telemetry.message(f"stage {number + 1} of {len(stages)}: {session.materials.config.method.kind}")
            _run_stage(session, folder, ledger, state, telemetry)
        _save_adapter(session.materials, state.theta, folder.adapter)


def _begin_stage(number: int, session: Session, config: Config, ledger: Ledger, state: State) -> State:
    """Turn the session to a stage and write its beginning down, unless that has been done."""
    if number < len(ledger.stages):
        return state
    before = session.materials
    if number > 0:
        session.turn_to(config.by_stage[number])
    state = _in_stage(number, state, before, session.materials)
    line = {"kind": "stage", "stage": number, "step": state.step, "method": session.materials.config.method.kind}
    if session.materials.teacher:
        line["teacher"] = session.materials.teacher.fingerprint
    ledger.append({**line, "theta": fingerprint(state.theta)})
    return state


def _in_stage(number: int, state: State, before: Materials, now: Materials) -> State:
    """Where a stage begins: at the adapter where the one before has led, with an optimizer that has seen nothing."""
    theta = now.space.converted(state.theta, before.space)
    optimizer = build_optimizer(now.config.optimizer, now.space.start())
    return State(state.step, theta, optimizer, state.costs, number, state.step, state.costs)


def _run_stage(session: Session, folder: RunFolder, ledger: Ledger, state: State, telemetry: Telemetry) -> None:
    """Generations and evaluations from `state` to the end of the stage's budget."""
    _settle_sigma(session, ledger, state, telemetry)
    while not _spent(session.materials.config, state):
        _evaluate_if_due(session, folder, ledger, state, telemetry)
        _generation(session, folder, ledger, state, telemetry)
    _evaluate_if_due(session, folder, ledger, state, telemetry, final=True)


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
        # Before its line: without the rollouts, nothing else leads there again.
        _checkpoint(folder, ledger, state, config)
    ledger.append(line)
    telemetry.generation(_telemetry_line(materials, state, line, ledger))


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
    """Take a recorded step of es again. Raises ValueError if it does not lead where it led."""
    assert isinstance(materials.method, EvolutionStrategies)
    perturber = Perturber(materials.config.seed, materials.space.dim, REPLAY_CACHE_BYTES)
    direction = materials.method.replay(line, perturber.noise_sum)
    if direction is not None:
        state.theta = state.optimizer.step(state.theta, direction, line["lr"])
    state.step += 1
    state.costs += Costs.from_json(line["costs"])
    _check_theta(state, line, f"step {line['step']}")


def _check_theta(state: State, line: Line, what: str) -> None:
    if fingerprint(state.theta) != line["theta"]:
        raise ValueError(
            f"ledger: {what} replayed gives another theta than was recorded; "
            "the ledger was changed, or this kind of CPU or release of torch draws other noise"
        )


def _beginning(materials: Materials) -> State:
    theta = materials.space.start()
    return State(0, theta, build_optimizer(materials.config.optimizer, theta), Costs())


def _from_checkpoint(past: list[Line], stages: Stages, folder: RunFolder) -> tuple[State, int] | None:
    """The state of the latest checkpoint that fits a past, and how many lines of the past it knows."""
    places = [place for place, line in enumerate(past, start=1) if line["kind"] == "generation"]
    found = folder.load_checkpoint(most=len(places))
    if found is None:
        return None
    step, tensors = found
    theta = tensors.pop("theta").numpy()
    if step == 0 or fingerprint(theta) != past[places[step - 1] - 1]["theta"]:
        return None
    known = past[: places[step - 1]]
    begun = [line for line in known if line["kind"] == "stage"]
    stage, first_step = (begun[-1]["stage"], begun[-1]["step"]) if begun else (0, 0)
    materials = stages[stage]
    optimizer = build_optimizer(materials.config.optimizer, materials.space.start())
    optimizer.load_state({name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()})
    costs = running_costs(line for line in known if line["kind"] == "generation")
    return State(step, theta, optimizer, costs[-1], stage, first_step, costs[first_step]), len(known)


def _checkpoint(folder: RunFolder, ledger: Ledger, state: State, config: Config) -> None:
    moments = {f"optimizer.{name}": tensor for name, tensor in state.optimizer.state().items()}
    tensors = {"theta": torch.from_numpy(state.theta), **moments}
    begun = [(line["step"], line["method"]) for line in ledger.stages] or [(0, config.method.kind)]

    def lasts(step: int) -> bool:
        """At the ends of stages, and at evaluations of those that cannot be replayed."""
        kind = [method for first, method in begun if first < step][-1]
        return kind != "es" and (step % config.evaluation.every == 0 or step in dict(begun))

    folder.save_checkpoint(state.step, tensors, lasts)


def _header(stages: Stages, state: State) -> Line:
    """What the ledger's run is; equal for runs that must have equal ledgers, whatever their pool and telemetry."""
    config, materials = stages.config, stages[0]
    left_out = {"name", "pool", "telemetry"} | (set() if config.stages else {"stages"})
    teacher = None if config.stages else materials.teacher  # which is a stage's own
    return {
        "kind": "run",
        "config": config.model_dump(mode="json", exclude=left_out),
        "model": materials.model_fingerprint,
        **({"teacher": teacher.fingerprint} if teacher else {}),
        "dim": materials.space.dim,
        "theta": fingerprint(state.theta),
    }


def _check_header(stages: Stages, ledger: Ledger) -> None:
    """Raises ValueError, naming the difference, unless the ledger belongs to this config and this base model."""
    expected = _header(stages, _beginning(stages[0]))
    found = ledger.header
    if found.get("kind") != "run":
        raise ValueError(f"{ledger.path}: the first line is not a run's")
    for key, value in flat(expected):
        if dict(flat(found)).get(key) != value:
            was = dict(flat(found)).get(key)
            raise ValueError(f"{ledger.path}: {key} is {value} now, but was {was} when the run began; it cannot go on")


def _check_teacher(materials: Materials, ledger: Ledger) -> None:
    """Raises ValueError unless the present stage, which will go on, has the teacher with which it began."""
    now = materials.teacher.fingerprint if materials.teacher else None
    was = ledger.stages[-1].get("teacher")
    if now != was:
        raise ValueError(f"{ledger.path}: teacher is {now} now, but was {was} when the stage began; it cannot go on")


def _with_settled_chunk(session: Session, config: Config) -> Config:
    """The config with `engine.chunk: auto` replaced by what suits the largest population of its stages."""
    first, populations = config.by_stage[0], [each for each in config.by_stage if each.method.kind == "es"]
    if config.engine.chunk != "auto" or not populations:
        return config
    # Pairs of one stage must stay together in the chunks of all.
    largest = max(populations, key=_population)
    if largest != first:
        session.turn_to(largest)
    session.settle_chunk()
    settled = config.model_copy(update={"engine": session.materials.config.engine})
    if largest != first:
        session.turn_to(settled.by_stage[0])
    return settled


def _population(config: Config) -> tuple[bool, int]:
    assert isinstance(config.method, EsMethodConfig)
    return config.method.mirrored, config.method.population


def _settle_sigma(session: Session, ledger: Ledger, state: State, telemetry: Telemetry) -> None:
    """Have ES begin with the calibrated sigma where the config asks for one; it is found once a stage."""
    method = session.materials.method
    if not isinstance(method, EvolutionStrategies) or method.config.sigma != "auto":
        return
    recorded = _calibrations(ledger)
    if not recorded:
        batch = method.fitness.batch(range(method.config.prompts), session.materials.problems)
        found = calibrate(method, session.pool, session.pool.put(state.theta), state.step, batch)
        ledger.append({"kind": "calibration", **found})
        recorded = _calibrations(ledger)
    chosen = float(recorded[0]["sigma"])
    session.materials = replace(session.materials, method=method.with_sigma(chosen))
    telemetry.message(f"sigma {chosen:g}, calibrated")


def _calibrations(ledger: Ledger) -> list[Line]:
    return [line for line in ledger.present_stage if line["kind"] == "calibration"]


def _evaluate_if_due(
    session: Session, folder: RunFolder, ledger: Ledger, state: State, telemetry: Telemetry, final: bool = False
) -> None:
    """Evaluate the center at the start, at intervals and at the end, keep its completions, the best adapter and
    theta."""
    config = session.materials.config
    evaluations = folder.open_evaluations()
    done = {line["step"] for line in evaluations.lines}
    if state.step in done or not (final or state.step % config.evaluation.every == 0):
        return
    wanted = config.evaluation
    started = time.perf_counter()
    evaluation = evaluate_center(
        session.pool,
        session.pool.put(state.theta),
        state.step,
        session.materials.problems("heldout", wanted.numbers),
        sampling(config, session.materials.task, wanted.samples, wanted.temperature),
        wanted.chunk,
    )
    seconds = time.perf_counter() - started
    line = {"kind": "evaluation", "step": state.step, "theta": fingerprint(state.theta), **evaluation.summary}
    write_json_lines(folder.samples_file(state.step), evaluation.samples)
    if _is_best(line, evaluations.lines):
        _save_adapter(session.materials, state.theta, folder.best)
    if state.step:
        _checkpoint(folder, ledger, state, config)
    evaluations.append(line)
    telemetry.evaluation({**line, "seconds": seconds})


def _is_best(line: Line, before: list[Line]) -> bool:
    rewards = [other["reward"] for other in before if other["reward"] is not None]
    return line["reward"] is not None and (not rewards or line["reward"] > max(rewards))


def _save_adapter(materials: Materials, theta: Vector, folder: Path) -> None:
    write_folder(folder, lambda partial: materials.space.save(theta, partial, materials.config.model.source))


def _spent(config: Config, state: State) -> bool:
    return _progress(config, state) >= 1


def _progress(config: Config, state: State) -> float:
    return config.budget.progress(state.step - state.first_step, state.costs - state.first_costs)


def _telemetry_line(materials: Materials, state: State, line: Line, ledger: Ledger) -> dict[str, Any]:
    config, times = materials.config, dict(line["times"])
    spent = _progress(config, state)
    delta_norm, delta_norm_ratio = materials.space.delta_norm(state.theta)
    elapsed = sum(other["times"]["total"] for other in ledger.generations[state.first_step :])
    generations = config.budget.generations
    return {
        **{key: line[key] for key in ("step", "reward_mean", "accuracy", "components", "rollouts")},
        **{key: line[key] for key in ("tokens", "lr", "failures")},
        **{key: line.get(key) for key in ("reward_best", "fitness_spread", "constant_members", "sigma")},
        "prompt_tokens": line.get("prompt_tokens", 0),
        "learning": line.get("learning", {}),
        "stage": state.stage + 1,
        "generations": None if generations is None else state.first_step + generations,
        "spent": state.costs.to_json(),
        "seconds": times.pop("total"),
        "seconds_rollouts": times.pop("rollouts"),
        "seconds_update": times.pop("update"),
        "times": times,
        "theta_rms": float(np.sqrt(np.mean(np.square(state.theta, dtype=np.float64)))),
        "delta_norm": delta_norm,
        "delta_norm_ratio": delta_norm_ratio,
        "worker_restarts": line["restarts"],
        "eta_seconds": elapsed * (1 - spent) / spent,
    }


class Notices:
    """Messages from the pool, kept until there is somebody to tell."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._telemetry: Telemetry | None = None

    def __call__(self, text: str) -> None:
        if self._telemetry is None:
            self._kept.append(text)
        else:
            self._telemetry.message(text)

    @contextmanager
    def delivered_to(self, telemetry: Telemetry) -> Iterator[None]:
        """Tell them there as long as the context lasts, those that were kept first."""
        self._telemetry = telemetry
        for text in self._kept:
            telemetry.message(text)
        self._kept.clear()
        try:
            yield
        finally:
            self._telemetry = None
