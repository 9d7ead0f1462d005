"""Engines beside the policy, against stand-ins with vLLM's interface and weights of their own: fake_vllm, vllm_server.py."""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from group import together
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SEQ2SEQ, command, composed, lines, train

from alignkit import engines
from alignkit.batch import Batch
from alignkit.config import Lora, Model, check, signature, whole
from alignkit.decode import Decode
from alignkit.engines import server as server_module
from alignkit.engines.server import Server
from alignkit.engines.vllm import VLLM
from alignkit.errors import UserError
from alignkit.policy import Policy, load
from alignkit.stages import rl

FAKE = Path(__file__).parent / "fake_vllm"
HOW = Decode(max_new_tokens=6, tempered=True)
RL = [
    "+algo=reinforce",
    *SMALL_CAUSAL,
    *SMALL_RL,
    "algo.k=2",
    "reward=length",
    "evaluate.every=0",
    "evaluate.test=false",
    "audit.on=false",
]
ENDS = range(97, 125)  # tokens that end a response of the tests' policies, so that lengths differ


@pytest.fixture
def fake(monkeypatch) -> Any:
    """The stand-in as ``vllm``; its ``log`` is empty."""
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.syspath_prepend(str(FAKE))
    monkeypatch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING", raising=False)
    import vllm

    yield vllm
    for name in [n for n in sys.modules if n == "vllm" or n.startswith("vllm.")]:
        del sys.modules[name]


@pytest.fixture
def causal(tiny_causal) -> Policy:
    tiny_causal.eos = [tiny_causal.eos[0], *ENDS]
    return tiny_causal


def drawn(
    policy: Policy, engine: Any, rows: list[dict[str, Any]], n: Any = 3, how: Decode = HOW, seed: int = 1, **more: Any
) -> Batch:
    with policy.drawing(engine):
        return policy.generate(rows, n, how, generator=torch.Generator().manual_seed(seed), **more)


def learn(policy: Policy, size: float = 0.3) -> None:
    """A step of the optimizer that a run has, up or down by chance."""
    generator = torch.Generator().manual_seed(0)
    weights = [p for p in policy.model.parameters() if p.requires_grad]
    for p in weights:
        p.grad = torch.randn(p.shape, generator=generator)
    torch.optim.AdamW(weights, lr=size, fused=True).step()
    for p in weights:
        p.grad = None


def apart(batch: Batch) -> float:
    return engines.mismatch(batch)["engine/logprob_diff_max"]


def adapted(build_policy, rank: int = 4) -> Policy:
    """A policy with adapters that are not zero."""
    config = {**build_policy("causal").model.config.to_dict()}
    keep = ("model_type", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "tie_word_embeddings", "initializer_range")  # fmt: skip
    model = Model(config={k: config[k] for k in keep}, vocab_size=300, device="cpu", lora=Lora(r=rank))
    policy = load(model, 0, ["the cat sat", "a dog ran far", "rain"])
    learn(policy, 0.1)
    return policy


# ---- whose weights ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("sleep", [0, 1, 2])
def test_samples_come_from_the_policys_weights_after_every_update(fake, causal, rows, sleep: int) -> None:
    engine = VLLM(sleep=sleep)
    for step in range(3):
        batch = drawn(causal, engine, rows(4), seed=step)
        assert apart(batch) < 1e-5
        learn(causal)


def test_without_the_push_the_difference_shows(fake, causal, rows, monkeypatch) -> None:
    """The control of the test above: it would see weights that have stayed behind, or what was computed with them."""
    engine = VLLM(sleep=0)
    assert apart(drawn(causal, engine, rows(4))) < 1e-5
    learn(causal)
    with monkeypatch.context() as m:
        m.setattr(engine, "take", lambda policy: None)
        assert apart(drawn(causal, engine, rows(4))) > 0.1
    with monkeypatch.context() as m:
        m.setattr(engine._llm, "reset_prefix_cache", lambda: True)
        assert apart(drawn(causal, engine, rows(4))) > 0.1  # of the first token, by what was kept of the prompt


def test_weights_are_taken_over_once_a_step(fake, causal, rows) -> None:
    engine, count = VLLM(sleep=0), len(list(causal.model.parameters()))
    with causal.drawing(engine):
        for _ in range(3):
            causal.generate(rows(2), 1, HOW)
    assert fake.log == ["build memory=0.3", f"load {count}"]
    learn(causal)
    drawn(causal, engine, rows(2))
    assert fake.log[2:] == [f"load {count}"]


