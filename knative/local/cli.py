"""`relight run`."""

import asyncio
import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import click

from knative.local.errors import PlatformError
from knative.local.manifest import Sources

MAX_PORT = 65535


def _names(context: click.Context, option: click.Parameter, names: tuple[str, ...]) -> tuple[str, ...]:
    """The names of `--env`. Their values are never repeated: they may be secrets."""
    for name in names:
        variable, equals, _ = name.partition("=")
        if equals:
            raise click.BadParameter(f"name the variable alone, as in --env {variable}; its value belongs into the environment")
        if variable not in os.environ:
            raise click.BadParameter(f"{variable} is not set here")
    return names


@click.command()
@click.argument("manifests", nargs=-1, required=True, type=click.Path(allow_dash=True, path_type=Path))
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, MAX_PORT), help="Where all Services answer.")
@click.option("--admin-port", type=click.IntRange(1, MAX_PORT), help="Where the platform tells its state. [default: port + 1]")
@click.option(
    "--state-dir", default=Path(".relight"), show_default=True, type=click.Path(path_type=Path), help="Volumes, logs, node cache."
)
@click.option("--default-service", help="Who answers a Host that names no Service. [default: the first in the manifests]")
@click.option("--seed", "seeds", multiple=True, metavar="DIR=s3://BUCKET/PREFIX", help="Put a directory into the embedded object store.")
@click.option(
    "--fork-server/--no-fork-server",
    default=True,
    show_default=True,
    help="Fork functions from a process that has imported their libraries, or import them anew at each start.",
)
@click.option(
    "--gpus",
    type=click.IntRange(0, 1024),
    metavar="N",
    help="How many GPUs there are for `nvidia.com/gpu`. [default: as many as are found]",
)
@click.option("--reload", is_flag=True, help="Take changed code and weights as soon as they are saved, through new pods that take over.")
@click.option(
    "--env",
    "inherits",
    multiple=True,
    metavar="NAME",
    callback=_names,
    help="Let pods inherit this variable, too; of most of the environment they know nothing.",
)
def run(
    manifests: tuple[Path, ...],
    port: int,
    admin_port: int | None,
    state_dir: Path,
    default_service: str | None,
    seeds: tuple[str, ...],
    fork_server: bool,
    gpus: int | None,
    inherits: tuple[str, ...],
    reload: bool,
) -> None:
    """Run the Knative Services in MANIFESTS on this machine until Ctrl-C.

    MANIFESTS are YAML files, directories of them, or - for stdin. Files are watched: a change is taken at once, as SIGHUP says too.
    """
    from knative.local import plain
    from knative.local.descriptors import raise_limit
    from knative.local.platform import Platform, PlatformSettings
    from knative.local.seeds import Seed
    from knative.local.terminal import Terminal

    raise_limit()
    try:
        if port == MAX_PORT and not admin_port:
            raise PlatformError(f"--admin-port: must be named with --port {port}, after which there is none")
        settings = PlatformSettings(
            port,
            admin_port or port + 1,
            state_dir,
            default_service,
            [Seed.parse(text) for text in seeds],
            fork_server,
            gpus,
            inherits,
            reload,
        )

        async def main() -> None:
            await Platform(settings, Sources(manifests), Terminal()).run()

        with _patient_errors():
            asyncio.run(main())
    except PlatformError as error:
        raise click.ClickException(plain.block(str(error))) from error


@contextlib.contextmanager
def _patient_errors() -> Iterator[None]:
    """Whoever does not read what goes wrong holds nothing up, as with what is said on standard output (see Terminal)."""
    from knative.local import plain
    from knative.local.patient import PatientStream

    try:
        stream = PatientStream(sys.stderr, plain.record)
    except (OSError, ValueError):  # it has no descriptor
        yield
        return
    try:
        with contextlib.redirect_stderr(cast(TextIO, stream)):
            yield
    finally:
        stream.close()
