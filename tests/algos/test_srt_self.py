"""Data of SRT's stage 2 against the method card (srt.md): a strict gain by the model's own, independent scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from critical import FIRST, PROMPTS, REFINED, SCORES, ask, critical_policy
from running import SMALL_RUN, lines, train

from alignkit.algos.srt_self import SRTSelf
from alignkit.critique import parse
from alignkit.errors import UserError
from alignkit.policy import Policy
from alignkit.protocols import own_scores

GREEDY = {"temperature": 0.05, "max_new_tokens": 60, "max_feedback_tokens": 60}


def refined(rows: list[Any] | None = None, seed: int = 0, **settings: Any) -> list[dict[str, Any]]:
    algo = SRTSelf(**{**GREEDY, **settings})
    generator = torch.Generator().manual_seed(seed)
    return algo.refine(critical_policy(), None, ask() if rows is None else rows, None, generator)  # type: ignore[arg-type]


def test_pairs_of_a_model_that_knows_what_it_will_say() -> None:
    """Its answers 3 1 2 and 7 9 8 gain by their refinements, 4 5 6 has 10 already, 1 0 2 is rated above what it becomes."""
    found = refined()
    assert [row["response"] for row in found] == FIRST and [row["refinement"] for row in found] == REFINED
    assert [row["scores"] for row in found] == [[2, 10], [6, 9], [10, 10], [7, 5]]
    assert [row.get("dropped") for row in found] == [None, None, "no gain", "no gain"]
    for i in (0, 1):
        pair = {k: found[i][k] for k in ("prompt", "chosen", "rejected", "score_chosen", "score_rejected", "source")}
        assert pair == {
            "prompt": PROMPTS[i], "chosen": REFINED[i], "rejected": FIRST[i], "score_chosen": SCORES[REFINED[i]],
            "score_rejected": SCORES[FIRST[i]], "source": "self",
        }  # fmt: skip
    assert all("chosen" not in row for row in found[2:])


def test_pairs_gain_and_differ_whatever_is_drawn() -> None:
    """Tests 3 and 5 of the card: scores are those of fresh contexts, chosen is not rejected, and dropped rows are no pairs."""
    rows = ask() * 8
    found = refined([{**row, "id": i} for i, row in enumerate(rows)], seed=1, temperature=1.0)
    pairs = [row for row in found if "dropped" not in row]
    assert 8 <= len(pairs) < len(found) and len({row["rejected"] for row in pairs}) > 1
    for row in pairs:
        assert row["score_chosen"] > row["score_rejected"] and row["chosen"] != row["rejected"]
        one = [{"prompt": row["prompt"], "id": 0}]
        fresh = [own_scores(critical_policy(), one, [row[side]], 60).item() for side in ("chosen", "rejected")]
        assert fresh == [row["score_chosen"], row["score_rejected"]]
    for row in found:
        if "dropped" in row:
            assert not {"chosen", "rejected"} & set(row)


def test_even_where_no_gain_is_asked_a_pair_has_two_responses() -> None:
    found = refined(min_gain=0)
    assert [row.get("dropped") for row in found] == [None, None, "alike", "no gain"]
    found = refined(min_gain=-2)
    assert [row.get("dropped") for row in found] == [None, None, "alike", None]
    assert (found[3]["chosen"], found[3]["score_chosen"], found[3]["score_rejected"]) == ("0 1 2", 5, 7)


def test_several_rounds_keep_the_best_refinement() -> None:
    """Each refinement is refined to itself here, so further rounds are even and the first one stays."""
    found = refined(rounds=3)
    assert [row["scores"] for row in found] == [[2, 10, 10, 10], [6, 9, 9, 9], [10] * 4, [7, 5, 5, 5]]
    assert [row["refinement"] for row in found] == REFINED


def test_drafts_end_at_the_marker(monkeypatch: pytest.MonkeyPatch) -> None:
    """No token is spent on a critique that is written again afterwards."""
    policy, lengths = critical_policy(), []
    generate = policy.generate

    def noted(*given: Any, **more: Any) -> Any:
        batch = generate(*given, **more)
        lengths.append((more.get("begun") is None, int(batch.lengths.max())))
        return batch

    monkeypatch.setattr(policy, "generate", noted)
    refined()
    drafted = [n for drafts, n in lengths if drafts]
    assert drafted == [len(policy.encode_responses([f"{FIRST[0]}\n\n### Feedback"])[0]) - 1]


def test_a_model_that_does_not_criticise_gives_no_pairs(build_policy: Any, rows: Any) -> None:
    policy = build_policy("causal", max_position_embeddings=128)
    algo = SRTSelf(max_new_tokens=8, max_feedback_tokens=8)
    found = algo.refine(policy, None, rows(4), None, torch.Generator().manual_seed(0))  # type: ignore[arg-type]
    assert [row["dropped"] for row in found] == ["no score"] * 4


def test_an_encoder_decoder_is_refused(tiny_seq2seq: Policy, tiny_causal: Policy) -> None:
    with pytest.raises(UserError, match="srt_self: a model that goes on from its own answer must be causal"):
        SRTSelf().check(tiny_seq2seq)
    SRTSelf().check(tiny_causal)


# ---- the instructions of stage 1 -----------------------------------------------------------------------------------


def stage_1(folder: Path, *columns: dict[str, Any]) -> str:
    file = folder / "stage_1.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in columns))
    return str(file)


def test_instructions_of_stage_1_are_left_out(tmp_path: Path) -> None:
    """Test 4 of the card; rows of another file count by their prompt."""
    for name in ("instruction", "prompt"):
        algo = SRTSelf(not_in=stage_1(tmp_path, {name: PROMPTS[1]}, {name: "another"}, {name: PROMPTS[3]}))
        assert [row["id"] for row in algo.prepare(ask())] == [0, 2]
    both = stage_1(tmp_path, {"instruction": PROMPTS[0], "prompt": f"rendered: {PROMPTS[1]}"})
    assert [row["id"] for row in SRTSelf(not_in=both).prepare(ask())] == [1, 2, 3]
    assert SRTSelf().prepare(ask()) == ask()


def test_chats_of_stage_1_count_by_their_last_user_turn(tmp_path: Path) -> None:
    chat = [{"role": "user", "content": "hello"}]
    algo = SRTSelf(not_in=stage_1(tmp_path, {"prompt": chat}))
    rows: list[Any] = [{"prompt": chat, "id": 0}, {"prompt": [{"role": "user", "content": "bye"}], "id": 1}]
    assert [row["id"] for row in algo.prepare(rows)] == [1]


def test_nothing_left_and_nothing_to_compare_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algo\.not_in=.*: all instructions are there\. Give stage 2 others"):
        SRTSelf(not_in=stage_1(tmp_path, *({"instruction": p} for p in PROMPTS))).prepare(ask())
    with pytest.raises(UserError, match="no such file"):
        SRTSelf(not_in=str(tmp_path / "none.jsonl")).prepare(ask())
    with pytest.raises(UserError, match=r"line 1: neither 'instruction' nor 'prompt', by which algo\.not_in compares"):
        SRTSelf(not_in=stage_1(tmp_path, {"question": PROMPTS[0]})).prepare(ask())


@pytest.mark.parametrize("wrong", [{"max_feedback_tokens": 0}, {"rounds": 0}])
def test_ranges(wrong: dict) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be at least 1"):
        SRTSelf(**wrong)


# ---- as a run ------------------------------------------------------------------------------------------------------


def test_a_run_writes_pairs_of_new_instructions_alone(tmp_path: Path) -> None:
    """Disjoint sets on the command line (test 4 of the card): prompt 0 was stage 1's; what is left are its pairs."""
    critical_policy().save(tmp_path / "model")
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    before = tmp_path / "before"
    before.mkdir()
    (before / "data.jsonl").write_text(json.dumps({"instruction": PROMPTS[0]}) + "\n")
    words = [
        "+algo=srt_self", "data=custom", f"data.train={tmp_path}/rows.jsonl", "data.response=null", "model=hf",
        f"model.path={tmp_path}/model", *[w for w in SMALL_RUN if not w.startswith("evaluate")], f"algo.not_in={before}",
        "algo.temperature=0.05", "algo.max_new_tokens=60", "algo.max_feedback_tokens=60", "algo.rows_per_part=2",
    ]  # fmt: skip
    result, run = train(tmp_path, *words)
    assert result["rows"] == {"read": 3, "kept": 1, "dropped": {"no gain": 2}}
    [pair] = lines(run / "data.jsonl")
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == (PROMPTS[1], REFINED[1], FIRST[1])
    assert parse(f"{pair['feedback']['raw']}\n### Improved Response\nx").score == 6
