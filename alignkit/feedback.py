"""Asking a model for text: what is asked, what is answered, and the account that remembers, counts and stops."""

from __future__ import annotations

import asyncio
import email.utils
import hashlib
import ipaddress
import json
import logging
import math
import os
import random
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol
from urllib.parse import urlsplit

from alignkit.data import Row
from alignkit.errors import Stopped, UserError, need

if TYPE_CHECKING:
    from alignkit.policy import Policy
    from alignkit.run import Run

Messages = list[dict[str, str]]

FILE = "feedback.sqlite"  # below run.root
TOTALS = ("calls", "cached", "failed", "retries", "prompt_tokens", "tokens", "cost")  # of a run
OPENAI = "https://api.openai.com/v1"
BACKOFF = 0.5  # seconds before the first repetition, doubled for each further one …
LONGEST = 60.0  # … up to this, where the server does not say how long to wait
AGAIN = 0.7  # least temperature of a further attempt: greedily the same would come again
REFUSED = 8  # requests that a server may refuse before it has answered any
TICK = 0.2  # seconds between looks at whether to stop, while waiting
SAY_EVERY = 30.0  # seconds between lines about progress


@dataclass(frozen=True)
class Question:
    """What a chat model is asked; ``row`` and ``response`` say what about, for critics that are programs."""

    messages: Messages
    row: Row = field(default_factory=dict)
    response: str = ""
    attempt: int = 0  # above 0: asked again, because the answer to the attempt before could not be used


@dataclass(frozen=True)
class Answer:
    """What comes back: a text, or the reason why there is none."""

    text: str | None
    why: str = ""  # why there is no text: refused: …, filtered, empty, malformed, too long
    cut: bool = False  # the text ended at the limit of tokens
    prompt_tokens: int = 0
    tokens: int = 0  # written


class Critic(Protocol):
    """A model behind an endpoint, one in this process, or a program: the answers to all questions, in their order."""

    def ask(self, questions: list[Question], account: Account) -> list[Answer]: ...


# ---- the account ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Call:
    """One request, as it is recorded."""

    status: str  # answered, or what came instead
    retry: int = 0  # which repetition of the question this was; 0: the first time
    prompt_tokens: int = 0
    tokens: int = 0
    cost: float = 0.0  # in the currency of the prices
    seconds: float = 0.0


