"""A web server for one folder, in this process, that can be told to misbehave; it counts what it is asked for."""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

Answer = Callable[["Request"], None]


@dataclass
class Site:
    """What is served, and how."""

    folder: Path
    url: str = ""
    ranges: bool = True
    """Whether a request may ask for a part of a file."""
    faults: dict[str, list[Answer]] = field(default_factory=dict)
    """For a file name: what answers its next requests, one each, the last one for ever, instead of the file."""
    requests: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)
    """Of the bodies sent, by file name; counted before they are sent, so that who received one finds it counted."""

    @property
    def files_requested(self) -> dict[str, int]:
        """Requests by file name, the manifest left out."""
        return {name: count for name, count in self.requests.items() if name != "manifest.json"}


class Request(BaseHTTPRequestHandler):
    """One request to a `Site`."""

    site: Site
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        name = self.path.rpartition("/")[2]
        self.site.requests[name] += 1
        faults = self.site.faults.get(name, [])
        if faults:
            faults.pop(0)(self) if len(faults) > 1 else faults[0](self)
        elif not (self.site.folder / name).is_file():
            self.send_error(404)
        else:
            self.send_file()

    def send_file(self, at_most: int | None = None) -> None:
        """The file, or the part that is asked for; after `at_most` bytes the connection ends."""
        data = self.body()
        start = 0
        if self.site.ranges and (asked := self.headers.get("Range")):
            start = int(asked.removeprefix("bytes=").split("-")[0])
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        self.send(data[start:][:at_most])
        self.close_connection = at_most is not None

    def body(self) -> bytes:
        return (self.site.folder / self.path.rpartition("/")[2]).read_bytes()

    def send(self, data: bytes) -> None:
        """Part of a body."""
        self.site.num_bytes[self.path.rpartition("/")[2]] += len(data)
        self.wfile.write(data)

    def log_message(self, *_: object) -> None:
        """Nothing."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, *_: object) -> None:
        """A client that hangs up is what some tests are about."""


@contextmanager
def serve(folder: Path) -> Iterator[Site]:
    """Serves until the end of the block."""
    site = Site(folder)
    handler = type("Handler", (Request,), {"site": site})
    server = _Server(("127.0.0.1", 0), handler)
    site.url = f"http://127.0.0.1:{server.server_address[1]}/data/set"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield site
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
