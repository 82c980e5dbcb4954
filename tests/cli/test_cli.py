"""The command line: in this process, and three times through its real entry point."""

from __future__ import annotations

import contextlib
import json
import os
import re
import subprocess
import sys
import zipfile
from dataclasses import fields
from io import StringIO
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import tiny
import tiny_folders
import torch
from PIL import Image

from vlmfix import evals
from vlmfix.cli import show
from vlmfix.cli.main import main
from vlmfix.emoji import evaluation_split
from vlmfix.errors import BadInput
from vlmfix.evals.options import Options, flags

ROOT = Path(__file__).resolve().parents[2]
# Three layers: without the last one VAR would have none to edit.
FORCED_VAR = "var:sink_channels=0/1/2;tau=1;last_layer=official"


def started(*arguments: object, timeout: float = 240) -> subprocess.CompletedProcess[str]:
    """A real start, which takes seconds: three tests have one, for what only it can show."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "120", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, "-m", "vlmfix", *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=timeout,
    )


def vlmfix(*arguments: object) -> subprocess.CompletedProcess[str]:
    """The same in this process, which has paid for importing torch already."""
    out, err = StringIO(), StringIO()
    code: Any = 0
    with (
        mock.patch.object(sys, "argv", ["vlmfix", *map(str, arguments)]),
        mock.patch.dict(os.environ, COLUMNS="120", NO_COLOR="1"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as stop:
            code = stop.code
    return subprocess.CompletedProcess(arguments, code or 0, out.getvalue(), err.getvalue())


def document(*arguments: object) -> Any:
    """The one JSON document that a command prints, and nothing else."""
    done = vlmfix(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def refused(*arguments: object, says: str) -> None:
    done = vlmfix(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert says in " ".join(done.stderr.split())


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_folders.save("llava", tmp_path_factory.mktemp("llava"), with_processor=True)


@pytest.fixture(scope="module")
def picture(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("images") / "picture.png"
    Image.effect_noise((40, 30), 90).convert("RGB").save(path)
    return path


def test_help_is_quick_and_needs_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['vlmfix', '--help']\n"
        "from vlmfix.cli.main import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print('torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "generate" in done.stdout
    assert done.stdout.splitlines()[-1] == "False"
    assert min(_help_seconds() for _ in range(3)) < 0.5


def _help_seconds() -> float:
    """Of the processor: other tests run at the same time."""
    before = os.times()
    started("--help")
    after = os.times()
    return (
        after.children_user + after.children_system - before.children_user - before.children_system
    )


def test_every_option_of_an_evaluation_is_on_its_command_line() -> None:
    shown = vlmfix("eval", "--help").stdout
    flat = " ".join(re.sub("[^ -~]", " ", shown).split())
    for item in fields(Options):
        assert f" {flags(item)[0]}" in flat, item.name
        assert item.metadata["help"].split()[0] in flat


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), {}),
        (("--images", "all", "--splits", "random, small"), {"splits": ["random", "small"]}),
        (("--questions", "a=b=c", "--questions", "d=e"), {"questions": {"a": "b=c", "d": "e"}}),
        (("--batch_size", 3, "--output_path", "o", "--noop"), {"batch_size": 3, "noop": True}),
    ],
)
def test_options_reach_the_evaluation(
    arguments: tuple[object, ...], expected: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Options] = []

    def evaluate(*positional: Any, **named: Any) -> Any:
        given.append(positional[4])
        raise BadInput("seen")

    monkeypatch.setattr(evals, "evaluate", evaluate, raising=False)
    assert "seen" in vlmfix("eval", "pope", *arguments).stderr
    (options,) = given
    images = {"n_images": None} if "--images" in arguments else {}
    output = {"output": Path("o")} if "--output_path" in arguments else {}
    assert options == Options(**expected, **images, **output)


@pytest.mark.parametrize("command", [("eval", "pope"), ("attribute",), ("bench",), ("demo",)])
def test_threads_have_a_limit(command: tuple[str, ...]) -> None:
    """torch starts as many as it is told, and dies of millions."""
    refused(*command, "--threads", 99_999_999, says="1024")


def test_version() -> None:
    import vlmfix as package

    assert started("--version").stdout.split() == ["vlmfix", package.__version__]


def test_methods() -> None:
    names = {row["name"] for row in document("methods")}
    assert {"var", "pai"} <= names
    assert "2503.03321" in vlmfix("methods").stdout


def test_one_method() -> None:
    info = document("methods", "var")
    assert "keep" in {option["name"] for option in info["options"]}
    shown = vlmfix("methods", "var").stdout
    assert "keep" in shown
    assert info["doc"].splitlines()[0] in shown


def test_doctor(tmp_path: Path) -> None:
    folder = tiny_folders.save("qwen2_5_vl", tmp_path)
    report = document("doctor", folder, "--device", "cpu")
    assert report["model_type"] == "qwen2_5_vl"
    assert report["layers"] == 3
    assert {"var", "pai"} <= {row["name"] for row in report["methods"]}
    shown = vlmfix("doctor", folder)
    assert shown.returncode == 0, shown.stderr
    assert "qwen2_5_vl" in shown.stdout


def test_generate_prints_the_answer_alone(llava: Path, picture: Path) -> None:
    command = ("generate", picture, "is there a dog ?", "--model", llava, "--max-new-tokens", 5)
    answers = document(*command)["answers"]
    assert [arm["method"] for arm in answers] == ["base"]
    plain = started(*command)
    assert plain.returncode == 0, plain.stderr
    assert plain.stdout.split() == answers[0]["answer"].split()


def test_generate_compares_base_and_methods(llava: Path, picture: Path) -> None:
    command = ("generate", picture, "is there a dog ?", "--model", llava, "--max-new-tokens", 5)
    methods = ("--method", f"pai:alpha=3,{FORCED_VAR}+pai", "--compare")
    answers = document(*command, *methods)["answers"]
    assert [arm["method"] for arm in answers] == ["base", "pai:alpha=3", f"{FORCED_VAR}+pai"]
    assert answers[0]["last_call"] is None
    assert all(arm["last_call"]["edited_rows"] > 0 for arm in answers[1:])
    assert answers[2]["last_call"]["notes"]["var"]["visual_sinks"]
    shown = vlmfix(*command, *methods)
    assert shown.returncode == 0, shown.stderr
    assert "pai:alpha=3" in shown.stdout
    assert "visual sinks" in shown.stdout


def test_compare_without_methods_takes_those_that_fit(llava: Path, picture: Path) -> None:
    command = ("generate", picture, "a dog ?", "--model", llava, "--compare", "--max-new-tokens", 4)
    answers = document(*command)["answers"]
    fitting = [name for name, fits in _fits(llava).items() if fits]
    assert "pai" in fitting and "var" not in fitting
    assert [arm["method"] for arm in answers] == ["base", *fitting]
    said = vlmfix(*command)
    assert said.returncode == 0 and "var is left out: var does not know" in said.stderr


def test_the_bundled_model_is_the_default() -> None:
    command = ("generate", "emoji:1", "Describe the image.", "--method", "pai", "--compare")
    base, pai = document(*command)["answers"]
    assert len(base["answer"].split()) > 4
    assert pai["last_call"]["edited_rows"] > 0
    shown = vlmfix(*command).stdout
    assert f"{pai['last_call']['edited_rows']} rows edited" in shown
    assert base["answer"].split()[0] in shown


def test_refined_images_are_saved_on_request(tmp_path: Path) -> None:
    question = "Is there a sports ball in the image?"
    folder = tmp_path / "refined"
    command = ("generate", "emoji:5", question, "--method", "carve,carve:p=0.1+pai")
    arms = document(*command, "--save-refined", folder)["answers"]
    facts = [arm["last_call"]["pixels"]["carve"] for arm in arms]
    assert facts[0]["changed"] and facts[0]["answer"] and len(facts[0]["box"]) == 4
    stems = ("carve", "carve-p=0.1-pai")
    names = [[f"{stem}-{what}.png" for what in ("map", "mask", "refined")] for stem in stems]
    assert [[Path(file).name for file in one["files"]] for one in facts] == names
    assert sorted(path.name for path in folder.iterdir()) == sorted(sum(names, []))
    shown = vlmfix(*command).stdout
    assert f"carve: box ({', '.join(map(str, facts[0]['box']))}) enlarged" in " ".join(
        shown.split()
    )
    assert "files" not in document(*command)["answers"][0]["last_call"]["pixels"]
    refused(
        "generate", "emoji:5", question, "--method", "pai", "--save-refined", folder,
        says="no method that refines images",
    )  # fmt: skip


def test_changed_words_stand_out() -> None:
    text = show.changed_words("a dog and a cat", "a dog and a red car")
    marked = {text.plain[span.start : span.end] for span in text.spans}
    assert text.plain == "a dog and a red car"
    assert marked == {"red", "car"}


def test_json_has_no_nan() -> None:
    assert json.loads(show.to_json({"a": [float("nan"), 1.5], "b": (None, Path("x"))})) == {
        "a": [None, 1.5],
        "b": [None, "x"],
    }


def test_markup_in_an_answer_is_not_obeyed(capsys: pytest.CaptureFixture[str]) -> None:
    arm = {"method": "base", "answer": "[red]dog[/red]", "last_call": None}
    show.report(False, None, show.answers([arm, arm]))
    show.report(False, None, "[red]cat[/red]")
    shown = capsys.readouterr().out
    assert "[red]dog[/red]" in shown
    assert "[red]cat[/red]" in shown


def test_what_libraries_print_stays_out_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    for active in (True, False):
        with show.only_stderr(active):
            print("loading")
        captured = capsys.readouterr()
        assert (captured.err, captured.out)[not active] == "loading\n"
        assert (captured.out, captured.err)[not active] == ""


def test_an_unknown_method(picture: Path) -> None:
    refused("methods", "vra", says="vlmfix methods")
    refused("generate", picture, "what ?", "--method", "vra", says="vlmfix methods")


def test_an_unknown_option(picture: Path) -> None:
    refused("generate", picture, "what ?", "--method", "var:kepe=1", says="no option 'kepe'")


def test_an_option_out_of_range(picture: Path) -> None:
    refused("generate", picture, "what ?", "--method", "var:keep=7", says="keep")


def test_a_text_only_model(tmp_path: Path) -> None:
    folder = tiny_folders.save("llama", tmp_path)
    refused("doctor", folder, says="text-only")


def test_a_missing_image() -> None:
    refused("generate", "absent.png", "what ?", says="no image file absent.png")


def test_a_corrupt_image(picture: Path, tmp_path: Path) -> None:
    half = tmp_path / "half.png"
    half.write_bytes(picture.read_bytes()[:400])
    refused("generate", half, "what ?", says="damaged")


def test_a_folder_without_config(tmp_path: Path) -> None:
    refused("doctor", tmp_path, says="no config.json in the folder")


def test_an_unknown_task() -> None:
    refused("eval", "pop", says="pope")


def test_no_task() -> None:
    refused("eval", says="chair")


def test_the_demo_lets_nobody_from_outside_choose_models() -> None:
    for host in ("0.0.0.0", "192.168.1.5", "example.org"):
        refused("demo", "--allow-model-choice", "--host", host, says="works on 127.0.0.1 only")


def test_the_demo_of_a_model_that_is_not_there(tmp_path: Path) -> None:
    refused("demo", tmp_path, says="no config.json in the folder")


def test_the_demo_without_gradio() -> None:
    code = (
        "import sys; sys.modules['gradio'] = None; sys.argv = ['vlmfix', 'demo']\n"
        "from vlmfix.cli.main import main; main()"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip
    assert done.returncode == 2
    assert "pip install 'vlmfix[demo]'" in done.stderr


def test_the_list_of_tasks() -> None:
    names = {row["name"] for row in document("eval", "--list")}
    assert {"chair", "pope"} <= names
    assert document("eval", "--tasks", "list") == document("eval", "--list")


def test_eval_of_some_images_and_of_ready_made_questions(llava: Path, tmp_path: Path) -> None:
    command = ("eval", "pope", "--model", llava, "--max-new-tokens", 2)
    few = document(*command, "--images", 3, "--output", tmp_path / "few")
    assert few["tasks"]["pope"]["n_images"] == 3
    question = {"question_id": 1, "text": "Is there a dog in the image?", "label": "no"}
    file = tmp_path / "random.json"
    file.write_text(json.dumps({**question, "image": "emoji_000000000001.png"}) + "\n")
    asked = ("--questions", f"random={file}", "--output", tmp_path / "own")
    assert document(*command, *asked)["tasks"]["pope"]["n_samples"] == 1
    refused(*command, "--images", "some", says="a number of images, or 'all'")
    refused(*command, "--questions", "random.json", says="write SPLIT=FILE")


def test_eval_compares_base_and_method(llava: Path, tmp_path: Path) -> None:
    command = ("eval", "pope", "--model", llava, "--method", "pai:alpha=3", "--limit", 2)
    results = document(*command, "--output", tmp_path / "one")
    assert set(results["tasks"]["pope"]["arms"]) == {"base", "pai:alpha=3"}
    assert results["errors"] == 0
    assert (tmp_path / "one" / "results.json").is_file()
    shown = vlmfix(*command, "--output_path", tmp_path / "two")
    assert shown.returncode == 0, shown.stderr
    assert "PARTIAL" in shown.stdout
    assert str(tmp_path / "two") in shown.stdout
    refused(*command, "--output", tmp_path / "one", says="--overwrite")


def test_eval_goes_on_where_it_was_ended(llava: Path, tmp_path: Path) -> None:
    command = ("eval", "pope", "--model", llava, "--limit", 1, "--max-new-tokens", 2, "--noop")
    output = ("--output", tmp_path / "o", "--temperature", 1.0, "--greedy-too")
    first = document(*command, *output, "--resume")
    arms = first["tasks"]["pope"]["arms"]
    assert list(arms) == ["base", "noop", "base greedy", "noop greedy"]
    assert arms["noop"]["same_as_base"] == 1 and arms["noop"]["flags"] == arms["base"]["flags"]
    again = document(*command, *output, "--resume")
    assert (first["resumed"], again["resumed"]) == (0, 4 * first["tasks"]["pope"]["n_samples"])
    refused(*command, *output, "--resume", "--seed", 3, says="seed: 0 then, 3 now")
    refused(*command, "--greedy-too", says="without a temperature")


def test_eval_takes_data_by_task(llava: Path, tmp_path: Path) -> None:
    command = ("eval", "pope,chair", "--model", llava, "--limit", 1, "--max-new-tokens", 2)
    path = tmp_path / "a=b.zip"
    path.write_bytes(Path(evaluation_split()).read_bytes())
    output = ("--output", tmp_path / "o")
    found = document(*command, "--data", path, "--data", f"chair={evaluation_split()}", *output)
    named = {name: entry["data"] for name, entry in found["tasks"].items()}
    assert named == {"pope": "a=b.zip", "chair": Path(evaluation_split()).name}
    refused(*command, "--data", "a", "--data", "b", says="both given for all tasks")


def test_eval_fails_if_an_item_failed(llava: Path, tmp_path: Path) -> None:
    data = tmp_path / "damaged.zip"
    with zipfile.ZipFile(evaluation_split()) as good, zipfile.ZipFile(data, "w") as bad:
        for name in good.namelist():
            whole = good.read(name)
            bad.writestr(name, whole[:60] if name.startswith("images/") else whole)
    command = ("eval", "--tasks", "pope", "--model", llava, "--limit", 1, "--data", data)
    done = vlmfix(*command, "--output", tmp_path / "out", "--json")
    assert done.returncode == 1, done.stderr
    assert json.loads(done.stdout)["errors"] > 0
    assert "items failed; the first:" in done.stderr
    assert "not recorded" not in done.stderr


def test_calibration_makes_var_fit(tmp_path: Path) -> None:
    model = tiny.build("llava").model
    with torch.no_grad():
        # One massive channel at the first token, as trained models have.
        model.get_input_embeddings().weight[1, 5] = 40
    model.save_pretrained(tmp_path)
    tiny_folders.processor().save_pretrained(tmp_path)
    command = ("eval", "pope", "--model", tmp_path, "--method", "var")
    refused(*command, says="vlmfix calibrate")
    assert not _fits(tmp_path)["var"]
    found = document("calibrate", tmp_path)
    assert 5 in found["sink_channels"]
    assert Path(found["path"]).is_file()
    assert _fits(tmp_path)["var"]
    beside = document("calibrate", tmp_path, "--beside")["path"]
    assert Path(beside).parent == tmp_path


def test_calibration_of_some_parts_draws_a_map(llava: Path, tmp_path: Path) -> None:
    sinks = ("calibrate", llava, "--only", "sinks", "--allow-none", "--no-save")
    refused(*sinks, "--plots", tmp_path / "none", says="--only heads")
    assert not (tmp_path / "none").exists()
    command = ("calibrate", llava, "--only", "heads,gift", "--plots", tmp_path / "maps")
    found = document(*command)
    assert found["sink_channels"] is None and len(found["vision_heads"]) == 3
    assert (tmp_path / "maps" / "vision_heads.png").is_file()
    shown = vlmfix(*command, "--no-save")
    assert shown.returncode == 0, shown.stderr
    assert "largest VHD in" in shown.stdout and "sink channels" not in shown.stdout
    refused("calibrate", llava, "--only", "sink", says="sinks, heads, gift")


def test_attribution_is_kept_for_ad_hh(tmp_path: Path) -> None:
    # The bundled model would take minutes: a tiny one that can say nothing but objects.
    objects = {"dog", "cat", "car", "person", "chair", "cup", "book", "bench", "bird"}
    with mock.patch.object(tiny_folders, "WORDS", ("image", *sorted(objects))):
        tiny_folders.save("llava", tmp_path / "model", with_processor=True)
        vocabulary = tiny_folders.tokenizer().get_vocab()
    config = {"suppress_tokens": [n for word, n in vocabulary.items() if word not in objects]}
    (tmp_path / "model" / "generation_config.json").write_text(json.dumps(config))
    command = ("attribute", tmp_path / "model", "--limit", 12, "--max-new-tokens", 5)
    results = document(*command, "--output", tmp_path / "one", "--save")
    assert len(results["heads"]) == 12 and 0 < results["n_hallucinated"] < results["n_mentions"]
    report = document("doctor", tmp_path / "model")
    assert report["calibration"]["hallucination_heads"] == results["hallucination_heads"]
    shown = vlmfix(*command, "--output", tmp_path / "two", "--top", 2)
    assert shown.returncode == 0, shown.stderr
    assert "hallucination head" in shown.stdout and str(tmp_path / "two") in shown.stdout
    refused(*command, "--output", tmp_path / "one", says="--overwrite")
    refused(*command, "--top", 0, says="a number of heads")


def _fits(folder: Path) -> dict[str, bool]:
    return {row["name"]: row["fits"] for row in document("doctor", folder)["methods"]}


def test_bench(tmp_path: Path) -> None:
    path, plot = tmp_path / "bench.csv", tmp_path / "bench.png"
    command = ("bench", "--model", "llava-300m", "--quick", "--dtype", "float32", "--output", path)
    more = ("--plot", plot, "--text-tokens", "9", "--cache", "static", "--device", "cpu")
    report = document(*command, *more)
    arms = ["plain", "two products", "var", "vhr", "pai"]
    assert [row["arm"] for row in report["rows"]] == arms
    assert {(row["prompt"], row["cache"]) for row in report["rows"]} == {(49, "static")}
    assert len(path.read_text().splitlines()) == 1 + len(arms)
    assert plot.is_file()
    refused("bench", "--model", "gpt", says="llava-300m")
