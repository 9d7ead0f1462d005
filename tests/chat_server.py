"""A chat server with faults: /v1/chat/completions on a free port of this machine, in threads of this process.

What a prompt gets depends on the prompt alone: its answer is a hash of it, and its faults are those that ``plan`` gives it,
one a request until they are used up. It counts what it was asked, what it answered in full, and how many it had at once.
"""

from __future__ import annotations

import hashlib
import json
import random
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

TRANSIENT = (
    "429",
    "429 date",
    "500",
    "slow",
    "drip",
    "cut",
    "no json",
    "no schema",
    "empty",
    "half a character",
    "hang up",
)


def answer(prompt: str, seed: object = None) -> str:
    """What the server writes to a prompt."""
    return "answer " + hashlib.sha256(f"{prompt}/{seed}".encode()).hexdigest()[:12]


def tokens(text: str) -> int:
    """By its count, a word is a token."""
    return len(text.split())


def by_share(share: float, kinds: tuple[str, ...], seed: int = 0) -> Callable[[str], list[str]]:
    """A plan in which this share of the prompts fails once, in one of these ways, drawn from the prompt."""

    def plan(prompt: str) -> list[str]:
        drawn = random.Random(f"{seed}/{prompt}")
        return [drawn.choice(kinds)] if drawn.random() < share else []

    return plan


class ChatServer:
    """``with ChatServer(plan) as server``: it listens at ``server.url`` until the block ends."""

    def __init__(
        self,
        plan: Callable[[str], list[str]] = lambda prompt: [],  # prompt → faults of its first requests
        delay: float = 0.0,  # seconds that an answer takes
        slow: float = 2.0,  # seconds of a slow one
        retry_after: float = 1.0,  # seconds that a 429 asks for
        whim: bool = False,  # another answer each time, as a model gives that samples
        say: Callable[[str, object], str] = answer,  # (prompt, seed) → what it writes
    ) -> None:
        self.plan, self.delay, self.slow, self.retry_after, self.whim = plan, delay, slow, retry_after, whim
        self.say = say
        self.lock = threading.Lock()
        self.requests: list[dict[str, Any]] = []  # prompt, body, time, fault, headers
        self.completed: Counter[str] = Counter()  # prompt → whole answers
        self.peak = self.now = 0  # requests at the same time
        self.answered = threading.Event()
        self.wait_for = 10**9  # answers after which `answered` is set

    def __enter__(self) -> ChatServer:
        self.http = _Server(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}/v1"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *exception: object) -> None:
        self.http.shutdown()
        self.http.server_close()

    def asked(self) -> Counter[str]:
        """Prompt → requests."""
        with self.lock:
            return Counter(request["prompt"] for request in self.requests)

    def times(self, prompt: str) -> list[float]:
        """When a prompt was asked, in seconds."""
        return [request["time"] for request in self.requests if request["prompt"] == prompt]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, client_address: object) -> None:
        """A client that has gone, which is what some tests are about, is not worth a traceback."""


def _handler(server: ChatServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def log_message(self, *args: object) -> None:
            pass

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["content-length"])))
            prompt = body["messages"][-1]["content"]
            with server.lock:
                faults = server.plan(prompt)
                earlier = sum(request["prompt"] == prompt for request in server.requests) if faults else 0
                fault = faults[earlier] if earlier < len(faults) else ""
                headers = dict(self.headers)
                server.requests.append(
                    {"prompt": prompt, "body": body, "time": time.time(), "fault": fault, "headers": headers}
                )
                server.now += 1
                server.peak = max(server.peak, server.now)
            try:
                self.reply(prompt, body, fault)
            finally:
                with server.lock:
                    server.now -= 1

        def reply(self, prompt: str, body: dict[str, Any], fault: str) -> None:
            time.sleep(server.slow if fault == "slow" else server.delay)
            text = server.say(prompt, random.random() if server.whim else body.get("seed"))
            choice: dict[str, Any] = {
                "index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": text},
            }  # fmt: skip
            found: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": body["model"]}
            found |= {
                "choices": [choice],
                "usage": {"prompt_tokens": tokens(prompt), "completion_tokens": tokens(text), "total_tokens": 0},
            }
            status, more = 200, {}
            if fault == "429":
                status, more = 429, {"Retry-After": f"{server.retry_after:g}"}
            elif fault == "429 date":  # a date has whole seconds
                status, more = 429, {"Retry-After": formatdate(time.time() + server.retry_after + 1, usegmt=True)}
            elif fault.isdigit():
                status = int(fault)
            elif fault == "no schema":
                found = {"result": text, "usage": found["usage"]}
            elif fault == "empty":
                choice["message"]["content"] = " \n"
            elif fault == "length":
                choice["finish_reason"] = "length"
            elif fault == "only thoughts":
                choice["message"]["content"], choice["finish_reason"] = None, "length"
            elif fault == "content_filter":
                choice["message"]["content"], choice["finish_reason"] = None, "content_filter"
            elif fault == "refusal":
                choice["message"] |= {"content": None, "refusal": "I would rather not."}
            elif fault == "no usage":
                del found["usage"]
            elif fault == "echo":  # a server that shows what it must not
                choice["message"]["content"] = f"you sent {self.headers['authorization']}"
            if status != 200:
                found = {
                    "error": {"message": f"no {status} for {self.headers['authorization'].split()[-1]}", "code": None}
                }
            data = json.dumps(found, ensure_ascii=False).encode()
            if fault == "no json":
                data = data[:-9]
            elif fault == "half a character":
                data = data.replace(b"answer ", "answer ü".encode()[:-1])
            if fault == "hang up":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            for name, value in more.items():
                self.send_header(name, value)
            self.end_headers()
            if fault == "drip":  # never silent for long, and slow all the same
                for byte in data[:20]:
                    self.wfile.write(bytes([byte]))
                    time.sleep(server.slow / 20)
                self.wfile.write(data[20:])
                return
            if fault == "cut":
                self.wfile.write(data[: len(data) // 2])
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
                return
            if status == 200 and fault in ("", "length", "no usage", "echo"):
                with server.lock:  # before it is sent: who has received it must find it counted
                    server.completed[prompt] += 1
                    if sum(server.completed.values()) >= server.wait_for:
                        server.answered.set()
            self.wfile.write(data)

    return Handler
