"""The loop: a batch, an estimate on the pool, a step of theta, a line in the ledger."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from es_engine.config import Config, EsMethodConfig
from es_engine.evaluation import evaluate_center, is_best
from es_engine.ledger import Ledger, Line, fingerprint
from es_engine.methods.base import Directions, Report
from es_engine.methods.calibration import calibrate
from es_engine.methods.es import EvolutionStrategies
from es_engine.past import Stages, State, checkpoint, header, in_stage, origins, present_stage, restore, save_adapter
from es_engine.report import write_run_report
from es_engine.run import Run
from es_engine.run_folder import RunFolder, write_json_lines
from es_engine.run_lock import locked
from es_engine.session import Materials, Session, errors_in_place, sampling
from es_engine.telemetry import Telemetry, check_places, open_telemetry
from es_engine.text import tell
from workers.divergence import Diverged


def train(config: Config, run_dir: Path | str | None = None) -> Run:
    """Train to the end of the budget and leave a run folder (default: runs/NAME).

    Raises ValueError for bad input, and Diverged, which is one, where training leads to numbers that are not finite.
    """
    folder = RunFolder(Path(run_dir) if run_dir is not None else Path("runs") / config.name)
    folder.refuse_existing()
    check_places(config.telemetry)
    notices = Notices()
    with Session(config.by_stage[0], notices, config.by_stage[1:]) as session:
        begin(session, config, folder, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def resume(run_dir: Path | str) -> Run:
    """Go on with a run that was stopped, to the ledger it would have had.

    Raises ValueError if it cannot be continued, Diverged as `train` does.
    """
    folder = RunFolder.existing(Path(run_dir))
    notices = Notices()
    config = folder.load_config()
    with locked(folder.path), Session(present_stage(folder), notices, config.by_stage) as session:
        go_on(session, folder, notices)
    write_run_report(folder.path)
    return Run(folder.path)


def begin(session: Session, config: Config, folder: RunFolder, notices: Notices) -> None:
    """Train to the end of the budget in a new run folder, on a session that serves the run's first stage."""
    if any(getattr(stage.method, "data", None) is None for stage in config.by_stage):  # else the task trains nothing
        session.materials.check_prompts()
    config = _with_settled_chunk(session, config)
    folder.create(config)
    with locked(folder.path):
        _run(session, config, folder, folder.open_ledger(), notices)


def go_on(session: Session, folder: RunFolder, notices: Notices) -> None:
    """Train from wherever a run is to the end of its budget, on a session that serves its present stage; the caller
    has locked the folder."""
    _run(session, folder.load_config(), folder, folder.open_ledger(), notices)


def conclude(session: Session, folder: RunFolder, notices: Notices) -> None:
    """End a run where it is, whatever is left of its budget, with an evaluation and the final adapter; session and
    folder are as for `go_on`."""
    config, ledger = folder.load_config(), folder.open_ledger()
    state = restore(Stages(config, session.materials), folder, ledger)
    with (
        open_telemetry(config, folder, state.step, session.pool) as telemetry,
        notices.delivered_to(telemetry),
    ):
        _evaluate_if_due(session, folder, ledger, state, telemetry, final=True)
        save_adapter(session.materials, state.theta, folder.adapter)


def _run(session: Session, config: Config, folder: RunFolder, ledger: Ledger, notices: Notices) -> None:
    """All stages from the end of the ledger on; then the final adapter."""
    session.pool.count_anew()
    stages = Stages(config, session.materials)
    state = restore(stages, folder, ledger)
    if not ledger.lines:
        ledger.append(header(stages, state))
    ledger.forget_rollouts()
    with (
        open_telemetry(config, folder, state.step, session.pool) as telemetry,
        notices.delivered_to(telemetry),
    ):
        for number in range(state.stage, len(stages)):
            if config.stages:
                state = _begin_stage(number, session, config, ledger, state)
                telemetry.message(f"stage {number + 1} of {len(stages)}: {session.materials.config.method.kind}")
            with errors_in_place(session.materials.config), _divergence_in_words(session, state):
                _run_stage(session, folder, ledger, state, telemetry)
        save_adapter(session.materials, state.theta, folder.adapter)


def _begin_stage(number: int, session: Session, config: Config, ledger: Ledger, state: State) -> State:
    """Turn the session to a stage and write its beginning down, unless that has been done."""
    if number < len(ledger.stages):
        return state
    before = session.materials
    if number > 0:
        session.turn_to(config.by_stage[number])
    state = in_stage(number, state, before, session.materials)
    line = {"kind": "stage", "stage": number, "step": state.step, "method": session.materials.config.method.kind}
    ledger.append({**line, **origins(session.materials), "theta": fingerprint(state.theta)})
    return state


@contextmanager
def _divergence_in_words(session: Session, state: State) -> Iterator[None]:
    """Inside, training that diverges ends in a sentence that says where, and what to do about it."""
    try:
        yield
    except Diverged as error:
        config = session.materials.config
        if config.method.kind != "es" and np.array_equal(state.theta, session.materials.space.start()):
            raise ValueError(
                f"{error}, before training has changed anything: the base model or space.init leads there; "
                "another engine.dtype may help"
            ) from error
        sigma = f" or {config.place}method.sigma" if config.method.kind == "es" else ""
        raise Diverged(
            f"training diverged in step {state.step + 1}: {error}; all that was reached before is kept; "
            f"lower {config.place}optimizer.lr ({config.optimizer.lr:g}){sigma}"
        ) from error


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
        "speculative": session.pool.speculative,
    }
    line["times"]["total"] = time.perf_counter() - started
    if not isinstance(materials.method, EvolutionStrategies):
        # Before its line: without the rollouts, nothing else leads there again.
        checkpoint(folder, ledger, state, config)
    ledger.append(line)
    ledger.forget_rollouts()
    telemetry.generation(_telemetry_line(materials, state, line, ledger))


def _climb(state: State, directions: Directions, lr: float) -> tuple[Report, int]:
    """Take a step, direction by direction; its report, and how many there were.

    Raises Diverged where theta overflows.
    """
    moves = 0
    try:
        direction = next(directions)
        while True:
            state.theta = state.optimizer.step(state.theta, direction, lr)
            if not np.isfinite(state.theta).all():
                raise Diverged("theta is not finite")
            moves += 1
            direction = directions.send(state.theta)
    except StopIteration as end:
        report: Report = end.value
    state.step += 1
    state.costs += report.costs
    return report, moves


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
    config, wanted = session.materials.config, session.materials.config.evaluation
    if not (final or state.step % wanted.every == 0):
        return
    evaluations = folder.open_evaluations()
    if any(line["step"] == state.step for line in evaluations.lines):
        return
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
    if is_best(line, evaluations.lines):
        save_adapter(session.materials, state.theta, folder.best)
    if state.step and isinstance(session.materials.method, EvolutionStrategies):
        checkpoint(folder, ledger, state, config)  # as other methods do at each step
    evaluations.append(line)
    telemetry.evaluation({**line, "seconds": seconds})


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
        **{key: line[key] for key in ("tokens", "lr", "failures", "rescored")},
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
        "eta_seconds": elapsed * (1 - spent) / spent if spent else None,
    }


class Notices:
    """Messages from the pool, on stderr and kept until there is somebody to tell."""

    def __init__(self) -> None:
        self._kept: list[str] = []
        self._telemetry: Telemetry | None = None

    def __call__(self, text: str) -> None:
        if self._telemetry is None:
            tell(text)  # whoever waits for a start should know what for
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
