"""The command line. Every heavy import lives inside its command, so `--help` needs no torch.

Exit codes: 0 all went well; 1 the command ran but reports a failure; 2 the input cannot be used;
130 interrupted.
"""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from vlmfix._version import __version__
from vlmfix.cli import evaluation, models, tools
from vlmfix.cli.start import print_anything
from vlmfix.errors import VlmfixError

__all__ = ["app", "main"]

app = typer.Typer(
    help="Inference-time fixes for vision-language models that describe things that are not there.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def main() -> None:
    """Run the command line; an error made on purpose is one message and exit code 2."""
    print_anything()
    try:
        app()
    except VlmfixError as error:
        from rich.console import Console
        from rich.text import Text

        message = Text.assemble(("error: ", "bold red"), str(error))
        Console(stderr=True).print(message, soft_wrap=True)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"vlmfix {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    pass


app.command("methods")(models.methods_command)
app.command("doctor")(models.doctor_command)
app.command("generate")(models.generate_command)
app.command("eval")(evaluation.eval_command)
app.command("score")(evaluation.score_command)
app.command("report")(evaluation.report_command)
app.command("calibrate")(tools.calibrate_command)
app.command("attribute")(tools.attribute_command)
app.command("bench")(tools.bench_command)
app.command("demo")(tools.demo_command)
