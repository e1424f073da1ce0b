"""What an agent brings to its node before anybody asks, and how the cluster learns that it is there: labels of the node.

A label says `weights.relight/<name>: <snapshot>`; a Service that prefers nodes with it (knative/manifests/components/prefetch) starts where
its weights are. The label goes when the agent starts and comes when the weights are complete: it never says more than is so.
"""

import json
import logging
import os
import re
import ssl
from collections.abc import Mapping
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path

from weights_cache.environment import SettingsError
from weights_cache.excerpt import quoted, told
from weights_cache.uri import WeightsUri

LABEL = "weights.relight/"
POD = Path("/var/run/secrets/kubernetes.io/serviceaccount")  # where a pod finds the cluster's certificate and its own token
TIMEOUT_S = 10.0
MAX_ANSWER_BYTES = 64 * 1024

log = logging.getLogger("relight.weights")


def parse(text: str | None) -> dict[str, str]:
    """The URIs of WEIGHTS_PREFETCH by name. Raises SettingsError."""
    found: dict[str, str] = {}
    for item in (text or "").split():
        name, separator, uri = item.partition("=")
        if not separator or not re.fullmatch(r"[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", name) or name in found:
            raise SettingsError(
                f"WEIGHTS_PREFETCH: {told(quoted(item))} must be NAME=s3://bucket/prefix, each NAME once and of small letters, digits and -"
            )
        WeightsUri.parse(uri)
        found[name] = uri
    return found


class NodeLabels:
    """The labels of one node."""

    def __init__(self, node: str, environ: Mapping[str, str] = os.environ) -> None:
        """Without a certificate in POD the API is asked by plain HTTP, which no cluster answers."""
        self._node = node
        self._host, self._port = environ.get("KUBERNETES_SERVICE_HOST", ""), int(environ.get("KUBERNETES_SERVICE_PORT", "443"))

    def set(self, snapshots: Mapping[str, str | None]) -> bool:
        """Let the node have these labels, by name; None takes one away. Returns whether it worked; the log says why not."""
        body = json.dumps({"metadata": {"labels": {LABEL + name: snapshot for name, snapshot in snapshots.items()}}})
        try:
            token = (POD / "token").read_text().strip()
            headers = {"Content-Type": "application/merge-patch+json", "Authorization": f"Bearer {token}"}
            connection = self._connect()
            try:
                connection.request("PATCH", f"/api/v1/nodes/{self._node}", body, headers)
                reply = connection.getresponse()
                answer = reply.read(MAX_ANSWER_BYTES)
            finally:
                connection.close()
        except (OSError, HTTPException) as error:
            log.error("node %s gets no label: %s", self._node, error)
            return False
        if reply.status != 200:
            said = answer[:500].decode(errors="replace")
            log.error("node %s gets no label: the Kubernetes API answered %d: %s", self._node, reply.status, said)
        return reply.status == 200

    def _connect(self) -> HTTPConnection:
        certificate = POD / "ca.crt"
        if not certificate.exists():
            return HTTPConnection(self._host, self._port, timeout=TIMEOUT_S)
        return HTTPSConnection(self._host, self._port, timeout=TIMEOUT_S, context=ssl.create_default_context(cafile=str(certificate)))
