"""vlmfix in VLMEvalKit, which has no plug-ins: a launcher that adds vlmfix's model class.

    python -m vlmfix.integrations.vlmevalkit run --pretrained llava-hf/llava-1.5-7b-hf \\
        --method var:keep=0.4 --data POPE --judge exact_matching --work-dir out/

All other arguments go to VLMEvalKit's run.py unchanged. Instead of --pretrained, its own --config
may name models of the class VLMFix, several in one run:

    {"model": {"llava": {"class": "VLMFix", "pretrained": "llava-hf/llava-1.5-7b-hf"},
               "llava-var": {"class": "VLMFix", "pretrained": ..., "method": "var", "keep": 0.4}},
     "data": {...}}

Interface: open-compass/VLMEvalKit run.py, vlmeval/config.py (supported_VLM), vlmeval/vlm/base.py.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from vlmfix.errors import BadInput, MissingDependency, VlmfixError
from vlmfix.integrations.arguments import MAX_NEW_TOKENS
from vlmfix.registry import build_stack

__all__ = ["main"]


def main(arguments: Sequence[str]) -> None:
    """Run VLMEvalKit with a wrapped model.

    Args:
        arguments: "run", then those of vlmfix (--pretrained, --method, --name, --max-new-tokens,
            --dtype, --device) and those of VLMEvalKit's run.py, in any order.

    Raises:
        BadInput: a method that cannot be used, or --model together with --pretrained.
        MissingDependency: VLMEvalKit is not installed.
    """
    ours, theirs = _parser().parse_known_args(arguments)
    if ours.pretrained is None and (ours.method or ours.name):
        raise BadInput("--method and --name belong to --pretrained MODEL: add it")
    if ours.pretrained is not None and {"--model", "--config"} & set(theirs):
        raise BadInput("--pretrained names the model: leave out --model and --config")
    script = _script()
    # run.py chooses the GPU of a process before it imports torch, so it runs first.
    run = _module(script)
    build_stack(ours.method)

    import vlmeval.vlm
    from vlmeval.config import supported_VLM

    from vlmfix.integrations.vlmevalkit_model import VLMFix

    vlmeval.vlm.VLMFix = VLMFix
    if ours.pretrained is not None:
        name = ours.name or _name(ours.pretrained, ours.method)
        supported_VLM[name] = partial(
            VLMFix,
            pretrained=ours.pretrained,
            method=ours.method,
            max_new_tokens=ours.max_new_tokens,
            dtype=ours.dtype,
            device=ours.device,
        )
        theirs += ["--model", name]
    sys.argv = [str(script), *theirs]
    if hasattr(run, "load_env"):
        run.load_env()
    run.main()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vlmfix.integrations.vlmevalkit", allow_abbrev=False
    )
    parser.add_argument("command", choices=["run"])
    parser.add_argument(
        "--pretrained", help="model: hub id, local folder, or emoji (the bundled one)"
    )
    parser.add_argument(
        "--method", help="method or stack, e.g. var:keep=0.4 or imba+vhr; default: none"
    )
    parser.add_argument("--name", help="name of the model in VLMEvalKit and its file names")
    parser.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    parser.add_argument("--dtype", help="dtype of the model: bfloat16, float16 or float32")
    parser.add_argument("--device", help="device of the model: cpu, cuda or cuda:1")
    return parser


def _script() -> Path:
    """VLMEvalKit's run.py: next to its package in a checkout, inside it in some distributions."""
    spec = importlib.util.find_spec("vlmeval")
    if spec is None or spec.origin is None:
        raise MissingDependency(
            "VLMEvalKit is not installed: `git clone https://github.com/open-compass/VLMEvalKit && "
            "pip install -e VLMEvalKit`"
        )
    package = Path(spec.origin).parent
    for place in (package / "run.py", package.parent / "run.py"):
        if place.is_file():
            return place
    raise MissingDependency(
        f"the VLMEvalKit at {package.parent} has no run.py: install it from a checkout with "
        "`pip install -e`, which leaves run.py next to the package"
    )


def _module(script: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location("vlmevalkit_run", script)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def _name(pretrained: str, method: str | None) -> str:
    from vlmfix.evals.running.arms import file_name

    return file_name(f"vlmfix-{Path(pretrained).name}{'-' + method if method else ''}")


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except VlmfixError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
