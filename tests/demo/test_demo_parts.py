"""Controls, words, turns and HTML of the demo: no model, no page."""

from __future__ import annotations

import dataclasses
import threading
import time
from html.parser import HTMLParser
from typing import Any

import pytest

from vlmfix.demo import pages
from vlmfix.demo.answers import STOPPED
from vlmfix.demo.asking import Pane
from vlmfix.demo.controls import controls_of, make_method
from vlmfix.demo.turns import Turns
from vlmfix.demo.words import Word, differing, split_words
from vlmfix.engine.call import CallReport
from vlmfix.errors import BadInput
from vlmfix.registry import list_methods, load_class

METHODS = [row.name for row in list_methods()]
#: Options that name a file of the server.
FILES = {("steer", "vectors")}


@pytest.mark.parametrize("name", METHODS)
def test_every_field_has_a_control_and_untouched_controls_make_the_default(name: str) -> None:
    (row,) = (row for row in list_methods() if row.name == name)
    fields = [f for f in dataclasses.fields(load_class(row)) if (name, f.name) not in FILES]
    controls = controls_of(name)
    assert [control.name for control in controls] == [item.name for item in fields]
    assert [control.help for control in controls] == [item.metadata["help"] for item in fields]
    assert make_method(name, {c.name: c.default for c in controls}) == load_class(row)()
    shown = {c.name: "" if c.default is None else c.default for c in controls}
    assert make_method(name, shown) == load_class(row)()


def test_a_visitor_cannot_name_a_file_of_the_server() -> None:
    assert "vectors" not in [control.name for control in controls_of("steer")]
    assert make_method("steer", {"vectors": "/etc/passwd", "strength": 2.0}).spec() == (
        "steer:strength=2.0"
    )


def test_kinds_of_controls() -> None:
    kinds = {c.name: c.kind for c in controls_of("var")}
    assert kinds == {
        "keep": "number",
        "rho": "number",
        "minimum_visual_mass": "number",
        "tau": "number",
        "sink_channels": "list",
        "variant": "choice",
        "last_layer": "choice",
        "video": "flag",
    }
    (steps,) = (c for c in controls_of("carve") if c.name == "steps")
    assert (steps.choices, steps.optional) == (("all", "first", "last"), True)
    (layer,) = (c for c in controls_of("fastv") if c.name == "layer")
    assert (layer.kind, layer.default, layer.optional) == ("whole", None, True)


def test_what_is_filled_in_becomes_the_method() -> None:
    assert make_method("pai", {"alpha": 0.5, "start_layer": None}).spec() == "pai:alpha=0.5"
    assert make_method("fastv", {"layer": 3.0, "tokens": 8}).spec() == "fastv:tokens=8;layer=3"
    assert make_method("pai", {"alpha": " 0.5", "end_layer": "4"}).spec() == (
        "pai:alpha=0.5;end_layer=4"
    )
    vhr = make_method("vhr", {"reinforced_layers": "1, 3", "prune_outliers": False})
    assert vhr.spec() == "vhr:reinforced_layers=1/3;prune_outliers=False"
    text = "One word; or two, please."
    assert make_method("carve", {"suffix": text}) == load_class_of("carve")(suffix=text)


def load_class_of(name: str) -> type:
    (row,) = (row for row in list_methods() if row.name == name)
    return load_class(row)


def test_an_empty_number_is_none_only_where_the_option_may_be() -> None:
    assert make_method("m3id", {"max_weight": None}) == load_class_of("m3id")(max_weight=None)
    assert make_method("m3id", {"decay": None}) == load_class_of("m3id")()


def test_values_that_a_method_cannot_take_are_refused() -> None:
    with pytest.raises(BadInput, match="out of range"):
        make_method("var", {"rho": 7})
    with pytest.raises(BadInput, match="alpha='much' is not of the type float"):
        make_method("pai", {"alpha": "much"})
    with pytest.raises(BadInput, match="sink_channels"):
        make_method("var", {"sink_channels": "one/two"})


# -- words -----------------------------------------------------------------------------------------


class Pieces:
    """A tokenizer whose tokens are these pieces of text; the last one is special."""

    def __init__(self, *pieces: str) -> None:
        self.pieces = pieces

    def decode(self, ids: list[int], **kwargs: bool) -> str:
        assert kwargs["skip_special_tokens"]
        return "".join(self.pieces[token] for token in ids)


def test_words_know_the_tokens_that_write_them_and_the_objects_they_name() -> None:
    tokenizer = Pieces("A", " hot", " do", "g,", " a", " “", "CHAIR", ".", " !", "")
    words = split_words(range(10), tokenizer)
    assert [word.text for word in words] == ["A", "hot", "dog,", "a", "“CHAIR.", "!"]
    # Punctuation is part of the word that is shown, and no place to look from.
    assert [word.tokens for word in words] == [(0,), (1,), (2, 3), (4,), (6,), (8,)]
    objects = [(), ("hot dog",), ("hot dog",), (), ("chair",), ()]
    assert [word.objects for word in words] == objects


def words(text: str) -> list[Word]:
    return [Word(word, ()) for word in text.split()]


@pytest.mark.parametrize(
    ("base", "answer", "done", "expected"),
    [
        ("A dog and a cat.", "A dog and a cat", True, set()),
        ("A dog and a cat.", "A bird and a cat.", True, {1}),
        ("A dog.", "A dog and a cat.", True, {2, 3, 4}),
        ("A dog and a cat.", "A cat.", True, set()),
        # While the base is being written, what goes beyond it may come yet.
        ("A dog", "A dog and a cat.", False, set()),
        ("A dog and", "A bird and a cat.", False, {1}),
    ],
)
def test_words_that_differ_from_base(
    base: str, answer: str, done: bool, expected: set[int]
) -> None:
    assert differing(words(base), words(answer), done) == expected


