"""torch.optim on theta. Directions are ascended."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from es_engine.config.optimizer import AdamConfig, OptimizerConfig, SgdConfig

Vector = npt.NDArray[np.float32]


class TorchOptimizer:
    """A torch optimizer whose parameter is theta or, where it decays toward the start, theta's distance from it."""

    def __init__(self, optimizer: type[torch.optim.Optimizer], settings: dict[str, Any], anchor: Vector) -> None:
        self._anchor = torch.from_numpy(anchor.copy())
        self._parameter = torch.nn.Parameter(torch.zeros(len(anchor)))
        self._optimizer = optimizer([self._parameter], maximize=True, **settings)

    def step(self, theta: Vector, direction: Vector, lr: float) -> Vector:
        """The next theta, shape (D,), after one step of learning rate `lr` up `direction`."""
        self._parameter.data = torch.from_numpy(theta) - self._anchor
        self._parameter.grad = torch.from_numpy(direction)
        self._optimizer.param_groups[0]["lr"] = lr
        self._optimizer.step()
        return (self._parameter.data + self._anchor).numpy()

    def state(self) -> dict[str, torch.Tensor]:
        """A copy of the moments and counters, by name, as tensors."""
        found = self._optimizer.state_dict()["state"].get(0, {})
        return {name: torch.as_tensor(value).clone() for name, value in found.items() if value is not None}

    def takes(self, tensors: dict[str, torch.Tensor]) -> bool:
        """Could `state` have given this, before a first step or later? What came before is forgotten."""
        nothing = np.zeros(len(self._anchor), dtype=np.float32)
        self.step(nothing, nothing, 0.0)
        return not tensors or _shapes(tensors) == _shapes(self.state())

    def load_state(self, tensors: dict[str, torch.Tensor]) -> None:
        """Take over what `state` gave."""
        whole = self._optimizer.state_dict()
        self._optimizer.load_state_dict({**whole, "state": {0: tensors} if tensors else {}})


def _shapes(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in tensors.items()}


def build_optimizer(config: OptimizerConfig, start: Vector) -> TorchOptimizer:
    """The configured optimizer for a run whose theta begins at `start`, shape (D,)."""
    zero = np.zeros_like(start)
    if isinstance(config, SgdConfig):
        settings = {
            "lr": config.lr,
            "momentum": config.momentum,
            "nesterov": config.nesterov,
            "weight_decay": config.weight_decay,
        }
        return TorchOptimizer(torch.optim.SGD, settings, start if config.decay_to == "start" else zero)
    moments = {"lr": config.lr, "betas": config.betas, "eps": config.eps, "foreach": False}
    if isinstance(config, AdamConfig):
        return TorchOptimizer(torch.optim.Adam, moments, zero)
    decay = {"weight_decay": config.weight_decay}
    return TorchOptimizer(torch.optim.AdamW, moments | decay, start if config.decay_to == "start" else zero)
