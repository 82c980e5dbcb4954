"""The package as a whole: light to import, imports in one direction, names and versions in step."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import re
import statistics
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch

import vlmfix
from vlmfix import registry

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "vlmfix"


def fresh(code: str, *paths: Path) -> str:
    """Run code in a new interpreter at the repository root; what it prints."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *paths)))}
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_is_light() -> None:
    code = (
        "import sys, time; start = time.process_time(); import vlmfix;"
        "seconds = time.process_time() - start;"
        "print(seconds, *({'torch', 'transformers', 'numpy', 'PIL'} & set(sys.modules)))"
    )
    runs = [fresh(code).split() for _ in range(3)]
    assert [run[1:] for run in runs] == [[], [], []], "a heavy package was imported"
    assert statistics.median(float(run[0]) for run in runs) < 0.3


def test_listing_methods_needs_no_torch() -> None:
    code = (
        "import sys; from vlmfix import registry; registry.list_methods(); "
        "print('torch' in sys.modules)"
    )
    assert fresh(code) == "False"


def test_a_wrapped_model_generates_without_triton() -> None:
    code = (
        "import sys; sys.modules['triton'] = None\n"
        "import tiny, vlmfix\n"
        "family = tiny.build('llava')\n"
        "model = vlmfix.wrap(family.model, 'pai')\n"
        "model.generate(**family.inputs(), **tiny.generate_kwargs())\n"
        "print(vlmfix.last_call(model).edited_rows > 0)\n"
    )
    assert fresh(code, ROOT / "tests").splitlines()[-1] == "True"


def test_all_is_sorted_and_complete() -> None:
    assert vlmfix.__all__ == sorted(vlmfix.__all__)
    public = {
        alias.asname or alias.name
        for node in ast.walk(ast.parse((PACKAGE / "__init__.py").read_text()))
        if isinstance(node, ast.ImportFrom) and str(node.module).startswith("vlmfix")
        for alias in node.names
    }
    assert public == set(vlmfix.__all__)
    for name in vlmfix.__all__:
        assert getattr(vlmfix, name) is not None
        assert name in dir(vlmfix)


def test_the_version_has_an_entry_in_the_changelog() -> None:
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## \[?([0-9][^\] ]*)", text, re.MULTILINE)
    assert newest is not None
    assert newest[1] == vlmfix.__version__


@pytest.mark.slow
def test_transformers_models_import_from_the_repository_root() -> None:
    code = (
        "from transformers import LlavaForConditionalGeneration as A;"
        "from transformers import Qwen2_5_VLForConditionalGeneration as B; print('ok')"
    )
    assert fresh(code) == "ok"


@pytest.mark.parametrize("row", registry.list_methods(), ids=lambda row: row.name)
def test_the_registry_names_importable_methods(row: registry.MethodInfo) -> None:
    module, _, name = row.target.partition(":")
    cls = getattr(importlib.import_module(module), name)
    assert (cls.name, cls.stage) == (row.name, row.stage)


def test_names_and_aliases_are_unique() -> None:
    names = [name for row in registry.list_methods() for name in (row.name, *row.aliases)]
    assert len(names) == len(set(names))


def test_the_method_that_the_docs_show_edits_a_model(tmp_path: Path) -> None:
    text = (ROOT / "docs" / "add-a-method.md").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    path = tmp_path / "example_method.py"
    path.write_text(code)
    spec = importlib.util.spec_from_file_location("example_method", path)
    assert spec is not None and spec.loader is not None
    module = sys.modules["example_method"] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    family = tiny.build("llava")
    inputs = family.inputs(batch=2)
    with torch.no_grad():
        plain = family.model(**inputs).logits[:, -1]
        logits = {}
        for factor in (1.0, 4.0):
            with vlmfix.wrapped(family.model, module.ScaleImage(factor=factor)) as model:
                logits[factor] = model(**inputs).logits[:, -1]
                edited = vlmfix.last_call(model).edited_rows
                assert (edited > 0) == (factor != 1)
    assert torch.equal(logits[1.0], plain)
    assert (logits[4.0] - plain).abs().max() > 1e-3


#: The folders and files of the package by floor, the highest first; "" is the package itself, which
#: only names what is public. A file imports from its own folder and from lower floors.
FLOORS = (
    {"__main__"},
    {"cli"},
    {"demo", "bench", "integrations"},
    {"evals"},
    {""},
    {"methods"},
    {"analysis"},
    {"wrapper", "chat"},
    {"engine"},
    {"registry"},
    {"base"},
    {"families", "kernels"},
    {"loading"},
    {"images"},
    {"emoji", "machine", "plugins"},
    {"errors", "_version"},
)
FLOOR = {name: floor for floor, names in enumerate(FLOORS) for name in names}


def is_module(dotted: str) -> bool:
    path = PACKAGE.joinpath(*dotted.split("."))
    return path.is_dir() or path.with_suffix(".py").is_file()


def imported(path: Path) -> Iterator[str]:
    """Modules of vlmfix that a file imports anywhere, named below the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            if name.split(".")[0] != "vlmfix":
                continue
            below = name.partition(".")[2]
            while below and not is_module(below):
                below = below.rpartition(".")[0]
            yield below


def imports() -> dict[str, set[str]]:
    """What every module imports, wherever the import stands: in functions, under TYPE_CHECKING."""
    found: dict[str, set[str]] = {}
    for path in sorted(PACKAGE.rglob("*.py")):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        module = ".".join(part for part in parts if part != "__init__")
        found[module] = set(imported(path)) - {module}
    return found


def test_imports_run_one_way() -> None:
    wrong = []
    for module, others in imports().items():
        for other in others:
            here, there = module.split(".")[0], other.split(".")[0]
            if here != there and FLOOR[there] <= FLOOR[here]:
                wrong.append(f"{module or 'the package'} imports {other or 'the package'}")
    assert not wrong


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A path that ends where it began; [] where there is none."""
    done: set[str] = set()

    def walk(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in done:
            return []
        for other in sorted(graph.get(module, ())):
            if found := walk(other, [*path, module]):
                return found
        done.add(module)
        return []

    return next((found for module in graph if (found := walk(module, []))), [])


def test_no_files_import_each_other_in_a_circle() -> None:
    graph = imports()
    assert len(graph) > 150 and "engine.session" in graph["wrapper"]
    assert circle(graph) == []
    assert circle({**graph, "engine.ledger": {"engine.session"}})


def test_a_file_of_the_engine_can_be_read_in_one_go() -> None:
    lines = {
        path.name: len(path.read_text().splitlines()) for path in (PACKAGE / "engine").glob("*.py")
    }
    assert len(lines) > 15 and max(lines.values()) <= 400, lines


def test_kernels_is_no_regular_package() -> None:
    # With an __init__.py it would shadow the hub's `kernels` wherever the root is on the path.
    assert not (PACKAGE / "kernels" / "__init__.py").exists()
