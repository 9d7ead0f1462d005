"""TRL's reward model is alignkit's own, seen as a classifier of transformers."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from conftest import ANSWERS, CAUSAL, WORDS

from alignkit.algos.trl_reward import TrlReward
from alignkit.config import Lora, Model
from alignkit.errors import UserError

PAIRS = [{"id": i, "prompt": w, "chosen": ANSWERS[i], "rejected": "no"} for i, w in enumerate(WORDS)]


def built(**settings):
    model = Model(config=CAUSAL, vocab_size=300, device="cpu", **settings)
    return TrlReward().build(model, 0, WORDS + ANSWERS, None)


def test_the_classifier_scores_what_alignkit_scores():
    """On TRL's own rows: the logit at the last token is the score, and both share their weights."""
    reader = built()
    classifier = TrlReward().module(reader).eval()
    with torch.no_grad():
        for given, row in zip(TrlReward().dataset(reader, PAIRS, 0), PAIRS, strict=True):
            logit = classifier(input_ids=torch.tensor([given["chosen_ids"]])).logits[0, 0]
            found = reader.score([{**row, "response": row["chosen"]}])[0]
            torch.testing.assert_close(logit, found, rtol=1e-5, atol=1e-5)
        classifier.score.weight.mul_(2)
    assert torch.equal(reader.model.head.weight, classifier.score.weight)


def test_refusals(tmp_path: Path):
    with pytest.raises(UserError, match=r"model\.lora\.r.*\+algo=bt"):
        built(lora=Lora(r=2))
    encoder = Model(
        config={"model_type": "bert", "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2},
        vocab_size=300,
    )
    with pytest.raises(UserError, match="causal"):
        TrlReward().module(TrlReward().build(encoder, 0, WORDS, None))
    with pytest.raises(UserError, match="pairs"):
        TrlReward().prepare([{"prompt": "a", "response": "b"}], ("response",))
