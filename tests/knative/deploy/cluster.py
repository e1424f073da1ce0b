"""A Kubernetes API for kubectl to talk to: discovery, server-side apply, merge patches, get, list, delete, logs; and what a controller
would make of it.

It keeps what is applied, merges no fields but those of a patch, which stay whatever is applied later (they have another owner), and
raises `generation` when a spec changes, as a real one does. What becomes of a Service is the test's to say.
"""

import copy
import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import yaml

Object = dict[str, Any]

SERVING = "serving.knative.dev/v1"
# Group and version -> the kinds that there are, with their plural names and whether they have a namespace.
KINDS: dict[str, list[tuple[str, str, bool]]] = {
    "v1": [
        ("Namespace", "namespaces", False),
        ("ConfigMap", "configmaps", True),
        ("Event", "events", True),
        ("PersistentVolumeClaim", "persistentvolumeclaims", True),
        ("Pod", "pods", True),
        ("ServiceAccount", "serviceaccounts", True),
    ],
    "apps/v1": [("DaemonSet", "daemonsets", True)],
    "networking.k8s.io/v1": [("NetworkPolicy", "networkpolicies", True)],
    "rbac.authorization.k8s.io/v1": [("ClusterRole", "clusterroles", False), ("ClusterRoleBinding", "clusterrolebindings", False)],
    "admissionregistration.k8s.io/v1": [
        ("ValidatingAdmissionPolicy", "validatingadmissionpolicies", False),
        ("ValidatingAdmissionPolicyBinding", "validatingadmissionpolicybindings", False),
    ],
    SERVING: [("Service", "services", True), ("Revision", "revisions", True)],
}


