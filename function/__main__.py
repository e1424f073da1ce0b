"""`python -m function`: serve the agent that the environment names, on $PORT."""

from function.server import main

main()
