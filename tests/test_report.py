"""Reports of real tiny runs: numbers against those worked out here from the files, damaged runs, hostile texts, the verbs."""

from __future__ import annotations

import copy
import csv
import io
import json
import math
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from reporting import METHODS, SEEDS, Runs, logged, make_runs, result_of, score_of
from running import SMALL_SFT, lines, train

from alignkit import metrics
from alignkit.errors import UserError
from alignkit.report import charts, stats
from alignkit.report.collect import Configuration, collect, configurations, differing, read
from alignkit.report.content import Report, Table, _signed, build, number
from alignkit.report.page import render

Cli = Callable[..., tuple[int, str, str]]
T1 = 12.706204736  # Student's t at 0.975 with one degree of freedom, from tables


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return make_runs(tmp_path_factory.mktemp("runs"))


@pytest.fixture
def copies(runs: Runs, tmp_path: Path) -> Runs:
    """The runs without their weights, to be damaged."""
    found = {}
    for key, run in runs.items():
        found[key] = tmp_path / "runs" / run.name
        shutil.copytree(run, found[key], ignore=shutil.ignore_patterns("checkpoint-*", "final", ".lock"))
    return found


def root(runs: Runs) -> str:
    return str(next(iter(runs.values())).parent)


def reported(*named: str, baseline: str | None = None, how: str = "t") -> Report:
    found, warnings = collect(list(named))
    groups, more = configurations(found)
    return build(groups, [*warnings, *more], baseline, how)


def cell(table: Table, row: str, column: str) -> str:
    return next(r for r in table.rows if r[0].text == row)[table.head.index(column)].text


def table(report: Report, title: str) -> Table:
    return next(t for stage in report.stages for t in (*stage.tables, *stage.ledger, *stage.others) if t.title == title)


def numbers(text: str) -> list[float]:
    return [float(x) for x in re.findall(r"[-+]?\d+\.?\d*", text)]


# ---- statistics, by hand and from tables --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("df", "t"), [(1, 12.7062), (2, 4.3027), (3, 3.1824), (4, 2.7764), (9, 2.2622), (10, 2.2281), (30, 2.0423)]
)
def test_quantiles_of_student_are_those_of_printed_tables(df: int, t: float) -> None:
    assert stats.t_quantile(df) == pytest.approx(t, abs=5e-5)


def test_the_interval_of_three_values() -> None:
    """Mean 4, deviation 2, so 4.3027 · 2 / √3 to each side."""
    found = stats.interval([2.0, 4.0, 6.0])
    assert (found.mean, found.n) == (4.0, 3)
    assert found.high == pytest.approx(4 + 4.30265 * 2 / math.sqrt(3), abs=1e-4)
    assert found.low == pytest.approx(4 - 4.30265 * 2 / math.sqrt(3), abs=1e-4)


def test_one_value_has_no_interval_and_says_nothing() -> None:
    found = stats.interval([3.0, math.nan])
    assert (found.mean, found.low, found.high, found.n) == (3.0, None, None, 1)
    assert not found.clear
    with pytest.raises(ValueError, match="no finite value"):
        stats.interval([math.nan])


def test_the_bootstrap_of_two_values_reaches_from_one_to_the_other() -> None:
    """Means of resamples of {0, 1} are 0, ½ and 1 with probabilities ¼, ½, ¼."""
    found = stats.interval([0.0, 1.0], "bootstrap")
    assert (found.low, found.mean, found.high) == (0.0, 0.5, 1.0)


def test_paired_differences_see_what_unpaired_ones_do_not() -> None:
    """Each seed gains 1, although seeds differ by 100; of other seeds the same values are Welch's case."""
    before = {0: 0.0, 1: 100.0, 2: 200.0}
    paired = stats.difference({0: 1.0, 1: 101.1, 2: 200.9}, before)
    assert paired is not None and paired.paired and paired.clear
    assert paired.mean == pytest.approx(1.0) and paired.n == 3
    assert paired.high == pytest.approx(1 + 4.30265 * 0.1 / math.sqrt(3), abs=1e-4)
    apart = stats.difference({3: 1.0, 4: 101.1, 5: 200.9}, before)
    assert apart is not None and not apart.paired and not apart.clear


def test_welch_with_one_degree_of_freedom() -> None:
    """[1, 3] less [0, 0]: variance of the mean 1 and 0, so the degrees are those of the first, 1."""
    found = stats.difference({0: 1.0, 1: 3.0}, {2: 0.0, 3: 0.0})
    assert found is not None
    assert (found.mean, found.paired) == (2.0, False)
    assert found.high == pytest.approx(2 + T1, abs=1e-4)


def test_welch_takes_each_side_s_own_degrees() -> None:
    """[1, 3, 5] less [0, 0]: variance of the mean 4/3 with 2 degrees and 0 with 1, so 2."""
    found = stats.difference({0: 1.0, 1: 3.0, 2: 5.0}, {3: 0.0, 4: 0.0})
    assert found is not None and found.high == pytest.approx(3 + 4.30265 * math.sqrt(4 / 3), abs=1e-4)


def test_a_difference_wants_a_value_on_both_sides() -> None:
    assert stats.difference({}, {0: 1.0}) is None
    assert stats.difference({0: math.nan}, {0: 1.0}) is None
    one = stats.difference({0: 3.0}, {0: 1.0})
    assert one is not None and (one.mean, one.low, one.clear) == (2.0, None, False)


