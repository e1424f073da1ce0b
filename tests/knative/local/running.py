"""`relight run` on manifests of our own, for tests that go through its ports."""

import contextlib
import http.client
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support import BIN, Reply, Server, clean_environment, free_port, request, running, wait_until

POD = str(Path(__file__).parent / "pods" / "pod.py")
ANNOTATION = "autoscaling.knative.dev/"


def service(
    name: str,
    *sidecars: Mapping[str, Any],
    scale: Mapping[str, str] | None = None,
    spec: Mapping[str, Any] | None = None,
    container: Mapping[str, Any] | None = None,
    env: Mapping[str, str] | None = None,
    progress_deadline: str = "60s",
) -> dict[str, Any]:
    """A Service whose user container is pods/pod.py; its volume `notes` is the claim `notes-<name>`, `scratch` is the pod's own.

    Its pods stay, however long a test takes to look at them; one that is to go to zero has a `window` in its `scale`.
    """
    annotations = {"initial-scale": "0", "window": "1h", **(scale or {})}
    main = {
        "name": "function",
        "command": ["python", POD],
        "ports": [{"containerPort": 8080}],
        "env": [{"name": key, "value": value} for key, value in {"NOTES": "/notes", **(env or {})}.items()],
        "volumeMounts": [{"name": "notes", "mountPath": "/notes"}, {"name": "scratch", "mountPath": "/scratch"}],
        **(container or {}),
    }
    volumes = [{"name": "notes", "persistentVolumeClaim": {"claimName": f"notes-{name}"}}, {"name": "scratch", "emptyDir": {}}]
    return {
        "apiVersion": "serving.knative.dev/v1",
        "kind": "Service",
        "metadata": {"name": name},
        "spec": {
            "template": {
                "metadata": {
                    "annotations": {ANNOTATION + key: value for key, value in annotations.items()}
                    | {"serving.knative.dev/progress-deadline": progress_deadline}
                },
                "spec": {"containers": [main, *sidecars], "volumes": volumes, **(spec or {})},
            }
        },
    }


QUEUE = "http://queue.relight.localhost/000000000000/"  # what manifests call the embedded queues


def queue_source(name: str, sink: str, command: Sequence[str] = ("python", "-m", "knative.queue_source"), **env: str) -> dict[str, Any]:
    """A ContainerSource that polls the embedded queue `name`, and sends what it finds to a Service; results go to `<name>-results`."""
    settings = {
        "QUEUE_SOURCE_URL": f"{QUEUE}{name}",
        "QUEUE_SOURCE_RESULTS_URL": f"{QUEUE}{name}-results",
        "QUEUE_SOURCE_CONCURRENCY": "4",
        "QUEUE_SOURCE_HOST": "127.0.0.1",
        "QUEUE_SOURCE_WAIT_S": "1",
        "AWS_ENDPOINT_URL": QUEUE.removesuffix("/000000000000/"),
        "AWS_ACCESS_KEY_ID": "relight",
        "AWS_SECRET_ACCESS_KEY": "relight-local",
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    container = {
        "name": "poll",
        "command": list(command),
        "env": [{"name": key, "value": value} for key, value in (settings | env).items()],
    }
    return {
        "apiVersion": "sources.knative.dev/v1",
        "kind": "ContainerSource",
        "metadata": {"name": f"{name}-events"},
        "spec": {
            "sink": {"ref": {"apiVersion": "serving.knative.dev/v1", "kind": "Service", "name": sink}},
            "template": {"spec": {"containers": [container]}},
        },
    }


def manifests(*objects: Mapping[str, Any]) -> str:
    """A file with these objects, and with what a cluster's administrator would allow."""
    cluster = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": "config-autoscaler", "namespace": "knative-serving"},
        "data": {"allow-zero-initial-scale": "true"},
    }
    return yaml.safe_dump_all([*objects, cluster])


