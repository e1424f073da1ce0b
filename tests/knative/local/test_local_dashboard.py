"""The dashboard in a real browser, beside a real platform."""

import contextlib
import itertools
import json
import os
import re
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Dialog, Locator, Page, expect, sync_playwright

from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import container, one_service, set_env
from knative.deploy.render import render
from knative.deploy.variables import Variables
from tests.knative.local.running import Platform, platform_running, queue_source, service
from tests.support import wait_until

CHROMIUM = shutil.which("chromium")
pytestmark = pytest.mark.skipif(CHROMIUM is None and not os.environ.get("CI"), reason="no chromium here (apt-get install chromium)")
expect.set_options(timeout=60_000)  # what is waited for comes on a slow machine, too

GATED = {"GATE": "open"}  # such a pod opens its port only when the test lets it
BROKEN = ["python", "-c", "print('there is no model'); raise SystemExit(3)"]
ODD = "<img src=x onerror=alert(1)>"
SILENT = "import time; print('no objects below s3://models/flowerz; is the prefix right?', flush=True); time.sleep(1000)"


@pytest.fixture(scope="module")
def platform(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Platform]:
    echo = service("echo")
    echo["metadata"]["annotations"] = {"relight/example": json.dumps({"instances": [ODD]})}
    broken = service("broken", scale={"min-scale": "1"}, progress_deadline="1s", container={"command": BROKEN})
    # Its queue is looked at, but nobody polls it: what is in it stays.
    idle = queue_source("work", "echo", ["python", "-c", "import time; print('awake', flush=True); time.sleep(1000)"])
    crashing = queue_source("never", "echo", BROKEN)
    erring = service("erring")
    sidecar = {"name": "weights-cache", "image": "x", "command": ["python", "-c", SILENT]}
    blamed = service("blamed", sidecar, scale={"min-scale": "1"}, container={"command": ["python", "-c", "import time; time.sleep(1000)"]})
    coded = service(
        "coded", container={"command": ["python", "-m", "function"], "env": [{"name": "FUNCTION_AGENT", "value": "coded:Agent"}]}
    )
    folder = tmp_path_factory.mktemp("dashboard")
    (folder / "coded.py").write_text("old = True")
    with platform_running(folder, [echo, broken, erring, blamed, coded, idle, crashing]) as running:
        yield running


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        # Without a sandbox of its own, as in a container its user is root.
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-dev-shm-usage"])
        yield browser
        browser.close()


@pytest.fixture
def page(platform: Platform, browser: Browser) -> Iterator[Page]:
    """The dashboard, open; anything that it complains of fails the test."""
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    page.set_default_timeout(60_000)
    said: list[str] = []
    page.on("console", lambda message: said.append(message.text))
    page.on("pageerror", lambda error: said.append(str(error)))
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    expect(page.locator("#live")).to_have_text("live")
    yield page
    page.close()
    assert said == []


def test_a_service_is_seen_at_zero_woken_by_the_button_and_its_cold_start_is_a_waterfall(page: Page, platform: Platform) -> None:
    echo = page.locator("#s-default-echo")
    expect(echo.locator("header .badge")).to_have_text("at zero")
    expect(echo.get_by_text("it costs nothing until somebody calls")).to_be_visible()
    echo.get_by_role("button", name="Send test request").click()
    expect(echo.locator("output")).to_contain_text("200 answered after")
    expect(echo.locator("header .badge")).to_have_text("ready")
    (pod,) = platform.pods("echo")
    expect(echo.locator("tbody tr")).to_have_count(1)
    expect(echo.locator("tbody tr")).to_contain_text(pod["name"].removeprefix("echo-"))
    stages = echo.locator("details .stage")
    expect(stages).to_have_count(2)
    expect(stages.first).to_contain_text("spawn")
    expect(echo.locator(".charts figure")).to_have_count(5)
    expect(echo.locator(".charts figure", has_text="Errors")).to_be_hidden()  # there were none
    expect(echo.get_by_role("img", name="Pods, last five minutes: now 1 ready of 1 desired")).to_be_visible()
    expect(page.locator("#sum")).to_contain_text("1 pod ready")


