"""KTO against the method card (baselines.md, "Offline preference losses"), against sums written out row by row, and what it
says of its data."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, WORDS
from running import SMALL_CAUSAL, SMALL_RUN, lines, tokens, train
from safetensors.torch import load_file

from alignkit.algos._pref import Pairs
from alignkit.algos.kto import KTO
from alignkit.errors import UserError

PAIR, SINGLE = ("chosen", "rejected"), ("response",)


def singles(log_ratios: list[float], desirable: list[bool], z: float) -> Pairs:
    """Single responses with these log pi/ref."""
    column = torch.tensor(log_ratios, dtype=torch.float64)[:, None]
    ids, mask = tokens(*[[3]] * len(log_ratios))
    extra = {"desirable": torch.tensor(desirable)[:, None], "reference_point": torch.full_like(column, z)}
    return Pairs(column, torch.zeros_like(column), ids, mask, extra=extra)


def test_card_vectors() -> None:
    """z .5, beta .1: 1 - sigmoid(.05) of a desirable response with h = 1; 1 - sigmoid(.15) of an undesirable one with -1."""
    found = KTO().pair_losses(singles([1, -1], [True, False], 0.5))
    assert found.tolist() == pytest.approx([0.487503, 0.462570], abs=1e-6)
    weighted = KTO(desirable_weight=2.0, undesirable_weight=3.0).pair_losses(singles([1, -1], [True, False], 0.5))
    assert weighted.tolist() == pytest.approx([2 * 0.487503, 3 * 0.462570], abs=1e-5)


def test_a_pair_costs_the_mean_of_its_responses() -> None:
    ids, mask = tokens([3, 3])
    logprobs = torch.tensor([[-9.0, -15.0]], dtype=torch.float64)
    ref = torch.tensor([[-10.0, -14.0]], dtype=torch.float64)
    pairs = Pairs(logprobs, ref, ids, mask, extra={"reference_point": torch.full((1, 2), 0.5)})
    algo = KTO(desirable_weight=2.0)
    assert algo.pair_losses(pairs).tolist() == pytest.approx([(2 * 0.487503 + 0.462570) / 2], abs=1e-6)
    assert algo.margins(pairs).tolist() == pytest.approx([0.1 * 2])


def test_a_single_response_is_ranked_right_where_it_moved_the_right_way() -> None:
    found = KTO().margins(singles([1, -1, 1, -1], [True, True, False, False], 0.5))
    assert found.tolist() == pytest.approx([0.1, -0.1, -0.1, 0.1])


def test_far_from_the_reference_point_loss_and_gradient_are_finite() -> None:
    pairs = singles([1e4, -1e4, 1e4, -1e4], [True, True, False, False], 0.0)
    pairs.logprobs.requires_grad_()
    loss = KTO().pair_losses(pairs)
    loss.sum().backward()
    assert loss.tolist() == pytest.approx([0, 1, 1, 0])
    assert torch.isfinite(pairs.logprobs.grad).all()


@pytest.mark.parametrize("name", ["beta", "desirable_weight", "undesirable_weight"])
def test_ranges(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        KTO(**{name: 0.0})


# ---- the reference point ---------------------------------------------------------------------------------------------


def rows_of(prompts: str) -> list[dict[str, Any]]:
    return [{"prompt": p, "id": i, "response": f"y{i}", "desirable": i % 2 == 0} for i, p in enumerate(prompts)]


@pytest.mark.parametrize(
    ("prompts", "wanted"), [("abc", [1, 2, 0]), ("aabb", [2, 2, 0, 0]), ("abaa", [1, 2, 1, 1]), ("baab", [1, 3, 3, 1])]
)
def test_the_mismatched_response_is_of_the_next_row_with_another_prompt(prompts: str, wanted: list[int]) -> None:
    """Around the end to the first row; a property of the data set."""
    found = KTO().prepare(rows_of(prompts), SINGLE)
    assert [row["mismatched"] for row in found] == [[f"y{j}"] for j in wanted]


def test_a_pair_is_mismatched_side_by_side() -> None:
    rows = [{"prompt": p, "chosen": f"{p}+", "rejected": f"{p}-"} for p in "ab"]
    assert [row["mismatched"] for row in KTO().prepare(rows, PAIR)] == [["b+", "b-"], ["a+", "a-"]]
    assert "mismatched" not in rows[0]


def test_one_prompt_alone_has_no_mismatch() -> None:
    with pytest.raises(UserError, match=r"data\.train: every row has the same prompt"):
        KTO().prepare(rows_of("aaa"), SINGLE)


@pytest.mark.parametrize(
    ("good", "bad", "weights", "warned"),
    [(3, 3, {}, False), (4, 3, {}, False), (5, 3, {}, True), (3, 4, {}, True), (3, 4, {"desirable_weight": 1.5}, False),
     (4, 2, {"undesirable_weight": 2.0}, False), (3, 0, {}, True)],
)  # fmt: skip
def test_unbalanced_weights_are_warned_of(
    good: int, bad: int, weights: dict[str, float], warned: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": str(i), "response": "y", "desirable": i < good} for i in range(good + bad)]
    KTO(**weights).prepare(rows, SINGLE)
    said = capsys.readouterr().err
    assert (f"{good} desirable and {bad} undesirable" in said) == warned


# ---- written out -----------------------------------------------------------------------------------------------------


def sequence_logprob(policy, prompt: str, response: str) -> torch.Tensor:
    """log p of one response, from the model's own logits: no batch, no padding, no shared prompt."""
    asked = torch.tensor(policy.encode_prompts([{"prompt": prompt, "id": 0}]))
    ids = torch.tensor(policy.encode_responses([response]))
    if policy.is_encoder_decoder:
        first = torch.full((1, 1), policy.model.config.decoder_start_token_id)
        logits = policy.model(input_ids=asked, decoder_input_ids=torch.cat([first, ids[:, :-1]], 1)).logits
    else:
        logits = policy.model(input_ids=torch.cat([asked, ids], 1)).logits[:, asked.shape[1] - 1 : -1]
    return logits.log_softmax(-1).gather(-1, ids[..., None]).sum()


