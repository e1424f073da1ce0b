"""The admin port: what the platform knows, as JSON."""

import json
from collections.abc import Callable
from typing import Any

from aiohttp import web


def admin_handler(status: Callable[[], dict[str, Any]]) -> Callable[[web.BaseRequest], Any]:
    """Answers the admin routes; `status` makes the document of `/api/status`."""

    async def handle(request: web.BaseRequest) -> web.Response:
        if request.path != "/api/status":
            return _json(404, {"error": {"type": "not_found", "message": f"no route {request.path}; there is /api/status"}})
        if request.method not in ("GET", "HEAD"):
            return _json(405, {"error": {"type": "method_not_allowed", "message": "GET it"}})
        return _json(200, status())

    return handle


def _json(status: int, document: dict[str, Any]) -> web.Response:
    return web.Response(status=status, body=json.dumps(document).encode(), content_type="application/json")
