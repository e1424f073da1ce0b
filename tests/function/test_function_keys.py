"""The keys that callers need: what counts as one, and that a file that has changed, in whatever way, counts at once."""

import logging
import os
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from function.errors import Unauthorized, Unavailable
from function.keys import AGAIN_S, MOST_BYTES, Keys
from weights_cache.environment import SettingsError


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """One that holds `old`, for long enough that its times tell whether it has changed."""
    path = tmp_path / "keys"
    path.write_bytes(b"old\n")
    os.utime(path, (1, 1))
    return path


def is_known(keys: Keys, key: str) -> bool:
    try:
        return bool(keys.check(f"Bearer {key}"))
    except Unauthorized:
        return False


# What a file says


@pytest.mark.parametrize(
    ("content", "known", "unknown"),
    [
        pytest.param(b"a\nb", ["a", "b"], ["", "ab", "a\nb"], id="the last line may have no end"),
        pytest.param(b"a\r\nb\r\n", ["a", "b"], ["a\r"], id="lines may end as on Windows"),
        pytest.param(b"\xef\xbb\xbfa\nb\n", ["a", "b"], ["\xef\xbb\xbfa"], id="a byte order mark is none of the key"),
        pytest.param(b"# no\n#no\n \t# no\na\n", ["a"], ["# no", "no", "#no"], id="comments"),
        pytest.param(b"a#b\n#c\nd#\n", ["a#b", "d#"], ["a", "c", "#c", "d"], id="a key with a # in it"),
        pytest.param(b"a # of alice\nb\t#\n", ["a", "b"], ["a # of alice", "of"], id="a comment behind a key"),
        pytest.param(b"  a\t\n\n \n", ["a"], [" "], id="spaces around"),
        pytest.param("schlüssel\n".encode(), ["schlüssel".encode().decode("latin-1")], ["schlüssel"], id="a key's bytes count"),
        pytest.param(b"\xff\xfe\x00\n", ["\xff\xfe\x00"], ["a"], id="which need not be UTF-8"),
        pytest.param("à\n".encode(), ["\xc3\xa0"], ["\xc3"], id="nor is a byte of one a space"),
    ],
)
def test_a_key_is_what_a_line_holds(tmp_path: Path, content: bytes, known: list[str], unknown: list[str]) -> None:
    (tmp_path / "keys").write_bytes(content)
    keys = Keys(tmp_path / "keys")
    assert {key: is_known(keys, key) for key in known + unknown} == dict.fromkeys(known, True) | dict.fromkeys(unknown, False)


@given(st.text(max_size=50))
@example("\ud800")
@example("€")
@example("")
@example("\x00")
def test_whatever_a_header_holds_that_is_no_key_is_unauthorized(tmp_path_factory: pytest.TempPathFactory, said: str) -> None:
    path = tmp_path_factory.getbasetemp() / "keys"
    path.write_bytes(b"x" * 60)
    keys = Keys(path)
    for value in (said, f"Bearer {said}", f"bearer  {said}"):
        with pytest.raises(Unauthorized):
            keys.check(value)