# -- turns -----------------------------------------------------------------------------------------


def test_turns_are_taken_in_the_order_of_asking_and_one_at_a_time() -> None:
    turns, log, at_once = Turns(), [], []
    held = threading.Lock()

    def work(name: str) -> None:
        with turns.turn():
            for _ in range(3):
                at_once.append(held.acquire(blocking=False))
                log.append(name)
                time.sleep(0.001)
                held.release()
                turns.pass_on()

    with turns.turn():
        threads = []
        for name in "abc":
            threads.append(threading.Thread(target=work, args=(name,)))
            threads[-1].start()
            while turns.waiting < len(threads) + 1:
                time.sleep(0.001)
    for thread in threads:
        thread.join()
    assert "".join(log) == "abcabcabc"
    assert all(at_once)
    assert turns.waiting == 0


def test_a_turn_ends_with_an_error() -> None:
    turns = Turns()
    with pytest.raises(ZeroDivisionError), turns.turn():
        raise ZeroDivisionError
    with turns.turn():
        assert turns.waiting == 1


# -- html ------------------------------------------------------------------------------------------


class Balanced(HTMLParser):
    """Fails on an end tag without its start, and keeps the tags that are still open."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.seen.append(tag)
        if tag not in ("img", "br", "hr", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def tags(html: str) -> list[str]:
    parser = Balanced()
    parser.feed(html)
    assert not parser.open
    return parser.seen


REPORT = CallReport(
    methods=("vhr",), batch=1, prompt_length=78, new_tokens=2, passes=2, extra_passes=1,
    seconds=9.0, edited_rows=44, rows_by_layer={1: 22, 3: 22}, contrasted_rows=0, streams=1,
    notes={"vhr": {"heads": {1: [4], 3: [5]}}}, visual_tokens=((16, 64),),
)  # fmt: skip


def test_panes_mark_words_and_say_what_was_done() -> None:
    base = Pane(None, tokens=[1, 2], seconds=0.5, passes=2, done=True, finish="eos")
    other = Pane(make_method("vhr", {}), tokens=[1, 2], seconds=1, passes=3, report=REPORT)
    other.done = True
    said = [
        [Word("A", (0,)), Word("cup.", (1,), ("cup",))],
        [Word("A", (0,)), Word("dog.", (1,), ("dog",))],
    ]
    html = pages.panes([base, other], said, frozenset({"cup"}))
    tags(html)
    assert 'class="word" data-pane="0" data-word="1">cup.<' in html
    assert 'class="word differs absent" data-pane="1" data-word="1"' in html
    assert 'title="differs from base, not in the picture"' in html
    assert "2 tokens · 4 tokens/s · 2 passes · 0.50 s" in html
    for told in ("44, in layers 1, 3", "16 of 64", "2, and 1 more", "layer 1: 4, layer 3: 5"):
        assert told in html
    assert "9.0" not in html  # the wall time of the call holds the turns of others
    unknown = pages.panes([base, other], said, None)
    assert "absent" not in unknown and "differs" in unknown
    pressed = pages.panes([base, other], said, None, chosen=(1, 0), facts=False)
    assert pressed.count('aria-pressed="true"') == 1 and "tokens/s" not in pressed


def test_no_text_becomes_a_tag() -> None:
    evil = "<script>alert(1)</script>"
    pane = Pane(None, done=True, error=evil, note=evil)
    html = pages.panes([pane], [[Word(evil, (0,))]], frozenset({evil}))
    html += pages.alert(evil) + pages.status(evil) + pages.legend(frozenset({evil}))
    html += pages.progress(1, 2, evil) + pages.about(evil, {"var": evil})
    assert "script" not in tags(html)
    assert "&lt;script&gt;" in html


def test_about_cites_every_method() -> None:
    html = pages.about("emoji", {"var": "it has no sinks"})
    assert {"details", "table", "a"} <= set(tags(html))
    for row in list_methods():
        assert f"<b>{row.name}</b>" in html
    assert 'href="https://arxiv.org/abs/2503.03321"' in html
    assert html.count("Does not run on this model yet: it has no sinks") == 1


def test_answers_that_somebody_stopped_are_not_said_to_be_written() -> None:
    pytest.importorskip("gradio")
    from vlmfix.demo.compare import ending

    written, stopped = Pane(None, done=True), Pane(None, done=True, error=STOPPED)
    assert ending([written, Pane(None, done=True, error="too long")]) == "All answers are written."
    assert ending([written, stopped]) == "Stopped."


def test_further_names_of_the_server_are_its_own() -> None:
    pytest.importorskip("gradio")
    from starlette.responses import PlainTextResponse
    from starlette.testclient import TestClient

    from vlmfix.demo.hosts import OwnHosts

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await PlainTextResponse("page")(scope, receive, send)

    client = TestClient(
        OwnHosts(app, "127.0.0.1", ["Demo.example"]), base_url="http://demo.example"
    )
    assert client.get("/").text == "page"
    for host in ("demo.example", "127.0.0.1:7860"):  # a proxy may keep it or not
        headers = {"Origin": "https://demo.example", "Host": host}
        assert client.get("/", headers=headers).text == "page"
    assert client.get("/", headers={"Host": "other.example"}).status_code == 403
    assert client.get("/", headers={"Origin": "http://other.example"}).status_code == 403


@pytest.mark.parametrize("host", ["999.1.1.1", "203.0.113.7", "no such host", ""])
def test_an_address_of_another_machine_is_refused_at_once(host: str) -> None:
    pytest.importorskip("gradio")
    from vlmfix.demo.app import serve

    with pytest.raises(BadInput, match="address of this machine"):
        serve("no model is loaded", host=host)
