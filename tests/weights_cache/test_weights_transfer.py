"""How a transfer behaves in time: how many connections it opens, how fast it may go, and what it does with one that is slow."""

import itertools
import random
import threading
import time
from collections.abc import Callable

import pytest

from tests.support import wait_until
from tests.weights_cache.conftest import content, noise, push
from tests.weights_cache.stores import Bucket, Fault, Proxy
from weights_cache import connection, transfer
from weights_cache.cache import NodeCache
from weights_cache.errors import StoreError
from weights_cache.fetch import Puller
from weights_cache.manifest import MANIFEST
from weights_cache.transfer import _Growth, _pause_s

MIB = 1 << 20
DATA = noise(8 * MIB + 777)

Pull = Callable[..., Puller]


def time_of(call: Callable[[], object]) -> float:
    began = time.monotonic()
    call()
    return time.monotonic() - began


def allowed(pull: Puller) -> int:
    """How many connections the transfer has settled on."""
    assert pull._transfer is not None
    return pull._transfer._growth.allowed


# How many connections


def grown(growth: _Growth, rate_with: Callable[[int], float], seconds: float, busy: float = 0.0) -> list[int]:
    """The numbers of connections over time, when so many bring so much per second."""
    found, total = [growth.allowed], 0.0
    for tick in range(1, int(seconds / transfer.STEP_S) + 1):
        total += rate_with(growth.allowed) * transfer.STEP_S
        number = growth.look(int(total), tick * transfer.STEP_S, busy * tick * transfer.STEP_S, throttled=False)
        if number != found[-1]:
            found.append(number)
    return found


def test_there_are_more_connections_for_as_long_as_that_brings_more() -> None:
    found = grown(_Growth(64, 2), lambda count: 1e6 * min(count, 10), 9)
    assert found[0] == transfer.FIRST_CONNECTIONS
    assert found == sorted(set(found))
    assert 10 <= found[-1] < 64  # it was tried whether still more bring more, and they did not
    assert grown(_Growth(10, 2), lambda count: 1e6 * count, 9)[-1] == 10
    assert grown(_Growth(1, 2), lambda count: 1e6 * count, 9) == [1]


def test_more_that_bring_less_go_again_and_are_tried_again_after_a_while() -> None:
    first, more, *then = grown(_Growth(64, 2), lambda count: 1e7 / count, 3 * transfer.HOLD_S)
    assert first == transfer.FIRST_CONNECTIONS < more
    assert then[:3] == [first, more, first]


def test_more_that_bring_the_same_are_kept_once() -> None:
    first, more, *then = grown(_Growth(64, 2), lambda count: 1e6, 3 * transfer.HOLD_S)
    assert first == transfer.FIRST_CONNECTIONS < more
    assert then[:3] == [2 * more, more, 2 * more]
    assert grown(_Growth(64, 2), lambda count: 1e6, transfer.HOLD_S) == [first, more]


def test_where_the_processor_is_what_is_busy_there_are_not_more() -> None:
    assert grown(_Growth(64, 2), lambda count: 1e6 * count, 9, busy=1.0) == [transfer.FIRST_CONNECTIONS]
    assert grown(_Growth(64, 8), lambda count: 1e6 * count, 9, busy=1.0)[-1] == 64


def test_a_store_that_asks_for_less_is_asked_by_half_as_many_for_a_while() -> None:
    growth = _Growth(16, 2)
    assert grown(growth, lambda count: 1e6 * count, 5)[-1] == 16
    assert [growth.look(10**9, 5 + second, 0, throttled=True) for second in (1, 2, 3, 4, 5)] == [8, 4, 2, 1, 1]
    assert growth.look(10**12, 10 + transfer.HOLD_S - 1, 0, throttled=False) == 1
    assert growth.look(10**13, 10 + transfer.HOLD_S + 1, 0, throttled=False) > 1


