"""Inverse value learning: the loss by hand, what is trained and what is not, and resume."""

from __future__ import annotations

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RUN, SMALL_SEQ2SEQ, SMALL_SFT, lines, train
from transformers import AutoModelForCausalLM, AutoTokenizer

from alignkit.algos.inverse_value import InverseValue, size
from alignkit.batch import Batch
from alignkit.config import Model, Steer
from alignkit.data import Data
from alignkit.errors import Stopped, UserError
from alignkit.policy import load
from alignkit.run import Run, hash_weights
from alignkit.steering import Reading, Steered, Trained

SMALL_VALUE = ["+algo=inverse_value", "data=rnnlg", *SMALL_RUN, "algo.batch_size=8", "algo.steps=6", "algo.warmup=2"]


@pytest.fixture
def base(build_policy, tmp_path) -> Path:
    build_policy("causal", max_position_embeddings=512).save(tmp_path / "base")
    return tmp_path / "base"


@pytest.fixture
def steered(build_policy):
    def make(kind: str = "causal", connection: str = "residual") -> Steered:
        return Steered(build_policy(kind), build_policy(kind, seed=1), Trained(connection=connection))

    return make


# ---- the loss --------------------------------------------------------------------------------------------------------


def fixed(base: list, value: list, labels: list[int], everywhere: list | None = None):
    """(policy, batch): one row whose logits before each response token are given."""
    n = len(labels)

    class Fixed(Steered):
        def __init__(self) -> None:
            self.scale, self.map = 1.0, None

        def read(self, batch: Batch, everywhere: bool = False) -> Reading:
            return Reading(
                torch.arange(n), torch.tensor(base), torch.tensor(value), None, every if everywhere else None
            )

    every = None if everywhere is None else torch.tensor(everywhere)
    ones = torch.ones(1, n, dtype=torch.bool)
    batch = Batch(
        torch.zeros(1, 2).long(),
        torch.ones(1, 2).bool(),
        torch.tensor([labels]),
        ones,
        torch.zeros(1).long(),
        [{}],
        [""],
    )
    return Fixed(), batch


def test_e1_of_the_card() -> None:
    """CE of label 1 under softmax(1, 1.5, 1), and the mean of |v| over three tokens, then over two positions."""
    policy, batch = fixed([[2.0, 1.0, 0.0]], [[-1.0, 0.5, 1.0]], [1])
    loss = InverseValue(base="b").loss(policy, batch)
    assert (float(loss.total), loss.count) == (pytest.approx(0.794377, abs=1e-6), 1.0)
    loss = InverseValue(base="b", norm="l1").loss(policy, batch)
    assert loss.metrics["value_norm"] == pytest.approx(0.833333, abs=1e-6)
    assert float(loss.total) == pytest.approx(1.627710, abs=1e-6)
    loss = InverseValue(base="b", norm="l1", norm_coef=0.3).loss(policy, batch)
    assert float(loss.total) == pytest.approx(0.794377 + 0.25, abs=1e-6)
    loss = InverseValue(base="b", norm="l2").loss(policy, batch)
    assert loss.metrics["value_norm"] == pytest.approx((1 + 0.25 + 1) / 3)
    two, batch = fixed([[2.0, 1.0, 0.0]] * 2, [[-1.0, 0.5, 1.0], [0.3, 0.0, -0.6]], [1, 1])
    loss = InverseValue(base="b", norm="l1").loss(two, batch)
    assert loss.metrics["value_norm"] == pytest.approx(0.566667, abs=1e-6)
    assert loss.count == 2.0


def test_over_all_positions_the_mean_counts_each_once() -> None:
    """Two prompt tokens and one of the response: sizes 1, 2 and 6, mean 3; divided by the one token of the loss."""
    policy, batch = fixed([[0.0, 0.0]], [[2.0, -2.0]], [0], [[1.0, -1.0], [2.0, 2.0], [6.0, -6.0]])
    algo = InverseValue(base="b", norm="l1", norm_over="all")
    batch = algo.whole(policy, batch, torch.Generator())
    loss = algo.loss(policy, batch)
    assert loss.metrics["value_norm"] == pytest.approx(3.0)
    assert float(loss.total) == pytest.approx(-torch.tensor([2.0, -2.0]).log_softmax(0)[0] + 3.0)


def test_sizes() -> None:
    v = torch.tensor([[3.0, -4.0, 0.0, 1.0]])
    assert size(v, "l1").tolist() == [2.0]
    assert size(v, "l2").tolist() == [6.5]


