"""Critics: an endpoint with every fault that a server can have, the account behind it, and a model in this process."""

from __future__ import annotations

import json
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from email.utils import formatdate
from pathlib import Path
from typing import Any

import pytest
import yaml
from chat_server import TRANSIENT, ChatServer, answer, by_share
from hydra.utils import instantiate
from running import SMALL_SFT, composed

from alignkit import feedback
from alignkit.config import conf_dir
from alignkit.errors import Stopped, UserError
from alignkit.feedback import Account, Answer, Endpoint, Local, Question, account
from alignkit.run import Run

SECRET = "sk-0123456789-not-to-be-seen-abcdef"

CLIENT = """
import json, signal, sys
from pathlib import Path
import openai
from alignkit.feedback import Account, Endpoint, Question
url, path, run, count, handler = sys.argv[1:]
def stop(signum, frame):
    raise KeyboardInterrupt
if handler:
    signal.signal(signal.SIGINT, stop)
questions = [Question([{"role": "user", "content": f"question {i}"}]) for i in range(int(count))]
with Account(Path(path), run) as account:
    print("ready", flush=True)
    sys.stdin.readline()
    answers = Endpoint(model="m", base_url=url, timeout=1.0).ask(questions, account)
    print(json.dumps([[a.text for a in answers], account.totals()]))
"""


@pytest.fixture(autouse=True)
def _in_a_hurry(monkeypatch):
    """No key of the one who runs the tests, and shorter waits where the server does not ask for any."""
    monkeypatch.setattr(feedback, "BACKOFF", 0.02)
    for name in ("OPENAI_API_KEY", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)


def asks(*prompts: str) -> list[Question]:
    return [Question([{"role": "user", "content": prompt}]) for prompt in prompts]


def numbered(count: int) -> list[Question]:
    return asks(*(f"question {i}" for i in range(count)))


def expected(count: int) -> list[str]:
    return [answer(f"question {i}") for i in range(count)]


def texts(answers: list[Answer]) -> list[str | None]:
    return [one.text for one in answers]


def opened(folder: Path, run: str = "runs/a", **settings: Any) -> Account:
    return Account(folder / "feedback.sqlite", run, **settings)


def only(prompt: str, *faults: str) -> Any:
    """A plan in which one prompt alone has faults."""
    return lambda asked: list(faults) if asked == prompt else []


def statuses(folder: Path) -> list[str]:
    with sqlite3.connect(folder / "feedback.sqlite") as db:
        found = [row[0] for row in db.execute("SELECT status FROM calls ORDER BY id")]
    db.close()
    return found


def start(
    server: ChatServer, folder: Path, count: int, run: str = "runs/a", handler: str = ""
) -> subprocess.Popen[str]:
    """A process that asks ``count`` questions once it is told to; ``handler``: Ctrl-C raises as in a run's second one."""
    words = [sys.executable, "-c", CLIENT, server.url, str(folder / "feedback.sqlite"), run, str(count), handler]
    pipe = subprocess.PIPE
    process = subprocess.Popen(words, stdin=pipe, stdout=pipe, stderr=pipe, text=True)
    assert process.stdout and process.stdout.readline() == "ready\n"
    return process


def go(*processes: subprocess.Popen[str]) -> None:
    for process in processes:
        assert process.stdin
        process.stdin.write("go\n")
        process.stdin.flush()


# ---- faults, one at a time ----


@pytest.mark.parametrize("fault", TRANSIENT)
def test_a_passing_fault_is_asked_again_and_changes_nothing(fault, tmp_path):
    with ChatServer(only("question 1", fault), slow=2.5, retry_after=0.05) as server, opened(tmp_path) as acc:
        state = random.getstate()
        found = Endpoint(model="m", base_url=server.url, timeout=1.2).ask(numbered(3), acc)
        assert random.getstate() == state  # waiting draws from a generator of its own
        assert texts(found) == expected(3)
        assert server.asked() == {"question 0": 1, "question 1": 2, "question 2": 1}
        totals = acc.totals()
    assert (totals["calls"], totals["retries"], totals["failed"], totals["cached"]) == (4, 1, 0, 0)
    spent = fault in ("no schema", "empty")  # the two whose usage can be read
    assert totals["prompt_tokens"] == totals["tokens"] == 2 * (4 if spent else 3)


