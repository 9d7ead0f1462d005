"""Lists of candidates: what a reward model's ranking is worth, pairs made of them, and the script that prepares others' data."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from running import SMALL_RUN, train

from alignkit import metrics, ranking
from alignkit.config import conf_dir
from alignkit.data import Data
from alignkit.errors import UserError
from alignkit.stages.evaluate_rm import list_metrics

SCRIPTS = conf_dir().parent / "scripts"


def written(tmp_path: Path, *rows: dict[str, Any]) -> str:
    file = tmp_path / "lists.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


def lists(file: str, **settings: Any) -> Data:
    return Data(train=file, test=file, candidates="texts", golden="gold", **settings)


ROW = {"prompt": "p", "texts": ["a", "b", "c"], "gold": [1, 3, 1]}


def test_all_pairs_of_a_list_and_its_extremes(tmp_path: Path) -> None:
    """b is better than a and c, which are even: two pairs, one tie."""
    data = lists(written(tmp_path, ROW), pairing="all")
    pairs = [(r["chosen"], r["rejected"], r["margin"], r["id"]) for r in data.rows("train")]
    assert pairs == [("b", "a", 2.0, 0), ("b", "c", 2.0, 1)]
    assert data.ties == {"train": 1} and data.sides == ("chosen", "rejected")
    assert [r["rejected"] for r in lists(written(tmp_path, ROW), pairing="extremes").rows("train")] == ["c"]
    assert len(lists(written(tmp_path, ROW), pairing="all", limit=1).rows("train")) == 1
    assert len(lists(written(tmp_path, ROW, ROW, ROW), pairing="all", unique=True).rows("train")) == 2


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"gold": [1, 2]}, "line 1: 3 candidates in 'texts' but 2 scores in 'gold'"),
        ({"texts": ["a", None, "b"]}, "line 1: column 'texts' must be a list of at least two texts"),
        ({"texts": "a"}, "line 1: column 'texts' must be a list of at least two texts"),
        ({"gold": [1, True, 2]}, "line 1: column 'gold' must be a list of at least two numbers"),
        ({"gold": [1, float("nan"), 2]}, "line 1: column 'gold' must be a list of at least two numbers"),
        ({"gold": [1, 1, 1]}, "in no row is one candidate better than another"),
    ],
)
def test_bad_lists_are_named(tmp_path: Path, row: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        lists(written(tmp_path, {**ROW, **row}), pairing="all").rows("train")


def test_pairing_without_candidates_is_refused() -> None:
    with pytest.raises(UserError, match=r"data\.pairing=all makes pairs of candidates"):
        Data(train="x.jsonl", pairing="all")


def test_the_metrics_of_a_list() -> None:
    """rm_evaluation.md, E4: 7 of 10 pairs, reciprocal rank .5, best of 5 is worth .5."""
    found = list_metrics([0.1, 0.9, 0.5, -0.3, 0.2], [0.0, 0.7, 0.8, -0.1, -0.2])
    assert found["list/pair_accuracy"] == pytest.approx(0.7)
    assert found["list/mrr"] == pytest.approx(0.5)
    assert found["best_of/1"] == pytest.approx(0.28) == found["best_of_gold/1"]
    # of the 5 sets of 4, all but those without the third hold it; without it the second wins
    assert found["best_of/4"] == pytest.approx((4 * 0.5 + 0.9) / 5)
    assert found["best_of_gold/4"] == pytest.approx((4 * 0.9 + 0.5) / 5)
    assert "best_of/8" not in found
    assert found["best_of_random/4"] == pytest.approx(0.28)


def test_prompts_without_a_metric_do_not_count() -> None:
    stats = metrics.per_prompt([{"list/x": 1.0}, {"list/x": float("nan")}, {"list/x": 0.0, "best_of/8": 2.0}])
    table = metrics.summary(metrics.Sentences(stats), 100)
    assert table["list/x"]["value"] == 0.5
    assert table["best_of/8"]["value"] == 2.0 == table["best_of/8"]["low"] == table["best_of/8"]["high"]


def test_a_reward_can_be_the_true_score(tmp_path: Path) -> None:
    """Of candidates without scores: the reward model of a run, judged by how long responses are."""
    words = [
        *SMALL_RUN,
        "model.config.hidden_size=16",
        "model.config.num_hidden_layers=1",
        "model.config.intermediate_size=32",
    ]
    _, run = train(tmp_path / "rm", "+algo=bt", *words, "algo.steps=2", "algo.warmup=0", "evaluate.every=0")
    file = written(tmp_path, {"prompt": "p", "texts": ["yes", "yes, of course I do", "no"]})
    own = [
        "data=pairs",
        "data.train=null",
        f"data.test={file}",
        "data.chosen=null",
        "data.rejected=null",
        "data.candidates=texts",
    ]
    evaluate = ["+algo=evaluate_rm", f"model.path={run}", *own, "run.wandb=disabled"]
    with pytest.raises(UserError, match=r"candidates have no true scores\. Set data\.golden, or a reward"):
        train(tmp_path / "a", *evaluate)
    result, _ = train(tmp_path / "b", *evaluate, "reward=length", "reward.unit=characters", "reward.target=19")
    assert result["evaluation"]["test"]["best_of_gold/2"]["value"] == pytest.approx((1 + 1 + 3 / 19) / 3)


# ---- statistics of pairs ---------------------------------------------------------------------------------------------


def test_what_is_measured_of_pairs() -> None:
    """Margins 2, -1, 0 and 2; by hand: 2.5 of 4 right, one tie; sigmoid(2) = .880797, sigmoid(1) = .731059."""
    sizes = [(5, 3), (2, 4), (3, 3), (1, 2)]
    found = metrics.summary(metrics.pairs([2.0, -1.0, 0.0, 2.0], sizes, list("abcd"), ["x", "x", "y", "y"]), 0)
    value = {name: cell["value"] for name, cell in found.items()}
    assert value["preference_accuracy"] == 62.5 and value["ties"] == 25.0 and value["margin"] == 0.75
    assert value["nll"] == pytest.approx((2 * 0.126928 + 1.313262 + 0.693147) / 4, abs=1e-6)
    # bins of confidence: .5 (a half right), .731 (wrong), twice .881 (right)
    assert value["ece"] == pytest.approx((0.0 + 0.731059 + 2 * (1 - 0.880797)) / 4, abs=1e-6)
    assert value["longer_wins"] == pytest.approx(100 * (1 + 0 + 0.5 + 0) / 4)
    assert value["section/x"] == 50.0 and value["section/y"] == 75.0 and value["macro"] == 62.5
    assert found["section/x"]["n"] == 2 and found["macro"]["n"] == found["ece"]["n"] == 4


def test_pairs_of_one_prompt_are_drawn_together() -> None:
    """Ten prompts, five pairs each that are all right or all wrong: as uncertain as ten pairs are, not fifty."""
    margins = [1.0 if i < 25 else -1.0 for i in range(50)]
    together, apart = (
        metrics.summary(metrics.pairs(margins, [(1, 1)] * 50, prompts), 1000)["preference_accuracy"]
        for prompts in ([str(i // 5) for i in range(50)], [str(i) for i in range(50)])
    )
    assert together["value"] == apart["value"] == 50.0 and together["n"] == apart["n"] == 50
    ratio = (together["high"] - together["low"]) / (apart["high"] - apart["low"])
    assert ratio == pytest.approx(5**0.5, rel=0.15)


def test_a_section_that_a_resample_misses_does_not_raise_the_mean() -> None:
    """98 pairs right, 2 wrong in a section of their own."""
    sections = ["a"] * 98 + ["b"] * 2
    margins = [1.0] * 98 + [-1.0] * 2
    found = metrics.summary(metrics.pairs(margins, [(1, 1)] * 100, [str(i) for i in range(100)], sections), 500)[
        "macro"
    ]
    assert found["value"] == found["low"] == found["high"] == 50.0


@settings(max_examples=25, deadline=None)
@given(st.lists(st.floats(-6, 6), min_size=1, max_size=40))
def test_calibration_by_sums_is_calibration_by_definition(margins: list[float]) -> None:
    n = len(margins)
    found = metrics.summary(metrics.pairs(margins, [(1, 1)] * n, [str(i) for i in range(n)]), 0)
    assert found["ece"]["value"] == pytest.approx(ranking.ece(np.array(margins)), abs=1e-9)
    assert found["preference_accuracy"]["value"] == pytest.approx(100 * ranking.accuracy(np.array(margins)))


# ---- other people's files --------------------------------------------------------------------------------------------


def prepared(tmp_path: Path, form: str, *rows: dict[str, Any]) -> tuple[str, list[dict[str, Any]]]:
    file = tmp_path / "raw.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done = subprocess.run(
        [sys.executable, SCRIPTS / "prepare_pairs.py", form, file, tmp_path / "out"],
        capture_output=True,
        text=True,
        check=True,
    )
    found = [json.loads(x) for p in sorted((tmp_path / "out").iterdir()) for x in p.read_text().split("\n") if x]
    return done.stdout, found


def test_hh_dialogues_are_cut_at_their_last_turn(tmp_path: Path) -> None:
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: bye\n\nAssistant:"
    said, rows = prepared(
        tmp_path,
        "hh",
        {"chosen": start + " see you", "rejected": start + " what"},
        {"chosen": start, "rejected": start + " x"},
    )
    assert rows == [{"prompt": start, "chosen": "see you", "rejected": "what"}]
    assert "1 of 2 rows are kept" in said and "100.0%" in said


def test_alpaca_eval_ties_are_left_out(tmp_path: Path) -> None:
    row = {"instruction": "i", "dataset": "d", "output_1": "a", "output_2": "b"}
    _, rows = prepared(
        tmp_path,
        "alpaca_eval",
        {**row, "preference": 2},
        {**row, "preference": 1.5},
        {**row, "output_2": True, "preference": 1},
    )
    assert rows == [{"prompt": "i", "chosen": "b", "rejected": "a", "section": "d"}]


def test_open_assistant_ranks_become_scores(tmp_path: Path) -> None:
    replies = [{"text": "a", "rank": 1}, {"text": "b", "rank": 0}, {"text": "c"}]
    _, rows = prepared(tmp_path, "oasst", {"prompt": {"text": "q", "replies": replies}})
    assert rows == [{"prompt": "q", "candidates": ["a", "b"], "golden": [-1, 0]}]


def test_a_frontier_is_read_where_the_kl_is_first_reached(tmp_path: Path) -> None:
    points = [(0.0, 1.0), (2.0, 2.0), (1.5, 3.0), (4.0, 3.0)]
    lines = [{"step": i, "kl": kl, "dev/reward": x} for i, (kl, x) in enumerate(points)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kl_frontier.py", tmp_path, "--at", "1", "3", "9"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert f"| {tmp_path} | 1.000 | 1.500 | 3.000 |  | 3.000 (4.00) |" in done.stdout
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"step": 0, "dev/reward": 1.0}) + "\n")
    done = subprocess.run(
        [sys.executable, SCRIPTS / "kl_frontier.py", tmp_path], capture_output=True, text=True, check=False
    )
    assert done.returncode == 1 and "no KL was logged" in done.stderr and "Traceback" not in done.stderr
