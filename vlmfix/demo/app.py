"""The page as a whole, and the server."""

from __future__ import annotations

import ipaddress
import os
import socket
import tempfile
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

# Read by gradio when it is imported: it would ask the network for its newest version otherwise.
os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")

try:
    import gradio as gr
except ImportError as error:
    from vlmfix.errors import MissingDependency

    raise MissingDependency("the demo needs gradio: pip install 'vlmfix[demo]'.") from error
import torch

from vlmfix.demo import pages
from vlmfix.demo.asking import message
from vlmfix.demo.attention import MEAN, Attention, heads, layers
from vlmfix.demo.compare import Compare
from vlmfix.demo.desk import QUIET, Desk
from vlmfix.demo.engine import Engine
from vlmfix.demo.hosts import OwnHosts
from vlmfix.demo.measure import Measure
from vlmfix.demo.tokens import Tokens
from vlmfix.errors import BadInput

__all__ = ["build", "serve"]

#: Requests that run at once, taking turns at the model, and requests that wait in line.
AT_ONCE, LINE = 4, 32
LARGEST_FILE = "20mb"
#: The most visitors whose last answers are kept, each with a picture of at most MAX_PIXELS.
SESSIONS = 50
#: Seconds after which an uploaded file is deleted, and between two checks for such files.
_OLD = 3600


def build(engine: Engine, allow_model_choice: bool = False) -> gr.Blocks:
    """Build the page of an engine.

    Args:
        engine: holds the model.
        allow_model_choice: whether a visitor may load another model.
    """
    folder = tempfile.TemporaryDirectory(prefix="vlmfix-demo-")
    desk = Desk(engine, Path(folder.name))
    with gr.Blocks(title="vlmfix", analytics_enabled=False, delete_cache=(_OLD, _OLD)) as page:
        page.vlmfix_folder = folder  # deleted with the page
        gr.Markdown("# vlmfix\nOne question to a vision-language model, plain and with methods.")
        with gr.Tabs() as tabs:
            with gr.Tab("Compare", id="compare"):
                compare = Compare(desk)
            with gr.Tab("Attention", id="attention"):
                attention = Attention(desk, compare.run, tabs)
            with gr.Tab("Tokens", id="tokens"):
                Tokens(desk, compare.picture, compare.prompt)
            with gr.Tab("Measure", id="measure"):
                Measure(desk, compare)
            with gr.Tab("About", id="about"):
                about = gr.HTML(pages.about(engine.name, desk.fits), elem_id="about-methods")
                if allow_model_choice:
                    _model_choice(desk, compare, attention, about)
        for begin in (compare.go.click, compare.prompt.submit):
            answered = begin(compare.answer, compare.inputs, compare.outputs, **QUIET)
            answered.then(attention.begin, compare.run, attention.begun, **QUIET)
        attention.listen(compare.panes)
        attention.listen(attention.words)
        page.unload(desk.stop)
    page.queue(max_size=LINE, default_concurrency_limit=AT_ONCE)
    return page


def _model_choice(desk: Desk, compare: Compare, attention: Attention, about: gr.HTML) -> None:
    """The controls with which a visitor changes the model for all visitors."""
    with gr.Row():
        name = gr.Textbox(
            desk.engine.name, label="Model: emoji, a folder or a hub id", elem_id="model"
        )
        load = gr.Button("Load", elem_id="load-model")
    told = gr.HTML(elem_id="model-message")
    methods = [slot.method for slot in compare.slots]

    def change(name: str) -> dict[Any, Any]:
        engine = desk.engine
        try:
            engine.change_model(name or "")
        except Exception as error:
            return {told: pages.alert(message(error))}
        desk.examine()
        return {
            told: pages.status(f"{engine.name} is loaded."),
            about: pages.about(engine.name, desk.fits),
            attention.layer: gr.update(choices=layers(engine), value=MEAN),
            attention.head: gr.update(choices=heads(engine), value=MEAN),
            **{method: gr.update(choices=desk.choices()) for method in methods},
        }

    load.click(change, name, [told, about, attention.layer, attention.head, *methods], **QUIET)


def serve(
    model: str = "emoji",
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    hosts: Sequence[str] = (),
    allow_model_choice: bool = False,
    open_browser: bool = False,
    dtype: str | None = None,
    device: str | None = None,
    block: bool = True,
    told: Callable[[str], None] = print,
) -> gr.Blocks:
    """Load a model and serve the page until interrupted.

    Args:
        model: "emoji", a local folder or a hub id. No code of a checkpoint is ever run.
        host: the address to listen on; beyond loopback everyone in the network can use the model.
        port: the port to listen on; default: the first free one from 7860.
        hosts: further names under which browsers reach it, such as that of a proxy. Requests to
            other names, and from pages of other sites, are refused (hosts.py).
        allow_model_choice: whether visitors may load other models; on loopback only.
        open_browser: whether to open the page in the browser of this machine.
        dtype: dtype of the model.
        device: device of the model.
        block: whether to return only when interrupted; False returns with the server running.
        told: called with a line that holds the address.

    Raises:
        BadInput: a host or port that cannot be used, or a choice of models beyond loopback.
        VlmfixError: the model cannot be loaded.
    """
    if allow_model_choice and not _is_loopback(host):
        raise BadInput(
            f"--allow-model-choice on {host}: everyone who can open the page could make this "
            "machine download and load models. It works on 127.0.0.1 only; name the model on the "
            "command line instead: vlmfix demo MODEL --host ..."
        )
    _check_address(host)

    @asynccontextmanager
    async def guarded(app: Any) -> AsyncIterator[None]:
        # Around all that gradio put there, its headers for other sites included, before the first
        # request.
        app.middleware_stack = OwnHosts(app.middleware_stack, host, hosts)
        yield

    torch.manual_seed(0)  # seed of the methods' noise: the same answers after a restart
    page = build(Engine(model, dtype=dtype, device=device), allow_model_choice)
    plain = [gr.themes.Font(name) for name in ("system-ui", "sans-serif")]
    mono = [gr.themes.Font(name) for name in ("ui-monospace", "monospace")]
    try:
        _, url, _ = page.launch(
            server_name=f"[{host}]" if ":" in host else host,
            app_kwargs={"lifespan": guarded},
            server_port=port,
            share=False,
            quiet=True,
            inbrowser=open_browser,
            prevent_thread_lock=True,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            max_file_size=LARGEST_FILE,
            state_session_capacity=SESSIONS,
            # Fonts of the system: nothing is fetched from anywhere.
            theme=gr.themes.Default(primary_hue="blue", font=plain, font_mono=mono),
            css_paths=Path(__file__).with_name("demo.css"),
        )
    except OSError as error:
        raise BadInput(f"cannot listen on {host}, port {port or 'from 7860'}: {error}") from error
    told(f"the demo is at {url} (stop it with Ctrl-C)")
    if block:
        page.block_thread()
    return page


def _check_address(host: str) -> None:
    """Refuse at once what cannot be listened on: gradio would try a hundred ports."""
    try:
        kind, _, _, _, place = socket.getaddrinfo(host, 0, type=socket.SOCK_STREAM)[0]
        with socket.socket(kind) as probe:
            probe.bind(place)
    except (OSError, UnicodeError) as error:
        raise BadInput(
            f"cannot listen on {host} ({error}): give an address of this machine, such as "
            "127.0.0.1, or 0.0.0.0 for all of them."
        ) from error


def _is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
