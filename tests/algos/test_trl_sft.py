"""TRL's SFT is given the tokens that alignkit learns."""

from __future__ import annotations

import pytest

from alignkit.algos.trl_sft import TrlSFT
from alignkit.errors import UserError


def test_tokens_and_what_of_them_is_learned(tiny_causal, rows):
    given = TrlSFT().dataset(tiny_causal, rows(3), 0)
    for row, one in zip(rows(3), given, strict=True):
        prompt, answer = tiny_causal.prompt_ids([row])[0], tiny_causal.encode_responses([row["response"]])[0]
        assert one["input_ids"] == [*prompt, *answer]
        assert one["labels"] == [-100] * len(prompt) + answer
        assert answer[-1] == tiny_causal.eos[0] and one["input_ids"].count(tiny_causal.eos[0]) == 1


def test_steps_are_those_of_the_data_or_given():
    assert TrlSFT(batch_size=8, epochs=2).steps_over(30) == 8  # 60 rows
    assert TrlSFT(batch_size=8, steps=3).steps_over(30) == 3
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        TrlSFT(batch_size=0)


def test_judged_responses_are_for_kto(rows):
    with pytest.raises(UserError, match="trl_kto"):
        TrlSFT().prepare(rows(2, desirable=True), ("response",))
