"""The demo in real Chromium."""

from __future__ import annotations

import io
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from PIL import Image

pytest.importorskip("selenium")

from browsing import Browser
from selenium.webdriver.common.keys import Keys
from serving import Server, served

import vlmfix
from vlmfix.emoji import model_path

pytestmark = [pytest.mark.browser, pytest.mark.slow, pytest.mark.timeout(900)]

Open = Callable[..., Browser]


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with served(tmp_path_factory.mktemp("demo") / "log") as running:
        yield running


@pytest.fixture
def window(server: Server, tmp_path: Path) -> Iterator[Open]:
    opened: list[Browser] = []

    def open_window(width: int = 1280, height: int = 1000) -> Browser:
        opened.append(Browser(server.url, tmp_path, width, height))
        return opened[-1]

    yield open_window
    for browser in opened:
        browser.close()
    assert "Traceback" not in server.log.read_text()


def test_the_whole_page(window: Open, tmp_path: Path) -> None:
    page = window()
    page.example(0)
    page.record()
    page.run()
    assert page.done() == "All answers are written."
    said = [page.words(pane) for pane in range(3)]
    lengths = page.recorded()
    assert lengths[-1] == tuple(map(len, said))
    growing = {counts for counts in lengths if min(counts, default=0) > 0} - {lengths[-1]}
    assert len(growing) >= 3, f"the answers did not stream: {lengths}"
    for pane, method in enumerate(("base", "vhr", "pai")):
        section = f'#panes .pane[data-pane="{pane}"]'
        assert page.text(f"{section} h3").startswith(method)
        assert "tokens/s" in page.text(section) and "passes" in page.text(section)
    assert said[0] != said[1]
    marked = page.all('#panes .pane[data-pane="1"] .word.differs')
    assert marked and not page.all('#panes .pane[data-pane="0"] .word.differs')
    assert "The picture shows: bed, cup, teddy bear, toilet" in page.text("#legend")

    number = said[0].index("bear")
    page.find(f'#panes button.word[data-pane="0"][data-word="{number}"]').click()
    page.until(lambda: len(page.all("#figures img")) == 3, "the maps")
    assert "“bear”" in page.text("#attention-message")
    assert page.words(1, "#attention-words") == said[1]
    maps = page.all("#figures img")[1].get_attribute("src")
    page.choose("#layer", "2")
    page.until(lambda: "layer 2" in page.text("#figures"), "layer 2")
    page.choose("#head", "3")
    page.until(lambda: "layer 2, head 3" in page.text("#figures"), "head 3")
    assert page.all("#figures img")[1].get_attribute("src") != maps
    page.all('#beside input[type="radio"]')[1].click()
    page.until(lambda: "pai:" in page.text("#figures"), "the other method")
    page.find("#attention-words button.word[data-pane='1']").click()
    page.until(lambda: "in the answer of vhr" in page.text("#attention-message"), "another word")
    page.find("#png").click()
    page.until(lambda: list(tmp_path.glob("*.png")), "the file")
    with Image.open(next(tmp_path.glob("*.png"))) as saved:
        assert saved.width > 500

    page.tab("Tokens")
    page.find("#show-tokens").click()
    page.until(lambda: len(page.all("#kept img")) == 3, "what is kept")
    assert "hiprune: 16 of 64" in page.text("#kept")

    page.tab("Measure")
    field = page.find('#images input[type="number"]')
    field.send_keys(Keys.CONTROL, "a")
    field.send_keys("2", Keys.TAB)
    page.find("#measure-run").click()
    page.until(lambda: page.all("#measure-message progress"), "progress")
    page.until(lambda: page.all("#table table"), "the table")
    assert "2 images" in page.text("#table") and "vhr" in page.text("#table")
    assert page.all("#forest img")

    page.tab("About")
    page.until(lambda: page.find("#about-methods").is_displayed(), "About")
    page.find("#about-methods details summary").click()
    assert "Yang et al., ICLR 2025" in page.text("#about-methods")
    assert page.complaints() == []
    assert page.outside() == set()


def prepare(page: Browser, picture: int, methods: tuple[str, str]) -> None:
    page.example(picture)
    for pane, method in enumerate(methods, start=2):
        page.choose(f"#method-{pane}", method)


