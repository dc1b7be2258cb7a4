"""`sigma: auto`: the scale of the perturbations, found by trying a few before the first generation.

Sigma in weight units does not carry over from model to model (0.03 suits one, 0.3 another), but its effect does: the
best sigma spreads the fitness of the population as far as possible without yet lowering its mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from es_engine.methods import shaping
from es_engine.methods.base import CallRunner
from es_engine.methods.es import EvolutionStrategies
from workers.chunks import Chunk, Problem
from workers.engine import CENTER

PROBES = 2**32
"""The generation of the center and of all probe populations, out of the way of the run's. In one generation they share
directions and what is drawn where answers are sampled, so that nothing but sigma tells them apart."""

STANDARD_ERRORS = 2.0
"""A probe's mean counts as lowered when it is this many of its standard errors below the center's."""


@dataclass(frozen=True, slots=True)
class Probe:
    """The fitness of a small population at one sigma: its mean and its standard deviation over members."""

    sigma: float
    mean: float
    spread: float
    members: int


def calibrate(
    method: EvolutionStrategies, pool: CallRunner, theta: Any, version: int, batch: Sequence[Problem]
) -> dict[str, Any]:
    """Try every probe sigma on the first prompts of the batch. The ledger's record of it, with the chosen `sigma`. An
    answer without a score has the lowest, for one far from the center may be too broken to be scored."""
    config = method.config
    size = config.probe_pairs * 2
    probe = method.with_population(size)
    center = _center_chunk(probe)
    groups = [probe.chunks(PROBES, sigma) for sigma in config.probe_sigmas]
    everything = [center, *(chunk for group in groups for chunk in group)]
    measured = probe.fitness.measure(pool, everything, batch, theta, version)
    (filled,) = shaping.with_lowest(measured.fitness)
    values = filled.mean(axis=1)
    center_mean = float(values[0])
    probes = [
        Probe(sigma, float(row.mean()), shaping.spread(row) or 0.0, size)
        for sigma, row in zip(config.probe_sigmas, values[1:].reshape(len(groups), size), strict=True)
    ]
    return {
        "sigma": choose(probes, center_mean),
        "center_mean": center_mean,
        "probes": [{"sigma": probe.sigma, "mean": probe.mean, "spread": probe.spread} for probe in probes],
        "tokens": measured.costs.generated,
        "costs": measured.costs.to_json(),
    }


def choose(probes: Sequence[Probe], center_mean: float) -> float:
    """The sigma with the largest spread among those that do not lower the mean.

    Raises ValueError where none spreads.
    """
    fit = [
        probe
        for probe in probes
        if probe.spread > 0 and probe.mean >= center_mean - STANDARD_ERRORS * probe.spread / np.sqrt(probe.members)
    ]
    if not fit:
        tried = ", ".join(f"{probe.sigma:g}" for probe in probes)
        raise ValueError(
            f"method.sigma: auto found no sigma among {tried} that changes the fitness without lowering its mean; "
            "give a number, or method.probe_sigmas of another size"
        )
    return max(fit, key=lambda probe: probe.spread).sigma


def _center_chunk(method: EvolutionStrategies) -> Chunk:
    first = method.chunks(PROBES, 0.0)[0]
    return Chunk(PROBES, 0, 0.0, (CENTER,), first.problems[:1], first.sampling)