@pytest.mark.parametrize("connection", ["residual", "cascade", "cascade_plus"])
@pytest.mark.parametrize(("norm", "over"), [("none", "labels"), ("l1", "labels"), ("l1", "all"), ("l2", "all")])
def test_micro_batches_do_not_change_the_gradient(norm, over, connection, steered, rows) -> None:
    policy = steered("causal", connection)
    for one in (policy, policy.base):
        one.model.double()
        one.compute = torch.float64
    algo = InverseValue(base="b", connection=connection, norm=norm, norm_over=over)
    batch = algo.whole(policy, policy.demonstrations(rows(6)), torch.Generator())

    def gradient(parts: list[Batch]) -> tuple[torch.Tensor, float]:
        policy.model.zero_grad()
        found = [algo.loss(policy, part) for part in parts]
        for loss in found:
            loss.total.backward()
        count = sum(loss.count for loss in found)
        norm = sum(loss.metrics.get("value_norm", 0.0) * loss.count for loss in found) / count
        return torch.cat([p.grad.flatten() for p in policy.model.parameters()]) / count, norm

    (whole, norm_of_whole), parts = gradient([batch]), batch.split(20)
    assert len(parts) > 2
    cut, norm_of_parts = gradient(parts)
    assert float((cut - whole).norm()) <= 1e-6 * float(whole.norm())
    assert norm_of_parts == pytest.approx(norm_of_whole)


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_the_loss_is_that_of_the_sum(kind, steered, rows) -> None:
    """Against the log-probabilities under z; with the value model taken off it is the base's own."""
    policy = steered(kind)
    batch = policy.demonstrations(rows(5))
    loss = InverseValue(base="b").loss(policy, batch)
    assert loss.count == float(batch.mask.sum())
    torch.testing.assert_close(loss.total, -policy.forward(batch).sum())
    policy.scale = 0.0
    torch.testing.assert_close(InverseValue(base="b").loss(policy, batch).total, -policy.base.forward(batch).sum())


# ---- building --------------------------------------------------------------------------------------------------------


def test_from_scratch_it_takes_the_tokenizer_of_the_base(base) -> None:
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "intermediate_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
    }
    policy = InverseValue(base=str(base)).build(Model(config=config, device="cpu"), 0, ["unread"], None)
    assert policy.value.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    assert policy.model.config.vocab_size == len(policy.tokenizer)
    assert policy.model.config.hidden_size == 8


def test_a_head_of_zeros_adds_nothing_and_learns(base, rows, tmp_path) -> None:
    """Of a model whose head was its embeddings; saved and read back it has a head of its own."""
    algo = InverseValue(base=str(base), zero_init_head=True)
    cfg = Model(path=str(base), device="cpu")
    policy = algo.build(cfg, 0, [], None)
    batch = policy.demonstrations(rows(4))
    assert torch.equal(policy.forward(batch), policy.base.forward(batch))
    assert bool((policy.model.get_input_embeddings().weight != 0).any())
    optimizer = torch.optim.SGD(policy.model.parameters(), lr=0.5)
    for _ in range(2):
        optimizer.zero_grad()
        loss = algo.loss(policy, batch)
        (loss.total / loss.count).backward()
        optimizer.step()
    policy.save(tmp_path / "saved")
    again = algo.build(cfg, 0, [], tmp_path / "saved")
    assert torch.equal(again.forward(batch), policy.forward(batch))
    assert not torch.equal(again.forward(batch), policy.base.forward(batch))
    policy.restore(tmp_path / "saved")
    assert torch.equal(again.forward(batch), policy.forward(batch))


def test_what_does_not_fit_is_refused(base, build_policy, tmp_path) -> None:
    with pytest.raises(UserError, match=r"^algo\.base=.*nowhere: no such"):
        InverseValue(base=str(tmp_path / "nowhere")).build(Model(path=str(base), device="cpu"), 0, [], None)
    with pytest.raises(UserError, match=r"algo\.base=bundled:lists and model\.path=.* have different vocabularies"):
        InverseValue(base="bundled:lists").build(Model(path=str(base), device="cpu"), 0, [], None)
    build_policy("seq2seq").save(tmp_path / "seq2seq")
    cfg = Model(path=str(tmp_path / "seq2seq"), device="cpu")
    with pytest.raises(UserError, match=r"algo\.norm_over=all"):
        InverseValue(base=cfg.path, norm="l1", norm_over="all").build(cfg, 0, [], None)
    with pytest.raises(UserError, match="connection=cascade needs causal models"):
        InverseValue(base=cfg.path, connection="cascade").build(cfg, 0, [], None)
    cfg = Model(path=str(base), device="cpu")
    cfg.lora.r = 2
    with pytest.raises(UserError, match=r"algo\.zero_init_head.*model\.lora\.r=0"):
        InverseValue(base=str(base), zero_init_head=True).build(cfg, 0, [], None)
    with pytest.raises(ValueError, match="norm_coef must be at least 0"):
        InverseValue(base="b", norm_coef=-1.0)


