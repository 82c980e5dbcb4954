"""Tiny models of further families, one builder each; `tiny.build` finds them.

What stands in place of a tower of timm, and what a configuration leaves out (audio, deep towers),
is said where a family is built.
"""

from . import gemma, glm, mistral, others, patched, pictures, qwen  # noqa: F401  each adds its own
from .register import BUILDERS, LAYOUTS

__all__ = ["BUILDERS", "LAYOUTS"]