def test_a_pull_begins_with_few_connections(bucket: Bucket, proxy: Proxy, puller: Pull) -> None:
    bucket.put({"a": DATA})
    proxy.hold_after(0)
    pull = puller(bucket.uri, connections=16)
    running = threading.Thread(target=pull.run)
    running.start()
    wait_until("the first reads", lambda: proxy.peak == transfer.FIRST_CONNECTIONS)
    time.sleep(0.3)
    assert proxy.peak == transfer.FIRST_CONNECTIONS <= 4
    proxy.release()
    running.join()


def test_where_each_connection_is_slow_there_soon_are_more(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "STEP_S", 0.25)
    monkeypatch.setattr(transfer, "LOOK_S", 0.05)
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 64 * 1024)
    data = noise(16 * MIB)
    bucket.put({"a": data})
    proxy.rate = 2 * MIB
    pull = puller(bucket.uri, connections=12)
    assert content(cache, pull.run()) == {"a": data}
    assert 4 < proxy.peak <= 12


def test_where_the_store_is_busy_there_soon_are_fewer(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "LOOK_S", 0.02)
    monkeypatch.setattr(transfer, "FIRST_PAUSE_S", 0.05)
    bucket.put({"a": DATA})
    proxy.faults.extend(["503"] * 8)
    proxy.rate = 16 * MIB
    pull = puller(bucket.uri)
    assert content(cache, pull.run()) == {"a": DATA}
    assert allowed(pull) <= 2


def test_no_more_comes_per_second_than_was_allowed_and_hardly_less(bucket: Bucket, proxy: Proxy, puller: Pull) -> None:
    rate, rates = 5 * MIB, list[float]()

    def is_hardly_less() -> bool:
        name = str(len(rates))
        bucket.put({f"{name}/a": noise(len(DATA), seed=len(rates))})
        rates.append(len(DATA) / time_of(puller(f"{bucket.uri}/{name}", bytes_per_second=rate).run))
        return rates[-1] >= 0.8 * rate

    wait_until("a pull that nothing but this slowed down", is_hardly_less)
    assert max(rates) <= 1.2 * rate


# Pauses


def test_pauses_double_up_to_a_limit_are_never_in_step_and_as_long_as_the_store_asks_for() -> None:
    for tries, longest in enumerate((0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0), start=1):
        found = {_pause_s(tries, 0.0) for _ in range(50)}
        assert longest / 2 <= min(found) <= max(found) <= longest
        assert len(found) == 50
    assert _pause_s(1, 3.0) == 3.0
    assert 2.5 <= _pause_s(8, 1.0) <= 5.0
    assert _pause_s(1, 3600.0) == transfer.LONGEST_RETRY_AFTER_S


def test_a_store_that_is_busy_is_asked_after_pauses_that_double(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(random, "uniform", lambda low, _: low)
    bucket.put({"a": DATA[:MIB]})
    asked: list[float] = []
    proxy.before_read = lambda: asked.append(time.monotonic())
    proxy.faults.extend(["503", "500", "cut", "503", "503"])
    assert content(cache, puller(bucket.uri, connections=1).run()) == {"a": DATA[:MIB]}
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked)]
    assert len(pauses) == 5
    assert all(pause >= wanted for pause, wanted in zip(pauses, (0.05, 0.1, 0.2, 0.4, 0.8), strict=True))


def test_a_busy_store_is_left_alone_for_as_long_as_it_asks(bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull) -> None:
    bucket.put({"a": DATA[:MIB]})
    asked: list[float] = []
    proxy.before_read = lambda: asked.append(time.monotonic())
    proxy.retry_after = "1"
    proxy.faults.append("429")
    assert content(cache, puller(bucket.uri, connections=1).run()) == {"a": DATA[:MIB]}
    first, second = asked
    assert second - first >= 1


# Connections that bring nothing, or next to nothing


