"""What the commands of `relight simulate` share."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import click

from knative.simulator.errors import SimulatorError


def read_knobs(settings: Sequence[str]) -> dict[str, str]:
    """NAME=VALUE texts as a dictionary; a later one wins. Raises click.UsageError for one without `=`."""
    knobs: dict[str, str] = {}
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not name.strip():
            raise click.UsageError(f"--set {setting}: must be NAME=VALUE, e.g. --set window=30s")
        knobs[name.strip()] = value.strip()
    return knobs


@contextmanager
def errors_in_one_line() -> Iterator[None]:
    """What the simulator raises on purpose is for the user, without a traceback."""
    try:
        yield
    except SimulatorError as err:
        raise click.ClickException(str(err)) from None