def test_it_sleeps_while_the_policy_learns(fake, causal, rows) -> None:
    engine, count = VLLM(sleep=2, memory=0.5), len(list(causal.model.parameters()))
    with causal.drawing(engine):
        causal.generate(rows(2), 1, HOW)
        causal.generate(rows(2), 1, HOW)
        assert not engine._llm.asleep["weights"]
    assert engine._llm.asleep == {"weights": True, "kv_cache": True}
    with pytest.raises(RuntimeError, match="asleep"):
        engine._llm.generate([{"prompt_token_ids": [5]}], [fake.SamplingParams()])
    with pytest.raises(RuntimeError, match="not mapped"):
        engine._load(causal)
    assert apart(drawn(causal, engine, rows(2))) < 1e-5
    assert fake.log == [
        "build memory=0.5", f"load {count}", "sleep 2",
        "wake ['weights']", f"load {count}", "wake ['kv_cache']", "sleep 2",
    ]  # fmt: skip
    assert causal.engine is None


def test_of_a_policy_with_adapters_these_alone_are_sent(fake, build_policy, rows) -> None:
    policy, engine = adapted(build_policy), VLLM()
    base = len([n for n, _ in policy.model.named_parameters() if ".lora_" not in n])
    for step in range(3):
        assert apart(drawn(policy, engine, rows(4), seed=step)) < 1e-5
        learn(policy, 0.1)
    assert [line for line in fake.log if line.startswith("load")] == [f"load {base}"]  # at the start, and never again
    assert fake.log.count("sleep 1") == 3  # which keeps the base
    folder = Path(engine._folder)
    assert not list(folder.rglob("model.safetensors")) and (folder / "adapter-3" / "adapter_model.safetensors").exists()
    batch = drawn(policy, engine, rows(4))
    with policy.model.disable_adapter(), torch.no_grad():  # the adapters count: the base alone would be told apart
        assert apart(batch.with_(logprobs=policy.forward(batch))) > 0.1


# ---- what it gives ---------------------------------------------------------------------------------------------------


def test_masks_and_ends_are_those_of_decode(fake, causal, rows) -> None:
    for temperature in (None, torch.tensor([0.5, 1.0, 2.0, 1.0])):
        ours = drawn(causal, None, rows(4), [1, 4, 2, 3], temperature=temperature)
        theirs = drawn(causal, VLLM(), rows(4), [1, 4, 2, 3], temperature=temperature)
        for batch in (ours, theirs):
            ends = torch.isin(batch.response_ids, torch.tensor(causal.eos)) & batch.mask
            lengths = batch.lengths
            assert ((ends.sum(1) == 1) == batch.extra["ended"]).all() and (ends.sum(1) <= 1).all()
            assert (lengths[~batch.extra["ended"]] == 6).all()
            assert (batch.mask == (torch.arange(batch.mask.shape[1]) < lengths[:, None])).all()
            assert (batch.response_ids[~batch.mask] == causal.pad).all() and (batch.logprobs[~batch.mask] == 0).all()
            assert batch.group.tolist() == [0, 1, 1, 1, 1, 2, 2, 3, 3, 3]
            assert batch.extra["ended"].any() and not batch.extra["ended"].all()
        assert torch.equal(ours.prompt_ids, theirs.prompt_ids) and torch.equal(ours.prompt_mask, theirs.prompt_mask)
        assert [row["id"] for row in ours.rows] == [row["id"] for row in theirs.rows]


def test_greedy_responses_are_the_same_and_weigh_nothing(fake, causal, rows) -> None:
    how = dataclasses.replace(HOW, greedy=True)
    ours, theirs = (drawn(causal, engine, rows(4), 2, how) for engine in (None, VLLM()))
    assert torch.equal(ours.response_ids, theirs.response_ids) and torch.equal(ours.mask, theirs.mask)
    assert torch.allclose(ours.logprobs, theirs.logprobs, atol=1e-5) and apart(theirs) == 0


@pytest.mark.parametrize("tempered", [True, False])
def test_log_probabilities_are_the_policys_at_the_losss_temperature(fake, causal, rows, tempered: bool) -> None:
    """As ``decode`` has them; and the engine's are comparable, though it knows of the sampling temperature alone."""
    tau = torch.tensor([0.5, 1.0, 2.0, 1.5])
    batch = drawn(causal, VLLM(), rows(4), 3, dataclasses.replace(HOW, tempered=tempered), temperature=tau)
    at = tau[batch.group] if tempered else torch.ones(len(batch))
    with torch.no_grad():
        assert torch.allclose(batch.logprobs, causal.forward(batch, at), atol=1e-5)
    assert apart(batch) < 1e-5


