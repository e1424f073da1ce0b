"""`relight status`, `relight invoke` and `relight logs`: a running platform from the terminal. (For its queues see messages.py.)

Answers and logs are the bytes that others have written where a program or a file takes them. On a terminal control characters are
escaped, as a caller may have put them there: of answers all but line ends and tabs, of logs all but those and colours.
"""

import codecs
import io
import json
import re
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from http.client import HTTPException
from pathlib import Path
from typing import Any

import click
from click.core import ParameterSource

from knative.local import address, plain, sent_headers, tables
from knative.local.client import PIECE_BYTES, Client, explain, lines, parse
from knative.local.errors import PlatformError


def where(command: Callable[..., None]) -> Callable[..., None]:
    """The options that say which platform is meant."""
    admin = click.option(
        "--admin", metavar="URL", help=f"The platform's admin port. [default: as in --state-dir, or {address.DEFAULT_ADMIN}]"
    )
    state = click.option(
        "--state-dir", default=Path(".relight"), show_default=True, type=click.Path(path_type=Path), help="That of `relight run`."
    )
    return admin(state(command))


def platform(admin: str | None, state_dir: Path) -> Client:
    """The platform that is meant. Raises PlatformError where none runs with the state directory that was named: no other is meant."""
    is_named = click.get_current_context().get_parameter_source("state_dir") is ParameterSource.COMMANDLINE
    if is_named and not admin and not (state_dir / address.NAME).is_file():
        raise PlatformError(
            f"no platform runs with --state-dir {state_dir}; start one with `relight run`, or name its admin port with --admin"
        )
    return Client(admin or address.find(state_dir))