def test_over_rows_is_the_paired_bootstrap_of_metrics() -> None:
    rng = np.random.default_rng(0)
    old = metrics.sentences([""] * 30, [[]] * 30, {"reward": list(rng.random(30))})
    new = metrics.sentences([""] * 30, [[]] * 30, {"reward": list(rng.random(30) + 0.1)})
    want = metrics.difference(old, new, 200)["reward"]
    found = stats.over_rows([old], [new], 200)["reward"]
    assert (found.mean, found.low, found.high) == pytest.approx((want["value"], want["low"], want["high"]))
    both = stats.over_rows([old, new], [new, old], 200)["reward"]
    assert (both.mean, both.low, both.high) == pytest.approx((0, 0, 0)), (
        "pairs of runs are averaged, resample by resample"
    )


# ---- numbers of the report ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("metric", "column"), [("bleu", "BLEU"), ("reward", "reward"), ("length_ratio", "length ratio")]
)
def test_results_are_the_means_of_result_json(runs: Runs, method: str, metric: str, column: str) -> None:
    a, b = (score_of(runs[method, s], metric) for s in SEEDS)
    digits = 2 if metric == "bleu" else 3
    mean, low, high = numbers(cell(table(reported(root(runs)), "Results"), method, column))
    half = T1 * abs(a - b) / 2  # n = 2: the deviation over √2 is half the distance
    assert (mean, low, high) == pytest.approx(
        ((a + b) / 2, (a + b) / 2 - half, (a + b) / 2 + half), abs=0.51 * 10**-digits
    )


def test_differences_are_paired_by_seed(runs: Runs) -> None:
    gaps = [score_of(runs["reinforce", s], "chrf") - score_of(runs["grpo", s], "chrf") for s in SEEDS]
    found = cell(table(reported(root(runs), baseline="grpo"), "Difference to grpo"), "reinforce", "chrF")
    mean, half = sum(gaps) / 2, T1 * abs(gaps[0] - gaps[1]) / 2
    assert numbers(found) == pytest.approx([mean, mean - half, mean + half], abs=0.0051)
    assert ("noise" in found) == (abs(mean) < half)


def test_the_baseline_is_the_first_named_or_the_one_asked_for(runs: Runs) -> None:
    one, other = str(runs["reinforce", 0]), str(runs["grpo", 0])
    assert reported(one, other).stages[0].baseline.label == "reinforce"
    assert reported(one, other, baseline="grpo").stages[0].baseline.label == "grpo"
    assert reported(one, other, baseline=other).stages[0].baseline.label == "grpo"
    with pytest.raises(UserError, match=r"no configuration is called so. Did you mean 'grpo'"):
        reported(one, other, baseline="grop")


def test_change_from_the_start_is_after_less_before(runs: Runs) -> None:
    gaps = [score_of(runs["grpo", s], "bleu") - score_of(runs["grpo", s], "bleu", "before") for s in SEEDS]
    found = cell(table(reported(root(runs)), "Change from the start"), "grpo", "BLEU")
    assert numbers(found)[0] == pytest.approx(sum(gaps) / 2, abs=0.0051)


def test_of_one_seed_the_change_is_the_run_s_own_over_rows(runs: Runs) -> None:
    own = result_of(runs["grpo", 1])["evaluation"]["after"]["difference"]["chrf"]
    report = reported(str(runs["grpo", 1]))
    found = cell(table(report, "Change from the start"), "grpo", "chrF")
    assert numbers(found) == pytest.approx([own["value"], own["low"], own["high"]], abs=0.0051)
    assert "noise" not in found and own["high"] < 0
    assert any("against its start: BLEU" in v and "one seed" in v for v in report.stages[0].verdicts)


def test_curves_are_means_and_ranges_of_metrics_jsonl(runs: Runs) -> None:
    stage = reported(root(runs)).stages[0]
    curves = {c.title: c for c in (*stage.curves, *stage.more_curves)}
    for title, key in (("reward", "reward"), ("BLEU on dev", "dev/bleu"), ("length of a response, tokens", "length")):
        for method in METHODS:
            line = next(s for s in curves[title].lines if s.label == method)
            a, b = (logged(runs[method, s], key) for s in SEEDS)
            assert line.xs == sorted(a)
            assert line.ys == pytest.approx([(a[s] + b[s]) / 2 for s in sorted(a)])
            assert line.lows == pytest.approx([min(a[s], b[s]) for s in sorted(a)])
            assert line.highs == pytest.approx([max(a[s], b[s]) for s in sorted(a)])


def test_the_budget_is_what_was_spent_without_evaluations(runs: Runs) -> None:
    stage = reported(str(runs["grpo", 0])).stages[0]
    by = {c.x_label: c.lines[0] for c in stage.budgets}
    evaluated = [line for line in lines(runs["grpo", 0] / "metrics.jsonl") if "dev/bleu" in line]
    spent = [sum(line.get(f"seconds/{p}", 0) for p in ("sample", "score", "update")) for line in evaluated]
    assert by["seconds of training, without evaluations"].xs[-1] == pytest.approx(spent[-1])
    assert by["tokens sampled"].xs == [0, *(line["tokens/sampled"] for line in evaluated[1:])], (
        "the start has cost nothing"
    )


