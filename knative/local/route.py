"""Which revision of a Service a request is for: `spec.traffic`, resolved."""

import random
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from knative.local.schema import TrafficTarget


@dataclass(frozen=True)
class Route:
    """Revisions by name, with the percent of the requests that each is given, and the tags that choose one."""

    shares: Mapping[str, int]  # all above 0; their sum is 100
    tags: Mapping[str, str]

    @property
    def names(self) -> set[str]:
        """The revisions that a request can reach."""
        return {*self.shares, *self.tags.values()}

    def choose(self, tag: str | None) -> str:
        """The revision of one request; a tag that is none counts for nothing."""
        if tag and tag in self.tags:
            return self.tags[tag]
        names = list(self.shares)
        return names[0] if len(names) == 1 else random.choices(names, list(self.shares.values()))[0]


def resolve(traffic: Sequence[TrafficTarget], latest: str) -> Route:
    """The route, where the latest revision that is ready is `latest`."""
    shares: Counter[str] = Counter()
    tags = {}
    for target in traffic:
        name = target.revision_name or latest
        if target.percent:
            shares[name] += target.percent
        if target.tag:
            tags[target.tag] = name
    return Route(shares, tags)