class Account:
    """What has been asked and what it cost: a file of answers that all runs below ``run.root`` share, and a record of one run.

    An answer is found by a hash of the model and of all that it was asked with, whoever asked. It is on file before it
    is handed on, so that a process which is killed has paid for no more than what was on its way. Several processes may
    work on one file: an answer that another one has just put there is taken, and the first of two stays. Questions that
    got no text are remembered for the run alone.

    Args:
        path: the SQLite file.
        run: whose calls, costs and failures these are; they go on where the run does.
        concurrency: requests at the same time.
        budget: no request is begun once the run's calls have cost this. Those on their way then are still paid, which is
            at most ``concurrency`` of them.
        stopping: asked before every request; true: no further one.
        say: where messages go.
    """

    def __init__(
        self,
        path: Path,
        run: str,
        concurrency: int = 16,
        budget: float | None = None,
        stopping: Callable[[], bool] = lambda: False,
        say: Callable[[str], object] = lambda text: print(text, file=sys.stderr, flush=True),
    ) -> None:
        self.path, self.run, self.concurrency, self.budget = path, run, concurrency, budget
        self.stopping, self.say = stopping, say
        self.spent = 0.0
        self._db: sqlite3.Connection | None = None

    def __enter__(self) -> Account:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._db is not None:
            self._db.close()
            self._db = None

    def known(self, keys: list[str]) -> dict[str, Answer]:
        """Key → answer of those on file: texts, and this run's questions without one. Texts are counted as ``cached``."""
        found: dict[str, Answer] = {}
        unique = list(dict.fromkeys(keys))
        with self._explained():
            for start in range(0, len(unique), 500):
                found |= self._found(unique[start : start + 500])
            texts = sum(answer.text is not None for answer in found.values())
            if texts:
                self._served(texts)
        return found

    def taken(self, key: str) -> Answer | None:
        """The answer that another process has put on file since ``known`` was asked."""
        with self._explained():
            answer = self._found([key]).get(key)
            if answer is not None and answer.text is not None:
                self._served(1)
        return answer

    def keep(self, key: str, answer: Answer | None, call: Call | None) -> Answer | None:
        """Record a call, what it gave, or both, in one committed transaction; returns the answer that is on file then."""
        with self._explained(), self._transaction() as db:
            if call is not None:
                db.execute(
                    "INSERT INTO calls (run, key, status, retry, prompt_tokens, tokens, cost, seconds) "
                    "VALUES (?, ?, ?, ?, ?, ?, ?, ?)",
                    (self.run, key, call.status, call.retry, call.prompt_tokens, call.tokens, call.cost, call.seconds),
                )
            if answer is not None:
                counts = (answer.cut, answer.prompt_tokens, answer.tokens)
                if answer.text is not None:
                    db.execute("INSERT OR IGNORE INTO answers VALUES (?, ?, ?, ?, ?)", (key, answer.text, *counts))
                else:
                    db.execute(
                        "INSERT OR REPLACE INTO failures VALUES (?, ?, ?, ?, ?, ?)",
                        (self.run, key, answer.why, *counts),
                    )
        if call is not None:
            self.spent += call.cost
        return None if answer is None else self._found([key])[key]

    def go_on(self, paid: bool = True) -> None:
        """Come back if another request may be made, one that costs something or not.

        Raises:
            Stopped: the run was asked to stop.
            UserError: the budget is spent.
        """
        with self._explained():
            self._db_()
        if self.stopping():
            raise Stopped(f"stopped between questions; the answers so far are in {self.path}.")
        if paid and self.budget is not None and self.spent >= self.budget:
            raise UserError(
                f"run.budget={self.budget:g} is spent: requests have cost {self.spent:.6g}. Repeat the command with a larger "
                "run.budget to go on; nothing that has an answer is asked twice."
            )

    def totals(self) -> dict[str, float]:
        """Of this run, resumed or not: ``calls`` that were sent, ``retries`` among them, answers ``cached``, questions that
        ``failed`` to get a text, ``prompt_tokens``, ``tokens``, ``cost``; nothing where nobody was ever asked."""
        if self._db is None and not self.path.exists():
            return dict.fromkeys(TOTALS, 0)
        with self._explained():
            sums = self._db_().execute(
                "SELECT count(*), coalesce(sum(retry > 0), 0), coalesce(sum(prompt_tokens), 0), coalesce(sum(tokens), 0), "
                "coalesce(sum(cost), 0.0) FROM calls WHERE run = ?",
                (self.run,),
            )
            calls, retries, prompt_tokens, tokens, cost = sums.fetchone()
            cached = self._one("SELECT coalesce(sum(answers), 0) FROM served WHERE run = ?", self.run)
            failed = self._one("SELECT count(*) FROM failures WHERE run = ?", self.run)
        return dict(zip(TOTALS, (calls, cached, failed, retries, prompt_tokens, tokens, cost), strict=True))

    def _found(self, keys: list[str]) -> dict[str, Answer]:
        places = ", ".join("?" * len(keys))
        failures = self._db_().execute(
            f"SELECT key, NULL, why, cut, prompt_tokens, tokens FROM failures WHERE run = ? AND key IN ({places})",
            (self.run, *keys),
        )
        found = {key: Answer(text, why, bool(cut), *counts) for key, text, why, cut, *counts in failures}
        answers = self._db_().execute(
            f"SELECT key, text, '', cut, prompt_tokens, tokens FROM answers WHERE key IN ({places})", keys
        )
        # a failure of one's own first: a run that is resumed goes on with what it had, whatever others have got since
        return {key: Answer(text, why, bool(cut), *counts) for key, text, why, cut, *counts in answers} | found

    def _served(self, answers: int) -> None:
        with self._transaction() as db:
            db.execute(
                "INSERT INTO served VALUES (?, ?) ON CONFLICT (run) DO UPDATE SET answers = answers + excluded.answers",
                (self.run, answers),
            )

    def _one(self, query: str, *values: object) -> Any:
        return self._db_().execute(query, values).fetchone()[0]

    def _db_(self) -> sqlite3.Connection:
        """The file, made when it is first needed: a critic that is a program asks nobody."""
        if self._db is None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._db = _opened(self.path)
            self.spent = self._one("SELECT coalesce(sum(cost), 0.0) FROM calls WHERE run = ?", self.run)
        return self._db

    @contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        db = self._db_()
        db.execute("BEGIN IMMEDIATE")
        try:
            yield db
        except BaseException:
            db.execute("ROLLBACK")
            raise
        db.execute("COMMIT")

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.Error, OSError) as e:
            raise UserError(
                f"{self.path} cannot be used ({e}). It holds the answers of critics: make sure that its disk has room and may "
                "be written, then repeat the command; if the file is damaged, move it away."
            ) from None