def test_the_ledger_adds_up(runs: Runs) -> None:
    report = reported(root(runs))
    results = [result_of(runs["grpo", s]) for s in SEEDS]
    rows = {r[1].text: [c.text for c in r] for r in table(report, "Phases").rows if r[0].text == "grpo"}
    for phase in ("sample", "update"):
        seconds = sum(r["seconds"][phase] for r in results) / 2
        whole = sum(sum(r["seconds"].values()) for r in results) / 2
        assert float(rows[phase][2]) == pytest.approx(seconds, abs=0.051)
        assert float(rows[phase][3].rstrip("%")) == pytest.approx(100 * seconds / whole, abs=0.51)
        assert float(rows[phase][4].replace(",", "")) == pytest.approx(
            max(r["peak_mb"][phase] for r in results), abs=0.51
        )
    sampled = cell(table(report, "Totals of a run"), "grpo", "tokens sampled")
    assert float(sampled.replace(",", "")) == pytest.approx(sum(r["tokens"]["sampled"] for r in results) / 2, abs=0.51)


def test_settings_that_differ_are_all_and_only_those(runs: Runs) -> None:
    found = reported(root(runs)).stages[0].settings
    assert found is not None
    keys = {row[0].text for row in found.rows}
    assert {"name", "algo._target_", "algo.normalize"} <= keys
    assert not keys & {"seed", "run.dir", "run.root", "algo.lr", "algo.steps"}


def test_alarms_and_warnings_of_the_runs_are_said(runs: Runs) -> None:
    report = reported(root(runs))
    texts = [alarm["text"] for s in SEEDS for alarm in result_of(runs["reinforce", s])["audit"]]
    assert texts and all(any(text in alarm for alarm in report.alarms) for text in texts)
    starts = [s for s in SEEDS if result_of(runs["grpo", s])["best"]["step"] == 0]
    assert any("grpo" in w and "the start was the best" in w for w in report.warnings) == bool(starts)
    assert not any("One seed only" in w for w in report.warnings)
    assert any("One seed only: grpo." in w for w in reported(str(runs["grpo", 1])).warnings)


# ---- which runs belong together -------------------------------------------------------------------------------------------


def test_runs_of_one_configuration_are_one_line_whatever_their_order(runs: Runs) -> None:
    found, _ = configurations(collect([str(runs[key]) for key in reversed(list(runs))])[0])
    assert [(c.label, [run.seed for run in c.runs]) for c in found] == [("grpo", [0, 1]), ("reinforce", [0, 1])]


def test_a_seed_that_is_there_twice_counts_once(copies: Runs, tmp_path: Path) -> None:
    shutil.copytree(copies["grpo", 0], tmp_path / "runs" / "again")
    report = reported(str(tmp_path / "runs"))
    grpo = next(c for c in report.configurations if c.label == "grpo")
    assert [run.seed for run in grpo.runs] == [0, 1]
    assert any("again" in w and "left out" in w for w in report.warnings)


def test_configurations_of_one_name_are_told_apart_by_what_differs(copies: Runs) -> None:
    for seed in SEEDS:
        for method, rate in (("grpo", "0.5"), ("reinforce", "0.25")):
            file = copies[method, seed] / "config.yaml"
            file.write_text(
                re.sub(
                    r"(?m)^name: .*",
                    "name: mine",
                    re.sub(r"(?m)^  temperature: .*", f"  temperature: {rate}", file.read_text()),
                )
            )
            result = result_of(copies[method, seed])
            (copies[method, seed] / "result.json").write_text(json.dumps(result | {"name": "mine"}))
    labels = [c.label for c in reported(root(copies)).configurations]
    assert len(set(labels)) == 2 and all(label.startswith("mine ") and "=" in label for label in labels)
    only = differing([{"a": 1, "b": 2, "c": [1]}, {"a": 1, "b": 3}])
    assert only == ["b", "c"]


def test_runs_that_start_from_the_run_of_their_seed_are_one_configuration(copies: Runs) -> None:
    for seed, stamp in zip(SEEDS, ("0a1b2c3d", "4e5f6a7b"), strict=True):
        file = copies["grpo", seed] / "config.yaml"
        file.write_text(
            re.sub(r"(?m)^  path: .*", f"  path: runs/sft-s{seed}-{stamp}/final", file.read_text(), count=1)
        )
    assert [len(c.runs) for c in reported(root(copies)).configurations] == [2, 2]
    file.write_text(file.read_text().replace(f"sft-s{seed}", "sft-s7"))  # of another seed: another start
    assert [len(c.runs) for c in reported(root(copies)).configurations] == [1, 1, 2]


def test_evaluations_count_by_the_seed_of_the_model(runs: Runs, tmp_path: Path) -> None:
    """Two evaluations with seed 0 of runs with seeds 0 and 1 are two seeds of one configuration."""
    for seed in SEEDS:
        train(tmp_path, "+algo=evaluate", f"model.path={runs['grpo', seed]}", "data=rnnlg_acts", "data.train=null", "reward=nlg",
              "evaluate.rows=20", "evaluate.max_new_tokens=12", "evaluate.bootstrap=20", "run.threads=1", "run.wandb=disabled")  # fmt: skip
    report = reported(str(tmp_path))
    assert [[run.seed for run in c.runs] for c in report.configurations] == [[0, 1]]
    mean = sum(score_of(runs["grpo", s], "bleu") for s in SEEDS) / 2
    assert numbers(cell(table(report, "Results"), "evaluate", "BLEU"))[0] == pytest.approx(mean, abs=0.0051)


