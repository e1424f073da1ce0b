"""Finding the agent that FUNCTION_AGENT names, and what is wrong with one that cannot be called, told before it is."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from function.agent import load_agent, takes
from function.agents.echo import Echo
from function.guarded_agent import GuardedAgent
from weights_cache.environment import SettingsError


def test_a_class_is_found_by_its_module_and_name() -> None:
    assert isinstance(load_agent("function.agents.echo:Echo"), Echo)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        pytest.param("function.agents.echo", "must be package.module:Class", id="no class"),
        pytest.param("function.agents.echo:", "must be package.module:Class", id="empty class"),
        pytest.param("nowhere.at_all:Agent", "there is no module 'nowhere'", id="no such module"),
        pytest.param("function.agents.nowhere:Agent", "there is no module 'function.agents.nowhere'", id="no such submodule"),
        pytest.param("function.agents.echo:Ecko", "has no 'Ecko'", id="no such class"),
        pytest.param("pathlib:Path", "has no method 'load'", id="not an agent"),
    ],
)
def test_a_name_that_leads_nowhere_says_where_it_stopped(name: str, said: str) -> None:
    with pytest.raises(SettingsError) as error:
        load_agent(name)
    assert f"FUNCTION_AGENT={name!r}" in str(error.value)
    assert said in str(error.value)


def test_a_module_is_looked_for_in_the_folders_that_are_named_and_the_error_names_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", list(sys.path))
    folders = [str(tmp_path / "first"), str(tmp_path / "second")]
    for number, folder in enumerate(folders):
        Path(folder).mkdir()
        for hidden in ("function", "weights_cache"):  # whose names are taken
            Path(folder, f"{hidden}.py").write_text("raise RuntimeError('not ours')\n")
        methods = f"    load = lambda self, weights, device: None\n    predict = lambda self, inputs: [{number}]\n"
        source = f"import function.agent\nclass Agent:\n{methods}"
        Path(folder, f"agent_of_{number}.py").write_text(source)
        Path(folder, "agent_of_both.py").write_text(source)
    assert [load_agent(f"agent_of_{which}:Agent", folders).predict([0]) for which in (0, 1, "both")] == [[0], [1], [0]]
    assert (sys.path[:2], set(sys.path[2:]) & set(folders)) == (folders, set())
    with pytest.raises(SettingsError, match=f"no module 'nowhere'; looked in {folders[0]}, {folders[1]} and Python's own path"):
        load_agent("nowhere:Agent", folders)
    with pytest.raises(SettingsError, match=f"has no 'Missing'; it was found in {folders[0]}/agent_of_both.py"):
        load_agent("agent_of_both:Missing", folders)


def test_what_an_agents_own_module_misses_is_not_mistaken_for_a_wrong_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_agent.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        load_agent("needy_agent:Agent")


DECLARED = {"load": "def load(self, weights, device): pass", "predict": "def predict(self, inputs): return inputs"}


@pytest.fixture
def load_class(monkeypatch: pytest.MonkeyPatch) -> Callable[..., Any]:
    """Loads an agent of these members, in Python, beside those that it must have."""

    def load(before: str = "", **members: str) -> Any:
        module = ModuleType("made_here")
        body = "\n".join(f"    {line}" for member in (DECLARED | members).values() for line in (member or "pass").splitlines())
        exec(f"import asyncio, functools, operator\n{before}\nclass Agent:\n{body}\n", vars(module))  # noqa: S102  of our own text
        monkeypatch.setitem(sys.modules, "made_here", module)
        return load_agent("made_here:Agent")

    return load


CANNOT_BE_CALLED = [
    pytest.param({"load": ""}, "the class has no method 'load'", id="no load"),
    pytest.param({"predict": ""}, "the class has no method 'predict'", id="no predict"),
    pytest.param({"predict": "predict = 7"}, "predict is 7, not a method", id="predict is a number"),
    pytest.param({"predict": "predict = None"}, "the class has no method 'predict'", id="predict is nothing"),
    pytest.param({"close": "close = 'later'"}, "close is 'later', not a method", id="close is a text"),
    pytest.param({"start": "def start(self, input): pass"}, "the class has no method 'step'", id="start without step"),
    pytest.param({"step": "def step(self, sequences): pass"}, "the class has no method 'start'", id="step without start"),
    pytest.param({"predict": "async def predict(self, inputs): pass"}, "predict is `async def`", id="async predict"),
    pytest.param({"load": "async def load(self, weights, device): pass"}, "load is `async def`", id="async load"),
    pytest.param({"warm_up": "async def warm_up(self): pass"}, "warm_up is `async def`", id="async warm_up"),
    pytest.param({"close": "async def close(self): pass"}, "close is `async def`", id="async close"),
    pytest.param({"stream": "async def stream(self, input): yield 1"}, "stream is `async def`", id="async stream"),
    pytest.param(
        {"predict": "async def later(self, inputs, more): pass\npredict = functools.partialmethod(later, more=1)"},
        "predict is `async def`",
        id="part of an async function",
    ),
    pytest.param({"load": "def load(self, weights, device): yield"}, "load has a `yield`", id="load yields"),
    pytest.param({"warm_up": "def warm_up(self): yield"}, "warm_up has a `yield`", id="warm_up yields"),
    pytest.param({"close": "def close(self): yield"}, "close has a `yield`", id="close yields"),
    pytest.param({"load": "def load(self): pass"}, "write `def load(self, weights, device)`", id="load without arguments"),
    pytest.param({"predict": "def predict(self): pass"}, "write `def predict(self, inputs)`", id="predict without inputs"),
    pytest.param({"predict": "def predict(inputs): pass"}, "write `def predict(self, inputs)`", id="predict without self"),
    pytest.param(
        {"predict": "def predict(self, inputs, options): pass"}, "its signature (inputs, options) does not allow", id="another one"
    ),
    pytest.param({"predict": "def predict(self, inputs, *, top_k): pass"}, "does not allow", id="an option that must be said"),
    pytest.param({"predict": "def predict(self, inputs, parameters, /): pass"}, "does not allow", id="parameters by position"),
    pytest.param({"close": "def close(self, timeout_s): pass"}, "write `def close(self)`", id="close with an argument"),
    pytest.param(
        {"__init__": "def __init__(self, path): pass"}, "its __init__ wants (path); give them defaults", id="made with an argument"
    ),
]


@pytest.mark.parametrize(("members", "said"), CANNOT_BE_CALLED)
def test_what_cannot_be_called_as_the_contract_has_it_is_told_before_anything_is_loaded(
    load_class: Callable[..., Any], members: dict[str, str], said: str
) -> None:
    with pytest.raises(SettingsError) as error:
        load_class(**members)
    assert str(error.value).startswith("FUNCTION_AGENT='made_here:Agent': ")
    assert said in str(error.value)
    assert str(error.value).endswith("docs/function.md has the contract")


@pytest.mark.parametrize("made", ["Agent = 7", "Agent = Agent()", "def Agent(): pass"])
def test_what_is_no_class_is_refused(monkeypatch: pytest.MonkeyPatch, made: str) -> None:
    module = ModuleType("made_here")
    exec(f"class Agent: pass\n{made}", vars(module))  # noqa: S102  as above
    monkeypatch.setitem(sys.modules, "made_here", module)
    with pytest.raises(SettingsError, match=r"it is a \w+, not a class"):
        load_agent("made_here:Agent")


@pytest.mark.parametrize(
    "predict",
    [
        pytest.param("predict = staticmethod(sorted)", id="a function in C"),
        pytest.param("predict = operator.itemgetter(slice(None))", id="an object in C"),
        pytest.param("predict = staticmethod(list)", id="a class"),
        pytest.param("predict = functools.partial(map, str)", id="part of a class"),
        pytest.param("@staticmethod\ndef predict(inputs): return inputs", id="a static method"),
        pytest.param("@classmethod\ndef predict(cls, inputs): return inputs", id="a class method"),
        pytest.param("def predict(self, *inputs, **more): return inputs[0]", id="whatever comes"),
        pytest.param("def predict(self, inputs, threshold=0.5): return inputs", id="an argument with a default"),
        pytest.param("predict = property(lambda self: list)", id="a property"),
        pytest.param("predict = functools.lru_cache(lambda self, inputs: inputs)", id="with a memory"),
        pytest.param("def predict(self, inputs): yield from inputs", id="a generator"),
        pytest.param("predict = type('F', (), {'__call__': lambda self, inputs: inputs})()", id="an object that can be called"),
    ],
)
def test_whatever_can_be_called_with_inputs_is_a_predict(load_class: Callable[..., Any], predict: str) -> None:
    assert list(load_class(predict=predict).predict(("b", "c"))) == ["b", "c"]


@pytest.mark.parametrize(
    ("signature", "is_taken"),
    [
        ("self, inputs", False),
        ("self, inputs, parameters", True),
        ("self, inputs, parameters=None", True),
        ("self, inputs, *, parameters", True),
        ("self, inputs, parameters=None, /", False),
        ("self, inputs, *parameters", False),
        ("self, inputs, **parameters", False),
        ("self, *inputs, **more", False),
    ],
)
def test_only_an_argument_that_can_be_handed_over_by_its_name_takes_parameters(
    load_class: Callable[..., Any], signature: str, is_taken: bool
) -> None:
    agent = load_class(predict=f"def predict({signature}): return inputs")
    assert takes(agent.predict, "parameters") is is_taken


def test_an_attribute_that_is_none_is_as_good_as_no_method(load_class: Callable[..., Any], caplog: pytest.LogCaptureFixture) -> None:
    agent = load_class(**{name: f"{name} = None" for name in ("close", "warm_up", "stream", "start", "step")})
    guarded = GuardedAgent(agent)
    assert not guarded.warm_up()
    assert not guarded.shares_steps
    assert not guarded.traits().can_stream
    guarded.close()
    assert not caplog.records


def test_what_a_class_raises_when_it_is_made_passes_through(load_class: Callable[..., Any]) -> None:
    with pytest.raises(ZeroDivisionError):
        load_class(__init__="def __init__(self): 1 / 0")
