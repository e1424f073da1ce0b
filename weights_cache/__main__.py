"""`python -m weights_cache serve|push|pull`."""

from weights_cache.cli import main

main()