def test_a_log_is_shown_as_it_is_written_and_closed_by_the_keyboard(page: Page, platform: Platform) -> None:
    platform.call("echo")
    page.get_by_role("button", name="Log of echo").first.click()
    log = page.get_by_role("log")
    expect(log).to_contain_text("a pod of its own")
    platform.call("echo", "/say", "POST", ODD.encode())
    expect(log).to_contain_text(ODD)
    page.keyboard.press("Escape")
    expect(page.locator("dialog")).not_to_be_visible()


def test_a_service_that_cannot_start_says_so_in_words_with_what_its_pod_said(page: Page) -> None:
    broken = page.locator("#s-default-broken")
    expect(broken.locator("header .badge")).to_have_text("failed")
    expect(broken.locator(".note").first).to_contain_text("there is no model")
    expect(broken.locator("details .badge").first).to_have_text("failed")


def test_a_service_whose_callers_get_errors_is_not_green_and_says_which_and_from_whom(page: Page, platform: Platform) -> None:
    card = page.locator("#s-default-erring")
    platform.call("erring")
    expect(card.locator("header .badge")).to_have_text("ready")
    for _ in range(3):
        platform.call("erring", "/status/500")
    expect(card.locator("header .badge")).to_have_text("ready, failing")
    assert "failing" in (card.locator("header .badge").get_attribute("class") or "")
    expect(card).to_contain_text("3 of the last minute's 4 answers were errors: 3 × 500 from the function. The last: 500 from the function")
    errors = card.locator(".charts figure", has_text="Errors")
    expect(errors).to_contain_text("3 last minute · 75 %")
    expect(errors).to_contain_text("3 in all")


@pytest.mark.parametrize("width", [1240, 800, 360])
def test_the_result_of_a_test_request_is_a_box_of_its_own(browser: Browser, platform: Platform, width: int) -> None:
    page = browser.new_page(viewport={"width": width, "height": 900})
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    card = page.locator("#s-default-echo")
    card.get_by_role("button", name="Send test request to echo").click()
    result = card.locator("output")
    expect(result).to_contain_text("200 answered after")
    outer, box = card.bounding_box(), result.bounding_box()
    assert outer
    assert box
    assert result.evaluate("node => getComputedStyle(node).display") == "block"
    assert box["x"] - outer["x"] > 10  # its margin, on both sides alike
    assert abs((outer["x"] + outer["width"]) - (box["x"] + box["width"]) - (box["x"] - outer["x"])) < 1
    text = result.locator("strong").bounding_box()
    assert text
    assert text["x"] - box["x"] > 8  # its padding
    page.close()


EVIL = f"{ODD}\x1b[2J\x1b[31m\u202egnp.exe\u2028</script><b onmouseover=alert(2)>bold</b>"
SHOWN = EVIL.replace("\x1b", "\\u001b").replace("\u202e", "\\u202e").replace("\u2028", "\\u2028")


def evil(value: Any) -> Any:
    """The same document, with markup and control characters in each of its texts that others have a hand in."""
    if isinstance(value, dict):
        kept = ("state", "mode", "url", "phase", "outcome", "address", "code", "source")
        return {key: found if key in kept else evil(found) for key, found in value.items()}
    if isinstance(value, list):
        return [evil(found) for found in value]
    return EVIL if isinstance(value, str) else value


def test_markup_and_control_characters_are_text_in_every_field(browser: Browser, platform: Platform) -> None:
    platform.call("echo")
    status = platform.status()
    log = {"container": "function", "lines": ["last words"] * 3}
    for live in status["services"]:
        live |= {"failure": "why", "failure_log": log, "example": "x", "rollout": {"revision": "r", "state": "starting", "trouble": "t"}}
        for pod in live["pods"]:
            pod |= {"reason": "why not", "log": log, "waits_for": "a GPU"}
    status["manifests"]["problem"] = "a problem"
    for queue in (*status["queues"], *status["queue_sources"]):
        queue["problem"] = "a problem"
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    alerts: list[str] = []

    def dismiss(dialog: Dialog) -> None:
        alerts.append(dialog.message)
        dialog.dismiss()

    page.on("dialog", dismiss)
    page.on("pageerror", lambda error: alerts.append(str(error)))
    events = f"data: {json.dumps(evil(status))}\n\n"
    page.route("**/api/events", lambda route: route.fulfill(content_type="text/event-stream", body=events))
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    expect(page.locator("main")).to_contain_text(SHOWN)
    told = page.locator("main").evaluate("node => node.textContent")
    assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e]", told)
    assert told.count(SHOWN) > 15
    for field in (page.locator("#problem"), page.locator(".card .note").first, page.locator("#queues .note").first):
        expect(field).to_contain_text(SHOWN)
    assert page.locator("main img, main script, main b").count() == 0
    assert alerts == []
    page.close()