def gradient(policy) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for p in policy.model.parameters() if p.grad is not None])


def moved_off(policy, towards: float):
    """A start model from which the policy differs by noise."""
    start = copy.copy(policy)
    start.model = copy.deepcopy(policy.model)
    torch.manual_seed(1)
    with torch.no_grad():
        for p in start.model.parameters():
            p += towards * torch.randn_like(p)
    return start


@pytest.mark.parametrize("sides", [PAIR, SINGLE], ids=["pairs", "singles"])
def test_loss_and_gradient_are_those_of_the_formula(policy, sides: tuple[str, ...]) -> None:
    """Row by row in float64, z before the rest and without a graph; the method in parts of one prompt."""
    policy.model.double()
    policy.compute = torch.float64
    start = moved_off(policy, 0.03)
    rows = [
        {"id": i, "prompt": w, "chosen": ANSWERS[i], "response": ANSWERS[i], "rejected": ANSWERS[(i + 2) % 6],
         "desirable": i % 3 != 0, "references": []}
        for i, w in enumerate(WORDS)
    ]  # fmt: skip
    algo = KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5)
    rows = algo.prepare(rows, sides)

    def log_ratio(prompt: str, response: str) -> torch.Tensor:
        with torch.no_grad():
            ref = sequence_logprob(start, prompt, response)
        return sequence_logprob(policy, prompt, response) - ref

    with torch.no_grad():
        following = [(row["prompt"], rows[(i + 1) % 6][side]) for i, row in enumerate(rows) for side in sides]
        z = max(0.0, float(sum(log_ratio(*each) for each in following)) / len(following))
    assert z > 0.05, "a reference point that matters"
    terms = []
    for row in rows:
        for side in sides:
            h = log_ratio(row["prompt"], row[side])
            good = side == "chosen" or (side == "response" and row["desirable"])
            terms.append(1.5 * (1 - (0.3 * (h - z)).sigmoid()) if good else 0.5 * (1 - (0.3 * (z - h)).sigmoid()))
    wanted = sum(terms) / len(terms)
    policy.model.zero_grad()
    wanted.backward()
    wanted_gradient = gradient(policy)

    batch = policy.pairs(rows) if sides == PAIR else policy.judged(rows)
    with torch.no_grad():
        batch.extra["ref_logprob"] = (start.forward(batch) * batch.mask).sum(1)
        batch.extra |= {q.name: q.answer(start, batch) for q in algo.questions()}
        parts = algo.whole(policy, batch, torch.Generator()).split(1)
    assert len(parts) == 6
    policy.model.zero_grad()
    found = [algo.loss(policy, part) for part in parts]
    count = sum(one.count for one in found)
    for one in found:
        (one.total / count).backward()
    assert sum(float(one.total.detach()) for one in found) / count == pytest.approx(float(wanted.detach()), abs=1e-5)
    scale = float(wanted_gradient.abs().max())  # log-probabilities are float32 whatever the model is
    torch.testing.assert_close(gradient(policy) / scale, wanted_gradient / scale, atol=1e-5, rtol=0)
    assert found[0].metrics["reference_point"] == pytest.approx(z, abs=1e-5)
    assert ("chosen_logprob" in found[0].metrics) == (sides == PAIR)


