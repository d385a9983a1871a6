"""Drives Chromium without a display, through the pipes of its DevTools protocol. No package is needed for it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
import time
from collections.abc import Iterator
from typing import Any

SECONDS = 30  # for any one answer
KEY_CODES = {"Tab": 9, "ArrowLeft": 37, "ArrowUp": 38, "ArrowRight": 39, "ArrowDown": 40}


class BrowserError(RuntimeError):
    """A command that Chromium refused, a script that raised, or no answer in time."""


class Page:
    """One tab, and what went wrong in it: `problems` holds console errors, exceptions and failed requests."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        os.set_blocking(from_browser, False)
        self._received = b""
        self._number = 0
        self._session: str | None = None
        self._events: set[str] = set()
        self.problems: list[str] = []
        self.requests: list[str] = []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Sends a command and returns its result."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        for answer in self._messages(method):
            if answer.get("id") == self._number:
                if "error" in answer:
                    raise BrowserError(f"{method}: {answer['error']['message']}")
                return answer["result"]
        raise AssertionError("unreachable")

    def open(self, url: str, *, width: int, height: int, dark: bool) -> None:
        """Loads a page and waits until it has loaded."""
        self._load("about:blank")  # or the page before would remember its own colour scheme for this one
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=False)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        self.send("Storage.clearDataForOrigin", origin=url, storageTypes="local_storage")
        self.problems, self.requests = [], []
        self._load(url)

    def _load(self, url: str) -> None:
        self._events.discard("Page.loadEventFired")
        if "errorText" in (answer := self.send("Page.navigate", url=url)):
            raise BrowserError(f"{url}: {answer['errorText']}")
        messages = self._messages(f"loading {url}")
        while "Page.loadEventFired" not in self._events:
            next(messages)

    def evaluate(self, script: str) -> Any:
        """The value of a JavaScript expression; a promise is waited for."""
        answer = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise BrowserError(f"{script}: {answer['exceptionDetails']}")
        return answer["result"].get("value")

    def wait_for(self, script: str) -> Any:
        """The first true value of an expression that is tried again and again."""
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            if value := self.evaluate(script):
                return value
            time.sleep(0.05)
        raise BrowserError(f"still not true after {SECONDS} s: {script}")

    def press(self, key: str) -> None:
        """Presses and releases a key of KEY_CODES."""
        for kind in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=kind, key=key, code=key, windowsVirtualKeyCode=KEY_CODES[key])

    def point(self, selector: str, x: float, y: float, *, click: bool = False) -> None:
        """Moves the mouse to a place in an element, in shares of its width and height; clicks there if asked."""
        box = self.evaluate(
            f"(part => {{ part.scrollIntoView({{block: 'center', behavior: 'instant'}});"
            f"return part.getBoundingClientRect().toJSON(); }})(document.querySelector({json.dumps(selector)}))"
        )
        place = {"x": box["left"] + x * box["width"], "y": box["top"] + y * box["height"]}
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **place)
        for kind in ("mousePressed", "mouseReleased") if click else ():
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **place)

    def screenshot(self) -> str:
        """The whole page as a PNG in base64."""
        return self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]

    def _messages(self, what: str) -> Iterator[dict[str, Any]]:
        end = time.monotonic() + SECONDS
        while time.monotonic() < end:
            while b"\0" in self._received:
                text, self._received = self._received.split(b"\0", 1)
                message = json.loads(text)
                self._note(message)
                yield message
            try:
                self._received += os.read(self._from, 1 << 20)
            except BlockingIOError:
                time.sleep(0.002)
        raise BrowserError(f"no answer in {SECONDS} s: {what}")

    def _note(self, message: dict[str, Any]) -> None:
        event, data = message.get("method", ""), message.get("params", {})
        self._events.add(event)
        if event == "Runtime.exceptionThrown":
            self.problems.append(str(data["exceptionDetails"].get("exception", data["exceptionDetails"])))
        elif event == "Runtime.consoleAPICalled" and data["type"] in ("error", "warning", "assert"):
            self.problems.append(f"console {data['type']}: {data['args']}")
        elif event == "Log.entryAdded" and data["entry"]["level"] in ("error", "warning"):
            self.problems.append(f"{data['entry']['text']} {data['entry'].get('url', '')}")
        elif event == "Network.requestWillBeSent":
            self.requests.append(data["request"]["url"])


@contextlib.contextmanager
def open_browser(program: str) -> Iterator[Page]:
    """A Chromium with one tab; ended when the block ends."""
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--remote-debugging-pipe"]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        read_end, to_browser = os.pipe()
        from_browser, write_end = os.pipe()

        # Chromium reads commands from file descriptor 3 and writes answers to 4; sh knows none above 9.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read_end} 4>&{write_end}', program]
        process = subprocess.Popen(
            [*command, *options, f"--user-data-dir={profile}"],
            pass_fds=(read_end, write_end),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(read_end)
        os.close(write_end)
        try:
            yield Page(to_browser, from_browser)
        finally:
            process.terminate()
            process.wait(SECONDS)
            os.close(to_browser)
            os.close(from_browser)
