"""Queue sources beside the Services that they wake, with the embedded queues and the commands that put messages in and take them out."""

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from prometheus_client.parser import text_string_to_metric_families

from tests.knative.local.running import Platform, platform_running, queue_source, service
from tests.support import request, wait_until

CRASHES = ["python", "-c", "print('there is no queue'); raise SystemExit(3)"]


def objects(state: Path, **env: str) -> list[dict[str, Any]]:
    echo = service("echo")
    echo["metadata"]["annotations"] = {"relight/example": '{"instances": ["an example"]}'}
    return [echo, queue_source("work", "echo", STATE=str(state), **env)]


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    crashing, refused = queue_source("never", "echo", CRASHES), queue_source("refused", "echo")
    refused["spec"]["sink"]["uri"] = "/status/400"
    state = tmp_path_factory.mktemp("sources")
    with platform_running(state, [*objects(state), crashing, refused]) as running:
        yield running


def relight(platform: Platform, *words: str, stdin: str = "") -> str:
    found = platform.relight(*words, stdin=stdin)
    assert (found.returncode, found.stderr) == (0, "")
    return found.stdout


def results(platform: Platform, count: int) -> list[Any]:
    """What the results queue has once it has so many."""
    wait_until(f"{count} results", lambda: platform.queue("work-results")["depth"] == count)
    return [json.loads(line) for line in relight(platform, "receive", "work-results", "--json").splitlines()]


def living(state: Path) -> list[str]:
    """The numbers of the processes of the source, which has the state directory in its environment."""
    found = []
    for pid in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if f"\0STATE={state}\0".encode() in (pid / "environ").read_bytes():
                found.append(pid.name)
    return found


def test_ten_messages_for_a_function_at_zero_are_one_cold_start_and_ten_results(platform: Platform) -> None:
    assert platform.service("echo")["state"] == "zero"
    assert relight(platform, "send", "work", "--count", "10") == "10 messages sent to work\n"
    found = results(platform, 10)
    assert len({result["id"] for result in found}) == 10
    assert [start["outcome"] for start in platform.service("echo")["cold_starts"]] == ["ready"]
    assert platform.service("echo")["requests_total"] == 10
    wait_until("the count", lambda: platform.source("work-events")["done"] == 10)
    source = platform.source("work-events")
    assert (source["phase"], source["queue"], source["sink"], source["depth"], source["in_flight"], source["dead"]) == (
        "ready",
        "work",
        "echo",
        0,
        0,
        0,
    )
    assert source["oldest_age_s"] is None


@pytest.mark.parametrize(
    "headers",
    [{"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Host": "rebound.example"}],
    ids=["another site", "another site says the browser", "a name that was made to lead here"],
)
def test_the_way_to_a_sink_is_for_sources_and_not_for_other_sites(platform: Platform, headers: dict[str, str]) -> None:
    environment = (Path("/proc") / living(platform.state)[0] / "environ").read_bytes().decode()
    sink = urlsplit(next(line.removeprefix("K_SINK=") for line in environment.split("\0") if line.startswith("K_SINK=")))
    assert sink.port
    refused = request(sink.port, "POST", "/", {"instances": ["x"]}, headers)
    assert (refused.status, refused.json()["error"]["type"]) == (403, "forbidden")
    assert request(sink.port, "POST", "/", {"instances": ["x"]}).status == 200


def test_what_a_source_does_is_told_to_people_and_to_programs(platform: Platform) -> None:
    wait_until("it polls", lambda: platform.source("work-events")["phase"] == "ready")
    lines = [line.split() for line in relight(platform, "status").splitlines()]
    assert ["QUEUE", "SOURCE", "PHASE"] in [line[:3] for line in lines]
    assert ["work-events", "ready", "work", "echo"] in [line[:4] for line in lines]
    assert ["work-results"] in [line[:1] for line in lines]
    families = text_string_to_metric_families(request(platform.admin_port, "GET", "/metrics").body.decode())
    samples = {
        sample.name: sample.value for family in families for sample in family.samples if sample.labels.get("source") == "work-events"
    }
    assert samples.keys() >= {f"relight_queue_source_{name}" for name in ("done_total", "retried_total", "depth", "in_flight", "dead")}
    assert "queue work → echo" in platform.server.said()
    assert "relight send work --count 10" in platform.server.said()


