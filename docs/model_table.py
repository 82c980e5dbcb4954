"""The table of families and methods in docs/models.md, and the run that it is made from.

`python docs/generate.py --models` runs tests/reach.py on every tiny model and writes
docs/models/cells.json; the table and the reasons below it are made from that file.
`python docs/generate.py --drift` runs the same and prints what differs from the file: what
`make drift` does with the newest transformers.
"""

from __future__ import annotations

import importlib.metadata
import inspect
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from vlmfix.registry import list_methods

ROOT = Path(__file__).resolve().parents[1]
CELLS = ROOT / "docs" / "models" / "cells.json"

#: What people load, by tiny model; for the others the checkpoint that transformers documents.
_CHECKPOINTS = {
    "llava": "llava-1.5-7b-hf, llava-1.5-13b-hf, bakLlava",
    "llava_pixtral": "pixtral-12b",
    "llava_next": "llava-v1.6-vicuna-7b-hf, llava-v1.6-mistral-7b-hf, llava-v1.6-34b-hf",
    "llava_onevision": "llava-onevision-qwen2-7b-ov-hf",
    "llava_next_video": "LLaVA-NeXT-Video-7B-hf",
    "video_llava": "Video-LLaVA-7B-hf",
    "vipllava": "vip-llava-7b-hf",
    "qwen2_vl": "Qwen2-VL-2B/7B/72B-Instruct",
    "qwen2_5_vl": "Qwen2.5-VL-3B/7B/32B/72B-Instruct",
    "qwen3_vl": "Qwen3-VL-2B/4B/8B/32B-Instruct",
    "qwen3_vl_moe": "Qwen3-VL-30B-A3B-Instruct, 235B-A22B",
    "qwen3_5": "Qwen3.5-4B/9B/27B",
    "qwen3_5_moe": "Qwen3.5-35B-A3B",
    "qwen2_5_omni_thinker": "Qwen2.5-Omni-7B",
    "qwen3_omni_moe_thinker": "Qwen3-Omni-30B-A3B-Instruct",
    "internvl": "InternVL3-8B-hf, InternVL3_5-8B-HF",
    "gemma3": "gemma-3-4b-it, 12b, 27b; medgemma",
    "gemma3n": "gemma-3n-E2B-it, E4B",
    "gemma4": "gemma-4-31b-it",
    "gemma4_e": "gemma-4-e2b-it, e4b",
    "gemma4_moe": "gemma-4-26b-a4b-it",
    "paligemma": "paligemma-3b-mix-448, paligemma2-3b-mix-448",
    "smolvlm": "SmolVLM-Instruct, SmolVLM2-2.2B-Instruct",
    "idefics2": "idefics2-8b",
    "idefics3": "Idefics3-8B-Llama3",
    "granite_docling": "granite-docling-258M",
    "mistral3": "Mistral-Small-3.1-24B-Instruct",
    "mistral3_ministral": "Ministral-3-8B-Instruct",
    "mistral3_mistral4": "Mistral-Small-4",
    "aya_vision": "aya-vision-8b",
    "cohere2_vision": "command-a-vision",
    "glm4v": "GLM-4.1V-9B-Thinking",
    "glm4v_moe": "GLM-4.5V",
    "glm46v": "GLM-4.6V-Flash",
    "instructblip": "instructblip-vicuna-7b, instructblip-flan is encoder-decoder",
    "blip_2": "blip2-opt-2.7b",
    "mllama": "Llama-3.2-11B-Vision-Instruct",
    "llama4": "Llama-4-Scout-17B-16E-Instruct",
    "phi4_multimodal": "Phi-4-multimodal-instruct",
    "chameleon": "chameleon-7b",
    "kosmos2": "kosmos-2-patch14-224",
    "deepseek_vl": "deepseek-vl-1.3b-chat",
    "janus": "Janus-Pro-7B",
    "molmo2": "Molmo2-8B",
    "kimi_k25": "Kimi-K2.5",
    "aria": "Aria",
    "fuyu": "fuyu-8b",
}
_MARKS = {"right": "✓", "refused": "–", "late": "late", "wrong": "wrong", "crash": "crash"}