def test_a_pipeline_is_its_steps(tmp_path: Path) -> None:
    small = ["data.limit=40", "evaluate.rows=8", "evaluate.max_new_tokens=8", "evaluate.bootstrap=20", "run.threads=1"]
    sft = [w for w in SMALL_SFT if not w.startswith("run.wandb")]
    first = [*sft, "algo.steps=2", "model=tiny"]
    second = ["+algo=evaluate", "model.path={first}", "data=rnnlg", "data.train=null", *small[1:]]
    words = [f"steps.{n}=[{','.join(repr(w) for w in step)}]" for n, step in (("first", first), ("second", second))]
    _, run = train(
        tmp_path, "+preset=sft_then_esrl", "~steps.sft", "~steps.esrl", *(f"+{w}" for w in words), "run.wandb=disabled"
    )
    report = reported(str(tmp_path))
    assert [c.label for c in report.configurations] == ["sft_then_esrl", "sft_then_esrl/first", "sft_then_esrl/second"]
    assert [stage.name for stage in report.stages] == ["sft", "evaluate"]
    steps = {row[0].text: [c.text for c in row] for row in report.pipelines[0].rows}
    assert steps["first"][1:3] == ["sft", "1 of 1"] and steps["second"][1:3] == ["evaluate", "1 of 1"]
    shutil.rmtree(run / "second")
    assert cell(reported(str(tmp_path)).pipelines[0], "second", "stage") == "not begun"


# ---- unfinished and damaged runs ------------------------------------------------------------------------------------------


def test_an_unfinished_run_is_drawn_but_not_counted(copies: Runs) -> None:
    (copies["grpo", 1] / "result.json").unlink()
    path = copies["grpo", 1] / "metrics.jsonl"
    kept = [line for line in lines(path) if line["step"] <= 4]
    path.write_text(
        "".join(json.dumps(line) + "\n" for line in kept) + '{"step": 5, "rew'
    )  # killed in the middle of a line
    report = reported(root(copies))
    assert numbers(cell(table(report, "Results"), "grpo", "BLEU"))[0] == pytest.approx(
        score_of(copies["grpo", 0], "bleu"), abs=0.0051
    )
    assert cell(table(report, "Results"), "grpo", "seeds") == "1 of 2"
    reward = next(c for c in report.stages[0].curves if c.title == "reward")
    thin = [s for s in reward.lines if s.thin]
    assert [s.label for s in thin] == ["grpo, seed 1 (unfinished)"] and max(thin[0].xs) == 4
    assert any("grpo, seed 1: unfinished, 4 of 6 steps" in w for w in report.warnings)
    assert any("metrics.jsonl: 1 line cannot be read" in w for w in report.warnings)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "result.json cut off": lambda run: (run / "result.json").write_text((run / "result.json").read_text()[:200]),
    "result.json a list": lambda run: (run / "result.json").write_text("[1, 2]"),
    "result.json of other types": lambda run: (run / "result.json").write_text(
        json.dumps({"evaluation": {"after": {"test": {"bleu": "high"}}}, "seconds": [1], "audit": "none", "best": 3, "tokens": None, "training": []})
    ),
    "metrics.jsonl binary": lambda run: (run / "metrics.jsonl").write_bytes(b"\x00\xff\xfe{]\n" * 5),
    "metrics.jsonl of other types": lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": "x", "loss": null}\n[]\n{"reward": 1}\n'),
    "config.yaml gone": lambda run: (run / "config.yaml").unlink(),
    "config.yaml broken": lambda run: (run / "config.yaml").write_text("a: [1\nb: }"),
    "config.yaml a list": lambda run: (run / "config.yaml").write_text("- a\n- b\n"),
    "config.yaml of other types": lambda run: (run / "config.yaml").write_text("algo: 3\nevaluate: none\nseed: x\ndata: []\n"),
    "environment.json empty": lambda run: (run / "environment.json").write_text(""),
    "data.json cut off": lambda run: (run / "data.json").write_text('{"rows": {'),
    "data.json of other types": lambda run: (run / "data.json").write_text('{"rows": 3, "overlap": 5, "sha256": []}'),
    "outputs broken": lambda run: (run / "outputs-after.jsonl").write_text('{"prompt": 3}\n{"response": "x"}\n{'),
    "samples broken": lambda run: (run / "samples.jsonl").write_text('{"step": 2}\nx\n{"step": "a"}\n'),
    "a folder in place of a file": lambda run: ((run / "command.txt").unlink(), (run / "command.txt").mkdir()),
    "not a number": lambda run: (run / "metrics.jsonl").write_text('{"step": 1, "reward": NaN}\n{"step": 2, "reward": Infinity}\n'),
    "everything but the log gone": lambda run: [p.unlink() for p in run.iterdir() if p.is_file() and p.name != "metrics.jsonl"],
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_run_gives_warnings_and_the_others_their_numbers(copies: Runs, damage: str) -> None:
    DAMAGES[damage](copies["grpo", 1])
    report = reported(root(copies))
    page = render(report, "damaged")
    a, b = (score_of(copies["reinforce", s], "bleu") for s in SEEDS)
    assert numbers(cell(table(report, "Results"), "reinforce", "BLEU"))[0] == pytest.approx((a + b) / 2, abs=0.0051)
    assert f"{(a + b) / 2:.2f}" in page
    file = damage.split()[0]
    if damage.endswith(("cut off", "broken", "binary", "gone", "empty", "a list")) and (
        copies["grpo", 1] / file
    ).name.endswith((".json", ".jsonl", ".yaml")):
        assert any(file in w for w in report.warnings), report.warnings