class Refused(Exception):
    """What the API answers instead of a document."""

    def __init__(self, code: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.code, self.reason = code, reason


class Cluster:
    """The state, and what happens to a Service."""

    def __init__(self) -> None:
        self.kinds = dict(KINDS)
        self.objects: dict[tuple[str, str, str], Object] = {}  # by plural, namespace, name
        self.logs: dict[tuple[str, str], str] = {}  # by pod and container
        self.applied: list[tuple[str, str]] = []  # (kind, name), dry runs left out
        self.dry_runs = 0
        self.webhook: Callable[[Object], str | None] = lambda service: None  # what it has against a Service
        self.controller: Callable[[Cluster, Object, int], None] = becomes_ready  # called when a Service is looked at: which time it is
        self._patches: dict[tuple[str, str, str], Object] = {}
        self._looks: dict[str, int] = {}
        self._lock = threading.RLock()  # guards everything; kubectl asks several things at once

    def add(self, plural: str, document: Object, namespace: str = "") -> None:
        """Put an object there."""
        self.objects[plural, namespace, document["metadata"]["name"]] = document

    def config(self, name: str, **data: str) -> None:
        """Set a ConfigMap of Knative."""
        values = {key.replace("__", ".").replace("_", "-"): value for key, value in data.items()}
        self.add("configmaps", {"apiVersion": "v1", "kind": "ConfigMap", "metadata": {"name": name}, "data": values}, "knative-serving")

    def service(self, name: str = "minilm", namespace: str = "default") -> Object:
        """A Service, as it is."""
        return self.objects["services", namespace, name]

    def get(self, path: str, query: dict[str, list[str]]) -> Any:
        """The answer to a GET."""
        with self._lock:
            if path == "/version":
                return {"major": "1", "minor": "36", "gitVersion": "v1.36.0"}
            if (found := self._discover(path)) is not None:
                return found
            version, plural, namespace, name, rest = self._place(path)
            if rest == "log":
                return self.logs.get((name, query["container"][0]), "")
            if name:
                self._look(plural, namespace, name)
                if found := self.objects.get((plural, namespace, name)):
                    return found
                raise _not_found(plural, name)
            kind = next(kind for kind, one, _ in self.kinds[version] if one == plural)
            wanted = dict(part.split("=") for part in query.get("labelSelector", [""])[0].split(",") if part)
            items = [
                item
                for (one, space, _), item in self.objects.items()
                if one == plural and space == namespace and wanted.items() <= item["metadata"].get("labels", {}).items()
            ]
            return {"apiVersion": version, "kind": f"{kind}List", "metadata": {}, "items": items}

    def apply(self, path: str, query: dict[str, list[str]], document: Object) -> Object:
        """The answer to a server-side apply."""
        with self._lock:
            _, plural, namespace, name, _ = self._place(path)
            assert query["fieldManager"] == ["relight"]
            if namespace and ("namespaces", "", namespace) not in self.objects:
                raise _not_found("namespaces", namespace)
            if plural == "services" and (said := self.webhook(document)):
                raise Refused(400, "BadRequest", f'admission webhook "validation.webhook.serving.knative.dev" denied the request: {said}')
            if plural == "services" and "dryRun" in query and (said := self._pods_problem(document, namespace)):
                raise Refused(400, "BadRequest", f'admission webhook "validation.webhook.serving.knative.dev" denied the request: {said}')
            before = self.objects.get((plural, namespace, name))
            after = _merged(copy.deepcopy(document), self._patches.get((plural, namespace, name), {}))
            generation = before["metadata"]["generation"] if before else 0
            after["metadata"] |= {"generation": generation if before and before.get("spec") == after.get("spec") else generation + 1}
            if before:
                after["status"] = before.get("status", {})
            if "dryRun" in query:
                self.dry_runs += 1
                return after
            self.applied.append((document["kind"], name))
            self.objects[plural, namespace, name] = after
            self._looks.pop(name, None)
            return after

    def patch(self, path: str, changes: Object) -> Object:
        """The answer to a merge patch (RFC 7386, which takes nothing away here)."""
        with self._lock:
            _, plural, namespace, name, _ = self._place(path)
            if (plural, namespace, name) not in self.objects:
                raise _not_found(plural, name)
            found = self.objects[plural, namespace, name]
            self._patches[plural, namespace, name] = _merged(self._patches.get((plural, namespace, name), {}), changes)
            found |= _merged(found, changes)
            found["metadata"]["generation"] += 1
            return found

    def _pods_problem(self, service: Object, namespace: str) -> str | None:
        """In a dry run of a Service, Knative's webhook tries whether its pods could be made now, which takes their service account."""
        account = service["spec"]["template"]["spec"].get("serviceAccountName", "default")
        if account == "default" or ("serviceaccounts", namespace, account) in self.objects:
            return None
        return f'dry run failed with pods "dry-run-validation" is forbidden: serviceaccount "{account}" not found: spec.template'

    def delete(self, path: str) -> Object:
        """The answer to a DELETE."""
        with self._lock:
            _, plural, namespace, name, _ = self._place(path)
            if (plural, namespace, name) not in self.objects:
                raise _not_found(plural, name)
            del self.objects[plural, namespace, name]
            return {"kind": "Status", "apiVersion": "v1", "status": "Success"}

    def _look(self, plural: str, namespace: str, name: str) -> None:
        if plural == "services" and (service := self.objects.get((plural, namespace, name))):
            self._looks[name] = self._looks.get(name, 0) + 1
            self.controller(self, service, self._looks[name])

    def _place(self, path: str) -> tuple[str, str, str, str, str]:
        parts = path.strip("/").split("/")
        version, parts = (parts[1], parts[2:]) if parts[0] == "api" else ("/".join(parts[1:3]), parts[3:])
        namespace = ""
        if len(parts) > 2 and parts[0] == "namespaces":
            namespace, parts = parts[1], parts[2:]
        if version not in self.kinds or not parts or parts[0] not in [plural for _, plural, _ in self.kinds[version]]:
            raise Refused(404, "NotFound", "the server could not find the requested resource")
        return version, parts[0], namespace, parts[1] if len(parts) > 1 else "", parts[2] if len(parts) > 2 else ""

    def _discover(self, path: str) -> Any:
        groups = [version for version in self.kinds if "/" in version]
        if path == "/api":
            return {"kind": "APIVersions", "versions": ["v1"]}
        if path == "/apis":
            entries = [{"groupVersion": version, "version": version.split("/")[1]} for version in groups]
            listed = [
                {"name": version.split("/")[0], "versions": [entry], "preferredVersion": entry}
                for version, entry in zip(groups, entries, strict=True)
            ]
            return {"kind": "APIGroupList", "apiVersion": "v1", "groups": listed}
        if path == "/openapi/v3":
            return {"paths": {_root(version)[1:]: {"serverRelativeURL": f"/openapi/v3{_root(version)}"} for version in self.kinds}}
        version = path.removeprefix("/openapi/v3").removeprefix("/apis/").removeprefix("/api/")
        if path.startswith("/openapi/v3/"):
            return self._openapi(version)
        if version in self.kinds and path in (_root(version), f"{_root(version)}/"):
            verbs = ["create", "delete", "get", "list", "patch", "watch"]
            resources = [
                {"name": plural, "singularName": "", "namespaced": namespaced, "kind": kind, "verbs": verbs}
                for kind, plural, namespaced in self.kinds[version]
            ]
            return {"kind": "APIResourceList", "apiVersion": "v1", "groupVersion": version, "resources": resources}
        return None

    def _openapi(self, version: str) -> Object:
        """Enough for kubectl to know that this API checks fields itself."""
        group, _, number = version.rpartition("/")
        parameters = [{"name": name, "in": "query"} for name in ("fieldValidation", "dryRun")]
        paths = {
            f"{_root(version)}/{plural}/{{name}}": {
                "patch": {
                    "parameters": parameters,
                    "x-kubernetes-action": "patch",
                    "x-kubernetes-group-version-kind": {"group": group, "version": number, "kind": kind},
                    "responses": {},
                }
            }
            for kind, plural, _ in self.kinds[version]
        }
        return {"openapi": "3.0.0", "info": {"title": "", "version": ""}, "paths": paths}


def becomes_ready(cluster: Cluster, service: Object, look: int) -> None:
    """A revision of its own for each generation, and ready at once."""
    revise(cluster, service)
    service["status"] |= {
        "latestReadyRevisionName": service["status"]["latestCreatedRevisionName"],
        "url": f"http://{service['metadata']['name']}.default.example.com",
        "traffic": [{"percent": 100, "revisionName": service["status"]["latestCreatedRevisionName"]}],
        "conditions": [{"type": "Ready", "status": "True"}],
    }


def revise(cluster: Cluster, service: Object) -> str:
    """The revision of the Service's generation, made if it is not there."""
    metadata = service["metadata"]
    name = f"{metadata['name']}-{metadata['generation']:05}"
    service.setdefault("status", {})
    service["status"] |= {"observedGeneration": metadata["generation"], "latestCreatedRevisionName": name}
    revision = {"apiVersion": SERVING, "kind": "Revision", "metadata": {"name": name, "namespace": metadata["namespace"], "generation": 1}}
    cluster.objects.setdefault(("revisions", metadata["namespace"], name), revision)
    return name


def pod(revision: str, **status: Any) -> Object:
    """A pod of a revision."""
    labels = {"serving.knative.dev/revision": revision, "serving.knative.dev/service": revision[:-6]}
    metadata = {"name": f"{revision}-pod", "namespace": "default", "labels": labels}
    containers = [{"name": "function"}, {"name": "weights-cache"}]
    return {"apiVersion": "v1", "kind": "Pod", "metadata": metadata, "spec": {"containers": containers}, "status": status}


@contextmanager
def serving(cluster: Cluster, folder: Path) -> Iterator[dict[str, str]]:
    """The environment in which kubectl talks to the cluster."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._answer(lambda path, query, _: cluster.get(path, query))

        def do_PATCH(self) -> None:
            if self.headers["Content-Type"] == "application/merge-patch+json":
                self._answer(lambda path, _, body: cluster.patch(path, json.loads(body)))
            else:
                self._answer(lambda path, query, body: cluster.apply(path, query, yaml.safe_load(body)))

        def do_DELETE(self) -> None:
            self._answer(lambda path, _, __: cluster.delete(path))

        def _answer(self, act: Callable[[str, dict[str, list[str]], bytes], Any]) -> None:
            url = urlsplit(self.path)
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            try:
                code, document = 200, act(url.path, parse_qs(url.query), body)
            except Refused as error:
                status = {"kind": "Status", "apiVersion": "v1", "status": "Failure", "reason": error.reason}
                code, document = error.code, {**status, "message": str(error), "code": error.code}
            text = isinstance(document, str)
            data = document.encode() if text else json.dumps(document).encode()
            self.send_response(code)
            self.send_header("Content-Type", "text/plain" if text else "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield configured(folder, f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def configured(folder: Path, address: str) -> dict[str, str]:
    """The environment in which kubectl talks to this address."""
    config = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "test",
        "contexts": [{"name": "test", "context": {"cluster": "test", "user": "test"}}],
        "clusters": [{"name": "test", "cluster": {"server": address}}],
        "users": [{"name": "test", "user": {}}],
    }
    (folder / "kubeconfig").write_text(yaml.safe_dump(config))
    return {"KUBECONFIG": str(folder / "kubeconfig"), "KUBECACHEDIR": str(folder / "cache"), "HOME": str(folder)}


def _merged(document: Object, changes: Object) -> Object:
    """The document with the changes in it, maps within maps too."""
    found = dict(document)
    for key, value in changes.items():
        found[key] = _merged(found.get(key, {}), value) if isinstance(value, dict) else value
    return found


def _root(version: str) -> str:
    return f"/apis/{version}" if "/" in version else f"/api/{version}"


def _not_found(plural: str, name: str) -> Refused:
    return Refused(404, "NotFound", f'{plural} "{name}" not found')
