"""What a person chooses on the command line, as `NAME=value`: the words of the Makefile, checked before anything else happens."""

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

from knative.autoscaler.config import TARGET_MIN
from knative.autoscaler.spec import CONTAINER_CONCURRENCY_MAX
from knative.deploy.errors import VariableError
from knative.local import sent_headers
from weights_cache.environment import is_secret

_LABEL = re.compile(r"[a-z]([-a-z0-9]{0,61}[a-z0-9])?")
# A registry with its port, a path, and a tag or a digest (github.com/distribution/reference, less what nobody writes).
_IMAGE = re.compile(
    r"([a-zA-Z0-9][-.a-zA-Z0-9]*(:[0-9]+)?/)?[a-z0-9]+([._-]+[a-z0-9]+)*(/[a-z0-9]+([._-]+[a-z0-9]+)*)*"
    r"(:[\w][\w.-]{0,127})?(@sha256:[0-9a-f]{64})?"
)
_WEIGHTS = re.compile(r"none|s3://[^/#\s]+/[^#\s]*[^/#\s](#[0-9a-f]{32})?")
# As SQS has them, and those who imitate it: an account or a word for it, and the queue's name.
_QUEUE = re.compile(r"https?://[^/\s@?#]+/[\w-]+/[\w-]{1,80}(\.fifo)?", re.ASCII)
_AGENT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
SET = "SET_"  # before the name of a variable of the function's own
_NAMED = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
# What has a variable of its own here, and what Knative keeps for itself.
_INSTEAD = {
    "FUNCTION_AGENT": "AGENT=",
    "FUNCTION_DEVICE": "DEVICE=",
    "FUNCTION_MODEL_NAME": "NAME=",
    "WEIGHTS_URI": "WEIGHTS_URI=",
}
_OF_KNATIVE = ("PORT", "K_SERVICE", "K_CONFIGURATION", "K_REVISION")
_EVENTS = ("sqs", "sqs-keda", "amqp", "broker", "kafka", "rabbitmq", "integration-source")
_SHORT = 5  # characters of a value that can be no secret
# Of the Makefile, and of no concern here.
_OTHERS = {"TORCH", "PYTHON", "VENV", "BIN", "PORT", "ADMIN_PORT", "STATE_DIR", "SEED"}