def test_two_services_whose_names_run_together_have_a_card_each(browser: Browser, platform: Platform) -> None:
    status = platform.status()
    echo = next(found for found in status["services"] if found["name"] == "echo")
    status["services"] = [echo | {"namespace": "a-b", "name": "c"}, echo | {"namespace": "a", "name": "b-c"}]
    page = browser.new_page()
    page.route("**/api/events", lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(status)}\n\n"))
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    expect(page.locator("#services > .card")).to_have_count(2)
    expect(page.locator("#services > .card h2")).to_have_text(["c", "b-c"])
    page.close()


def test_how_a_pod_ended_stands_beside_its_restarts_and_an_error_of_the_platform_says_what_it_was(
    browser: Browser, platform: Platform
) -> None:
    platform.call("echo")
    status = platform.status()
    echo = next(found for found in status["services"] if found["name"] == "echo")
    exits = {"function": "x" * 500} | dict.fromkeys(("a", "b", "c"), "ended with status 1")
    echo["pods"][0] |= {"restarts": {"function": 5}, "exits": exits, "weights": {"bytes": 0, "source": "store"}}
    codes = [{"code": "502", "source": "activator", "count": 8}, {"code": "504", "source": "pod", "count": 1}]
    lately = {"answers": 40, "errors": 9, "rate": 0.2, "codes": codes}
    last = {"code": "503", "source": "activator", "time": status["now"], "revision": "echo-00001"}
    echo["errors"] |= {"total": 9, "last_minute": lately, "last": last}
    status["services"] = [echo]
    page = browser.new_page(viewport={"width": 1240, "height": 900})
    page.route("**/api/events", lambda route: route.fulfill(content_type="text/event-stream", body=f"data: {json.dumps(status)}\n\n"))
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    row = page.locator("#s-default-echo section[aria-label=Pods] tbody tr").last
    ends = f"(function: {'x' * 59}…, a: ended with status 1, b: ended with status 1, 1 more)"
    expect(row.locator("td").nth(3)).to_have_text(re.compile(rf"· 5 restarts {re.escape(ends)}$"))
    expect(row.locator("td").nth(4)).to_have_text("–")
    told = (
        "errors: 8 × 502 (the pod died with the request), 1 × 504 from the function. The last: 503 (no pod could be started or had room),"
    )
    expect(page.locator("#s-default-echo")).to_contain_text(told)
    assert page.evaluate("[431, 999949, 91600000, 16e9].map(bytes).join()") == "431 B,999.9 kB,91.6 MB,16.0 GB"
    page.close()


def test_the_log_box_opens_with_the_container_that_is_to_blame(page: Page) -> None:
    page.get_by_role("button", name="Log of blamed").first.click()
    expect(page.locator("#log-container")).to_have_value("weights-cache")
    expect(page.get_by_role("log")).to_contain_text("no objects below s3://models/flowerz")
    page.keyboard.press("Escape")


def test_everything_is_reached_with_the_tab_key_and_opened_with_enter(page: Page, platform: Platform) -> None:
    platform.call("echo")
    expect(page.locator("#s-default-echo details").first).to_be_visible()
    reached: set[str] = set()
    for _ in range(16):
        page.keyboard.press("Tab")
        reached.add(page.evaluate("document.activeElement.tagName"))
        shown = page.evaluate("getComputedStyle(document.activeElement).outlineStyle")
        assert shown == "solid" or page.evaluate("document.activeElement === document.body")
    assert reached >= {"A", "BUTTON", "SUMMARY"}
    first = page.locator("#s-default-echo details").first
    was_open = first.get_attribute("open") is not None
    first.locator("summary").focus()
    page.keyboard.press("Enter")
    assert (first.get_attribute("open") is not None) != was_open


