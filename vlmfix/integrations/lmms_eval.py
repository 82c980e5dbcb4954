"""vlmfix in lmms-eval: `--model vlmfix`, or `simple_evaluate(model=wrap(model, processor))`.

lmms-eval finds `manifests` through the entry point group lmms_eval.models, and imports this file at
every start; so it imports nothing heavy. `python -m vlmfix.integrations.lmms_eval`
prints the folder of our tasks, for --include_path.

Interface: EvolvingLMMs-Lab/lmms-eval 0.7.3, models/registry_v2.py and api/model.py.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from vlmfix.errors import MissingDependency

__all__ = ["manifests", "tasks_folder", "wrap"]


def manifests() -> list[Any]:
    """The models that this package adds to lmms-eval: its `ModelManifest` of `vlmfix`."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return [
        ModelManifest(
            model_id="vlmfix", chat_class_path="vlmfix.integrations.lmms_model.PretrainedModel"
        )
    ]


def wrap(model: Any, processor: Any, *, batch_size: int = 1) -> Any:
    """Adapt a loaded model to lmms-eval: `simple_evaluate(model=wrap(model, processor), ...)`.

    The model stays as it is, plain or wrapped, and may be wrapped differently between two
    evaluations.

    Args:
        model: a vision-language model, plain or wrapped.
        processor: its processor.
        batch_size: chats per call of generate().

    Raises:
        BadInput: a batch size that is not 1 or more.
        MissingDependency: lmms-eval is not installed.
    """
    try:
        from vlmfix.integrations.lmms_model import GivenModel
    except ImportError as error:
        raise MissingDependency(
            f"this needs lmms-eval 0.7 or newer ({error}): `pip install lmms-eval`"
        ) from error
    return GivenModel(model, processor, batch_size=batch_size)


def tasks_folder() -> Path:
    """The folder of our task files, for `--include_path` and `TaskManager(include_path=...)`."""
    return Path(__file__).parent / "lmms_plugin" / "tasks"


if __name__ == "__main__":
    print(tasks_folder())
