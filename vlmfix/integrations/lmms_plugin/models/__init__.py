"""Name of a module in this folder -> its class, as lmms-eval reads it."""

AVAILABLE_MODELS = {"vlmfix": "Vlmfix"}
