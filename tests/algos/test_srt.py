"""SRT, stage 1, and DPO of stage 2, against the method card (srt.md): masks, reductions, ablations, and the chain of runs."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from critical import FIRST, PROMPTS, REFINED, SCORES, critical_policy
from running import SMALL_CAUSAL, SMALL_RUN, lines, tokens, train
from transformers import AutoTokenizer

from alignkit import losses
from alignkit.algos._pref import Pairs
from alignkit.algos.dpo import DPO
from alignkit.algos.srt import SRT
from alignkit.critique import FEEDBACK
from alignkit.errors import UserError
from alignkit.policy import Policy

# E1 of the card: log-probabilities of response, feedback and refinement
A = ([-0.5, -0.7], [-1.2, -0.3], [-0.2, -0.4])
B = ([-1.0], [-0.5], [-0.25, -0.25])


def learned(i: int) -> dict[str, Any]:
    """A row that `srt_collect` writes."""
    y, r = FIRST[i], REFINED[i]
    said = {"weaknesses": f"weak {i}", "suggestions": f"mend {i}", "score": SCORES[y], "raw": ""}
    row = {"instruction": PROMPTS[i], "response": y, "feedback": said, "refinement": r}
    return row | {"score_response": SCORES[y], "score_refinement": SCORES[r], "source": "critic"}


def row(i: int) -> dict[str, Any]:
    """The same, as ``Data`` gives it."""
    return {**learned(i), "prompt": PROMPTS[i], "references": [], "id": i}


FULL = (  # by hand: what the card renders behind the instruction
    "3 1 2\n\n### Feedback\nWeaknesses: weak 0\nSuggestions: mend 0\nOverall Score: [[2]]\n\n### Improved Response\n1 2 3"
)
WITHOUT = {
    "full": FULL,
    "no_score": FULL.replace("\nOverall Score: [[2]]", ""),
    "no_suggestion": FULL.replace("\nSuggestions: mend 0", ""),
    "no_weakness": FULL.replace("Weaknesses: weak 0\n", ""),
    "no_feedback": "3 1 2\n\n### Feedback\n\n### Improved Response\n1 2 3",
    "refinement_only": "1 2 3",
}


def per_token(policy: Policy, prompt: str, text: str) -> list[float]:
    """Log-probability of every token of a text and of the end after a prompt, from one unpadded pass."""
    given = policy.tokenizer(prompt, add_special_tokens=False)["input_ids"]
    ids = [*policy.tokenizer(text, add_special_tokens=False)["input_ids"], policy.eos[0]]
    with torch.no_grad():
        logits = policy.model(torch.tensor([given + ids])).logits[0, len(given) - 1 : -1]
    return logits.log_softmax(-1)[range(len(ids)), ids].tolist()


@pytest.fixture
def small(build_policy: Any) -> Policy:
    return build_policy("causal", max_position_embeddings=256)


def test_reductions_of_the_card() -> None:
    """E1: sums 3.3 and 2.0; the mean of per-sequence means, 0.525, is neither."""
    texts = [[x for part in one for x in part] for one in (A, B)]
    mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    logprobs = torch.zeros(2, 6)
    for i, one in enumerate(texts):
        logprobs[i, : len(one)] = torch.tensor(one)
    for unit, wanted in (("sequences", 2.65), ("tokens", 0.53)):
        loss = losses.nll(logprobs, mask, unit)
        assert float(loss.total) / loss.count == pytest.approx(wanted)
    for kept, wanted in (([0, 1, 4, 5], 1.8), ([4, 5], 0.6)):  # without feedback; the refinement alone
        part = torch.zeros(1, 6, dtype=torch.bool)
        part[0, kept] = True
        assert float(losses.nll(logprobs[:1], part, "sequences").total) == pytest.approx(wanted)


@pytest.mark.parametrize("keep", list(WITHOUT))
def test_what_is_trained_is_the_sequence_and_the_end_behind_its_refinement(small: Policy, keep: str) -> None:
    """Test 1 of the card: no token of the prompt, all others, the markers too; the end once, at the end."""
    rows = SRT(keep=keep).prepare([row(0), row(1)], ("response",))
    batch = small.demonstrations(rows)
    ids = batch.response_ids[0][batch.mask[0]].tolist()
    assert small.tokenizer.decode(ids[:-1]).lstrip(" ") == WITHOUT[keep]  # the tokenizer begins with a space
    assert ids[-1] == small.eos[0] and not set(ids[:-1]) & set(small.eos)
    assert small.tokenizer.decode(batch.prompt_ids[0][batch.prompt_mask[0]]).lstrip(" ") == PROMPTS[0]
    assert rows[0]["prompt"] == PROMPTS[0] and row(0)["response"] == FIRST[0]  # the row itself is left as it is


@pytest.mark.parametrize("keep", list(WITHOUT))
@pytest.mark.parametrize("reduction", ["token_mean", "sequence_sum"])
def test_the_loss_is_the_hand_sum_over_the_kept_tokens(keep: str, reduction: str) -> None:
    """One sequence that the model knows and a longer one that it does not: the mean of means is another number."""
    policy = critical_policy()
    known = {**row(0), "feedback": {**row(0)["feedback"], "weaknesses": "w2.", "suggestions": "s2."}}
    other = {**row(1), "refinement": "rain rain rain rain rain rain rain rain"}
    algo = SRT(keep=keep, reduction=reduction)
    loss = algo.loss(policy, policy.demonstrations(algo.prepare([known, other], ("response",))))
    first = WITHOUT[keep].replace("weak 0", "w2.").replace("mend 0", "s2.")
    second = WITHOUT[keep].replace("weak 0", "weak 1").replace("mend 0", "mend 1").replace("[[2]]", "[[6]]")
    second = second.replace("1 2 3", other["refinement"]).replace("3 1 2", "7 9 8")
    a, b = per_token(policy, PROMPTS[0], first), per_token(policy, PROMPTS[1], second)
    wanted = {
        "token_mean": -(sum(a) + sum(b)) / (len(a) + len(b)),
        "sequence_sum": -(sum(a) + sum(b)) / 2,
    }[reduction]
    found = float(loss.total.detach()) / loss.count
    assert found == pytest.approx(wanted, rel=1e-4)
    means = -(sum(a) / len(a) + sum(b) / len(b)) / 2
    assert abs(found / means - 1) > 0.02


def test_long_sequences_are_cut_and_do_not_end(small: Policy) -> None:
    algo = SRT(max_response_tokens=5)
    batch = small.demonstrations(algo.prepare([row(0)], ("response",)), algo.max_response_tokens)
    assert batch.lengths.tolist() == [5] and not batch.extra["ended"].any()


def test_bad_settings_and_rows_are_refused() -> None:
    with pytest.raises(ValueError, match="max_response_tokens must be at least 1"):
        SRT(max_response_tokens=0)
    for name in ("response", "feedback", "refinement"):
        with pytest.raises(UserError, match=rf"row 0 has no '{name}'.*data\.train=RUN"):
            SRT().prepare([{**row(0), name: None}], ("response",))
    for said in ("good", {"weaknesses": "w", "score": 1}):
        with pytest.raises(UserError, match="row 0: 'feedback' must hold weaknesses, suggestions, score; is"):
            SRT().prepare([{**row(0), "feedback": said}], ("response",))


# ---- stage 2 is DPO ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("beta", "loss", "slope"), [(0.01, 0.6491593, 0.0047752), (0.1, 0.3411539, 0.0289050)]
)  # slope: beta sigmoid(-m), m = .09 and .9
def test_dpo_vectors_of_the_card(beta: float, loss: float, slope: float) -> None:
    """E2: chosen -42 (start model -45), rejected -50 (-44); the loss rises with the rejected one."""
    logprobs = torch.tensor([[-42.0, -50.0]], dtype=torch.float64, requires_grad=True)
    pairs = Pairs(logprobs, torch.tensor([[-45.0, -44.0]], dtype=torch.float64), *tokens([5, 7]))
    found = DPO(beta=beta, terminator="feedback").pair_losses(pairs)
    assert float(found.detach()) == pytest.approx(loss, abs=1e-7)
    assert DPO(beta=beta).margins(pairs).detach().tolist() == pytest.approx([9 * beta])
    found.sum().backward()
    assert logprobs.grad is not None
    assert logprobs.grad.tolist()[0] == pytest.approx([-slope, slope], abs=1e-7)


@pytest.mark.parametrize("terminator", ["eos", "feedback"])
def test_dpo_ends_its_responses_as_it_is_told(small: Policy, terminator: str) -> None:
    """With ``feedback`` behind each response stands the marker, trained like the rest, and no end of sequence."""
    rows = [{**row(i), "chosen": REFINED[i], "rejected": FIRST[i]} for i in (0, 1)]
    algo = DPO(beta=0.01, terminator=terminator)
    batch = small.pairs(rows, None, algo.end)
    texts = [REFINED[0], FIRST[0], REFINED[1], FIRST[1]]
    for i, text in enumerate(texts):
        ids = batch.response_ids[i][batch.mask[i]].tolist()
        if terminator == "feedback":
            assert small.tokenizer.decode(ids).lstrip(" ") == f"{text}\n\n{FEEDBACK}" and not set(ids) & set(small.eos)
            assert tuple(ids[-len(small.tokens_of(FEEDBACK)) :]) == small.tokens_of(FEEDBACK)
        else:
            assert small.tokenizer.decode(ids[:-1]).lstrip(" ") == text and ids[-1] == small.eos[0]
    sums = [per_token(small, PROMPTS[i // 2], text + (algo.end or "")) for i, text in enumerate(texts)]
    totals = [sum(one[:-1]) if terminator == "feedback" else sum(one) for one in sums]
    start = torch.tensor([-30.0, -30.0, -40.0, -35.0])
    batch = batch.with_(extra={**batch.extra, "ref_logprob": start})
    margins = [0.01 * ((totals[j] - float(start[j])) - (totals[j + 1] - float(start[j + 1]))) for j in (0, 2)]
    loss = algo.loss(small, batch)
    wanted = sum(math.log1p(math.exp(-m)) for m in margins)
    assert float(loss.total.detach()) == pytest.approx(wanted, rel=1e-5) and loss.count == 2


def test_from_critic_to_dpo_on_the_command_line(tmp_path: Path) -> None:
    """Rows of stage 1 train SRT; pairs as `srt_self` writes them train DPO, whose first loss is ln 2 (test 6 of the card)."""
    stage_1, stage_2 = tmp_path / "stage_1.jsonl", tmp_path / "stage_2.jsonl"
    stage_1.write_text("".join(json.dumps({**learned(i), "prompt": PROMPTS[i]}) + "\n" for i in range(4)))
    pairs = [{"prompt": PROMPTS[i], "chosen": REFINED[i], "rejected": FIRST[i]} for i in (0, 1, 3)]
    stage_2.write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    small = [*SMALL_CAUSAL, *SMALL_RUN, "algo.batch_size=2", "algo.warmup=0", "evaluate.every=0", "evaluate.test=false"]
    result, run = train(
        tmp_path,
        "+algo=srt",
        "data=critiques",
        f"data.train={stage_1}",
        *small,
        "algo.epochs=1",
        "evaluate.protocol=first",
    )
    assert result["steps"] == 2
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    texts = [
        FULL.replace("3 1 2", FIRST[i]).replace("1 2 3", REFINED[i]).replace(" 0\n", f" {i}\n").replace("[[2]]", f"[[{SCORES[FIRST[i]]}]]")
        for i in range(4)
    ]  # fmt: skip
    assert result["tokens"]["trained"] == sum(
        len(tokenizer(text, add_special_tokens=False)["input_ids"]) + 1 for text in texts
    )
    result, run = train(
        tmp_path, "+algo=dpo", "data=pairs", f"data.train={stage_2}", f"model.path={run}", *SMALL_RUN, "algo.warmup=0",
        "evaluate.every=0", "evaluate.test=false", "algo.beta=0.01", "algo.terminator=feedback", "algo.steps=2",
        "algo.batch_size=3", "algo.lr=0.01",
    )  # fmt: skip
    first, second = lines(run / "metrics.jsonl")
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6) and first["margin"] == pytest.approx(0, abs=1e-6)
    assert second["loss"] < math.log(2) and second["margin"] > 0


def test_rows_without_feedback_are_refused_before_a_model_is_built(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"instruction": "a", "prompt": "a", "response": "b"}) + "\n")
    with pytest.raises(UserError, match=r"training row 0 has no 'feedback', which srt learns.*data.train=RUN"):
        train(tmp_path, "+algo=srt", "data=critiques", f"data.train={file}", "model=hf", "model.path=/no/such/model")