# ---- single responses through the stage ------------------------------------------------------------------------------

QUICK = [*SMALL_CAUSAL, *SMALL_RUN, "algo.batch_size=4", "algo.steps=6", "algo.warmup=0", "algo.lr=0.01"]


def own(tmp_path: Path, *rows: dict[str, Any]) -> list[str]:
    file = tmp_path / "judged.jsonl"
    file.write_text("".join(json.dumps({"response": "good day", "label": True, **row}) + "\n" for row in rows))
    return [*QUICK, "data=custom", f"data.train={file}", f"data.dev={file}", "data.desirable=label"]


ROWS = [{"prompt": f"p{i}", "response": ["good day", "what"][i % 2], "label": i % 2 == 0} for i in range(8)]


def test_single_responses_are_learned(tmp_path: Path) -> None:
    words = [*own(tmp_path, *ROWS), "evaluate.every=3"]
    result, run = train(tmp_path / "runs", "+algo=kto", *words)
    metrics = lines(run / "metrics.jsonl")
    steps = [m for m in metrics if "loss" in m]
    assert steps[0]["loss"] == pytest.approx(0.5, abs=1e-4)  # every log-ratio and z are 0
    assert steps[-1]["loss"] < 0.49
    assert [m["dev/preference_accuracy"] for m in metrics if "dev/preference_accuracy" in m][-1] > 60
    assert "dev/bleu" not in metrics[-1], "a response that may be a bad one is no reference"
    files = [load_file(p) for p in (tmp_path / "runs" / "reference").iterdir()]
    assert sorted((name, tuple(x.shape)) for file in files for name, x in file.items()) == [
        ("mismatched_ref_logprob", (8, 1)), ("ref_logprob", (8, 1)), ("ref_logprob", (8, 1)),
    ]  # fmt: skip
    again, _ = train(tmp_path / "runs", "+algo=kto", *words, "run.overwrite=true")
    assert again["weights_sha256"] == result["weights_sha256"]


def test_methods_of_pairs_refuse_single_responses(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"DPO learns from pairs, not .* data\.desirable .*\+algo=kto"):
        train(tmp_path / "runs", "+algo=dpo", *own(tmp_path, *ROWS))


def test_pairs_share_their_references_with_other_methods(tmp_path: Path) -> None:
    words = [*QUICK, "evaluate.every=0", "evaluate.test=false", "algo.steps=1"]
    train(tmp_path, "+algo=dpo", *words)
    before = set((tmp_path / "reference").iterdir())
    train(tmp_path, "+algo=kto", *words)
    (new,) = set((tmp_path / "reference").iterdir()) - before
    assert load_file(new).keys() == {"mismatched_ref_logprob"}
