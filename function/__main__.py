"""`python -m function`: serve the agent that the environment names, on $PORT."""

import gc

gc.disable()  # what modules make stays; see function/model.py
from function.server import main  # noqa: E402  behind the line above

gc.enable()
main()
