"""A real server of the S3 protocol on loopback (moto), with one bucket called runs, a door before it, and URIs."""

from __future__ import annotations

import http.client
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SECRET = "wJalrXUtnFEMI/K7MDENG+bPxRfiCYEXAMPLEKEY"


def free_port() -> int:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        return bound.getsockname()[1]


@contextmanager
def serving() -> Iterator[int]:
    """Yield the server's port."""
    os.environ |= {"AWS_ACCESS_KEY_ID": "AKIDEXAMPLE", "AWS_SECRET_ACCESS_KEY": SECRET}
    port = free_port()
    log = subprocess.DEVNULL
    process = subprocess.Popen(
        [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)], stdout=log, stderr=log
    )
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", port)
                connection.request("PUT", "/runs")
                assert connection.getresponse().status == 200
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        yield port
    finally:
        process.kill()
        process.wait()


def uri(port: int, folder: str, bucket: str = "runs") -> str:
    return f"s3://{bucket}/{folder}?endpoint_override=127.0.0.1:{port}&scheme=http&region=us-east-1"


class Door(ThreadingHTTPServer):
    """Stands before the server, and answers itself for as long as it is told to."""

    daemon_threads = True

    def __init__(self, behind: int) -> None:
        super().__init__(("127.0.0.1", 0), _Request)
        self.behind = behind
        self.port: int = self.server_address[1]
        self.refusals: list[tuple[int, str]] = []

    @classmethod
    @contextmanager
    def opened(cls, behind: int) -> Iterator[Door]:
        """Answer requests while the block runs."""
        door = cls(behind)
        thread = threading.Thread(target=door.serve_forever)
        thread.start()
        try:
            yield door
        finally:
            door.shutdown()
            thread.join()
            door.server_close()


class _Request(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Door

    def handle_any(self) -> None:
        body = self._body()
        if self.server.refusals:
            status, code = self.server.refusals.pop(0)
            answer = f"<Error><Code>{code}</Code><Message>told so</Message></Error>".encode()
            headers = {"Content-Type": "application/xml"}
        else:
            connection = http.client.HTTPConnection("127.0.0.1", self.server.behind)
            headers = {name: value for name, value in self.headers.items() if name.lower() != "transfer-encoding"}
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            status, answer, headers = response.status, response.read(), dict(response.getheaders())
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date", "server"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(answer)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(answer)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any

    def log_message(self, *_: object) -> None:
        """Say nothing."""
