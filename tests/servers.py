"""A web server on loopback that behaves as real ones do, well or badly."""

import contextlib
import hashlib
import itertools
import re
import socket
import socketserver
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote
from urllib.request import Request, urlopen


@dataclass
class FileServer:
    """What a server does, and what it was asked."""

    folder: Path
    ranges: bool
    has_head: bool
    cut_after: int | None
    cuts: int
    has_etag: bool = True
    honors_if_range: bool = True
    range_shift: int = 0
    """Bytes by which the start of a part is off, as its Content-Range tells."""
    status: int = 0
    """Answer everything with this error."""
    absent_status: int = 404
    """Answer with this what is not there; buckets that may not be listed say 403."""
    port: int = 0
    dies: bool = False
    """After the first cut, answer with an error."""
    slow_after: int | None = None
    """Bytes of a body after which nothing more comes; `reached` is set then."""
    reached: threading.Event = field(default_factory=threading.Event)
    stopped: threading.Event = field(default_factory=threading.Event)
    asked: list = field(default_factory=list)
    """(method, path, headers) in order."""

    def url(self, path: str = "") -> str:
        return f"http://127.0.0.1:{self.port}/{path}".rstrip("/")


class Handler(BaseHTTPRequestHandler):
    """Answers as the server's state says."""

    def log_message(self, *_):
        pass

    def do_HEAD(self):  # noqa: N802 the library's name
        if not self.server.state.has_head:
            self.send_error(501)
            return
        self.answer(with_body=False)

    def do_GET(self):  # noqa: N802 the library's name
        self.answer(with_body=True)

    def answer(self, *, with_body):
        state = self.server.state
        state.asked.append((self.command, self.path, dict(self.headers)))
        path = state.folder / unquote(self.path).lstrip("/")
        if state.status:
            self.send_error(state.status)
            return
        if not path.is_file():
            self.send_error(state.absent_status)
            return
        data = path.read_bytes()
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        start = re.match(r"bytes=(\d+)-$", self.headers.get("Range", ""))
        is_other = state.honors_if_range and self.headers.get("If-Range", etag) != etag
        if start and state.ranges and not is_other:
            first = int(start[1]) + state.range_shift
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {first}-{len(data) - 1}/{len(data)}")
            data = data[first:]
        else:
            self.send_response(200)
        if state.has_etag:
            self.send_header("ETag", etag)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if with_body:
            self.send_body(data)

    def send_body(self, data):
        state = self.server.state
        if state.cut_after is not None and state.cuts and len(data) > state.cut_after:
            state.cuts -= 1
            data = data[: state.cut_after]
            self.close_connection = True
            state.status = 500 if state.dies else 0
            self.wfile.write(data)
            time.sleep(0.2)  # what is sent is read before the end is noticed
            return
        if state.slow_after is not None and len(data) > state.slow_after:
            self.wfile.write(data[: state.slow_after])
            state.reached.set()
            state.stopped.wait(60)
            return
        self.wfile.write(data)


@contextmanager
def file_server(folder, *, ranges=True, has_head=True, cut_after=None, cuts=0, slow_after=None):
    """Serve a folder.

    Args:
        folder: Its files are served by their paths.
        ranges: Whether requests for a part get one.
        has_head: Whether HEAD is known.
        cut_after: Bytes of a body after which the connection is closed, `cuts` times.
        cuts: How often.
        slow_after: Bytes of a body after which nothing more comes.
    """
    state = FileServer(Path(folder), ranges, has_head, cut_after, cuts)
    state.slow_after = slow_after
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.state = state
    state.port = server.server_address[1]
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        state.stopped.set()
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def bucket(monkeypatch, name="bucket"):
    """Serve an empty S3 bucket on loopback and name it in the environment; give the port."""
    from moto.server import ThreadedMotoServer
    from s3fs import S3FileSystem

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    port = server.get_host_and_port()[1]
    name_server(monkeypatch, port)
    urlopen(Request(f"http://127.0.0.1:{port}/moto-api/reset", method="POST")).close()
    S3FileSystem().mkdir(name)
    try:
        yield port
    finally:
        server.stop()
        S3FileSystem.clear_instance_cache()


def name_server(monkeypatch, port):
    """Have this process and those that it starts find S3 on a port of loopback."""
    from s3fs import S3FileSystem

    S3FileSystem.clear_instance_cache()
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    for key in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(key, "test")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")


@contextmanager
def cutting_proxy(port, cut_after):
    """Pass connections on to a port of loopback; every other one ends after so many bytes.

    Gives its own port and the list of connections that it has cut.
    """
    cut, count = [], itertools.count()

    def handle(handler):
        budget = [cut_after if next(count) % 2 == 0 else None]
        with socket.create_connection(("127.0.0.1", port)) as there:
            ends = (handler.request, there)
            back = threading.Thread(target=pass_on, args=(ends[::-1], budget, cut), daemon=True)
            back.start()
            pass_on(ends, budget, cut)
            back.join()

    kind = type("Cutting", (socketserver.BaseRequestHandler,), {"handle": handle})
    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), kind) as server:
        server.daemon_threads = True
        thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
        thread.start()
        try:
            yield server.server_address[1], cut
        finally:
            server.shutdown()
            thread.join()


def pass_on(ends, budget, cut):
    """Send what comes from one end to the other, until either ends or the budget is spent."""
    source, target = ends
    with contextlib.suppress(OSError):
        while data := source.recv(1 << 16):
            if budget[0] is not None:
                budget[0] -= len(data)
                if budget[0] < 0:
                    cut.append(len(data))
                    break
            target.sendall(data)
    for end in ends:
        with contextlib.suppress(OSError):
            end.shutdown(socket.SHUT_RDWR)