@contextmanager
def told() -> Any:
    """Our errors as one line and exit status 1. What a terminal has no letters for is escaped, and no error."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except PlatformError as error:
        raise click.ClickException(plain.block(str(error))) from error
    except KeyboardInterrupt:
        raise SystemExit(130) from None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="The document of /api/status; with --watch one in each line.")
@click.option("--watch", is_flag=True, help="Go on until Ctrl-C.")
@where
def status(*, as_json: bool, watch: bool, admin: str | None, state_dir: Path) -> None:
    """Show the Services of a running platform, their pods, and the queues."""
    from rich.console import Console
    from rich.live import Live

    with told():
        client = platform(admin, state_dir)
        console = Console(highlight=False, emoji=False)
        if not watch:
            document = client.get("/api/status")
            if console.is_terminal and not as_json:
                console.print(tables.rich(document, console.width))
            else:
                click.echo(json.dumps(document, indent=2) if as_json else tables.plain(document))
        elif console.is_terminal and not as_json:
            with Live(console=console, auto_refresh=False) as live:
                for document in client.events():
                    live.update(tables.rich(document, console.width), refresh=True)
        else:
            for document in client.events():
                click.echo(json.dumps(document) if as_json else tables.plain(document) + "\n")
                sys.stdout.flush()


@click.command()
@click.argument("name")
@click.option("--data", metavar="JSON|@FILE|-", help="The body: this, a file, or standard input. [default: the Service's example]")
@click.option("--path", help="Where to, instead of /; without --data it is then a GET.")
@click.option("--method", "-X", help="The HTTP method. [default: POST]")
@click.option("--tag", help="To the revision that has this tag in `spec.traffic`.")
@click.option("--content-type", default="application/json", show_default=True, help="What the body is.")
@click.option(
    "--header", "-H", "headers", multiple=True, metavar="'NAME: VALUE'", help="A header of the request, such as a key; may be repeated."
)
@click.option("--stream", is_flag=True, help="Print the data of server-sent events, each as it comes.")
@where
def invoke(
    *,
    name: str,
    data: str | None,
    path: str | None,
    method: str | None,
    tag: str | None,
    content_type: str,
    headers: tuple[str, ...],
    stream: bool,
    admin: str | None,
    state_dir: Path,
) -> None:
    """Send a request to the Service NAME (or NAMESPACE/NAME) and print the answer; the exit status is 1 if it is an error."""
    with told():
        client = platform(admin, state_dir)
        body, sent = read_body(data), _headers(headers)
        namespace, _, service = name.rpartition("/")
        chosen = (method or ("GET" if path and body is None else "POST")).upper()
        query = {"namespace": namespace or "default", "service": service, "path": path or "/", "method": chosen}
        if tag is not None:
            query["tag"] = tag
        kind = content_type if body is not None else ""
        with client.ask("/api/invoke", query, method="POST", body=body, content_type=kind, sent_headers=sent) as reply:
            failed = reply.status >= 400
            if stream and not failed and reply.headers.get_content_type() == "text/event-stream":
                whole = _print_events(reply)
            else:
                whole = _print_body(reply)
        if failed:
            click.echo(f"Error: {name} answered {reply.status} {plain.line(reply.reason)}", err=True)
        if not whole:
            click.echo(f"Error: the answer of {name} was cut off or ended in an error", err=True)
        if failed or not whole:
            raise SystemExit(1)


@click.command()
@click.argument("name")
@click.option("--container", help="Whose output. [default: function, or the only one]")
@click.option("--follow", "-f", is_flag=True, help="Go on with what is added, until Ctrl-C.")
@click.option("--tail", default=200, show_default=True, type=click.IntRange(0, 10_000), help="How many lines to begin with.")
@where
def logs(*, name: str, container: str | None, follow: bool, tail: int, admin: str | None, state_dir: Path) -> None:
    """Print the log of a pod, or of the latest pod of the revision, Service or queue source NAME; logs outlive their pods."""
    with told():
        client = platform(admin, state_dir)
        services = client.get("/api/status")["services"]
        namespace, pod, sizes = _pod(client.get("/api/logs")["logs"], name, services)
        containers = sorted(sizes)
        if container is None:
            container = containers[0] if len(containers) == 1 else "function"
        if container not in containers:
            raise PlatformError(f"pod {pod} has no container {container!r}; it has {', '.join(containers)}; name one with --container")
        if not sizes[container]:
            click.echo(plain.line(_silence(pod, container, sizes)), err=True)
        query = {"namespace": namespace, "pod": pod, "container": container, "tail": str(tail), "follow": "1" if follow else "0"}
        with client.ask("/api/logs", query) as reply:
            if sys.stdout.isatty():
                _print_log(reply)
            else:
                _print_body(reply)


def _pod(found: list[dict[str, Any]], name: str, services: list[dict[str, Any]]) -> tuple[str, str, dict[str, int]]:
    """The pod that is meant: (namespace, name, bytes of the log of each container). Raises PlatformError if there is none."""
    namespace, _, wanted = name.rpartition("/")
    # A revision has a number, unless its template names it.
    named = [revision["name"] for service in services if service["name"] == wanted for revision in service["revisions"]]
    of_service = re.compile(rf"({'|'.join(map(re.escape, [wanted, *named]))}|{re.escape(wanted)}-\d{{5}})-[0-9a-f]+")
    of_source = re.compile(rf"{re.escape(wanted)}-source-[0-9a-f]+")
    ours = [log for log in found if not namespace or log["namespace"] == namespace]
    match = next((log for log in ours if log["pod"] == wanted), None)
    for pattern in (of_service, of_source):
        match = match or next((log for log in ours if pattern.fullmatch(log["pod"])), None)  # the latest is the first
    if match is None:
        known = ", ".join(dict.fromkeys(log["pod"] for log in ours[:20]))
        raise PlatformError(f"no pod, Service or queue source {name!r} has a log" + (f"; pods that have one: {known}" if known else " yet"))
    key = match["namespace"], match["pod"]
    return *key, {log["container"]: log["bytes"] for log in found if (log["namespace"], log["pod"]) == key}


def _silence(pod: str, container: str, sizes: Mapping[str, int]) -> str:
    """What is said in place of a log that has nothing yet."""
    others = " or ".join(f"--container {other}" for other in sorted(sizes) if sizes[other])
    return f"{container} of {pod} has written nothing yet" + (f"; there are lines of {others}" if others else "")


def read_body(data: str | None) -> bytes | None:
    """What `--data` stands for. Raises PlatformError."""
    if data is None:
        return None
    if data == "-":
        return sys.stdin.buffer.read()
    if not data.startswith("@"):
        return data.encode()
    try:
        return Path(data[1:]).read_bytes()
    except OSError as error:
        raise PlatformError(f"--data {data}: {error.strerror or error}") from error


def _headers(texts: tuple[str, ...]) -> sent_headers.Headers:
    """What `--header` stands for. Raises PlatformError."""
    try:
        return sent_headers.parse(texts)
    except ValueError as error:
        raise PlatformError(f"--header: {error}") from error


class _CutOff(Exception):
    """The other side has ended before it was done."""


def _pieces(of: Iterator[bytes]) -> Iterator[bytes]:
    """What is read, with an error of its own where that ends early: one of ours in writing it is something else."""
    try:
        yield from of
    except (OSError, HTTPException) as error:
        raise _CutOff from error


def _print_body(reply: Any) -> bool:
    """As it comes; whether it came whole."""
    write = _write_escaped() if sys.stdout.isatty() else _write
    try:
        for piece in _pieces(iter(lambda: reply.read1(PIECE_BYTES), b"")):
            write(piece)
    except _CutOff:
        return False
    finally:
        write(b"")
    return True


def _write_escaped() -> Callable[[bytes], None]:
    """Takes a text for a terminal in pieces; an empty one is the end, after which the prompt begins a line."""
    decoder = codecs.getincrementaldecoder("utf-8")("backslashreplace")
    held, is_begun = "", False

    def write(piece: bytes) -> None:
        nonlocal held, is_begun
        text = held + decoder.decode(piece, final=not piece)
        held = "\r" if piece and text.endswith("\r") else ""  # perhaps the first half of a line's end
        text = plain.body(text.removesuffix(held))
        is_begun = not text.endswith("\n") if text else is_begun
        _write(_encoded(text + ("\n" if not piece and is_begun else "")))

    return write


def _print_log(reply: Any) -> None:
    """A line when it is whole."""
    with suppress(_CutOff):
        for line in _pieces(lines(reply)):
            _write(_encoded(plain.log_line(line.removesuffix(b"\r").decode(errors="backslashreplace")) + "\n"))


def _print_events(reply: Any) -> bool:
    """The data of each event in a line of its own, as it comes; whether it came whole, and none of them is an error."""
    is_terminal = sys.stdout.isatty()
    try:
        for line in _pieces(lines(reply)):
            if not line.startswith(b"data:"):
                continue
            text = line.removeprefix(b"data:").strip()
            if text == b"[DONE]":
                break
            _write((_encoded(plain.body(text.decode(errors="backslashreplace"))) if is_terminal else text) + b"\n")
            if explain(parse(text)):
                return False
    except _CutOff:
        return False
    return True


def _encoded(text: str) -> bytes:
    """For the terminal, whose letters may be others than UTF-8's."""
    return text.encode(sys.stdout.encoding, "backslashreplace")


def _write(piece: bytes) -> None:
    sys.stdout.buffer.write(piece)
    sys.stdout.buffer.flush()
