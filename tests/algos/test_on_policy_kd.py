"""On-policy distillation: the divergence by hand, and whose responses are learned from."""

from __future__ import annotations

import copy
import math
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RUN, SMALL_SEQ2SEQ, composed, train

from alignkit import losses
from alignkit.algos.on_policy_kd import OnPolicyKD
from alignkit.config import check
from alignkit.errors import UserError
from alignkit.policy import Policy


class Record:
    """What a method asks of the run: phases and counts."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()

    def phase(self, name: str) -> Any:
        self.counts[name] += 1
        return nullcontext()

    def count(self, name: str, amount: float) -> None:
        self.counts[name] += int(amount)


def logits(*probabilities: float) -> torch.Tensor:
    return torch.tensor([[math.log(p) for p in probabilities]])


@pytest.mark.parametrize(
    ("beta", "wanted"),
    [
        (0.0, 0.192745),  # KL(T | S) = 0.8 ln 1.6 + 0.2 ln 0.4
        (1.0, 0.223144),  # KL(S | T) = 0.5 ln 0.625 + 0.5 ln 2.5
        # m = (0.65, 0.35): 0.5 (0.8 ln 0.8/0.65 + 0.2 ln 0.2/0.35) + 0.5 (0.5 ln 0.5/0.65 + 0.5 ln 0.5/0.35)
        (0.5, 0.050673),
    ],
)
def test_divergence_by_hand(beta: float, wanted: float) -> None:
    found = losses.jensen_shannon(logits(0.5, 0.5), logits(0.8, 0.2), beta)
    assert float(found) == pytest.approx(wanted, abs=2e-6)


def test_divergence_tends_to_both_kl() -> None:
    student, teacher = torch.randn(2, 5, 7, generator=torch.Generator().manual_seed(0)).double()
    forward, backward = (losses.jensen_shannon(student, teacher, b) for b in (0.0, 1.0))
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, 1e-4) / 1e-4, forward, rtol=1e-2, atol=1e-4)
    torch.testing.assert_close(losses.jensen_shannon(student, teacher, 1 - 1e-4) / 1e-4, backward, rtol=1e-2, atol=1e-4)
    assert float((forward - backward).abs().min()) > 1e-3
    assert float(losses.jensen_shannon(student, student, 0.3).abs().max()) < 1e-6


def method(student: Policy, teacher: Policy, **settings: Any) -> OnPolicyKD:
    algo = OnPolicyKD(teacher="given", max_new_tokens=6, **settings)
    algo._run = Record()  # type: ignore[assignment]
    algo._match(student, teacher, 0)
    return algo


def test_the_student_writes_in_a_share_of_the_steps(policy: Policy, rows: Any) -> None:
    algo = method(policy, policy, share=0.25)
    batch = algo.collate(policy)(rows(3))
    own = 0
    for seed in range(200):
        found = algo.whole(policy, batch, torch.Generator().manual_seed(seed))
        again = algo.whole(policy, batch, torch.Generator().manual_seed(seed))
        assert torch.equal(found.response_ids, again.response_ids)
        own += found is not batch
    assert 30 <= own <= 70  # 50 expected, deviation 6
    assert algo._run.counts["sample"] == algo._run.counts["samples"] / 3 == 2 * own  # type: ignore[attr-defined]
    assert all(method(policy, policy, share=0.0).whole(policy, batch, torch.Generator()) is batch for _ in range(5))


def test_rows_need_no_response_where_the_student_writes_all(policy: Policy, rows: Any) -> None:
    bare = rows(3, response=None)
    found = method(policy, policy).collate(policy)(bare)
    assert len(found) == 3
    with pytest.raises(UserError, match="has no response"):
        method(policy, policy, share=0.5).collate(policy)(bare)


def test_the_gradient_is_the_divergences_and_reaches_the_student_alone(policy: Policy, rows: Any) -> None:
    """Against the divergence written out from both models' own log-probabilities of every token; none through sampling."""
    teacher = Policy(copy.deepcopy(policy.model), policy.tokenizer)
    for p in teacher.model.parameters():
        p.data.mul_(0.7)
    algo = method(policy, teacher, beta=0.0)
    batch = algo.whole(policy, algo.collate(policy)(rows(3)), torch.Generator().manual_seed(0))
    loss = algo.loss(policy, batch)
    wanted = 0.0
    for i in range(3):
        one = batch.take(torch.tensor([i]))
        said = [reader.seen(one).logits.detach().log_softmax(-1) for reader in (teacher, policy)]
        wanted += float((said[0].exp() * (said[0] - said[1])).sum())
    assert float(loss.total.detach()) == pytest.approx(wanted, rel=1e-4)
    assert loss.count == int(batch.mask.sum())
    loss.total.backward()
    assert all(p.grad is None for p in teacher.model.parameters())
    assert max(float(p.grad.abs().max()) for p in policy.model.parameters() if p.grad is not None) > 0


def test_a_student_comes_nearer_to_its_teacher(policy: Policy, build_policy: Any, rows: Any) -> None:
    kind = "seq2seq" if policy.is_encoder_decoder else "causal"
    algo = method(policy, build_policy(kind, seed=3), sampling_temperature=1.0)
    optimizer = torch.optim.AdamW(policy.model.parameters(), lr=5e-3)
    batch, seen = algo.collate(policy)(rows(6)), []
    for step in range(40):
        loss = algo.loss(policy, algo.whole(policy, batch, torch.Generator().manual_seed(step)))
        seen.append(loss.metrics["divergence"])
        (loss.total / loss.count).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert sum(seen[-5:]) < 0.8 * sum(seen[:5])


@pytest.mark.parametrize("small", [SMALL_SEQ2SEQ, SMALL_CAUSAL], ids=["seq2seq", "causal"])
def test_a_run_counts_what_it_sampled(tmp_path: Path, small: list[str]) -> None:
    words = ["data=rnnlg", *SMALL_RUN, "evaluate.every=0"]
    teacher = tmp_path / "teacher"
    train(tmp_path, "+algo=sft", *small, *words, "algo.steps=2", f"run.dir={teacher}")
    result, _ = train(
        tmp_path, "+algo=on_policy_kd", f"model.path={teacher}", f"algo.teacher={teacher}", *words, "algo.steps=3",
        "algo.batch_size=5", "algo.max_new_tokens=8", "algo.warmup=0",
    )  # fmt: skip
    assert result["samples"] == 15
    assert result["tokens"]["sampled"] == result["tokens"]["trained"] > 15
    assert result["seconds"]["sample"] > 0


def test_mistakes() -> None:
    with pytest.raises(ValueError, match="a classifier writes nothing"):
        OnPolicyKD(task="classify")
    with pytest.raises(ValueError, match="nothing to keep"):
        OnPolicyKD(cache_gb=1.0)
    with pytest.raises(UserError, match=r"evaluate\.select: with algo\.task=write"):
        check(composed(["+algo=on_policy_kd", "algo.teacher=x", "evaluate.select=accuracy"]))
