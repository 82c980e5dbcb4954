"""Fill the generated parts of README.md and docs from the registry and from result files.

    python docs/generate.py           write them
    python docs/generate.py --check   exit 1 and name the files that are out of date
    python docs/generate.py --models  run every method on every tiny model first (minutes)
    python docs/generate.py --drift   run them and print what differs from what is written

A generated part stands between `<!-- generated: WHAT -->` and `<!-- end -->`. docs/results/pruning/
kept.csv is generated as a whole.
"""

from __future__ import annotations

import csv
import io
import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent))
import model_table

from vlmfix import emoji
from vlmfix.evals import to_markdown
from vlmfix.registry import build, describe, list_methods

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "docs" / "results"
KEPT = RESULTS / "pruning" / "kept.csv"
_PART = re.compile(r"(<!-- generated: ([^>]*) -->\n).*?(<!-- end -->)", re.DOTALL)


#: Headings of the README's list of methods, by stage.
_STAGES = {
    "attention": "Attention in the language model, edited",
    "hidden": "Hidden states, edited",
    "logits": "Logits, contrasted with those of a second view of the prompt",
    "pixels": "The image, changed before it is encoded",
    "tokens": "Visual tokens, pruned",
}
#: A paper as the table of methods names it: what to show, and its number.
_PAPER = re.compile(r"(^|, and )(.+?), (arXiv|OpenReview) ([\w.]+)(?=,|$)")
_ADDRESSES = {"arXiv": "https://arxiv.org/abs/", "OpenReview": "https://openreview.net/forum?id="}


def methods() -> str:
    """The methods by stage, one line each."""
    lines = []
    rows = [row for row in list_methods() if row.target.startswith("vlmfix.")]
    for stage in sorted({row.stage for row in rows}, key=list(_STAGES).index):
        lines += [f"**{_STAGES[stage]}**", ""]
        lines += [
            f"- [`{row.name}`](docs/methods/{row.name}.md): {row.summary} {_linked(row.paper)}"
            for row in rows
            if row.stage == stage
        ]
        lines.append("")
    return "\n".join(lines)


def _linked(papers: str) -> str:
    """Papers as the table of methods names them, as links where they have a number."""
    return _PAPER.sub(
        lambda found: f"{found[1]}[{found[2]}]({_ADDRESSES[found[3]]}{found[4]})", papers
    )


def method(name: str) -> str:
    """The head of a method's page: summary, paper, options, presets."""
    facts = describe(name)
    lines = [
        facts["summary"],
        "",
        f"Paper: {facts['paper']}. Stage: {facts['stage']}. Code: `{facts['target']}`.",
        "",
        "| option | default | |",
        "|---|---|---|",
        *(f"| `{o['name']}` | `{o['default']}` | {o['help']} |" for o in facts["options"]),
    ]
    if facts["presets"]:
        lines += ["", "| preset for | values | source |", "|---|---|---|"]
        for preset in facts["presets"]:
            values = ", ".join(f"{key} {value}" for key, value in preset["values"].items())
            lines.append(f"| {preset['model']} | {values} | {preset['source']} |")
    return "\n".join(lines) + "\n"


#: Columns of the table of the evaluation: task, place, metric, heading.
_COLUMNS = (
    ("pope", "random", "accuracy", "POPE random"),
    ("pope", "popular", "accuracy", "popular"),
    ("pope", "adversarial", "accuracy", "adversarial"),
    ("chair", "caption", "chair_s", "CHAIRs"),
    ("chair", "caption", "chair_i", "CHAIRi"),
    ("chair", "caption", "recall", "recall"),
)


#: Columns of the excerpt of it in the README.
_EXCERPT = (
    ("pope", "adversarial", "accuracy", "POPE adversarial"),
    ("chair", "caption", "chair_i", "CHAIRi"),
    ("chair", "caption", "recall", "recall"),
)


def results() -> str:
    """The committed evaluation of the bundled model, one row per arm."""
    return _arms_table(list(_results()["tasks"]["pope"]["arms"]), _COLUMNS)


def excerpt(*arms: str) -> str:
    """Some arms and columns of it; figures that a narrow screen does not tear apart."""
    return _arms_table(arms, _EXCERPT).replace(" ± ", "\N{NO-BREAK SPACE}±\N{NO-BREAK SPACE}")


