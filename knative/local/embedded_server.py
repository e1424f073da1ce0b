"""The embedded cloud: object storage (S3) and queues (SQS) in memory, for one machine. `python -m knative.local.embedded_server PORT`.

moto answers, in threads. Everything before that is done in one loop, so that connections without a request cost no thread: who asks, how
much they send, and how many wait. Nothing is answered but S3 and SQS, and nobody whom the admin port would not answer (see `origin`).
"""

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from io import BytesIO
from typing import Any
from urllib.parse import unquote_to_bytes
from xml.sax.saxutils import escape

os.environ["MOTO_DISABLE_GLOBAL_CORS"] = "true"  # read when moto is imported: no page of another site is answered

from aiohttp import web
from botocore.model import OperationNotFoundError
from moto.core.common_models import BaseModel
from moto.core.request import (
    PRESERVED_HEADER_NAMES_ENVIRON_KEY,
    environ_key_for_header,
    should_preserve_original_header_name,
)
from moto.moto_server.werkzeug_app import create_backend_app
from moto.s3.models import s3_backends
from moto.sqs import models
from moto.sqs.models import Queue, sqs_backends
from multidict import CIMultiDict
from rich.text import Text

from knative.local import origin
from knative.local.descriptors import raise_limit
from knative.local.errors import PlatformError
from knative.local.plain import line
from knative.local.ports import Ports
from knative.local.queues import ACCOUNT, CONTENTS, REGION

log = logging.getLogger("relight.embedded")

LONGEST_BODY = {"s3": 5 << 30, "sqs": 8 << 20}  # what S3 takes in one request; ten messages of 256 KiB, with all they can be escaped to
BODIES_BYTES = 256 << 20  # that have come and are not worked off
BODY_S, BODY_RATE = 30.0, 64 << 10  # for a body to come, and a second more for so many bytes
THREADS, POLLS = 16, 256  # requests that are worked on, and long polls, at a time
GIVEN_BACK = 1 << 20  # bytes of a block of memory that goes back to the machine once it is not used any more
_M_MMAP_THRESHOLD = -3
_ITS_MISTAKES = (AttributeError, KeyError, RecursionError, TypeError, ValueError)
ADMIN = "moto-api"  # of the emulator's own routes, which reset it and read all of it

# Guards all queues: moto's are not made for threads. A message that is sent while another one is deleted would be lost, and one that two
# ask for would be given to both.
_turn = threading.Lock()
_present = threading.local()  # `asked`: what this thread works on


