"""TensorBoard events in the run folder."""

from __future__ import annotations

from pathlib import Path

from torch.utils.tensorboard import SummaryWriter

from es_engine.telemetry.base import Line, numbers

TAGS = {
    "reward_mean": "reward/mean",
    "reward_best": "reward/best",
    "accuracy": "reward/accuracy",
    "fitness_spread": "population/fitness_spread",
    "constant_members": "population/constant_members",
    "sigma": "step/sigma",
    "lr": "step/lr",
    "theta_rms": "step/theta_rms",
    "rollouts": "throughput/rollouts",
    "tokens": "throughput/tokens",
    "seconds": "seconds/generation",
    "seconds_rollouts": "seconds/rollouts",
    "seconds_update": "seconds/update",
    "worker_restarts": "failures/worker_restarts",
}
MAPPINGS = ("components", "failures", "spent", "learning")


class TensorBoardTelemetry:
    """Scalars of every generation and evaluation, written out at once so that a kill loses none.

    `first_step` is the first generation still to come: what an earlier process wrote of it or later ones is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        # The writer itself sets no mark before the first event of a folder's first process, and needs none.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def generation(self, line: Line) -> None:
        scalars = {tag: line[key] for key, tag in TAGS.items() if line[key] is not None}
        scalars |= numbers({name: line[name] for name in MAPPINGS})
        scalars["throughput/tokens_per_second"] = line["tokens"] / line["seconds"]
        self._write(scalars, line["step"] + 1)

    def evaluation(self, line: Line) -> None:
        self._write({f"evaluation/{name}": value for name, value in numbers(line)}, line["step"])

    def message(self, text: str) -> None:
        """TensorBoard shows figures only."""

    def close(self) -> None:
        self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()