def test_a_filter_makes_a_drawn_token_likelier_than_the_policy_has_it(fake, causal, rows) -> None:
    batch = drawn(causal, VLLM(), rows(4), 8, dataclasses.replace(HOW, top_k=5))
    ratio = engines.mismatch(batch)
    assert ratio["engine/ratio"] < 0.9
    assert ((batch.logprobs - batch.extra["engine_logprobs"])[batch.mask] < 1e-5).all()


def test_a_draw_depends_on_the_generator_alone(fake, causal, rows) -> None:
    one, again, other = (drawn(causal, VLLM(), rows(4), seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.response_ids, again.response_ids)
    assert one.response_ids.shape != other.response_ids.shape or not torch.equal(one.response_ids, other.response_ids)
    engine = VLLM()
    drawn(causal, engine, rows(4), seed=5)
    assert torch.equal(drawn(causal, engine, rows(4)).response_ids, one.response_ids)


def test_building_it_moves_nobodys_random_numbers(fake, causal, rows) -> None:
    """vLLM seeds the whole process, and a resumed run builds it in another step than the unbroken one."""

    def numbers() -> tuple[float, float, float]:
        return torch.rand(1).item(), random.random(), np.random.rand()

    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    plain = numbers()
    for seed in (torch.manual_seed, random.seed, np.random.seed):
        seed(7)
    drawn(causal, VLLM(), rows(2))
    assert numbers() == plain


def test_what_comes_behind_an_end_is_cut() -> None:
    assert engines._cut(([5, 9, 7, 9, 6], [-1.0, -2.0, -3.0, -4.0, -5.0]), [7, 9], 5) == ([5, 9], [-1.0, -2.0])
    assert engines._cut(([5, 6, 7], [-1.0, -2.0, -3.0]), [9], 2) == ([5, 6], [-1.0, -2.0])
    with pytest.raises(UserError, match="0 tokens"):
        engines._cut(([], []), [9], 2)


# ---- the correction --------------------------------------------------------------------------------------------------


def test_truncated_importance_sampling_by_hand(make_batch) -> None:
    batch = make_batch([2], [2, 1])
    policy = torch.log(torch.tensor([[0.5, 0.2], [0.3, 1.0]])) * batch.mask
    engine = torch.log(torch.tensor([[0.25, 0.4], [0.1, 1.0]])) * batch.mask
    batch = batch.with_(
        logprobs=policy, advantages=torch.tensor([[1.0, -3.0], [2.0, 0.0]]), extra={"engine_logprobs": engine}
    )
    # ratios 2, 1/2 and 3
    assert engines.corrected(VLLM(truncate=2.5), batch).advantages.flatten().tolist() == pytest.approx([2, -1.5, 5, 0])
    assert engines.corrected(VLLM(truncate=1.0), batch).advantages.flatten().tolist() == pytest.approx([1, -1.5, 2, 0])
    assert engines.corrected(VLLM(), batch) is batch and engines.corrected(None, batch) is batch
    found = engines.mismatch(batch)
    assert found["engine/ratio"] == pytest.approx(5.5 / 3)
    assert found["engine/logprob_diff"] == pytest.approx((math.log(2) * 2 + math.log(3)) / 3)
    assert found["engine/logprob_diff_max"] == pytest.approx(math.log(3))
    assert engines.mismatch(batch.with_(extra={})) == {}


def test_the_weights_take_the_engines_distribution_out_of_the_mean() -> None:
    """Over all outcomes: below the cap, weighted advantages of the engine's draws have the mean of the policy's own."""
    policy, engine, values = (
        torch.tensor([0.6, 0.3, 0.1]),
        torch.tensor([0.2, 0.5, 0.3]),
        torch.tensor([1.0, -2.0, 1.0]),
    )
    one = torch.ones(3, 1, dtype=torch.long)
    batch = Batch(one, one.bool(), one, one.bool(), torch.arange(3), [{}] * 3, [""] * 3, logprobs=policy.log()[:, None],
                  advantages=values[:, None], extra={"engine_logprobs": engine.log()[:, None]})  # fmt: skip
    weighed = engines.corrected(VLLM(truncate=10.0), batch).advantages[:, 0]
    assert float((engine * weighed).sum()) == pytest.approx(float((policy * values).sum()))
    assert abs(float((engine * values).sum() - (policy * values).sum())) > 0.3


def test_columns_that_left_with_the_longest_row_leave_the_engines_too(make_batch) -> None:
    batch = make_batch([1, 1], [4, 2])
    batch = batch.with_(extra={"engine_logprobs": batch.logprobs - 1.0}, advantages=torch.ones(2, 4))
    short = batch.take(torch.tensor([1]))
    assert engines.mismatch(short)["engine/ratio"] == pytest.approx(math.e)
    assert engines.corrected(VLLM(truncate=1.5), short).advantages.tolist() == [[1.5, 1.5]]


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("more", [[], ["engine.truncate=2"], ["model.lora.r=4", "engine.sleep=1"]])
def test_a_run_trains_and_tells_the_distance(fake, tmp_path, more: list[str]) -> None:
    _, folder = train(tmp_path, *RL, "engine=vllm", "engine.memory=0.2", "algo.temperature=0.8", "algo.lr=1e-2", *more)
    steps = lines(folder / "metrics.jsonl")
    assert len(steps) == 6 and all(line["engine/logprob_diff_max"] < 1e-4 for line in steps)
    assert all(line["engine/ratio"] == pytest.approx(1, abs=1e-4) and line["log_ratio"] < 1e-4 for line in steps)
    assert fake.log[0] == "build memory=0.2" and "sleep" in fake.log[-1]


def test_in_a_run_weights_that_stay_behind_show(fake, tmp_path, monkeypatch) -> None:
    take = VLLM.take
    monkeypatch.setattr(VLLM, "take", lambda self, policy: take(self, policy) if self._llm is None else None)
    _, folder = train(tmp_path, *RL, "engine=vllm", "engine.sleep=0", "algo.lr=1e-2", "algo.warmup=0")
    told = [line["engine/logprob_diff_max"] for line in lines(folder / "metrics.jsonl")]
    assert told[0] < 1e-4 and min(told[1:]) > 1e-3


def test_the_correction_is_in_the_run(fake, tmp_path, monkeypatch) -> None:
    """A cap of a half halves every advantage where engine and policy agree."""
    seen: list[Batch] = []
    corrected = engines.corrected
    monkeypatch.setattr(
        rl.engines, "corrected", lambda e, b: seen.append(b) or seen.append(corrected(e, b)) or seen[-1]
    )
    train(tmp_path, *RL, "engine=vllm", "engine.truncate=0.5", "algo.steps=1")
    assert torch.allclose(seen[1].advantages, seen[0].advantages / 2) and seen[0].advantages.abs().max() > 0


@pytest.mark.parametrize("method", ["grpo", "dapo", "remax", "esrl", "ppo", "mrt"])
def test_methods_draw_by_it(fake, tmp_path, method: str) -> None:
    words = [w for w in RL if w not in ("+algo=reinforce", "algo.k=2")]
    _, folder = train(tmp_path, f"+algo={method}", *words, "engine=vllm", "algo.steps=2")
    assert all(line["engine/logprob_diff_max"] < 1e-4 for line in lines(folder / "metrics.jsonl"))


WORKER = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[1:3]
from running import train
train(Path(sys.argv[3]), *sys.argv[4:])
"""


def weights(folder: Path) -> bytes:
    return (folder / "final" / "model.safetensors").read_bytes()


def test_a_killed_run_goes_on_as_if_it_had_not_been(fake, tmp_path) -> None:
    words = [*RL, "engine=vllm", "algo.lr=1e-2", "run.save_every=2"]
    _, unbroken = train(tmp_path / "a", *words)
    process = subprocess.Popen([sys.executable, "-c", WORKER, str(FAKE), str(FAKE.parent), str(tmp_path / "b"), *words])
    folder = tmp_path / "b" / unbroken.name
    until = time.monotonic() + 120
    while not (folder / "checkpoint-2").exists() and time.monotonic() < until and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert (folder / "checkpoint-2").exists()
    _, again = train(tmp_path / "b", *words)
    assert again == folder and weights(again) == weights(unbroken)
    numbers = [[{k: v for k, v in line.items() if k in ("loss", "reward", "engine/logprob_diff")} for line in lines(f / "metrics.jsonl")]
               for f in (unbroken, again)]  # fmt: skip
    assert numbers[0] == numbers[1] and len(numbers[0]) == 6 and any(line["loss"] for line in numbers[0])


# ---- a server --------------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(fake, tmp_path):
    """``serve(policy, **how)``: a server that serves the policy's start as a folder."""
    from vllm_server import VLLMServer

    def start(policy: Policy, **how: Any) -> Any:
        model = copy.deepcopy(policy.model).unload() if hasattr(policy.model, "peft_config") else policy.model
        model.save_pretrained(tmp_path / "served")
        policy.tokenizer.save_pretrained(tmp_path / "served")
        return VLLMServer(tmp_path / "served", **how)

    return start


def test_a_server_follows_through_a_folder(serve, causal, rows, tmp_path) -> None:
    with serve(causal) as server:
        engine = Server(url=f"{server.url}/v1", folder=str(tmp_path / "shared"))
        engine.ready()
        for step in range(3):
            assert apart(drawn(causal, engine, rows(4), [2, 1, 3, 1], seed=step)) < 1e-5
            learn(causal)
        drawn(causal, engine, rows(1))
        asked = [path for path, _ in server.asked]
    assert asked.count("/collective_rpc") == asked.count("/reset_prefix_cache") == 4
    assert len(list((tmp_path / "shared").iterdir())) == 1  # of the last update


def test_a_server_that_has_not_loaded_them_shows(serve, causal, rows) -> None:
    with serve(causal, deaf=True) as server:
        engine = Server(url=server.url)
        assert apart(drawn(causal, engine, rows(4))) < 1e-5  # it serves the start
        learn(causal)
        assert apart(drawn(causal, engine, rows(4))) > 0.1


def test_a_server_and_the_engine_in_this_process_draw_the_same(serve, causal, rows) -> None:
    with serve(causal) as server:
        one, other = (drawn(causal, engine, rows(4), [1, 3, 2, 2]) for engine in (VLLM(), Server(url=server.url)))
    assert torch.equal(one.response_ids, other.response_ids) and torch.equal(one.mask, other.mask)


def test_adapters_alone_are_sent_to_a_server(serve, build_policy, rows, tmp_path) -> None:
    policy = adapted(build_policy)
    with serve(policy, lora=True, dev=False) as server:
        engine = Server(url=server.url, folder=str(tmp_path / "shared"))
        for step in range(2):
            assert apart(drawn(policy, engine, rows(4), seed=step)) < 1e-5
            learn(policy, 0.1)
        again = Server(url=server.url, folder=str(tmp_path / "shared"))  # a run that goes on meets its own adapter
        drawn(policy, engine, rows(2))
        assert apart(drawn(policy, again, rows(2))) < 1e-5
        paths = [path for path, _ in server.asked]
        assert "/collective_rpc" not in paths and paths.count("/v1/load_lora_adapter") == 4
        assert len(server.adapters) == 1
    assert not list((tmp_path / "shared").rglob("model.safetensors"))


def test_a_run_by_a_server(serve, tmp_path) -> None:
    words = [*RL, "algo.lr=1e-2", "algo.steps=3"]
    policy = load(composed(words).model, 0, ["the cat"])  # another start: all that it draws with has been handed over
    with serve(policy) as server:
        server.llm.model.resize_token_embeddings(300)
        _, folder = train(tmp_path, *words, "engine=vllm_server", f"engine.url={server.url}")
    assert all(line["engine/logprob_diff_max"] < 1e-4 for line in lines(folder / "metrics.jsonl"))


def test_two_processes_draw_what_one_does(serve, tmp_path, monkeypatch) -> None:
    """Each by an engine of its own in its process, and at the one server."""
    words = [*RL, "algo.lr=1e-2", "algo.steps=3"]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(FAKE.parent.parent), str(FAKE)]))
    with serve(load(composed(words).model, 0, ["the cat"])) as server:
        server.llm.model.resize_token_embeddings(300)
        every = [[*words, "engine=vllm"], [*words, "engine=vllm_server", f"engine.url={server.url}"]]
        together(2, [[*one, f"run.root={tmp_path / 'two'}"] for one in every], tmp_path)
        for one in every:
            _, folder = train(tmp_path / "one", *one)
            alone, shared = (lines(f / "metrics.jsonl") for f in (folder, tmp_path / "two" / folder.name))
            for key in ("loss", "reward", "length", "grad_norm"):
                assert [line[key] for line in shared] == pytest.approx([line[key] for line in alone], abs=1e-5)
            assert all(line["engine/logprob_diff_max"] < 1e-4 for line in shared) and any(
                line["loss"] for line in shared
            )


