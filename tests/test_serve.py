"""A critic behind a real `transformers serve`: a folder with the bundled model, on this machine, without a network."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from urllib.error import URLError
from urllib.request import ProxyHandler, build_opener

import pytest

from alignkit.errors import UserError
from alignkit.feedback import Account, Endpoint, Local, Question
from alignkit.loading import BUNDLED

SUMS = {"6-6+2+9=": "=11", "9+5+6-6-8=": "=6", "4+5+3+4=": "=16", "3+6-9+4+6=": "=10"}  # that it has learnt
QUESTIONS = [Question([{"role": "user", "content": text}]) for text in SUMS]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """The bundled model of sums with a chat template beside it, which it was not trained with: the bare turns."""
    path = tmp_path_factory.mktemp("served") / "arithmetic"
    shutil.copytree(BUNDLED / "arithmetic", path)
    (path / "chat_template.jinja").write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    return str(path)


class Served:
    """`transformers serve FOLDER`, started and waited for; ``stop`` ends it."""

    def __init__(self, folder: str, log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.url, self.log = f"http://127.0.0.1:{port}/v1", log
        words = ["serve", folder, "--host", "127.0.0.1", "--port", str(port), "--device", "cpu"]
        code = "import sys; from transformers.cli.transformers import main; sys.argv[0] = 'transformers'; main()"
        with open(log, "w") as out:
            self.process = subprocess.Popen(
                [sys.executable, "-c", code, *words], stdout=out, stderr=out,
                env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},
            )  # fmt: skip
        direct = build_opener(ProxyHandler({}))
        for _ in range(600):
            assert self.process.poll() is None, log.read_text()
            try:
                with direct.open(self.url.replace("/v1", "/health"), timeout=5) as found:
                    assert json.load(found) == {"status": "ok"}
                return
            except URLError:
                time.sleep(0.1)
        self.stop()
        raise AssertionError(log.read_text())

    def stop(self) -> None:
        self.process.kill()
        self.process.wait()


@pytest.fixture(scope="module")
def served(folder, tmp_path_factory):
    server = Served(folder, tmp_path_factory.mktemp("log") / "serve.log")
    yield server
    server.stop()


def test_a_served_model_answers_as_it_does_in_this_process(served, folder, tmp_path):
    with Account(tmp_path / "feedback.sqlite", "runs/a") as account:
        there = Endpoint(model=folder, base_url=served.url, max_new_tokens=40).ask([*QUESTIONS, QUESTIONS[0]], account)
        assert account.totals()["calls"] == 4 and account.totals()["cached"] == 0
        here = Local(model=folder, max_new_tokens=40, device="cpu", dtype="float16").ask(QUESTIONS, account)
        totals = account.totals()
    assert there[4] == there[0]
    # the server leaves the space that begins a text where it is
    assert [one.text.strip() for one in there[:4]] == [one.text for one in here]
    assert [(one.cut, one.prompt_tokens, one.tokens) for one in there[:4]] == [
        (one.cut, one.prompt_tokens, one.tokens) for one in here
    ]
    assert all(one.text.endswith(end) for one, end in zip(there, SUMS.values(), strict=False))
    assert totals["tokens"] == 2 * sum(one.tokens for one in here) > 0
    assert totals["prompt_tokens"] == 2 * sum(len(text) + 1 for text in SUMS)  # a byte each, and the first token


def test_settings_reach_the_server(served, folder, tmp_path):
    # transformers 5.24 samples only where a generation_config says so, whatever the temperature
    how = {"generation_config": json.dumps({"do_sample": True, "eos_token_id": 2, "pad_token_id": 0})}
    with Account(tmp_path / "feedback.sqlite", "runs/a", concurrency=1) as account:
        short = Endpoint(model=folder, base_url=served.url, max_new_tokens=3).ask(QUESTIONS[:1], account)[0]
        drawn = [
            Endpoint(model=folder, base_url=served.url, max_new_tokens=40, temperature=3.0, seed=seed, extra=how).ask(
                QUESTIONS[:1], account
            )[0]
            for seed in (1, 2)
        ]
    assert short.cut and short.tokens == 3
    assert drawn[0].text != drawn[1].text


def test_another_model_is_refused(served, folder, tmp_path):
    many = [Question([{"role": "user", "content": f"{i}+1="}]) for i in range(12)]
    with Account(tmp_path / "feedback.sqlite", "runs/a") as account:
        with pytest.raises(UserError, match=r"refused all of the first 8 requests: 400: Server is pinned"):
            Endpoint(model="other", base_url=served.url).ask(many, account)
        assert account.totals()["failed"] == 0


def test_what_was_answered_needs_no_server(served, folder, tmp_path):
    """The last test: it stops the server."""
    endpoint = Endpoint(model=folder, base_url=served.url, max_new_tokens=40, retries=0)
    with Account(tmp_path / "feedback.sqlite", "runs/a") as account:
        before = endpoint.ask(QUESTIONS, account)
    served.stop()
    with Account(tmp_path / "feedback.sqlite", "runs/b") as account:
        assert endpoint.ask(QUESTIONS, account) == before
        assert account.totals()["cached"] == 4 and account.totals()["calls"] == 0
        with pytest.raises(UserError, match="does not answer"):
            endpoint.ask([Question([{"role": "user", "content": "2+2="}])], account)
