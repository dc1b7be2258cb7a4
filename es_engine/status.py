"""Where runs are, told from their folders alone: nothing is written there, and a run may be going on."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from es_engine.config import Config
from es_engine.costs import Costs
from es_engine.ledger import LedgerReader, Line
from es_engine.run_folder import RunFolder
from es_engine.run_lock import holder
from es_engine.telemetry.log import last_error

State = Literal["running", "stopped", "diverged", "finished", "unreadable"]


@dataclass(frozen=True, slots=True)
class Status:
    """A run as it is now. `reward` and `accuracy` are those of the last held-out evaluation, `training_reward` of the
    last generation; `eta_seconds` is of the present stage, and of a running run only."""

    path: Path
    state: State
    process: str | None = None
    step: int = 0
    steps: int | None = None
    stage: str = ""
    training_reward: float | None = None
    reward: float | None = None
    accuracy: float | None = None
    eta_seconds: float | None = None
    error: str | None = None


def read_status(path: Path) -> Status:
    """The status of a run. Raises ValueError if the folder holds no run."""
    process = None
    try:
        folder = RunFolder.existing(path)
        process = holder(path)  # first: a run that ends meanwhile is not taken for a stopped one
        return _read(folder, process)
    except ValueError as error:
        if not RunFolder(path).config_file.is_file():
            raise
        return Status(path, "unreadable", process, error=str(error))
    except OSError as error:
        return Status(path, "unreadable", process, error=str(error))


@dataclass(slots=True)
class _Past:
    """What a ledger says: steps done, the last one's mean reward, stages begun and, of the last of these, the step that
    it began after, its costs and its seconds."""

    step: int = 0
    reward: float | None = None
    stages: int = 0
    first_step: int = 0
    costs: Costs = field(default_factory=Costs)
    seconds: float = 0.0

    def add(self, line: Line) -> None:
        if line["kind"] == "stage":
            self.stages += 1
            self.first_step, self.costs, self.seconds = self.step, Costs(), 0.0
        elif line["kind"] == "generation":
            self.step += 1
            self.reward = line["reward_mean"]
            self.costs += Costs.from_json(line["costs"])
            self.seconds += line["times"]["total"]


def _read(folder: RunFolder, process: str | None) -> Status:
    config, past = folder.load_config(), _Past()
    for line in LedgerReader(folder.ledger_file).new_lines():
        past.add(line)
    evaluations = [line for line in LedgerReader(folder.eval_file).new_lines() if line["kind"] == "evaluation"]
    evaluation = evaluations[-1] if evaluations else {}
    stage = config.stage_after(past.stages)
    spent = stage.budget.progress(past.step - past.first_step, past.costs)
    return Status(
        path=folder.path,
        state="running" if process else _state(folder),
        process=process,
        step=past.step,
        steps=_all_steps(config),
        stage=f"{past.stages} of {len(config.stages)}, {stage.method.kind}" if config.stages else stage.method.kind,
        training_reward=past.reward,
        reward=evaluation.get("reward"),
        accuracy=evaluation.get("accuracy"),
        eta_seconds=past.seconds * (1 - spent) / spent if process and spent else None,
        error=last_error(folder.path),
    )


def _state(folder: RunFolder) -> State:
    """That of a run which no process trains."""
    if folder.diverged_file.is_file():
        return "diverged"
    return "finished" if folder.adapter.is_dir() else "stopped"


def _all_steps(config: Config) -> int | None:
    """How many steps the budgets of all stages allow; None where one is not counted in steps."""
    limits = [stage.budget.generations for stage in config.by_stage]
    counted = [limit for limit in limits if limit is not None]
    return sum(counted) if len(counted) == len(limits) else None
