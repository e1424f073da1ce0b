"""Finding the agent that FUNCTION_AGENT names."""

from pathlib import Path

import pytest

from function.agent import load_agent
from function.agents.echo import Echo
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


def test_what_an_agents_own_module_misses_is_not_mistaken_for_a_wrong_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "needy_agent.py").write_text("import a_library_that_is_not_installed\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match="a_library_that_is_not_installed"):
        load_agent("needy_agent:Agent")
