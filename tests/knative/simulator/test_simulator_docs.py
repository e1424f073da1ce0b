"""docs/simulator.md names every setting and every knob, with its default."""

import re

import pytest

from knative.simulator import PolicyError, make_policy, policy_names
from knative.simulator.model import SETTINGS, make_model
from tests.support import ROOT

DOC = (ROOT / "docs/simulator.md").read_text()
ROWS = {cells[0].strip("`"): cells[1:] for line in DOC.splitlines() if line.startswith("| `") and (cells := line.strip("| ").split(" | "))}


def test_each_setting_of_the_model_is_there_and_no_other() -> None:
    section = DOC[DOC.index("## The function") : DOC.index("## The policies")]
    assert re.findall(r"^\| `([^`]+)`", section, re.MULTILINE) == list(SETTINGS)


def test_the_defaults_are_the_model_s() -> None:
    default = make_model({})
    said = {name: ROWS[name][0] for name in SETTINGS if ROWS[name][0] not in ("by the trace", "none")}
    assert make_model({name: text for name, text in said.items() if text != "inf"}) == default
    assert default[0].pod_mtbf_s == float(said["pod_mtbf_s"])


@pytest.mark.parametrize("name", policy_names())
def test_each_knob_of_a_policy_is_there(name: str) -> None:
    with pytest.raises(PolicyError) as caught:
        make_policy(name, {"no-such-knob": ""}, make_model({})[0], history=lambda: iter([]), future=lambda: iter([]))
    knobs = str(caught.value).partition("known are ")[2]
    of_others = {"keda-http": "keda-queue", "schedule": "kpa"}.get(name, name)
    told = ROWS[name][-1] + ROWS[of_others][-1]
    if name not in ("kpa", "schedule", "oracle"):
        assert all(f"`{knob}`" in told for knob in knobs.split(", ")), knobs
