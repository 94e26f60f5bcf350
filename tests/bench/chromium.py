"""A headless Chromium, controlled through a pipe with the DevTools protocol."""

import itertools
import json
import os
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --no-first-run --hide-scrollbars"
    " --disable-background-networking --disable-component-update --remote-debugging-pipe"
)


def find_chromium() -> str | None:
    """Return the browser in the variable CHROMIUM, else the first one on the path."""
    names = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
    return os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, names)), None)


class Browser:
    """A browser with one tab."""

    def __init__(self, binary: str, profile: Path) -> None:
        (to_read, send), (self._receive, to_write) = os.pipe(), os.pipe()

        def pipes_as_three_and_four() -> None:  # --remote-debugging-pipe expects them there
            for source, target in ((to_read, 60), (to_write, 61), (60, 3), (61, 4)):
                os.dup2(source, target)

        command = [binary, *ARGUMENTS.split(), f"--user-data-dir={profile}"]
        options: dict[str, Any] = {"close_fds": False, "start_new_session": True, "stderr": subprocess.DEVNULL}
        self._process = subprocess.Popen(command, preexec_fn=pipes_as_three_and_four, **options)
        os.close(to_read), os.close(to_write)
        self._send, self._numbers, self._left = os.fdopen(send, "wb"), itertools.count(1), b""
        self._session: dict[str, str] = {}
        self.events: list[dict[str, Any]] = []
        target = self.call("Target.createTarget", url="about:blank")["targetId"]
        self._session = {"sessionId": self.call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]}
        for domain in ("Page", "Network", "Log", "Runtime"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Send a command and return its result; events received before are kept."""
        number = next(self._numbers)
        self._send.write(
            json.dumps({"id": number, "method": method, "params": params, **self._session}).encode() + b"\0"
        )
        self._send.flush()
        while (answer := self._message()).get("id") != number:
            self.events.append(answer)
        return dict(answer["result"])

    def open(self, path: Path, width: int, dark: bool = False) -> None:
        """Load a file in a window of this width; `events` then holds the events of loading."""
        self.events.clear()
        size = {"width": width, "height": 844, "deviceScaleFactor": 1, "mobile": width < 600}
        self.call("Emulation.setDeviceMetricsOverride", **size)
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        self.call("Emulation.setEmulatedMedia", features=[scheme])
        self.call("Page.navigate", url=path.absolute().as_uri())
        while not any(event.get("method") == "Page.loadEventFired" for event in self.events):
            self.events.append(self._message())

    def value(self, expression: str) -> Any:
        """Return the value of a JavaScript expression, which the page's policy does not block."""
        return self.call("Runtime.evaluate", expression=expression, returnByValue=True)["result"].get("value")

    def close(self) -> None:
        """Stop the browser and its children."""
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _message(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            part = os.read(self._receive, 1 << 20)
            assert part, "the browser stopped"
            self._left += part
        message, _, self._left = self._left.partition(b"\0")
        return dict(json.loads(message))