def _tests() -> Any:
    """tests/reach.py, which is no part of the package."""
    folder = str(ROOT / "tests")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    import reach

    return reach


def _run(name: str) -> tuple[str, dict[str, Any]]:
    import torch
    import transformers

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    try:
        found = _tests().reach(name)
    except Exception as error:  # the plain model itself: another transformers may have changed it
        return name, {
            "model_type": name,
            "plain": [f"{type(error).__name__}: {error}"],
            "cells": {},
        }
    cells = {
        method: [cell.state, cell.why] if cell.why else [cell.state]
        for method, cell in found.cells.items()
    }
    facts = {"model_type": found.model_type, "checkpoints": _checkpoints(name, found.model_type)}
    return name, {**facts, "plain": list(found.plain), "cells": cells}


def _checkpoints(name: str, model_type: str) -> str:
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    if name in _CHECKPOINTS:
        return _CHECKPOINTS[name]
    source = inspect.getsource(sys.modules[CONFIG_MAPPING[model_type].__module__])
    named = re.findall(r'checkpoint="[^"/]*/([^"]+)"', source)
    return str(named[-1]) if named else ""


def run(processes: int = 2) -> dict[str, dict[str, Any]]:
    """Every family against every method, with a line on stderr for each."""
    found = {}
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        names = _tests().NAMES
        for at, (name, facts) in enumerate(pool.map(_run, names), 1):
            found[name] = facts
            counts = Counter(cell[0] for cell in facts["cells"].values())
            said = ", ".join(f"{count} {state}" for state, count in counts.items())
            print(f"{at}/{len(names)} {name}: {said or facts['plain']}", file=sys.stderr)
    return dict(sorted(found.items()))


def write() -> None:
    """Run, and write the outcomes."""
    CELLS.parent.mkdir(exist_ok=True)
    CELLS.write_text(json.dumps(run(), indent=1, ensure_ascii=False) + "\n")


def read() -> dict[str, dict[str, Any]]:
    """The outcomes as written."""
    cells: dict[str, dict[str, Any]] = json.loads(CELLS.read_text())
    return cells


