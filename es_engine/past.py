"""A run's past: where it has led, from its ledger, its checkpoints and its config.

A step of ES is taken again from its line of the ledger alone; where a method took gradients, a checkpoint has theta.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch

from es_engine.config import Config
from es_engine.costs import Costs
from es_engine.data import refuse_changed
from es_engine.ledger import Ledger, Line, fingerprint, innermost_difference, running_costs
from es_engine.methods.es import EvolutionStrategies
from es_engine.optimizers import TorchOptimizer, build_optimizer
from es_engine.run_folder import RunFolder, refuse_taken, write_folder
from es_engine.session import Materials, gather
from rewards.trees import flat
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


def present_stage(folder: RunFolder) -> Config:
    """The config of the stage that a run has begun last. Raises ValueError if it has none."""
    return folder.load_config().stage_after(len(folder.open_ledger().stages))


def replay(run_dir: Path | str, step: int, out: Path | str | None = None) -> Path:
    """Rebuild theta after `step` steps from config, base model and ledger alone, or from a checkpoint where a method
    took gradients; the folder of its adapter.

    Raises ValueError if the run has no such step, or no checkpoint where it needs one, if the model or the ledger is
    not what it was, or if `out` exists already.
    """
    folder = RunFolder.existing(Path(run_dir))
    if out is not None:
        refuse_taken(Path(out))
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
    save_adapter(stages[state.stage], state.theta, target)
    return target


def restore(stages: Stages, folder: RunFolder, ledger: Ledger) -> State:
    """The state at the end of the ledger: from the latest checkpoint that fits it, and replayed from there.

    Raises ValueError if that is not possible.
    """
    if not ledger.lines:
        return beginning(stages[0])
    _check_header(stages, ledger)
    state = _at_the_end(_past(ledger), stages, folder)
    if state.step < len(ledger.generations):
        raise ValueError(
            f"ledger: step {state.step} of {stages[state.stage].config.method.kind} is in no checkpoint that is left, "
            "and only steps of es can be taken again from the ledger alone"
        )
    if ledger.stages:
        _check_teacher(stages[state.stage], ledger)
    _check_data(stages[state.stage], ledger)
    return state


def _past(ledger: Ledger, steps: int | None = None) -> list[Line]:
    """The beginnings of stages and the generations of a ledger, in order; up to the generation of so many steps. Raises
    ValueError if they are not numbered in their order."""
    past = [line for line in ledger.lines if line["kind"] in ("stage", "generation")]
    stage = step = 0
    for line in past:
        begins = line["kind"] == "stage"
        if line["step"] != step or (begins and line["stage"] != stage):
            raise ValueError(
                f"{ledger.path}: a {line['kind']} of step {line['step']} where one of step {step} should be"
            )
        stage, step = stage + begins, step + (not begins)
    if steps is None:
        return past
    places = [place for place, line in enumerate(past, start=1) if line["kind"] == "generation"]
    return past[: places[steps - 1]] if steps else []


def _at_the_end(past: list[Line], stages: Stages, folder: RunFolder) -> State:
    """The state at the end of a past, or before the first step that cannot be taken again from its line."""
    state, known = _from_checkpoint(past, stages, folder) or (beginning(stages[0]), 0)
    for line in past[known:]:
        if line["kind"] == "stage":
            number = line["stage"]
            state = in_stage(number, state, stages[state.stage], stages[number])
            _check_theta(state, line, f"stage {number}")
        elif isinstance(stages[state.stage].method, EvolutionStrategies):
            _redo(stages[state.stage], state, line)
        else:
            break
    return state


def in_stage(number: int, state: State, before: Materials, now: Materials) -> State:
    """Where a stage begins: at the adapter where the one before has led, with an optimizer that has seen nothing."""
    theta = now.space.converted(state.theta, before.space)
    optimizer = build_optimizer(now.config.optimizer, now.space.start())
    return State(state.step, theta, optimizer, state.costs, number, state.step, state.costs)


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


def beginning(materials: Materials) -> State:
    """The state before the first step."""
    theta = materials.space.start()
    return State(0, theta, build_optimizer(materials.config.optimizer, theta), Costs())


def _from_checkpoint(past: list[Line], stages: Stages, folder: RunFolder) -> tuple[State, int] | None:
    """The state of the latest checkpoint that fits a past, and how many lines of the past it knows."""
    places = [place for place, line in enumerate(past, start=1) if line["kind"] == "generation"]
    for step, tensors in folder.load_checkpoints(most=len(places)):
        if step and (state := _fitting(past[: places[step - 1]], stages, step, tensors)) is not None:
            return state, places[step - 1]
    return None


def _fitting(known: list[Line], stages: Stages, step: int, tensors: dict[str, torch.Tensor]) -> State | None:
    """The state that a checkpoint of a step holds, if it is that of the lines known then, which end with the step's."""
    theta = tensors.pop("theta", torch.empty(0)).float().numpy()
    if fingerprint(theta) != known[-1]["theta"]:
        return None
    begun = [line for line in known if line["kind"] == "stage"]
    stage, first_step = (begun[-1]["stage"], begun[-1]["step"]) if begun else (0, 0)
    materials = stages[stage]
    optimizer = build_optimizer(materials.config.optimizer, materials.space.start())
    moments = {name.removeprefix("optimizer."): tensor for name, tensor in tensors.items()}
    if theta.shape != (materials.space.dim,) or not optimizer.takes(moments):
        return None
    optimizer.load_state(moments)
    costs = running_costs(line for line in known if line["kind"] == "generation")
    return State(step, theta, optimizer, costs[-1], stage, first_step, costs[first_step])


