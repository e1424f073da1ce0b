"""How a command finds the platform that runs here."""

from pathlib import Path

import pytest

from knative.local.address import DEFAULT_ADMIN, announce, find


def test_a_platform_is_found_from_its_announcement_until_that_is_taken_back(tmp_path: Path) -> None:
    take_back = announce(tmp_path, "http://127.0.0.1:9001")
    assert find(tmp_path) == "http://127.0.0.1:9001"
    take_back()
    assert find(tmp_path) == DEFAULT_ADMIN
    take_back()


@pytest.mark.parametrize("text", ["", "[]", "{}", "\xff"])
def test_a_file_that_says_nothing_is_none(tmp_path: Path, text: str) -> None:
    (tmp_path / "platform.json").write_text(text)
    assert find(tmp_path) == DEFAULT_ADMIN
