"""Browsers: which pages may call the function (the Fetch standard's CORS protocol). None, unless FUNCTION_CORS_ORIGINS says so."""

import re
from collections.abc import Mapping

from weights_cache.environment import SettingsError

_ORIGIN = re.compile(r"[a-z][a-z0-9+.-]*://[^\s/,?#@]+|null")
_READABLE = "Inference-Header-Content-Length, Retry-After, Server-Timing, X-Request-Id"  # beside what any page may read
_METHODS = "GET, HEAD, POST"
_KEPT_S = 7200  # that a browser remembers the answer to a preflight; more is more than some allow


class Cors:
    """What is said to browsers."""

    def __init__(self, origins: str | None) -> None:
        """origins: separated by commas, or `*`. Raises SettingsError for what is no origin."""
        self._origins = frozenset(origin.strip() for origin in (origins or "").split(",") if origin.strip())
        for origin in self._origins - {"*"}:
            if not _ORIGIN.fullmatch(origin):
                raise SettingsError(f"FUNCTION_CORS_ORIGINS: {origin!r} is no origin; give those like https://app.example.com, or *")

    def headers(self, origin: str | None) -> Mapping[str, str]:
        """Of an answer to a page of this origin."""
        if not origin or not self._origins:
            return {}
        if "*" in self._origins:
            return {"Access-Control-Allow-Origin": "*", "Access-Control-Expose-Headers": _READABLE}
        if origin not in self._origins:
            return {"Vary": "Origin"}
        # To a page that is named, also when its browser sends what a proxy before us asks for (`credentials: "include"`).
        more = {"Access-Control-Allow-Credentials": "true", "Vary": "Origin"}
        return {"Access-Control-Allow-Origin": origin, "Access-Control-Expose-Headers": _READABLE, **more}

    def preflight(self, origin: str | None, wanted_headers: str | None) -> Mapping[str, str] | None:
        """What is answered, with `headers`, to a browser that asks whether it may; None if there is nothing to say to it."""
        if not origin or not self._origins or not ("*" in self._origins or origin in self._origins):
            return None
        return {
            "Access-Control-Allow-Methods": _METHODS,
            "Access-Control-Allow-Headers": wanted_headers or "Authorization, Content-Type",
            "Access-Control-Max-Age": str(_KEPT_S),
        }