@pytest.mark.parametrize("fault", ["429", "500", "slow", "drip", "cut", "hang up"])
def test_a_server_that_does_not_serve_stops_the_run_and_loses_nothing(fault, tmp_path):
    with ChatServer(only("question 2", *[fault] * 3), slow=1.6, retry_after=0.05) as server:
        endpoint = Endpoint(model="m", base_url=server.url, timeout=0.8, retries=2)
        told = pytest.raises(UserError, match=r"3 times.*repeat the command to go on")
        with opened(tmp_path, concurrency=1) as acc, told:
            endpoint.ask(numbered(5), acc)
        assert server.asked() == {"question 0": 1, "question 1": 1, "question 2": 3}
        with opened(tmp_path) as acc:
            assert texts(endpoint.ask(numbered(5), acc)) == expected(5)
            assert acc.totals()["cached"] == 2
        assert server.asked() == {f"question {i}": 4 if i == 2 else 1 for i in range(5)}


@pytest.mark.parametrize(("fault", "why"), [("no json", "malformed"), ("no schema", "malformed"),
                                            ("half a character", "malformed"), ("empty", "empty")])  # fmt: skip
def test_an_unusable_answer_is_a_reason_in_the_end_for_this_run_alone(fault, why, tmp_path):
    with ChatServer(only("question 1", *[fault] * 3)) as server:
        endpoint = Endpoint(model="m", base_url=server.url, retries=2)
        for _ in range(2):  # the second time it is remembered
            with opened(tmp_path) as acc:
                found = endpoint.ask(numbered(3), acc)
                assert [(one.text, one.why) for one in found] == [
                    (answer("question 0"), ""), (None, why), (answer("question 2"), "")
                ]  # fmt: skip
                assert acc.totals()["failed"] == 1
        assert server.asked()["question 1"] == 3
        with opened(tmp_path, "runs/b") as acc:
            assert texts(endpoint.ask(numbered(3), acc)) == expected(3)
        with opened(tmp_path) as acc:  # which changes nothing for a run that is resumed
            assert [one.why for one in endpoint.ask(numbered(3), acc)] == ["", why, ""]
        with opened(tmp_path, "runs/b") as acc:
            assert acc.totals() | {"prompt_tokens": 0, "tokens": 0, "cost": 0} == {
                "calls": 1, "cached": 2, "failed": 0, "retries": 0, "prompt_tokens": 0, "tokens": 0, "cost": 0
            }  # fmt: skip


@pytest.mark.parametrize("status", ["400", "413", "422"])
def test_a_refused_question_is_not_asked_again(status, tmp_path):
    with ChatServer(only("question 0", *[status] * 9)) as server:
        for run, asked in (("runs/a", 1), ("runs/a", 1), ("runs/b", 2)):
            with opened(tmp_path, run) as acc:
                found = Endpoint(model="m", base_url=server.url).ask(numbered(3), acc)
            assert texts(found) == [None, *expected(3)[1:]]
            assert found[0].why.startswith(f"refused: {status}: no {status} for")
            assert server.asked()["question 0"] == asked


@pytest.mark.parametrize("first", [7, 8])
def test_a_server_that_refuses_all_is_the_users_to_mend(first, tmp_path):
    """Seven refusals may be the questions' fault; eight, and no answer, are not, and are not held against the questions."""
    with ChatServer(lambda prompt: ["400"] if int(prompt.split()[1]) < first else []) as server:
        endpoint = Endpoint(model="m", base_url=server.url)
        with opened(tmp_path, concurrency=1) as acc:
            if first == 7:
                found = endpoint.ask(numbered(9), acc)
                assert texts(found) == [None] * 7 + expected(9)[7:]
                assert acc.totals()["failed"] == 7
            else:
                with pytest.raises(UserError, match=r"refused all of the first 8 requests: 400: no 400"):
                    endpoint.ask(numbered(9), acc)
                assert sum(server.asked().values()) == 8
                assert acc.totals()["failed"] == 0
                assert texts(endpoint.ask(numbered(9), acc)) == expected(9)  # the server, mended


@pytest.mark.parametrize(
    ("status", "said"), [("401", "key_env"), ("403", "key_env"), ("404", "base_url"), ("402", "Repeat the command")]
)
def test_a_wrong_key_or_model_stops_at_once(status, said, tmp_path, monkeypatch):
    monkeypatch.setenv("OTHER_KEY", SECRET)
    with ChatServer(lambda prompt: [status] * 9) as server, opened(tmp_path, concurrency=1) as acc:
        with pytest.raises(UserError, match=said) as raised:
            Endpoint(model="some/model", base_url=server.url, key_env="OTHER_KEY").ask(numbered(3), acc)
        assert sum(server.asked().values()) == 1
    text = str(raised.value)
    assert server.url in text and "some/model" in text and status in text
    assert SECRET not in text and "sk-0123" not in text
    assert ("OTHER_KEY" in text) == (status in ("401", "403"))