def test_two_visitors_at_once_get_what_each_gets_alone(window: Open) -> None:
    wanted = ((0, ("vhr", "hiprune")), (2, ("spin", "m3id")))
    pages = [window(), window()]
    for page, (picture, methods) in zip(pages, wanted, strict=True):
        prepare(page, picture, methods)
    for page in pages:
        page.run()
    both = []
    for page in pages:
        assert page.done() == "All answers are written."
        both.append([page.words(pane) for pane in range(3)])
    alone = []
    model, processor = vlmfix.load("emoji")
    for picture, methods in wanted:
        content = [
            {"type": "image", "image": f"emoji:{picture + 1}"},
            {"type": "text", "text": "Please describe this image in detail."},
        ]
        own = []
        for method in (None, *methods):
            with vlmfix.wrapped(model, method):
                text = vlmfix.generate(
                    model, processor, [{"role": "user", "content": content}],
                    max_new_tokens=96, do_sample=False,
                )  # fmt: skip
            own.append(text.split())
        alone.append(own)
    assert both == alone
    assert len({tuple(words) for answers in both for words in answers}) >= 5


def large_picture(folder: Path) -> Path:
    path = folder / "large.png"
    Image.new("1", (10_000, 5_000)).save(path)
    return path


def text_as_picture(folder: Path) -> Path:
    path = folder / "text.png"
    path.write_text("This is no picture.")
    return path


@pytest.mark.parametrize(
    ("picture", "prompt", "says"),
    [
        (None, "What is it?", "there is no picture"),
        (large_picture, "What is it?", "50 megapixels, and the demo takes up to 25"),
        (text_as_picture, "What is it?", "not an image that Pillow can read"),
        (0, "", "the prompt is empty"),
        (0, "word " * 10_000, "the prompt is too long: 10000 words"),
    ],
    ids=["no image", "50 megapixels", "text as image", "no prompt", "10,000 words"],
)
def test_bad_input_is_a_message_and_the_next_request_works(
    window: Open, tmp_path: Path, picture: object, prompt: str, says: str
) -> None:
    page = window()
    if callable(picture):
        page.upload(picture(tmp_path))
        page.until(page.sources, "the upload")
    elif isinstance(picture, int):
        page.example(picture)
    page.prompt(prompt)
    page.run()
    assert says in page.done()
    assert page.find("#message [role=alert]").is_displayed()
    page.example(1)
    page.prompt("Is there a car in the image?")
    page.run()
    page.until(lambda: page.text("#message").strip() == "All answers are written.", "the answers")
    assert page.words(0)
    assert page.complaints() == []


def test_four_panes_with_options_and_one_that_cannot_run(window: Open) -> None:
    page = window()
    page.example(1)
    page.all('#count input[type="radio"]')[2].click()
    page.until(lambda: page.find("#method-4").is_displayed(), "a fourth pane")
    page.choose("#method-3", "fastv")
    page.find("#options-3 button").click()
    tokens = "#option-3-fastv-tokens textarea"
    page.until(lambda: page.find(tokens).is_displayed(), "the options of fastv")
    page.find(tokens).send_keys("8", Keys.TAB)
    for _ in range(2):  # passing through the other options leaves them as they are
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
    page.choose("#method-4", "head_pursuit (see About)")
    page.run()
    page.done()
    assert page.text('#panes .pane[data-pane="2"] h3') == "fastv:tokens=8"
    assert "needs the heads of a concept" in page.text('#panes .pane[data-pane="3"] .error')
    assert page.words(1) and page.words(2) and not page.words(3)
    assert page.complaints() == []


def test_a_visitor_may_change_the_model_where_that_is_allowed(tmp_path: Path) -> None:
    with served(tmp_path / "log", "--allow-model-choice") as server:
        page = Browser(server.url, tmp_path)
        try:
            page.example(0)
            page.run()
            page.done()
            before = page.words(0)
            page.tab("About")
            field = page.until(lambda: page.find("#model textarea, #model input"), "the field")
            for name, says in ((tmp_path, "no config.json"), (model_path(), "is loaded")):
                field.send_keys(Keys.CONTROL, "a")
                field.send_keys(str(name))
                page.find("#load-model").click()
                page.until(lambda says=says: says in page.text("#model-message"), says)
            page.tab("Attention")
            page.until(lambda: page.all("#attention-words .word"), "the words")[3].click()
            changed = "the model was changed after this answer"
            page.until(lambda: changed in page.text("#attention-message"), "a message")
            page.tab("Compare")
            page.example(1)
            page.run()
            page.until(lambda: page.words(0) and page.words(0) != before, "other answers")
            assert page.done() == "All answers are written."
        finally:
            page.close()
    assert "Traceback" not in server.log.read_text()