@dataclass
class Platform:
    """A running `relight run`."""

    server: Server
    port: int
    admin_port: int
    state: Path

    def status(self) -> Any:
        return request(self.admin_port, "GET", "/api/status").json()

    def service(self, name: str) -> Any:
        return next(service for service in self.status()["services"] if service["name"] == name)

    def pods(self, name: str) -> Any:
        return self.service(name)["pods"]

    def call(
        self,
        name: str,
        path: str = "/",
        method: str = "GET",
        body: Any = None,
        headers: Mapping[str, str] | None = None,
        timeout: float = 60,
    ) -> Reply:
        """A request to a Service by its name."""
        return request(self.port, method, path, body, {"Host": f"{name}.default.localhost:{self.port}", **(headers or {})}, timeout)

    @contextlib.contextmanager
    def calls(self, name: str, count: int, path: str = "/") -> Iterator[list[Future[Reply]]]:
        """So many requests at once."""
        with ThreadPoolExecutor(count) as threads:
            yield [threads.submit(self.call, name, path) for _ in range(count)]

    @contextlib.contextmanager
    def connection(self, name: str, path: str = "/", method: str = "GET") -> Iterator[http.client.HTTPConnection]:
        """A request that was sent, its answer not yet read."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, headers={"Host": f"{name}.default.localhost"})
            yield connection
        finally:
            connection.close()

    def source(self, name: str) -> Any:
        return next((source for source in self.status()["queue_sources"] if source["name"] == name), None)

    def queue(self, name: str) -> Any:
        return next(queue for queue in self.status()["queues"] if queue["name"] == name)

    def relight(self, *words: str, stdin: str = "") -> subprocess.CompletedProcess[str]:
        """A command that talks to this platform."""
        return subprocess.run(
            [BIN / "relight", *words, "--state-dir", str(self.state)],
            input=stdin,
            capture_output=True,
            text=True,
            timeout=60,
            env=clean_environment(),
            check=False,
        )

    def wait_for(self, name: str, what: str, probe: Any, seconds: float = 60) -> Any:
        """The Service's status, as soon as `probe` says so of it."""

        def look() -> Any:
            found = next((service for service in self.status()["services"] if service["name"] == name), None)
            return found if found and probe(found) else None

        return wait_until(f"{name}: {what}", look, seconds)

    def rewrite(self, *objects: Mapping[str, Any]) -> None:
        """Other manifests, as an editor saves them."""
        new = self.state / "manifests.yaml.new"
        new.write_text(manifests(*objects))
        new.replace(self.state / "manifests.yaml")

    def note(self, name: str, text: str) -> None:
        """Put down a file that the Service's pods wait for."""
        path = self.volume(name) / text
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()

    def seen(self, name: str) -> list[str]:
        """The paths of the requests that have reached any pod of the Service."""
        path = self.volume(name) / "seen"
        return path.read_text().splitlines() if path.exists() else []

    def volume(self, name: str) -> Path:
        return self.state / "volumes" / "default" / f"notes-{name}"


def command(state: Path, port: int, admin_port: int, *options: str, file: str | None = None) -> list[str]:
    """`relight run` on the manifests in the state directory."""
    ports = ["--port", str(port), "--admin-port", str(admin_port)]
    return [str(BIN / "relight"), "run", file or str(state / "manifests.yaml"), *ports, "--state-dir", str(state), *options]


@contextlib.contextmanager
def platform_running(state: Path, objects: Sequence[Mapping[str, Any]], *options: str, **settings: str) -> Iterator[Platform]:
    """A platform for the length of a `with`; `settings` go into its environment."""
    state.mkdir(exist_ok=True)
    (state / "manifests.yaml").write_text(manifests(*objects))
    port, admin_port = free_port(), free_port()
    with running(command(state, port, admin_port, *options), state / "run.log", clean_environment(**settings)) as server:
        platform = Platform(server, port, admin_port, state)
        try:
            wait_until("the platform", platform.status)
        except AssertionError as error:
            raise AssertionError(f"{error}; it said:\n{server.said()}") from None
        yield platform
