"""The endpoints of ``vllm serve`` that alignkit asks, over the stand-in of tests/fake_vllm, on a free port of this machine."""

from __future__ import annotations

import json
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from transformers import AutoModelForCausalLM

sys.path.append(str(Path(__file__).parent / "fake_vllm"))


class VLLMServer:
    """``with VLLMServer(folder) as server``: it serves the model in the folder at ``server.url`` until the block ends."""

    def __init__(
        self,
        model: Path,
        dev: bool = True,
        lora: bool = False,
        deaf: bool = False,
        port: int = 0,
        updates: int | None = None,
    ) -> None:
        """``dev``: with VLLM_SERVER_DEV_MODE=1; ``lora``: with adapters at runtime; ``deaf``: it only says
        that it has loaded weights; ``port``: 0 for a free one; ``updates``: the weights that it loads before it dies, at
        the next ones, in the middle of the request."""
        from vllm import LLM

        self.served, self.dev, self.lora, self.deaf = str(model), dev, lora, deaf
        self.llm = LLM(str(model), logprobs_mode="processed_logprobs", enable_lora=lora, max_lora_rank=8)
        self.adapters: dict[str, Any] = {}
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.lock = threading.Lock()
        self.port, self.updates, self.dead = port, updates, False

    def __enter__(self) -> VLLMServer:
        self.http = ThreadingHTTPServer(("127.0.0.1", self.port), _handler(self))
        self.url = f"http://127.0.0.1:{self.http.server_port}"
        threading.Thread(target=self.http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self.die()

    def die(self) -> None:
        """It answers nothing any more, and its port is free."""
        if not self.dead:
            self.dead = True
            self.http.shutdown()
            self.http.server_close()

    def answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        self.asked.append((path, body))
        dev = path in ("/collective_rpc", "/reset_prefix_cache")
        if (dev and not self.dev) or (path.endswith("lora_adapter") and not self.lora):
            return 404, {"detail": "Not Found"}
        if path == "/v1/models":
            return 200, {"data": [{"id": self.served}, *({"id": name} for name in self.adapters)]}
        if path == "/reset_prefix_cache":
            self.llm.reset_prefix_cache()
            return 200, None
        if path == "/collective_rpc":
            assert body["method"] == "reload_weights"
            weights = AutoModelForCausalLM.from_pretrained(body["kwargs"]["weights_path"]).state_dict()
            if not self.deaf:
                self.llm.model.load_state_dict(weights)
            return 200, {"results": [None]}
        if path == "/v1/load_lora_adapter":
            return self._load(body["lora_name"], body["lora_path"])
        if path == "/v1/unload_lora_adapter":
            if body["lora_name"] not in self.adapters:
                return 404, {
                    "error": {"message": f"The lora adapter '{body['lora_name']}' cannot be found: it is not loaded."}
                }
            del self.adapters[body["lora_name"]]
            return 200, None
        assert path == "/v1/completions"
        return self._complete(body)

    def _load(self, name: str, path: str) -> tuple[int, Any]:
        from vllm.lora.request import LoRARequest

        if name in self.adapters:
            return 400, {"error": {"message": f"The lora adapter '{name}' has already been loaded."}}
        assert not (Path(path) / "model.safetensors").exists()
        self.adapters[name] = request = LoRARequest(name, 1 + len(self.llm.adapters), path)
        self.llm._with(request)  # it reads the folder now
        return 200, None

    def _complete(self, body: dict[str, Any]) -> tuple[int, Any]:
        from vllm import SamplingParams

        model, prompt, asked = body.pop("model"), body.pop("prompt"), body.pop("return_token_ids")
        if model != self.served and model not in self.adapters:
            return 404, {"error": {"message": f"The model `{model}` does not exist."}}
        assert asked and body.pop("repetition_penalty") == 1 and body.pop("min_p") == 0
        try:
            how = SamplingParams(**body)
        except ValueError as e:
            return 400, {"error": {"message": str(e)}}
        found = self.llm.generate([{"prompt_token_ids": prompt}], [how], lora_request=self.adapters.get(model))[0]
        choices = [
            {
                "index": o.index,
                "token_ids": o.token_ids,
                "logprobs": {
                    "token_logprobs": [step[t].logprob for t, step in zip(o.token_ids, o.logprobs, strict=True)]
                },
            }
            for o in reversed(found.outputs)  # the order is the index's
        ]
        return 200, {"choices": choices}


def _handler(server: VLLMServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self._reply(json.loads(self.rfile.read(length)) if length else {})

        def _reply(self, body: dict[str, Any]) -> None:
            with server.lock:
                if self.path == "/collective_rpc" and server.updates is not None:
                    server.updates -= 1
                    if server.updates < 0:
                        server.die()
                if server.dead:
                    return
                status, said = server.answer(self.path, body)
            data = b"" if said is None else json.dumps(said).encode()
            self.send_response(status)
            if said is not None:
                self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: object) -> None:
            pass

    return Handler
