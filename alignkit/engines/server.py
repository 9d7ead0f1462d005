"""A vLLM server of its own, which sees the same folder.

Read, not run (there was no GPU at hand): vLLM's ``CompletionRequest``, the endpoints ``/collective_rpc`` (there with
VLLM_SERVER_DEV_MODE=1), ``/reset_prefix_cache`` and ``/v1/load_lora_adapter`` (with VLLM_ALLOW_RUNTIME_LORA_UPDATING=True),
and ``GPUModelRunner.reload_weights(weights_path=…)`` of 2026, which stands on layerwise reloading (vLLM #32133, merged in
January 2026). The extra asks for 0.22, the oldest that TRL's present release supports.

Not verified: which release was the first with ``weights_path``; the words in which adapters are refused; that a reload leaves
every architecture whole (vLLM #48284 tells of hybrid ones that it did not). ``engine/logprob_diff`` shows whether weights come.
"""

from __future__ import annotations

import hashlib
import html
import logging
import re
import shutil
import tempfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from alignkit import ranks
from alignkit.decode import Decode
from alignkit.engines import Engine, Response, scratch
from alignkit.errors import UserError, need
from alignkit.feedback import _address, _reason

if TYPE_CHECKING:
    from alignkit.policy import Policy

ALLOWED = "VLLM_SERVER_DEV_MODE=1"
FIRST = 10.0  # seconds for a connection, and for the first answer, which costs a server nothing
ADAPTERS = "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True and --enable-lora"