class Refused(Exception):
    """A request that is not done; says why."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code


class Asked:
    """A request that is worked on in a thread, while its caller may leave: nobody else is to miss the messages that it waits for."""

    def __init__(self) -> None:
        self._is_left = False
        self._queue: Any = None  # that it waits for

    def leave(self) -> None:
        """Its caller has."""
        self._is_left = True
        if (queue := self._queue) is not None:
            with queue._messages_lock:  # noqa: SLF001
                queue._messages_lock.notify_all()  # noqa: SLF001

    def check(self) -> None:
        """Raises Refused if its caller has left."""
        if self._is_left:
            raise Refused(499, "Gone", "the caller has left")

    def wait(self, queue: Any, timeout: int) -> None:
        """Until there are messages. Raises Refused."""
        self._queue = queue
        with queue._messages_lock:  # noqa: SLF001
            queue._messages_lock.wait_for(lambda: self._is_left or queue.messages, timeout)  # noqa: SLF001
        self.check()


def _wait(queue: Queue, timeout: int) -> None:
    """Of a long poll, which must not keep the others from sending what it waits for."""
    _turn.release()
    try:
        _present.asked.wait(queue, timeout)
    finally:
        _turn.acquire()


class Bodies:
    """Reads bodies, and keeps no more bytes of them than there is room for: then all but the oldest are held up.

    What has come counts, and not what was announced: who sends slowly keeps nobody from sending.
    """

    def __init__(self, room: int = BODIES_BYTES) -> None:
        self._room = room
        self._taken = 0
        self._sizes: dict[object, int] = {}  # of what has come of each, the oldest first
        self._changed = asyncio.Condition()

    @contextlib.asynccontextmanager
    async def read(self, request: web.BaseRequest, most: int) -> AsyncIterator[bytes]:
        """All of a body, which counts until whoever asked for it is done. Raises Refused if it is too long or slow, or none."""
        length = request.content_length
        if length is not None and length > most:
            raise Refused(413, "EntityTooLarge", f"a body of {length} bytes; at most {most} are taken")
        mine = object()
        self._sizes[mine] = 0
        try:
            try:
                async with asyncio.timeout(BODY_S + (length or most) / BODY_RATE):
                    body = await self._read(request, most, mine)
            except TimeoutError:
                raise Refused(408, "RequestTimeout", "the body did not come in time") from None
            except web.RequestPayloadError:
                raise Refused(400, "IncompleteBody", "the body of the request is no chunks") from None
            yield body
        finally:
            self._taken -= self._sizes.pop(mine)
            async with self._changed:
                self._changed.notify_all()

    async def _read(self, request: web.BaseRequest, most: int, mine: object) -> bytes:
        if request.headers.get("Expect", "").lower() == "100-continue" and request.transport:
            request.transport.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = bytearray()
        async for piece in request.content.iter_any():
            body += piece
            if len(body) > most:
                raise Refused(413, "EntityTooLarge", f"a body of more than {most} bytes")
            if self._taken + len(piece) > self._room:
                async with self._changed:
                    await self._changed.wait_for(partial(self._may_go_on, len(piece), mine))
            self._taken += len(piece)
            self._sizes[mine] += len(piece)
        return bytes(body)

    def _may_go_on(self, more: int, mine: object) -> bool:
        return self._taken + more <= self._room or next(iter(self._sizes)) is mine


class Server:
    """moto, for those who may ask it, with one request for queues at a time."""

    def __init__(self) -> None:
        self._apps = {"s3": create_backend_app("s3"), "sqs": create_backend_app("sqs")}
        self._bodies = Bodies()
        self._threads = ThreadPoolExecutor(THREADS, "requests")
        self._poll_threads = ThreadPoolExecutor(POLLS, "polls")
        self._polls = 0
        self._told = ""

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request."""
        try:
            origin.check(request.host, request.headers.get("Origin"), request.headers.get("Sec-Fetch-Site"), subdomains=True)
            if request.path == CONTENTS:
                return web.json_response(await asyncio.to_thread(contents, request.query.getall("below", [])))
            service = _service(request)
            async with self._bodies.read(request, LONGEST_BODY[service]) as body:
                return await self._ask(request, service, body)
        except origin.Forbidden as error:
            return _refusal(request, 403, "AccessDenied", str(error))
        except Refused as refused:
            return _refusal(request, refused.status, refused.code, str(refused))
        except Exception as error:  # noqa: BLE001  moto's own mistakes; whoever asks is told, and the log once
            self._tell(f"{request.method} {request.path[:200]}: {error!r}")
            return _refusal(request, 500, "InternalError", f"the embedded server failed: {type(error).__name__}")

    def _tell(self, text: str) -> None:
        if text != self._told:
            log.error("%s", line(text, 400))
        self._told = text

    async def _ask(self, request: web.BaseRequest, service: str, body: bytes) -> web.Response:
        is_poll = request.headers.get("X-Amz-Target", "").endswith(".ReceiveMessage")
        if is_poll and self._polls >= POLLS:
            raise Refused(503, "ServiceUnavailable", f"{POLLS} are waiting for messages already")
        self._polls += is_poll
        threads = self._poll_threads if is_poll else self._threads
        asked = Asked()
        done = asyncio.get_running_loop().run_in_executor(threads, self._call, service, _environ(request, body), asked)
        done.add_done_callback(lambda _: self._answered(done, is_poll=is_poll))
        try:
            return await asyncio.shield(done)  # what is begun is done, whether or not its caller waits for it, but for waiting
        except asyncio.CancelledError:
            asked.leave()
            raise

    def _answered(self, done: asyncio.Future[web.Response], *, is_poll: bool) -> None:
        self._polls -= is_poll
        if not done.cancelled():
            done.exception()  # whoever asked is told; if nobody does any more, there is nobody to be told

    def _call(self, service: str, environ: dict[str, Any], asked: Asked) -> web.Response:
        if service == "s3":
            return _answer(self._apps[service], environ)
        with _turn:
            asked.check()
            _present.asked = asked
            try:
                return _answer(self._apps[service], environ)
            except _ITS_MISTAKES as error:  # of a request that has not what it should, which moto does not check
                raise Refused(400, "InvalidParameterValue", f"{type(error).__name__}: {error!s:.200}") from error
            except OperationNotFoundError as error:
                raise Refused(400, "UnknownOperationException", f"SQS has no {error!s:.80}") from error