@dataclass(frozen=True)
class Variables:
    """The values that were given; None leaves what the overlay says."""

    env: str = "default"  # an overlay's name, or a folder
    name: str | None = None  # of the Service, and of the model
    namespace: str | None = None
    image: str | None = None  # of the function
    weights_image: str | None = None  # of the sidecar and the agent
    weights_uri: str | None = None  # "none" of an agent without
    agent: str | None = None  # package.module:Class
    example: str | None = None  # a request that shows the agent at work, as JSON
    device: str | None = None  # where the model runs
    components: tuple[str, ...] | None = None  # of manifests/components, on top of the overlay's own
    environment: Mapping[str, str] = field(default_factory=dict)  # variables of the function's container: what SET_NAME= says of NAME
    min_scale: int | None = None
    max_scale: int | None = None
    target: float | None = None  # requests at once that a pod should have
    concurrency: int | None = None  # requests at once that a pod may have; 0 is no limit
    gpu: int | None = None  # devices for the function
    events: str | None = None  # where they come from: a folder of manifests/eventing
    queue_url: str | None = None  # of the SQS queue whose messages the function gets
    results_url: str | None = None  # of the one that its replies go to
    queue_image: str | None = None  # of the queue source
    pin: bool = True  # to the snapshot of the weights that the store has now
    timeout: int | None = None  # seconds that `deploy` waits; by default as long as the revision may take, and a minute
    data: str | None = None  # a request body, for `invoke`
    route: str = "/"  # where to, for `invoke`
    header: str | None = None  # `Name: value`, for `invoke`
    address: str | None = None  # where the cluster's gateway answers, if the Service's host name does not lead there
    container: str = "function"  # whose log
    follow: bool = False  # go on with the log
    variant: str = "cpu"  # of the function's image
    agent_dir: Path | None = None  # a folder with an agent, that `build` makes an image of
    base_image: str | None = None  # the function's image that this one stands on
    options: str = ""  # more options of the engine's `build`
    sbom: Path | None = None  # a folder that `build` copies the images' lists of packages to
    kubectl: Path | None = None  # the executable

    @classmethod
    def parse(cls, words: Iterable[str]) -> "Variables":
        """From `NAME=value` words; an empty value counts as none. Raises VariableError."""
        values: dict[str, Any] = {}
        environment: dict[str, str] = {}
        for word in words:
            key, separator, text = word.partition("=")
            if not separator:
                raise VariableError(word, "", "variables are given as NAME=value")
            if key in _OTHERS or not text:
                continue
            if key.startswith(SET):
                environment[_settable(key)] = text
                continue
            if key not in _CHECKS:
                near = difflib.get_close_matches(key, _CHECKS, n=1)
                known = f"did you mean {near[0]}?" if near else f"known are {', '.join(_CHECKS)}"
                # What it holds nobody can say: it may be a token.
                raise VariableError(key, text if len(text) <= _SHORT else "…", f"there is no such variable; {known}")
            values[key.lower()] = _CHECKS[key](key, text)
        found = cls(**values, environment=environment)
        if found.max_scale and found.min_scale and found.max_scale < found.min_scale:
            raise VariableError("MAX_SCALE", found.max_scale, f"must be at least MIN_SCALE ({found.min_scale}), or 0 for no limit")
        if found.results_url and not found.queue_url:
            raise VariableError("RESULTS_URL", found.results_url, "goes with QUEUE_URL: replies to its messages are sent there")
        if found.results_url and found.results_url == found.queue_url:
            raise VariableError(
                "RESULTS_URL", found.results_url, "must be another queue than QUEUE_URL, or each reply becomes a message again"
            )
        return found

    def overlay_in_words(self) -> str:
        """The words that choose the overlay, and what it is given on top."""
        components = f" COMPONENTS={','.join(self.components)}" if self.components else ""
        return f"ENV={self.env}{components}" + (f" GPU={self.gpu}" if self.gpu else "")


def _matching(pattern: re.Pattern[str], expected: str) -> Callable[[str, str], str]:
    def check(name: str, text: str) -> str:
        if not pattern.fullmatch(text):
            raise VariableError(name, text, expected)
        return text

    return check


def _whole(low: int, high: int) -> Callable[[str, str], int]:
    def check(name: str, text: str) -> int:
        if not text.isdecimal() or not low <= int(text) <= high:
            raise VariableError(name, text, f"must be a whole number from {low} to {high}")
        return int(text)

    return check


