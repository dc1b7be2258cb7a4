"""A run that exists: what it left behind, and questions one can still ask of it."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from es_engine.config import Config, LoraSpaceConfig
from es_engine.costs import Costs, Measure
from es_engine.evaluation import Evaluation, evaluate_center
from es_engine.ledger import LedgerReader, Line, running_costs
from es_engine.run_folder import RunFolder, refuse_taken
from es_engine.session import Session, sampling
from es_engine.spaces.lora import adapted_modules, adapter_config
from es_engine.text import tell

ADAPTER_FILES = ("adapter_config.json", "adapter_model.safetensors")


class Run:
    """A run folder."""

    def __init__(self, path: Path | str) -> None:
        """Raises ValueError if the folder holds no run."""
        self.folder = RunFolder.existing(Path(path))
        self.config: Config = self.folder.load_config()

    @property
    def path(self) -> Path:
        """The run folder."""
        return self.folder.path

    @property
    def ledger(self) -> list[Line]:
        """The run's history, one line a generation."""
        return [line for line in LedgerReader(self.folder.ledger_file).new_lines() if line["kind"] == "generation"]

    @property
    def evaluations(self) -> list[Line]:
        """The run's held-out evaluations, in the order of their steps."""
        return list(LedgerReader(self.folder.eval_file).new_lines())

    @property
    def costs(self) -> list[Costs]:
        """What the run had spent after k steps, evaluations apart: entry k, from nothing at entry 0."""
        return running_costs(self.ledger)

    def curve(self, figure: str = "reward", over: Measure = "generated") -> list[tuple[float, float]]:
        """A number of the held-out evaluations, such as `accuracy`, over what the run had spent by then.

        Evaluations without that number are left out. Raises ValueError where none has it.
        """
        spent = self.costs
        points = [
            (getattr(spent[line["step"]], over), line[figure])
            for line in self.evaluations
            if line.get(figure) is not None
        ]
        if not points:
            raise ValueError(f"{self.path}: no evaluation has a figure {figure!r}")
        return points

    @property
    def adapter(self) -> Path:
        """The folder of the final PEFT adapter. Raises ValueError if the run has not ended."""
        if not self.folder.adapter.is_dir():
            raise ValueError(f"{self.path}: the run has no final adapter yet; resume it")
        return self.folder.adapter

    @property
    def summary(self) -> dict[str, Any]:
        """Where the run is, how many steps it took, and its held-out figures before and after."""
        names = ("step", "reward", "accuracy", "accuracy_ci95")
        figures = [{name: line[name] for name in names} for line in self.evaluations]
        return {"run": str(self.path), "steps": len(self.ledger), "before": figures[0], "after": figures[-1]}

    def evaluate(
        self, problems: int | None = None, samples: int | None = None, temperature: float | None = None
    ) -> Evaluation:
        """Evaluate the final adapter on held-out problems of the run's own task; see `evaluate`."""
        return evaluate(self.config, self.adapter, problems=problems, samples=samples, temperature=temperature)


def evaluate(
    config: Config,
    adapter: Path | None,
    *,
    problems: int | None = None,
    samples: int | None = None,
    temperature: float | None = None,
) -> Evaluation:
    """Evaluate a PEFT adapter, or without one the base model, on held-out problems of the config's task; greedy at
    temperature 0.

    What is left out is as in the config's `evaluation`. Raises ValueError for an adapter that does not fit the model.
    """
    samples = config.evaluation.samples if samples is None else samples
    temperature = config.evaluation.temperature if temperature is None else temperature
    if samples > 1 and temperature == 0:
        raise ValueError("samples: several completions of a prompt need a temperature above 0")
    first = config.by_stage[0]  # any of them: theta is what the space starts from
    wearing = first if adapter is None else first.model_copy(update={"space": _space_of(adapter)})
    wanted = config.evaluation if problems is None else config.evaluation.model_copy(update={"problems": problems})
    with Session(wearing, tell) as session:
        task = session.materials.task
        return evaluate_center(
            session.pool,
            session.pool.put(session.materials.space.start()),
            0,
            session.materials.problems("heldout", wanted.numbers),
            sampling(config, task, samples, temperature),
            wanted.chunk,
        )


def merge(adapter: Path, model: Path, out: Path) -> None:
    """Write the base model with the adapter folded into its weights, as a whole model.

    Raises ValueError if `out` exists or cannot be made, or the adapter does not fit.
    """
    from workers.peft_model import load_base, wearing
    from workers.prompts import load_tokenizer

    refuse_taken(out)
    # Folded in float32: in half precision a small delta would be rounded away.
    wearing(load_base(model, "float32"), adapter).merge_and_unload().save_pretrained(out)
    load_tokenizer(model).save_pretrained(out)


def copy_adapter(adapter: Path, out: Path) -> None:
    """Copy a PEFT adapter, and nothing else that is in its folder. Raises ValueError if `out` exists or cannot be
    made."""
    refuse_taken(out)
    adapter_config(adapter)
    out.mkdir(parents=True)
    for name in ADAPTER_FILES:
        shutil.copyfile(adapter / name, out / name)


def _space_of(adapter: Path) -> LoraSpaceConfig:
    found = adapter_config(adapter)
    return LoraSpaceConfig(
        rank=found["r"],
        alpha=float(found["lora_alpha"]),
        targets=adapted_modules(adapter),
        units="raw",
        init=str(adapter),
    )
