"""A server with /v1/chat/completions that judges answers by a quality that the test chooses, and can misbehave."""

import contextlib
import hashlib
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

BLOCKS = re.compile(r"^BEGIN ([0-9a-f]{16})\n(.*?)\nEND \1$", re.MULTILINE | re.DOTALL)
Fault = Callable[[BaseHTTPRequestHandler], None]


class JudgingServer(ThreadingHTTPServer):
    """quality: of an answer; higher is better, equal is a tie. bias: share of requests answered with A, whatever they
    are. faults: what the next requests get instead of a verdict. seen: bodies of all requests."""

    daemon_threads = True

    def __init__(self, quality: Callable[[str], float], bias: float = 0.0):
        super().__init__(("127.0.0.1", 0), Handler)
        self.quality, self.bias, self.faults, self.seen, self.keys = quality, bias, [], [], []
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_port}/v1"

    def letter(self, text: str) -> str:
        """A, B or C, about the last two of the texts between delimiters."""
        if int(hashlib.sha256(text.encode()).hexdigest(), 16) % 1000 < 1000 * self.bias:
            return "A"
        _, first, second = (text for _, text in BLOCKS.findall(text))
        difference = self.quality(first) - self.quality(second)
        return "A" if difference > 0 else "B" if difference < 0 else "C"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *_) -> None:
        pass

    def do_GET(self) -> None:
        send(200, json.dumps({"object": "list", "data": []}))(self)

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.seen.append(body)
            server.keys.append(self.headers["Authorization"])
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            fault = server.faults.pop(0) if server.faults else None
        time.sleep(0.005)
        with server.lock:
            server.busy -= 1
        if fault:
            fault(self)
        else:
            reply(server.letter(body["messages"][0]["content"]))(self)


def send(status: int, text: str, **headers: str) -> Fault:
    """Answers with this status and text. Retry_After becomes Retry-After."""

    def fault(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        for name, value in ({"Content-Type": "application/json"} | headers).items():
            handler.send_header(name.replace("_", "-"), value)
        handler.send_header("Content-Length", str(len(text.encode())))
        handler.end_headers()
        handler.wfile.write(text.encode())

    return fault


def reply(content: str | None, prompt_tokens: int = 100, completion_tokens: int = 2) -> Fault:
    """Answers with this message."""
    choices = [{"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": content}}]
    usage = {"prompt_tokens": prompt_tokens, "completion_tokens": completion_tokens, "total_tokens": 0}
    return send(200, json.dumps({"id": "1", "object": "chat.completion", "choices": choices, "usage": usage}))


def trickle(handler: BaseHTTPRequestHandler) -> None:
    """Sends a byte now and then, for ever."""
    handler.send_response(200)
    handler.send_header("Content-Length", "1000000")
    handler.end_headers()
    with contextlib.suppress(OSError):
        while True:
            handler.wfile.write(b" ")
            time.sleep(0.1)


def hang_up(handler: BaseHTTPRequestHandler) -> None:
    """Closes the connection."""
    handler.connection.shutdown(socket.SHUT_RDWR)
    handler.close_connection = True


def stall(handler: BaseHTTPRequestHandler) -> None:
    """Does not answer for longer than the tests wait."""
    time.sleep(3)


@contextlib.contextmanager
def judging(quality: Callable[[str], float], bias: float = 0.0) -> Iterator[JudgingServer]:
    """A running server."""
    server = JudgingServer(quality, bias)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
