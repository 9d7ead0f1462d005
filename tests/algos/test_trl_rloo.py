"""TRL's RLOO: its defaults, and what its reward function hands to alignkit's reward."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from alignkit.algos.trl_rloo import TrlRLOO
from alignkit.stages.trl import scored


def test_defaults_are_those_of_rloo():
    given = TrlRLOO().arguments()
    assert (given["num_generations"], given["beta"]) == (4, 0.05)
    assert TrlRLOO().wants_reference and not TrlRLOO(kl=0).wants_reference
    with pytest.raises(ValueError, match="k must be at least 2"):
        TrlRLOO(k=1)


def test_a_reward_sees_whole_rows(tiny_causal, rows, tmp_path):
    """Ids as TRL gives them, two a row, become a batch: rows by their place, texts without special tokens, groups, ends."""
    from contextlib import nullcontext

    data = rows(3, colour="blue")
    seen, counts = [], {}
    run = SimpleNamespace(
        phase=lambda name: nullcontext(),
        count=counts.__setitem__,
        cfg=SimpleNamespace(run=SimpleNamespace(samples_every=0)),
    )

    def reward(batch):
        seen.append(batch)
        return torch.arange(4.0)

    words = tiny_causal.tokenizer("ein Hund")["input_ids"]  # closed by the end token
    ids = [words, words[:-1], words[:1], words]
    function = scored(tiny_causal and run, tiny_causal, TrlRLOO(k=2), data, reward)
    found = function(
        completion_ids=ids,
        id=[2, 2, 0, 0],
        trainer_state=SimpleNamespace(global_step=0),
        prompts=None,
        completions=None,
    )
    assert found == [0.0, 1.0, 2.0, 3.0]
    (batch,) = seen
    assert [row["id"] for row in batch.rows] == [2, 2, 0, 0] and batch.rows[0]["colour"] == "blue"
    assert batch.group.tolist() == [0, 0, 1, 1]
    assert batch.responses[0] == batch.responses[1] == "ein Hund"
    assert batch.extra["ended"].tolist() == [True, False, False, True]
    assert batch.lengths.tolist() == [len(words), len(words) - 1, 1, len(words)]
    assert counts == {"samples": 4, "tokens/sampled": 3.0 * len(words)}