def _places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside, containers before what they contain."""
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, item in items for place in ((*path, key), *_places(item, (*path, key)))]


def _replace(value: Any, path: tuple[Any, ...], new: Any) -> None:
    """Unless what contained it has been replaced already."""
    try:
        for key in path[:-1]:
            value = value[key]
        value[path[-1]] = copy.deepcopy(new)
    except (LookupError, TypeError):
        pass


OTHERS = (None, 3, -0.5, "x", [], {}, [1, "a"], [{"b": [2]}], {"value": "y"}, True)
FILES = (
    "result.json",
    "config.yaml",
    "data.json",
    "environment.json",
    "metrics.jsonl",
    "samples.jsonl",
    "outputs-after.jsonl",
)


@pytest.mark.parametrize("name", FILES)
def test_values_of_any_type_anywhere_do_no_harm(copies: Runs, name: str) -> None:
    """A newer or older alignkit may write other things: each file with values at random places replaced."""
    rng, path = random.Random(name), copies["reinforce", 0] / name
    text = path.read_text()
    whole = (
        yaml.safe_load(text)
        if name.endswith("yaml")
        else [json.loads(x) for x in ([text] if name.endswith("json") else text.splitlines()[:4])]
    )
    places = _places(whole)
    for _ in range(6):
        content = copy.deepcopy(whole)
        for place in rng.sample(places, 4):
            _replace(content, place, rng.choice(OTHERS))
        path.write_text(
            json.dumps(content) if name.endswith("yaml") else "".join(json.dumps(x) + "\n" for x in content)
        )
        assert render(reported(str(path.parent), str(copies["grpo", 0])), "any", rows=2)


def test_an_empty_log_and_a_start_that_failed(copies: Runs, tmp_path: Path) -> None:
    (tmp_path / "runs" / "failed" / ".hydra").mkdir(parents=True)
    (tmp_path / "runs" / "begun").mkdir()
    shutil.copy(copies["grpo", 0] / "config.yaml", tmp_path / "runs" / "begun" / "config.yaml")
    (copies["grpo", 0] / "metrics.jsonl").write_text("")
    report = reported(root(copies))
    assert any(
        "failed was begun, but has no record: it failed, or was ended, before its first step." in w
        for w in report.warnings
    )
    assert render(report, "x")


def test_other_held_out_rows_are_not_compared(copies: Runs) -> None:
    for seed in SEEDS:
        file = copies["grpo", seed] / "data.json"
        data = json.loads(file.read_text())
        data["sha256"]["data.test"] = "0" * 64
        file.write_text(json.dumps(data))
    report = reported(root(copies), baseline="reinforce")
    assert not any(t.title.startswith("Difference to") for t in report.stages[0].tables)
    assert any("Not the same held-out rows as reinforce: grpo" in w for w in report.warnings)
    assert not any("reinforce" in v and "grpo" in v for v in report.stages[0].verdicts)


def test_prompts_of_the_test_set_in_training_and_cut_off_answers_are_said(copies: Runs) -> None:
    file = copies["grpo", 0] / "data.json"
    data = json.loads(file.read_text())
    file.write_text(json.dumps(data | {"overlap": {"dev": 0, "test": 3}}))
    log = copies["grpo", 0] / "metrics.jsonl"
    log.write_text("".join(json.dumps(line | {"dev/cut_off": 0.375}) + "\n" for line in lines(log)))
    warnings = reported(str(copies["grpo", 0])).warnings
    assert any(f"3 of {data['rows']['test']} test prompts stand word for word" in w for w in warnings)
    assert any("38% of dev responses are cut off" in w for w in warnings)


# ---- the page --------------------------------------------------------------------------------------------------------------


class _Tags(HTMLParser):
    """Tags with their attributes, in order; names of elements that are open too long."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in ("meta", "link", "input", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


def test_any_text_is_only_text(copies: Runs) -> None:
    hostile = "</td><script>alert(1)</script><img src=x onerror=alert(2)> [bold]b[/bold] {{ 7*7 }} \u202e \x00 ]]>"
    for key in copies:
        path = copies[key] / "outputs-after.jsonl"
        rows = [line | {"prompt": hostile, "response": hostile, "references": [hostile]} for line in lines(path)]
        path.write_text("".join(json.dumps(r) + "\n" for r in rows))
        samples = [line | {"prompt": hostile, "response": hostile} for line in lines(copies[key] / "samples.jsonl")]
        (copies[key] / "samples.jsonl").write_text("".join(json.dumps(r) + "\n" for r in samples))
        (copies[key] / "command.txt").write_text(f"alignkit train '{hostile}'\n")
        config = (copies[key] / "config.yaml").read_text()
        (copies[key] / "config.yaml").write_text(
            re.sub(r"(?m)^name: .*", f"name: {json.dumps('<b onclick=x>' + key[0])}", config)
        )
        result = result_of(copies[key])
        result["audit"] = [{"name": "x", "step": 1, "text": hostile}]
        (copies[key] / "result.json").write_text(json.dumps(result | {"name": f"<b onclick=x>{key[0]}"}))
    page = render(reported(root(copies)), hostile)
    tags = _Tags(page).tags
    assert [tag for tag, _ in tags].count("script") == 1
    assert not any(tag in ("b", "img") for tag, _ in tags)
    assert not any(name.startswith("on") for _, attributes in tags for name in attributes)
    assert "{{ 7*7 }}" in page and "&lt;script&gt;alert(1)" in page