def test_how_an_answer_ended(tmp_path):
    faults = {"a": "length", "b": "content_filter", "c": "refusal", "d": "only thoughts"}
    with ChatServer(lambda prompt: [faults[prompt]] if prompt in faults else []) as server, opened(tmp_path) as acc:
        found = Endpoint(model="m", base_url=server.url).ask(asks("a", "b", "c", "d", "e"), acc)
        assert sum(server.asked().values()) == 5  # none is asked again
        assert acc.totals()["failed"] == 3
    assert found == [
        Answer(answer("a"), "", True, 1, 2),
        Answer(None, "filtered", False, 1, 2),
        Answer(None, "refused: I would rather not.", False, 1, 2),
        Answer(None, "empty", True, 1, 2),
        Answer(answer("e"), "", False, 1, 2),
    ]


def test_nobody_there(tmp_path):
    with ChatServer() as server:
        url = server.url
    with opened(tmp_path) as acc, pytest.raises(UserError, match=r"does not answer: .*2 times.*repeat the command"):
        Endpoint(model="m", base_url=url, retries=1).ask(numbered(1), acc)
    assert statuses(tmp_path) == ["connection", "connection"]


def test_a_question_that_cannot_be_sent_is_refused_and_others_are_not(tmp_path):
    with ChatServer() as server, opened(tmp_path) as acc:
        found = Endpoint(model="m", base_url=server.url).ask(asks("half \ud83d", "whole 😀"), acc)
    assert found[0].text is None and found[0].why.startswith("refused: ")
    assert found[1].text == answer("whole 😀")


# ---- waiting ----


def test_the_server_says_how_long_to_wait(tmp_path):
    faults = {"seconds": "429", "date": "429 date"}
    with ChatServer(lambda prompt: [faults[prompt]], retry_after=1.0) as server, opened(tmp_path) as acc:
        found = Endpoint(model="m", base_url=server.url).ask(asks("seconds", "date"), acc)
        assert texts(found) == [answer("seconds"), answer("date")]
        for prompt in faults:
            first, second = server.times(prompt)
            assert 1.0 <= second - first < 3.0


def test_a_long_wait_is_kept_to_and_can_be_stopped(tmp_path):
    stop, said = threading.Event(), []
    with ChatServer(lambda prompt: ["429"], retry_after=120) as server:
        threading.Timer(0.8, stop.set).start()
        with opened(tmp_path, stopping=stop.is_set, say=said.append) as acc, pytest.raises(Stopped):
            Endpoint(model="m", base_url=server.url).ask(numbered(2), acc)
        assert sum(server.asked().values()) == 2  # in 0.8 s the backoff alone would have asked again several times
        assert time.time() - server.times("question 0")[0] < 5
        assert said == ["m: the server asks to wait for 120 s …"]  # once, not once a question


@pytest.mark.parametrize(
    ("said", "low", "high"),
    [("7", 7, 7), ("2.5", 2.5, 2.5), ("900", 900, 900), (300, 298, 301), (-300, None, None), ("0", None, None),
     ("-1", None, None), ("inf", None, None), ("nan", None, None), ("soon", None, None), ("", None, None)],
)  # fmt: skip
def test_what_retry_after_means(said, low, high):
    """Numbers are seconds, whatever their size; a date (an int here: from now) is a moment; nothing else says anything."""
    text = said if isinstance(said, str) else formatdate(time.time() + said, usegmt=True)
    found = feedback._retry_after({"retry-after": text})
    assert found is None if low is None else low <= found <= high


# ---- many at a time ----


def test_order_and_answers_do_not_depend_on_concurrency(tmp_path):
    found = []
    for concurrency in (1, 16):
        accounted = Account(tmp_path / f"{concurrency}.sqlite", "r", concurrency)
        with ChatServer(by_share(0.3, ("500", "empty", "cut"))) as server, accounted as acc:
            found.append(Endpoint(model="m", base_url=server.url).ask(numbered(60), acc))
            assert acc.totals()["retries"] == sum(bool(by_share(0.3, ("500",))(f"question {i}")) for i in range(60))
    assert texts(found[0]) == expected(60)
    assert found[0] == found[1]


