"""A server that speaks OpenAI's protocol and answers as it is told, well or badly; it counts what it is asked.

Answers are a function of the request alone, so that another run gets the same ones.
"""

import hashlib
import json
import re
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

WORDS = (
    "quiet",
    "patient",
    "curious",
    "viewers",
    "readers",
    "families",
    "evenings",
    "stories",
    "puzzles",
    "landscapes",
    "friendship",
    "courage",
    "irony",
    "music",
    "history",
    "science",
    "mystery",
    "romance",
    "danger",
    "memory",
    "travel",
    "childhood",
    "machines",
    "justice",
    "winter",
    "gardens",
    "letters",
    "oceans",
)


@dataclass(frozen=True)
class Asked:
    """One request as the server saw it."""

    system: str
    data: str
    body: dict[str, Any]
    headers: dict[str, str]

    @property
    def name(self) -> str:
        """What follows the title's label, for choosing a behaviour by row."""
        found = re.search(r"Title: ([^\n]*)", self.data)
        return found.group(1) if found else ""


def profile_of(asked: Asked, **changes: Any) -> dict[str, Any]:
    """A good answer: a sentence made of words drawn by the data."""
    digest = hashlib.sha256(asked.data.encode()).digest()
    chosen = [WORDS[byte % len(WORDS)] for byte in digest[:12]]
    text = f"Enjoyed by people who look for {', '.join(chosen[:6])} and who care for {' and '.join(chosen[6:9])} in a story."
    return {"profile": text, "tags": [], "confidence": 0.5, "reasoning": None} | changes


def completion(content: Any, finish_reason: str = "stop", **changes: Any) -> bytes:
    """A response's body."""
    message = {"role": "assistant", "content": content}
    body = {
        "id": "x",
        "object": "chat.completion",
        "choices": [{"index": 0, "message": message, "finish_reason": finish_reason}],
        "usage": {"prompt_tokens": 100, "completion_tokens": 20},
    }
    return json.dumps(body | changes).encode()


Behaviour = Callable[["Handler", Asked], None]
"""Sends a response, or does something worse."""


def good(handler: "Handler", asked: Asked) -> None:
    handler.send(200, completion(json.dumps(profile_of(asked))))


@dataclass
class LLMServer:
    """What is behind the address."""

    behaviour: Behaviour = good
    asked: list[Asked] = field(default_factory=list)
    answered: int = 0
    """Responses sent with status 200."""
    most_at_once: int = 0
    abandoned: int = 0
    """Connections that the client closed before it had an answer; see `Handler.outlast`."""
    base_url: str = ""
    lock: threading.Lock = field(default_factory=threading.Lock)
    released: threading.Event = field(default_factory=threading.Event)
    """Set at the end, for behaviours that wait."""
    _now: int = 0

    def enter(self, asked: Asked) -> int:
        with self.lock:
            self.asked.append(asked)
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            return len(self.asked)

    def leave(self) -> None:
        with self.lock:
            self._now -= 1


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    server: "_Server"

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        system, data = (message["content"] for message in body["messages"])
        asked = Asked(system, data, body, {name.lower(): value for name, value in self.headers.items()})
        llm = self.server.llm
        llm.enter(asked)
        try:
            llm.behaviour(self, asked)
        except (BrokenPipeError, ConnectionResetError):
            self.close_connection = True  # the client has given up
        finally:
            llm.leave()

    def send(self, status: int, body: bytes, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)
        if status == 200:
            with self.server.llm.lock:
                self.server.llm.answered += 1

    def hang(self) -> None:
        """Says nothing until the test ends."""
        self.server.llm.released.wait(180)
        self.close_connection = True

    def outlast(self) -> None:
        """Says nothing until the client closes the connection."""
        self.connection.settimeout(180)
        gone = self.connection.recv(1) == b""
        with self.server.llm.lock:
            self.server.llm.abandoned += gone
        self.close_connection = True

    def drip(self) -> None:
        """A byte now and then, so that no read is ever late."""
        self.send_response(200)
        self.send_header("content-length", "100000")
        self.end_headers()
        while not self.server.llm.released.wait(0.05):
            self.wfile.write(b" ")

    def reset(self) -> None:
        """The connection is reset without a word."""
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()
        self.close_connection = True

    def die_in_the_middle(self, asked: Asked) -> None:
        """Half an answer, then the connection ends."""
        body = completion(json.dumps(profile_of(asked)))
        self.send_response(200)
        self.send_header("content-length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: len(body) // 2])
        self.wfile.flush()
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:
        """Nothing: the test looks at what was asked."""


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def __init__(self, llm: LLMServer) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.llm = llm

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing: connections that break are what is tested."""


@contextmanager
def llm_server(behaviour: Behaviour = good) -> Iterator[LLMServer]:
    """The server for the length of a block."""
    llm = LLMServer(behaviour)
    server = _Server(llm)
    llm.base_url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield llm
    finally:
        llm.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