def forget(path: Path, run: str) -> None:
    """Take a run's calls and failures off the file, where there is one; answers stay, whoever asked for them."""
    if path.exists():
        with Account(path, run) as account, account._explained(), account._transaction() as db:
            for table in ("calls", "failures", "served"):
                db.execute(f"DELETE FROM {table} WHERE run = ?", (run,))


def account(run: Run) -> Account:
    """The account of a run: its file lies in ``run.root``, and the run's budget and a wish to stop count."""
    settings = run.cfg.run
    return Account(
        Path(settings.root) / FILE,
        str(run.dir.resolve()),
        settings.concurrency,
        settings.budget,
        lambda: run.stop_asked,
        run.progress.say,
    )


_TABLES = """
CREATE TABLE IF NOT EXISTS answers (
    key TEXT PRIMARY KEY, text TEXT NOT NULL, cut INTEGER, prompt_tokens INTEGER, tokens INTEGER) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS failures (
    run TEXT, key TEXT, why TEXT, cut INTEGER, prompt_tokens INTEGER, tokens INTEGER, PRIMARY KEY (run, key));
CREATE TABLE IF NOT EXISTS calls (
    id INTEGER PRIMARY KEY, run TEXT, key TEXT, status TEXT, retry INTEGER, prompt_tokens INTEGER, tokens INTEGER,
    cost REAL, seconds REAL);
CREATE INDEX IF NOT EXISTS calls_of_run ON calls (run);
CREATE TABLE IF NOT EXISTS served (run TEXT PRIMARY KEY, answers INTEGER);
"""


def _opened(path: Path) -> sqlite3.Connection:
    """The file with its tables. A write-ahead log keeps what is committed when the process is killed, and lets others read."""
    deadline = time.monotonic() + 60
    while True:
        db = sqlite3.connect(path, timeout=60, isolation_level=None)
        try:
            db.execute("PRAGMA journal_mode = WAL")
            db.execute("PRAGMA synchronous = NORMAL")  # what a power cut may cost are the last answers, not the file
            db.executescript(_TABLES)
            return db
        except sqlite3.OperationalError as e:
            db.close()  # two processes that make the file at once do not wait for each other as they do later
            if "locked" not in str(e) or time.monotonic() > deadline:
                raise
            time.sleep(0.05)
        except BaseException:
            db.close()
            raise


def _warmer(temperature: float | None, question: Question) -> float | None:
    """The temperature at which a question is asked: a further attempt is drawn, not taken greedily."""
    return temperature if temperature is None or not question.attempt else max(temperature, AGAIN)


