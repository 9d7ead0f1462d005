"""T-REG against the worked example of the method card (t_reg.md), and what it asks of the start model."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ANSWERS, WORDS
from running import SMALL_CAUSAL, SMALL_RUN, tokens, train

from alignkit.algos._pref import Pairs
from alignkit.algos.dpo import DPO
from alignkit.algos.t_reg import TREG, request

WINNER, LOSER = [-0.9, -1.8, -0.4], [-1.2, -0.7]
RHAT_W, RHAT_L = [0.231059, -0.231059, 0.0], [-0.2, 0.1]
SHORT = {"better": "{prompt} {response} +", "worse": "{prompt} {response} -"}


def card() -> Pairs:
    """Winner over reference +.2, loser 0; the columns behind the loser's end hold what must not count."""
    logprobs = torch.tensor([[WINNER, [*LOSER, 0.0]]], dtype=torch.float64, requires_grad=True)
    rewards = torch.tensor([[[*RHAT_W, 9.0], [*RHAT_L, 0.0, 9.0]]], dtype=torch.float64)  # of a wider batch
    ref = torch.tensor([[-3.3, -1.9]], dtype=torch.float64)
    return Pairs(logprobs.sum(2), ref, *tokens([3, 2]), logprobs, {"token_reward": rewards})


def test_card_vectors() -> None:
    """L_REG(w) -.020795, L_REG(l) -.017, r_w .02, r_l 0, L_DPO .683197, w .495, total at alpha .25 .678520."""
    algo, pairs = TREG(), card()
    assert algo.margins(pairs).tolist() == pytest.approx([0.02], abs=1e-9)
    assert algo.regularisers(pairs).tolist() == pytest.approx([0.495 * (-0.020795 - 0.017)], abs=1e-6)
    assert TREG(alpha=0.0).pair_losses(pairs).tolist() == pytest.approx([0.683197], abs=1e-6)
    assert algo.pair_losses(pairs).tolist() == pytest.approx([0.678520], abs=1e-6)
    torch.testing.assert_close(TREG(alpha=0.0).pair_losses(pairs), DPO().pair_losses(pairs))


def test_the_mean_of_a_responses_tokens() -> None:
    found = TREG(reduction="mean").regularisers(card())
    assert found.tolist() == pytest.approx([0.495 * (-0.020795 / 3 - 0.017 / 2)], abs=1e-6)


def test_no_gradient_through_the_weight_and_the_token_rewards() -> None:
    """d L / d log pi(y_t) = ∓ beta w from L_DPO, and - alpha w beta rhat_t with w = .495 held fixed."""
    pairs = card()
    TREG().pair_losses(pairs).sum().backward()
    leaf = pairs.token_logprobs
    assert leaf is not None and leaf.grad is not None
    wanted = [[-0.0495 - 0.25 * 0.0495 * r for r in RHAT_W], [0.0495 - 0.25 * 0.0495 * r for r in [*RHAT_L, 0.0]]]
    torch.testing.assert_close(leaf.grad[0], torch.tensor(wanted, dtype=torch.float64), atol=1e-6, rtol=0)


# ---- what is asked of the start model --------------------------------------------------------------------------------


def test_card_token_rewards(make_batch) -> None:
    """log p better [-1, -2, -.5], worse [-2, -1, -.5]; the start model stands for both by what it is asked."""
    batch = make_batch([1], [3])

    class Start:
        def demonstrations(self, rows, max_tokens, end):
            assert [row["response"] for row in rows] == batch.responses
            return batch.with_(rows=rows)

        def forward(self, part):
            better = {"p0 r0 +": [-1, -2, -0.5], "p0 r0 -": [-2, -1, -0.5]}
            return torch.tensor([better[row["prompt"]] for row in part.rows])

    found = TREG(**SHORT).token_rewards(Start(), batch)
    assert found.tolist() == [pytest.approx([0.231059, -0.231059, 0], abs=1e-6)]


def test_token_rewards_of_a_model(policy) -> None:
    """Of each response's tokens, the end with it, and 0 behind; two readings of the same tokens behind other prompts."""
    rows = [
        {"id": i, "prompt": w, "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 2) % 6], "references": []}
        for i, w in enumerate(WORDS)
    ]
    batch = policy.pairs(rows)
    with torch.no_grad():
        found = TREG(**SHORT).token_rewards(policy, batch)
        assert found.shape == batch.mask.shape and ((found != 0) == batch.mask).all() and (found.abs() < 0.5).all()
        for i in (0, 3):
            text = batch.responses[i]
            both = [
                policy.forward(policy.demonstrations([{**batch.rows[i], "prompt": p, "response": text}]))[0]
                for p in (f"{batch.rows[i]['prompt']} {text} +", f"{batch.rows[i]['prompt']} {text} -")
            ]
            n = int(batch.lengths[i])
            torch.testing.assert_close(found[i, :n], (both[0] - both[1]).sigmoid() - 0.5, atol=1e-5, rtol=1e-4)


def test_a_chat_is_asked_in_its_last_turn() -> None:
    chat = [{"role": "system", "content": "be kind"}, {"role": "user", "content": "hi"}]
    asked = request("{prompt}|{response}", {"prompt": chat}, "ho")
    assert asked == [chat[0], {"role": "user", "content": "hi|ho"}]
    assert request("{prompt}|{response}", {"prompt": "hi"}, "{ho}") == "hi|{ho}"


def test_token_rewards_are_kept_until_the_requests_change(tmp_path: Path) -> None:
    words = ["+algo=t_reg", *SMALL_CAUSAL, *SMALL_RUN, "algo.batch_size=8", "algo.steps=1", "algo.warmup=0",
             "evaluate.every=0", "evaluate.test=false"]  # fmt: skip
    train(tmp_path, *words)
    assert len(list((tmp_path / "reference").iterdir())) == 2
    train(tmp_path, *words, "algo.alpha=0.5")
    assert len(list((tmp_path / "reference").iterdir())) == 2
    train(tmp_path, *words, "'algo.better=\"{prompt} {response} again\"'".strip("'"))
    assert len(list((tmp_path / "reference").iterdir())) == 3


@pytest.mark.parametrize(
    "wrong",
    [{"better": "{prompt} {answer}"}, {"worse": "{prompt"}, {"worse": "{}"}, {"better": TREG.worse}, {"beta": 0.0},
     {"alpha": -1.0}],
)  # fmt: skip
def test_bad_settings(wrong: dict) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        TREG(**wrong)
