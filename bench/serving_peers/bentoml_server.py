"""BentoML: one process with adaptive batching."""

from typing import Any

import bentoml  # type: ignore[import-not-found]

from bench.serving_peers.agent import bring_up


@bentoml.service(workers=1, traffic={"timeout": 30}, logging={"access": {"enabled": False}})
class Predict:
    def __init__(self) -> None:
        self._agent = bring_up()

    @bentoml.api(batchable=True, max_batch_size=32, max_latency_ms=10_000)  # type: ignore[untyped-decorator]
    def predict(self, instances: list[str]) -> list[list[float]]:
        outputs: Any = self._agent.predict(instances)
        return outputs  # type: ignore[no-any-return]
