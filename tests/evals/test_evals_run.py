"""The harness from end to end with a fake model: what is asked, written, compared and refused."""

from __future__ import annotations

import io
import json
import re
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import pytest
import rich.console
from evals_worlds import FakeModel, write_world, zip_of

import vlmfix
import vlmfix.evals
from vlmfix.errors import BadInput, UnknownMethod, UnknownTask
from vlmfix.evals.inputs.coco import CocoData
from vlmfix.evals.options import Options
from vlmfix.evals.running.arms import file_name, named_arms
from vlmfix.evals.running.files import write_json
from vlmfix.evals.tasks import Answer, Sample
from vlmfix.methods.pai import PayAttentionToImage

RECORD_KEYS = """run_id rank config method method_cfg gen_kwargs seed sampling_seed task split index
sample_id image image_id prompt follows prefix target response p_yes n_prompt_tokens n_new_tokens
passes finish batch halvings latency_s error parsed correct"""


@pytest.fixture
def world(tmp_path: Path) -> Path:
    return write_world(tmp_path / "world")


def truthful(method: Any, sample: Sample) -> str:
    """Base says yes to everything; var is always right; pai is the base."""
    if sample.task == "chair":
        return f"A {sample.target[0]}." if method == "var" else "A zebra."
    return sample.target.title() if method == "var" else "Yes"


def run(model: Any, world: Path, output: Path, **options: Any) -> dict[str, Any]:
    settings = {"n_images": 10, "quiet": True, "batch_size": 7, **options}
    tasks = settings.pop("tasks", ["pope"])
    return vlmfix.evals.evaluate(tasks, model=model, data=world, output=output, **settings)


