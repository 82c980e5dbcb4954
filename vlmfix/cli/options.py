"""The arguments and options of the command line; a name ending in _ is one command's own."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

from typer import Argument, Option

MODEL_HELP = "Hub id, local folder, or 'emoji' (bundled)."

Model = Annotated[str, Option("--model", "-m", help=MODEL_HELP)]
ModelArgument = Annotated[str, Argument(metavar="[MODEL]", help=MODEL_HELP)]
Methods = Annotated[
    str | None,
    Option(
        "--method",
        help="Alternatives after commas, stacks with +, options after a colon: "
        "'var,pai:alpha=0.3,var+pai'.",
    ),
]
Json = Annotated[bool, Option("--json", help="Print one JSON document, nothing else.")]
Dtype = Annotated[str | None, Option(help="bfloat16, float16 or float32.")]
Device = Annotated[str | None, Option(help="cpu, cuda, cuda:1; CUDA if there is one.")]
Threads = Annotated[int | None, Option(min=1, max=1024, help="Torch threads on the CPU.")]

MethodName = Annotated[str | None, Argument(metavar="[NAME]", help="One method, in full.")]
Save = Annotated[bool, Option(help="Keep it in the cache folder for later runs.")]
Beside = Annotated[bool, Option("--beside", help="Keep it in the model's own folder instead.")]
Only = Annotated[str | None, Option(help="Measure only these, of sinks,heads,gift.")]
Plots = Annotated[
    Path | None, Option(metavar="DIR", help="Draw the vision-aware heads into this folder.")
]
AllowNone = Annotated[
    bool, Option("--allow-none", help="Keep the finding that there are no sinks, too.")
]

Image = Annotated[str, Argument(help="Image file, data: URL, or emoji:N, the N-th bundled image.")]
Prompt = Annotated[str, Argument(help="What to ask about the image.")]
AnswerTokens = Annotated[int, Option("--max-new-tokens", min=1, help="Longest answer, in tokens.")]
Compare = Annotated[
    bool, Option("--compare", help="Base and methods side by side; all that fit if none is named.")
]

SaveRefined = Annotated[
    Path | None,
    Option(metavar="DIR", help="Write map, mask and refined image of carve into this folder."),
]

Task = Annotated[str | None, Argument(metavar="TASK[,TASK]", help="What to evaluate.")]
Tasks = Annotated[str | None, Option("--tasks", help="Same as TASK; 'list' lists them.")]
ListTasks = Annotated[bool, Option("--list", help="List the tasks and stop.")]
Suite = Annotated[
    str | None,
    Option(help="Several tasks with settled settings and one card: quick, pope or full."),
]
Data = Annotated[
    list[str] | None,
    Option(
        metavar="[TASK=]PATH",
        help="Data of all tasks (COCO format for pope and chair), or of one; bundled images if "
        "absent.",
    ),
]
ResultFolder = Annotated[
    Path | None,
    Option("--output", "--output-path", "--output_path", help="Folder for the results."),
]
BatchSize = Annotated[int, Option("--batch-size", "--batch_size", min=1, help="Rows at a time.")]
Seed = Annotated[int, Option(help="Of the choice of images, questions, intervals, sampling.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace earlier results in --output.")]

ScoredTask = Annotated[str, Argument(metavar="TASK", help="What the answers were given to.")]
Answers = Annotated[
    list[str],
    Option(
        "--answers",
        metavar="[SPLIT=]FILE",
        help="JSON Lines, a JSON list or .tsv; repeat it where each split has a file of its own.",
    ),
]
Baseline = Annotated[
    list[str] | None,
    Option(metavar="[SPLIT=]FILE", help="Answers to the same items to compare with, as a pair."),
]
AnsweredQuestions = Annotated[
    list[str] | None,
    Option(
        "--questions",
        metavar="[SPLIT=]FILE",
        help="The POPE questions that were answered; our own records hold them themselves.",
    ),
]
Annotations = Annotated[
    Path | None,
    Option(metavar="PATH", help="The task's data, as --data of `vlmfix eval` takes it."),
]
ScoreParser = Annotated[
    str, Option("--parser", help="How yes/no answers are read; 'all' compares the rules.")
]

RunFolder = Annotated[
    Path, Argument(metavar="DIR", help="Folder of a run, or of several runs, at any depth.")
]
CardPlots = Annotated[
    bool, Option("--plots/--no-plots", help="Draw differences, and CHAIRi against recall.")
]

AttributionData = Annotated[
    Path | None,
    Option("--data", help="Folder or .zip in COCO format; emoji images for tuning if absent."),
]
AttributionImages = Annotated[int, Option("--limit", min=1, help="Images to describe.")]
Top = Annotated[float, Option(help="How many heads to name: a number from 1, or a share below 1.")]
KeepHeads = Annotated[
    bool, Option("--save", help="Keep the heads in the calibration, where ad_hh finds them.")
]

BenchModels = Annotated[
    str,
    Option(
        "--model",
        "-m",
        help="emoji, llava-300m, llava-1.5-7b, qwen2.5-vl-7b (random weights but for emoji).",
    ),
]
BenchDtypes = Annotated[str, Option(help="bfloat16, float32, or both.")]
BenchDevices = Annotated[
    str | None, Option("--device", help="cpu, cuda, or both; the 7B shapes only on CUDA if absent.")
]
TextTokens = Annotated[
    int | None, Option(min=1, help="Text tokens after the image; 28 if absent. Not for emoji.")
]
CacheKind = Annotated[str, Option("--cache", help="KV cache: dynamic or static.")]
Compile = Annotated[
    bool, Option("--compile", help="Compile the decode steps; implies --cache static.")
]
PlotFile = Annotated[
    Path | None, Option("--plot", help="Draw the ratios to this image file; needs matplotlib.")
]
Rounds = Annotated[int, Option(min=1, help="Timed turns of every arm.")]
BenchTokens = Annotated[int, Option("--new-tokens", min=4, help="Tokens per turn.")]
CsvFile = Annotated[Path | None, Option("--output", help="Append the rows to this csv file.")]
Quick = Annotated[bool, Option("--quick", help="Small and short; the numbers mean little.")]
BenchThreads = Annotated[int, Option(min=1, max=1024, help="Torch threads on the CPU.")]

Host = Annotated[str, Option(help="Address to listen on; beyond loopback others can use it.")]
Port = Annotated[int | None, Option(min=1, max=65535, help="The first free one from 7860.")]
AllowHost = Annotated[
    list[str] | None,
    Option(
        metavar="NAME", help="A further host name of the server, such as a proxy's; repeatable."
    ),
]
AllowModelChoice = Annotated[
    bool, Option("--allow-model-choice", help="Visitors may load models; on loopback only.")
]
OpenBrowser = Annotated[bool, Option("--open", help="Open the page in the browser.")]
