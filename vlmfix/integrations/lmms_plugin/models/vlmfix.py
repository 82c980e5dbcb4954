"""`--model vlmfix` for LMMS_EVAL_PLUGINS."""

from vlmfix.integrations.lmms_model import SimpleModel as Vlmfix

__all__ = ["Vlmfix"]
