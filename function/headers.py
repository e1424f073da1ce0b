"""The request headers that an agent asks for, by the name: it is handed those that were sent, and no others."""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from function.access import Headers

# They say who calls, to the gate or to what stands before it. An agent may log or return what it gets, so it never gets these.
CREDENTIALS = frozenset({"authorization", "cookie", "proxy-authorization", "x-api-key"})
_NAME = re.compile(r"[A-Za-z0-9-]+")  # with anything else a header is dropped on its way, as it may pass for another one


def declared(found: Any) -> tuple[str, ...]:
    """The names that an agent's `headers` lists, in small letters; a lone one may stand without the list around it, and what is no list is
    something else of the agent's. Raises ValueError."""
    if not isinstance(found, str | Sequence):
        return ()
    names = [found] if isinstance(found, str) else list(found)
    for name in names:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f'headers has {name!r:.60}, which is no name of a header; write names as "X-Tenant": letters, digits and -')
        if name.lower() in CREDENTIALS:
            raise ValueError(
                f"headers has {name!r}, which says who calls: no agent gets it, nor {', '.join(sorted(CREDENTIALS - {name.lower()}))}; "
                "ask for a header of your own, and have clients send it"
            )
    return tuple(dict.fromkeys(name.lower() for name in names))


def chosen(names: Sequence[str], headers: "Headers") -> Mapping[str, str]:
    """Those of a request that have these names (in small letters) and were sent."""
    return {name: value.strip() for name in names if (value := headers.get(name)) is not None}