def test_a_queue_source_is_seen_with_what_is_in_its_queue_and_its_log(page: Page, platform: Platform) -> None:
    queues = page.locator("#queues")
    source = queues.get_by_role("region", name="Queue source work-events")
    expect(source.locator("header .badge")).to_have_text("ready")
    expect(source).to_contain_text("queue work → echo")
    platform.relight("send", "work", "--count", "7")
    platform.relight("send", "never-results", "--data", ODD)
    figures = [source.locator("dl > div", has_text=name).locator("dd") for name in ("Waiting", "In flight", "Done", "Retried", "Dead")]
    for figure, expected in zip(figures, ("7", "0", "0", "0", "0"), strict=True):
        expect(figure).to_have_text(expected)
    expect(source.locator("dl > div", has_text="Oldest").locator("dd")).to_have_text(re.compile(r"\d+ s"))
    row = queues.locator("tbody tr", has_text="never-results")
    expect(row.locator("td").nth(1)).to_have_text("1")
    expect(queues.locator("tbody tr")).to_have_count(2)  # those that no source polls
    source.get_by_role("button", name="Log of work-events").click()
    expect(page.get_by_role("log")).to_contain_text("awake")
    page.keyboard.press("Escape")


def test_a_queue_source_that_crashes_says_so_in_words(page: Page) -> None:
    source = page.get_by_role("region", name="Queue source never-events")
    expect(source.locator("header .badge")).to_have_text("failed")
    expect(source).to_contain_text("poll ended with status 3; it is started again")
    expect(source.locator(".note pre")).to_contain_text("the last lines of poll:\n  there is no model")
    expect(source.locator("header")).to_contain_text(re.compile(r"restarts? \(poll: ended with status 3\)"))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_on_a_phone_nothing_is_wider_than_the_screen(browser: Browser, platform: Platform, scheme: str) -> None:
    page = browser.new_page(viewport={"width": 360, "height": 740}, color_scheme=scheme)  # type: ignore[arg-type]
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    page.locator("#s-default-broken").wait_for()
    assert page.evaluate("document.documentElement.scrollWidth") == 360
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(19, 18, 16)"
    assert dark == (scheme == "dark")
    page.close()


def test_a_roll_out_is_seen_as_it_goes_and_so_are_shares_tags_and_what_was_not_taken(browser: Browser, tmp_path: Path) -> None:
    page = browser.new_page()
    with platform_running(tmp_path, [service("echo", scale={"initial-scale": "1"}), service("other")]) as platform:
        page.goto(f"http://127.0.0.1:{platform.admin_port}/")
        echo = page.locator("#s-default-echo")
        expect(echo.locator("header .badge")).to_have_text("ready")
        expect(echo.get_by_role("heading", name="Revisions")).not_to_be_visible()
        changed = service("echo", scale={"initial-scale": "1"}, env=GATED)
        changed["spec"]["traffic"] = [{"revisionName": "echo-00001", "percent": 90}, {"percent": 10, "tag": "next"}]
        platform.rewrite(changed)
        expect(echo.get_by_text("echo-00002 is starting; traffic moves when it is ready")).to_be_visible(timeout=30_000)
        expect(page.locator("#s-default-other")).to_have_count(0)
        platform.note("echo", "open")
        new = echo.locator(".revisions tbody tr").first
        expect(new).to_contain_text("00002")
        expect(new).to_contain_text("10 %")
        expect(new.get_by_role("link", name="next")).to_have_attribute("href", f"http://next-echo.default.localhost:{platform.port}/")
        expect(echo.locator(".revisions tbody tr").last).to_contain_text("90 %")
        (platform.state / "manifests.yaml").write_text("a: [1\n")
        expect(page.locator("#problem")).to_contain_text("line 2: not YAML")
        expect(echo.locator("header .badge")).to_have_text("ready")
    page.close()


