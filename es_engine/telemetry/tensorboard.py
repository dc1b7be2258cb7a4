"""TensorBoard events in the run folder."""

from __future__ import annotations

from pathlib import Path

from es_engine.telemetry.base import Line
from es_engine.telemetry.scalars import evaluation_scalars, generation_scalars


class TensorBoardTelemetry:
    """Scalars of every generation and evaluation, written out at once so that a kill loses none.

    `first_step` is the first generation still to come: what an earlier process wrote of it or later ones is hidden.
    """

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter  # seconds to import, and the status of a run needs none

        # The writer itself sets no mark before the first event of a folder's first process, and needs none.
        self._writer = SummaryWriter(str(folder), purge_step=first_step + 1 if first_step else None)

    def generation(self, line: Line) -> None:
        self._write(generation_scalars(line), line["step"] + 1)

    def evaluation(self, line: Line) -> None:
        self._write(evaluation_scalars(line), line["step"])

    def message(self, text: str) -> None:
        """TensorBoard shows figures only."""

    def close(self, error: BaseException | None = None) -> None:
        self._writer.close()

    def _write(self, scalars: dict[str, float], step: int) -> None:
        for tag, value in scalars.items():
            self._writer.add_scalar(tag, value, step)
        self._writer.flush()
