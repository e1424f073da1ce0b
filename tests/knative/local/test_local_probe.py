"""Probes that cannot be asked say nothing of whom they are for."""

import asyncio
import contextlib
import os
import resource
import sys
from collections.abc import Iterator
from dataclasses import replace
from unittest.mock import Mock

import aiohttp
import pytest

from knative.local.launch import Probe
from knative.local.probe import Tally, ask

HTTP = Probe(1, "/healthz", {}, period_s=1.0, timeout_s=30.0, failures=2, delay_s=0.0)
PROBES = [
    pytest.param(HTTP, id="HTTP"),
    pytest.param(replace(HTTP, path=None), id="TCP"),
    pytest.param(replace(HTTP, command=(sys.executable, "-c", "")), id="a command"),
]


@contextlib.contextmanager
def none_left() -> Iterator[None]:
    """No file descriptor."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest = os.dup(0)
    os.close(lowest)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


@pytest.mark.parametrize("probe", PROBES)
def test_a_probe_without_a_descriptor_is_neither_a_success_nor_a_failure(probe: Probe) -> None:
    async def scenario() -> None:
        process = Mock(env=dict(os.environ), cwd="/")
        async with aiohttp.ClientSession() as session:
            asked = [await ask(probe, process, session)]  # all that is opened once is open
            with none_left():
                asked += [await ask(probe, process, session) for _ in range(3)]
        first, *others = asked
        assert first.is_well is bool(probe.command)
        assert [answer.is_well for answer in others] == [None] * 3
        assert "file descriptor" in others[0].why

    asyncio.run(scenario())


def test_what_could_not_be_asked_leaves_the_count_as_it_was() -> None:
    tally = Tally(HTTP)
    assert [tally.add(answer) for answer in (False, None, None, False)] == [None, None, None, False]
    assert [tally.add(answer) for answer in (True, None, False)] == [True, None, None]