def _hashed(**what: Any) -> str:
    """SHA-256 of the canonical JSON of all that an answer depends on."""
    return hashlib.sha256(json.dumps(what, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


# ---- a model behind an endpoint ------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Endpoint:
    """A chat model behind an OpenAI-compatible endpoint: OpenAI's own, vLLM, `transformers serve` and their like.

    A request that the server could not serve (429, 5xx, a timeout, a broken connection or answer) is repeated after the
    time that the server asks for, else after a growing one. Answers are kept by model name, prompt and settings: give servers that
    have different models under one name a ``revision`` each. Of an answer that comes without its usage, a byte is taken for a
    token, in the cost alone, so that a budget holds. The key is read from the environment and written nowhere.
    """

    model: str  # as the server names it
    base_url: str | None = None  # of the API, with its /v1; null: the environment's OPENAI_BASE_URL, else OpenAI's
    key_env: str = "OPENAI_API_KEY"  # name of the environment variable that holds the key
    temperature: float | None = 0.0  # null: not sent, so the server's
    top_p: float | None = 1.0  # null: not sent
    max_new_tokens: int = 2048  # sent as max_tokens, unless extra has max_completion_tokens
    seed: int | None = None  # sent along; servers differ in what they make of it
    timeout: float = 300.0  # seconds for one request, from its beginning to the end of the answer
    retries: int = 8  # repetitions of one request
    price_in: float | None = None  # of a million prompt tokens, in the currency of run.budget; null: costs nothing
    price_out: float | None = None  # of a million written tokens
    revision: str | None = (
        None  # count it up when the server's weights change under the same name: answers are asked anew
    )
    extra: dict[str, Any] | None = None  # further fields of the request, as in {top_k: 20}

    def __post_init__(self) -> None:
        need(self, "temperature >= 0", "top_p > 0", "top_p <= 1", "max_new_tokens >= 1", "timeout > 0", "retries >= 0")
        need(self, "price_in >= 0", "price_out >= 0")
        own = {"model", "messages", "temperature", "top_p", "max_tokens", "seed", "stream", "n"} & set(self.extra or {})
        if own:
            raise ValueError(f"extra.{sorted(own)[0]}: is not a further field; one answer is asked for by the settings")
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.key_env):  # the key itself, perhaps: it is not repeated
            raise UserError("key_env: must be the name of an environment variable, in capitals, that holds the key.")
        if self.base_url is not None:
            _address(self.base_url, "base_url")
        self._refused: list[tuple[str, Answer]] | None = []  # not yet believed; None: the server has answered something

    def connection(self) -> tuple[str, bool, str]:
        """(address, whether it is this machine, key), of which the environment may hold two.

        Raises:
            UserError: an address that is none, or no key for one elsewhere.
        """
        url = self.base_url or os.environ.get("OPENAI_BASE_URL") or OPENAI
        url = _address(url, "base_url" if self.base_url else "the environment's OPENAI_BASE_URL")
        local, secret = _is_loopback(url), os.environ.get(self.key_env, "").strip()
        if not secret and not local:
            raise UserError(
                f"{url} needs a key: put it into the environment variable {self.key_env}, or name another variable "
                "with the critic's key_env."
            )
        if not (secret.isascii() and secret.isprintable()):
            raise UserError(f"the environment variable {self.key_env} holds what cannot be a key.")
        return url, local, secret

    def key(self, question: Question) -> str:
        """By which an answer is found again: all that it depends on, but not where the server is or who pays."""
        return _hashed(
            model=self.model,
            messages=question.messages,
            temperature=None if self.temperature is None else float(self.temperature),
            top_p=None if self.top_p is None else float(self.top_p),
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            extra=self.extra or {},
            attempt=question.attempt,
            revision=self.revision,
        )

    def ask(self, questions: list[Question], account: Account) -> list[Answer]:
        """The answers in the order of the questions; equal questions are asked once.

        Raises:
            UserError: the server does not serve, refuses the key, or does not know the model; the budget is spent. What
                was answered before is kept, and so is what was on its way.
            Stopped: the run was asked to stop.
        """
        if account.budget is not None and (self.price_in is None or self.price_out is None):
            raise UserError(
                "run.budget needs prices: set price_in and price_out of the critic (algo.critic.price_in=…), per million "
                "tokens and 0 for a server of your own, or run.budget=null."
            )
        keys = [self.key(question) for question in questions]
        found = account.known(keys)
        if any(answer.text is not None for answer in found.values()):
            self._refused = None
        missing = {key: question for key, question in zip(keys, questions, strict=True) if key not in found}
        if missing:
            asking = _Asking(self, account)
            asyncio.run(asking.all(missing))
            found |= asking.found
        return [found[key] for key in keys]

    def cost(self, prompt_tokens: int, tokens: int) -> float:
        """Of one request, in the currency of the prices."""
        return (prompt_tokens * (self.price_in or 0.0) + tokens * (self.price_out or 0.0)) / 1e6

    def request(self, question: Question) -> dict[str, Any]:
        """The fields of a request for this question."""
        limit = {} if "max_completion_tokens" in (self.extra or {}) else {"max_tokens": self.max_new_tokens}
        optional = {"temperature": _warmer(self.temperature, question), "top_p": self.top_p, "seed": self.seed}
        given = {name: value for name, value in optional.items() if value is not None}
        return {"model": self.model, "messages": question.messages, **limit, **given, "extra_body": self.extra}


Kind = Literal["answered", "refused", "filtered", "empty", "malformed", "unserved", "fatal"]


@dataclass
class _Reply:
    """What a request came to."""

    kind: Kind
    answer: Answer | None = None  # where there will be no better one
    status: str = ""  # for the record; empty: the kind
    said: str = ""  # what is wrong, in words
    wait: float | None = None  # seconds that the server asks for
    usage: tuple[int | None, int | None] = (0, 0)  # tokens read and written; None: not counted by the server


class _Asking:
    """The requests of one ``ask``: workers that take question after question, until one of them has to stop."""

    def __init__(self, endpoint: Endpoint, account: Account) -> None:
        self.endpoint, self.account = endpoint, account
        self.url, self.local, self.secret = endpoint.connection()
        self.found: dict[str, Answer] = {}
        self.halt: UserError | Stopped | None = None  # why no more requests are made
        self.jitter = random.Random()  # of its own: waiting must not change what anyone else draws
        self.said = time.monotonic()  # when there was last a line about progress
        self.waits = 0.0  # the end of the wait that was last announced

    async def all(self, missing: dict[str, Question]) -> None:
        """Ask them all; what is answered is in ``found``."""
        from openai import AsyncOpenAI, DefaultAsyncHttpxClient

        for name in ("openai", "httpx", "httpx2"):  # they tell of every request
            logging.getLogger(name).setLevel(logging.WARNING)
        endpoint, left, total = self.endpoint, iter(missing.items()), len(missing)
        self.client = AsyncOpenAI(
            api_key=self.secret or "none",
            base_url=self.url,
            max_retries=0,  # repetitions are counted, and wait as long as they are told to, here
            timeout=endpoint.timeout,
            http_client=DefaultAsyncHttpxClient(trust_env=not self.local),  # no proxy on the way to this machine
        )

        async def work() -> None:
            for key, question in left:
                try:
                    self.found[key] = await self._one(key, question)
                except (UserError, Stopped) as e:
                    self.halt = self.halt or e
                    return
                if time.monotonic() - self.said > SAY_EVERY:
                    self.said = time.monotonic()
                    self.account.say(f"{endpoint.model}: {len(self.found)} of {total} questions answered")

        async with self.client:
            workers = [asyncio.create_task(work()) for _ in range(min(self.account.concurrency, total))]
            try:
                await asyncio.gather(*workers)
            except KeyboardInterrupt:  # raised in a worker by a signal's handler: it has left through the loop already
                raise asyncio.CancelledError from None
            finally:
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)
        if self.halt:
            if endpoint._refused:
                endpoint._refused = []
            self.account.go_on()  # with what was on its way counted, where the budget is the reason
            raise self.halt
        for key, answer in endpoint._refused or ():
            self.account.keep(key, answer, None)
        if endpoint._refused:
            endpoint._refused = []

    async def _one(self, key: str, question: Question) -> Answer:
        endpoint, account = self.endpoint, self.account
        for retry in range(endpoint.retries + 1):
            self._go_on()
            if not retry and (answer := account.taken(key)):
                return answer
            begun = time.monotonic()
            reply = await self._request(question)
            call = self._call(question, reply, retry, time.monotonic() - begun)
            if reply.kind == "refused" and endpoint._refused is not None:
                account.keep(key, None, call)
                return self._doubted(key, reply)
            nobody = reply.said.startswith("ConnectError") and endpoint._refused is not None  # nothing has answered yet
            last = retry == (min(2, endpoint.retries) if nobody else endpoint.retries)
            if reply.answer is None and last and reply.kind in ("malformed", "empty"):
                reply.answer = Answer(None, reply.kind)
            answer = account.keep(key, reply.answer, call)
            if answer is not None:
                self._believe()
                return answer
            if reply.kind == "fatal":
                raise UserError(reply.said)
            if last:
                break
            await self._pause(retry, reply.wait)
        raise UserError(
            f"{endpoint.model} at {self.url} does not answer: {reply.said} ({retry + 1} times). What was answered is "
            "kept: see that the server runs at the critic's base_url, and repeat the command to go on."
        )

    def _doubted(self, key: str, reply: _Reply) -> Answer:
        """A refusal before any answer: of one question, or is the server set up in a way that it refuses them all?"""
        doubted = self.endpoint._refused
        assert doubted is not None and reply.answer is not None
        doubted.append((key, reply.answer))
        if len(doubted) >= REFUSED:
            raise UserError(
                f"{self.endpoint.model} at {self.url} refused all of the first {REFUSED} requests: {reply.said}. Change the "
                "critic's settings, or the server's, by what it says, and repeat the command."
            )
        return reply.answer

    def _believe(self) -> None:
        """The server has answered: what it refused before it did not take."""
        for key, answer in self.endpoint._refused or ():
            self.account.keep(key, answer, None)
        self.endpoint._refused = None

    def _go_on(self) -> None:
        if self.halt:
            raise self.halt
        self.account.go_on()

    async def _pause(self, retry: int, wait: float | None) -> None:
        """Wait before a repetition: as long as the server says, else exponentially, with jitter; leave where all stop."""
        seconds = min(LONGEST, BACKOFF * 2**retry) * (1 - self.jitter.random() / 2) if wait is None else wait
        end = time.monotonic() + seconds
        if seconds > SAY_EVERY and end > self.waits + SAY_EVERY:
            self.waits = end
            self.account.say(f"{self.endpoint.model}: the server asks to wait for {seconds:.0f} s …")
        while (left := end - time.monotonic()) > 0:
            self._go_on()
            await asyncio.sleep(min(left, TICK))

    def _call(self, question: Question, reply: _Reply, retry: int, seconds: float) -> Call:
        read, written = reply.usage
        text = "" if reply.answer is None or reply.answer.text is None else reply.answer.text
        cost = self.endpoint.cost(
            sum(len(m["content"].encode()) for m in question.messages) if read is None else read,
            min(len(text.encode()), self.endpoint.max_new_tokens) if written is None else written,
        )
        return Call(reply.status or reply.kind, retry, read or 0, written or 0, cost, seconds)

    async def _request(self, question: Question) -> _Reply:
        import openai

        try:
            async with asyncio.timeout(self.endpoint.timeout):  # the client's own is between two bytes
                raw = await self.client.chat.completions.with_raw_response.create(**self.endpoint.request(question))
                body = raw.http_response.content
        except (TimeoutError, openai.APITimeoutError):
            return _Reply("unserved", status="timeout", said=f"no answer within timeout={self.endpoint.timeout:g} s")
        except openai.APIStatusError as e:
            return self._status(e.status_code, e.response.content, e.response.headers)
        except openai.APIConnectionError as e:
            cause = e.__cause__ or e
            return _Reply("unserved", status="connection", said=self._clean(f"{type(cause).__name__}: {cause}"))
        except UnicodeEncodeError:
            why = "half of a surrogate pair cannot be sent"
            return _Reply("refused", Answer(None, f"refused: {why}"), said=why)
        return self._read(body)

    def _status(self, status: int, body: bytes, headers: Any) -> _Reply:
        """What a status other than 200 means."""
        reason, code = _reason(body)
        said = self._clean(f"{status}: {reason}" if reason else str(status))
        endpoint = self.endpoint
        if status in (400, 413, 422):
            return _Reply("refused", Answer(None, f"refused: {said}"), f"refused {status}", said)
        if (status in (408, 409, 425, 429) and code != "insufficient_quota") or status >= 500:
            return _Reply("unserved", status=str(status), said=said, wait=_retry_after(headers))
        if status in (401, 403):
            has = "the key in" if self.secret else "a request without a key; none is in"
            said = (
                f"{self.url} refuses {has} the environment variable {endpoint.key_env} ({said}). Put a valid key for "
                f"{endpoint.model} there, or name another variable with the critic's key_env."
            )
        elif status == 404:
            said = (
                f"{self.url} has no model '{endpoint.model}', or is not the address of an API ({said}). Set the critic's model "
                "to a name that the server lists under /models, and base_url to the address with its /v1."
            )
        else:
            said = f"{endpoint.model} at {self.url} cannot be asked ({said}). Repeat the command when that is mended."
        return _Reply("fatal", status=str(status), said=said)

    def _read(self, body: bytes) -> _Reply:
        """The answer in a response of status 200; whatever else is there is malformed."""
        try:
            found = json.loads(body.decode("utf-8"))
        except ValueError:
            return _Reply("malformed", said="the answer is not JSON")
        usage = _usage(found)
        spent = (usage[0] or 0, usage[1] or 0)  # of what cannot be used, only what is said to have been spent counts
        try:
            choice = found["choices"][0]
            message, reason = choice["message"], choice.get("finish_reason")
            text, refusal = message.get("content"), message.get("refusal")
            for one in (text, refusal):
                if one is not None:
                    one.encode("utf-8")
        except (LookupError, TypeError, AttributeError, UnicodeEncodeError):
            return _Reply("malformed", said="the answer is not a chat completion", usage=spent)
        cut = reason == "length"
        if reason == "content_filter":
            return _Reply("filtered", Answer(None, "filtered", cut, *spent), usage=usage)
        if refusal:  # by the model, in the field that OpenAI has for it
            return _Reply(
                "filtered", Answer(None, self._clean(f"refused: {refusal}"), cut, *spent), "declined", usage=usage
            )
        if not text or not text.strip():
            # where all its tokens went into thoughts it is of no use to ask again
            return _Reply("empty", Answer(None, "empty", cut, *spent) if cut else None, said="it is empty", usage=spent)
        if len(self.secret) >= 8:  # shorter ones are no secrets but what stands in for one, as in "EMPTY"
            text = text.replace(self.secret, "***")
        return _Reply("answered", Answer(text, "", cut, *spent), usage=usage)

    def _clean(self, text: str) -> str:
        """What a server says, on one line and without the key, whole or in part."""
        text = text.replace(self.secret, "***") if self.secret else text
        text = re.sub(r"\b(sk-|Bearer\s+)[\w*.~+/-]+", r"\1***", text)
        text = " ".join(text.split())
        return text if len(text) <= 300 else text[:300] + "…"


