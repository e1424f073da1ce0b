"""A Service that nobody has written down: for an agent's name and a directory of weights (`relight run my_model:Linear --weights DIR`)."""

import contextlib
import importlib.util
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from knative.local.errors import PlatformError
from knative.local.manifest import MAX_LABEL, SERVING, Manifests, read_manifests
from knative.local.seeds import Seed

_AGENT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_NAME = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
CACHE, CACHE_DIR = "weights-cache", "/var/cache/relight"
# Agents of ours to whom any text is an input, and architectures of which `Pipeline` asks no more.
_OF_TEXTS = {f"function.agents.transformers:{name}" for name in ("Chat", "Embeddings")}
_PIPELINE, _CLASSIFIERS = "function.agents.transformers:Pipeline", ("ForSequenceClassification", "ForTokenClassification")
WINDOW = "30s"  # without requests, until it goes to zero; long enough to type the next one


def is_agent(text: str) -> bool:
    """Whether this is `package.module:Class`, and no file."""
    return _AGENT.fullmatch(text) is not None and not Path(text).exists()


@dataclass(frozen=True)
class OwnModel:
    """The agent, its weights if it has some, and how it is called. `settings`: more variables of the function."""

    agent: str
    weights: Path | None = None
    name: str = ""
    settings: Mapping[str, str] = field(default_factory=dict)
    example: str = ""

    def __post_init__(self) -> None:
        """Raises PlatformError for what cannot be."""
        if not _NAME.fullmatch(self.service) or len(self.service) > MAX_LABEL:
            said = f"--name {self.name!r}" if self.name else f"{self.agent} would be called {self.service!r}; name it with --name: a name"
            raise PlatformError(f"{said} must be small letters, digits and -, begin with a letter and have at most {MAX_LABEL} of them")
        if self.weights is not None:
            check_weights(self.weights, f"--weights {self.weights}")
        try:
            if self.example:
                json.loads(self.example)
        except ValueError as error:
            raise PlatformError(f"--example: is not JSON: {error}") from error
        module = self.agent.partition(":")[0].partition(".")[0]
        there = Path.cwd()
        if not any((there / name).exists() for name in (module, f"{module}.py")) and not _is_found(module):
            raise PlatformError(f"{self.agent}: there is no module {module!r}; looked in {there} and Python's own path")

    @property
    def service(self) -> str:
        """The name of the Service: what was said, or that of the class (`MyModel` is my-model)."""
        words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "-", self.agent.partition(":")[2])
        return self.name or re.sub(r"[-_]+", "-", words.lower()).strip("-")

    @property
    def _shown(self) -> str:
        """The request that shows it at work: the one that was given, or one for an agent of ours, as far as it is known what that takes."""
        takes_texts = self.agent in _OF_TEXTS
        if self.agent == _PIPELINE and self.weights and "FUNCTION_TASK" not in self.settings:
            with contextlib.suppress(OSError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError):
                (architecture,) = json.loads((self.weights / "config.json").read_bytes())["architectures"]
                takes_texts = architecture.endswith(_CLASSIFIERS)
        return self.example or ('{"instances": ["hello"]}' if takes_texts else "")

    @property
    def seeds(self) -> list[Seed]:
        """What is to be put into the embedded object store."""
        return [Seed(self.weights, self._uri)] if self.weights is not None else []

    @property
    def can_change(self) -> bool:
        """See reloader.Readable: what changes is the code, and the weights."""
        return True

    def stamp(self) -> object:
        """See reloader.Readable."""
        return None

    def read(self) -> Manifests:
        """The Service. Raises ManifestError for a setting that cannot be."""
        return read_manifests([(self.agent, yaml.safe_dump(self._document()))])

    @property
    def _uri(self) -> str:
        return f"s3://models/{self.service}"

    def _document(self) -> dict[str, Any]:
        weights = {"WEIGHTS_URI": self._uri, "WEIGHTS_CACHE_DIR": CACHE_DIR} if self.weights is not None else {}
        mounts = [{"name": CACHE, "mountPath": CACHE_DIR}] if weights else []
        function = {
            "name": "function",
            "command": ["python", "-m", "function"],
            "ports": [{"containerPort": 8080}],
            "env": _env({"FUNCTION_AGENT": self.agent, "FUNCTION_MODEL_NAME": self.service, **weights, **self.settings}),
            "readinessProbe": {"httpGet": {"path": "/readyz"}},
            "livenessProbe": {"httpGet": {"path": "/healthz"}},
            "volumeMounts": mounts,
        }
        sidecar = {
            "name": "weights-cache",
            "command": ["python", "-m", "weights_cache", "serve"],
            "env": _env({**weights, "WEIGHTS_PORT": "8090"}),
            "volumeMounts": mounts,
        }
        volumes = [{"name": CACHE, "persistentVolumeClaim": {"claimName": CACHE}}] if weights else []
        pods = {"containers": [function, sidecar] if weights else [function], "volumes": volumes}
        return {
            "apiVersion": SERVING,
            "kind": "Service",
            "metadata": {"name": self.service, "annotations": {"relight/example": self._shown} if self._shown else {}},
            "spec": {"template": {"metadata": {"annotations": {"autoscaling.knative.dev/window": WINDOW}}, "spec": pods}},
        }


def _is_found(module: str) -> bool:
    """Whether Python's own path has a module, which is not imported for that."""
    try:
        return importlib.util.find_spec(module) is not None
    except ValueError:  # what is no module of anybody's, as __main__
        return False


def check_weights(directory: Path, what: str) -> None:
    """Whether there is anything in a directory of weights. Raises PlatformError."""
    if directory.is_file():
        raise PlatformError(f"{what}: is a file; name the directory that it is in, with all that belongs to the model")
    if not directory.is_dir():
        raise PlatformError(f"{what}: there is no such directory; save the model's weights there first")
    if not any(path.is_file() for path in directory.rglob("*")):
        raise PlatformError(f"{what}: holds no files; save the model's weights there first")


def _env(variables: Mapping[str, str]) -> list[dict[str, str]]:
    return [{"name": name, "value": value} for name, value in variables.items()]
