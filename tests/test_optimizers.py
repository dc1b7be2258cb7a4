"""Steps of theta against plain torch.optim, and optimizers that stop and go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from es_engine import noise
from es_engine.config import AdamConfig, AdamWConfig, OptimizerConfig, SgdConfig
from es_engine.optimizers import TorchOptimizer, build_optimizer
from es_engine.run_folder import RunFolder

DIM = 50
RATES = (0.1, 0.1, 0.05, 0.2, 0.01, 0.1, 0.3)

Plain = Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer]

CASES: list[tuple[OptimizerConfig, Plain]] = [
    (SgdConfig(lr=1.0), lambda p: torch.optim.SGD(p)),
    (SgdConfig(lr=1.0, momentum=0.9), lambda p: torch.optim.SGD(p, momentum=0.9)),
    (
        SgdConfig(lr=1.0, momentum=0.8, nesterov=True, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, momentum=0.8, nesterov=True, weight_decay=0.1),
    ),
    (AdamConfig(lr=1.0), lambda p: torch.optim.Adam(p)),
    (AdamConfig(lr=1.0, betas=(0.5, 0.7), eps=1e-3), lambda p: torch.optim.Adam(p, betas=(0.5, 0.7), eps=1e-3)),
    (AdamWConfig(lr=1.0, weight_decay=0.3), lambda p: torch.optim.AdamW(p, weight_decay=0.3)),
]
NAMES = ["sgd", "momentum", "nesterov", "adam", "adam-betas", "adamw"]


def start() -> noise.Vector:
    return noise.draw(0, 0, 0, DIM)


def direction(step: int) -> noise.Vector:
    return noise.draw(0, 1, step, DIM)


def walk(optimizer: TorchOptimizer, theta: noise.Vector, steps: range) -> noise.Vector:
    for step in steps:
        theta = optimizer.step(theta, direction(step), RATES[step])
    return theta


def plain_walk(plain: Plain, beginning: noise.Vector) -> noise.Vector:
    """The same walk by torch itself, which descends."""
    parameter = torch.nn.Parameter(torch.from_numpy(beginning.copy()))
    optimizer = plain([parameter])
    for step, rate in enumerate(RATES):
        optimizer.param_groups[0]["lr"] = rate
        parameter.grad = torch.from_numpy(-direction(step))
        optimizer.step()
    return parameter.detach().numpy()


@pytest.mark.parametrize(("config", "plain"), CASES, ids=NAMES)
def test_steps_are_torchs_own_to_the_bit(config: OptimizerConfig, plain: Plain) -> None:
    walked = walk(build_optimizer(config, start()), start(), range(len(RATES)))
    assert walked.dtype == np.float32
    assert walked.tobytes() == plain_walk(plain, start()).tobytes()


@pytest.mark.parametrize(("config", "plain"), [CASES[2], CASES[5]], ids=["sgd", "adamw"])
def test_decay_toward_the_start_is_torchs_decay_of_the_distance(config: OptimizerConfig, plain: Plain) -> None:
    anchored = config.model_copy(update={"decay_to": "start"})
    walked = walk(build_optimizer(anchored, start()), start(), range(len(RATES)))
    shifted = start() + plain_walk(plain, np.zeros(DIM, dtype=np.float32))
    np.testing.assert_allclose(walked, shifted, atol=1e-5)  # the distance is rounded anew in each step
    to_zero = walk(build_optimizer(config, start()), start(), range(len(RATES)))
    assert np.abs(walked - to_zero).max() > 0.01


@pytest.mark.parametrize("kind", [SgdConfig, AdamWConfig])
def test_without_a_direction_decay_leads_to_where_it_should(kind: type[SgdConfig] | type[AdamWConfig]) -> None:
    still = np.zeros(DIM, dtype=np.float32)
    for decay_to, goal in (("zero", still), ("start", start())):
        optimizer = build_optimizer(kind(lr=1.0, weight_decay=0.5, decay_to=decay_to), start())  # type: ignore[arg-type]
        theta = start() + 3
        for _ in range(60):
            theta = optimizer.step(theta, still, lr=0.5)
        np.testing.assert_allclose(theta, goal, atol=1e-5)


@pytest.mark.parametrize(("config", "plain"), CASES, ids=NAMES)
@pytest.mark.parametrize("done", [0, 1, 4])
def test_a_saved_optimizer_goes_on_bit_for_bit(
    tmp_path: Path, config: OptimizerConfig, plain: Plain, done: int
) -> None:
    """Through the file of a checkpoint."""
    folder = RunFolder(tmp_path)
    first = build_optimizer(config, start())
    theta = walk(first, start(), range(done))
    folder.save_checkpoint(done, {"theta": torch.from_numpy(theta), **first.state()})
    loaded = next(folder.load_checkpoints(most=done), None)
    assert loaded is not None
    step, tensors = loaded
    assert step == done
    theta = tensors.pop("theta").numpy()
    second = build_optimizer(config, start())
    second.load_state(tensors)
    walked = walk(second, theta, range(done, len(RATES)))
    assert walked.tobytes() == plain_walk(plain, start()).tobytes()


def test_a_forgotten_state_is_noticed() -> None:
    """The test above could not fail if the moments were of no consequence."""
    for config, plain in CASES[1:]:
        theta = walk(build_optimizer(config, start()), start(), range(4))
        walked = walk(build_optimizer(config, start()), theta, range(4, len(RATES)))
        assert walked.tobytes() != plain_walk(plain, start()).tobytes()


def test_a_state_is_a_copy() -> None:
    optimizer = build_optimizer(AdamConfig(lr=1.0), start())
    theta = walk(optimizer, start(), range(3))
    before = optimizer.state()
    kept = {name: tensor.clone() for name, tensor in before.items()}
    walk(optimizer, theta, range(3, 6))
    assert before.keys() == {"step", "exp_avg", "exp_avg_sq"}
    assert all(torch.equal(before[name], kept[name]) for name in kept)


def test_a_step_leaves_its_arguments_alone() -> None:
    for config, _ in CASES:
        theta, way = start(), direction(0)
        build_optimizer(config, theta).step(theta, way, lr=0.1)
        assert theta.tobytes() == start().tobytes()
        assert way.tobytes() == direction(0).tobytes()
