"""A small COCO-format world and fake models for the harness tests."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from PIL import Image

from vlmfix.errors import UnknownMethod
from vlmfix.evals.running.runner import Request
from vlmfix.evals.tasks import Answer, Sample

NAMES = ["person", "dog", "cat", "car", "cup", "chair", "pizza", "kite"]


def write_world(folder: Path, n_images: int = 12, captions: bool = True) -> Path:
    """Images with three or four objects each, in a folder."""
    categories = [{"id": i + 1, "name": name} for i, name in enumerate(NAMES)]
    images, annotations, texts = [], [], []
    for number in range(1, n_images + 1):
        images.append({"id": number, "file_name": f"w_{number:012d}.png"})
        for offset in range(3 + number % 2):
            category = (number * (1 + number % 3) + 2 * offset) % len(NAMES) + 1
            annotations.append(
                {"id": len(annotations) + 1, "image_id": number, "category_id": category}
            )
        texts.append({"id": number, "image_id": number, "caption": "A picture of some things."})
    (folder / "annotations").mkdir(parents=True)
    (folder / "images").mkdir()
    (folder / "annotations" / "instances.json").write_text(
        json.dumps({"images": images, "annotations": annotations, "categories": categories})
    )
    if captions:
        (folder / "annotations" / "captions.json").write_text(json.dumps({"annotations": texts}))
    for image in images:
        Image.new("RGB", (4, 4), (int(image["id"]), 0, 0)).save(
            folder / "images" / str(image["file_name"])
        )
    return folder


def zip_of(folder: Path) -> Path:
    """The same world as a .zip beside the folder."""
    path = folder.with_suffix(".zip")
    with zipfile.ZipFile(path, "w") as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, file.relative_to(folder).as_posix())
    return path


Reply = Callable[[Any, Sample], str | Answer]


class FakeModel:
    """Answers by a function of (method, sample), and remembers what it was asked."""

    def __init__(self, reply: Reply, known: Sequence[str] = ("var", "pai")) -> None:
        self.reply, self.known = reply, known
        self.batches: dict[str, list[list[Sample]]] = {}
        self.requests: dict[str, list[list[Request]]] = {}
        self.noise: dict[str, list[int]] = {}  # what each of these batches was drawn with
        self.gen_kwargs: dict[str, Mapping[str, Any]] = {}

    @property
    def facts(self) -> dict[str, Any]:
        return {"model": "fake", "dtype": "float32", "device": "cpu"}

    def check(self, methods: Sequence[Any]) -> None:
        for method in methods:
            if method not in self.known:
                raise UnknownMethod(f"no method {method!r}: choose from {', '.join(self.known)}")

    def describe(self, method: Any | None) -> Any:
        return method and [{"method": method}]

    @contextmanager
    def arm(
        self,
        method: Any | None,
        gen_kwargs: Mapping[str, Any],
        image: Callable[[str], Any],
        wants_p_yes: bool,
    ) -> Iterator[Callable[[Sequence[Request], int], list[Answer]]]:
        batches = self.batches.setdefault(method or "base", [])
        requests = self.requests.setdefault(method or "base", [])
        self.gen_kwargs[method or "base"] = gen_kwargs

        def answer(asked: Sequence[Request], noise: int) -> list[Answer]:
            requests.append(list(asked))
            batch = [request.sample for request in asked]
            batches.append(batch)
            self.noise.setdefault(method or "base", []).append(noise)
            for sample in batch:
                if sample.image is None:
                    continue
                assert image(sample.image).getpixel((0, 0))[0] == sample.image_id
            replies = [self.reply(method, sample) for sample in batch]
            return [Answer(r, 10, 2, "eos", 2.0) if isinstance(r, str) else r for r in replies]

        yield answer

    def asked(self, arm: str) -> list[tuple[str, str]]:
        return [(s.image, s.prompt) for batch in self.batches[arm] for s in batch]
