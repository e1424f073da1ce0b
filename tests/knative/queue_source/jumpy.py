"""The queue source with a wall clock that jumps by hours, back and forth: `python -m tests.knative.queue_source.jumpy SEED`."""

import random
import sys
import time

chance = random.Random(int(sys.argv.pop()))
real, offset = time.time, [chance.uniform(-1e5, 1e5)]


def jumping() -> float:
    if chance.random() < 0.01:
        offset[0] = chance.uniform(-1e5, 1e5)
    return real() + offset[0]


time.time = jumping

from knative.queue_source.cli import command  # noqa: E402  with the clock that jumps

command()
