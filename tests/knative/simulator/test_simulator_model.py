"""Models as their users write them."""

from pathlib import Path

import numpy as np
import pytest

from knative.simulator import ModelError, Nodes, read_model
from knative.simulator.distribution import parse_distribution
from knative.simulator.model import Tokens

FILE = """
service = "tokens(prefill=5000, decode=30)"
concurrency = 4
rollouts = [100, 50.5]
[cold_start]
weights_store = "lognormal(p50=22.7, p99=52)"
load = 2
[nodes]
count = 2
warm = false
"""


def test_a_file_and_single_values_make_a_model(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text(FILE)
    model, nodes = read_model([str(path), "concurrency=8", "gpus=2"])
    assert (model.service, model.concurrency, model.gpus, model.rollouts) == (Tokens(5000, 30), 8, 2, (50.5, 100))
    assert model.cold_start.load.mean_s() == 2
    assert nodes == Nodes(count=2, warm=False)


@pytest.mark.parametrize(
    ("text", "mean_s"),
    [
        ("1.5", 1.5),
        ("1.5s", 1.5),
        ("20ms", 0.02),
        ("exponential(mean=2)", 2),
        ("uniform(low=1, high=4)", 2.5),
        ("empirical(1, 2, 6)", 3),
        ("lognormal(p50=2, p99=20)", 3.263),
    ],
)
def test_a_distribution_is_read_and_has_its_mean(text: str, mean_s: float) -> None:
    distribution = parse_distribution("x", text)
    assert distribution.mean_s() == pytest.approx(mean_s, rel=1e-3)
    drawn = distribution.sample(np.random.default_rng(1), 200_000)
    assert drawn.mean() == pytest.approx(mean_s, rel=0.03)
    assert (drawn >= 0).all()


def test_a_lognormal_has_its_percentiles() -> None:
    drawn = parse_distribution("x", "lognormal(p50=22.7, p99=52)").sample(np.random.default_rng(1), 200_000)
    assert np.quantile(drawn, [0.5, 0.99]) == pytest.approx([22.7, 52], rel=0.02)


@pytest.mark.parametrize(
    ("setting", "problem"),
    [
        ("servce=3", "model: servce = '3', there is no such setting; did you mean service?"),
        ("cold_start.iports=3", "did you mean cold_start.imports?"),
        ("concurrency=-1", "concurrency = '-1', must be a whole number of at least 0"),
        ("service=soon", "service = 'soon', must be seconds, tokens(prefill=…, decode=…), exponential"),
        ("service=exponential(2)", "expected mean=… in the brackets"),
        ("service=lognormal(p50=5, p99=3)", "p50 must be above 0 and at most p99"),
        ("service=uniform(low=5, high=3)", "low must be at most high"),
        ("service=tokens(prefill=0, decode=3)", "tokens per second must be above 0"),
        ("cold_start.load=nan", "must be finite and at least 0"),
        ("timeout_s=0", "must be above 0"),
        ("rollout=both", "must be surge or recreate"),
        ("nodes.warm=yes", "must be true or false"),
        ("/no/such/file.toml", "/no/such/file.toml: No such file or directory"),
    ],
)
def test_a_mistake_is_named_with_what_is_allowed(setting: str, problem: str) -> None:
    with pytest.raises(ModelError) as caught:
        read_model([setting])
    assert problem in str(caught.value)


def test_a_file_that_is_not_toml_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.toml"
    path.write_text("service = ")
    with pytest.raises(ModelError, match="not TOML"):
        read_model([str(path)])


def test_a_pod_that_fits_on_no_node_is_refused() -> None:
    with pytest.raises(ModelError, match=r"must be at most nodes.gpus \(4\)"):
        read_model(["gpus=8", "nodes.count=1", "nodes.gpus=4"])
