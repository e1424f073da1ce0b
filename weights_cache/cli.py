"""The commands that move weights and keep them: `serve` (the sidecar), `push`, `pull`, `cache list|verify|evict`."""

import contextlib
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from weights_cache import environment
from weights_cache.environment import SettingsError
from weights_cache.errors import WeightsError
from weights_cache.excerpt import described, told
from weights_cache.logs import configure
from weights_cache.settings import WeightsSettings
from weights_cache.threads import Threads

if TYPE_CHECKING:
    from weights_cache.cache import NodeCache

_UNITS = ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1.0, "B"))


def _unit(count: float) -> tuple[float, str]:
    return next((unit for unit in _UNITS if count >= unit[0]), _UNITS[-1])


def _figure(count: float, whole: float) -> str:
    """Some of a number of bytes, in the unit of the whole."""
    factor, _ = _unit(whole)
    return f"{count / factor:,.{int(factor > 1)}f}"


def _size(count: float) -> str:
    """A number of bytes."""
    return f"{_figure(count, count)} {_unit(count)[1]}"


class _Command(click.Command):
    """Our errors are for people: one line and exit status 1, no traceback."""

    def invoke(self, ctx: click.Context) -> Any:
        configure()
        try:
            with _interruptible():
                return super().invoke(ctx)
        except (SettingsError, WeightsError, OSError) as error:
            raise click.ClickException(told(str(error))) from error


@contextlib.contextmanager
def _interruptible() -> Iterator[None]:
    """Ctrl-C ends what is done in order, which may have to wait for a store that stalls; the second time, at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def on_interrupt(number: int, frame: object) -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


_CACHE_DIR = click.option(
    "--cache-dir", type=click.Path(file_okay=False, path_type=Path), help="The cache directory. [default: $WEIGHTS_CACHE_DIR]"
)


@click.group()
def main() -> None:
    """Weights: keep them present on a node, push and pull them."""


main.command_class = _Command


@main.command()
@click.option("--agent", is_flag=True, help="Fill the cache for every pod of this node that can only read it.")
def serve(agent: bool) -> None:
    """Run the sidecar, configured by the WEIGHTS_ variables."""
    from weights_cache.sidecar import serve as run

    raise SystemExit(run(_settings(), agent=agent))


@main.command()
@click.argument("directory", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.argument("uri")
@click.option("--create-bucket", is_flag=True, help="Create the bucket if there is none.")
def push(directory: Path, uri: str, create_bucket: bool) -> None:
    """Upload the files of DIRECTORY to URI (s3://bucket/prefix) and print the snapshot they make."""
    from weights_cache import manifest
    from weights_cache.cache import check_path, snapshot_id
    from weights_cache.fetch import list_snapshot
    from weights_cache.store import Store
    from weights_cache.uri import WeightsUri

    target = WeightsUri.parse(uri)
    if target.snapshot:
        raise WeightsError(f"{uri}: a snapshot cannot be pushed to; leave out what follows the '#'")
    files = {path.relative_to(directory).as_posix(): path for path in sorted(directory.rglob("*")) if path.is_file()}
    files.pop(manifest.MANIFEST, None)  # of an earlier push
    if not files:
        raise WeightsError(f"{directory} holds no files")
    for name in (*files, manifest.MANIFEST):
        check_path(name)
        if len(key := f"{target.prefix}/{name}".encode()) > 1024:
            raise WeightsError(f"{target}: the object key of {name} would have {len(key)} bytes; S3 allows 1024")
    store = Store(target)
    if create_bucket:
        store.ensure_bucket()
    entries = {}
    sent = _Counter()
    with _shown(f"push {target}", sum(path.stat().st_size for path in files.values()), sent.value):
        for name, path in files.items():
            before = path.stat()
            entries[name] = manifest.measure(path)
            store.upload(path, name, sent.add)
            if (after := path.stat()).st_mtime_ns != before.st_mtime_ns or after.st_size != before.st_size:
                raise WeightsError(f"{path} changed while it was being pushed; push again")
    listed = {file.path: file for file in store.list()}
    if lost := sorted(set(files) - set(listed)):
        raise WeightsError(f"{target}: {lost[0]} was uploaded, and is not there; does somebody else push there too?")
    store.write(manifest.MANIFEST, manifest.dump({name: replace(entry, etag=listed[name].etag) for name, entry in entries.items()}))
    if strangers := sorted(set(listed) - set(files) - {manifest.MANIFEST}):
        click.echo(
            f"note: {target} also holds {len(strangers)} other objects, such as {strangers[0]}; they are no part of the snapshot", err=True
        )
    click.echo(f"{target}#{snapshot_id(store.namespace, list_snapshot(store)[0])}")


@main.command()
@click.argument("uri")
def snapshot(uri: str) -> None:
    """Print URI with the snapshot at its end that the store has now."""
    from weights_cache.cache import snapshot_id
    from weights_cache.fetch import list_snapshot
    from weights_cache.store import Store
    from weights_cache.uri import WeightsUri

    source = WeightsUri.parse(uri)
    store = Store(source)
    found = snapshot_id(store.namespace, list_snapshot(store)[0])
    if source.snapshot not in (None, found):
        raise WeightsError(f"{uri}: the store has {found} now")
    click.echo(f"s3://{source.bucket}/{source.prefix}#{found}")


@main.command()
@click.argument("uri")
@_CACHE_DIR
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
    puller = Puller(Store(source), cache, settings, uri=uri)
    progress = puller.progress
    with _shown(f"pull {source}", lambda: progress.total_bytes, lambda: progress.bytes_there()):
        snapshot = puller.run()
        seconds = time.monotonic() - began
        puller.settle()
    puller.close()
    path = cache.snapshot_path(snapshot).absolute()
    result = {
        "snapshot": str(path),
        "bytes": progress.total_bytes,
        "downloaded_bytes": progress.downloaded_bytes,
        "seconds": round(seconds, 3),
    }
    click.echo(json.dumps(result) if as_json else str(path))


@main.group(name="cache")
def cache_group() -> None:
    """See what is in a node's cache, check it, make room."""


cache_group.command_class = _Command


@cache_group.command(name="list")
@_CACHE_DIR
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def list_(cache_dir: Path | None, as_json: bool) -> None:
    """List the snapshots, the least recently used first."""
    from weights_cache import room

    cache = _existing_cache(cache_dir)
    with cache.making_room():  # looking whether a snapshot is in use takes its lock for a moment
        found, used = room.stored(cache), room.used_bytes(cache)
    if as_json:
        rows = [{key: value for key, value in asdict(one).items() if key != "blobs"} for one in found]
        click.echo(json.dumps({"bytes": used, "snapshots": rows}))
        return
    for one in found:
        state = "in use" if one.in_use else "complete" if one.complete else "incomplete"
        when = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(one.used))
        click.echo(f"{one.snapshot}  {_size(one.bytes):>15}  {state:<10}  {when}  {', '.join(one.uris) or '-'}")
    click.echo(f"{len(found)} snapshots, {_size(used)}")


