"""An OpenAI-compatible endpoint on this machine that does what a test's script says."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# What the endpoint does with a request: (status, body[, headers]), or an Event that it waits for
# (the test sets it in the end) and then says nothing.
Action = tuple[Any, ...] | threading.Event


class Endpoint(ThreadingHTTPServer):
    """Answers with `act(request body)`; keeps what it received."""

    daemon_threads = True

    def __init__(self, act: Callable[[dict[str, Any]], Action]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.act = act
        self.received: list[dict[str, Any]] = []
        self.headers: list[Any] = []
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1/chat/completions"


class _Handler(BaseHTTPRequestHandler):
    server: Endpoint

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            self.server.received.append(body)
            self.server.headers.append(self.headers)
            action = self.server.act(body)
        if isinstance(action, threading.Event):
            action.wait(30)
            self.close_connection = True
            return
        status, text, *rest = action
        self.send_response(status)
        for name, value in (rest[0] if rest else {}).items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_: object) -> None:
        pass


@contextmanager
def serving(act: Callable[[dict[str, Any]], Action]) -> Iterator[Endpoint]:
    """An endpoint that lives as long as the block."""
    with Endpoint(act) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.shutdown()
            thread.join()


def scripted(actions: list[Action]) -> Callable[[dict[str, Any]], Action]:
    """One action after the other."""
    return lambda body: actions.pop(0)


def reply(content: Any, finish: str = "stop", usage: Any = None) -> Action:
    """A reply as the protocol has it."""
    choice = {"message": {"role": "assistant", "content": content}, "finish_reason": finish}
    answer: dict[str, Any] = {"choices": [choice]}
    if usage is not None:
        answer["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1]}
    return 200, json.dumps(answer)


def user_text(body: dict[str, Any]) -> str:
    """The last message of a request."""
    return body["messages"][-1]["content"]
