"""The adapters of lmms-eval against a fake of its interface; the real one: test_lmms_real.py."""

from __future__ import annotations

import importlib
import random
import re
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import lmms_fake
import pytest
import yaml
from lmms_fake import Request

import vlmfix
from vlmfix.errors import BadInput, MissingDependency
from vlmfix.integrations import lmms_eval as plugin

ROOT = Path(__file__).resolve().parents[2]
PAI = "pai:alpha=0.9"  # changes what the bundled model says of these pictures
SHORT = {"max_new_tokens": 40, "temperature": 0, "until": []}
GREEDY = {"max_new_tokens": 40, "do_sample": False, "num_beams": 1}
PROMPTS = ("Please describe this image in detail.", "Is there a bed in the image?")
Docs = list[dict[str, Any]]


def chat(doc: Mapping[str, Any]) -> list[dict[str, Any]]:
    content = [{"type": "image", "url": doc["image"]}, {"type": "text", "text": doc["text"]}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def emoji() -> tuple[Any, Any]:
    return vlmfix.load("emoji", device="cpu")


@pytest.fixture
def docs() -> Docs:
    return [{"image": f"emoji:{i + 1}", "text": PROMPTS[i % 2]} for i in range(5)]


@pytest.fixture
def adapters(monkeypatch: pytest.MonkeyPatch) -> Any:
    lmms_fake.install(monkeypatch)
    return importlib.import_module("vlmfix.integrations.lmms_model")


@pytest.fixture
def given(adapters: Any, emoji: tuple[Any, Any], docs: Docs) -> Any:
    model = adapters.GivenModel(*emoji, batch_size=2)
    model.task_dict = {"tiny": {"test": docs}}
    return model


def requests(
    docs: Docs, settings: Callable[[int], Mapping[str, Any] | None] = lambda _: SHORT
) -> list[Request]:
    return [
        Request((f"context {i}", chat, settings(i), i, "tiny", "test")) for i in range(len(docs))
    ]


def texts(results: list[Any]) -> list[str]:
    return [result.text for result in results]


def test_answers_are_those_of_generate_in_the_order_of_requests(
    given: Any, emoji: tuple[Any, Any], docs: Docs
) -> None:
    asked = [chat(doc) for doc in docs]
    batches = (asked[:2], asked[2:4], asked[4:])
    expected = [a for b in batches for a in vlmfix.generate(*emoji, b, **GREEDY)]
    results = given.generate_until(requests(docs))
    assert texts(results) == expected
    assert len(set(expected)) > 2
    counts = [result.token_counts for result in results]
    assert all(0 < c.output_tokens < c.input_tokens for c in counts)
    seen = [("generate_until", (f"context {i}", SHORT), expected[i]) for i in range(5)]
    assert given.cache_hook.seen == seen


def test_only_requests_of_equal_settings_share_a_batch(
    given: Any, docs: Docs, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[list[str], int]] = []
    generate = vlmfix.generate

    def recording(model: Any, processor: Any, chats: Any, **kwargs: Any) -> Any:
        calls.append(([c[0]["content"][0]["url"] for c in chats], kwargs["max_new_tokens"]))
        return generate(model, processor, chats, **kwargs)

    monkeypatch.setattr(vlmfix, "generate", recording)
    results = given.generate_until(requests(docs, lambda i: {"max_new_tokens": 3 + i % 2}))
    assert calls == [
        (["emoji:1", "emoji:3"], 3),
        (["emoji:5"], 3),
        (["emoji:2", "emoji:4"], 4),
    ]
    assert [r.token_counts.output_tokens for r in results] == [3, 2, 3, 2, 3]


def test_wrong_settings_of_the_last_request_cost_no_answer(
    given: Any, docs: Docs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vlmfix, "generate", lambda *_, **__: pytest.fail("a model was asked"))
    with pytest.raises(BadInput, match="max_new_tokens=0"):
        given.generate_until(requests(docs, lambda i: {"max_new_tokens": 4 - i}))


@pytest.mark.parametrize("until", [["There", "with"], " with"])
def test_answers_end_before_the_first_stop_text(given: Any, docs: Docs, until: Any) -> None:
    (whole,) = given.generate_until(requests(docs[:1]))
    (cut,) = given.generate_until(requests(docs[:1], lambda _: SHORT | {"until": until}))
    assert " with" in whole.text
    assert cut.text == whole.text.split(" with")[0]
    assert cut.token_counts.output_tokens < whole.token_counts.output_tokens


def test_settings_left_out_are_named(given: Any, docs: Docs) -> None:
    with pytest.warns(UserWarning, match="ignores the task's settings image_aspect_ratio"):
        given.generate_until(requests(docs[:1], lambda _: {**SHORT, "image_aspect_ratio": "pad"}))


def test_the_older_interface_hands_over_pictures_and_a_text(given: Any, docs: Docs) -> None:
    def pictures(doc: Mapping[str, Any]) -> list[Any]:
        return [doc["image"]]

    simple = [
        Request((f"<image>\n{doc['text']}", SHORT, pictures, i, "tiny", "test"))
        for i, doc in enumerate(docs)
    ]
    assert texts(given.generate_until(simple)) == texts(given.generate_until(requests(docs)))
    with pytest.raises(NotImplementedError, match="--force_simple"):
        given.generate_until_multi_round(simple)


def test_rounds_go_on_until_the_task_says_so(
    given: Any, emoji: tuple[Any, Any], docs: Docs
) -> None:
    told: list[tuple[int, list[str], Any]] = []

    def rounds(doc: Mapping[str, Any], **more: Any) -> Any:
        if not more:
            return chat(doc)
        index, said = more["round_idx"], more["previous_output"]
        told.append((docs.index(dict(doc)), said, more["previous_round_info"]))
        # The first picture gets one round, the second two, ...
        if index > docs.index(dict(doc)):
            return None, True, said, None
        return chat({"image": f"emoji:{index + 7}", "text": PROMPTS[0]}), False, said, index

    asked = [Request(("", rounds, SHORT, i, "tiny", "test")) for i in range(3)]
    given.batch_size = 3
    results = given.generate_until_multi_round(asked)
    assert [len(answers) for answers in results] == [1, 2, 3]

    def alone(*chats: Any) -> list[str]:
        return list(vlmfix.generate(*emoji, list(chats), **GREEDY))

    second, third = (chat({"image": f"emoji:{n}", "text": PROMPTS[0]}) for n in (8, 9))
    assert [answers[0] for answers in results] == alone(*map(chat, docs[:3]))
    assert [answers[1] for answers in results[1:]] == alone(second, second)
    assert results[2][2] == alone(third)[0]
    assert told[-1] == (2, results[2], 2)
    assert (1, results[1][:1], None) in told


def test_likelihoods_are_refused_with_the_way_out(given: Any) -> None:
    with pytest.raises(NotImplementedError, match="output_type is generate_until"):
        given.loglikelihood([])


@pytest.mark.parametrize("size", ["auto", 0, "2.5"])
def test_batch_sizes_are_numbers(adapters: Any, size: Any) -> None:
    with pytest.raises(BadInput, match="give a number"):
        adapters.GivenModel(None, None, batch_size=size)


def test_a_model_by_name_with_a_method(adapters: Any, emoji: tuple[Any, Any], docs: Docs) -> None:
    model = adapters.PretrainedModel(
        "emoji", method="pai", alpha=0.9, batch_size="5", device="cpu", max_batch_size=None
    )
    model.task_dict = {"tiny": {"test": docs}}
    answers = texts(model.generate_until(requests(docs)))
    asked = [chat(doc) for doc in docs]
    plain = vlmfix.generate(*emoji, asked, **GREEDY)
    with vlmfix.wrapped(emoji[0], PAI):
        assert vlmfix.generate(*emoji, asked, **GREEDY) == answers
    assert answers != plain
    assert adapters.PretrainedModel.is_simple is False
    assert adapters.SimpleModel.is_simple is True


def test_whoever_loaded_a_model_keeps_it(given: Any, adapters: Any, docs: Docs) -> None:
    given.clean()
    assert given.generate_until(requests(docs[:1]))[0].text
    loaded = adapters.PretrainedModel("emoji", device="cpu")
    loaded.clean()
    assert not hasattr(loaded, "_model")


@pytest.mark.parametrize(
    ("device", "place"), [(None, "local"), ("cuda", "local"), ("cuda:1", "cuda:1")]
)
def test_each_process_takes_its_own_device(
    adapters: Any, monkeypatch: pytest.MonkeyPatch, device: str | None, place: str
) -> None:
    class Two:
        num_processes, process_index, device = 2, 1, "local"

    places: list[Any] = []

    def load(*arguments: Any) -> tuple[None, None]:
        places.append(arguments[-1])
        return None, None

    monkeypatch.setattr(adapters, "Accelerator", Two)
    monkeypatch.setattr(adapters, "load_wrapped", load)
    model = adapters.PretrainedModel("emoji", device=device)
    assert (model.rank, model.world_size, places) == (1, 2, [place])


def test_the_plugin_is_found_and_light() -> None:
    declared = (ROOT / "pyproject.toml").read_text().split('entry-points."lmms_eval.models"]')[1]
    target = re.match(r'\s*vlmfix = "(.+?):(.+?)"', declared)
    assert target is not None
    code = f"""
import sys, types
registry = types.ModuleType("lmms_eval.models.registry_v2")
registry.ModelManifest = lambda **fields: fields
for name in ("lmms_eval", "lmms_eval.models"):
    sys.modules[name] = types.ModuleType(name)
sys.modules["lmms_eval.models.registry_v2"] = registry
import {target[1]} as module
(manifest,) = module.{target[2]}()
print(manifest["model_id"], manifest["chat_class_path"])
print(*{{"torch", "transformers", "numpy", "PIL", "accelerate"}} & set(sys.modules))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    name, path = done.stdout.splitlines()[0].split()
    assert (name, done.stdout.splitlines()[1]) == ("vlmfix", "")
    assert path == "vlmfix.integrations.lmms_model.PretrainedModel"


def test_names_that_lmms_eval_looks_up_exist(adapters: Any) -> None:
    assert issubclass(adapters.PretrainedModel, lmms_fake.Model)
    legacy = importlib.import_module("vlmfix.integrations.lmms_plugin.models")
    for name, attribute in legacy.AVAILABLE_MODELS.items():
        found = importlib.import_module(f"vlmfix.integrations.lmms_plugin.models.{name}")
        assert getattr(found, attribute) is adapters.SimpleModel
    folder = importlib.util.find_spec("vlmfix.integrations.lmms_plugin.tasks")
    assert folder is not None and folder.submodule_search_locations is not None
    assert list(folder.submodule_search_locations) == [str(plugin.tasks_folder())]


def test_without_lmms_eval_the_way_out_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lmms_eval", None)
    monkeypatch.delitem(sys.modules, "vlmfix.integrations.lmms_model", raising=False)
    with pytest.raises(MissingDependency, match="pip install lmms-eval"):
        plugin.wrap(None, None)


class Loader(yaml.SafeLoader):
    """YAML with !function, which names something importable."""


def function(loader: Loader, node: yaml.ScalarNode) -> Any:
    module, _, name = loader.construct_scalar(node).rpartition(".")
    return getattr(importlib.import_module(module), name)


Loader.add_constructor("!function", function)
TASK_FILES = sorted(plugin.tasks_folder().glob("*.yaml"))


def test_the_three_tasks_are_there() -> None:
    assert [path.stem for path in TASK_FILES] == ["amber_d", "chair_builtin", "pope_official"]


@pytest.mark.parametrize("name", ["chair_builtin", "pope_official"])
def test_tasks_give_the_scores_of_the_harness(
    name: str, adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmfix.evals.tasks import Answer, Options, get_task

    monkeypatch.delenv("VLMFIX_DATA", raising=False)
    config = yaml.load((plugin.tasks_folder() / f"{name}.yaml").read_text(), Loader)
    assert config["task"] == name
    config["options"] = {**config.get("options", {}), "n_images": 20}
    task = config["class"](config=config)
    docs = list(task.dataset["test"])
    chance = random.Random(0)  # answers that repeat would score the same in every split
    say = [f"{chance.choice(('Yes', 'No'))}, a dog and a bench." for _ in docs]
    rows = [
        task.config["process_results"](doc, [text]) for doc, text in zip(docs, say, strict=True)
    ]
    got = {
        metric["metric"]: metric["aggregation"]([row[metric["metric"]] for row in reversed(rows)])
        for metric in task.config["metric_list"]
    }

    kind = get_task(config["evaluate"])
    direct = kind(kind.open(None), Options(**config["options"]))
    scored = direct.score(direct.samples, {"": [Answer(text) for text in say]})[""]["scores"]
    place = scored["pooled" if "pooled" in scored else "caption"]
    assert got == {figure: place[figure]["value"] for figure in config["figures"]}
    assert len(got) > 3 and min(got.values()) > 0
    assert [doc["question"] for doc in docs] == [sample.prompt for sample in direct.samples]
    (picture,) = task.config["doc_to_visual"](docs[0])
    assert picture.tobytes() == kind.open(None).image(docs[0]["image"]).tobytes()


def test_a_part_of_the_questions_can_be_scored(adapters: Any) -> None:
    config = yaml.load((plugin.tasks_folder() / "pope_official.yaml").read_text(), Loader)
    config["options"]["n_images"] = 5
    task = config["class"](config=config)
    doc = task.dataset["test"][0]
    row = task.config["process_results"](doc, [doc["target"]])
    figures = {m["metric"]: m["aggregation"] for m in task.config["metric_list"]}
    assert figures["accuracy"]([row["accuracy"]]) == 1.0


def test_amber_needs_its_files_and_reports_known_figures(
    adapters: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    from vlmfix.evals.amber import discriminative as amber_discriminative

    monkeypatch.delenv("VLMFIX_DATA", raising=False)
    config = yaml.load((plugin.tasks_folder() / "amber_d.yaml").read_text(), Loader)
    assert set(config["figures"]) <= {r.name for r in amber_discriminative.RATIOS}
    with pytest.raises(BadInput):
        config["class"](config=config)