def test_a_server_that_is_down_is_named(tmp_path) -> None:
    with pytest.raises(UserError, match=r"http://127\.0\.0\.1:9 cannot be reached"):
        train(tmp_path, *RL, "engine=vllm_server", "engine.url=http://127.0.0.1:9")


@pytest.fixture
def web():
    """``web(answer)``: the address of a real HTTP server whose every request ``answer(handler)`` deals with."""
    running = []

    def start(answer: Any) -> str:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                answer(self)

            do_POST = do_GET

            def log_message(self, *args: object) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in running:
        server.shutdown()
        server.server_close()


def page(status: int, body: bytes, kind: str = "text/html; charset=utf-8") -> Any:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(status)
        handler.send_header("Content-Type", kind)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def test_a_server_that_never_answers_is_waited_for_a_few_seconds(web, cli, monkeypatch) -> None:
    """Before anything is loaded; the time for responses, engine.timeout, is another."""
    assert server_module.FIRST == 10.0
    monkeypatch.setattr(server_module, "FIRST", 0.3)
    monkeypatch.setattr(rl, "load", lambda *a: pytest.fail("loaded"))
    over = threading.Event()
    url = web(lambda handler: over.wait(60))
    try:
        for more in ([], ["--dry-run"]):
            begun = time.monotonic()
            code, _, err = cli("train", *RL, "engine=vllm_server", f"engine.url={url}", *more)
            assert time.monotonic() - begun < 20
            assert (code, err) == (2, f"error: engine.url: {url} takes the connection, but has not answered /v1/models for 0.3 s. Is it a "
                                   "vLLM server, and has it loaded its model? Look at its log, or set engine.url to another address.\n")  # fmt: skip
    finally:
        over.set()


