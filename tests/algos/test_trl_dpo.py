"""TRL's DPO makes of the texts that it is given the tokens that alignkit has."""

from __future__ import annotations

import pytest

from alignkit.algos.trl_dpo import TrlDPO
from alignkit.errors import UserError
from alignkit.stages.trl import opened


def test_texts_that_give_the_same_tokens(tiny_causal, rows):
    pairs = [{**row, "chosen": row["response"], "rejected": "no, sorry"} for row in rows(6)]
    tokenizer = opened(tiny_causal)
    for row, one in zip(pairs, TrlDPO().dataset(tiny_causal, pairs, 0), strict=True):
        prompt = tiny_causal.prompt_ids([row])[0]
        assert tokenizer(one["prompt"])["input_ids"] == prompt
        for side in ("chosen", "rejected"):
            closed = one["prompt"] + one[side] + tokenizer.eos_token  # as TRL puts it together
            assert tokenizer(closed)["input_ids"] == prompt + tiny_causal.encode_responses([row[side]])[0]


def test_a_chat_is_given_as_one(tiny_causal):
    chat = [{"role": "user", "content": "hi"}]
    (one,) = TrlDPO().dataset(tiny_causal, [{"prompt": chat, "chosen": "a", "rejected": "b"}], 0)
    assert one == {
        "prompt": chat, "chosen": [{"role": "assistant", "content": "a"}], "rejected": [{"role": "assistant", "content": "b"}]
    }  # fmt: skip


def test_an_opened_tokenizer_closes_nothing_and_knows_the_same(tiny_causal):
    tokenizer = opened(tiny_causal)
    ids = tiny_causal.tokenizer("the cat")["input_ids"]
    assert ids[-1] == tokenizer.eos_token_id == tiny_causal.eos[0]
    assert tokenizer("the cat")["input_ids"] == ids[:-1]
    assert tiny_causal.tokenizer("the cat")["input_ids"] == ids, "the reader's own is as it was"
    assert tokenizer.pad_token_id == tiny_causal.pad
    assert tokenizer.decode(ids, skip_special_tokens=True) == tiny_causal.tokenizer.decode(
        ids, skip_special_tokens=True
    )


def test_what_it_learns_from():
    assert TrlDPO(beta=0.3).arguments()["beta"] == 0.3
    assert TrlDPO(beta=0.3).ranks.beta == 0.3
    with pytest.raises(UserError, match="pairs"):
        TrlDPO().prepare([{"prompt": "a", "response": "b"}], ("response",))