def _arms_table(arms: Sequence[str], columns: Sequence[tuple[str, str, str, str]]) -> str:
    tasks = _results()["tasks"]
    lines = [
        "| | " + " | ".join(heading for *_, heading in columns) + " |",
        "|---|" + "---|" * len(columns),
    ]
    for arm in arms:
        cells = [
            _cell(tasks[task]["arms"][arm], place, metric) for task, place, metric, _ in columns
        ]
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


#: Rows of a method page's table: task, place, metric, heading.
_MEASURED = (
    ("pope", "pooled", "accuracy", "POPE accuracy"),
    ("pope", "adversarial", "accuracy", "POPE accuracy, adversarial"),
    ("pope", "pooled", "yes_ratio", "POPE, share of yes"),
    ("chair", "caption", "chair_s", "CHAIRs"),
    ("chair", "caption", "chair_i", "CHAIRi"),
    ("chair", "caption", "recall", "recall of objects"),
)


def measured(name: str) -> str:
    """What the committed evaluation of the bundled model says of one method."""
    tasks = _results()["tasks"]
    lines = ["| bundled model, per cent | base | method | difference |", "|---|---:|---:|---:|"]
    for task, place, metric, heading in _MEASURED:
        arms = tasks[task]["arms"]
        base, scored = arms["base"]["scores"][place][metric], arms[name]["scores"][place][metric]
        cells = [_figure(score, "{:.1f}") for score in (base, scored)]
        cells.append(_figure(arms[name]["delta"][place][metric], "{:+.1f}"))
        lines.append(f"| {heading} | {' | '.join(cells)} |")
    lines += ["", "± half a 95 % interval; default options; `make eval-full`."]
    return "\n".join(lines) + "\n"


def _cell(scored: dict[str, Any], place: str, metric: str) -> str:
    """What an arm scored and, in brackets, the difference to base."""
    figure = _figure(scored["scores"][place][metric], "{:.1f}")
    if "delta" not in scored:
        return figure
    return f"{figure} ({_figure(scored['delta'][place][metric], '{:+.1f}')})"


def _figure(score: dict[str, Any], form: str) -> str:
    low, high = score["ci"]
    return f"{form.format(100 * score['value'])} ± {50 * (high - low):.1f}"


def full_results(file: str = "emoji/results.json") -> str:
    """An evaluation with every split, metric and test."""
    return to_markdown(_results(file))


def _results(file: str = "emoji/results.json") -> dict[str, Any]:
    content: dict[str, Any] = json.loads((RESULTS / file).read_text())
    return content


#: Columns of the table of contrastive and pixel methods: files, task, place, metric, heading.
_CONTRAST = (
    ("greedy", "pope", "adversarial", "accuracy", "POPE adversarial"),
    ("sampled", "pope", "adversarial", "accuracy", "the same, T = 1"),
    ("greedy", "pope", "small", "accuracy", "small objects"),
    ("greedy", "chair", "caption", "chair_s", "CHAIRs"),
    ("greedy", "chair", "caption", "chair_i", "CHAIRi"),
    ("greedy", "chair", "caption", "recall", "recall"),
)


