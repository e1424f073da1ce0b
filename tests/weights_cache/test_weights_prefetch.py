"""What an agent brings before anybody asks, and the labels that its node gets."""

import json
import logging
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from tests.support import wait_until
from tests.weights_cache.conftest import current, noise, push
from tests.weights_cache.stores import Bucket
from weights_cache import prefetch, room, sidecar
from weights_cache.cache import NodeCache
from weights_cache.environment import SettingsError
from weights_cache.settings import WeightsSettings

MODEL = {"config.json": b"{}", "model.safetensors": noise(1 << 20)}


class Api:
    """The part of a Kubernetes API that has nodes; it refuses as often as it is told to."""

    def __init__(self) -> None:
        self.patches: list[tuple[str, str, dict[str, Any]]] = []  # path, token, labels
        self.refusals = 0
        api = self

        class Handler(BaseHTTPRequestHandler):
            def do_PATCH(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                refused = api.refusals > 0
                api.refusals -= refused
                if not refused:
                    api.patches.append((self.path, self.headers["Authorization"], body["metadata"]["labels"]))
                self.send_response(403 if refused else 200)
                self.end_headers()
                self.wfile.write(b"{}")

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    found = Api()
    (tmp_path / "token").write_text("of the agent\n")
    monkeypatch.setattr(prefetch, "POD", tmp_path)
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "127.0.0.1")
    monkeypatch.setenv("KUBERNETES_SERVICE_PORT", str(found.server.server_port))
    thread = threading.Thread(target=found.server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield found
    found.server.shutdown()
    found.server.server_close()
    thread.join()


def test_a_node_is_labelled_once_it_holds_the_weights_and_not_before(bucket: Bucket, cache: NodeCache, api: Api) -> None:
    push(bucket, MODEL)
    agent = sidecar.Sidecar(WeightsSettings(cache_dir=cache.root, prefetch=f"minilm={bucket.uri}", node="node-1"))
    agent.bring_ahead()
    snapshot = current(cache, bucket.uri)
    assert cache.is_complete(snapshot)
    assert api.patches == [
        ("/api/v1/nodes/node-1", "Bearer of the agent", {"weights.relight/minilm": None}),
        ("/api/v1/nodes/node-1", "Bearer of the agent", {"weights.relight/minilm": snapshot}),
    ]
    agent.close()


def test_a_refused_label_is_tried_again_and_said(
    bucket: Bucket, cache: NodeCache, api: Api, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    push(bucket, MODEL)
    api.refusals = 1
    monkeypatch.setattr(sidecar, "backoff", lambda *_: iter([0.01] * 50))
    agent = sidecar.Sidecar(WeightsSettings(cache_dir=cache.root, prefetch=f"minilm={bucket.uri}", node="node-1"))
    with caplog.at_level(logging.ERROR):
        agent.bring_ahead()
    assert "node node-1 gets no label: the Kubernetes API answered 403" in caplog.text
    assert [labels for _, _, labels in api.patches][-1] == {"weights.relight/minilm": current(cache, bucket.uri)}
    agent.close()


def test_prefetched_weights_stay_leased_when_a_pod_has_asked_for_them_too(bucket: Bucket, cache: NodeCache) -> None:
    push(bucket, MODEL)
    agent = sidecar.Sidecar(WeightsSettings(cache_dir=cache.root, prefetch=f"minilm={bucket.uri}"))
    agent.bring_ahead()
    agent.pulls.ask(bucket.uri)
    (row,) = agent.pulls.rows()
    pulled = lambda: (now := agent.pulls.rows()[0])["phase"] == "complete" and now["pulls"] == row["pulls"]  # noqa: E731
    wait_until("the pull for the pod", pulled)
    with cache.making_room():
        assert [one.in_use for one in room.stored(cache)] == [True]
    agent.close()


@pytest.mark.parametrize("text", ["s3://models/a", "A=s3://models/a", "a=models/a", "a=s3://models/a a=s3://models/b", "-a=s3://models/a"])
def test_a_list_that_cannot_be_read_is_refused(text: str) -> None:
    with pytest.raises(SettingsError):
        prefetch.parse(text)


def test_names_and_uris_are_read() -> None:
    assert prefetch.parse("a=s3://models/a\n b=s3://models/b#" + "0" * 32) == {"a": "s3://models/a", "b": "s3://models/b#" + "0" * 32}
    assert prefetch.parse(None) == {}
