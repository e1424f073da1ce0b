"""`python -m function`: serve the agent that the environment names, on $PORT."""

import gc
import os
import signal

# The kernel gives the first process of a container no signal that it has no handler for; until the server has its own, the end is at once.
signal.signal(signal.SIGTERM, lambda number, frame: os._exit(128 + number))
gc.disable()  # what modules make stays; see function/model.py
from function.server import main  # noqa: E402  behind the line above

gc.enable()
main()
