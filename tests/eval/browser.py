"""A headless Chromium that tests drive over its debugging pipe: real layout, real keys, and every request it makes.

JSON messages end with a zero byte; methods and events are those of the Chrome DevTools Protocol. What is evaluated this
way is not held back by a page's content security policy, so that a page is tested as it is.
"""

from __future__ import annotations

import base64
import contextlib
import fcntl
import io
import json
import os
import select
import shutil
import signal
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
OPTIONS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
    "--force-device-scale-factor=1", "--force-color-profile=srgb", "--remote-debugging-pipe",
)  # fmt: skip
TIMEOUT_S = 60.0  # of one answer: a safety net, nothing is measured


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One page in one browser; `folder` is where it keeps its files. Use as a context manager."""

    def __init__(self, executable: str, folder: Path) -> None:
        self._executable, self._folder = executable, folder
        self.requests: list[str] = []  # addresses that the page asked for
        self.messages: list[str] = []  # what it wrote to the console, refusals of its security policy included
        self._next, self._session, self._buffer = 0, None, b""

    def __enter__(self) -> Browser:
        (read_there, write_here), (read_here, write_there) = os.pipe(), os.pipe()
        # Above 10, so that none of them is 3 or 4 already, which is where Chromium listens and answers.
        inherited = [fcntl.fcntl(end, fcntl.F_DUPFD, 10) for end in (read_there, write_there)]
        with (self._folder / "browser.log").open("w") as log:
            self._process = os.posix_spawn(
                self._executable,
                [self._executable, *OPTIONS, f"--user-data-dir={self._folder / 'profile'}", "about:blank"],
                os.environ,
                file_actions=[
                    *((os.POSIX_SPAWN_DUP2, end, place) for end, place in zip(inherited, (3, 4), strict=True)),
                    *((os.POSIX_SPAWN_DUP2, log.fileno(), stream) for stream in (1, 2)),
                ],
                setpgroup=0,
            )
        for end in (read_there, write_there, *inherited):
            os.close(end)
        self._to, self._from = write_here, read_here
        pages = [info for info in self.call("Target.getTargets")["targetInfos"] if info["type"] == "page"]
        attached = self.call("Target.attachToTarget", targetId=pages[0]["targetId"], flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process, signal.SIGKILL)
        os.waitpid(self._process, 0)
        os.close(self._to)
        os.close(self._from)

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        """Ask, and wait for the answer; events that come meanwhile are noted."""
        self._next += 1
        message: dict[str, Any] = {"id": self._next, "method": method, "params": parameters}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._next:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                result: dict[str, Any] = answer["result"]
                return result

    def _receive(self) -> dict[str, Any]:
        end = time.monotonic() + TIMEOUT_S
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._from], [], [], max(0, end - time.monotonic()))
            data = os.read(self._from, 2**20) if ready else b""
            if not data:
                log = (self._folder / "browser.log").read_text(errors="replace")
                raise RuntimeError(f"the browser does not answer; its log ends with: {log[-500:]}")
            self._buffer += data
        text, _, self._buffer = self._buffer.partition(b"\0")
        message: dict[str, Any] = json.loads(text)
        event, details = message.get("method"), message.get("params", {})
        if event == "Network.requestWillBeSent":
            self.requests.append(details["request"]["url"])
        elif event == "Log.entryAdded":
            self.messages.append(details["entry"]["text"])
        elif event == "Runtime.exceptionThrown":
            self.messages.append(details["exceptionDetails"]["exception"]["description"])
        return message

    def open(
        self, page: Path, width: int = 1280, height: int = 900, *, dark: bool = False, script: bool = True
    ) -> None:
        """Load a file into a window of this size, as a phone would if it is narrow, and wait until it is there."""
        self.call("Emulation.setScriptExecutionDisabled", value=not script)
        shape = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 500}
        self.call("Emulation.setDeviceMetricsOverride", **shape)
        scheme = [{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}]
        self.call("Emulation.setEmulatedMedia", features=scheme)
        self.call("Page.navigate", url=page.absolute().as_uri())
        while self.run("document.readyState") != "complete":
            time.sleep(0.02)

    def run(self, script: str) -> Any:
        """The value of an expression in the page."""
        answer = self.call("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(answer["exceptionDetails"]["exception"]["description"])
        return answer["result"].get("value")

    def press(self, key: str, code: int) -> None:
        """A key down and up, as a keyboard gives it. `code`: its virtual key code."""
        text = {"Enter": "\r", " ": " "}.get(key, "")
        for kind in ("keyDown", "keyUp"):
            more = {"text": text} if text and kind == "keyDown" else {}
            self.call("Input.dispatchKeyEvent", type=kind, key=key, windowsVirtualKeyCode=code, **more)

    def screenshot(self, clip: dict[str, float] | None = None) -> np.ndarray:
        """What is seen, or the rectangle `clip` (x, y, width, height) of the whole page: uint8 (H, W, 3)."""
        from PIL import Image

        more: dict[str, Any] = {} if clip is None else {"clip": {**clip, "scale": 1}, "captureBeyondViewport": True}
        data = self.call("Page.captureScreenshot", format="png", **more)["data"]
        with Image.open(io.BytesIO(base64.b64decode(data))) as image:
            return np.asarray(image.convert("RGB"))
