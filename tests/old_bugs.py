"""Thirty bugs of this project's history, and which tier of the tests catches each.

    python tests/old_bugs.py                # what `make test` runs of the tests named with each bug
    python tests/old_bugs.py --tier full    # all of the tests named with it
    python tests/old_bugs.py --tests .      # all tests of the tier, whatever is named
    python tests/old_bugs.py padding_masks  # one bug alone
    python tests/old_bugs.py --check        # whether every bug still fits the code, and no more

A bug is put into a copy of the repository, so that the checkout stays as it is. It is caught if a
test fails in it. `make test` has to catch 27 of the 30, `make test-full` all. Tests that fail
without any bug are left out as pytest does it, by PYTEST_ADDOPTS="--deselect=tests/...". Where the
code that a bug lies in is rewritten, the bug's text follows; its commit shows what it was about.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIERS = {"fast": "not slow and not gpu", "full": "not gpu"}
NEEDED = {"fast": 27, "full": 30}


@dataclass(frozen=True)
class Bug:
    """Something that was wrong once.

    Attributes:
        name: what to call it.
        fixed: the commit that fixed it.
        what: what was wrong.
        right: text of today's code, found exactly once in the package.
        wrong: the same with the bug.
        tests: files and folders of tests/ that are run.
        named: of these, the tests that `pytest -k` finds by this, which saves time.
    """

    name: str
    fixed: str
    what: str
    right: str
    wrong: str
    tests: tuple[str, ...]
    named: str = ""

    def file(self, root: Path) -> Path:
        """The file of the package that holds the right text."""
        holds = [
            (path, count)
            for path in sorted((root / "vlmfix").rglob("*.py"))
            if (count := path.read_text(encoding="utf-8").count(self.right))
        ]
        if [count for _, count in holds] != [1]:
            found = ", ".join(f"{count} in {path.relative_to(root)}" for path, count in holds)
            raise SystemExit(
                f"{self.name}: this text must be in vlmfix/ once, and is {found or 'nowhere'}; "
                f"what it was about: git show {self.fixed}\n{self.right}"
            )
        return holds[0][0]


# -- the engine ------------------------------------------------------------------------------------

ENGINE = (
    Bug(
        "padding_masks",
        "4ecb2a6",
        "padding was not read from additive masks, as of a decoder with eager attention",
        "kinds[~visible[:, 0, -1, window]] = PAD",
        "kinds[~visible[:, 0, -1, window] & (mask.dtype == torch.bool)] = PAD",
        ("test_matrix.py", "engine/test_branches.py"),
        named="eager",
    ),
    Bug(
        "unseen_scores",
        "e1b9ce5",
        "factors of heads counted scores of keys that a row does not see",
        "seen = scores if shown is None else scores.masked_fill(~shown, 0.0)",
        "seen = scores",
        ("methods/test_spin.py", "test_matrix.py"),
        named="spin",
    ),
    Bug(
        "last_chunk",
        "660b472",
        "a last chunk of one prompt row was not watched",
        "if last - first == 1 and first > max(0, window.start - 1):",
        "if last - first == 1 and first >= window.start:",
        ("methods/test_avc.py", "test_matrix.py"),
        named="chunk",
    ),
    Bug(
        "eager_weights",
        "3baf06e",
        "a step of branches on a decoder with eager attention gave no weights back",
        "slow = slot.base is sdpa_attention_forward and inputs.query.device.type",
        "slow = inputs.query.device.type",
        ("engine/test_contrast_engine.py",),
        named="outputs",
    ),
    Bug(
        "counts_of_a_report",
        "7b3bebe",
        "the report of a compiled call changed with the next call",
        "call.count(layer, counter.clone())",
        "call.count(layer, counter)",
        ("engine/test_attention.py", "test_matrix.py"),
        named="counts",
    ),
    Bug(
        "drafts_in_a_probe",
        "7c0d63d",
        "a look at the prompt saw the drafted tokens behind it",
        "inputs[name] = inputs[name][..., :length]",
        "pass",
        ("test_matrix.py", "methods/test_vhr.py"),
        named="draft or vhr",
    ),
    Bug(
        "moved_weights",
        "eec343b",
        "a look at the prompt stopped half-way where hooks of accelerate move weights",
        'stop = not any(hasattr(module, "_hf_hook") for module in model.modules())',
        'stop = not hasattr(model, "hf_device_map")',
        ("engine/test_relevance.py", "methods/test_ptp.py"),
        named="accelerate",
    ),
    Bug(
        "unknown_cache",
        "ddb2ee2",
        "a cache that the plain model had filled was taken in generate()",
        "if ledger is None or past > ledger.length:",
        "if ledger is None:",
        ("test_wrapper.py", "engine/test_later_turns.py"),
        named="cache or plain",
    ),
    # -- branches
    Bug(
        "steps_behind_padding",
        "bb26361",
        "bare decode steps counted the padding as positions, in base and branches",
        "positions = self.following.to(ids.device) + steps",
        "positions = (past + torch.arange(queries, device=ids.device))[None]",
        ("engine/test_branches.py",),
        named="outside",
    ),
    Bug(
        "branches_of_another",
        "735c92f",
        "a cache with the branches of other options was taken",
        "if branches is not None and ran is not None and ran != method:",
        "if False:",
        ("engine/test_contrast_engine.py",),
        named="cache",
    ),
    Bug(
        "reset_cache",
        "735c92f",
        "a static cache with branches could not be reset for another prompt",
        "layer.is_initialized = False",
        "pass",
        ("engine/test_contrast_engine.py",),
        named="cache",
    ),
    Bug(
        "features_of_beams",
        "82ead81",
        "features that were encoded before were repeated for beams in the caller's own object",
        "{kind: copy.copy(x) for kind, x in features.items()}",
        "dict(features)",
        ("engine/test_contrast_engine.py",),
        named="encoded",
    ),
    Bug(
        "noise_of_tokens",
        "660b472",
        "the noise of a branch was made of the numbers that the tokens were drawn from",
        "(seed + 0x5DEECE66D) % 2**63",
        "seed",
        ("methods/test_noise.py", "methods/test_vcd.py"),
    ),
    # -- pruning
    Bug(
        "rope_of_padding",
        "aa61d48",
        "M-RoPE offsets of pruned prompts counted the padding",
        "following = places.amax(dim=(0, 2)) + 1 - new_mask.sum(1)",
        "following = places.amax(dim=(0, 2)) + 1 - new_mask.shape[1]",
        ("engine/test_prompt_pruning.py",),
        named="positions",
    ),
    Bug(
        "videos",
        "aa61d48",
        "prompts with videos alone went through pruning untouched instead of being refused",
        'if kwargs.get("pixel_values_videos") is not None:',
        "if False:",
        ("engine/test_prompt_pruning.py",),
        named="videos",
    ),
    Bug(
        "beams_of_unequal_prompts",
        "61fd674",
        "prompts that keep unequal numbers of tokens could not run beams",
        "torch.cat(reduced)[:, None]",
        "torch.cat(reduced)[None]",
        ("engine/test_prompt_pruning.py", "test_matrix.py"),
        named="different",
    ),
    Bug(
        "length_of_the_model",
        "39df92a",
        "a longest length that the model's own configuration gives still counted pruned tokens",
        'configs = (self.given.get("generation_config"), own)',
        'configs = (self.given.get("generation_config"),)',
        ("engine/test_prompt_pruning.py",),
        named="lengths",
    ),
    Bug(
        "sizes_of_beams",
        "2202419",
        "the report named the kept tokens of a prompt once per beam",
        "tuple(sizes[::copies])",
        "tuple(sizes)",
        ("engine/test_layer_pruning.py", "analysis/test_selection.py"),
        named="agree",
    ),
    Bug(
        "dropped_cache",
        "2202419",
        "a cache from which a method had dropped tokens was taken without the method",
        "if LayerPruningStage.name not in stages:",
        "if False:",
        ("engine/test_layer_pruning.py",),
        named="cache",
    ),
)

# -- methods, loading, calibration, maps -----------------------------------------------------------

METHODS = (
    Bug(
        "forbidden_tokens",
        "beb6b06",
        "tokens that the model forbids became NaN in a contrast",
        "combined = torch.where(base == -torch.inf, base, combined)",
        "pass",
        ("base/test_contrast.py",),
    ),
    Bug(
        "noise_beside_pruning",
        "578ba48",
        "tiles were told apart by the tokens that pruning had left",
        "prompt.visual.sum(1).tolist() if prompt.placeholders is None else prompt.placeholders",
        "prompt.visual.sum(1).tolist()",
        ("engine/test_prompt_pruning.py", "methods/test_noise.py"),
        named="noise",
    ),
    Bug(
        "empty_groups",
        "6b4aab9",
        "a group without tokens got a share of the budget",
        "floors = [min(1, count) if reaches else 0 for count in counts]",
        "floors = [1 if budget >= len(counts) else 0 for count in counts]",
        ("base/test_pruning.py",),
    ),
    Bug(
        "fingerprint",
        "b16d2d5",
        "models that differ behind the first numbers of a parameter shared their calibration",
        "sample = numbers[:: len(numbers) // _SAMPLE or 1][: 2 * _SAMPLE]",
        "sample = numbers[:_SAMPLE]",
        ("analysis/test_calibrate.py",),
        named="calibration",
    ),
    Bug(
        "dtype_of_the_bundled_model",
        "9c184b4",
        "the bundled model was loaded with no dtype where none was asked for",
        "load_bundled(kind) if kind else load_bundled()",
        "load_bundled(kind)",
        ("test_loading.py", "emoji/test_emoji_model.py", "test_chat.py"),
    ),
    Bug(
        "kernel_strides",
        "b3023a2",
        "the kernel read small inputs of any strides as if they lay in one piece",
        "None if tensor is None else tensor.contiguous()\n        for tensor in (edit.gain",
        "_flat(tensor)\n        for tensor in (edit.gain",
        ("kernels/test_kernels_rows.py",),
        named="strides",
    ),
)

# -- evaluation, demo, command line ----------------------------------------------------------------

EVALUATION = (
    Bug(
        "commas_of_rope",
        "6a8c05e",
        "classes that a model parts by commas without a space were read as one",
        'parts = answer.strip().split(",")',
        'parts = answer.strip().split(", ")',
        ("evals/test_evals_rope.py",),
    ),
    Bug(
        "nothing_answered",
        "e69c656",
        "scores failed where no item could be answered",
        "if not draws:",
        "if draws is None:",
        ("evals/test_evals_rope.py", "evals/test_evals_mme.py", "evals/test_evals_amber.py"),
    ),
    Bug(
        "resume_of_another_run",
        "603734a",
        "a resumed run took answers that another run had given",
        'if row["config"] != digest(config)',
        "if not row",
        ("evals/test_evals_resume.py",),
        named="another",
    ),
    Bug(
        "uploaded_files",
        "ce2908c",
        "a request could name any file of the demo's machine as its picture",
        "return path if path and Path(path).resolve().is_relative_to(folder) else None",
        "return path",
        ("demo/test_demo_server.py", "demo/test_demo_parts.py"),
    ),
    Bug(
        "why_items_failed",
        "9b6ce12",
        "vlmfix eval failed without saying what went wrong with its items",
        "print(show.failure(results), file=sys.stderr)",
        "pass",
        ("cli",),
    ),
)

BUGS = (*ENGINE, *METHODS, *EVALUATION)


@contextmanager
def copied() -> Iterator[Path]:
    """A copy of the repository without what git does not know."""
    with tempfile.TemporaryDirectory(prefix="vlmfix-old-bugs-") as folder:
        root = Path(folder) / "vlmfix"
        root.mkdir()
        listed = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True, check=True)
        for name in filter(None, done.stdout.split("\0")):
            if (source := ROOT / name).exists():
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, root / name, follow_symlinks=False)
        yield root


def failing_test(root: Path, tier: str, tests: Sequence[str], named: str) -> str | None:
    """The first test that fails, None if none does.

    Raises:
        SystemExit: pytest itself failed.
    """
    environment = {**os.environ, "PYTHONPATH": str(root), "PYTHONDONTWRITEBYTECODE": "1"}
    environment.setdefault("VLMFIX_GOLDEN", str(ROOT.parent / "shared" / "golden"))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-k", named]
    command += ["-m", TIERS[tier], *(str(root / "tests" / test) for test in tests)]
    done = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):
        raise SystemExit(f"pytest could not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    failed = (line for line in done.stdout.splitlines() if line.startswith(("FAILED ", "ERROR ")))
    return next(failed, "?").split(" - ")[0].split(" ", 1)[-1] if done.returncode else None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="BUG", help="only these; default: all")
    parser.add_argument("--tier", choices=TIERS, default="fast")
    parser.add_argument("--tests", nargs="+", metavar="PATH", help="under tests/, for every bug")
    parser.add_argument("--check", action="store_true", help="find the code of every bug and stop")
    asked = parser.parse_args()
    if unknown := set(asked.names) - {bug.name for bug in BUGS}:
        parser.error(f"no bug is called {', '.join(sorted(unknown))}")
    bugs = [bug for bug in BUGS if not asked.names or bug.name in asked.names]
    for bug in bugs:
        bug.file(ROOT)
    if asked.check:
        print(f"{len(bugs)} bugs fit the code")
        return
    caught = 0
    with copied() as root:
        for bug in bugs:
            file = bug.file(root)
            code = file.read_text(encoding="utf-8")
            file.write_text(code.replace(bug.right, bug.wrong), encoding="utf-8")
            started = time.perf_counter()
            if asked.tests:
                by = failing_test(root, asked.tier, asked.tests, "")
            else:
                by = failing_test(root, asked.tier, bug.tests, bug.named)
            file.write_text(code, encoding="utf-8")
            caught += by is not None
            seconds = time.perf_counter() - started
            print(f"{bug.name:28} {seconds:5.0f} s  {by or 'MISSED'}", flush=True)
    print(f"{asked.tier}: {caught} of {len(bugs)} caught")
    if len(bugs) == len(BUGS) and caught < NEEDED[asked.tier]:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
