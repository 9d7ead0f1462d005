"""Sequence-level distillation: what transformers' own beam search writes, row by row."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_RUN, lines, train

from alignkit.algos.sequence_kd import SequenceKD
from alignkit.policy import Policy


def rewritten(policy: Policy, rows: list[dict[str, Any]], **settings: Any) -> list[dict[str, Any]]:
    algo = SequenceKD(max_new_tokens=8, **settings)
    return algo.refine(policy, None, rows, None, torch.Generator())  # type: ignore[arg-type]


@pytest.mark.parametrize("beams", [1, 4])
def test_the_response_is_the_best_of_the_teachers_beam(ragged_policy: Policy, rows: Any, beams: int) -> None:
    found = rewritten(ragged_policy, rows(5, topic="t"), beams=beams)
    for row, new in zip(rows(5), found, strict=True):
        ids = torch.tensor(ragged_policy.encode_prompts([row]))
        out = ragged_policy.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), num_beams=beams, do_sample=False, max_new_tokens=8,
            eos_token_id=ragged_policy.eos, pad_token_id=ragged_policy.pad,
        )[0]  # fmt: skip
        own = out[1:] if ragged_policy.is_encoder_decoder else out[ids.shape[1] :]
        assert new["response"] == ragged_policy.tokenizer.decode(own, skip_special_tokens=True).strip()
        assert new["references"] == row["references"] and new["topic"] == "t" and "id" not in new


def test_what_has_no_end_is_dropped(policy: Policy, rows: Any) -> None:
    policy.eos = [policy.tokenizer.vocab_size + 5]  # which is never written
    assert [row["dropped"] for row in rewritten(policy, rows(3), beams=2)] == ["cut off"] * 3


def test_the_data_set_is_one_that_a_student_learns(tmp_path: Path) -> None:
    words = ["data=rnnlg", *SMALL_RUN, "data.limit=8", "model.path=bundled:nlg"]
    made, folder = train(
        tmp_path, "+algo=sequence_kd", *words, "algo.max_new_tokens=60", "algo.beams=2", "algo.rows_per_part=5"
    )  # fmt: skip
    assert made["rows"]["read"] == made["rows"]["kept"] == 8
    rows = lines(folder / "data.jsonl")
    assert any(row["response"] not in row["references"] for row in rows)
    result, _ = train(
        tmp_path, "+algo=sft", *words, "model.layers=1", f"data.train={folder}", "data.response='{response}'",
        "algo.steps=1", "algo.warmup=0", "evaluate.every=0",
    )  # fmt: skip
    assert result["status"] == "finished"