def _address(url: str, name: str) -> str:
    """A base URL, if it is one without secrets.

    Raises:
        UserError: it is none, or holds more than the address; the text does not repeat it.
    """
    try:
        parts = urlsplit(url)
        fine = parts.scheme in ("http", "https") and bool(parts.hostname) and (parts.port is None or parts.port > 0)
    except ValueError:
        fine = False
    if not fine:
        raise UserError(f"{name}: must be an address such as http://localhost:8000/v1.")
    if "@" in parts.netloc or parts.query or parts.fragment:
        raise UserError(
            f"{name}: holds a user, a password or a query. Give the address alone; the key belongs into the environment "
            "variable that key_env names."
        )
    return url


def _is_loopback(url: str) -> bool:
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _reason(body: bytes) -> tuple[str, str]:
    """(what a server says is wrong, its code), from the JSON that OpenAI, vLLM or FastAPI give, else the text."""
    text = body.decode("utf-8", "replace")
    try:
        found = json.loads(text)
    except ValueError:
        return text, ""
    inner = found.get("error", found) if isinstance(found, dict) else found
    if isinstance(inner, dict):
        said = inner.get("message") or inner.get("detail") or inner
        return said if isinstance(said, str) else json.dumps(said), str(inner.get("code"))
    return inner if isinstance(inner, str) else text, ""