def test_responses_that_take_too_long_name_the_setting(web) -> None:
    over = threading.Event()
    url = web(lambda handler: over.wait(60))
    try:
        with pytest.raises(UserError, match=r"not answered /v1/models for 0\.2 s\. .* raise engine\.timeout\.$"):
            Server(url=url, timeout=0.2).ready()
    finally:
        over.set()


LONG = (
    b"<html><head><title>\n 502 Bad &amp; Gateway </title></head><body>" + b"<p>nginx</p>\n" * 500 + b"</body></html>"
)


@pytest.mark.parametrize(
    ("answer", "says"),
    [
        (page(502, LONG), "the vLLM server at {url} fails at /v1/models (502: text/html, '502 Bad & Gateway'). Is it a vLLM server? "
         "Set engine.url to its address."),
        (page(404, LONG), "the vLLM server at {url} refuses /v1/models (404: text/html, '502 Bad & Gateway'). Is it a vLLM server? "
         "Set engine.url to its address."),
        (page(200, LONG), "engine.url: {url}/v1/models names no model but answers text/html, '502 Bad & Gateway'; is it a vLLM server?"),
        (page(200, b"word\n" * 500, "text/plain"), "engine.url: {url}/v1/models names no model but answers text/plain, '"
         + "word " * 15 + "word…'; is it a vLLM server?"),
        (page(200, b"{", "application/json"), "engine.url: {url}/v1/models names no model but answers {{; is it a vLLM server?"),
        (page(500, b'{"error": {"message": "a\\nb"}}', "application/json"), "the vLLM server at {url} fails at /v1/models (500: a b). "
         "Is it a vLLM server? Set engine.url to its address."),
        (page(503, b""), "the vLLM server at {url} fails at /v1/models (503: Service Unavailable). Is it a vLLM server? Set engine.url "
         "to its address."),
    ],
)  # fmt: skip
def test_what_is_no_vllm_server_is_told_in_one_line(web, cli, answer, says: str) -> None:
    url = web(answer)
    code, _, err = cli("train", *RL, "engine=vllm_server", f"engine.url={url}")
    assert (code, err) == (2, f"error: {says.format(url=url)}\n")


