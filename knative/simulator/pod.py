"""A pod, as the simulation sees it."""

from __future__ import annotations

from knative.autoscaler.choice import PENDING


class Job:
    """A request in a pod whose requests slow each other down."""

    __slots__ = ("arrived_s", "done", "taken_s")

    def __init__(self, arrived_s: float, taken_s: float) -> None:
        self.arrived_s = arrived_s
        self.taken_s = taken_s
        self.done = False


class Pod:
    """One pod. It holds its node's GPUs from STARTING to GONE."""

    __slots__ = (
        "at_s",
        "generation",
        "in_flight",
        "jobs",
        "listed",
        "node",
        "number",
        "rank",
        "ready_s",
        "state",
        "told_s",
        "version",
        "work_s",
    )

    def __init__(self, number: int, generation: int) -> None:
        self.number = number  # see choice.Candidate
        self.generation = generation  # of the revision
        self.state = PENDING
        self.node: int | None = None
        self.in_flight = 0
        self.listed = False
        self.rank = 0
        self.ready_s = 0.0  # since when it takes requests
        self.told_s = 0.0  # when it was told to go
        # Only where requests slow each other down: how much work each request that was there all the time has had, by when, and
        # at how much each will be done. `version` tells which of the events made for the next one still holds.
        self.work_s = 0.0
        self.at_s = 0.0
        self.jobs: list[tuple[float, int, Job]] = []
        self.version = 0
