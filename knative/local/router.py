"""From a Host to a revision: `<service>.<namespace>.localhost`, or `<tag>-<service>.<namespace>.localhost`, in letters of any case."""

from collections.abc import Iterable, Mapping

from knative.local.manifest import tag_label
from knative.local.revision import Revision
from knative.local.service import LiveService

TAG_HEADER = "Knative-Serving-Tag"


class Router:
    """Knows which Service, and which of its tags, a Host names."""

    def __init__(self) -> None:
        self._hosts: dict[str, tuple[LiveService, str | None]] = {}
        self._default: LiveService | None = None
        self._by_header = False

    def update(self, services: Iterable[LiveService], default: LiveService, *, by_header: bool) -> None:
        """From now on these. default: for any other Host. by_header: whether TAG_HEADER chooses a tag where the Host does not."""
        hosts: dict[str, tuple[LiveService, str | None]] = {}
        for live in services:
            service = live.service
            for label, tag in [
                (service.name, None),
                *((tag_label(target.tag, service.name), target.tag) for target in service.traffic if target.tag),
            ]:
                hosts[f"{label}.{service.namespace}.localhost"] = live, tag
        self._hosts, self._default, self._by_header = hosts, default, by_header

    def find(self, host: str, headers: Mapping[str, str]) -> Revision:
        """The revision for one request."""
        assert self._default
        live, tag = self._hosts.get(host.lower().partition(":")[0].rstrip("."), (self._default, None))
        if self._by_header and not tag:
            tag = headers.get(TAG_HEADER)
        return live.choose(tag)
