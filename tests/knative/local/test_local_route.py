"""Which revision a request is for, by `spec.traffic`."""

from collections import Counter
from typing import Any

import pytest

from knative.local.route import resolve
from knative.local.schema import TrafficTarget

LATEST = "hello-00003"


def targets(*items: dict[str, Any]) -> list[TrafficTarget]:
    return [TrafficTarget.model_validate(item) for item in items]


@pytest.mark.parametrize(
    ("items", "shares", "tags"),
    [
        pytest.param([{"percent": 100}], {LATEST: 100}, {}, id="the latest"),
        pytest.param([{"latestRevision": True, "percent": 100, "tag": "now"}], {LATEST: 100}, {"now": LATEST}, id="the latest with a tag"),
        pytest.param(
            [{"revisionName": "hello-00001", "percent": 90}, {"percent": 10}],
            {"hello-00001": 90, LATEST: 10},
            {},
            id="a split with the latest",
        ),
        pytest.param(
            [{"revisionName": "hello-00001", "percent": 100}, {"tag": "try"}],
            {"hello-00001": 100},
            {"try": LATEST},
            id="a tag without traffic",
        ),
        pytest.param([{"percent": 40}, {"revisionName": LATEST, "percent": 60}], {LATEST: 100}, {}, id="one revision by two ways"),
    ],
)
def test_traffic_is_resolved_to_revisions(items: list[dict[str, Any]], shares: dict[str, int], tags: dict[str, str]) -> None:
    route = resolve(targets(*items), LATEST)
    assert (dict(route.shares), dict(route.tags)) == (shares, tags)
    assert route.names == {*shares, *tags.values()}


def test_requests_are_split_by_chance_in_the_given_proportion() -> None:
    route = resolve(targets({"revisionName": "hello-00001", "percent": 90}, {"percent": 10}), LATEST)
    chosen = Counter(route.choose(None) for _ in range(10_000))
    assert chosen.keys() == route.shares.keys()
    assert 800 < chosen[LATEST] < 1200  # more than six standard deviations to both sides


def test_a_tag_chooses_its_revision_and_one_that_there_is_not_chooses_nothing() -> None:
    route = resolve(targets({"revisionName": "hello-00001", "percent": 100}, {"tag": "try"}), LATEST)
    assert {route.choose("try") for _ in range(50)} == {LATEST}
    assert {route.choose(tag) for tag in (None, "", "other") for _ in range(50)} == {"hello-00001"}