@pytest.mark.parametrize("concurrency", [1, 5])
def test_no_more_requests_at_a_time_than_allowed(concurrency, tmp_path):
    with ChatServer(delay=0.05) as server, opened(tmp_path, concurrency=concurrency) as acc:
        Endpoint(model="m", base_url=server.url).ask(numbered(4 * concurrency), acc)
        assert server.peak == concurrency


def test_equal_questions_are_asked_once(tmp_path):
    with ChatServer(whim=True) as server, opened(tmp_path) as acc:
        again = Question([{"role": "user", "content": "a"}], attempt=1)
        found = Endpoint(model="m", base_url=server.url).ask([*asks("a", "b", "a", "a"), again], acc)
        assert server.asked() == {"a": 2, "b": 1}
    assert found[0] == found[2] == found[3]
    assert len({one.text for one in found}) == 3


def test_nothing_to_ask(tmp_path):
    with opened(tmp_path) as acc:
        assert Endpoint(model="m", base_url="http://127.0.0.1:9/v1").ask([], acc) == []


# ---- the account ----


def test_all_that_an_answer_depends_on_is_in_its_key():
    question = Question([{"role": "user", "content": "a"}])
    base = Endpoint(model="m").key(question)
    changes: list[dict[str, Any]] = [
        {"model": "n"}, {"temperature": 0.5}, {"temperature": None}, {"top_p": 0.9}, {"top_p": None}, {"max_new_tokens": 7},
        {"seed": 0}, {"seed": 1}, {"revision": "2"}, {"extra": {"top_k": 3}}, {"extra": {"top_k": 4}},
    ]  # fmt: skip
    keys = [base, *(Endpoint(**{"model": "m", **change}).key(question) for change in changes)]
    keys += [
        Endpoint(model="m").key(other)
        for other in (
            Question(question.messages, attempt=1),
            Question([{"role": "user", "content": "b"}]),
            Question([{"role": "system", "content": "a"}]),
            Question(question.messages * 2),
        )
    ]
    assert len(set(keys)) == len(keys)
    same: list[dict[str, Any]] = [
        {"base_url": "http://localhost:1/v1"}, {"key_env": "X"}, {"timeout": 1.0}, {"retries": 0}, {"price_in": 1.0},
        {"price_out": 1.0}, {"temperature": 0}, {"top_p": 1}, {"extra": {}},
    ]  # fmt: skip
    assert {Endpoint(**{"model": "m", **one}).key(question) for one in same} == {base}
    assert Endpoint(model="m").key(Question(question.messages, row={"id": 3}, response="x")) == base


def test_what_is_sent(tmp_path):
    with ChatServer() as server, opened(tmp_path) as acc:
        settings = {"temperature": 0.7, "top_p": 0.9, "max_new_tokens": 9, "seed": 4, "extra": {"top_k": 3}}
        Endpoint(model="m", base_url=server.url, **settings).ask(asks("a"), acc)
        Endpoint(model="m", base_url=server.url, temperature=None, top_p=None, extra={"max_completion_tokens": 5}).ask(
            asks("b"), acc
        )
        bodies = [request["body"] for request in server.requests]
    messages = [[{"role": "user", "content": content}] for content in "ab"]
    assert bodies == [
        {
            "model": "m",
            "messages": messages[0],
            "temperature": 0.7,
            "top_p": 0.9,
            "max_tokens": 9,
            "seed": 4,
            "top_k": 3,
        },
        {"model": "m", "messages": messages[1], "max_completion_tokens": 5},
    ]


def test_runs_share_answers_and_not_their_accounts(tmp_path):
    with ChatServer() as server:
        endpoint = Endpoint(model="m", base_url=server.url, price_in=3.0, price_out=5.0)
        with opened(tmp_path, "runs/a") as acc:
            first = endpoint.ask(numbered(4), acc)
        with opened(tmp_path, "runs/b") as acc:
            assert endpoint.ask(numbered(6), acc)[:4] == first
            b = acc.totals()
        with opened(tmp_path, "runs/a") as acc:
            a = acc.totals()
        assert server.asked() == {f"question {i}": 1 for i in range(6)}
    # a prompt is two tokens and so is an answer: (2 * 3 + 2 * 5) / 1e6 a question
    assert a == pytest.approx({"calls": 4, "cached": 0, "failed": 0, "retries": 0, "prompt_tokens": 8, "tokens": 8,
                               "cost": 6.4e-5})  # fmt: skip
    assert b == pytest.approx({"calls": 2, "cached": 4, "failed": 0, "retries": 0, "prompt_tokens": 4, "tokens": 4,
                               "cost": 3.2e-5})  # fmt: skip