def _service(request: web.BaseRequest) -> str:
    """Whom a request is for. Raises Refused for neither of the two."""
    if request.path.lower().lstrip("/").partition("/")[0] == ADMIN:
        raise Refused(403, "AccessDenied", "the emulator's own routes are not served; this is S3 and SQS")
    target = request.headers.get("X-Amz-Target")
    if target is not None:
        found = "sqs" if target.startswith("AmazonSQS.") else target.partition(".")[0]
    else:
        # Credential=KEY/20170220/us-east-1/sqs/aws4_request, …
        scope = request.headers.get("Authorization", "").partition("Credential=")[2].partition(",")[0] or request.query.get(
            "X-Amz-Credential", ""
        )
        found = scope.split("/")[-2].lower() if scope.count("/") >= 4 else "s3"
    if found not in LONGEST_BODY:
        raise Refused(403, "AccessDenied", f"this is S3 and SQS, not {found[:60]!r}")
    return found


def _environ(request: web.BaseRequest, body: bytes) -> dict[str, Any]:
    """As WSGI has a request, and moto beside that: it wants to know how the names of metadata were spelled."""
    raw = request.raw_path
    if not raw.startswith("/"):  # a proxy's form
        raw = "/" + raw.partition("://")[2].partition("/")[2]
    path, _, query = raw.partition("?")
    environ: dict[str, Any] = {
        "REQUEST_METHOD": request.method,
        "SCRIPT_NAME": "",
        "PATH_INFO": unquote_to_bytes(path).decode("latin-1"),
        "RAW_URI": raw,
        "QUERY_STRING": query,
        "SERVER_NAME": "127.0.0.1",
        "SERVER_PORT": "80",
        "SERVER_PROTOCOL": "HTTP/1.1",
        "CONTENT_LENGTH": str(len(body)),
        "wsgi.version": (1, 0),
        "wsgi.url_scheme": "http",
        "wsgi.input": BytesIO(body),
        "wsgi.errors": sys.stderr,
        "wsgi.multithread": True,
        "wsgi.multiprocess": False,
        "wsgi.run_once": False,
    }
    spelled: dict[str, str] = {}
    dashed = {environ_key_for_header(name) for name in request.headers if "_" not in name}
    for name, value in request.headers.items():
        key = environ_key_for_header(name)
        if key in ("CONTENT_LENGTH", "HTTP_TRANSFER_ENCODING", "HTTP_EXPECT", "HTTP_ORIGIN"):
            continue  # seen to; and an origin that was let in is no other one, which moto cannot know
        if "_" in name:
            if not should_preserve_original_header_name(name) or key in dashed:
                continue
            spelled.setdefault(key, name)
        value = value.encode("utf-8", "surrogateescape").decode("latin-1")
        environ[key] = f"{environ[key]},{value}" if key in environ else value
    environ[PRESERVED_HEADER_NAMES_ENVIRON_KEY] = spelled
    return environ


def _answer(app: Callable[..., Any], environ: dict[str, Any]) -> web.Response:
    said: list[Any] = []
    pieces = app(environ, lambda status, headers, *_: said.extend((status, headers)))
    try:
        body = b"".join(pieces)
    finally:
        getattr(pieces, "close", lambda: None)()
    status, _, reason = said[0].partition(" ")
    headers = CIMultiDict((name, value) for name, value in said[1] if name.lower() not in ("connection", "transfer-encoding"))
    return web.Response(status=int(status), reason=reason, headers=headers, body=body)


