"""A small client of headless Chromium (Debian package ``chromium``), over the DevTools pipe.

Input goes through the browser, so that keys and pointers do what a reader's would; nothing but the
standard library is needed.
"""

import base64
import contextlib
import fcntl
import json
import os
import re
import select
import shutil
import subprocess
import sys
import time

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
]
# The browser reads on descriptor 3 and answers on 4; they are free only in a new process.
LAUNCH = "import os, sys; os.dup2({0}, 3); os.dup2({1}, 4); os.execvp(sys.argv[1], sys.argv[1:])"
KEYS = {
    "Enter": (13, "\r"),
    " ": (32, " "),
    "Tab": (9, ""),
    "End": (35, ""),
    "Home": (36, ""),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}


def find():
    """Path of a Chromium, or None."""
    names = ("chromium", "chromium-browser", "google-chrome")
    return next(filter(None, map(shutil.which, names)), None)


class Navigated(Exception):
    """The page was replaced by the next one before it answered."""


class Browser:
    """One browser with one tab."""

    def __init__(self, path, profile):
        read_end, self._commands = os.pipe()
        self._answers, write_end = os.pipe()
        # High numbers, so that placing one on 3 or 4 does not close the other.
        ends = [fcntl.fcntl(end, fcntl.F_DUPFD, 20) for end in (read_end, write_end)]
        launch = [sys.executable, "-c", LAUNCH.format(*ends), path, *FLAGS]
        self._process = subprocess.Popen(
            [*launch, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=ends,
            stderr=subprocess.DEVNULL,
        )
        for end in (read_end, write_end, *ends):
            os.close(end)
        self._buffer, self._last, self._session = b"", 0, None
        self.console, self.requests = [], []
        attached = self.send("Target.attachToTarget", targetId=self._page(), flatten=True)
        self._session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")

    def _page(self):
        """The tab's id: the browser answers before it is there."""
        end = time.monotonic() + 120
        while True:
            targets = self.send("Target.getTargets")["targetInfos"]
            if pages := [target["targetId"] for target in targets if target["type"] == "page"]:
                return pages[0]
            assert time.monotonic() < end, targets
            time.sleep(0.02)

    def close(self):
        with contextlib.suppress(Exception):
            self.send("Browser.close")
        os.close(self._commands)
        try:
            self._process.wait(60)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        os.close(self._answers)

    def send(self, method, **params):
        """Send a command and wait for its answer."""
        self._last += 1
        message = {"id": self._last, "method": method, "params": params}
        if self._session:
            message["sessionId"] = self._session
        os.write(self._commands, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._last:
                if re.search("navigated|context", answer.get("error", {}).get("message", "")):
                    raise Navigated(method)
                assert "error" not in answer, (method, answer["error"])
                return answer["result"]

    def _receive(self):
        end = time.monotonic() + 300
        while b"\0" not in self._buffer:
            ready, _, _ = select.select([self._answers], [], [], max(0, end - time.monotonic()))
            part = os.read(self._answers, 2**20) if ready else b""
            assert part, "the browser does not answer"
            self._buffer += part
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        method, params = message.get("method"), message.get("params", {})
        if method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
        elif method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.console.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled":
            self.console.append([value.get("value") for value in params["args"]])
        elif method == "Log.entryAdded":
            self.console.append(params["entry"]["text"])
        return message

    def open(self, page, *, width=1280, dark=False, scripts=True):
        """Load a page in a window of a width, in a tab without a past, and wait until it is up."""
        self.send("Emulation.setScriptExecutionDisabled", value=not scripts)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.send("Emulation.setEmulatedMedia", features=[scheme])
        metrics = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **metrics)
        # Else the page of before, which may be the same one, could be taken for the new one.
        self.send("Page.navigate", url="about:blank")
        self.until("location.href === 'about:blank'")
        self.console, self.requests = [], []
        self.reload(page)

    def reload(self, page):
        """Load a page again, in the tab as it is."""
        self.send("Page.navigate", url=page)
        self.until(f"location.href === {json.dumps(page)} && document.readyState === 'complete'")

    def run(self, expression):
        """Value of a JavaScript expression; a promise is waited for."""
        answer = self.send(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True
        )
        assert "exceptionDetails" not in answer, answer["exceptionDetails"]
        return answer["result"].get("value")

    def until(self, expression):
        """Wait until an expression is true."""
        end = time.monotonic() + 120
        while True:
            with contextlib.suppress(Navigated):
                if self.run(expression):
                    return
            assert time.monotonic() < end, expression
            time.sleep(0.02)

    def press(self, *keys, ctrl=False):
        """Press and release keys, by their names in JavaScript."""
        for key in keys:
            code, text = KEYS[key]
            common = {"key": key, "code": key, "windowsVirtualKeyCode": code}
            common["modifiers"] = 2 * ctrl
            down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
            self.send("Input.dispatchKeyEvent", **down, **common)
            self.send("Input.dispatchKeyEvent", type="keyUp", **common)

    def click(self, selector, *, touch=False):
        """Click or tap the middle of an element, scrolled into view; what lies there gets it."""
        self.run(
            f"document.querySelector({json.dumps(selector)}).scrollIntoView({{block:'center'}})"
        )
        x, y = self.run(
            f"(() => {{ const b = document.querySelector({json.dumps(selector)})"
            ".getBoundingClientRect(); return [b.x + b.width / 2, b.y + b.height / 2]; })()"
        )
        if touch:
            self.send("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": x, "y": y}])
            self.send("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
            return
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", clickCount=1)

    def screenshot(self, path):
        """Write a picture of the whole page."""
        height = self.run("document.documentElement.scrollHeight")
        width = self.run("innerWidth")
        clip = {"x": 0, "y": 0, "width": width, "height": height, "scale": 1}
        answer = self.send("Page.captureScreenshot", captureBeyondViewport=True, clip=clip)
        path.write_bytes(base64.b64decode(answer["data"]))
