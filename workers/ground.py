"""Where the workers of a run may be: the places that a cluster's nodes have, less those where a worker cannot start."""

from __future__ import annotations

from collections.abc import Sequence

from es_engine.config import Config
from workers.cluster import on_gpus
from workers.places import Nodes, Place, bounds, bundles, free_places, plan_places


class Ground:
    """What is known of the places of a cluster. It holds none of the workers that are there."""

    def __init__(self, config: Config, nodes: Nodes) -> None:
        self.fewest, self.most = bounds(config.pool)
        self._config = config
        self._on_gpu = on_gpus(config, nodes)
        self._proven: set[str] = set()
        self._barred: set[str] = set()
        self._given_up: list[Place] = []

    @property
    def bundles(self) -> list[dict[str, float]]:
        """What the most workers take together, for an autoscaler; nothing where `pool.workers` sets no bounds."""
        return bundles(self._config.pool, self._on_gpu)

    def check_room(self, nodes: Nodes, nodes_may_come: bool) -> None:
        """Raises ValueError if there is no room for the fewest workers, unless nodes may come."""
        pool, room = self._config.pool, len(self._places(nodes))
        waits = nodes_may_come and not isinstance(pool.workers, int | str)
        if room < self.fewest and not waits:
            kind = f"{pool.tensor_parallel} GPU(s)" if self._on_gpu else f"{pool.threads} CPU(s)"
            raise ValueError(f"pool.workers: the cluster has room for {room} workers of {kind} each, not {self.fewest}")

    def room(self, nodes: Nodes, taken: Sequence[Place]) -> list[Place]:
        """The free places in which workers should begin, so that there are as many as there may be."""
        free = self._free(nodes, taken)
        return free[: int(max(0, min(self.most - len(taken), len(free))))]

    def place_for(self, place: Place, nodes: Nodes, taken: Sequence[Place], failed: bool) -> Place | None:
        """Where a worker goes on that lost its process at a place: there, or elsewhere if its node is gone or it failed
        to start."""
        free = self._free(nodes, taken)
        elsewhere = [other for other in free if other.node != place.node]
        if place in free and not (failed and elsewhere):
            return place
        return next(iter([*elsewhere, *free]), None)

    def others_than(self, node: str, nodes: Nodes) -> bool:
        """Whether other nodes have places for workers, so that the run can go on there; a head may have none."""
        return any(place.node != node for place in self._free(nodes, []))

    def prove(self, node: str) -> None:
        """Note that a worker has started on a node."""
        self._proven.add(node)

    def is_proven(self, node: str) -> bool:
        """Whether a worker has ever started on a node."""
        return node in self._proven

    def give_up(self, place: Place) -> None:
        """Have no worker begin in one of the places like this one."""
        self._given_up.append(place)

    def bar(self, node: str) -> None:
        """Have no worker begin on a node."""
        self._barred.add(node)

    def _free(self, nodes: Nodes, taken: Sequence[Place]) -> list[Place]:
        return free_places(self._places(nodes), [*taken, *self._given_up])

    def _places(self, nodes: Nodes) -> list[Place]:
        usable = {node: resources for node, resources in nodes.items() if node not in self._barred}
        return plan_places(self._config, usable, self._on_gpu)