def test_requests_are_not_told_on_the_terminal(serve, tmp_path) -> None:
    """In a process of its own, where Hydra has set the log up."""
    with serve(load(composed(RL).model, 0, ["the cat"])) as server:
        server.llm.model.resize_token_embeddings(300)
        done = command(
            "train", *RL, "algo.steps=1", "engine=vllm_server", f"engine.url={server.url}", f"run.root={tmp_path}"
        )
    assert done.returncode == 0, done.stderr
    assert "HTTP Request" not in done.stdout + done.stderr and server.url not in done.stdout + done.stderr


def test_a_server_that_dies_in_the_middle_costs_what_is_past_the_last_checkpoint(serve, tmp_path, cli) -> None:
    """It is gone at the weights of step 3. Back at its address, with the weights of the start, the run ends where an unbroken one does."""
    words = [*RL, "algo.lr=1e-2", "algo.steps=4", "run.save_every=2"]
    policy = load(composed(words).model, 0, ["the cat"])

    def started(**how: Any) -> Any:
        server = serve(policy, **how)
        server.llm.model.resize_token_embeddings(300)
        return server

    with started() as server:
        words += ["engine=vllm_server", f"engine.url={server.url}"]
        _, unbroken = train(tmp_path / "a", *words)
    port = server.http.server_port
    with started(port=port, updates=2):
        code, _, err = cli("train", *words, f"run.root={tmp_path / 'b'}")
    told = [line for line in err.split("\n") if line.startswith("error:")]
    assert code == 2 and len(told) == 1 and err.endswith(f"{told[0]}\n"), err
    assert told[0].startswith(f"error: the vLLM server at {server.url} cannot be reached any more (")
    assert told[0].endswith("Start the server again and repeat the command: the run goes on from its last checkpoint.")
    folder = tmp_path / "b" / unbroken.name
    assert sorted(p.name for p in folder.glob("checkpoint-*")) == ["checkpoint-2"]
    code, _, err = cli("train", *words, f"run.root={tmp_path / 'b'}")
    assert code == 2 and f"{server.url} cannot be reached (ConnectError" in err and (folder / "checkpoint-2").exists()
    with started(port=port):
        code, _, err = cli("train", *words, f"run.root={tmp_path / 'b'}")
    assert code == 0 and "goes on after step 2 of 4" in err, err
    assert weights(folder) == weights(unbroken)
    keys = ("step", "loss", "reward", "engine/logprob_diff")
    numbers = [[[line[k] for k in keys] for line in lines(f / "metrics.jsonl")] for f in (folder, unbroken)]
    assert numbers[0] == numbers[1] and len(numbers[0]) == 4


