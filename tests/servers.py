"""What the tests' HTTP servers share: loopback, a count of what was asked, and injected bad days."""

import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Refused(Exception):
    """An answer that is an error."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status, self.message = status, message


@dataclass
class Fault:
    """An answer given instead of the real one."""

    method: str
    path: str
    status: int
    times: int
    after: bool
    """Whether the request is carried out before the error is answered, as when an answer is lost on its way."""
    headers: dict[str, str]


@dataclass
class Faulty:
    """A server that counts and can be made to fail."""

    url: str = ""
    delay: float = 0.0
    """Seconds that every answer takes."""
    requests: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of everything that was asked, in order."""
    faults: list[Fault] = field(default_factory=list)
    lock: threading.RLock = field(default_factory=threading.RLock)

    def fail(
        self, method: str, path: str, status: int, times: int = 1, after: bool = False, headers: dict[str, str] | None = None
    ) -> None:
        """The next `times` requests whose method is `method` and whose path matches `path` are answered with `status`."""
        self.faults.append(Fault(method, path, status, times, after, headers or {}))

    def fault(self, method: str, path: str) -> Fault | None:
        """What is wrong with this request, once."""
        for one in self.faults:
            if one.times > 0 and one.method == method and re.fullmatch(one.path, path):
                one.times -= 1
                return one
        return None

    def asked(self, method: str, path: str) -> int:
        """How often something was asked."""
        return sum(seen == method and re.fullmatch(path, where) is not None for seen, where in self.requests)


class Page(BaseHTTPRequestHandler):
    """A server of web pages, whatever is asked."""

    def log_message(self, *ignored: Any) -> None:
        return

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/html")
        self.end_headers()
        self.wfile.write(b"<html>hello</html>")


@contextmanager
def serving(handler_class: Callable[..., BaseHTTPRequestHandler]) -> Iterator[str]:
    """Serves on a free port of loopback; yields the URL."""
    http = ThreadingHTTPServer(("127.0.0.1", 0), handler_class)
    http.daemon_threads = True
    thread = threading.Thread(target=http.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{http.server_address[1]}"
    finally:
        http.shutdown()
        http.server_close()
        thread.join()