def test_two_processes_at_once_agree(tmp_path):
    """Each would get another answer to the same question; the first that is kept is both's."""
    with ChatServer(whim=True, delay=0.02) as server:
        both = [start(server, tmp_path, 200, run) for run in ("runs/a", "runs/b")]
        go(*both)
        found = [json.loads(process.communicate(timeout=60)[0]) for process in both]
        assert found[0][0] == found[1][0]
        assert all(found[0][0])
        assert [totals["calls"] + totals["cached"] for _, totals in found] == [200, 200]
        assert all(totals["calls"] for _, totals in found)
        asked = server.asked()
        assert sum(totals["calls"] for _, totals in found) == sum(asked.values())
        assert len(asked) == 200 and max(asked.values()) <= 2


def test_killed_in_the_middle_of_a_thousand_questions(tmp_path):
    """No answer that was paid for and kept is paid for again; at most those on their way are."""
    with ChatServer(by_share(0.1, TRANSIENT), delay=0.002, slow=1.5, retry_after=0.1) as server:
        server.wait_for = 400
        process = start(server, tmp_path, 1000)
        go(process)
        assert server.answered.wait(60)
        os.kill(process.pid, signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        process.communicate()
        time.sleep(0.1)  # for what is still on its way in the server
        before, paid = server.asked(), Counter(server.completed)
        with opened(tmp_path) as acc:
            known = acc.known([Endpoint(model="m").key(question) for question in numbered(1000)])
        kept = [q.messages[0]["content"] for q in numbered(1000) if Endpoint(model="m").key(q) in known]
        assert 384 <= len(kept) < 1000
        assert set(kept) <= set(paid)
        assert len(set(paid) - set(kept)) <= 16

        process = start(server, tmp_path, 1000)
        go(process)
        found, totals = json.loads(process.communicate(timeout=60)[0])
        assert found == expected(1000)
        after = server.asked()
        assert all(after[prompt] == before[prompt] for prompt in kept)
        twice = [prompt for prompt, times in server.completed.items() if times > 1]
        assert len(twice) <= 16 and max(server.completed.values()) <= 2
        assert not set(twice) & set(kept)
        assert totals["failed"] == 0
        assert totals["calls"] >= 1000
        assert totals["cached"] == 2 * len(kept)  # `known` above and the second process
    assert statuses(tmp_path).count("answered") == 1000


@pytest.mark.parametrize("handler", ["", "the run's"])
def test_interrupted_from_the_keyboard(handler, tmp_path):
    with ChatServer(delay=0.02) as server:
        server.wait_for = 50
        process = start(server, tmp_path, 1000, "runs/a", handler)
        go(process)
        assert server.answered.wait(30)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
        assert out == "" and err.rstrip().endswith("KeyboardInterrupt")
        assert "never" not in err and "destroyed" not in err and "ResourceWarning" not in err
    assert len(statuses(tmp_path)) >= 50 - 16


def test_the_budget_stops_and_a_larger_one_goes_on(tmp_path):
    """A request costs 4: two tokens in and two out, at one a token."""
    with ChatServer() as server:
        endpoint = Endpoint(model="m", base_url=server.url, price_in=1e6, price_out=1e6)
        for budget, asked in ((20, 5), (20, 5), (21, 6), (40, 10)):
            told = pytest.raises(UserError, match=rf"run.budget={budget} is spent: requests have cost {4 * asked}\.")
            with opened(tmp_path, concurrency=1, budget=budget) as acc, told:
                endpoint.ask(numbered(12), acc)
            assert sum(server.asked().values()) == asked
        with opened(tmp_path, budget=1000) as acc:
            assert texts(endpoint.ask(numbered(12), acc)) == expected(12)
            assert acc.totals()["cost"] == 48
        with opened(tmp_path, "runs/b", budget=1) as acc:  # another run pays for itself, and the cache costs nothing
            assert texts(endpoint.ask(numbered(12), acc)) == expected(12)
        assert server.asked() == {f"question {i}": 1 for i in range(12)}


def test_a_budget_is_overrun_by_what_is_on_its_way_at_most(tmp_path):
    with ChatServer(delay=0.05) as server:
        endpoint = Endpoint(model="m", base_url=server.url, price_in=1e6, price_out=1e6)
        with opened(tmp_path, concurrency=4, budget=10) as acc:
            with pytest.raises(UserError, match=r"run\.budget"):
                endpoint.ask(numbered(40), acc)
            asked = sum(server.asked().values())
            assert acc.totals()["cost"] == 4 * asked <= 10 + 4 * 4
        with opened(tmp_path, "runs/b") as acc:
            endpoint.ask(numbered(asked), acc)
            assert acc.totals()["cached"] == asked  # all that was paid was kept


def test_a_budget_without_prices_or_usage(tmp_path):
    with ChatServer(lambda prompt: ["no usage"]) as server, opened(tmp_path, budget=100) as acc:
        for prices in ({}, {"price_in": 1.0}, {"price_out": 1.0}):
            with pytest.raises(UserError, match=r"price_in.*price_out"):
                Endpoint(model="m", base_url=server.url, **prices).ask(numbered(1), acc)
        endpoint = Endpoint(model="m", base_url=server.url, price_in=1e6, price_out=1e6, max_new_tokens=7)
        assert endpoint.ask(asks("ä"), acc) == [Answer(answer("ä"))]
        totals = acc.totals()
        assert (totals["prompt_tokens"], totals["tokens"]) == (0, 0)
        assert totals["cost"] == 2 + 7  # two bytes in, and no more out than allowed


def test_stopping_keeps_what_was_on_its_way(tmp_path):
    with ChatServer(delay=0.03) as server:
        with opened(tmp_path, concurrency=4, stopping=lambda: sum(server.completed.values()) >= 10) as acc:
            endpoint = Endpoint(model="m", base_url=server.url)
            with pytest.raises(Stopped, match=r"feedback\.sqlite"):
                endpoint.ask(numbered(200), acc)
        asked = sum(server.asked().values())
        assert 10 <= asked <= 14
        with opened(tmp_path) as acc:
            assert texts(endpoint.ask(numbered(200), acc)) == expected(200)
            assert acc.totals()["cached"] == asked
        assert server.asked() == {f"question {i}": 1 for i in range(200)}


def test_the_account_of_a_run(tmp_path):
    cfg = composed([*SMALL_SFT, f"run.root={tmp_path}", "run.concurrency=3", "run.budget=2.5"])
    run = Run(cfg, {}, ["alignkit", "train"])
    try:
        made = account(run)
        assert (made.path, made.run) == (tmp_path / "feedback.sqlite", str(run.dir))
        assert (made.concurrency, made.budget, made.stopping()) == (3, 2.5, False)
        run.stop_asked = True
        assert made.stopping()
    finally:
        run.close()


def test_a_file_that_is_none(tmp_path):
    (tmp_path / "feedback.sqlite").write_text("not a database, but long enough to be looked at as one " * 9)
    with pytest.raises(UserError, match=r"feedback\.sqlite cannot be used .*move it away"), opened(tmp_path) as account:
        account.go_on()


# ---- secrets and settings ----


@pytest.mark.parametrize("secret", [SECRET, "0f1e2d3c4b5a69788796a5b4c3d2e1f0"])
def test_the_key_is_sent_and_reaches_no_file_and_no_message(secret, tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("OPENAI_API_KEY", secret + "\n")
    faults = {"question 0": ["echo"], "question 1": ["422"], "question 2": ["500"]}
    with ChatServer(lambda prompt: faults.get(prompt, [])) as server, opened(tmp_path) as acc:
        found = Endpoint(model="m", base_url=server.url).ask(numbered(4), acc)
        assert {request["headers"]["authorization"] for request in server.requests} == {f"Bearer {secret}"}
        assert found[0].text == "you sent Bearer ***"
        assert "no 422 for" in found[1].why and secret[3:] not in found[1].why
        files = [path.read_bytes() for path in tmp_path.iterdir()]  # the log of SQLite too
    files += [path.read_bytes() for path in tmp_path.iterdir()]
    assert len(files) >= 3 and any(b"question" not in data and b"answered" in data for data in files)
    assert not any(secret[3:].encode() in data for data in files)
    assert secret[3:] not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "url", ["http://me:hunter2@host/v1", "https://hunter2@host/v1", "https://host/v1?api-key=hunter2", "https://host/v1#hunter2"]
)  # fmt: skip
def test_no_secrets_in_the_address(url, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"base_url: .*key_env") as raised:
        Endpoint(model="m", base_url=url)
    assert "hunter2" not in str(raised.value)
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    with opened(tmp_path) as acc, pytest.raises(UserError, match=r"OPENAI_BASE_URL: .*key_env") as raised:
        Endpoint(model="m").ask(numbered(1), acc)
    assert "hunter2" not in str(raised.value)


def test_what_cannot_be_an_endpoint(tmp_path):
    for url in ("localhost:8000/v1", "ftp://host/v1", "http:///v1", "http://host:port/v1"):
        with pytest.raises(UserError, match=r"base_url: must be an address"):
            Endpoint(model="m", base_url=url)
    for settings, said in (
        ({"temperature": -1.0}, "temperature"), ({"top_p": 0.0}, "top_p"), ({"retries": -1}, "retries"),
        ({"timeout": 0.0}, "timeout"), ({"max_new_tokens": 0}, "max_new_tokens"), ({"price_in": -1.0}, "price_in"),
        ({"extra": {"n": 2}}, r"extra\.n"), ({"extra": {"messages": []}}, r"extra\.messages"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=said):
            Endpoint(model="m", **settings)
    with pytest.raises(UserError, match=r"key_env: must be the name") as raised:
        Endpoint(model="m", key_env=SECRET)
    assert SECRET not in str(raised.value)
    with opened(tmp_path) as acc, pytest.raises(UserError, match=r"api\.openai\.com.*variable MY_KEY"):
        Endpoint(model="m", key_env="MY_KEY").ask(numbered(1), acc)


def test_the_environment_names_the_server(tmp_path, monkeypatch):
    with ChatServer() as server, opened(tmp_path) as acc:
        monkeypatch.setenv("OPENAI_BASE_URL", server.url)
        monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:9")  # is of no concern on the way to this machine
        assert texts(Endpoint(model="m").ask(numbered(1), acc)) == expected(1)


def test_the_shipped_critics():
    for name, kind in (("endpoint", Endpoint), ("local", Local)):
        settings = yaml.safe_load((conf_dir() / "critic" / f"{name}.yaml").read_text(encoding="utf-8"))
        assert settings.pop("model") == "???"
        made = instantiate({**settings, "model": "m"})
        assert type(made) is kind and made.model == "m"


def test_the_client_is_not_imported_before_it_is_needed():
    """`alignkit list`, and runs without a critic, need neither."""
    code = "import sys, alignkit.feedback; print([m for m in ('openai', 'torch', 'transformers') if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout == "[]\n"


# ---- a model in this process ----


@pytest.fixture
def saved(policy, tmp_path):
    """The folder of a tiny model of either kind."""
    policy.save(tmp_path / "model")
    return policy, str(tmp_path / "model")


PROMPTS = ["the cat sat", "rain", "open the old door slowly", "a dog ran far", "birds sing", "we eat apples and bread"]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_local_model_answers_each_question_for_itself(saved, tmp_path, temperature):
    found = []
    for i, (batch_size, order) in enumerate([(16, [0, 1, 2, 3, 4, 5]), (2, [5, 3, 1, 0, 2, 4]), (1, [4, 0])]):
        local = Local(model=saved[1], max_new_tokens=6, batch_size=batch_size, temperature=temperature, device="cpu")
        with Account(tmp_path / f"{i}.sqlite", "r") as acc:
            answers = local.ask(asks(*(PROMPTS[j] for j in order)), acc)
            assert acc.totals()["calls"] == len(order)
        found.append(dict(zip(order, answers, strict=True)))
    assert found[0] == found[1]
    assert found[2] == {j: found[0][j] for j in (4, 0)}
    assert len(set(found[0].values())) > 1
    assert all(1 <= one.tokens <= 6 and one.prompt_tokens >= 1 for one in found[0].values())


def test_a_local_model_says_what_the_policy_says(saved, tmp_path):
    from alignkit.decode import Decode

    policy, folder = saved
    rows = [{"prompt": prompt, "id": i} for i, prompt in enumerate(PROMPTS)]
    batch = policy.generate(rows, 1, Decode(max_new_tokens=6, greedy=True))
    with opened(tmp_path) as acc:
        found = Local(model=folder, max_new_tokens=6, device="cpu").ask(asks(*PROMPTS), acc)
    assert [one.text or "" for one in found] == batch.responses
    assert [one.tokens for one in found] == batch.mask.sum(1).tolist()
    assert [one.cut for one in found] == (~batch.extra["ended"]).tolist()
    assert [one.prompt_tokens for one in found] == [len(ids) for ids in policy.prompt_ids(rows)]


def test_a_local_models_answers_are_kept_by_its_weights(saved, tmp_path):
    policy, folder = saved
    policy.save(tmp_path / "copy")
    for i, (path, settings, cached) in enumerate(
        [
            (folder, {}, 0), (folder, {}, 3), (str(tmp_path / "copy"), {}, 3), (folder, {"batch_size": 1}, 3),
            (folder, {"max_new_tokens": 5}, 0), (folder, {"temperature": 0.5}, 0), (folder, {"temperature": 0.7}, 0),
            (folder, {"temperature": 0.7, "seed": 1}, 0), (folder, {"compute": "bfloat16"}, 0),
        ]
    ):  # fmt: skip
        with opened(tmp_path, f"runs/{i}") as acc:
            local = Local(**{"model": path, "max_new_tokens": 6, "device": "cpu", **settings})
            local.ask(asks(*PROMPTS[:3], PROMPTS[0]), acc)
            assert (acc.totals()["cached"], acc.totals()["calls"]) == (cached, 3 - cached)
    next(policy.model.parameters()).data.add_(0.01)
    policy.save(tmp_path / "copy")
    with opened(tmp_path, "runs/other weights") as acc:
        Local(model=str(tmp_path / "copy"), max_new_tokens=6, device="cpu").ask(asks(*PROMPTS[:3]), acc)
        assert acc.totals()["cached"] == 0


def test_a_local_model_draws_anew_for_an_attempt_or_a_seed(saved, tmp_path):
    with opened(tmp_path) as acc:
        drawn = set()
        for seed in (0, 1):
            local = Local(model=saved[1], max_new_tokens=12, temperature=1.0, seed=seed, device="cpu")
            messages = [{"role": "user", "content": PROMPTS[0]}]
            drawn |= {one.text for one in local.ask([Question(messages, attempt=i) for i in range(2)], acc)}
    assert len(drawn) == 4


def test_what_a_local_model_has_no_room_for(saved, tmp_path):
    policy, folder = saved  # of 64 positions
    long = " ".join(["slowly"] * 200)
    with opened(tmp_path) as acc:
        found = Local(model=folder, max_new_tokens=6, device="cpu").ask(asks(long, "rain"), acc)
        assert found[0] == Answer(None, "too long")
        assert found[1].why in ("", "empty")
        assert acc.totals()["calls"] == 1 and acc.totals()["failed"] >= 1
        with pytest.raises(UserError, match=r"max_new_tokens=65.*64 positions"):
            Local(model=folder, max_new_tokens=65, device="cpu").ask(asks("rain"), acc)
    assert policy.max_positions == 64


def test_a_local_models_messages(tiny_causal, tmp_path):
    """Through the chat template where there is one; else their texts, one after the other."""
    messages = [{"role": "system", "content": "birds sing"}, {"role": "user", "content": "rain"}]
    template = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}{% if add_generation_prompt %}says: {% endif %}"
    folder = tmp_path / "model"
    tiny_causal.save(folder)
    with opened(tmp_path) as acc:
        for chat, text in ((None, "birds sing\n\nrain"), (template, "system: birds sing\nuser: rain\nsays: ")):
            if chat:
                (folder / "chat_template.jinja").write_text(chat)
            found = Local(model=str(folder), max_new_tokens=6, device="cpu").ask([Question(messages)], acc)[0]
            ids = tiny_causal.tokenizer(text)["input_ids"]
            assert found.prompt_tokens == len(
                [i for i in ids if i not in tiny_causal.eos]
            )  # without what closes a text
        (folder / "chat_template.jinja").write_text("{{ raise_exception('no system turns') }}")
        with pytest.raises(UserError, match=r"chat template of .*no system turns"):
            Local(model=str(folder), max_new_tokens=6, device="cpu").ask([Question(messages)], acc)


def test_a_local_model_stops_between_batches_and_needs_no_money(tiny_causal, tmp_path):
    tiny_causal.save(tmp_path / "model")
    local = Local(model=str(tmp_path / "model"), max_new_tokens=6, batch_size=2, device="cpu")
    answered = 0

    def stopping() -> bool:
        nonlocal answered
        answered += 1
        return answered > 2

    with opened(tmp_path, budget=1e-9, stopping=stopping) as acc:
        acc.spent = 1.0
        with pytest.raises(Stopped):
            local.ask(asks(*PROMPTS), acc)
        assert acc.totals()["calls"] == 4
    with opened(tmp_path) as acc:
        assert len(local.ask(asks(*PROMPTS), acc)) == 6
        assert acc.totals()["calls"] == 6
