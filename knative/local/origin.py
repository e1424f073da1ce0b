"""Who may ask a port of this machine's loopback that has no password: whoever is on this machine and means it.

A Host that is no loopback name is refused (another site's name may be made to lead here: DNS rebinding), and so is what a browser says
another site has asked for (cross-site request forgery).
"""

import re
from collections.abc import Mapping
from ipaddress import ip_address


class Forbidden(Exception):
    """A request that may be another site's; says why."""


def check(host: str, origin: str | None, fetch_site: str | None, *, subdomains: bool = False) -> None:
    """The values of the headers Host, Origin and Sec-Fetch-Site, None for one that is not there. Raises Forbidden.

    subdomains: whether names below `localhost` will do, too.
    """
    if not is_loopback(host, subdomains=subdomains):
        raise Forbidden(f"Host {host!r} is no name of this machine's loopback; use 127.0.0.1 or localhost")
    if origin is not None and origin != f"http://{host}":
        raise Forbidden(f"a page of {origin} may not ask this")
    if fetch_site not in (None, "none", "same-origin"):
        raise Forbidden("a page of another site may not ask this")


def is_loopback(host: str, *, subdomains: bool = False) -> bool:
    """Whether a Host, with or without a port, is a name of this machine's loopback."""
    match = re.fullmatch(r"(\[[0-9a-fA-F:]+\]|[^:\[\]]+)(:[0-9]{1,5})?", host)
    if not match:
        return False
    name = match[1].strip("[]").lower()
    try:
        return ip_address(name).is_loopback
    except ValueError:
        return name == "localhost" or (subdomains and name.endswith(".localhost"))


def is_own_user(host: str, headers: Mapping[str, str]) -> bool:
    """Whether a request to a port of the loopback comes from who runs the platform: not through a proxy or a tunnel, nor from a site."""
    if any(name in headers for name in ("Forwarded", "X-Forwarded-For", "X-Forwarded-Host", "X-Real-Ip", "Via")):
        return False
    try:
        check(host, headers.get("Origin"), headers.get("Sec-Fetch-Site"), subdomains=True)
    except Forbidden:
        return False
    return True
