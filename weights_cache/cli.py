"""The commands that move weights: `serve` (the sidecar), `push`, `pull`."""

import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from weights_cache import environment
from weights_cache.errors import WeightsError
from weights_cache.settings import WeightsSettings


class _Command(click.Command):
    """Our errors are for people: one line and exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s", stream=sys.stderr)
        logging.getLogger("botocore").setLevel(logging.WARNING)
        try:
            return super().invoke(ctx)
        except (WeightsError, OSError) as error:
            raise click.ClickException(str(error)) from error


@click.group()
def main() -> None:
    """Weights: keep them present on a node, push and pull them."""


main.command_class = _Command


@main.command()
def serve() -> None:
    """Run the sidecar, configured by the WEIGHTS_ variables."""
    from weights_cache.sidecar import serve as run

    raise SystemExit(run(_settings()))


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("uri")
@click.option("--create-bucket", is_flag=True, help="Create the bucket if there is none.")
def push(directory: Path, uri: str, create_bucket: bool) -> None:
    """Upload the files of DIRECTORY to URI (s3://bucket/prefix) and print the snapshot they make."""
    from weights_cache.cache import check_path, snapshot_id
    from weights_cache.store import Store
    from weights_cache.uri import WeightsUri

    target = WeightsUri.parse(uri)
    if target.snapshot:
        raise WeightsError(f"{uri}: a snapshot cannot be pushed to; leave out what follows the '#'")
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    if not files:
        raise WeightsError(f"{directory} holds no files")
    for name in files:
        check_path(name)
    store = Store(target)
    if create_bucket:
        store.ensure_bucket()
    total = sum(path.stat().st_size for path in files.values())
    sent = _Counter()
    with _shown(f"push {target}", total, sent.value):
        for name, path in files.items():
            store.upload(path, name, sent.add)
    listed = store.list()
    if strangers := sorted({file.path for file in listed} - set(files)):
        click.echo(
            f"note: {target} also holds {len(strangers)} other objects, such as {strangers[0]}; they are part of the snapshot", err=True
        )
    click.echo(f"{target}#{snapshot_id(store.namespace, listed)}")


@main.command()
@click.argument("uri")
@click.option("--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="The cache directory. [default: $WEIGHTS_CACHE_DIR]")
@click.option("--json", "as_json", is_flag=True, help="Print the result as one JSON object, on the last line.")
def pull(uri: str, cache_dir: Path | None, as_json: bool) -> None:
    """Bring the weights at URI into the node's cache and print where they are."""
    from weights_cache.cache import NodeCache
    from weights_cache.fetch import Puller
    from weights_cache.store import Store
    from weights_cache.uri import WeightsUri

    settings = _settings()
    if cache_dir:
        settings = replace(settings, cache_dir=cache_dir)
    source = WeightsUri.parse(uri)
    cache = NodeCache(settings.cache_dir)
    cache.create()
    began = time.monotonic()
    puller = Puller(
        Store(source, connections=settings.connections),
        cache,
        uri=uri,
        connections=settings.connections,
        part_bytes=settings.part_bytes,
    )
    progress = puller.progress
    with _shown(f"pull {source}", lambda: progress.total_bytes, lambda: progress.bytes_there()):
        snapshot = puller.run()
    path = cache.snapshot_path(snapshot).absolute()
    result = {
        "snapshot": str(path),
        "bytes": progress.total_bytes,
        "downloaded_bytes": progress.downloaded_bytes,
        "seconds": round(time.monotonic() - began, 3),
    }
    click.echo(json.dumps(result) if as_json else str(path))


def _settings() -> WeightsSettings:
    return environment.read(WeightsSettings, os.environ, prefix="WEIGHTS_")


class _Counter:
    """A number that several threads add to."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # guards _value
        self._value = 0

    def add(self, amount: int) -> None:
        with self._lock:
            self._value += amount

    def value(self) -> int:
        return self._value


class _shown:  # noqa: N801  used as `with _shown(...)`
    """Shows on stderr how far a transfer is: a bar on a terminal, elsewhere a plain line every few seconds and one at the end."""

    def __init__(self, what: str, total: int | Callable[[], int], done: Callable[[], int]) -> None:
        self._what = what
        self._total = total if callable(total) else lambda: total
        self._done = done
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._bar if sys.stderr.isatty() else self._lines, daemon=True)

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._thread.start()

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        self._thread.join()

    def _bar(self) -> None:
        from rich.console import Console
        from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

        columns = (TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
        with Progress(*columns, console=Console(stderr=True)) as bar:
            task = bar.add_task(self._what, total=None)
            while not self._over.wait(0.1):
                bar.update(task, total=self._total() or None, completed=self._done())
            bar.update(task, total=self._total() or None, completed=self._done())

    def _lines(self) -> None:
        while not self._over.wait(5):
            self._line()
        self._line()

    def _line(self) -> None:
        if not self._total():
            return  # it ended before it was known how much there is
        done, total, seconds = self._done(), self._total(), time.monotonic() - self._began
        rate = done / seconds / 1e6 if seconds else 0
        click.echo(f"{self._what}: {done / 1e6:,.1f} of {total / 1e6:,.1f} MB, {rate:,.1f} MB/s", err=True)