@pytest.mark.parametrize("fault", ["drip", "stall", "silence"])
def test_a_connection_that_brings_next_to_nothing_is_made_anew_while_the_others_go_on(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch, fault: Fault
) -> None:
    monkeypatch.setattr(transfer, "SLOW_S", 0.3)
    monkeypatch.setattr(transfer, "LOOK_S", 0.05)
    monkeypatch.setattr(transfer, "BUFFER_BYTES", 16 * 1024)
    proxy.is_spared = lambda key: key.endswith(MANIFEST)
    files = push(bucket, {"a": DATA})
    proxy.faults.append(fault)
    proxy.rate = 4 * MIB
    pull = puller(bucket.uri)
    seconds = time_of(lambda: pull.run())
    assert content(cache, pull.progress.snapshot) == files
    assert seconds < connection.STALL_S
    asked = [read.headers["range"] for read in proxy.asked if read.key == "model/a"]
    assert len(asked) > len(set(asked)) or len(asked) > 9


def test_connections_that_are_all_slow_are_left_alone(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    # As on a link that many share: a buffer takes longer than the time in which a slow one is found.
    monkeypatch.setattr(transfer, "SLOW_S", 0.3)
    monkeypatch.setattr(transfer, "LOOK_S", 0.05)
    data = DATA[: 4 * MIB]
    bucket.put({"a": data})
    proxy.rate = 2 * transfer.BUFFER_BYTES
    assert content(cache, puller(bucket.uri, connections=6).run()) == {"a": data}
    assert proxy.sent == len(data)


def test_a_connection_that_stalls_alone_times_out(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(connection, "STALL_S", 0.3)
    bucket.put({"a": DATA[:MIB]})
    proxy.faults.extend(["silence", "stall"])
    assert content(cache, puller(bucket.uri, connections=1).run()) == {"a": DATA[:MIB]}


@pytest.mark.parametrize("fault", ["silence", "stall", "503"])
def test_a_pull_is_stopped_at_once_whatever_it_waits_for(bucket: Bucket, proxy: Proxy, puller: Pull, fault: Fault) -> None:
    bucket.put({"a": DATA})
    proxy.always = fault
    proxy.retry_after = "20"
    pull = puller(bucket.uri)
    told: list[BaseException] = []

    def run() -> None:
        try:
            pull.run()
        except StoreError as error:
            told.append(error)

    running = threading.Thread(target=run)
    running.start()
    wait_until("some reads", lambda: len(proxy.asked) >= transfer.FIRST_CONNECTIONS)
    time.sleep(0.1)
    pull.cancel()
    assert time_of(running.join) < connection.STALL_S / 2  # which is less than any of these may take
    assert [str(error) for error in told] == ["the pull was stopped"]


# Clocks


@pytest.mark.parametrize("years", [-1, 1])
def test_a_clock_that_jumps_does_not_matter(
    bucket: Bucket, proxy: Proxy, cache: NodeCache, puller: Pull, monkeypatch: pytest.MonkeyPatch, years: int
) -> None:
    now, jump = time.time, 365 * 86400 * years
    bucket.put({"a": DATA})
    proxy.faults.extend(["cut", "503"])
    monkeypatch.setattr(transfer, "ATTEMPTS", 1)
    first = puller(bucket.uri)
    with pytest.raises(StoreError):
        first.run()
    first.close()
    monkeypatch.setattr(transfer, "ATTEMPTS", 8)
    kept = first.progress.bytes_there()
    monkeypatch.setattr(time, "time", lambda: now() + jump)
    proxy.faults.append("503")
    proxy.retry_after = "1"
    second = puller(bucket.uri)
    assert time_of(second.run) < 60
    assert content(cache, second.progress.snapshot) == {"a": DATA}
    assert second.progress.downloaded_bytes == len(DATA) - kept
    ref = cache.ref(bucket.uri)
    assert ref is not None
    assert abs(ref.checked - now() - jump) < 60