def test_a_server_without_what_it_needs_says_how_to_start_it(serve, causal, build_policy, rows) -> None:
    with serve(causal, dev=False) as server, pytest.raises(UserError, match="VLLM_SERVER_DEV_MODE=1"):
        drawn(causal, Server(url=server.url), rows(2))
    policy = adapted(build_policy)
    with serve(policy) as server, pytest.raises(UserError, match="enable-lora"):
        drawn(policy, Server(url=server.url), rows(2))


# ---- refusals, configuration -----------------------------------------------------------------------------------------


def test_nothing_imports_vllm_unless_it_is_chosen(tmp_path, monkeypatch) -> None:
    (tmp_path / "vllm.py").write_text("raise RuntimeError('imported')\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    train(tmp_path, *RL, "algo.steps=1")
    with pytest.raises(RuntimeError, match="imported"):  # the control
        train(tmp_path, *RL, "algo.steps=1", "engine=vllm")


def test_a_missing_vllm_is_one_line(cli) -> None:
    code, _, err = cli("train", *RL, "engine=vllm")
    assert code == 2 and err.strip().endswith(
        "engine=vllm needs vLLM, which is not installed: pip install -e '.[vllm]' in alignkit's folder."
    )


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["+algo=reinforce", *SMALL_SEQ2SEQ], "causal models alone"),
        (["+algo=reinforce"], "causal models alone"),  # the bundled encoder–decoder
        (["+algo=esrl", *SMALL_CAUSAL, "algo.capability=entropy"], "decodes with entropy"),
        (["+algo=esrl_released", *SMALL_CAUSAL], "decodes with top"),
        (["+algo=mrt", *SMALL_CAUSAL, "engine.truncate=2"], "engine.truncate"),
        (["+algo=reinforce", *SMALL_CAUSAL, "engine.truncate=0"], "truncate must be above 0"),
        (["+algo=reinforce", *SMALL_CAUSAL, "engine.memory=1.5"], "memory must be at most 1"),
    ],
)
def test_what_cannot_work_is_refused_before_anything_is_loaded(fake, tmp_path, monkeypatch, words, says: str) -> None:
    monkeypatch.setattr(rl, "load", lambda *a: pytest.fail("loaded"))
    with pytest.raises(UserError, match=says):
        train(tmp_path, words[0], *SMALL_RL, *words[1:], "engine=vllm")
    assert fake.log == []


def test_a_response_that_is_begun_and_one_too_long_are_refused(fake, causal, rows) -> None:
    with pytest.raises(UserError, match="begins with"):
        drawn(causal, VLLM(), rows(2), begun=["a", "b"])
    with pytest.raises(UserError, match="positions allow"):
        drawn(causal, VLLM(), rows(2), how=Decode(max_new_tokens=64))
    with pytest.raises(UserError, match=r"engine\.length=8"):
        drawn(causal, VLLM(length=8), rows(2))
    assert causal.engine is None


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["engine=vllm", "engine.memori=0.3"], "engine.memori: unknown. Did you mean 'memory'?"),
        (["engine=vllm", "engine.memory=much"], "engine.memory: must be float"),
        (["engine=vllm", "engine.sleep=3"], "engine.sleep: must be Literal"),
        (["+engine.memory=0.3"], "engine: names no _target_"),
    ],
)
def test_keys_are_those_of_the_class(words: list[str], says: str) -> None:
    with pytest.raises(UserError, match=says.replace(".", r"\.").replace("?", r"\?")):
        check(composed([*RL, *words]))


def test_another_stage_has_no_use_for_it() -> None:
    with pytest.raises(UserError, match="engine: has no effect in stage sft"):
        check(composed(["+algo=sft", "engine=vllm"]))


