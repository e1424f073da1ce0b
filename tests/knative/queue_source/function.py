"""A function to be killed: `python -m tests.knative.queue_source.function PORT LOG SEED`.

It works for some milliseconds, writes what it has done into the log, and answers; now and then it is busy or fails first. Poison is a 400.
"""

import os
import random
import sys
import time

from tests.knative.queue_source.stage import Post, Reply, Sink

if __name__ == "__main__":
    chance = random.Random(int(sys.argv[3]))
    log = os.open(sys.argv[2], os.O_WRONLY | os.O_APPEND | os.O_CREAT)

    def answer(post: Post) -> Reply:
        """One event."""
        number = post.json()["n"]
        if isinstance(number, str):
            return Reply(400)
        if (drawn := chance.random()) < 0.04:
            return Reply(chance.choice((429, 503)), {"Retry-After": chance.choice(("0", "1"))}) if drawn < 0.03 else Reply(500)
        time.sleep(chance.uniform(0.005, 0.03))
        os.write(log, f"{number} {post.id}\n".encode())
        return Reply()

    Sink(answer, port=int(sys.argv[1]))
    while True:
        time.sleep(60)
