"""Agents for models of Hugging Face's transformers, which need no code of one's own.

    FUNCTION_AGENT=function.agents.transformers:Pipeline      classifiers and other models with one answer; FUNCTION_TASK says which
    FUNCTION_AGENT=function.agents.transformers:Chat          models that generate text
    FUNCTION_AGENT=function.agents.transformers:Embeddings    texts to vectors

Each is imported when it is asked for, so that none causes another's libraries to be imported. docs/hugging-face.md has the whole way.
"""

import importlib
from typing import Any

_MODULES = {"Pipeline": "pipeline", "Chat": "chat", "Embeddings": "embeddings"}

__all__ = ["Chat", "Embeddings", "Pipeline"]


def __getattr__(name: str) -> Any:
    """One of the agents, from its own module."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(importlib.import_module(f"{__name__}.{_MODULES[name]}"), name)