def _target(name: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not TARGET_MIN <= value <= CONTAINER_CONCURRENCY_MAX:
        raise VariableError(name, text, f"must be a number from {TARGET_MIN:g} to {CONTAINER_CONCURRENCY_MAX}")
    return value


def _yes(name: str, text: str) -> bool:
    words = {"1": True, "true": True, "yes": True, "0": False, "false": False, "no": False}
    if text.lower() not in words:
        raise VariableError(name, text, "must be true or false")
    return words[text.lower()]


def _json(name: str, text: str) -> str:
    try:
        json.loads(text)
    except (ValueError, RecursionError) as error:
        raise VariableError(name, text, f"must be the JSON body of a request: {error}") from error
    return text


def _header(name: str, text: str) -> str:
    try:
        sent_headers.parse([text])
    except ValueError as error:
        # What it holds is not repeated: it may be a key.
        raise VariableError(name, "…", "must be a header that a caller may choose, as 'Name: value'") from error
    return text


def _names(name: str, text: str) -> tuple[str, ...]:
    found = tuple(dict.fromkeys(re.split(r"[,\s]+", text.strip(", \t\n"))))
    if not all(re.fullmatch(r"[a-z][-a-z0-9]*", one) for one in found):
        raise VariableError(name, text, "must be names with commas between them")
    return found


def _folder(name: str, text: str) -> Path:
    if not Path(text).is_dir():
        raise VariableError(name, text, "must be a folder")
    return Path(text)


def _settable(key: str) -> str:
    """The variable that SET_… names. Raises VariableError for one that is not to be set so; its value is not repeated."""
    name = key.removeprefix(SET)
    if not _NAMED.fullmatch(name):
        raise VariableError(key, "…", "a variable's name has letters, digits and _, no digit first")
    if name in _INSTEAD:
        raise VariableError(key, "…", f"has a variable of its own: {_INSTEAD[name]}")
    if name in _OF_KNATIVE:
        raise VariableError(key, "…", "is Knative's own to set")
    if name.startswith("AWS_"):
        raise VariableError(
            key, "…", "credentials are the sidecar's alone, and are in the Secret weights-store; the function needs none for its weights"
        )
    if is_secret(name):
        raise VariableError(
            key, "…", "looks like a secret, and whoever may read Services could read it: put it into a Secret, and name that in an overlay"
        )
    return name


def service_name(name: str, text: str) -> str:
    """A name that a function can have. Raises VariableError."""
    _label(name, text)
    if text == "relight" or text.startswith("relight-"):  # what begins with a function's name goes with it
        raise VariableError(name, text, "is, or begins as, the name of what the functions of a namespace share; choose another")
    return text


_queue = _matching(_QUEUE, "must be the URL of an SQS queue: https://sqs.REGION.amazonaws.com/ACCOUNT/NAME")
_label = _matching(_LABEL, "must be a label: small letters, digits and -, a letter first, at most 63")
_image = _matching(_IMAGE, "must be an image: registry/path:tag, or with @sha256: and 64 hex digits")

_CHECKS: Mapping[str, Callable[[str, str], Any]] = {
    "ENV": _matching(re.compile(r"[\w./-]+"), "must be the name of an overlay, or a folder with a kustomization.yaml"),
    "NAME": service_name,
    "NAMESPACE": _label,
    "IMAGE": _image,
    "WEIGHTS_IMAGE": _image,
    "WEIGHTS_URI": _matching(_WEIGHTS, "must be s3://bucket/prefix, s3://bucket/prefix#snapshot with the 32 hex digits of one, or none"),
    "AGENT": _matching(_AGENT, "must be package.module:Class"),
    "EXAMPLE": _json,
    "DEVICE": _matching(re.compile(r"cpu|cuda(:\d+)?"), "must be cpu, cuda or cuda:0"),
    "COMPONENTS": _names,
    "MIN_SCALE": _whole(0, 1_000_000),
    "MAX_SCALE": _whole(0, 1_000_000),
    "TARGET": _target,
    "CONCURRENCY": _whole(0, CONTAINER_CONCURRENCY_MAX),
    "GPU": _whole(0, 16),
    "EVENTS": _matching(re.compile("|".join(_EVENTS)), f"must be one of {', '.join(_EVENTS)}"),
    "QUEUE_URL": _queue,
    "RESULTS_URL": _queue,
    "QUEUE_IMAGE": _image,
    "PIN": _yes,
    "TIMEOUT": _whole(1, 86_400),
    "DATA": lambda _, text: text,
    "ROUTE": _matching(re.compile(r"/\S*"), "must begin with /"),
    "HEADER": _header,
    "ADDRESS": _matching(re.compile(r"https?://[^/\s]+"), "must be http://host:port"),
    "CONTAINER": _label,
    "FOLLOW": _yes,
    "VARIANT": _matching(re.compile("cpu|cuda"), "must be cpu or cuda"),
    "AGENT_DIR": _folder,
    "BASE_IMAGE": _image,
    "OPTIONS": lambda _, text: text,
    "SBOM": lambda _, text: Path(text),
    "KUBECTL": lambda _, text: Path(text),
}
assert {key.lower() for key in _CHECKS} == {one.name for one in fields(Variables)} - {"environment"}
