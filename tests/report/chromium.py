"""A real browser, spoken to over a pipe by its DevTools protocol: keys, colour schemes, names for screen readers."""

from __future__ import annotations

import base64
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
_KEYS = {"Tab": 9, "Enter": 13, " ": 32, "Backspace": 8}


class Browser:
    """One page in a headless browser that resolves no name of a host; use it in a `with` block.

    Attributes:
        complaints: console messages, uncaught errors and what the browser itself logs, as text.
        loads: addresses that were asked for, without the page's own and its data addresses.
    """

    def __init__(self, folder: Path) -> None:
        """Args: where the browser keeps its profile."""
        to_browser, self._write = os.pipe()
        self._read, from_browser = os.pipe()
        words = [
            str(CHROMIUM), "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars",
            "--remote-debugging-pipe", "--host-resolver-rules=MAP * ~NOTFOUND",
            f"--user-data-dir={folder / 'profile'}", "about:blank",
        ]  # fmt: skip
        shell = f'exec "$@" 3<&{to_browser} 4>&{from_browser}'
        self._process = subprocess.Popen(
            ["bash", "-c", shell, "chromium", *words], pass_fds=(to_browser, from_browser), start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        )  # fmt: skip
        os.close(to_browser)
        os.close(from_browser)
        self._reader, self._number, self._session = os.fdopen(self._read, "rb"), 0, ""
        self.complaints: list[str] = []
        self.loads: list[str] = []
        self.loaded, self._own = False, {"about:blank"}
        target = self.ask("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network", "Accessibility"):
            self.ask(f"{domain}.enable")

    def __enter__(self) -> Browser:
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._write)
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._reader.close()

    def ask(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Send a command and wait for its answer, taking note of what happens meanwhile."""
        self._number += 1
        message = {"id": self._number, "method": method, "params": parameters}
        message |= {"sessionId": self._session} if self._session else {}
        os.write(self._write, json.dumps(message).encode() + b"\0")
        while True:
            heard = self._hear()
            if heard.get("id") == self._number:
                assert "error" not in heard, f"{method}: {heard['error']}"
                return heard["result"]

    def _hear(self) -> dict[str, Any]:
        text = bytearray()
        while (byte := self._reader.read(1)) != b"\0":
            assert byte, "the browser has ended"
            text += byte
        heard = json.loads(text)
        about = heard.get("params", {})
        match heard.get("method"):
            case "Runtime.consoleAPICalled":
                self.complaints.append(json.dumps(about["args"]))
            case "Runtime.exceptionThrown":
                self.complaints.append(json.dumps(about["exceptionDetails"]))
            case "Log.entryAdded":
                self.complaints.append(about["entry"]["text"])
            case "Network.requestWillBeSent":
                url = about["request"]["url"]
                self.loads += [] if url.startswith("data:") or url in self._own else [url]
            case "Page.loadEventFired":
                self.loaded = True
        return heard

    def open(self, page: str) -> None:
        """Load a page and wait for it."""
        self._own |= {page}
        self.loaded = False
        self.ask("Page.navigate", url=page)
        self.wait()

    def wait(self) -> None:
        """Wait until the page has loaded once more since `loaded` was made false."""
        while not self.loaded:
            self._hear()

    def says(self, expression: str) -> Any:
        """Value of a JavaScript expression."""
        answer = self.ask("Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def press(self, *keys: str) -> None:
        """Press keys as a person does: names of `_KEYS`, or single characters."""
        for key in keys:
            text = {"Enter": "\r", "Tab": "", "Backspace": ""}.get(key, key)
            about = {"key": key, "code": "Space" if key == " " else key, "windowsVirtualKeyCode": _KEYS.get(key, 0)}
            self.ask("Input.dispatchKeyEvent", type="keyDown", text=text, **about)
            self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def tab_to(self, condition: str) -> None:
        """Press Tab until a condition on the focused element `x` holds."""
        for _ in range(200):
            self.press("Tab")
            if self.says(f"((x) => Boolean({condition}))(document.activeElement)"):
                return
        raise AssertionError(f"the keyboard never comes to {condition}")

    def scheme(self, name: str = "", media: str = "") -> None:
        """Prefer a colour scheme, light or dark; emulate a medium, such as print."""
        features = [{"name": "prefers-color-scheme", "value": name}]
        self.ask("Emulation.setEmulatedMedia", media=media, features=features)

    def names(self) -> list[tuple[str, str]]:
        """Role and name of everything that a screen reader is told of."""
        nodes = self.ask("Accessibility.getFullAXTree")["nodes"]
        told = [node for node in nodes if not node["ignored"]]
        return [(node["role"]["value"], node.get("name", {}).get("value", "")) for node in told]

    def screenshot(self, path: Path, width: int, height: int = 0) -> None:
        """Write a picture of the page; of all its height when that is 0."""
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=800, deviceScaleFactor=1, mobile=False)
        tall = height or self.says("document.documentElement.scrollHeight")
        self.ask("Emulation.setDeviceMetricsOverride", width=width, height=tall, deviceScaleFactor=1, mobile=False)
        path.write_bytes(base64.b64decode(self.ask("Page.captureScreenshot", format="png")["data"]))