def _retry_after(headers: Any) -> float | None:
    """Seconds that a server asks to wait, by ``Retry-After`` (RFC 9110, 10.2.3: seconds or a date); None: it does not say."""
    said = (headers.get("retry-after") or "").strip()
    try:
        seconds = float(said)
    except ValueError:
        try:
            seconds = email.utils.parsedate_to_datetime(said).timestamp() - time.time()
        except (ValueError, OverflowError):
            return None
    return seconds if math.isfinite(seconds) and seconds > 0 else None


def _usage(found: Any) -> tuple[int | None, int | None]:
    """(tokens read, tokens written) by the server's count, None where it does not give one."""
    usage = found.get("usage") if isinstance(found, dict) else None
    counts = [usage.get(name) if isinstance(usage, dict) else None for name in ("prompt_tokens", "completion_tokens")]
    fine = [n if isinstance(n, int) and not isinstance(n, bool) and 0 <= n < 2**53 else None for n in counts]
    return fine[0], fine[1]


# ---- a model in this process ---------------------------------------------------------------------------------------


@dataclass(kw_only=True)
class Local:
    """A Hugging Face model in this process, causal or encoder–decoder; it is loaded when it is first asked.

    Messages go through the tokenizer's chat template; without one their texts are joined by blank lines. A sampled answer
    is drawn alone, by a generator of the question's own key: it depends on the weights, the prompt's tokens, the settings
    and ``attempt``, not on what else is asked. Greedy answers are found in batches of similar length, whose composition
    changes no more than rounding.
    """

    model: str  # hub id, folder, run directory, or bundled:NAME
    temperature: float = 0.0  # 0: greedy
    max_new_tokens: int = 512  # the prompt and these must fit into a causal model's positions
    batch_size: int = 16  # questions that are answered at the same time, where decoding is greedy
    seed: int = 0  # of sampled answers
    device: str = "auto"  # auto | cpu | cuda | mps
    dtype: Literal["float32", "bfloat16", "float16"] = "float32"  # of the weights
    compute: Literal["same", "bfloat16"] = "same"  # precision of the forward pass

    def __post_init__(self) -> None:
        need(self, "temperature >= 0", "max_new_tokens >= 1", "batch_size >= 1")
        self._loaded: tuple[Policy, str] | None = None  # the model and the hash of its weights

    def ask(self, questions: list[Question], account: Account) -> list[Answer]:
        """The answers in the order of the questions; equal questions are asked once.

        Raises:
            UserError: there is no such model, or it has no room for ``max_new_tokens``.
            Stopped: the run was asked to stop.
        """
        from jinja2 import TemplateError

        policy, weights = self._loaded = self._loaded or self._load()
        rows: list[Row] = [{"prompt": self._prompt(policy, q), "id": i} for i, q in enumerate(questions)]
        try:
            ids = policy.prompt_ids(rows) if rows else []
        except TemplateError as e:
            raise UserError(f"the chat template of {self.model} does not take the critic's messages: {e}") from None
        keys = [self._key(weights, one, q) for one, q in zip(ids, questions, strict=True)]
        found = account.known(keys)
        missing = {key: i for i, key in enumerate(keys) if key not in found}
        room = policy.max_positions - (0 if policy.is_encoder_decoder else self.max_new_tokens)
        for key, i in list(missing.items()):
            if len(ids[i]) > room:
                found[key] = self._kept(account, key, Answer(None, "too long"), None)
                del missing[key]
        order = sorted(missing, key=lambda key: len(ids[missing[key]]))
        warmth = {key: _warmer(self.temperature, questions[i]) or 0.0 for key, i in missing.items()}
        greedy = [key for key in order if not warmth[key]]
        batches = [[key] for key in order if warmth[key]]
        batches += [greedy[i : i + self.batch_size] for i in range(0, len(greedy), self.batch_size)]
        for batch in batches:
            account.go_on(paid=False)
            some = [rows[missing[key]] for key in batch]
            found |= self._answered(policy, some, batch, warmth[batch[0]], account)
        return [found[key] for key in keys]

    def _load(self) -> tuple[Policy, str]:
        from transformers.utils import cached_file

        from alignkit import policy
        from alignkit.config import Model
        from alignkit.loading import resolve
        from alignkit.run import hash_weights

        settings = Model(path=self.model, device=self.device, dtype=self.dtype, compute=self.compute)
        loaded = policy.load(settings, self.seed)
        if self.max_new_tokens > loaded.max_positions - (not loaded.is_encoder_decoder):
            raise UserError(
                f"max_new_tokens={self.max_new_tokens} of the critic is more than the {loaded.max_positions} positions of "
                f"{self.model} allow. Lower it."
            )
        where = Path(resolve(self.model))
        if not where.is_dir():  # a hub id
            where = Path(str(cached_file(self.model, "config.json"))).parent
        return loaded, hash_weights(where)

    def _prompt(self, policy: Policy, question: Question) -> Messages | str:
        if policy.tokenizer.chat_template:
            return question.messages
        return "\n\n".join(message["content"] for message in question.messages)

    def _key(self, weights: str, ids: list[int], question: Question) -> str:
        return _hashed(
            weights=weights,
            prompt=ids,  # what tokenizer and template make of the messages
            temperature=float(self.temperature),
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            dtype=self.dtype,
            compute=self.compute,
            attempt=question.attempt,
        )

    def _answered(
        self, policy: Policy, rows: list[Row], keys: list[str], warmth: float, account: Account
    ) -> dict[str, Answer]:
        import torch

        from alignkit.decode import Decode

        begun = time.monotonic()
        how = Decode(max_new_tokens=self.max_new_tokens, greedy=not warmth)
        generator = torch.Generator().manual_seed(int(keys[0][:15], 16))  # read where a question is alone
        temperature = torch.full((len(rows),), warmth) if warmth else None
        batch = policy.generate(rows, 1, how, temperature=temperature, generator=generator)
        seconds = (time.monotonic() - begun) / len(rows)
        found = {}
        for i, key in enumerate(keys):
            text, counts = batch.responses[i], (int(batch.prompt_mask[i].sum()), int(batch.mask[i].sum()))
            cut = not bool(batch.extra["ended"][i])
            answer = Answer(text, "", cut, *counts) if text.strip() else Answer(None, "empty", cut, *counts)
            call = Call("answered" if text.strip() else "empty", 0, *counts, 0.0, seconds)
            found[key] = self._kept(account, key, answer, call)
        return found

    @staticmethod
    def _kept(account: Account, key: str, answer: Answer, call: Call | None) -> Answer:
        kept = account.keep(key, answer, call)
        assert kept is not None
        return kept
