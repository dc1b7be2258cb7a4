"""What a step costs, in the four measures that every method is compared by.

- *generated*: tokens of completions, end tokens included.
- *processed*: tokens that models were given to read in forward passes, and the generated ones. A prompt counts once for
  each member that is asked it, however many samples of the answer there are, since they share its keys and values; each
  turn of a game counts its whole prompt. It is an upper bound of what has to be read: what the engine's prefix cache
  spares counts as if it had been read, and so does the last token of a completion.
- *flops*: 2P for each processed token, prompts included, and 4P for each token of a backward pass. P is the number of
  parameters that multiply, those of the base model and, where it wears one, of the adapter. It is the usual estimate,
  not a measurement: attention scores, norms and sampling are left out; every token counts the output embedding, which
  a prompt needs once; and a backward pass counts the gradients of all weights, of which LoRA needs the adapter's only.
- *worker_seconds*: wall-clock seconds in which workers were busy with the step's calls, as each of them measures it,
  added over workers. A worker of several devices counts once. It alone differs from run to run.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

Measure = Literal["generated", "processed", "flops", "worker_seconds"]


@dataclass(frozen=True, slots=True)
class Costs:
    """Tokens generated, tokens processed, floating-point operations and seconds of workers."""

    generated: int = 0
    processed: int = 0
    flops: int = 0
    worker_seconds: float = 0.0

    def __add__(self, other: Costs) -> Costs:
        return Costs(
            self.generated + other.generated,
            self.processed + other.processed,
            self.flops + other.flops,
            self.worker_seconds + other.worker_seconds,
        )

    def __sub__(self, other: Costs) -> Costs:
        return Costs(
            self.generated - other.generated,
            self.processed - other.processed,
            self.flops - other.flops,
            self.worker_seconds - other.worker_seconds,
        )

    def to_json(self) -> dict[str, int | float]:
        """The four by name, as the ledger has them."""
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Costs:
        """What `to_json` wrote."""
        return cls(**data)


def costs_of(
    parameters: int, forward_tokens: int, *, backward_tokens: int = 0, generated: int = 0, seconds: float = 0.0
) -> Costs:
    """The costs of passes through a model in which so many parameters multiply.

    `generated` are among the forward tokens. Where some passes wear an adapter and others do not, add both costs.
    """
    assert generated <= forward_tokens, "what is generated is processed too"
    return Costs(
        generated=generated,
        processed=forward_tokens,
        flops=parameters * (2 * forward_tokens + 4 * backward_tokens),
        worker_seconds=seconds,
    )