@given(st.lists(st.binary(min_size=1, max_size=20), min_size=1, max_size=10))
def test_whatever_bytes_a_file_holds_its_lines_are_keys(tmp_path_factory: pytest.TempPathFactory, contents: list[bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / "keys"
    path.write_bytes(b"\n".join([b"first", *contents]))
    assert is_known(Keys(path), "first")


def test_who_has_a_key_is_known_by_it_and_not_by_its_text(file: Path) -> None:
    file.write_bytes(b"old\nother\n")
    keys = Keys(file)
    callers = [keys.check(f"Bearer {key}") for key in ("old", "other", "old")]
    assert callers[0] == callers[2] != callers[1]
    assert "old" not in callers[0]


# A file that changes


def replaced(path: Path) -> None:
    draft = path.with_name("draft")
    draft.write_bytes(b"new\n")
    os.utime(draft, (1, 1))
    draft.rename(path)


def rewritten(path: Path) -> None:
    path.write_bytes(b"new\n")


def rewritten_with_its_old_times(path: Path) -> None:
    path.write_bytes(b"new\n")
    os.utime(path, (1, 1))


@pytest.mark.parametrize("change", [replaced, rewritten, rewritten_with_its_old_times])
@pytest.mark.parametrize("is_young", [True, False])
def test_new_keys_count_at_once_and_old_ones_no_more(file: Path, change: Callable[[Path], None], is_young: bool) -> None:
    if not is_young:
        time.sleep(2.1)  # so that it is not read again anyway
    keys = Keys(file)
    assert [is_known(keys, key) for key in ("old", "new")] == [True, False]
    change(file)
    assert [is_known(keys, key) for key in ("old", "new")] == [False, True]


def test_a_file_that_changes_within_a_tick_of_its_clock_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "keys"
    for number in range(1000, 3000):
        path.write_bytes(b"%d" % number)
        if number == 1000:
            keys = Keys(path)
        assert is_known(keys, str(number))
        assert not is_known(keys, str(number - 1))


def test_a_mounted_secret_that_is_swapped_counts_at_once(tmp_path: Path) -> None:
    """As kubelet does it: `keys` → `..data/keys`, `..data` → a folder, of which another one takes the place."""
    for name in ("old", "new"):
        (tmp_path / f"..{name}").mkdir()
        (tmp_path / f"..{name}" / "keys").write_text(name)
    (tmp_path / "..data").symlink_to("..old")
    (tmp_path / "keys").symlink_to("..data/keys")
    time.sleep(2.1)
    keys = Keys(tmp_path / "keys")
    assert [is_known(keys, key) for key in ("old", "new")] == [True, False]
    (tmp_path / "..data_tmp").symlink_to("..new")
    (tmp_path / "..data_tmp").rename(tmp_path / "..data")
    assert [is_known(keys, key) for key in ("old", "new")] == [False, True]


def test_a_file_that_has_not_changed_is_not_read_again(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    time.sleep(2.1)
    keys = Keys(file)
    monkeypatch.setattr(os, "open", None)
    assert [is_known(keys, key) for key in ("old", "new")] == [True, False]


def removed(path: Path) -> None:
    path.unlink()


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def without_a_key(path: Path) -> None:
    path.write_bytes(b"\xef\xbb\xbf# none\r\n  \r\n")


def too_large(path: Path) -> None:
    path.write_bytes(b"old\n" + b"x" * MOST_BYTES)


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def a_pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def a_link_to_nowhere(path: Path) -> None:
    path.unlink()
    path.symlink_to("nowhere")


USELESS = [removed, emptied, without_a_key, too_large, a_folder, a_pipe, a_link_to_nowhere]


@pytest.mark.parametrize("change", USELESS)
def test_without_keys_nobody_is_let_in_and_the_log_says_so_at_its_begin_and_its_end(
    file: Path, change: Callable[[Path], None], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    keys = Keys(file)
    change(file)
    for key in ("old", "other", "", "#", "old"):
        with pytest.raises(Unavailable if key else Unauthorized) as refused:
            keys.check(f"Bearer {key}")
        assert str(file) not in str(refused.value)
        assert getattr(refused.value, "retry_after_s", None) == (AGAIN_S if key else None)
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert f"FUNCTION_API_KEYS_FILE={str(file)!r}: " in caplog.text
    draft = file.with_name("draft")
    draft.write_bytes(b"new\n")
    if file.is_dir():
        file.rmdir()
    draft.rename(file)
    assert [is_known(keys, key) for key in ("new", "old", "new")] == [True, False, True]
    assert [record.levelname for record in caplog.records] == ["WARNING", "INFO"]


@pytest.mark.parametrize("change", USELESS)
def test_a_start_without_keys_is_a_wrong_setting(file: Path, change: Callable[[Path], None]) -> None:
    change(file)
    with pytest.raises(SettingsError) as wrong:
        Keys(file)
    assert str(wrong.value).startswith(f"FUNCTION_API_KEYS_FILE={str(file)!r}: ")


def test_callers_who_come_together_while_keys_are_taken_away_make_one_warning(file: Path, caplog: pytest.LogCaptureFixture) -> None:
    keys, together = Keys(file), threading.Barrier(8)

    def ask(_: int) -> None:
        together.wait()
        for _ in range(200):
            with pytest.raises(Unavailable):
                keys.check("Bearer old")

    file.unlink()
    with ThreadPoolExecutor(8) as pool:
        list(pool.map(ask, range(8)))
    assert len(caplog.records) == 1