def test_a_text_file_does_not_get_into_the_page(window: Open, tmp_path: Path) -> None:
    page = window()
    path = tmp_path / "notes.txt"
    path.write_text("This is no picture.")
    page.upload(path)
    page.run()
    assert "there is no picture" in page.done() or "not an image" in page.done()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_is_wider_than_the_page(window: Open, width: int) -> None:
    page = window(width, 844)
    page.example(0)
    page.driver.execute_script("document.querySelector('#run').scrollIntoView()")
    page.run()
    page.done()
    # What a container cuts off does not make the page wider, so every element is asked.
    script = """
        const scrolls = (e) => e && (/auto|scroll/.test(getComputedStyle(e).overflowX)
            || scrolls(e.parentElement));
        const beyond = (e) => e.checkVisibility({visibilityProperty: true})
            && e.getBoundingClientRect().right > innerWidth + 1 && !scrolls(e.parentElement);
        return [...document.querySelectorAll('.tabitem *')].filter(beyond)
            .map((e) => e.outerHTML.slice(0, 200)).concat(
                document.documentElement.scrollWidth > innerWidth ? ['the page'] : []);
    """
    for name in ("Compare", "Attention", "Tokens", "Measure", "About"):
        page.driver.execute_script("window.scrollTo(0, 0)")
        page.tab(name)
        page.driver.execute_script(
            "document.querySelectorAll('details').forEach((part) => { part.open = true; })"
        )
        time.sleep(0.5)
        assert page.driver.execute_script(script) == [], name
    shown = io.BytesIO(page.driver.get_screenshot_as_png())
    with Image.open(shown) as picture:
        assert picture.width == width


def test_the_page_works_without_a_mouse(window: Open) -> None:
    page = window()
    page.example(0)
    page.driver.execute_script("document.body.tabIndex = -1; document.body.focus()")
    reached: list[str] = []
    script = """
        const at = document.activeElement;
        const own = at.closest('#examples, #prompt, #run, #stop, #count, #length, #method-2, '
            + '#method-3, #options-2, [role=tab]');
        return own?.id || own?.getAttribute('role') || '';
    """
    for _ in range(60):
        page.driver.switch_to.active_element.send_keys(Keys.TAB)
        reached.append(page.driver.execute_script(script))
        if reached[-1] == "run":
            page.driver.switch_to.active_element.send_keys(Keys.ENTER)
            break
    assert {"tab", "examples", "prompt", "run"} <= set(reached), reached
    page.done()
    word = page.find("#panes button.word")
    page.driver.execute_script("arguments[0].focus()", word)
    ring = page.driver.execute_script(
        "return getComputedStyle(document.activeElement).outlineStyle"
    )
    assert ring != "none"
    page.driver.switch_to.active_element.send_keys(Keys.ENTER)
    page.until(lambda: len(page.all("#figures img")) == 3, "the maps")
    at = "return document.activeElement.closest('#attention-words') && document.activeElement.title"
    page.until(lambda: page.driver.execute_script(at) is not None, "the focus on the word")
    page.driver.switch_to.active_element.send_keys(Keys.TAB, Keys.ENTER)
    second = page.words(0)[1]
    page.until(lambda: f"“{second}”" in page.text("#attention-message"), "the next word")


@pytest.mark.parametrize("width", [390, 1280])
def test_every_button_has_a_name(window: Open, width: int) -> None:
    page = window(width)
    page.example(0)
    page.run()
    page.done()
    nameless = [
        button.get_attribute("outerHTML")
        for button in page.all('button:not([tabindex="-1"])')
        if button.is_displayed() and not button.accessible_name
    ]
    assert nameless == []