def records(folder: Path, task: str, arm: str) -> list[dict[str, Any]]:
    lines = (folder / f"samples_{task}_{arm}.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_paired_run(world: Path, tmp_path: Path) -> None:
    model = FakeModel(truthful)
    out = tmp_path / "out"
    results = run(model, world, out, tasks=["pope", "chair"], methods=["var", "pai"])
    stored = json.loads((out / "results.json").read_text())
    assert results == {**stored, "output": str(out)}  # the file does not say where it lies
    assert not results["partial"] and results["errors"] == 0

    pope = results["tasks"]["pope"]["arms"]
    assert pope["base"]["scores"]["random"]["accuracy"]["value"] == 0.5
    assert pope["base"]["scores"]["pooled"]["yes_ratio"]["value"] == 1.0
    assert pope["var"]["scores"]["mean"]["f1"]["value"] == 1.0
    assert pope["var"]["delta"]["pooled"]["mcnemar"]["better"] == len(
        # Every "no" question that base got wrong, each counted once however many splits share it.
        {(s.image, s.prompt) for b in model.batches["base"] for s in b if s.target == "no"}
    )
    assert pope["var"]["delta"]["random"]["mcnemar"]["better"] == 30
    assert pope["var"]["delta"]["pooled"]["accuracy"]["value"] == 0.5
    assert pope["pai"]["delta"]["random"]["accuracy"] == {"value": 0.0, "ci": [0.0, 0.0]}
    assert pope["pai"]["same_as_base"] == 1.0
    assert pope["var"]["strict"]["scores"]["mean"]["accuracy"]["value"] == 1.0
    assert pope["base"]["cost"]["passes_per_answer"] == 2.0

    chair = results["tasks"]["chair"]["arms"]
    assert chair["base"]["scores"]["caption"]["chair_s"]["value"] == 1.0
    assert chair["var"]["scores"]["caption"]["chair_s"]["value"] == 0.0
    assert results["tasks"]["chair"]["gen_kwargs"]["max_new_tokens"] == 512
    assert results["tasks"]["pope"]["gen_kwargs"]["max_new_tokens"] == 16
    assert len(results["tasks"]["pope"]["image_ids"]) == 10
    assert sorted(p.name for p in out.iterdir()) == [
        "card.csv",
        "card.json",
        "card.md",
        "results.json",
        "run.json",
        *(f"samples_{task}_{arm}.jsonl" for task in ("chair", "pope") for arm in sorted(pope)),
    ]


def test_every_arm_is_asked_the_same_once(world: Path, tmp_path: Path) -> None:
    model = FakeModel(truthful)
    results = run(model, world, tmp_path / "out", methods=["var"])
    asked = model.asked("base")
    assert len(set(asked)) == len(asked)
    assert model.asked("var") == asked
    assert model.gen_kwargs["var"] == model.gen_kwargs["base"]
    rows = records(tmp_path / "out", "pope", "base")
    assert (
        len(rows) == 180 > len(asked) == results["tasks"]["pope"]["arms"]["base"]["cost"]["answers"]
    )
    assert {(row["image"], row["prompt"]) for row in rows} == set(asked)
    assert max(map(len, model.batches["base"])) == 7


def test_records_are_complete(world: Path, tmp_path: Path) -> None:
    results = run(FakeModel(truthful), world, tmp_path / "out", methods=["var"], seed=3)
    for arm in ("base", "var"):
        rows = records(tmp_path / "out", "pope", arm)
        assert len({row["sample_id"] for row in rows}) == len(rows) == 180
        for row in rows:
            assert set(row) == set(RECORD_KEYS.split())
            assert row["run_id"] == results["run_id"] and row["method"] == arm
            assert row["method_cfg"] == ([{"method": "var"}] if arm == "var" else None)
            assert row["seed"] == 3 and row["finish"] == "eos" and row["error"] is None
            assert row["sampling_seed"] is None
            assert row["correct"] == (row["parsed"] == row["target"])


def test_answers_are_on_disk_as_soon_as_they_are_given(world: Path, tmp_path: Path) -> None:
    seen: list[int] = []

    def reply(method: Any, sample: Sample) -> str:
        path = tmp_path / "out" / "samples_pope_base.rank0.jsonl"
        seen.append(len(path.read_text().splitlines()))
        return "Yes"

    model = FakeModel(reply)
    run(model, world, tmp_path / "out")
    done = {(sample.image, sample.prompt) for sample in model.batches["base"][0]}
    rows = records(tmp_path / "out", "pope", "base")
    assert seen[:7] == [0] * 7
    assert seen[7] == sum((row["image"], row["prompt"]) in done for row in rows)


def test_results_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": 1})
    with pytest.raises(TypeError):
        write_json(path, {"a": 2, "b": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


def test_a_failing_batch_is_recorded_and_its_items_count_for_no_arm(
    world: Path, tmp_path: Path
) -> None:
    def reply(method: Any, sample: Sample) -> str:
        if method == "var" and sample.image_id == 5:
            raise MemoryError("no room")
        return truthful(method, sample)

    model = FakeModel(reply)
    results = run(model, world, tmp_path / "out", methods=["var"], n_images=None, batch_size=1)
    failed = [r for r in records(tmp_path / "out", "pope", "var") if r["error"]]
    assert len(failed) == results["errors"] == 18
    assert {r["error"] for r in failed} == {"MemoryError: no room"}
    assert all(r["response"] is None and r["finish"] == "error" for r in failed)
    entry = results["tasks"]["pope"]
    assert sorted(entry["excluded"]) == sorted(r["sample_id"] for r in failed)
    for arm in ("base", "var"):
        assert entry["arms"][arm]["counts"]["pooled"]["n"] == 12 * 18 - 18
    assert [entry["arms"][arm]["n_errors"] for arm in ("base", "var")] == [0, 18]
    assert results["partial"] and entry["partial"]
    assert "18 failed" in vlmfix.evals.to_markdown(results)


def test_a_run_where_everything_fails_still_ends(world: Path, tmp_path: Path) -> None:
    def reply(method: Any, sample: Sample) -> str:
        raise RuntimeError("broken")

    results = run(FakeModel(reply), world, tmp_path / "out", tasks=["pope", "chair"])
    assert results["errors"] == 190
    assert (tmp_path / "out" / "results.json").exists()
    vlmfix.evals.to_markdown(results)


def test_too_few_answers_is_an_error_not_a_shift(world: Path, tmp_path: Path) -> None:
    class Short(FakeModel):
        def arm(self, *args: Any) -> Any:
            from contextlib import contextmanager

            @contextmanager
            def shortened() -> Any:
                yield lambda batch, noise: [Answer("Yes")] * (len(batch) - 1)

            return shortened()

    assert run(Short(truthful), world, tmp_path / "out")["errors"] == 180


def test_empty_answers_are_counted(world: Path, tmp_path: Path) -> None:
    results = run(FakeModel(lambda m, s: ""), world, tmp_path / "out", tasks=["pope", "chair"])
    assert results["tasks"]["pope"]["arms"]["base"]["n_empty"] == 180
    strict = results["tasks"]["pope"]["arms"]["base"]["strict"]
    assert strict["n_unparsed"] == 180
    assert strict["scores"]["pooled"]["accuracy"]["value"] == 0.0
    assert results["tasks"]["chair"]["arms"]["base"]["scores"]["caption"]["recall"]["value"] == 0.0


def test_limit_counts_images_and_marks_the_run(world: Path, tmp_path: Path) -> None:
    results = run(FakeModel(truthful), world, tmp_path / "o", tasks=["pope", "chair"], limit=4)
    assert results["partial"]
    assert [results["tasks"][t]["n_images"] for t in ("pope", "chair")] == [4, 4]
    assert results["tasks"]["pope"]["n_samples"] == 4 * 18
    assert "PARTIAL" in vlmfix.evals.to_markdown(results)


def test_same_seed_same_results_in_a_zip_too(world: Path, tmp_path: Path) -> None:
    folder = run(FakeModel(truthful), world, tmp_path / "a", methods=["var"])
    zipped = run(FakeModel(truthful), zip_of(world), tmp_path / "b", methods=["var"])
    for key in ("image_ids_sha256", "n_samples"):
        assert folder["tasks"]["pope"][key] == zipped["tasks"]["pope"][key]
    assert (
        folder["tasks"]["pope"]["arms"]["var"]["delta"]
        == zipped["tasks"]["pope"]["arms"]["var"]["delta"]
    )
    other = run(FakeModel(truthful), world, tmp_path / "c", seed=1)
    assert other["tasks"]["pope"]["image_ids_sha256"] != folder["tasks"]["pope"]["image_ids_sha256"]


def test_output_folder(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FakeModel(truthful)
    out = tmp_path / "out"
    run(model, world, out, methods=["var"])
    (out / "notes.txt").write_text("mine")
    with pytest.raises(BadInput, match="not empty.*overwrite"):
        run(model, world, out)
    assert (out / "samples_pope_var.jsonl").exists()
    run(model, world, out, overwrite=True)
    assert sorted(p.name for p in out.iterdir()) == [
        "card.csv",
        "card.json",
        "card.md",
        "notes.txt",
        "results.json",
        "run.json",
        "samples_pope_base.jsonl",
    ]
    assert len(records(out, "pope", "base")) == 180
    monkeypatch.chdir(tmp_path)
    made = Path(run(model, world, None)["output"])
    assert made.parent == Path("runs") and made.name.endswith("-pope-model")


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tasks": ["popee"]}, UnknownTask, "choose from .*chair.*pope"),
        ({"tasks": []}, BadInput, "no task"),
        ({"methods": ["vra"]}, UnknownMethod, "vra"),
        ({"methods": ["var", "var"]}, BadInput, "two arms are called 'var'"),
        ({"methods": ["base"]}, BadInput, "two arms are called 'base'"),
        ({"limit": 0}, BadInput, "limit=0"),
        ({"batch_size": 0}, BadInput, "batch_size=0"),
        ({"seed": -1}, BadInput, "seed=-1"),
        ({"seed": 2**63}, BadInput, "seed=9223372036854775808"),
        ({"parser": "lenient"}, BadInput, "official"),
        ({"prompt_style": "long"}, BadInput, "bare"),
        ({"n_images": 500}, BadInput, "500 images wanted"),
        ({"model": 3}, BadInput, "cannot evaluate a int"),
    ],
)
def test_refusals_come_first_and_leave_nothing(
    world: Path, tmp_path: Path, options: dict[str, Any], error: type[Exception], message: str
) -> None:
    model = FakeModel(truthful)
    with pytest.raises(error, match=message):
        run(**{"model": model, "world": world, "output": tmp_path / "out", **options})
    assert not model.batches
    assert not (tmp_path / "out").exists()


def test_options_as_one_object_or_by_name(world: Path, tmp_path: Path) -> None:
    chosen = Options(limit=2, n_images=10, seed=5, output=tmp_path / "a")
    one = vlmfix.evals.evaluate(["pope"], FakeModel(truthful), [], world, chosen, quiet=True)
    changed = {"limit": 2, "n_images": 10, "seed": 5, "output": tmp_path / "b", "quiet": True}
    by_name = vlmfix.evals.evaluate(["pope"], FakeModel(truthful), [], world, **changed)
    assert one["config"] == by_name["config"]
    assert one["config"]["seed"] == 5 and one["config"]["limit"] == 2
    # What says where and how, and not what, is no part of the config that a resumed run compares.
    assert not {"output", "resume", "overwrite", "questions", "noop"} & set(one["config"])
    over = {"seed": 6, "output": tmp_path / "c", "quiet": True}
    both = vlmfix.evals.evaluate(["pope"], FakeModel(truthful), [], world, chosen, **over)
    assert (both["config"]["seed"], both["config"]["limit"]) == (6, 2)
    with pytest.raises(TypeError, match="limitt"):
        vlmfix.evals.evaluate(["pope"], FakeModel(truthful), [], world, limitt=3)


def test_a_misspelt_method_fails_before_the_model_loads(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(vlmfix, "load", load)
    with pytest.raises(UnknownMethod, match="vra"):
        run("emoji", world, tmp_path / "out", methods=["vra"])
    assert not (tmp_path / "out").exists()


def coco(**changes: Any) -> str:
    """A COCO file of one image, with other lists."""
    lists: dict[str, Any] = {
        "images": [{"id": 1, "file_name": "1.png"}],
        "categories": [{"id": 1, "name": "dog"}],
        "annotations": [{"id": 1, "image_id": 1, "category_id": 1}],
    }
    return json.dumps({**lists, **changes})


COCO_ROWS = [
    (coco(images=None), "images is None, which is no list"),
    (coco(images={}), "images is {}, which is no list"),
    (coco(annotations=["x"]), "annotations, item 1 is 'x', which is no object"),
    (coco(images=[{"id": 1, "file_name": None}]), "images, item 1: the text under file_name is"),
    (coco(images=[{"id": 1.9, "file_name": "1.png"}]), "images, item 1: id is 1.9, which is no"),
    (coco(images=[{"id": True, "file_name": "1.png"}]), "images, item 1: id is True, which is no"),
    (coco(images=[{"id": 1e400, "file_name": "1.png"}]), "images, item 1: id is inf, which is no"),
    (coco(images=[{"id": 1, "file_name": "a"}] * 2), "images: id: 1 repeated: 1"),
    (coco(categories=[{"id": 1, "name": None}]), "categories, item 1: the text under name is null"),
    (coco(categories=[{"id": 1, "name": "a"}] * 2), "categories: id: 1 repeated: 1"),
    (coco(annotations=[{"id": 1, "image_id": [1], "category_id": 1}]), r"image_id is \[1\], which"),
    (coco().replace('"id": 1, "file', '"id": 2, "id": 1, "file'), "has 'id' twice in one object"),
    ("[" * 200_000, "is nested too deeply"),
    ('{"images": ' + "9" * 5000, "is not usable JSON"),
]


def test_data_that_cannot_be_used(world: Path, tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="no data at"):
        CocoData(tmp_path / "absent")
    (tmp_path / "text.zip").write_text("hello")
    with pytest.raises(BadInput, match="neither a folder nor a readable .zip"):
        CocoData(tmp_path / "text.zip")
    (tmp_path / "empty").mkdir()
    with pytest.raises(BadInput, match=r"no annotations/instances"):
        CocoData(tmp_path / "empty")
    (world / "images" / "w_000000000003.png").unlink()
    with pytest.raises(BadInput, match=r"lacks 1 of 12 images, first w_000000000003\.png"):
        run(FakeModel(truthful), world, tmp_path / "out", n_images=None)
    assert not (tmp_path / "out").exists()
    (world / "images" / "w_000000000003.png").write_bytes(b"no picture")
    with pytest.raises(BadInput, match="not a readable image"):
        CocoData(world).image("w_000000000003.png")
    with pytest.raises(BadInput, match="lacks 1 of 1"):
        CocoData(world).image("../annotations/instances.json")
    for content, message in [
        ("[]", "has no images, annotations, categories"),
        ("{", r"instances\.json is not JSON \(Expecting property name .* at 2\): fetch or write"),
        ('{"images": [{}], "annotations": [], "categories": []}', "images, item 1: id is None"),
        *COCO_ROWS,
        (
            '{"images": [], "annotations": [{"id": 1, "image_id": 2, "category_id": 3}], '
            '"categories": []}',
            r"images it does not list: \[2\]",
        ),
    ]:
        (world / "annotations" / "instances.json").write_text(content)
        with pytest.raises(BadInput, match=message):
            CocoData(world)


def test_val_files_win_and_captions_follow_them(world: Path) -> None:
    notes = world / "annotations"
    for kind in ("instances", "captions"):
        text = (notes / f"{kind}.json").read_text()
        (notes / f"{kind}.json").unlink()
        (notes / f"{kind}_train2014.json").write_text("{}")
        (notes / f"{kind}_val2014.json").write_text(text)
    data = CocoData(world)
    assert data.instances_name == "annotations/instances_val2014.json"
    assert data.captions_name == "annotations/captions_val2014.json"
    (notes / "instances_val2017.json").write_text("{}")
    with pytest.raises(BadInput, match="several instances files"):
        CocoData(world)


def test_arm_names() -> None:
    assert list(named_arms(["var:keep=0.4", ["hiprune", "vhr"]])) == [
        "base",
        "var:keep=0.4",
        "hiprune+vhr",
    ]
    assert list(named_arms("var")) == ["base", "var"]
    objects = [PayAttentionToImage(), PayAttentionToImage(alpha=0.3)]
    stack = [PayAttentionToImage(alpha=0.1), "vhr"]
    assert list(named_arms([*objects, stack])) == [
        "base",
        "pai",
        "pai:alpha=0.3",
        "pai:alpha=0.1+vhr",
    ]
    with pytest.raises(BadInput, match="two arms are called 'pai:alpha=0.3'"):
        named_arms([objects[1], "pai:alpha=0.3"])
    with pytest.raises(BadInput, match=r"'var:a' and 'var_a' would share a file \(var_a\)"):
        named_arms(["var:a", "var_a"])


def test_file_names_fit_a_file_system() -> None:
    heads = "/".join(f"{layer}.{head}" for layer in range(32) for head in range(32))
    one, other = (file_name(f"head_pursuit:heads={heads}{end}") for end in ("", "/9"))
    assert len(one) == len(other) == 200 and one != other
    assert file_name("vcd:alpha=0;beta=0.1+pai:alpha=-2") == "vcd_alpha=0_beta=0.1+pai_alpha=-2"


def test_options_and_stacks_in_names_of_arms(world: Path, tmp_path: Path) -> None:
    """The plausibility mask alone, and it in a stack: arms like any other."""
    arms = ["vcd:alpha=0;beta=0.1", "carve:quantile=0.8+vcd:alpha=0;beta=0.1"]
    model = FakeModel(lambda m, s: truthful("var" if m == arms[1] else None, s), known=arms)
    results = run(model, world, tmp_path / "o", methods=arms)
    assert sorted(path.name for path in (tmp_path / "o").glob("*.jsonl")) == [
        "samples_pope_base.jsonl",
        "samples_pope_carve_quantile=0.8+vcd_alpha=0_beta=0.1.jsonl",
        "samples_pope_vcd_alpha=0_beta=0.1.jsonl",
    ]
    markdown = vlmfix.evals.to_markdown(results)
    assert f"{arms[0]}: every answer is the base's" in markdown
    assert f"{arms[1]}: every answer" not in markdown
    for arm in arms:
        assert markdown.count(f"|  | {arm} |") == 5
        for width in (85, 120):
            # A long name goes on in the next line; all of it is there.
            lines = shown(results, width).splitlines()
            start = next(line.index("arm") for line in lines if "accuracy %" in line)
            assert arm in "".join(line[start : start + 16].strip() for line in lines)


def shown(results: dict[str, Any], width: int) -> str:
    console = rich.console.Console(width=width, record=True, file=io.StringIO())
    console.print(vlmfix.evals.render(results))
    return console.export_text()


def test_table_shows_cost_beside_quality_and_never_cuts_a_number(
    world: Path, tmp_path: Path
) -> None:
    def reply(method: Any, sample: Sample) -> str:
        return truthful(
            "var" if zlib.crc32(f"{sample.sample_id} {method}".encode()) % 3 else None, sample
        )

    results = run(
        FakeModel(reply), world, tmp_path / "o", tasks=["pope", "chair"], methods=["var", "pai"]
    )
    figure = re.compile(r"[+-]?[0-9]+\.[0-9](?:±[0-9]+\.[0-9])?(?![0-9.])")
    figures = {width: sorted(figure.findall(shown(results, width))) for width in (85, 120, 200)}
    assert figures[85] == figures[120] == figures[200]
    text = shown(results, 120)
    assert any("accuracy %" in line and "Δ" in line for line in text.splitlines())
    assert not any("accuracy %" in line and "Δ" in line for line in shown(results, 85).splitlines())
    assert max(map(len, text.splitlines())) <= 120
    for word in ("random", "popular", "adversarial", "mean", "pooled", "passes", "tok/s"):
        assert word in text


def test_markdown(world: Path, tmp_path: Path) -> None:
    results = run(FakeModel(truthful), world, tmp_path / "o", methods=["var", "pai"])
    markdown = vlmfix.evals.to_markdown(results)
    rows = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in rows if "accuracy" in line or "base" in line}) <= 2
    assert "| random | base | 50.0 |" in markdown


def test_the_base_alone_has_no_columns_of_differences(world: Path, tmp_path: Path) -> None:
    results = run(FakeModel(truthful), world, tmp_path / "o", methods=[])
    heading = next(line for line in shown(results, 120).splitlines() if "accuracy %" in line)
    assert "Δ" not in heading and heading.split()[-2:] == ["passes", "tok/s"]
    assert "| split | arm | accuracy % | F1 % | yes % |" in vlmfix.evals.to_markdown(results)


def test_progress_goes_to_stderr(
    world: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(FakeModel(truthful), world, tmp_path / "o", quiet=False)
    captured = capsys.readouterr()
    assert captured.out == "" and "pope base" in captured.err
    assert f"answers go to {tmp_path / 'o'}; what is ended" in captured.err
    run(FakeModel(truthful), world, tmp_path / "o", quiet=False, resume=True)
    assert "180 of them from before" in capsys.readouterr().err


def test_import_is_light() -> None:
    code = (
        "import sys, vlmfix.evals, vlmfix.evals.harness;"
        "import vlmfix.evals.pope.task, vlmfix.evals.chair.task;"
        "print([m for m in ('torch', 'transformers', 'PIL', 'rich') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