def test_the_page_is_whole_and_fetches_nothing(runs: Runs) -> None:
    page = render(reported(root(runs)), "whole")
    found = _Tags(page)
    assert not found.open
    tags = found.tags
    assert next(a for tag, a in tags if tag == "html")["lang"] == "en"
    assert all((a.get("href") or "#").startswith(("#", "data:")) for _, a in tags)
    assert not any((a.get("src") or "data:")[:5] != "data:" for _, a in tags)
    assert "url(" not in page and "@import" not in page and "http://" not in page
    idents = [a["id"] for _, a in tags if "id" in a]
    assert len(idents) == len(set(idents))
    assert {a["href"][1:] for tag, a in tags if tag == "a" and a["href"]} <= set(idents)
    levels = [int(tag[1]) for tag, _ in tags if re.fullmatch(r"h\d", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(b <= a + 1 for a, b in pairwise(levels)), "no level of headings is left out"
    assert all(a.get("scope") in ("row", "col") for tag, a in tags if tag == "th")
    charts_ = [a for tag, a in tags if tag == "svg" and a.get("aria-hidden") != "true"]
    assert charts_ and all(a["role"] == "img" and a["aria-labelledby"] for a in charts_)


def test_what_the_page_shows_of_texts_is_what_the_files_hold(runs: Runs) -> None:
    page = render(reported(root(runs)), "texts", rows=3)
    text = re.sub(r"&#39;", "'", page)
    before, after = (lines(runs["grpo", 0] / f"outputs-{when}.jsonl") for when in ("before", "after"))
    for row in (*before[:3], *after[:3]):
        assert row["response"] in text and row["references"][0] in text
    assert page.count('<article class="card"') == 3
    last = lines(runs["grpo", 0] / "samples.jsonl")[-16]
    assert last["response"] in text
    starts = (runs["grpo", 0] / "command.txt").read_text().strip()
    assert starts.split()[0] in page
    assert result_of(runs["grpo", 0])["weights_sha256"][:12] in page
    assert json.loads((runs["grpo", 0] / "data.json").read_text())["sha256"]["data.test"][:16] in page


def test_a_chart_has_a_line_a_point_and_words() -> None:
    line = charts.Series("a<b", [0.0, 1.0, 2.0], [1.0, 3.0, 2.0], [0.0, 2.0, 1.0], [2.0, 4.0, 3.0])
    svg = charts.line_chart("t & u", "step", "y", [line], "c")
    assert "a&lt;b: 1 at step 0, 2 at 2; highest 3 at 1, lowest 1 at 0." in svg
    assert svg.count("<circle") == 3 and "t &amp; u" in svg and 'class="band c0"' in svg
    assert "a<b" not in svg and "t & u" not in svg
    flat = charts.line_chart("t", "x", "y", [charts.Series("one", [5.0], [0.0])], "d")
    assert "nan" not in flat and "inf" not in flat


def test_long_lines_are_means_of_neighbours() -> None:
    line = charts.binned(charts.Series("a", [float(i) for i in range(600)], [float(i % 10) for i in range(600)]))
    assert len(line.xs) == charts.POINTS
    assert line.ys == pytest.approx([4.5] * charts.POINTS) and line.xs[0] == 4.5


@pytest.mark.parametrize(
    ("low", "high", "want"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.31, 0.74, [0.4, 0.5, 0.6, 0.7]),
        (-3, 3, [-2, 0, 2]),
        (0, 40, [0, 10, 20, 30, 40]),
        (2, 2, [2]),
    ],
)
def test_ticks_are_round(low: float, high: float, want: list[float]) -> None:
    assert charts.ticks(low, high) == pytest.approx(want)


def test_numbers_have_the_digits_that_their_spread_deserves() -> None:
    assert number(41.2849, "bleu") == "41.28" and number(0.51234, "reward") == "0.512"
    assert number(0.000123, "loss") == "0.00012" and number(0.000123, "loss", spread=0.00001) == "0.00012"
    assert number(1234567.0, "x") == "1,234,567" and number(math.nan, "x") == "nan"


# ---- the verbs -------------------------------------------------------------------------------------------------------------


def test_report_writes_the_page_into_the_folder_and_prints_tables(copies: Runs, cli: Cli) -> None:
    code, out, err = cli("report", root(copies))
    assert (code, err) == (0, "")
    page = Path(root(copies)) / "report.html"
    assert f"report: {page}" in out
    mean = sum(score_of(copies["grpo", s], "bleu") for s in SEEDS) / 2
    assert f"{mean:.2f}" in out and f"{mean:.2f}" in page.read_text()
    assert cli("report", root(copies), "--baseline", "reinforce", "-o", "x.html")[0] == 0
    assert "Difference to reinforce" in Path("x.html").read_text()


def test_globs_are_of_runs(copies: Runs, cli: Cli) -> None:
    code, out, _ = cli("report", f"{root(copies)}/grpo-*", "-o", "g.html")
    assert code == 0 and "grpo" in out and "reinforce" not in out
    (Path(root(copies)) / "feedback.sqlite").write_text("x")  # as a shell's glob hands it over
    names = [str(p) for p in Path(root(copies)).iterdir()]
    assert cli("report", *names, "-o", "h.html")[0] == 0


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["report", "nowhere"], "nowhere: no such run or folder"),
        (["report", "nothing-*"], "nothing-*: nothing matches"),
        (["report", "."], "there is no run in it"),
        (["report"], "the following arguments are required: RUN"),
        (["report", ".", "--row", "3"], "unrecognized arguments"),
        (["report", ".", "--rows", "-1"], "invalid"),
        (["table", ".", "--markdown", "--csv"], "not allowed with"),
        (["compare", "."], "the following arguments are required: B"),
        (["reprot"], "Did you mean 'report'"),
    ],
)
def test_mistakes_get_one_message(cli: Cli, words: list[str], says: str) -> None:
    code, _, err = cli(*words)
    assert code == 2 and says in err and "Traceback" not in err
    assert len(err.strip().splitlines()) == 1