@dataclass(kw_only=True)
class Server(Engine):
    """A server started by ``vllm serve``, for one run at a time. After an update weights are written into a folder that both see, and
    the server is asked to load them; with adapters only these, onto the model that it serves, which must be the policy's start.

    Of several ranks the first one hands weights over, and each asks for its share at the one address.
    """

    url: str = "http://localhost:8000"  # without /v1
    folder: str | None = None  # that this process and the server see by one name; null: a temporary one of this machine
    concurrency: int = 64  # prompts that are asked at the same time
    timeout: float = 600.0  # seconds for the responses to a prompt, or to load weights

    def __post_init__(self) -> None:
        super().__post_init__()
        need(self, "concurrency >= 1", "timeout > 0")
        self.url = _address(self.url.rstrip("/").removesuffix("/v1"), "engine.url")
        self._model = ""  # what the server calls what is asked: its model, or the present adapter
        self._written: Path | None = None  # what the server has loaded last

    def ready(self) -> None:
        self._served()

    def _served(self) -> str:
        """The name of the model that is served."""
        found = self._ask("GET", "/v1/models", seconds=FIRST)
        try:
            return str(found["data"][0]["id"])
        except (LookupError, TypeError):
            but = f" but answers {found}" if isinstance(found, str) else ""
            raise UserError(f"engine.url: {self.url}/v1/models names no model{but}; is it a vLLM server?") from None

    def take(self, policy: Policy) -> None:
        self._model = ranks.each(lambda: self._hand_over(policy) if ranks.first() else "")[0]

    def _hand_over(self, policy: Policy) -> str:
        """Write the weights, let the server load them, take the last ones away; the name that they are now asked by."""
        before, path = self._written, Path(tempfile.mkdtemp(prefix="weights-", dir=self._where()))
        path.chmod(0o755)  # the server may be another user's
        policy.model.save_pretrained(path)
        if hasattr(policy.model, "peft_config"):
            # a name by content: prompts that vLLM keeps under an adapter's name were then read by this very adapter
            name = f"alignkit-{_digest(path)}"
            self._ask("POST", "/v1/load_lora_adapter", ADAPTERS, fine="already", lora_name=name, lora_path=str(path))
            if self._model not in ("", name):
                self._ask("POST", "/v1/unload_lora_adapter", ADAPTERS, fine="not", lora_name=self._model)
        else:
            name = self._model or self._served()
            kwargs = {"weights_path": str(path), "is_checkpoint_format": True}
            self._ask("POST", "/collective_rpc", ALLOWED, method="reload_weights", kwargs=kwargs)
            self._ask("POST", "/reset_prefix_cache", ALLOWED)
        self._written = path
        if before is not None:
            shutil.rmtree(before, ignore_errors=True)
        return name

    def _where(self) -> str:
        if self.folder is None:
            self.folder = scratch(self)
            Path(self.folder).chmod(0o755)
        folder = Path(self.folder).expanduser().resolve()
        folder.mkdir(parents=True, exist_ok=True)
        return str(folder)

    def draw(
        self,
        prompts: list[list[int]],
        counts: list[int],
        how: Decode,
        ends: list[int],
        taus: list[float],
        seeds: list[int],
    ) -> list[Response]:
        def ask(ids: list[int], n: int, tau: float, seed: int) -> list[Response]:
            found = self._ask(
                "POST", "/v1/completions", client=client, model=self._model, prompt=ids, n=1 if how.greedy else n,
                temperature=0.0 if how.greedy else tau, top_p=how.top_p, top_k=how.top_k, min_p=0.0,
                repetition_penalty=1.0, seed=seed, max_tokens=how.max_new_tokens, stop_token_ids=ends, ignore_eos=True,
                logprobs=1, return_token_ids=True,
            )  # fmt: skip
            try:
                choices = sorted(found["choices"], key=lambda c: c["index"])
                some: list[Response] = [(c["token_ids"], c["logprobs"]["token_logprobs"]) for c in choices]
            except (LookupError, TypeError):
                but = f" but {found}" if isinstance(found, str) else ""
                raise UserError(
                    f"the vLLM server at {self.url} gives no token ids or log-probabilities{but}; vLLM 0.22 or newer does."
                ) from None
            return some * n if how.greedy else some

        with self._client(self.timeout) as client, ThreadPoolExecutor(self.concurrency) as pool:
            return [one for some in pool.map(ask, prompts, counts, taus, seeds) for one in some]

    def _client(self, seconds: float) -> Any:
        import httpx

        for name in ("httpx", "httpcore"):  # they tell of every request
            logging.getLogger(name).setLevel(logging.WARNING)
        limits = httpx.Limits(max_connections=self.concurrency)
        timeout = httpx.Timeout(seconds, connect=min(seconds, FIRST))
        return httpx.Client(base_url=self.url, timeout=timeout, limits=limits, trust_env=False)

    def _ask(
        self,
        verb: str,
        path: str,
        needs: str = "",
        fine: str = "",
        client: Any = None,
        seconds: float | None = None,
        **body: Any,
    ) -> Any:
        """What the server answers: JSON where it is, else in a few words what else it is; None of nothing.

        Args:
            needs: what the server must have been started with for this to be there.
            fine: a word of a refusal (400, 404) that is none, as the server is in that state already.
            seconds: to wait for the answer; ``timeout`` where not given.

        Raises:
            UserError: it is not there, does not answer, or refuses; names its address.
        """
        import httpx

        seconds = min(seconds or self.timeout, self.timeout)
        lost = " Start the server again and repeat the command: the run goes on from its last checkpoint."
        lost = lost if self._model else ""  # before the first weights were handed over there is nothing to go on with
        try:
            with self._client(seconds) if client is None else nullcontext(client) as one:
                answer = one.request(verb, path, json=body or None)
        except httpx.ReadTimeout:
            if seconds < self.timeout:
                raise UserError(
                    f"engine.url: {self.url} takes the connection, but has not answered {path} for {seconds:g} s. Is it a vLLM server, "
                    f"and has it loaded its model? Look at its log, or set engine.url to another address."
                ) from None
            raise UserError(
                f"the vLLM server at {self.url} has not answered {path} for {seconds:g} s. Look at its log, or raise engine.timeout.{lost}"
            ) from None
        except httpx.HTTPError as e:
            why = f"({type(e).__name__}: {e})"
            if lost:
                raise UserError(f"the vLLM server at {self.url} cannot be reached any more {why}.{lost}") from None
            raise UserError(
                f"the vLLM server at {self.url} cannot be reached {why}. Start it with `vllm serve`, or set engine.url to its address."
            ) from None
        failed = answer.status_code >= 500
        if answer.status_code >= 400:
            said = _said(answer) or answer.reason_phrase
            if fine and answer.status_code in (400, 404) and fine in said:
                return None
            way_out = lost if failed else f" Start it with {needs}." if needs else ""
            if path == "/v1/models":
                way_out = " Is it a vLLM server? Set engine.url to its address."
            does = "fails at" if failed else "refuses"
            raise UserError(f"the vLLM server at {self.url} {does} {path} ({answer.status_code}: {said}).{way_out}")
        try:
            return answer.json()
        except ValueError:
            return _said(answer) or None


def _said(answer: Any) -> str:
    """What an answer says, in one line: the reason in JSON; of a page, as a proxy gives it, its kind and title or first words."""
    kind = answer.headers.get("content-type", "").partition(";")[0].strip()
    if "json" in kind:
        return " ".join(_reason(answer.content)[0].split())[:300]
    title = re.search(r"<title[^>]*>(.*?)</title>", answer.text, re.IGNORECASE | re.DOTALL)
    words = " ".join(html.unescape(title[1] if title and title[1].strip() else answer.text).split())
    return f"{kind or 'no kind of content'}, '{words if len(words) <= 80 else words[:79] + '…'}'" if words else ""


def _digest(folder: Path) -> str:
    files = sorted(folder.glob("*.safetensors"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()[:12]