def contrast(method: str = "") -> str:
    """The committed evaluation of methods that contrast logits or change images; or of one."""
    runs = {kind: _arms(sorted((RESULTS / "contrast").glob(f"{kind}*.json"))) for kind in _KINDS}
    lines = [
        "| | " + " | ".join(heading for *_, heading in _CONTRAST) + " | rows per token |",
        "|---|" + "---|" * (len(_CONTRAST) + 1),
    ]
    for arm in runs["greedy"]:
        if not arm.startswith(("base", method)):
            continue
        cells = []
        for kind, task, place, metric, _ in _CONTRAST:
            scored = runs[kind].get(arm, {}).get(task)
            cells.append("" if scored is None else _cell(scored, place, metric))
        cost = runs["greedy"][arm]["chair"]["cost"]
        rows = cost["passes_per_answer"] * cost["answers"] / cost["new_tokens"]
        cells.append(f"{rows:.2f}")
        lines.append(f"| {arm} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


_KINDS = ("greedy", "sampled")


def _arms(files: list[Path]) -> dict[str, dict[str, Any]]:
    """Arm -> task -> scores, of several runs whose base must have answered alike."""
    found: dict[str, dict[str, Any]] = {}
    for file in files:
        for task, entry in json.loads(file.read_text())["tasks"].items():
            for arm, scored in entry["arms"].items():
                known = found.setdefault(arm, {}).setdefault(task, scored)
                if known["scores"] != scored["scores"]:
                    raise SystemExit(f"{file.name}: {arm} scores otherwise than in another run")
    return found


#: Columns of a pruning method's table: task, place, metric, heading.
_PRUNED = (
    ("pope", "pooled", "accuracy", "POPE accuracy"),
    ("pope", "pooled", "yes_ratio", "POPE, share of yes"),
    ("chair", "caption", "chair_s", "CHAIRs"),
    ("chair", "caption", "chair_i", "CHAIRi"),
    ("chair", "same_length", "chair_i", "CHAIRi, same length"),
    ("chair", "caption", "recall", "recall"),
)
#: What kept.csv holds besides: task, place, metric. Words are a mean count, all else is a share.
_IN_CSV = (
    *(("pope", split, "accuracy") for split in ("random", "popular", "adversarial")),
    ("chair", "caption", "words"),
    *(("chair", "same_length", metric) for metric in ("chair_s", "recall", "words")),
)
#: The metrics that McNemar's test is about.
_TESTED = ("accuracy", "chair_s")


def _pruning_arms() -> list[tuple[dict[str, Any], dict[str, Any]]]:
    """(what an arm keeps, its scores by task) of the committed runs, most tokens first."""
    config = json.loads((emoji.model_path() / "config.json").read_text())
    count = config["image_seq_length"]
    arms = []
    for arm, tasks in _arms(sorted((RESULTS / "pruning").glob("kept_*.json"))).items():
        name, _, text = arm.partition(":")
        options = [option for option in text.split(";") if not option.startswith("ratio=")]
        tokens = count if arm == "base" else build(arm).budget(count)
        facts = {"method": name, "options": ";".join(options), "tokens": tokens}
        scored = tasks | {"chair": _with_same_length(tasks["chair"])}
        arms.append((facts | {"share": tokens / count}, scored))
    return sorted(arms, key=lambda arm: -arm[0]["tokens"])


def _with_same_length(scored: dict[str, Any]) -> dict[str, Any]:
    """Captions cut to the length of the base's, and the base's to theirs, as one more place."""
    if "matched_length" not in scored:
        return scored
    matched = scored["matched_length"]
    return {
        "scores": scored["scores"] | {"same_length": matched["method"]["caption"]},
        "delta": scored["delta"] | {"same_length": matched["delta"]["caption"]},
    }


def _label(facts: dict[str, Any]) -> str:
    return ":".join(filter(None, (facts["method"], facts["options"])))


def pruning(task: str, place: str, metric: str) -> str:
    """One metric of the runs with pruning: arms down, tokens kept across."""
    table: dict[str, dict[int, str]] = {}
    drawn: dict[int, list[float]] = {}
    arms = _pruning_arms()
    for facts, tasks in arms:
        tokens, scored = facts["tokens"], tasks[task]
        if place not in scored["scores"]:
            continue
        table.setdefault(_label(facts), {})[tokens] = _cell(scored, place, metric)
        if facts["method"] == "random":
            score = scored["scores"][place][metric]["value"]
            drawn.setdefault(tokens, []).append(100 * score)
    table["random, mean and sd of the draws"] = {
        tokens: f"{statistics.mean(scores):.1f}, {statistics.stdev(scores):.1f}"
        for tokens, scores in drawn.items()
    }
    budgets = list(dict.fromkeys(facts["tokens"] for facts, _ in arms))
    lines = [
        f"| of {budgets[0]} tokens kept | " + " | ".join(map(str, budgets)) + " |",
        "|---|" + "---|" * len(budgets),
    ]
    for label, cells in table.items():
        lines.append(f"| {label} | {' | '.join(cells.get(tokens, '') for tokens in budgets)} |")
    return "\n".join(lines) + "\n"


def pruned(name: str) -> str:
    """The runs with pruning, of one method."""
    lines = [
        "| | tokens | " + " | ".join(heading for *_, heading in _PRUNED) + " |",
        "|---|---|" + "---|" * len(_PRUNED),
    ]
    for facts, tasks in _pruning_arms():
        if facts["method"] in ("base", name):
            cells = [
                _cell(tasks[task], place, metric) if place in tasks[task]["scores"] else ""
                for task, place, metric, _ in _PRUNED
            ]
            lines.append(f"| {_label(facts)} | {facts['tokens']} | {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


def kept_csv() -> str:
    """docs/results/pruning/kept.csv: one row per arm, place and metric of the runs with pruning.

    `low` and `high` bound a 95 % interval, `delta` is the paired difference to base, `p` that of
    exact McNemar, empty where there is none.
    """
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    numbered = ["value", "low", "high", "delta", "delta_low", "delta_high", "p"]
    rows.writerow(["method", "options", "tokens", "share", "task", "place", "metric", *numbered])
    for facts, tasks in _pruning_arms():
        for task, place, metric, *_ in (*_PRUNED, *_IN_CSV):
            scored = tasks[task]
            if place not in scored["scores"]:
                continue
            score = scored["scores"][place][metric]
            numbers = [score["value"], *score["ci"]]
            if "delta" in scored:
                delta = scored["delta"][place]
                numbers += [delta[metric]["value"], *delta[metric]["ci"]]
                numbers += [delta["mcnemar"]["p"]] if metric in _TESTED else []
            cells = [f"{number:.6g}" for number in numbers]
            cells += [""] * (len(numbered) - len(cells))
            rows.writerow([*facts.values(), task, place, metric, *cells])
    return text.getvalue()


def benchmarks(name: str) -> str:
    """One row per arm of a file that `vlmfix bench` wrote: median ratios over plain."""
    with (ROOT / "docs" / "benchmarks" / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["arm"] != "plain"]
    lines = [
        "| model | dtype | B | K | method | rows | tokens/s | over two products "
        "| time to first token | peak | KV cache |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        cells = [row[key] for key in ("model", "dtype", "batch", "prompt", "arm", "streams")]
        for quantity in (
            "tokens_per_second_over_plain",
            "tokens_per_second_over_two_products",
            "first_token_over_plain",
        ):
            spread = [row[f"{quantity}_p{p}"] for p in (20, 50, 80)]
            known = "{1:.2f} ({0:.2f}-{2:.2f})".format(*map(float, spread)) if all(spread) else ""
            cells.append(known)
        cells += [f"{float(row[key]):.2f}" for key in ("peak_over_plain", "kv_cache_over_plain")]
        lines.append(f"| {' | '.join(cells)} |")
    keys = ("device", "threads", "torch", "transformers", "git")
    runs = {", ".join(f"{key} {row[key]}" for key in keys) for row in rows}
    return "\n".join([*lines, "", *(f"{run}." for run in sorted(runs))]) + "\n"


def pruning_speed(name: str) -> str:
    """One row per arm of a file of `vlmfix bench` whose arms drop visual tokens."""
    with (ROOT / "docs" / "benchmarks" / name).open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = [
        "| model | dtype | method | visual tokens | prefill, ms | times faster | vision tower, ms "
        "| first token, ms | times faster | tokens/s over plain | KV cache over plain |",
        "|---|---|---|---:|---:|---:|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        cells = [row["model"], row["dtype"], row["arm"].split(":")[0]]
        cells.append(f"{float(row['visual_tokens_kept']):g}")
        for quantity, over in (("prefill", True), ("tower", False), ("first_token", True)):
            cells.append(f"{1000 * float(row[f'{quantity}_seconds_p50']):.0f}")
            if over:
                slow, middle, fast = (
                    1 / float(row[f"{quantity}_over_plain_p{p}"]) for p in (80, 50, 20)
                )
                cells.append(
                    "" if row["arm"] == "plain" else f"{middle:.1f} ({slow:.1f}-{fast:.1f})"
                )
        cells.append(f"{float(row['tokens_per_second_over_plain_p50']):.2f}")
        cells.append(f"{float(row['kv_cache_over_plain']):.2f}")
        lines.append(f"| {' | '.join(cells)} |")
    keys = ("device", "threads", "torch", "transformers", "git")
    runs = {", ".join(f"{key} {row[key]}" for key in keys) for row in rows}
    return "\n".join([*lines, "", *(f"{run}." for run in sorted(runs))]) + "\n"


_KERNEL_ARMS = (
    "eager", "vlmfix plain", "vlmfix var", "vlmfix pai", "vlmfix vhr", "per-head loop var",
)  # fmt: skip


def kernels(name: str) -> str:
    """Unmasked rows of a file that vlmfix.bench.kernels wrote: medians over the fastest SDPA."""
    with (ROOT / "docs" / "benchmarks" / name).open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["masked"] == "False"]
    shapes: dict[tuple[str, ...], dict[str, dict[str, str]]] = {}
    for row in rows:
        heads = f"{row['heads']}:{row['key_heads']}"
        shapes.setdefault((row["dtype"], heads, row["keys"]), {})[row["arm"]] = row
    lines = [
        "| " + " | ".join(("dtype", "heads", "keys", "fastest SDPA", *_KERNEL_ARMS)) + " |",
        "|---|---|---|---|" + "---|" * len(_KERNEL_ARMS),
    ]
    for shape, arms in shapes.items():
        best = arms[rows[0]["arm"]]["best_sdpa"]
        milliseconds = float(arms[best]["microseconds_p50"]) / 1000
        cells = [f"{best.removeprefix('sdpa ')}, {milliseconds:.2f} ms"]
        cells += [f"{float(arms[arm]['over_sdpa_p50']):.2g}" for arm in _KERNEL_ARMS]
        lines.append(f"| {' | '.join((*shape, *cells))} |")
    keys = ("device", "threads", "torch", "git")
    runs = {", ".join(f"{key} {row[key]}" for key in keys) for row in rows}
    return "\n".join([*lines, "", *(f"{run}." for run in sorted(runs))]) + "\n"


def in_boxes() -> str:
    """Attention inside the boxes of the named object, by layer, from check_attention.py."""
    with (RESULTS / "attention" / "in_boxes.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    lines = ["| layer | ratio | control | words above 1 | single heads |", "|---|---|---|---|---|"]
    for layer in sorted({int(row["layer"]) for row in rows}):
        here = [row for row in rows if int(row["layer"]) == layer]
        own, control = ([r for r in here if r["head"] == "mean" and r["boxes"] == boxes][0]
                        for boxes in ("own", "of another image"))  # fmt: skip
        heads = [float(row["ratio"]) for row in here if row["head"] != "mean"]
        cells = ["{ratio} ({low} to {high})".format(**_rounded(row)) for row in (own, control)]
        cells += [f"{100 * float(own['words_above_uniform']):.0f} %"]
        cells += [f"{min(heads):.2f} to {max(heads):.2f}"]
        lines.append(f"| {layer} | {' | '.join(cells)} |")
    facts = f"{rows[0]['words']} words in {rows[0]['images']} images; 95 % intervals over images."
    return "\n".join([*lines, "", facts]) + "\n"


def _rounded(row: dict[str, str]) -> dict[str, str]:
    return {key: f"{float(row[key]):.2f}" for key in ("ratio", "low", "high")}


PARTS: dict[str, Callable[..., str]] = {
    "methods": methods,
    "method": method,
    "results": results,
    "excerpt": excerpt,
    "full_results": full_results,
    "contrast": contrast,
    "pruning": pruning,
    "pruned": pruned,
    "benchmarks": benchmarks,
    "measured": measured,
    "kernels": kernels,
    "pruning_speed": pruning_speed,
    "in_boxes": in_boxes,
    "models": model_table.table,
    "models_counted": model_table.count,
    "models_short": model_table.short,
    "models_refused": model_table.reasons,
}


def filled(text: str) -> str:
    """The text with every generated part filled in."""

    def part(match: re.Match[str]) -> str:
        what, *arguments = match[2].split()
        return match[1] + PARTS[what](*arguments) + match[3]

    return _PART.sub(part, text)


def main(check: bool) -> int:
    """Write or check all files; the exit code."""
    stale = []
    docs = ROOT / "docs"
    pages = [
        *docs.glob("methods/*.md"),
        *docs.glob("results/*/*.md"),
        *docs.glob("benchmarks/*.md"),
        docs / "models.md",
    ]
    for path in [ROOT / "README.md", KEPT, *sorted(pages)]:
        before = path.read_text() if path.exists() else ""
        after = kept_csv() if path == KEPT else filled(before)
        if before != after:
            stale.append(path.relative_to(ROOT))
            if not check:
                path.write_text(after)
    for path in stale:
        print(("out of date: " if check else "wrote ") + str(path))
    return int(check and bool(stale))


if __name__ == "__main__":
    if "--drift" in sys.argv[1:]:
        sys.exit(model_table.drift())
    if "--models" in sys.argv[1:]:
        model_table.write()
    sys.exit(main("--check" in sys.argv[1:]))
