"""A roll-out with the component rollout-in-place, by Knative's own decisions: one GPU is enough."""

from dataclasses import replace

import pytest

from knative.autoscaler import Autoscaler, ScaleSpec
from knative.autoscaler.zero import Activity, Status, reconcile
from knative.deploy.kubectl import Kubectl
from knative.deploy.objects import container, get_env, one_service
from knative.deploy.render import TELL_FAILURE, render
from knative.deploy.variables import Variables

TICK_S = 2.0
DRAIN_S = 30.0  # a pod that goes holds its GPU for so long at least
COLD_S = 20.0
CLUSTER = {"allow-zero-initial-scale": "true"}


class Revision:
    """Its pods wanted, by the decisions alone; pods come and go as the GPU lets them."""

    def __init__(self, spec: ScaleSpec, status: Status, ready: int) -> None:
        self.autoscaler, self.status, self.ready, self.wanted = Autoscaler(spec, ready, 0.0), status, ready, ready

    def tick(self, now: float, concurrency: float | None) -> None:
        if concurrency is not None:
            self.autoscaler.record(now, concurrency=concurrency)
        step = reconcile(self.autoscaler.spec, self.autoscaler.tick(now, self.ready), self.status, self.ready, now)
        self.status = step.status
        if step.pods is not None:
            self.wanted = step.pods


def test_the_old_pod_leaves_the_gpu_before_the_new_one_needs_it_and_a_held_caller_is_answered_in_time() -> None:
    service = one_service(render(Variables(env="gpu"), Kubectl()))
    template = service["spec"]["template"]
    spec = ScaleSpec.parse(template["metadata"]["annotations"], template["spec"]["containerConcurrency"], CLUSTER)
    assert (spec.min_scale, spec.initial_scale) == (1, 0)

    # No route leads to the old revision any more. The new one counts as ready without a pod: `wanted` stays 0 until somebody calls.
    old = Revision(replace(spec, reachable=False), Status(Activity.ACTIVE, -3600.0, -3600.0, initialized=True), ready=1)
    asleep = reconcile(replace(spec, min_scale=0), None, Status.initial(0.0), 0, 0.0)
    assert asleep.pods in (None, 0)

    old.autoscaler.record(0.0, concurrency=8.0)
    gone_at = 0.0
    while old.wanted:
        gone_at += TICK_S
        old.tick(gone_at, 0.0)
    assert gone_at <= spec.stable_window_s + spec.scale_to_zero_grace_period_s + 2 * TICK_S
    assert gone_at + DRAIN_S + COLD_S < template["spec"]["timeoutSeconds"]

    # A caller waits at the activator since the route moved: the new revision wants its pod, and gets the GPU when it is free.
    new = Revision(spec, Status.initial(0.0), ready=0)
    for step in range(1, 10):
        new.tick(TICK_S * step, 1.0)
    assert new.wanted == 1


@pytest.mark.parametrize(
    ("words", "told_s"),
    [
        pytest.param(("ENV=gpu", "MAX_SCALE=1"), "10", id="ready without a pod, and one at most"),
        pytest.param(("ENV=gpu",), None, id="others would lose their calls to one that cannot start"),
        pytest.param(("ENV=gpu", "MAX_SCALE=0"), None, id="any number of pods"),
        pytest.param(("ENV=default", "MAX_SCALE=1"), None, id="a pod that is ready once makes a revision that is ready"),
    ],
)
def test_callers_are_told_of_a_failed_start_only_where_nobody_takes_that_for_a_start(words: tuple[str, ...], told_s: str | None) -> None:
    service = one_service(render(Variables.parse(words), Kubectl()))
    assert get_env(container(service, "function"), TELL_FAILURE) == told_s