def test_no_such_run_suggests_the_one_beside_it(copies: Runs, cli: Cli) -> None:
    name = str(copies["grpo", 0])
    assert f"Did you mean '{name}'" in cli("report", name[:-1])[2]


def test_compare_pairs_seeds_and_rows(runs: Runs, cli: Cli) -> None:
    code, out, _ = cli("compare", f"{root(runs)}/reinforce-*", f"{root(runs)}/grpo-*")
    assert code == 0 and "Seeds in both: 0, 1." in out and "algo.normalize" in out
    a, b = ([lines(runs[m, s] / "outputs-after.jsonl") for s in SEEDS] for m in ("reinforce", "grpo"))
    rewards = [np.mean([e["reward"] for e in y]) - np.mean([e["reward"] for e in x]) for x, y in zip(a, b, strict=True)]
    line = next(x for x in out.splitlines() if x.strip().startswith("reward "))
    # both means and their intervals, then the difference over seeds and the one over rows with theirs
    assert numbers(line)[6] == pytest.approx(np.mean(rewards), abs=0.0006)
    assert numbers(line)[9] == pytest.approx(np.mean(rewards), abs=0.0006)


def test_compare_two_runs_is_the_paired_bootstrap_of_their_outputs(runs: Runs, cli: Cli) -> None:
    both = [lines(runs[m, 0] / "outputs-after.jsonl") for m in ("reinforce", "grpo")]
    sentences = [
        metrics.sentences(
            [e["response"] for e in x], [e["references"] for e in x], {"reward": [e["reward"] for e in x]}
        )
        for x in both
    ]
    want = metrics.difference(sentences[0], sentences[1], 50)["chrf"]  # evaluate.bootstrap of these runs
    out = cli("compare", str(runs["reinforce", 0]), str(runs["grpo", 0]))[1]
    line = next(x for x in out.splitlines() if x.strip().startswith("chrF"))
    assert numbers(line)[-3:] == pytest.approx([want["value"], want["low"], want["high"]], abs=0.0051)
    assert "(one seed)" in line


def test_compare_says_what_cannot_be_compared(copies: Runs, cli: Cli) -> None:
    grpo, other = copies["grpo", 0], copies["reinforce", 0]
    data = json.loads((grpo / "data.json").read_text())
    data["sha256"]["data.test"] = "0" * 64
    (grpo / "data.json").write_text(json.dumps(data))
    result = result_of(grpo)
    (grpo / "result.json").write_text(json.dumps(result | {"stage": "sft"}))
    code, out, err = cli("compare", str(other), str(grpo))
    assert code == 0 and "different stages" in err and "not the same held-out rows" in err
    line = next(x for x in out.splitlines() if x.strip().startswith("BLEU"))
    assert line.rstrip().endswith("–") and "(one seed)" not in line
    code, _, err = cli("compare", root(copies), str(grpo))
    assert code == 2 and "configurations" in err and "Name one" in err


def test_compare_warns_of_other_ways_to_decode(copies: Runs, cli: Cli) -> None:
    file = copies["grpo", 0] / "config.yaml"
    file.write_text(re.sub(r"(?m)^  decode: .*", "  decode: beam", file.read_text()))
    assert (
        "not evaluated in the same way: evaluate.decode differ"
        in cli("compare", str(copies["reinforce", 0]), str(copies["grpo", 0]))[2]
    )
    assert any(
        "Not evaluated as grpo was (evaluate.decode differ): reinforce" in w
        for w in reported(str(copies["grpo", 0]), str(copies["reinforce", 0])).warnings
    )


def test_compare_of_other_rows_has_no_interval_over_rows(copies: Runs, cli: Cli) -> None:
    path = copies["grpo", 0] / "outputs-after.jsonl"
    path.write_text("".join(json.dumps(x) + "\n" for x in reversed(lines(path))))
    code, _, err = cli("compare", str(copies["reinforce", 0]), str(copies["grpo", 0]))
    assert code == 0 and "do not answer the same rows in the same order" in err