@cache_group.command()
@_CACHE_DIR
def verify(cache_dir: Path | None) -> None:
    """Read every complete file again and set aside what is damaged, so that the next pull mends it; exit status 1 if anything was."""
    from weights_cache.digest import chunk_digest

    cache = _existing_cache(cache_dir)
    blobs = [cache.blob(path.name) for path in sorted((cache.root / "blobs").glob("*")) if "." not in path.name]
    names: dict[str, list[str]] = {blob.path.name: [] for blob in blobs}
    for snapshot in (cache.root / "snapshots").glob("[!.]*"):
        for path, blob in cache.snapshot_blobs(snapshot.name).items():
            names.setdefault(blob.path.name, []).append(f"{path} of snapshot {snapshot.name}")
    total, read, damaged = sum(blob.path.stat().st_size for blob in blobs), _Counter(), 0
    with _shown("verify", total, read.value):
        for blob in blobs:
            bad = blob.damaged_chunks(chunk_digest, read.add)
            if bad and blob.set_aside(bad):
                damaged += 1
                click.echo(
                    f"damaged: {blob.path.name} ({', '.join(names[blob.path.name]) or 'of no snapshot'}), {len(bad)} MiB of it; set aside"
                )
    click.echo(f"{len(blobs)} files, {_size(total)}, {damaged} damaged" + ("; the next pull mends them" if damaged else ""))
    raise SystemExit(1 if damaged else 0)


@cache_group.command()
@_CACHE_DIR
@click.argument("what", nargs=-1, metavar="[SNAPSHOT|URI]...")
@click.option("--all", "everything", is_flag=True, help="Everything that is not in use.")
@click.option("--to", "to_bytes", type=click.IntRange(min=0), help="The least recently used, until so many bytes are left.")
def evict(cache_dir: Path | None, what: tuple[str, ...], everything: bool, to_bytes: int | None) -> None:
    """Take snapshots out of the cache, never one in use."""
    from weights_cache import room

    cache = _existing_cache(cache_dir)
    if sum((bool(what), everything, to_bytes is not None)) != 1:
        raise click.UsageError("say what to evict: snapshots or URIs, --all, or --to BYTES")
    failed = False
    with cache.making_room():
        found = room.stored(cache)
        unknown = [name for name in what if not any(name == one.snapshot or name in one.uris for one in found)]
        if unknown:
            raise WeightsError(f"{cache.root} has no snapshot {unknown[0]!r}; `relight cache list` shows what there is")
        for one in found:
            if to_bytes is not None and room.used_bytes(cache) <= to_bytes:
                break
            if what and one.snapshot not in what and not set(what) & set(one.uris):
                continue
            freed = room.evict(cache, one.snapshot)
            failed = failed or freed is None
            click.echo(f"{one.snapshot}: {'in use, it stays' if freed is None else f'evicted, {_size(freed)}'}")
        freed = room.collect(cache)
        if freed:
            click.echo(f"left-overs: {_size(freed)}")
        left = room.used_bytes(cache)
    click.echo(f"{_size(left)} are left")
    raise SystemExit(1 if (failed and what) or (to_bytes is not None and left > to_bytes) else 0)


def _existing_cache(cache_dir: Path | None) -> "NodeCache":
    from weights_cache.cache import NodeCache

    cache = NodeCache(cache_dir or _settings().cache_dir)
    cache.check_format()
    if not (cache.root / "blobs").is_dir():
        raise WeightsError(f"{cache.root} is no weights cache: it has no blobs/")
    return cache


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
        self._threads = Threads(lambda name, error: click.echo(f"{name}: {described(error)}", err=True))

    def __enter__(self) -> None:
        self._began = time.monotonic()
        self._threads.start("the progress", self._bar if sys.stderr.isatty() else self._lines)

    def __exit__(self, kind: object, error: object, trace: object) -> None:
        self._over.set()
        self._threads.join()

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
        rate = done / seconds if seconds else 0
        click.echo(f"{self._what}: {_figure(done, total)} of {_size(total)}, {_size(rate)}/s", err=True)