# ---- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SMALL_CAUSAL, SMALL_SEQ2SEQ], ids=["causal", "seq2seq"])
def test_the_value_model_alone_is_trained_and_saved(tmp_path, model, capsys) -> None:
    _, frozen = train(tmp_path, *SMALL_SFT, *model)
    before = hash_weights(frozen / "final")
    held_out = ["evaluate.nll=true", "evaluate.every=3", "evaluate.select=length_ratio"]
    result, run = train(
        tmp_path, *SMALL_VALUE, *model, f"algo.base={frozen}", "algo.norm=l1", "algo.lr=1e-2", *held_out
    )
    assert hash_weights(frozen / "final") == before
    metrics = lines(run / "metrics.jsonl")
    assert metrics[-1]["loss"] == pytest.approx(metrics[-1]["nll"] + metrics[-1]["value_norm"])
    assert metrics[-1]["loss"] < metrics[0]["loss"]
    assert metrics[-1]["dev/nll"] < metrics[2]["dev/nll"], "held-out rows are measured under z"
    assert set(result["evaluation"]["after"]["test"]) >= {"nll", "bleu"}
    final = json.loads((run / "final" / "value.json").read_text())
    assert final == {
        "connection": "residual",
        "norm": "l1",
        "norm_coef": 1.0,
        "norm_over": "labels",
        "base": str(frozen),
    }
    for path, words, warned in ((run, [], True), (frozen, [], False), (run, [f"model.steer.value={run}"], False)):
        capsys.readouterr()
        train(tmp_path, "+algo=evaluate", "data=rnnlg", *SMALL_RUN, f"model.path={path}", *words)
        assert ("is a value model" in capsys.readouterr().err) == warned
    if model is SMALL_CAUSAL:
        value = AutoModelForCausalLM.from_pretrained(run / "final")  # a plain folder
        assert value.config.vocab_size == len(AutoTokenizer.from_pretrained(run / "final"))


def test_an_adapter_as_value_model(tmp_path, base) -> None:
    """Trained on the very model that it stands beside; final/ is whole, and steers."""
    words = [
        "model=tiny_causal",
        f"model.path={base}",
        "model.lora.r=2",
        f"algo.base={base}",
        "algo.lr=1e-2",
        "run.save_every=2",
    ]
    result, run = train(tmp_path, *SMALL_VALUE, *words, "evaluate.nll=true", "evaluate.final=last")
    cfg = Model(path=str(base), device="cpu", steer=Steer(value=str(run)))
    policy = load(cfg, 0)
    rows = Data(test="bundled:rnnlg.test.jsonl", prompt="{da}", response="{ref}", references="refs").rows("test")[:12]
    found = policy.nll(rows)
    nats = sum(nats for nats, _ in found) / sum(tokens for _, tokens in found)
    assert nats == pytest.approx(result["evaluation"]["after"]["test"]["nll"]["value"], rel=1e-4)


@pytest.mark.parametrize(
    "words",
    [[], ["algo.connection=cascade_plus", "algo.norm=l1", "algo.norm_over=all"], ["algo.zero_init_head=true", "algo.norm=l2"]],
    ids=["residual", "cascade_plus", "zero head"],
)  # fmt: skip
def test_a_stopped_run_ends_where_an_unbroken_one_does(tmp_path, monkeypatch, base, words) -> None:
    words = [*SMALL_VALUE, *SMALL_CAUSAL, f"algo.base={base}", *words, "run.save_every=2", "evaluate.final=last"]
    whole, _ = train(tmp_path / "whole", *words)
    end_step = Run.end_step

    def stop_after_three(self: Run, done: int, *rest: object) -> None:
        self.stop_asked = done == 3
        end_step(self, done, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", stop_after_three)
        with pytest.raises(Stopped, match="after step 3"):
            train(tmp_path / "broken", *words)
    broken, _ = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert broken["evaluation"] == whole["evaluation"]


def test_a_killed_run_ends_where_an_unbroken_one_does(tmp_path, base) -> None:
    words = [*SMALL_VALUE, *SMALL_CAUSAL, f"algo.base={base}", "algo.steps=40", "run.save_every=3", "evaluate.every=10"]
    words += ["evaluate.final=last", "data.limit=200"]
    whole, _ = train(tmp_path / "whole", *words)
    root = tmp_path / "killed"
    process = subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words, f"run.root={root}"],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    target, deadline = random.Random(os.getpid()).randint(4, 15), time.monotonic() + 120

    def done() -> int:
        return max((path.read_bytes().count(b"\n") for path in root.glob("*/metrics.jsonl")), default=0)

    while process.poll() is None and done() < target and time.monotonic() < deadline:
        time.sleep(0.005)
    assert process.poll() is None, "the run ended before it could be killed: give it more steps"
    process.send_signal(signal.SIGKILL)
    process.wait()
    broken, _ = train(root, *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]


def test_a_base_that_has_changed_is_not_gone_on_with(tmp_path, monkeypatch, base, build_policy) -> None:
    words = [*SMALL_VALUE, *SMALL_CAUSAL, f"algo.base={base}"]
    end_step = Run.end_step

    def stop(self: Run, done: int, *rest: object) -> None:
        self.stop_asked = done == 2
        end_step(self, done, *rest)  # type: ignore[arg-type]

    with monkeypatch.context() as m:
        m.setattr(Run, "end_step", stop)
        with pytest.raises(Stopped):
            train(tmp_path / "runs", *words)
    build_policy("causal", seed=5, max_position_embeddings=512).save(base)
    with pytest.raises(UserError, match=r"another algo\.base.*run\.overwrite=true"):
        train(tmp_path / "runs", *words)
