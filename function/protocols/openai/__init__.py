"""What OpenAI's clients speak: embeddings, completions and chat completions, in one go or as server-sent events.

Sampling parameters are handed to the agent; parameters that ask for something else are refused rather than ignored, unless they ask for
what happens anyway (`n: 1`). The schemas that check a body here also describe it in `/openapi.json`.
"""

from function.protocols.openai.routes import add_routes

__all__ = ["add_routes"]
