"""Headless Chromium through ChromeDriver's own protocol; Debian's packages chromium and chromium-driver."""

import base64
import json
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the key that the protocol names elements by


def absence() -> str | None:
    """Return what is not installed, None if a browser is."""
    missing = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    return f"not run: there is no {' and no '.join(missing)} here" if missing else None


class Browser:
    def __init__(self, address: str, session: str) -> None:
        self._base = f"{address}/session/{session}"

    def call(self, method: str, path: str, **body: Any) -> Any:
        return request(method, f"{self._base}/{path}", body if method == "POST" else None)

    def open(self, page: Path | str) -> None:
        self.call("POST", "url", url=page if isinstance(page, str) else page.as_uri())

    def run(self, script: str, *arguments: Any) -> Any:
        return self.call("POST", "execute/sync", script=script, args=list(arguments))

    def click(self, selector: str) -> None:
        found = self.call("POST", "element", using="css selector", value=selector)
        self.call("POST", f"element/{found[ELEMENT]}/click")

    def text(self, selector: str) -> str:
        return str(self.run("return document.querySelector(arguments[0]).textContent", selector))

    def resize(self, width: int, height: int) -> None:
        self.call("POST", "goog/cdp/execute", cmd="Emulation.setDeviceMetricsOverride", params={
            "width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600,
        })  # fmt: skip

    def errors(self) -> list[str]:
        return [entry["message"] for entry in self.call("POST", "se/log", type="browser")]

    def picture(self) -> bytes:
        return base64.b64decode(self.call("GET", "screenshot"))


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    driver = subprocess.Popen(["chromedriver", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}"
    try:
        for _ in range(100):
            try:
                request("GET", f"{address}/status", None)
                break
            except OSError:
                time.sleep(0.1)
        options = {"args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"alwaysMatch": {"goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}}
        session = request("POST", f"{address}/session", {"capabilities": wanted})["sessionId"]
        browser = Browser(address, session)
        try:
            yield browser
        finally:
            request("DELETE", f"{address}/session/{session}", None)
    finally:
        driver.terminate()
        driver.wait(10)


def request(method: str, url: str, body: dict[str, Any] | None) -> Any:
    data = None if body is None else json.dumps(body).encode()
    asked = urllib.request.Request(url, data, {"Content-Type": "application/json"}, method=method)
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    with opener.open(asked, timeout=60) as answer:
        return json.loads(answer.read())["value"]