def checkpoint(folder: RunFolder, ledger: Ledger, state: State, config: Config) -> None:
    """Keep a state of a run whose present stage has this config."""
    moments = {f"optimizer.{name}": tensor for name, tensor in state.optimizer.state().items()}
    tensors = {"theta": torch.from_numpy(state.theta), **moments}
    begun = [(line["step"], line["method"]) for line in ledger.stages] or [(0, config.method.kind)]

    def lasts(step: int) -> bool:
        """At the ends of stages, and at evaluations of those that cannot be replayed."""
        kind = [method for first, method in begun if first < step][-1]
        return kind != "es" and (step % config.evaluation.every == 0 or step in dict(begun))

    folder.save_checkpoint(state.step, tensors, lasts)


def header(stages: Stages, state: State) -> Line:
    """What the ledger's run is; equal for runs that must have equal ledgers, whatever their pool and telemetry."""
    config, materials = stages.config, stages[0]
    left_out = {"name", "pool", "telemetry"} | (set() if config.stages else {"stages"})
    return {
        "kind": "run",
        "config": config.model_dump(mode="json", exclude=left_out),
        "model": materials.model_fingerprint,
        **({} if config.stages else origins(materials)),
        "dim": materials.space.dim,
        "theta": fingerprint(state.theta),
    }


def origins(materials: Materials) -> Line:
    """Hashes of what a run, or a stage that has begun, learns from."""
    teacher = {"teacher": materials.teacher.fingerprint} if materials.teacher else {}
    return {"data": materials.data, **teacher}


def _check_header(stages: Stages, ledger: Ledger) -> None:
    """Raises ValueError, naming the difference, unless the ledger belongs to this config and this base model. Its data
    may be another, for what is past."""
    stages.config.stage_after(len(ledger.stages))
    expected, found = header(stages, beginning(stages[0])), dict(flat(ledger.header))
    expected.pop("data", None)
    if found.get("kind") != "run":
        raise ValueError(f"{ledger.path}: the first line is not a run's")
    for key, value in flat(expected):
        if found.get(key) != value:
            where, now, was = innermost_difference(value, found.get(key), key)
            raise ValueError(f"{ledger.path}: {where} is {now} now, but was {was} when the run began; it cannot go on")


def _check_teacher(materials: Materials, ledger: Ledger) -> None:
    """Raises ValueError unless the present stage, which will go on, has the teacher with which it began."""
    now = materials.teacher.fingerprint if materials.teacher else None
    was = ledger.stages[-1].get("teacher")
    if now != was:
        raise ValueError(f"{ledger.path}: teacher is {now} now, but was {was} when the stage began; it cannot go on")


def _check_data(materials: Materials, ledger: Ledger) -> None:
    """Raises ValueError unless the present stage, or the run that has none, has the data with which it began."""
    line = ledger.stages[-1] if ledger.stages else ledger.header
    refuse_changed(line.get("data", {}), materials.data)


def save_adapter(materials: Materials, theta: Vector, folder: Path) -> None:
    """Replace a folder by theta's PEFT adapter."""
    write_folder(folder, lambda partial: materials.space.save(theta, partial, materials.config.model.source))
