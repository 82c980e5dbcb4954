"""Photograph the demo for the README and docs/demo.md, in Chromium (`make browser`).

    python docs/make_demo_pictures.py

Writes pictures/demo.png (Compare, a desktop), demo_attention.png, demo_tokens.png, demo_measure.png
and demo_390.png (a telephone). The picture is emoji:4, the first on which the plain model names an
absent object.
"""

from __future__ import annotations

import io
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image
from selenium.webdriver.common.keys import Keys

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "demo"))

from browsing import Browser  # noqa: E402 (found through the path above)
from serving import served  # noqa: E402 (as above)

PICTURES = ROOT / "docs" / "pictures"
EXAMPLE = 3


def photograph(page: Browser, name: str, width: int) -> None:
    """Keep the whole page as a picture."""
    page.width(width, 600)
    page.driver.execute_script("window.scrollTo(0, 0); document.activeElement.blur()")
    script = "return document.querySelector('.gradio-container').scrollHeight"
    page.width(width, int(page.driver.execute_script(script)))
    time.sleep(1)  # until colours have changed
    with Image.open(io.BytesIO(page.driver.get_screenshot_as_png())) as picture:
        few = picture.convert("RGB").quantize(128, dither=Image.Dither.NONE)
        few.save(PICTURES / f"{name}.png", optimize=True)
    print(f"wrote docs/pictures/{name}.png")


def ask(page: Browser) -> None:
    """Run base and two methods on the picture."""
    page.example(EXAMPLE)
    page.run()
    page.done()


def main() -> None:
    """Serve the demo, use it, and keep what is seen."""
    with tempfile.TemporaryDirectory() as folder, served(Path(folder) / "log") as server:
        page = Browser(server.url, Path(folder), 1280, 700)
        ask(page)
        page.find('#panes .pane[data-pane="1"] details summary').click()
        photograph(page, "demo", 1280)
        number = next(at for at, word in enumerate(page.words(0)) if word.startswith("umbrella"))
        page.find(f'#panes button.word[data-pane="0"][data-word="{number}"]').click()
        page.until(lambda: len(page.all("#figures img")) == 3, "the maps")
        page.all('#beside input[type="radio"]')[1].click()
        page.choose("#layer", "1")
        page.until(
            lambda: "pai:" in page.text("#figures") and "layer 1" in page.text("#figures"),
            "layer 1",
        )
        photograph(page, "demo_attention", 1280)
        page.tab("Tokens")
        page.find("#show-tokens").click()
        page.until(lambda: len(page.all("#kept img")) == 3, "what is kept")
        photograph(page, "demo_tokens", 1280)
        page.tab("Measure")
        field = page.find('#images input[type="number"]')
        field.send_keys(Keys.CONTROL, "a")
        field.send_keys("20", Keys.TAB)
        page.find("#measure-run").click()
        page.until(lambda: page.all("#forest img"), "the forest plot")
        photograph(page, "demo_measure", 1280)
        page.close()
        page = Browser(server.url, Path(folder), 390, 844)
        ask(page)
        photograph(page, "demo_390", 390)
        page.close()


if __name__ == "__main__":
    main()