def differences(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """What differs between two runs, a line each; reasons of refusals are not compared."""
    lines = []
    for name in sorted({*before, *now}):
        if name not in now or name not in before:
            lines.append(f"{name}: {'new' if name in now else 'gone'}")
            continue
        if before[name]["plain"] != now[name]["plain"]:
            lines.append(f"{name}, plain model: {before[name]['plain']} -> {now[name]['plain']}")
        old, new = before[name]["cells"], now[name]["cells"]
        for method in sorted({*old, *new}):
            one, other = old.get(method, ["absent"]), new.get(method, ["absent"])
            if one[0] != other[0]:
                lines.append(f"{name}, {method}: {one[0]} -> {' '.join(other)}")
    return lines


def drift() -> int:
    """Run with the transformers that is installed and print what changed; the exit code."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES

    now = run()
    lines = differences(read(), now)
    print(f"transformers {importlib.metadata.version('transformers')}: {len(lines)} differences")
    for line in lines:
        print(f"- {line}")
    known = {facts["model_type"] for facts in now.values()}
    untried = sorted(set(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES) - known)
    print(f"{len(untried)} image-text-to-text types have no tiny model: {', '.join(untried)}")
    return int(bool(lines))


# -- the table -----------------------------------------------------------------------------------


def table() -> str:
    """One row per tiny model, one column per method."""
    methods = _columns()
    rows = [
        f"| `{_title(name, facts)}` | {facts.get('checkpoints', '')} | "
        + " | ".join(_MARKS[facts["cells"][method][0]] for method in methods)
        + " |"
        for name, facts in read().items()
    ]
    head = "| model type | checkpoints | " + " | ".join(f"`{name}`" for name in methods) + " |"
    return "\n".join([head, "|---|---|" + ":-:|" * len(methods), *rows]) + "\n"


def count() -> str:
    """How many cells have which outcome, in a sentence."""
    cells = read()
    states = Counter(cell[0] for facts in cells.values() for cell in facts["cells"].values())
    types = len({facts["model_type"] for facts in cells.values()})
    total = sum(states.values())
    others = sum(states[state] for state in ("wrong", "crash", "late"))
    return (
        f"{len(cells)} tiny models of {types} model types, {len(_columns())} methods, "
        f"{total} cells: {states['right']} right, {states['refused']} refused before anything "
        f"runs, {others} wrong, crashed or refused late.\n"
    )


def short() -> str:
    """The model types by how many methods run on them."""
    total = len(_columns())
    groups: dict[str, list[str]] = {}
    for name, facts in read().items():
        right = sum(cell[0] == "right" for cell in facts["cells"].values())
        share = right / total
        label = (
            "every method" if right == total
            else "nearly every method" if share >= 0.9
            else "most methods" if share >= 0.5
            else "some methods" if right
            else "refused, with the reason"
        )  # fmt: skip
        groups.setdefault(label, []).append(_title(name, facts))
    order = (
        "every method",
        "nearly every method",
        "most methods",
        "some methods",
        "refused, with the reason",
    )
    rows = [f"| {label} | {_ticked(groups[label])} |" for label in order if label in groups]
    return "\n".join(["| | model types |", "|---|---|", *rows]) + "\n"


def reasons() -> str:
    """Why cells are refused: each reason once, with the families and methods."""
    found: dict[str, dict[str, list[str]]] = {}
    methods = _columns()
    for name, facts in read().items():
        for method, (state, *why) in facts["cells"].items():
            if state != "right":
                reason = _general(why[0] if why else state, method, facts["model_type"])
                found.setdefault(reason, {}).setdefault(method, []).append(_title(name, facts))
    lines = []
    for reason, by_method in sorted(found.items(), key=lambda item: -_size(item[1])):
        groups: dict[tuple[str, ...], list[str]] = {}
        for method, names in by_method.items():
            groups.setdefault(tuple(names), []).append(method)
        for names, here in groups.items():
            which = "every method" if len(here) == len(methods) else _ticked(here)
            lines.append(f"| {reason} | {which} | {_ticked(names)} |")
    return "\n".join(["| reason | methods | model types |", "|---|---|---|", *lines]) + "\n"


def _size(by_method: dict[str, list[str]]) -> int:
    return sum(map(len, by_method.values()))


def _ticked(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


def _general(why: str, method: str, model_type: str) -> str:
    """The first sentence of a refusal, without the names of this method and family."""
    first = re.split(r"(?<=[a-z)'\"])\. (?=[A-Z])", why.replace("\n", " "))[0].rstrip(".")
    first = re.sub(rf"^{re.escape(method)}(?: cannot run on| on|:) ?", "", first)
    first = re.sub(rf"^{re.escape(method)} ", "the method ", first)
    first = re.sub(r"^layer \d+ \((\w+)\)", r"its attention (\1)", first)
    first = re.sub(r"and layer \d+ \(", "and its attention (", first)
    for name in (f"model type {model_type!r}", f"{model_type} model"):
        first = first.replace(f"this {name}", "this model type").replace(name, "this model type")
    return re.sub(r"\s+", " ", first).replace("|", "\\|")


def _title(name: str, facts: dict[str, Any]) -> str:
    """The model type, with the tiny model's name where it is another."""
    model_type = str(facts["model_type"])
    same = name.replace("_", "") == model_type.replace("_", "").replace("-", "").replace(".", "")
    return model_type if same else f"{model_type} ({name})"


def _columns() -> list[str]:
    known = {method for facts in read().values() for method in facts["cells"]}
    return [row.name for row in list_methods() if row.name in known]
