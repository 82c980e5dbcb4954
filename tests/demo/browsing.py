"""Chromium in front of the demo."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from selenium import webdriver
from selenium.webdriver.common.by import By
from selenium.webdriver.remote.webelement import WebElement
from selenium.webdriver.support.ui import WebDriverWait
from serving import PATIENCE


class Browser:
    """One Chromium window on the demo.

    Args:
        url: of the demo.
        downloads: folder for files that are saved.
        width, height: of the page in pixels.
    """

    def __init__(self, url: str, downloads: Path, width: int = 1280, height: int = 1000) -> None:
        options = webdriver.ChromeOptions()
        for argument in (
            "--headless=new",
            "--no-sandbox",
            "--disable-dev-shm-usage",
            "--disable-gpu",
            "--hide-scrollbars",
            f"--window-size={max(width, 500)},{height}",
        ):
            options.add_argument(argument)
        options.add_experimental_option("prefs", {"download.default_directory": str(downloads)})
        options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
        self.driver = webdriver.Chrome(
            options=options, service=webdriver.ChromeService("/usr/bin/chromedriver")
        )
        self.width(width, height)
        self.driver.get(url)
        self.until(lambda: self.find("#run").is_displayed(), "the page")

    def width(self, width: int, height: int) -> None:
        """The size of the page; a window of Chromium cannot be as narrow as a telephone."""
        metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)

    def close(self) -> None:
        """End Chromium."""
        self.driver.quit()

    # -- looking ----------------------------------------------------------------------------------

    def find(self, selector: str) -> WebElement:
        """The first element."""
        return self.driver.find_element(By.CSS_SELECTOR, selector)

    def all(self, selector: str) -> list[WebElement]:
        """All of them."""
        return self.driver.find_elements(By.CSS_SELECTOR, selector)

    def text(self, selector: str) -> str:
        """What stands in an element, "" without one; read at once, while the page changes."""
        script = "return document.querySelector(arguments[0])?.innerText ?? ''"
        return str(self.driver.execute_script(script, selector))

    def until(self, condition: Callable[[], Any], what: str) -> Any:
        """Wait for something to hold."""

        def holds(_: Any) -> Any:
            try:
                return condition()
            except Exception:  # the page is being drawn
                return False

        return WebDriverWait(self.driver, PATIENCE, 0.1).until(holds, f"waited for {what}")

    def words(self, pane: int, where: str = "#panes") -> list[str]:
        """The words of an answer."""
        script = "return [...document.querySelectorAll(arguments[0])].map((word) => word.innerText)"
        selector = f'{where} button.word[data-pane="{pane}"]'
        return list(self.driver.execute_script(script, selector))

    def record(self) -> None:
        """Note the lengths of the answers whenever they change from now on; see `recorded`."""
        script = """
            const panes = document.querySelector('#panes');
            const note = () => window.recorded.push([...panes.querySelectorAll('.pane')]
                .map((pane) => pane.querySelectorAll('button.word').length));
            window.recorded = [];
            new MutationObserver(note).observe(panes, {childList: true, subtree: true});
        """
        self.driver.execute_script(script)

    def recorded(self) -> list[tuple[int, ...]]:
        """How many words each answer had, one entry per change: none is missed by a slow test."""
        return [tuple(lengths) for lengths in self.driver.execute_script("return window.recorded")]

    def complaints(self) -> list[str]:
        """Errors in the console since it was last asked."""
        log = self.driver.get_log("browser")
        return [entry["message"] for entry in log if entry["level"] == "SEVERE"]

    def outside(self) -> set[str]:
        """Addresses beyond the server that the page asked for."""
        asked = set()
        for entry in self.driver.get_log("performance"):
            message = json.loads(entry["message"])["message"]
            if message["method"] == "Network.requestWillBeSent":
                asked.add(message["params"]["request"]["url"])
        return {url for url in asked if not re.match(r"http://127\.0\.0\.1:|data:|blob:", url)}

    # -- using ------------------------------------------------------------------------------------

    def tab(self, name: str) -> None:
        """Open a tab; on a narrow page some are behind a button."""
        tabs = [tab for tab in self.all('button[role="tab"]') if tab.text == name]
        if not [tab for tab in tabs if tab.is_displayed()]:
            self.find(".overflow-menu > button").click()
            self.until(
                lambda: [b for b in self.all(".overflow-dropdown button") if b.text == name],
                f"{name} in the menu",
            )
            tabs = [b for b in self.all(".overflow-dropdown button") if b.text == name]
        next(tab for tab in tabs if tab.is_displayed()).click()

    def example(self, number: int) -> None:
        """Choose a bundled picture, from 0."""
        before = self.sources()
        self.all("#examples button.example")[number].click()
        self.until(lambda: self.sources() and self.sources() != before, "the example")

    def sources(self) -> list[str]:
        """Addresses of the picture that is shown."""
        script = "return [...document.querySelectorAll('#picture img')].map((image) => image.src)"
        return list(self.driver.execute_script(script))

    def upload(self, path: Path) -> None:
        """Upload a file as the picture."""
        self.find('#picture input[type="file"]').send_keys(str(path))

    def choose(self, selector: str, value: str) -> None:
        """Choose in a dropdown.

        With the mouse: gradio narrows the list as the key goes down, by the text before that key
        where the page gets the character later, so a value of one character may never be listed.
        """
        field = self.find(f"{selector} input")
        field.click()
        option = f'{selector} ul[role="listbox"] li[aria-label="{value}"]'
        self.until(lambda: self.all(option), f"{value} in {selector}")
        self.find(option).click()
        self.until(lambda: field.get_attribute("value") == value, f"{value} chosen")

    def prompt(self, text: str) -> None:
        """Set the prompt; ten thousand words are not typed."""
        script = """
            const [field, text] = arguments;
            const set = Object.getOwnPropertyDescriptor(HTMLTextAreaElement.prototype, 'value').set;
            set.call(field, text);
            field.dispatchEvent(new Event('input', {bubbles: true}));
        """
        self.driver.execute_script(script, self.find("#prompt textarea"), text)

    def run(self) -> None:
        """Press Run."""
        self.find("#run").click()

    def done(self) -> str:
        """Wait for the answers, or for a message; the line about it."""
        ends = "All answers are written."
        self.until(lambda: self.text("#message").strip() == ends or self.all("#message .error"),
                   "the answers")  # fmt: skip
        return self.text("#message").strip()