def _refusal(request: web.BaseRequest, status: int, code: str, message: str) -> web.Response:
    """As clients of the two services read it; nothing more comes by this connection, as its body may not have been read."""
    if "X-Amz-Target" in request.headers:
        kind, text = "application/x-amz-json-1.0", json.dumps({"__type": code, "message": message})
    else:
        kind, text = "application/xml", f"<Error><Code>{code}</Code><Message>{escape(message)}</Message></Error>\n"
    response = web.Response(status=status, body=text.encode(), content_type=kind)
    response.force_close()
    return response


def contents(below: list[str]) -> dict[str, Any]:
    """What the platform looks at: the queues, with when the oldest message of each was sent, and below which prefixes there are objects."""
    with _turn:
        queues: dict[str, Any] = dict(sqs_backends[ACCOUNT][REGION].queues)
        sent = {name: min((one.sent_timestamp for one in queue._messages), default=None) for name, queue in queues.items()}  # noqa: SLF001
    return {"queues": {name: at and at / 1000 for name, at in sent.items()}, "below": [uri for uri in below if _is_there(uri)]}


def _is_there(uri: str) -> bool:
    bucket, _, prefix = uri.partition("/")
    found = s3_backends[ACCOUNT]["aws"].buckets.get(bucket)
    return found is not None and any(name.startswith(prefix) for name in list(dict.keys(found.keys)))


class _Latest(set[str]):
    """The receipts of messages that were deleted: SQS remembers them for a while, moto for ever."""

    def __init__(self) -> None:
        super().__init__()
        self._order: dict[str, None] = {}

    def update(self, *added: Any) -> None:
        for receipts in added:
            self._order.update(dict.fromkeys(receipts))
            super().update(receipts)
        while len(self._order) > 10_000:
            oldest = next(iter(self._order))
            del self._order[oldest]
            self.discard(oldest)


def _now_ms() -> float:
    return time.time() * 1000


def _keep_nothing() -> None:
    """moto remembers each message and object that it ever had, and goes through all messages for each that is received."""
    BaseModel.__new__ = lambda cls, *_, **__: object.__new__(cls)  # type: ignore[method-assign]
    made = Queue.__init__

    def make(queue: Any, *args: Any, **kwargs: Any) -> None:
        made(queue, *args, **kwargs)
        queue.deleted_messages = _Latest()

    Queue.__init__ = make  # type: ignore[method-assign,assignment]
    Queue.wait_for_messages = _wait  # type: ignore[method-assign,assignment]
    # Of each message that is received moto asks how long the queue keeps it, for which it counts all that there are, by a slow clock.
    models.SQSBackend.is_message_valid_based_on_retention_period = lambda *_: True  # type: ignore[method-assign]
    models.unix_time_millis = _now_ms  # type: ignore[attr-defined,assignment]


async def serve(port: int) -> None:
    """Answer until SIGTERM. Raises PlatformError for a port that cannot be opened."""
    loop = asyncio.get_running_loop()
    told_to_stop = asyncio.Event()
    loop.add_signal_handler(signal.SIGTERM, told_to_stop.set)
    loop.add_signal_handler(signal.SIGINT, lambda: None)  # Ctrl-C is for the platform, which then ends us
    ports = Ports(lambda text: log.error("%s", Text.from_markup(text).plain))
    async with ports.call_port(port, Server().handle):
        await told_to_stop.wait()


def main() -> None:
    """Serve on a loopback port until SIGTERM."""
    logging.basicConfig(level=logging.ERROR, format="%(asctime)s %(message)s")
    for name in ("aiohttp", "werkzeug"):
        logging.getLogger(name).setLevel(logging.CRITICAL)  # what clients do wrong
    os.environ["MOTO_ACCOUNT_ID"] = ACCOUNT  # read by moto at each request
    _keep_nothing()
    raise_limit()
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, GIVEN_BACK)
    try:
        asyncio.run(_serve_and_leave(int(sys.argv[1])))
    except PlatformError as error:
        sys.exit(str(error))


async def _serve_and_leave(port: int) -> None:
    await serve(port)
    os._exit(0)  # without those who wait for messages


if __name__ == "__main__":
    main()
