"""Threads have owners: none outlives its owner, and each that ends by an exception is told of."""

import _thread
import ast
import gc
import signal
import socket
import threading
import time
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

import weights_cache
from tests.support import wait_until
from tests.weights_cache.conftest import noise, push
from tests.weights_cache.stores import Bucket, Proxy
from weights_cache import cli, transfer
from weights_cache.blob import BlobWriter
from weights_cache.cache import NodeCache
from weights_cache.connection import Connection
from weights_cache.errors import StoreUnavailable
from weights_cache.fetch import Puller
from weights_cache.settings import WeightsSettings
from weights_cache.sidecar import Sidecar
from weights_cache.store import Store
from weights_cache.threads import Threads, in_order
from weights_cache.uri import WeightsUri

MIB = 1 << 20
BEGINNERS = {"Thread", "Timer", "ThreadPoolExecutor", "ProcessPoolExecutor", "start_new_thread", "to_thread", "run_in_executor"}
OWNER = "threads.py"


def begun(source: str) -> list[str]:
    """What a module begins threads with, whatever it calls it."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom):
            found += [alias.name for alias in node.names if alias.name in BEGINNERS]
        elif isinstance(node, ast.Attribute) and node.attr in BEGINNERS:
            found.append(node.attr)
    return found


def test_threads_are_begun_by_their_owner_alone() -> None:
    top = Path(weights_cache.__file__).parent
    found = {str(path.relative_to(top)): begun(path.read_text()) for path in top.rglob("*.py")}
    assert {name for name, what in found.items() if what} == {OWNER}


def test_the_walk_sees_each_way_to_begin_one() -> None:
    for source in (
        "import threading\nthreading.Thread(target=print).start()",
        "from threading import Thread as T\nT()",
        "import threading as t\nt.Timer(1, print)",
        "import concurrent.futures as c\nc.ThreadPoolExecutor()",
        "import _thread\n_thread.start_new_thread(print, ())",
    ):
        assert begun(source), source
    assert not begun("import threading\nthreading.Lock()")


# The owner


def test_a_thread_that_ends_by_an_exception_is_told_of_by_name() -> None:
    told: list[tuple[str, BaseException]] = []
    threads = Threads(lambda name, error: told.append((name, error)))

    def fail(what: str) -> None:
        raise SystemExit(what)  # of which Python itself says nothing

    threads.start("the work", fail, "gone")
    assert threads.join()
    assert [(name, repr(error)) for name, error in told] == [("the work", "SystemExit('gone')")]


def test_joining_waits_for_all_and_says_whether_they_have_ended() -> None:
    go_on = threading.Event()
    threads = Threads(lambda *_: None)
    threads.start("waits", go_on.wait)
    assert not threads.join(0.01)
    go_on.set()
    assert threads.join()


def test_joined_for_good_nothing_is_begun_any_more_and_the_owner_is_let_go_of() -> None:
    class Owner:
        def __init__(self) -> None:
            self.threads = Threads(self.failed)

        def failed(self, name: str, error: BaseException) -> None: ...

    owner = Owner()
    owner.threads.start("a", lambda: None)
    assert owner.threads.join()
    with pytest.raises(RuntimeError, match="late would be begun after the end"):
        owner.threads.start("late", lambda: None)
    gone = weakref.ref(owner)
    gc.disable()
    try:
        del owner
        assert gone() is None
    finally:
        gc.enable()


def test_a_thread_may_join_its_own_owner() -> None:
    threads = Threads(lambda *_: None)
    ended: list[bool] = []
    threads.start("joins", lambda: ended.append(threads.join(60) or True))
    wait_until("its end", lambda: ended)


def test_an_interruption_of_the_wait_is_raised_after_it() -> None:
    go_on = threading.Event()
    seen: list[bool] = []
    threads = Threads(lambda *_: None)

    def work() -> None:
        go_on.wait(60)
        seen.append(True)

    threads.start("work", work)
    interrupter = Threads(lambda *_: None)

    def interrupt() -> None:
        time.sleep(0.1)
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)  # as a terminal does: it ends the wait for a lock
        time.sleep(0.1)
        go_on.set()

    interrupter.start("interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt):
        threads.join()
    assert seen == [True]
    interrupter.join()


def test_what_is_done_in_order_is_joined_by_its_shutdown() -> None:
    line = in_order("a line")
    done = [line.submit(lambda number=number: number) for number in range(3)]  # type: ignore[misc]
    line.shutdown()
    assert [one.result() for one in done] == [0, 1, 2]
    assert not [one for one in threading.enumerate() if one.name.startswith("a line")]


# A transfer


@pytest.fixture
def running(bucket: Bucket, cache: NodeCache, proxy: Proxy) -> Callable[..., Any]:
    def make(size: int = 8 * MIB) -> tuple[transfer.Transfer, BlobWriter]:
        bucket.put({"a": noise(size)})
        store = Store(WeightsUri.parse(bucket.uri))
        (file,) = store.list()
        writer = BlobWriter.try_acquire(cache.file_blob(store.namespace, file), file.size)
        assert writer is not None
        return transfer.Transfer(store, [transfer.Job(file, writer, None)], connections=2, part_bytes=2 * MIB), writer

    return make


def fetching() -> list[str]:
    return [thread.name for thread in threading.enumerate() if thread.name.startswith("fetch-")]


def test_interrupted_a_transfer_leaves_no_thread_and_no_error_but_the_interruption(running: Callable[..., Any], proxy: Proxy) -> None:
    proxy.hold_after(3 * MIB)  # its threads wait for the store then
    found, writer = running()
    interrupter = Threads(lambda *_: None)

    def interrupt() -> None:
        wait_until("the hold", proxy.is_holding)
        _thread.interrupt_main()

    interrupter.start("interrupt", interrupt)
    with pytest.raises(KeyboardInterrupt), writer:
        found.run()
    assert fetching() == []
    assert isinstance(found._error, KeyboardInterrupt)
    interrupter.join()


def test_ended_by_an_error_of_its_own_it_leaves_none_either(
    running: Callable[..., Any], proxy: Proxy, monkeypatch: pytest.MonkeyPatch
) -> None:
    proxy.hold_after(3 * MIB)
    found, writer = running()

    def look(*_: object, **__: object) -> int:
        raise ZeroDivisionError

    monkeypatch.setattr(found._growth, "look", look)
    with pytest.raises(ZeroDivisionError), writer:
        found.run()
    assert fetching() == []


def test_where_there_can_be_no_more_threads_those_that_there_are_go_on(
    running: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(transfer, "FIRST_CONNECTIONS", 2)
    found, writer = running()
    start, started = found._threads.start, list[str]()

    def starts(name: str, *arguments: Any) -> None:
        if started:
            raise RuntimeError("can't start new thread")
        started.append(name)
        start(name, *arguments)

    monkeypatch.setattr(found._threads, "start", starts)
    found.run()
    assert writer.blob.is_complete()


def test_where_there_can_be_none_it_says_so(running: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    found, writer = running()

    def none(*_: object) -> None:
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(found._threads, "start", none)
    with pytest.raises(StoreUnavailable, match="no thread can be had to fetch with: can't start new thread"), writer:
        found.run()


def test_a_connection_that_is_being_made_can_be_aborted(bucket: Bucket) -> None:
    with socket.socket() as full:  # its queue is full: nobody gets through, and nobody is told
        full.bind(("127.0.0.1", 0))
        full.listen(0)
        fillers = []
        for _ in range(4):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex(full.getsockname())
            fillers.append(filler)
        found = Connection(Store(WeightsUri.parse(bucket.uri)))
        ended: list[BaseException] = []
        threads = Threads(lambda name, error: ended.append(error))
        threads.start("connect", found.get, f"http://127.0.0.1:{full.getsockname()[1]}/a?b", {})
        wait_until("that it tries", lambda: found._sock is not None)
        while not ended:  # before the time for a connection is over
            found.abort()
            time.sleep(0.01)
        threads.join()
        assert isinstance(ended[0], StoreUnavailable)
        for filler in fillers:
            filler.close()


# The programs


def ours() -> set[threading.Thread]:
    """All but those of the proxy, which is in this process, too."""
    return {thread for thread in threading.enumerate() if "process_request_thread" not in thread.name}


def test_a_sidecar_that_was_stopped_has_no_thread_left(bucket: Bucket, cache: NodeCache, proxy: Proxy) -> None:
    push(bucket, {"a": noise(3 * MIB)})
    before = ours()
    agent = Sidecar(WeightsSettings(cache_dir=cache.root, uri=bucket.uri, prefetch=f"a={bucket.uri}/nowhere"))
    agent.prepare()
    agent.start(agent=True)
    for name in "bcd":
        agent.pulls.ask(f"{bucket.uri}/{name}")
    wait_until("the weights", agent.is_ready)
    assert agent.stop(60)
    assert ours() == before
    agent.close()


def test_a_thread_of_the_sidecar_that_fails_makes_it_one_to_be_replaced(
    aws: None, cache: NodeCache, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    found = Sidecar(WeightsSettings(cache_dir=cache.root, uri="s3://bucket/model"))

    def fail(uri: str) -> None:
        raise ZeroDivisionError("by\nzero")

    monkeypatch.setattr(found.pulls, "keep_present", fail)
    found.start(agent=False)
    wait_until("the problem", lambda: found.problem)
    assert found.status() == {"phase": "failed", "error": "keep ended unexpectedly: ZeroDivisionError: by zero"}
    assert not found.is_ready()
    assert "thread 'keep' ended: ZeroDivisionError: by zero" in caplog.text
    assert found.stop(60)
    found.close()


def test_ctrl_c_in_a_pull_gives_only_the_interruption(
    bucket: Bucket, cache: NodeCache, proxy: Proxy, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    bucket.put({"a": noise(8 * MIB)})
    proxy.hold_after(3 * MIB)
    interrupter = Threads(lambda *_: None)

    def interrupt() -> None:
        wait_until("the hold", proxy.is_holding)
        _thread.interrupt_main()

    interrupter.start("interrupt", interrupt)
    before = signal.getsignal(signal.SIGINT)
    found = CliRunner().invoke(cli.main, ["pull", bucket.uri, "--cache-dir", str(cache.root)])
    interrupter.join()
    assert (found.exit_code, found.output.rstrip().rpartition("\n")[2]) == (1, "Aborted!")
    assert "descriptor" not in found.output
    assert fetching() == []
    assert signal.getsignal(signal.SIGINT) is before


def test_the_pull_after_it_needs_only_the_rest(bucket: Bucket, cache: NodeCache, proxy: Proxy, puller: Callable[..., Puller]) -> None:
    bucket.put({"a": noise(8 * MIB)})
    proxy.hold_after(3 * MIB)
    interrupter = Threads(lambda *_: None)

    def interrupt() -> None:
        wait_until("the hold", proxy.is_holding)
        _thread.interrupt_main()

    interrupter.start("interrupt", interrupt)
    first = puller(bucket.uri)
    with pytest.raises(KeyboardInterrupt):
        first.run()
    interrupter.join()
    first.close()
    proxy.release()
    second = puller(bucket.uri)
    second.run()
    assert second.progress.downloaded_bytes < 8 * MIB
    second.close()
