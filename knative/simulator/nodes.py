"""Where pods are placed: GPUs per node, what a node has already, and who waits."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from knative.simulator.model import ColdStart, Nodes
from knative.simulator.pod import Pod

if TYPE_CHECKING:
    from knative.simulator.replicas import Replicas


class _Node:
    """One node. `has`: when the image, or the weights, of a function are complete here."""

    __slots__ = ("free", "has")

    def __init__(self, gpus: float) -> None:
        self.free = gpus
        self.has: dict[tuple[str, str], float] = {}


class Cluster:
    """All nodes. A pod that fits nowhere is pending; of those that would fit, the one that has waited longest goes first."""

    def __init__(self, nodes: Nodes) -> None:
        self._warm = nodes.warm
        self._nodes = [_Node(nodes.gpus) for _ in range(nodes.count)] or [_Node(math.inf)]
        self._pending: dict[Pod, Replicas] = {}  # in the order in which they asked

    def ask(self, now: float, owner: Replicas, pod: Pod) -> None:
        """Start the pod where there is room, now or later: on the fullest node with room, one that has the weights first."""
        gpus = owner.gpus
        fitting = [
            (("weights", owner.name) not in node.has, node.free, index) for index, node in enumerate(self._nodes) if node.free >= gpus
        ]
        if fitting:
            self._place(min(fitting)[2], owner, pod)
            owner.start(now, pod)
        else:
            self._pending[pod] = owner

    def forget(self, pod: Pod) -> None:
        """It is pending, and no longer wanted."""
        del self._pending[pod]

    def release(self, now: float, gpus: int, pod: Pod) -> None:
        """The pod is gone; those that wait may start in its place, the only one where there is room now that was none before."""
        assert pod.node is not None
        node = self._nodes[pod.node]
        node.free += gpus
        placed: list[tuple[Replicas, Pod]] = []
        for waiting, owner in self._pending.items():
            if node.free <= 0:
                break
            if owner.gpus <= node.free:
                self._place(pod.node, owner, waiting)
                placed.append((owner, waiting))
        for _, waiting in placed:
            del self._pending[waiting]
        for owner, waiting in placed:
            owner.start(now, waiting)

    def _place(self, node: int, owner: Replicas, pod: Pod) -> None:
        pod.node = node
        self._nodes[node].free -= owner.gpus

    def cold_start_s(self, now: float, name: str, node: int, stages: ColdStart, rng: np.random.Generator) -> float:
        """How long a pod takes to start on `node`, and what the node has from then on."""

        def drawn(stage: str) -> float:
            return float(getattr(stages, stage).sample(rng, 1)[0])

        has = self._nodes[node].has
        at = now + drawn("schedule")
        for what, fetch in (("image", "image"), ("weights", "weights_store")):
            complete = has.get((what, name))
            if complete is None and not self._warm:
                complete = at + drawn(fetch)
            has[what, name] = complete = at if complete is None else complete
            # Another pod on the node may be fetching it just now: one download per node.
            at = max(at, complete)
        return at + drawn("weights_cache") + drawn("imports") + drawn("load") - now