def test_it_is_part_of_the_signature_and_its_absence_is_not() -> None:
    plain, named, vllm = (composed([*RL, *words]) for words in ([], ["engine=transformers"], ["engine=vllm"]))
    assert signature(plain) == signature(named) != signature(vllm)
    assert signature(vllm) != signature(composed([*RL, "engine=vllm", "engine.memory=0.5"]))
    assert "engine" not in whole(plain) and whole(vllm)["engine"]["memory"] == 0.3


def test_another_engine_is_told_when_a_run_goes_on(fake, tmp_path, cli) -> None:
    """In a directory of a fixed name, of a run that has begun and of one that is finished."""
    words = [
        "train",
        *RL,
        "algo.steps=2",
        "run.save_every=1",
        f"run.dir={tmp_path / 'fixed'}",
        "engine=vllm",
        "engine.memory=0.2",
    ]
    assert cli(*words)[0] == 0
    cases = [
        (["engine.memory=0.4"], "(engine.memory: 0.2 → 0.4)"),
        (["engine.truncate=2"], "(engine.truncate: None → 2)"),
        (["engine=vllm_server", "~engine.memory"], "engine._target_: alignkit.engines.vllm.VLLM → alignkit.engines.server.Server"),
        (["engine=transformers", "~engine.memory"], "engine._target_: alignkit.engines.vllm.VLLM → nothing"),
    ]  # fmt: skip
    for result in ("finished", "begun"):
        for more, says in cases:
            given = words[:-1] if "~engine.memory" in more else words
            code, _, err = cli(*given, *[w for w in more if w != "~engine.memory"])
            assert code == 2 and "holds a run with other settings" in err and says in err, (result, err)
        (tmp_path / "fixed" / "result.json").unlink(missing_ok=True)
    code, _, err = cli(*words)
    assert code == 0 and "goes on after step 2 of 2" in err, err


@dataclass(kw_only=True)
class Painted(VLLM):
    """An engine of one's own, with a setting that it never reads."""

    colour: str = "red"


def test_settings_of_an_engine_that_nothing_read_are_said(fake, cli, tmp_path) -> None:
    words = ["train", *RL, "algo.steps=1", "engine=vllm", "engine.memory=0.2", "engine.eager=true", "engine.length=100"]
    code, _, err = cli(*words)
    assert code == 0 and "evaluate.bootstrap=50.\n" in err and "engine." not in err, err
    code, _, err = cli(*words, "engine._target_=test_engines.Painted", "+engine.colour=blue")
    assert code == 0 and "evaluate.bootstrap=50, engine.colour=blue.\n" in err, err


def test_a_run_goes_on_with_the_engines_file_that_it_was_begun_with(fake, tmp_path, monkeypatch, cli) -> None:
    file = tmp_path / "own_engine.py"
    text = "from alignkit.engines.vllm import VLLM\n\n\nclass Own(VLLM):\n    pass\n"
    file.write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    words = ["train", *RL, "algo.steps=1", "engine=vllm", "engine._target_=own_engine.Own"]
    assert cli(*words)[0] == 0
    assert "nothing to do" in cli(*words)[1]
    file.write_text(text + "# another\n")
    code, _, err = cli(*words)
    assert code == 2 and "was begun with another engine._target_ (own_engine.Own has changed since)" in err


def test_signatures_of_before_hold() -> None:
    """Of 26fa6cd, when there were no engines: runs made then are found again."""
    assert signature(composed(["+algo=esrl"])) == "c3cf5994"
    assert signature(composed(["+algo=grpo", "model=tiny_causal", "seed=3"])) == "9e4ce7bf"


def test_explain_and_completion_know_it(cli) -> None:
    from alignkit.completion import candidates

    code, out, _ = cli("explain", "engine.memory", "+algo=grpo", "engine=vllm", "engine.memory=0.4")
    assert code == 0 and "0.4" in out and "share of the GPU's memory" in out
    assert "engine=vllm" in candidates(["train", "+algo=grpo", "engine="])
    assert "engine.memory=" in candidates(["train", "+algo=grpo", "engine=vllm", "engine.m"])
    assert candidates(["train", "+algo=grpo", "engine=vllm", "engine.eager="]) == [
        "engine.eager=false",
        "engine.eager=true",
    ]
    code, out, _ = cli("show", "vllm")
    assert code == 0 and "settings (engine.NAME=VALUE)" in out and "truncate" in out


def test_a_dry_run_knows_it(fake, cli) -> None:
    words = [*RL, "engine=vllm"]
    code, out, err = cli("train", "--dry-run", *words)
    assert code == 0, err
    assert "engine" in out and "VLLM" in out and fake.log == []
    code, _, err = cli("train", "--dry-run", "+algo=reinforce", "engine=vllm")
    assert code == 2 and "causal models alone" in err
