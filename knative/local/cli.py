"""`relight run`."""

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO, cast

import click

from knative.local.errors import PlatformError

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


def _settings(context: click.Context, option: click.Parameter, texts: tuple[str, ...]) -> dict[str, str]:
    """The variables of `--set`. A value is not repeated: it may be a secret."""
    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise click.BadParameter("must be NAME=VALUE, as in --set FUNCTION_TASK=text-classification")
        found[name] = value
    return found


@click.command()
@click.argument("manifests", nargs=-1, type=click.Path(allow_dash=True, path_type=Path), metavar="[MANIFEST…|FOLDER|MODULE:CLASS]")
@click.option("--port", default=8080, show_default=True, type=click.IntRange(1, MAX_PORT), help="Where all Services answer.")
@click.option("--admin-port", type=click.IntRange(1, MAX_PORT), help="Where the platform tells its state. [default: port + 1]")
@click.option(
    "--state-dir", default=Path(".relight"), show_default=True, type=click.Path(path_type=Path), help="Volumes, logs, node cache."
)
@click.option("--reload", is_flag=True, help="Take changed code and weights as soon as they are saved, through new pods that take over.")
@click.option("--weights", type=click.Path(path_type=Path), metavar="DIR", help="Of an agent: the directory with its weights.")
@click.option("--name", help="Of an agent: what its Service is called. [default: as its class]")
@click.option("--example", metavar="JSON", help="Of an agent: a request that shows it at work.")
@click.option(
    "--set", "settings", multiple=True, metavar="NAME=VALUE", callback=_settings, help="Of an agent: a variable of its environment."
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
    reload: bool,
    default_service: str | None,
    seeds: tuple[str, ...],
    fork_server: bool,
    gpus: int | None,
    inherits: tuple[str, ...],
    **own: object,
) -> None:
    """Run Knative Services on this machine until Ctrl-C.

    \b
    relight run                                  the project in this folder: service.yaml, with the weights in weights/
    relight run FOLDER                           the project in that one
    relight run MANIFEST…                        YAML files, directories of them, or - for stdin
    relight run my_model:Linear --weights DIR    an agent, without a manifest

    An agent's module is looked for beside the manifest, and in the folder where this is started. Files are watched: a changed manifest is
    taken at once, and changed code and weights with --reload, on SIGHUP, or when the dashboard is asked to.
    """
    # A hang-up while we start is for the platform, which unblocks it: by itself it would end us without a word, or half-started.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGHUP})

    from knative.local import plain
    from knative.local.descriptors import raise_limit
    from knative.local.platform import Platform, PlatformSettings
    from knative.local.project import choose
    from knative.local.seeds import Seed
    from knative.local.terminal import Terminal

    raise_limit()
    try:
        if port == MAX_PORT and not admin_port:
            raise PlatformError(f"--admin-port: must be named with --port {port}, after which there is none")
        chosen = choose(manifests, [Seed.parse(text) for text in seeds], {name: value for name, value in own.items() if value})
        settings = PlatformSettings(
            port, admin_port or port + 1, state_dir, default_service, chosen.seeds, fork_server, gpus, inherits, reload
        )

        async def main() -> None:
            terminal = Terminal()
            for note in chosen.notes:
                terminal.note(note)
            await Platform(settings, chosen.sources, terminal).run()

        with _patient_errors():
            asyncio.run(main())
    except PlatformError as error:
        raise click.ClickException(plain.block(str(error))) from error
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})


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
