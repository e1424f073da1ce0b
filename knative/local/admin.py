"""The admin port: a page to watch the platform, and what the page and the terminal ask: JSON, events, metrics, logs, a test request.

It has no password, so it answers only who is on this machine and means it (see `origin`).
"""

import asyncio
import base64
import hashlib
import itertools
import json
import re
import resource
from collections.abc import Awaitable, Callable, Mapping
from contextlib import aclosing
from importlib.resources import files
from pathlib import Path
from typing import Any

import aiohttp
from aiohttp import web
from multidict import CIMultiDict
from yarl import URL

from knative.local import origin, sent_headers
from knative.local.feed import Feed
from knative.local.logs import Logs
from knative.local.manifest import tag_label
from knative.local.metrics import Metrics
from knative.local.queue_watch import QueueWatch
from knative.local.service import LiveService
from knative.local.weights import cached, sidecars

VIEWERS = 64  # at once, of what may last: events, logs, test requests
_LASTING = ("/api/events", "/api/logs", "/api/invoke")
MAX_TAIL = 10_000
ORDER = "X-Relight"  # a header that whoever has something done must send: a form cannot, and a script of another site may not
_FORWARDED = ("Content-Type", "Accept")
_CONTAINED = "default-src 'none'; frame-ancestors 'none'; sandbox"  # for all but the page: whatever a browser takes it for, it does nothing

Handler = Callable[[web.BaseRequest], Awaitable[web.StreamResponse]]


