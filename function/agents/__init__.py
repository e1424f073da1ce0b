"""Example agents: copy the one that is nearest to your model."""
