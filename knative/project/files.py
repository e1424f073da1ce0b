"""What is in a new project, as text by its path in the folder.

`service.yaml`, the service account and the network policy are the base's, with the project's names in the demo's place: what pods may do
is said there alone.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from knative.deploy import images
from knative.deploy.variables import Variables

_TEMPLATES = Path(__file__).parent / "templates"
_BASE = Path(__file__).parents[1] / "manifests" / "base"
_SUFFIX = ".txt"  # so that nothing takes a template for a module or a manifest of ours
# Of service.yaml: what is before the example, and the example.
EXAMPLE_LINE = r"(?m)^( *relight/example: )(.*)$"
# What is called otherwise in a project than here.
_PLACES = {"gitignore": ".gitignore", "dockerignore": ".dockerignore", "ci.yaml": ".github/workflows/ci.yaml"}


@dataclass(frozen=True)
class Kind:
    """What a project begins with."""

    about: str  # in a line
    templates: str  # the folder with its own
    agent: str
    example: str  # a request, as JSON
    output: str  # what the fake agent gives for an input, in Python
    source: str = ""  # what save_weights.py is told
    files: tuple[tuple[str, str], ...] = ()  # of its own, for the README's table


KINDS: Mapping[str, Kind] = {
    "torch": Kind(
        "A torch module of your own, served by Relight.",
        templates="torch",
        agent="agent:Agent",
        example='{"instances": [[1.0, 1.0]]}',
        output="0.5",
        files=(("agent.py", "the network, and what it does with a request"), ("test_agent.py", "tries that without a server")),
    ),
    "transformers": Kind(
        "A model of Hugging Face's transformers, served by Relight without code.",
        templates="transformers",
        agent="function.agents.transformers:Pipeline",
        example='{"instances": ["A delightful film."]}',
        output='{"label": "POSITIVE", "score": 0.99}',
        source="NAME-OR-FOLDER",
    ),
    "chat": Kind(
        "A language model of Hugging Face's transformers, served by Relight with OpenAI's routes.",
        templates="transformers",
        agent="function.agents.transformers:Chat",
        example='{"instances": [{"messages": [{"role": "user", "content": "What is a fox?"}], "max_tokens": 32}]}',
        output='"An animal."',
        source="NAME-OR-FOLDER",
    ),
    "embeddings": Kind(
        "A model of sentence-transformers, served by Relight without code.",
        templates="embeddings",
        agent="function.agents.transformers:Embeddings",
        example='{"instances": ["A man is eating food."]}',
        output="[0.6, 0.8]",
        source="NAME-OR-FOLDER",
    ),
    "onnx": Kind(
        "An ONNX model, served by Relight without code.",
        templates="onnx",
        agent="function.agents.onnx:Session",
        example='{"instances": [[1.0, 1.0]]}',
        output="0.5",
        source="model.onnx",
    ),
}


def files(name: str, kind: Kind) -> dict[str, str]:
    """Of a project `name`."""
    rows = "\n".join(f"| `{path}` | {text} |" for path, text in kind.files)
    words = {
        "ABOUT": kind.about,
        "FILES": rows or f"| `{kind.agent}` | the agent, Relight's own; a class of yours that inherits from it goes into a module here |",
        "NAME": name,
        "OUTPUT": kind.output,
        "SOURCE": f" {kind.source}" if kind.source else "",
        "VERSION": images.version(),
    }
    found = {}
    for folder in ("common", kind.templates):
        for path in sorted((_TEMPLATES / folder).glob(f"*{_SUFFIX}")):
            place = path.name.removesuffix(_SUFFIX)
            found[_PLACES.get(place, place)] = _filled(path.read_text(), words)
    found["Containerfile"] = images.containerfile(images.names(Variables())["function"])
    found["service.yaml"] = _service((_BASE / "service.yaml").read_text(), name, kind)
    for place in ("service-account.yaml", "network-policy.yaml"):
        found[place] = (_BASE / place).read_text()
    return found


def quoted(request: str) -> str:
    """As YAML has it on a line."""
    doubled = request.replace("'", "''")
    return f"'{doubled}'"


def _filled(text: str, words: Mapping[str, str]) -> str:
    return re.sub(rf"@({'|'.join(words)})@", lambda found: words[found[1]], text)


def _service(text: str, name: str, kind: Kind) -> str:
    """The base's Service with the project's names, its comments kept."""
    for pattern, value in (
        (r"(?m)^(  name: )minilm$", name),
        (EXAMPLE_LINE, quoted(kind.example)),
        (r"(?m)(?<=name: FUNCTION_AGENT\n)( +value: ).*$", kind.agent),
        (r"(?m)(?<=name: FUNCTION_MODEL_NAME\n)( +value: ).*$", name),
        (r"(?m)(?<=name: WEIGHTS_URI\n)( +value: ).*$", f"s3://models/{name}"),
    ):
        text, count = re.subn(pattern, lambda found, value=value: found[1] + value, text)  # type: ignore[misc]
        assert count, f"the base has no {pattern}"
    return text