def test_a_source_that_crashes_is_started_again_with_a_pause_and_says_why(platform: Platform) -> None:
    found = wait_until("its second start", lambda: (source := platform.source("never-events"))["restarts"]["poll"] and source)
    assert found["exits"] == {"poll": "ended with status 3"}
    told = "never-events is started again and again: poll ended with status 3\n  │ the last lines of poll:\n  │ there is no queue\n"
    wait_until("its second end", lambda: told in relight(platform, "status"))  # in the pause, and not while it is tried again
    assert relight(platform, "logs", "never-events").splitlines()[0] == "there is no queue"
    assert "never-events" in platform.server.said()
    assert "poll ended with status 3: there is no queue" in platform.server.said()


def test_messages_are_what_they_were_made_of(platform: Platform, tmp_path: Path) -> None:
    (tmp_path / "body").write_text("from a file")
    relight(platform, "send", "never", "--data", "as it is", "-a", "tenant=a", "-a", "n=1")
    relight(platform, "send", "never", "--data", f"@{tmp_path / 'body'}")
    relight(platform, "send", platform.queue("never")["url"], "--data", "-", stdin="from outside")
    first = json.loads(relight(platform, "receive", "never", "--count", "1", "--json"))
    assert (first["body"], first["attributes"]) == ("as it is", {"tenant": "a", "n": "1"})
    assert relight(platform, "receive", "never") == "from a file\nfrom outside\n"
    assert relight(platform, "receive", "never", "--wait", "0") == ""


def test_what_the_function_refuses_lies_in_the_dead_letter_queue_and_is_counted(platform: Platform) -> None:
    relight(platform, "send", "refused", "--data", "poison")
    wait_until("it is dead", lambda: platform.source("refused-events")["dead"] == 1)
    found = platform.source("refused-events")
    assert (found["depth"], found["in_flight"], found["done"]) == (0, 0, 0)
    assert found["retried"] >= 1
    assert relight(platform, "receive", "refused-dlq") == "poison\n"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["send", "nowhere"],
            "no queue 'nowhere'; there are never, never-results, refused, refused-results, work, work-results; one that is",
        ),
        (["receive", "nowhere"], "no queue 'nowhere'; there are never,"),
        (["send", "work-results"], "--data: must be given, as no Service here gets the messages of this queue"),
        (["send", "work", "--attribute", "tenant"], "--attribute 'tenant': must be NAME=VALUE"),
        (["send", "work", "--data", "@/nowhere"], "--data @/nowhere: No such file or directory"),
    ],
)
def test_a_message_that_cannot_be_sent_is_one_line(platform: Platform, words: list[str], said: str) -> None:
    found = platform.relight(*words)
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"Error: {said}")
    assert len(found.stderr.splitlines()) == 1


def test_a_changed_source_starts_anew_and_one_that_is_gone_ends(platform: Platform) -> None:
    before = platform.source("work-events")["pod"]
    platform.rewrite(*objects(platform.state, QUEUE_SOURCE_CONCURRENCY="2"), queue_source("later", "echo", CRASHES))
    wait_until("a new one", lambda: platform.source("never-events") is None and platform.source("work-events")["pod"] != before)
    assert "never-events stands in no manifest any more" in platform.server.said()
    wait_until("the new queue", lambda: platform.queue("later")["dead"] == 0)
    relight(platform, "send", "work", "--data", '{"instances": [1]}')
    assert len(results(platform, 1)) == 1
    wait_until("the old one's end", lambda: len(living(platform.state)) == 1)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_platform_that_ends_leaves_no_source_behind(tmp_path: Path, number: signal.Signals) -> None:
    with platform_running(tmp_path, objects(tmp_path)) as platform:
        wait_until("it polls", lambda: platform.source("work-events")["phase"] == "ready")
        assert len(living(tmp_path)) == 1
        platform.server.signal(number)
        assert platform.server.wait(60) in (0, -number)
        wait_until("their end", lambda: not living(tmp_path))


def test_a_platform_ends_soon_though_a_source_waits_for_a_function_that_does_not_start(tmp_path: Path) -> None:
    with platform_running(tmp_path, [service("echo", env={"GATE": "open"}), queue_source("work", "echo")]) as platform:
        relight(platform, "send", "work", "--data", "1")
        wait_until("it waits", lambda: platform.service("echo")["queued"] == 1)
        platform.server.signal(signal.SIGINT)
        assert platform.server.wait(25) == 0  # and not after the 30 s that a source has for what it holds
