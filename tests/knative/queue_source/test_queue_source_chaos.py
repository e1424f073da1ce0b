"""Source and function killed at random, a queue that throttles and fails, a sink that is away for seconds, a wall clock that jumps."""

import contextlib
import json
import random
import sys
import threading
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

from tests.knative.queue_source.stage import Reply, Sink, Sqs, settings, source_running, sqs_running
from tests.support import Server, clean_environment, free_port, wait_until

RECEIVES = 12
CONCURRENCY = 16
JUST_BEFORE_S = 1.0


class Chaos:
    """Messages that are sent at a pace, and what is killed meanwhile."""

    def __init__(self, sqs: Sqs, folder: Path, *, messages: int, poison: int, seconds: float, seed: int) -> None:
        self.sqs, self.folder = sqs, folder
        self.messages, self.poison, self.seconds = messages, poison, seconds
        self.chance = random.Random(seed)
        self.url = sqs.queue("chaos", receives=RECEIVES)
        self.port = free_port()
        self.log = folder / "done"
        self.log.touch()
        self.kills: Counter[str] = Counter()
        self.killed_at: list[float] = []
        self.sent = threading.Event()
        env = settings(self.url, f"http://127.0.0.1:{self.port}/", QUEUE_SOURCE_CONCURRENCY=str(CONCURRENCY), QUEUE_SOURCE_VISIBILITY_S="5")
        self.env = clean_environment(**env, **sqs.env)

    def start(self, what: str) -> Server:
        seed = str(self.chance.randrange(1 << 30))
        arguments = ["jumpy", seed] if what == "source" else ["function", str(self.port), str(self.log), seed]
        number = sum(self.kills.values())
        command = [sys.executable, "-m", f"tests.knative.queue_source.{arguments[0]}", *arguments[1:]]
        return Server(command, self.folder / f"{what}-{number}.log", self.env)

    def send(self) -> None:
        """All messages, a few at a time, over the time for it; poison among them."""
        numbers: list[object] = [*range(self.messages), *(f"poison-{n}" for n in range(self.poison))]
        self.chance.shuffle(numbers)
        began, at = time.monotonic(), 0
        while at < len(numbers):
            time.sleep(max(0.0, began + self.seconds * at / len(numbers) - time.monotonic()))
            some = numbers[at : at + self.chance.randint(1, 5)]
            entries = [{"Id": str(n), "MessageBody": json.dumps({"n": number})} for n, number in enumerate(some)]
            assert not self.sqs.client.send_message_batch(QueueUrl=self.url, Entries=entries).get("Failed")
            at += len(some)
        self.sent.set()

    def run(self, kills: int) -> None:
        """Until everything is done."""
        running = {what: self.start(what) for what in ("source", "function")}
        self.sqs.control(throttle=0.03, error=0.02, lost=0.01)
        threading.Thread(target=self.send, daemon=True).start()
        try:
            for number in range(kills):
                time.sleep(self.chance.uniform(0.5, 1.5) * self.seconds / kills)
                what = ("source", "function")[number % 2]
                running[what].kill()
                self.killed_at.append(time.monotonic())
                if what == "function" and number % 6 == 1:  # it stays away for a while
                    time.sleep(self.chance.uniform(0.5, 2))
                self.kills[what] += 1
                running[what] = self.start(what)
            assert self.sent.wait(120)
            wait_until("everything is done", lambda: len(self.done()) == self.messages, 600)
            wait_until("poison is parked", lambda: self.sqs.left(self.sqs.queue("chaos-dead")) == self.poison, 120)
            self.sqs.wait_empty(self.url)
        finally:
            self.sqs.control(throttle=0.0, error=0.0, lost=0.0)
            for server in running.values():
                server.kill()

    def done(self) -> dict[str, list[float]]:
        """When the function has done each message."""
        done: defaultdict[str, list[float]] = defaultdict(list)
        for line in self.log.read_text().splitlines():
            number, _, at = line.split()
            done[number].append(float(at))
        return done

    def parked(self) -> list[str]:
        found: list[str] = []
        with contextlib.suppress(AssertionError):
            found = [json.loads(one["Body"])["n"] for one in self.sqs.take(self.sqs.queue("chaos-dead"), self.poison, 20)]
        return sorted(found)

    def check(self, most_repeated: int, just_before_s: float = JUST_BEFORE_S) -> None:
        done = self.done()
        repeated = {number: times for number, times in done.items() if len(times) > 1}
        print(
            f"{self.messages} messages, {len(self.killed_at)} kills: {self.messages - len(done)} lost, {len(repeated)} done more than once"
        )
        assert set(done) == {str(number) for number in range(self.messages)}
        assert len(repeated) <= most_repeated, f"{len(repeated)} of {self.messages}"
        for times in repeated.values():  # only what a kill caught between its being done and its being deleted
            for done_at in times[:-1]:
                assert any(-0.1 <= killed - done_at <= just_before_s for killed in self.killed_at), times
        assert self.parked() == sorted(f"poison-{n}" for n in range(self.poison))


def test_nothing_is_lost_and_poison_alone_is_parked(tmp_path: Path) -> None:
    with sqs_running(tmp_path) as sqs:
        chaos = Chaos(sqs, tmp_path, messages=200, poison=3, seconds=4.0, seed=1)
        chaos.run(6)
        # What it held, and as long as it takes on a busy machine to delete that; the long run below is strict.
        chaos.check(most_repeated=chaos.kills["source"] * CONCURRENCY, just_before_s=10 * JUST_BEFORE_S)


@pytest.mark.soak
@pytest.mark.timeout(1500)
def test_so_it_is_for_five_thousand_messages_of_which_almost_none_is_done_twice(tmp_path: Path) -> None:
    with sqs_running(tmp_path) as sqs:
        chaos = Chaos(sqs, tmp_path, messages=5000, poison=20, seconds=300.0, seed=20_260_101)
        chaos.run(32)
        chaos.check(most_repeated=25)  # 0.5 %


@pytest.mark.soak
@pytest.mark.timeout(300)
def test_a_cold_start_of_ninety_seconds_costs_no_message_a_second_receive(tmp_path: Path) -> None:
    with sqs_running(tmp_path) as sqs, contextlib.ExitStack() as cleanup:
        url = sqs.queue("cold", receives=1)
        ready = time.monotonic() + 90
        sink = Sink(lambda _: time.sleep(max(ready - time.monotonic(), 0)) or Reply())  # type: ignore[func-returns-value]
        cleanup.callback(sink.close)
        sqs.send(url, *range(30))
        env = settings(url, sink.url, QUEUE_SOURCE_CONCURRENCY="20", QUEUE_SOURCE_VISIBILITY_S="10")
        with source_running(tmp_path, env | sqs.env):
            sqs.wait_empty(url, 150)
        assert sqs.stats()["repeated"] == {}
        assert sorted(post.json()["n"] for post in sink.posts) == list(range(30))
