"""A page in headless Chromium, asked through DevTools over a pipe: no driver, no open port."""

import base64
import json
import os
import shutil
import subprocess
from contextlib import contextmanager
from itertools import count
from pathlib import Path
from tempfile import TemporaryDirectory

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
FLAGS = ("--headless", "--disable-gpu", "--no-first-run", "--remote-debugging-pipe")
# As root, the user of most containers, Chromium's own sandbox does not start.
FLAGS += ("--no-sandbox",) * (os.geteuid() == 0)
CONSOLE = ("Runtime.exceptionThrown", "Runtime.consoleAPICalled", "Log.entryAdded")


def find_browser() -> str | None:
    """Return the path of a browser that is installed."""
    return next(filter(None, map(shutil.which, NAMES)), None)


class Page:
    """A tab: `call` sends a DevTools command, `events` gathers what the page tells unasked."""

    def __init__(self, requests, answers):
        self.requests, self.answers = requests, answers
        self.ids, self.session, self.events = count(1), None, []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        attached = self.call("Target.attachToTarget", targetId=target, flatten=True)
        self.session = attached["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")

    def call(self, method, **values):
        """Return the result of a command."""
        request = {"id": next(self.ids), "method": method, "params": values}
        request |= {"sessionId": self.session} if self.session else {}
        self.requests.write(json.dumps(request).encode() + b"\0")
        while (answer := self.read()).get("id") != request["id"]:
            self.events.append(answer)
        assert "error" not in answer, answer
        return answer["result"]

    def read(self):
        """Return the browser's next message."""
        message = bytearray()
        while (byte := self.answers.read(1)) != b"\0":
            assert byte, "the browser ended"
            message += byte
        return json.loads(message)

    def open(self, path: Path):
        """Load a file and wait until all of it is there."""
        self.call("Page.navigate", url=path.resolve().as_uri())
        while self.events_of("Page.loadEventFired") == []:
            self.events.append(self.read())

    def events_of(self, *methods):
        """Return the parameters of events of these names."""
        return [event["params"] for event in self.events if event.get("method") in methods]

    def value(self, expression):
        """Return what an expression of JavaScript is."""
        answer = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        assert "exceptionDetails" not in answer, answer
        return answer["result"].get("value")

    def move_to(self, x, y):
        """Move the mouse, as a hand does."""
        self.call("Input.dispatchMouseEvent", type="mouseMoved", x=x, y=y)

    def press(self, key):
        """Press a key and let it go."""
        code = {"Tab": 9, "Escape": 27}[key]
        for kind in ("keyDown", "keyUp"):
            values = {"key": key, "windowsVirtualKeyCode": code}
            self.call("Input.dispatchKeyEvent", type=kind, **values)

    def screenshot(self, path: Path):
        """Write a picture of the page."""
        answer = self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(answer["data"]))


@contextmanager
def browser_page(browser: str, width: int = 1200, height: int = 1000):
    """Give a `Page` of a browser that runs for as long as the block."""
    (commands_in, commands_out), (answers_in, answers_out) = os.pipe(), os.pipe()

    def give_pipe():  # the browser reads commands from 3 and answers on 4
        for source, target in ((os.dup(commands_in), 3), (os.dup(answers_out), 4)):
            os.dup2(source, target)

    with TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        size = f"--window-size={width},{height}"
        process = subprocess.Popen(
            [browser, *FLAGS, size, f"--user-data-dir={profile}"],
            preexec_fn=give_pipe,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(commands_in)
        os.close(answers_out)
        try:
            with os.fdopen(commands_out, "wb", 0) as asked, os.fdopen(answers_in, "rb") as told:
                yield Page(asked, told)
        finally:
            process.terminate()
            process.wait(30)