def test_the_weights_of_the_node_are_seen_with_their_hit_rate_and_the_pods_in_their_chart(browser: Browser, tmp_path: Path) -> None:
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "config.json").write_text("{}" + " " * 1_999_998)
    objects = [item for item in render(Variables(env="local"), Kubectl()) if item["kind"] not in ("ContainerSource", "Namespace")]
    minilm = one_service(objects)
    set_env(container(minilm, "function"), "FUNCTION_AGENT", "function.agents.echo:Echo")
    minilm["spec"]["template"]["metadata"]["annotations"]["autoscaling.knative.dev/window"] = "6s"
    with platform_running(tmp_path / "state", objects, "--seed", f"{tmp_path}/weights=s3://models/minilm") as platform:
        page = browser.new_page(viewport={"width": 1240, "height": 900})
        page.goto(f"http://127.0.0.1:{platform.admin_port}/")
        weights, service = page.locator("#weights"), page.locator("#s-default-minilm")
        expect(page.locator("#live")).to_have_text("live")
        expect(weights).to_be_hidden()
        for starts, rate in ((1, "0 %"), (2, "50 %")):
            with kept_busy(platform):
                expect(weights.locator(".rate")).to_contain_text(f"{starts - 1} of {starts}")
                expect(weights.locator(".rate")).to_contain_text(rate)
                expect(weights.locator(".rate")).to_contain_text("2.0 MB")
                expect(weights.locator("tbody tr")).to_contain_text("s3://models/minilm")
                expect(service.locator("tbody tr")).to_contain_text(f"2.0 MB from {'store' if starts == 1 else 'cache'}")
                platform.wait_for("minilm", "a second with it", lambda found: found["sample"]["ready"] == 1)
            expect(service.locator("header .badge")).to_have_text("at zero")
            platform.wait_for("minilm", "a second without it", lambda found: found["sample"]["ready"] == 0)
        # The line of pods that are ready: none, one, none, one, none, at two heights.
        line = service.get_by_role("img", name=re.compile("^Pods, last five minutes")).locator("path.cool:not(.area)")
        steps = wait_until("the last of five steps", lambda: len(found := steps_of(line)) >= 5 and found)
        none, one = max(steps), min(steps)
        assert steps == [none, one, none, one, none]
        page.close()


@contextlib.contextmanager
def kept_busy(platform: Platform) -> Iterator[None]:
    """Calls minilm over and over, so that its pod stays for as long as somebody looks at it."""
    enough = threading.Event()
    statuses: list[int] = []

    def call() -> None:
        while not enough.wait(0.5 if statuses else 0):
            statuses.append(platform.call("minilm", "/v1/models/minilm:predict", "POST", {"instances": [1]}).status)

    caller = threading.Thread(target=call)
    caller.start()
    try:
        yield
    finally:
        enough.set()
        caller.join()
    assert set(statuses) == {200}


def steps_of(line: Locator) -> list[float]:
    """The heights that a line of a chart has, one after the other."""
    heights = re.findall(r"(?:M[\d.]+ |V)([\d.]+)", line.get_attribute("d") or "")
    return [float(height) for height, _ in itertools.groupby(heights)]


def test_nothing_is_fetched_from_elsewhere(browser: Browser, platform: Platform) -> None:
    page = browser.new_page()
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(f"http://127.0.0.1:{platform.admin_port}/")
    page.locator("#s-default-echo").wait_for()
    page.close()
    assert all(url.startswith((f"http://127.0.0.1:{platform.admin_port}/", "data:")) for url in asked)


def test_a_platform_that_is_gone_is_said_to_be(browser: Browser, tmp_path_factory: pytest.TempPathFactory) -> None:
    page = browser.new_page()
    with platform_running(tmp_path_factory.mktemp("gone"), [service("echo")]) as platform:
        page.goto(f"http://127.0.0.1:{platform.admin_port}/")
        expect(page.locator("#live")).to_have_text("live")
        platform.server.signal(2)
        wait_until("its end", lambda: platform.server.process.poll() is not None)
    expect(page.locator("#live")).to_have_text("no connection")
    page.close()


def test_changed_code_is_seen_and_taken_with_a_click(platform: Platform, page: Page) -> None:
    (platform.state / "coded.py").write_text("new = True")
    card = page.get_by_role("region", name="Service coded")
    expect(card).to_contain_text("coded.py changed since coded-00001 was made. The next pod has it.")
    card.get_by_role("button", name="Take what has changed of coded").click()
    expect(card.get_by_text("changed since")).to_be_hidden()
    assert platform.service("coded")["revision"] == "coded-00002"