def test_tables_for_papers_and_programs(runs: Runs, cli: Cli) -> None:
    _, text, _ = cli("table", "--csv", root(runs), "--metrics", "chrf,reward")
    rows = list(csv.DictReader(io.StringIO(text)))
    assert [(r["configuration"], r["metric"]) for r in rows] == [
        (m, k) for m in sorted(METHODS) for k in ("chrf", "reward")
    ]
    for row in rows:
        values = [score_of(runs[row["configuration"], s], row["metric"]) for s in SEEDS]
        assert float(row["mean"]) == pytest.approx(sum(values) / 2, rel=1e-12)
        assert float(row["high"]) - float(row["mean"]) == pytest.approx(T1 * abs(values[0] - values[1]) / 2, rel=1e-6)
    _, latex, _ = cli("table", "--latex", root(runs))
    body = [x for x in latex.splitlines() if x.endswith(r"\\")]
    assert latex.startswith(r"\begin{tabular}{lrrrrrr}") and r"\toprule" in latex and r"exact match \%" in body[0]
    assert len({x.count(" & ") for x in body}) == 1
    _, markdown, _ = cli("table", root(runs))
    heads = markdown.splitlines()
    assert len({x.replace(r"\|", "").count("|") for x in heads}) == 1 and "±" in heads[2]
    code, _, err = cli("table", root(runs), "--metrics", "blue")
    assert code == 2 and "Did you mean 'bleu'" in err


def test_bootstrap_intervals_of_two_seeds_reach_from_one_to_the_other(runs: Runs, cli: Cli) -> None:
    _, text, _ = cli("table", "--csv", root(runs), "--metrics", "reward", "--interval", "bootstrap")
    for row in csv.DictReader(io.StringIO(text)):
        values = [score_of(runs[row["configuration"], s], "reward") for s in SEEDS]
        assert (float(row["low"]), float(row["high"])) == pytest.approx((min(values), max(values)))


def test_neither_torch_nor_matplotlib_is_imported(runs: Runs, tmp_path: Path) -> None:
    code = (
        "import sys; from alignkit.cli import main\n"
        f"main(['report', {root(runs)!r}, '-o', {str(tmp_path / 'r.html')!r}])\n"
        "assert not {'torch', 'matplotlib', 'transformers', 'hydra'} & set(sys.modules), sorted(sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_run_is_read_as_it_is(runs: Runs) -> None:
    run = read(runs["grpo", 1])
    assert (run.name, run.stage, run.seed, run.finished, run.steps, run.problems) == ("grpo", "rl", 1, True, 6, [])
    assert "seed" not in run.settings and not any(k.startswith("run.") for k in run.settings)
    assert Configuration("x", [run]).values("bleu") == {1: score_of(runs["grpo", 1], "bleu")}


# ---- several processes ---------------------------------------------------------------------------------------------------


def in_processes(run: Path, **record: Any) -> None:
    file = run / "environment.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | record), encoding="utf-8")


def test_costs_of_other_numbers_of_processes_are_marked(copies: Runs, cli: Cli) -> None:
    a, b = METHODS[:2]
    said = "Seconds are of the clock, however many processes shared the work"
    assert "in processes" not in table(reported(root(copies)), "Totals of a run").head
    assert said not in cli("compare", str(copies[a, 0]), str(copies[b, 0]))[1]
    in_processes(copies[b, 0], processes=4, shard=True, earlier_processes=[1])
    report = reported(root(copies))
    totals = table(report, "Totals of a run")
    label = next(c.label for c in report.configurations for run in c.runs if run.folder.name == copies[b, 0].name)
    other = next(c.label for c in report.configurations for run in c.runs if run.folder.name == copies[a, 0].name)
    assert cell(totals, label, "in processes") == "1 and 4" and cell(totals, other, "in processes") == "1"
    assert any(said in note for note in totals.notes)
    assert "The runs were made with different numbers of processes: 1, 4." in report.warnings
    out = cli("compare", str(copies[a, 0]), str(copies[b, 0]))[1]
    assert re.search(r"in processes +1 +1 and 4 ", out) and said in " ".join(out.split())
    assert re.search(r"(?m)^ processes +1 +4 ", cli("diff", str(copies[a, 0]), str(copies[b, 0]))[1])


def test_runs_of_before_do_not_say_how_many_processes(copies: Runs) -> None:
    for run in copies.values():
        file = run / "environment.json"
        record = {k: v for k, v in json.loads(file.read_text()).items() if k not in ("processes", "shard")}
        file.write_text(json.dumps(record), encoding="utf-8")
    in_processes(next(iter(copies.values())), processes=2, shard=False)
    report = reported(root(copies))
    assert "in processes" not in table(report, "Totals of a run").head
    assert not [w for w in report.warnings if "numbers of processes" in w]


def test_an_unfinished_run_goes_on_only_from_what_it_has_saved(copies: Runs) -> None:
    run = next(iter(copies.values()))
    (run / "result.json").unlink()
    assert any(
        "Nothing of it is saved: its command starts from the beginning." in w for w in reported(str(run)).warnings
    )
    (run / "checkpoint-2" / "state").mkdir(parents=True)
    (run / "checkpoint-2" / "state" / "run.json").write_text("{}")
    assert any("Repeat its command to go on." in w for w in reported(str(run)).warnings)


@pytest.mark.parametrize(
    ("value", "text"), [(1.1e-16, "0.000"), (-1e-17, "0.000"), (2e-4, "+0.0002"), (-0.25, "-0.250")]
)
def test_a_difference_that_is_rounding_is_none(value: float, text: str) -> None:
    assert _signed(value, "length_ratio") == text