class Refused(Exception):
    """What is asked for is not done; says why."""

    def __init__(self, status: int, kind: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.kind = kind


class Admin:
    """Answers the admin port."""

    def __init__(
        self,
        services: Mapping[tuple[str, str], LiveService],
        queues: QueueWatch,
        status: Callable[[], dict[str, Any]],
        reload: Callable[[], object],
        state_dir: Path,
        session: aiohttp.ClientSession,
        port: int,
    ) -> None:
        """services: by (namespace, name), those of each moment. status: makes the document of `/api/status`. port: where they answer.

        reload: has manifests, code and weights read again.
        """
        self._services = services
        self._status = status
        self._reload = reload
        self._feed = Feed(status)
        self._logs = Logs(state_dir / "logs")
        self._volumes = state_dir / "volumes"
        self._metrics = Metrics(services.values(), queues)
        self._session = session
        self._port = port
        self._page, self._policy = _page()
        self._closed = asyncio.Event()
        self._lasting = 0
        # Each takes a descriptor or two, and those of a small machine are for callers.
        self._most_lasting = max(4, min(VIEWERS, resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 8))
        self._routes: dict[str, tuple[str, Handler]] = {
            "/": ("GET", self._show),
            "/api/status": ("GET", self._tell_status),
            "/api/events": ("GET", self._tell_events),
            "/api/history": ("GET", self._tell_history),
            "/api/weights": ("GET", self._tell_weights),
            "/api/logs": ("GET", self._tell_logs),
            "/api/invoke": ("POST", self._invoke),
            "/api/reload": ("POST", self._take_changes),
            "/metrics": ("GET", self._tell_metrics),
        }

    async def handle(self, request: web.BaseRequest) -> web.StreamResponse:
        """One request."""
        try:
            handler = self._route(request)
            return await (self._last(handler, request) if request.path in _LASTING else handler(request))
        except Refused as refused:
            return _json({"error": {"type": refused.kind, "message": str(refused)}}, refused.status)

    async def _last(self, handler: Handler, request: web.BaseRequest) -> web.StreamResponse:
        """One request that may take for ever: so many that others have a connection left."""
        if self._lasting >= self._most_lasting:
            raise Refused(503, "overloaded", f"{self._most_lasting} are watching, or wait for an answer, already")
        self._lasting += 1
        try:
            return await handler(request)
        finally:
            self._lasting -= 1

    async def close(self) -> None:
        """End what would go on for ever: events, and logs that are followed."""
        self._closed.set()
        await self._feed.close()

    def _route(self, request: web.BaseRequest) -> Handler:
        _check_origin(request)
        if request.path not in self._routes:
            raise Refused(404, "not_found", f"no route {request.path}; there are {', '.join(self._routes)}")
        method, handler = self._routes[request.path]
        if request.method != method and (request.method, method) != ("HEAD", "GET"):
            raise Refused(405, "method_not_allowed", f"{method} it")
        if method == "POST" and ORDER not in request.headers:
            raise Refused(403, "forbidden", f"send the header `{ORDER}: 1`, which says that no other site has made you do it")
        return handler

    async def _show(self, _: web.BaseRequest) -> web.Response:
        return _answer(self._page, "text/html", self._policy)

    async def _tell_status(self, _: web.BaseRequest) -> web.Response:
        return _json(self._status())

    async def _take_changes(self, _: web.BaseRequest) -> web.Response:
        """As SIGHUP. What becomes of it is in `/api/status`."""
        self._reload()
        return _json({"reload": "asked for"}, 202)

    async def _tell_metrics(self, _: web.BaseRequest) -> web.Response:
        return _answer(self._metrics.text(), "text/plain")

    async def _tell_history(self, _: web.BaseRequest) -> web.Response:
        return _json({"services": {f"{space}/{name}": live.record.history() for (space, name), live in self._services.items()}})

    async def _tell_weights(self, _: web.BaseRequest) -> web.Response:
        pods = [pod for live in self._services.values() for pod in live.pods]
        caches, told = await asyncio.gather(asyncio.to_thread(cached, self._volumes), sidecars(pods, self._session))
        return _json({"caches": caches, "sidecars": told})

    async def _tell_events(self, request: web.BaseRequest) -> web.StreamResponse:
        stream = _stream("text/event-stream")
        await stream.prepare(request)
        if request.method == "GET":
            async with aclosing(self._feed.listen()) as documents:
                async for document in documents:
                    await stream.write(f"data: {document}\n\n".encode())
        return stream

    async def _tell_logs(self, request: web.BaseRequest) -> web.StreamResponse:
        """Without `pod`: which logs there are. With it: the last `tail` lines of one container, and with `follow` what is added."""
        query = request.rel_url.query
        if "pod" not in query:
            return _json({"logs": await asyncio.to_thread(self._logs.list)})
        namespace, pod, container = query.get("namespace", "default"), query["pod"], query.get("container", "function")
        path = self._logs.find(namespace, pod, container)
        if path is None:
            raise Refused(404, "not_found", f"there is no log of container {container!r} of pod {pod!r} in namespace {namespace!r}")
        lines = query.get("tail", "200")
        if not re.fullmatch("[0-9]{1,5}", lines) or int(lines) > MAX_TAIL:
            raise Refused(400, "bad_request", f"tail: found {lines!r}; allowed are 0 to {MAX_TAIL}")
        stream = _stream("text/plain")
        await stream.prepare(request)
        if request.method == "GET":
            until = self._closed if query.get("follow") in ("1", "true") else None
            async with aclosing(self._logs.read(path, int(lines), until)) as pieces:
                async for piece in pieces:
                    await stream.write(piece)
        return stream

    async def _invoke(self, request: web.BaseRequest) -> web.StreamResponse:
        """Hand the body to a Service as anybody's request, and its answer back as it comes; without a body it is the Service's example."""
        query = request.rel_url.query
        namespace, name = query.get("namespace", "default"), query.get("service", "")
        live = self._services.get((namespace, name))
        if live is None:
            known = ", ".join(name if space == "default" else f"{space}/{name}" for space, name in self._services)
            raise Refused(404, "not_found", f"no Service {name!r} in namespace {namespace!r}; there are {known}")
        method, path = query.get("method", "POST"), query.get("path", "/")
        if not re.fullmatch("[A-Z]{1,16}", method) or not re.fullmatch(r"/[!-~]*", path):
            raise Refused(400, "bad_request", f"method and path: found {method!r} and {path!r}; the path must begin with / and be encoded")
        headers = {name: request.headers[name] for name in _FORWARDED if name in request.headers}
        body: Any = request.content if request.body_exists else None
        if body is None and method == "POST":
            body, headers["Content-Type"] = live.service.example.encode(), "application/json"
        tag, tags = query.get("tag"), [target.tag for target in live.service.traffic if target.tag]
        if tag is not None and tag not in tags:
            raise Refused(404, "not_found", f"no tag {tag!r} in the traffic of {name}; there are {', '.join(tags) or 'none'}")
        own = _own_headers(request)
        own.extend((name, value) for name, value in headers.items() if name not in own)
        own["Host"] = f"{tag_label(tag, name) if tag else name}.{namespace}.localhost:{self._port}"
        stream: web.StreamResponse | None = None
        try:
            async with self._session.request(
                method,
                URL(f"http://127.0.0.1:{self._port}{path}", encoded=True),
                data=body,
                headers=own,
                skip_auto_headers=("User-Agent", "Accept-Encoding", "Content-Type"),
                allow_redirects=False,
                timeout=aiohttp.ClientTimeout(total=None),  # the Service's own time-outs hold
            ) as reply:
                stream = _stream(reply.content_type, reply.status)
                await stream.prepare(request)
                async for piece in reply.content.iter_any():
                    await stream.write(piece)
                await stream.write_eof()
                return stream
        except aiohttp.ClientError as error:
            if stream and request.transport:
                request.transport.abort()  # what was begun cannot be completed, and that must be seen
                return stream
            if isinstance(request.content.exception(), web.RequestPayloadError):
                raise Refused(400, "bad_request", "the body of the request is no chunks") from error
            raise Refused(502, "bad_gateway", f"the platform did not answer: {error}") from error


def _own_headers(request: web.BaseRequest) -> CIMultiDict[str]:
    """Those that the request to the Service is to have besides. Raises Refused."""
    try:
        return CIMultiDict(sent_headers.from_field(request.headers.get(sent_headers.FIELD, "[]")))
    except ValueError as error:
        raise Refused(400, "bad_request", str(error)) from error


def _check_origin(request: web.BaseRequest) -> None:
    if not request.raw_path.startswith("/"):
        raise Refused(400, "bad_request", "the target of the request must be a path")
    # The page itself may be reached by a link from anywhere; it cannot be framed.
    sites = (None,) if request.path == "/" else request.headers.getall("Sec-Fetch-Site", (None,))
    try:
        for own, site in itertools.product(request.headers.getall("Origin", (None,)), sites):
            origin.check(request.host, own, site)
    except origin.Forbidden as error:
        raise Refused(403, "forbidden", str(error)) from error


def _page() -> tuple[bytes, str]:
    """The dashboard, and the policy under which a browser shows it: its own style and script, and no other server."""
    page = files("knative.local").joinpath("dashboard.html").read_text(encoding="utf-8")
    allowed = {}
    for tag in ("style", "script"):
        inside = re.search(rf"<{tag}>(.*?)</{tag}>", page, re.DOTALL)
        assert inside
        allowed[tag] = base64.b64encode(hashlib.sha256(inside[1].encode()).digest()).decode()
    return page.encode(), (
        f"default-src 'none'; style-src 'sha256-{allowed['style']}'; script-src 'sha256-{allowed['script']}'; connect-src 'self'; "
        "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )


def _headers(policy: str) -> dict[str, str]:
    return {
        ORDER: "admin",  # so that a command knows whom it talks to
        "Content-Security-Policy": policy,
        "X-Content-Type-Options": "nosniff",
        "Referrer-Policy": "no-referrer",
        "Cross-Origin-Resource-Policy": "same-origin",
        "Cache-Control": "no-store",
    }


def _answer(body: bytes, content_type: str, policy: str = _CONTAINED, status: int = 200) -> web.Response:
    return web.Response(status=status, body=body, content_type=content_type, charset="utf-8", headers=_headers(policy))


def _json(document: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(status=status, body=json.dumps(document).encode(), content_type="application/json", headers=_headers(_CONTAINED))


def _stream(content_type: str, status: int = 200) -> web.StreamResponse:
    stream = web.StreamResponse(status=status, headers=_headers(_CONTAINED))
    stream.content_type = content_type
    if content_type.startswith("text/"):
        stream.charset = "utf-8"
    return stream
