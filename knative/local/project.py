"""What `relight run` is to run, from the words that it was given: manifests, the project in a folder, or an agent by its name."""

import ast
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from knative.local.content import function_env
from knative.local.errors import PlatformError
from knative.local.launch import WEIGHTS
from knative.local.manifest import Service, Sources
from knative.local.own_model import OwnModel, check_weights, is_agent
from knative.local.reloader import Readable
from knative.local.seeds import Seed, Seeds

MANIFEST, KUSTOMIZATION, SAVED = "service.yaml", "kustomization.yaml", "weights"


@dataclass(frozen=True)
class Chosen:
    """Where the manifests come from, what the embedded object store is to hold, and what the user should know of that."""

    sources: Readable
    seeds: Sequence[Seed] = ()
    notes: Sequence[str] = field(default=())


def choose(words: Sequence[Path], seeds: Sequence[Seed], own: Mapping[str, object]) -> Chosen:
    """own: the options that only an agent by its name has, as far as they were given. Raises PlatformError."""
    if len(words) == 1 and is_agent(str(words[0])):
        model = OwnModel(str(words[0]), **own)  # type: ignore[arg-type]
        return Chosen(model, [*model.seeds, *seeds], [] if model.weights else [_without_weights()])
    if agents := [str(word) for word in words if is_agent(str(word))]:
        raise PlatformError(f"{agents[0]}: an agent is run by itself; for several write manifests")
    for word in words:
        _check_word(word)
    if own:
        raise PlatformError(
            f"--{min(own).replace('settings', 'set')} belongs to an agent, as in `relight run my_model:Linear --weights DIR`"
        )
    if not words:
        return _project(Path(), seeds)
    if len(words) == 1 and ((words[0] / MANIFEST).is_file() or _is_bare(words[0])):
        return _project(words[0], seeds)
    return Chosen(Sources(words), seeds)


def _project(folder: Path, seeds: Sequence[Seed]) -> Chosen:
    """The Service in a folder, with the weights that are saved beside it."""
    manifest = folder / MANIFEST
    if not manifest.is_file():
        raise PlatformError(
            f"there is no {MANIFEST} in {folder.absolute()}: `relight init NAME` makes a project that has one, `relight run FILE…` takes "
            "manifests, and `relight run my_model:Linear --weights DIR` runs an agent without any"
        )
    # What else a kustomization has is for a cluster; without one the folder is nothing but manifests.
    sources = Sources([manifest if (folder / KUSTOMIZATION).is_file() or not folder.name else folder])
    uri = next(filter(None, map(_weights_of, sources.read().services)), None)
    if uri is None or Seeds(seeds).of(uri):
        return Chosen(sources, seeds)
    saved = folder / SAVED
    try:
        check_weights(saved, str(saved))
    except PlatformError as error:
        note = f"{error}; without them {uri} is looked for in the store that the manifest or the environment names"
        return Chosen(sources, seeds, [note])
    return Chosen(sources, [*seeds, Seed(saved, uri.partition("#")[0])])


def _without_weights() -> str:
    return "no --weights DIR: the agent gets none" + (f"; there is a folder {SAVED} here" if Path(SAVED).is_dir() else "")


def _check_word(word: Path) -> None:
    """Raises PlatformError for what is no manifest but belongs to an agent: its module, or its weights."""
    module = word if word.suffix == ".py" else Path(f"{word}.py")
    if module.is_file() and not word.is_dir():
        where = "" if module.parent == Path() else f", in {module.parent.absolute()}"
        raise PlatformError(
            f"{word}: is Python, and no manifest; an agent is named by its class{where}: "
            f"`relight run {module.stem}:{_class_in(module)} --weights DIR`"
        )
    if _is_bare(word) and not (word / MANIFEST).is_file() and any(word.glob("*.safetensors")) | any(word.glob("*.onnx")):
        raise PlatformError(
            f"{word}: is a folder of weights, and there is no manifest in it; name the agent that they are for: "
            f"`relight run my_model:Class --weights {word}`"
            + (f", or `relight run function.agents.transformers:Pipeline --weights {word}`" if (word / "config.json").is_file() else "")
        )


def _class_in(module: Path) -> str:
    """The first class of a file that predicts."""
    with suppress(OSError, SyntaxError, ValueError, RecursionError, MemoryError):
        for node in ast.parse(module.read_bytes()).body:
            if isinstance(node, ast.ClassDef) and any(getattr(one, "name", "") == "predict" for one in node.body):
                return node.name
    return "Class"


def _is_bare(folder: Path) -> bool:
    """Whether it is a folder without any manifest."""
    return folder.is_dir() and not any(file.suffix in (".yaml", ".yml") for file in folder.iterdir())


def _weights_of(service: Service) -> str:
    found = function_env(service)
    return found[1].get(WEIGHTS, "") if found else ""
