"""Claims: the verdict is worked by hand, the runs are real."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from running import SMALL_RUN, SMALL_SEQ2SEQ

from alignkit import claim
from alignkit.claim import Check
from alignkit.cli import main
from alignkit.errors import UserError

ROOT = Path(__file__).resolve().parent.parent


def results(**arms: list[float]) -> dict[str, dict[int, dict[str, Any]]]:
    return {
        arm: {seed: {"evaluation": {"x": {"value": v}}, "steps": 10} for seed, v in enumerate(values)}
        for arm, values in arms.items()
    }


def check(**settings: Any) -> Check:
    given = {"says": "s", "metric": "evaluation.x.value", "of": "new", "than": "old", "direction": "higher", **settings}
    return Check(**given)


def test_interval_by_hand() -> None:
    """1, 2, 3: mean 2, deviation 1, t(2) = 4.303, half 4.303 / sqrt(3) = 2.484."""
    assert claim.interval([1.0, 2.0, 3.0], "difference") == pytest.approx((2.0, -0.484, 4.484), abs=1e-3)
    # logarithms 0, ln 4: mean ln 2, deviation ln 4 / sqrt 2, half 12.706 ln 4 / 2 = 8.807
    assert claim.interval([1.0, 4.0], "ratio") == pytest.approx(
        (2.0, 2 * math.exp(-8.807), 2 * math.exp(8.807)), rel=1e-3
    )


@pytest.mark.parametrize(
    ("new", "settings", "verdict"),
    [
        ([3.0, 3.1, 2.9], {}, "PASS"),
        ([3.0, 3.1, 2.9], {"least": 1.5}, "PASS"),
        ([3.0, 3.1, 2.9], {"least": 2.0}, "INCONCLUSIVE"),  # 2 lies in the interval of the mean 2
        ([3.0, 3.1, 2.9], {"least": 3.0}, "FAIL"),
        ([3.0, 3.1, 2.9], {"direction": "lower"}, "FAIL"),
        ([0.5, 0.6, 0.4], {"direction": "lower"}, "PASS"),
        ([3.0, 0.1, 0.9], {}, "INCONCLUSIVE"),
        ([3.0, 3.1, 2.9], {"effect": "ratio"}, "PASS"),
        ([0.5, 0.5, 0.49], {"effect": "ratio", "direction": "lower", "least": 0.6}, "PASS"),
        ([3.0], {}, "INCONCLUSIVE"),
        ([3.0, 3.1, -2.9], {"effect": "ratio"}, "INCONCLUSIVE"),
    ],
)
def test_verdicts(new: list[float], settings: dict[str, Any], verdict: str) -> None:
    assert claim.measure(check(**settings), results(new=new, old=[1.0, 1.0, 1.0]), len(new)).verdict == verdict


def test_effects_are_paired_by_seed() -> None:
    """Seeds differ by 100, arms by 1: paired it is plain, unpaired it would drown."""
    found = claim.measure(check(), results(new=[101.0, 201.1, 300.9], old=[100.0, 200.0, 300.0]), 3)
    assert found.verdict == "PASS"
    assert found.effects == pytest.approx([1.0, 1.1, 0.9])


def test_a_control_that_has_the_effect_refutes_the_claim() -> None:
    arms = {"new": [3.0, 3.1, 2.9], "old": [1.0, 1.0, 1.0]}
    refuted = claim.measure(check(control="dummy"), results(dummy=[2.0, 2.1, 1.9], **arms), 3)
    assert refuted.verdict == "FAIL" and "without the idea" in refuted.why
    stands = claim.measure(check(control="dummy"), results(dummy=[1.0, 1.2, 0.8], **arms), 3)
    assert stands.verdict == "PASS" and "has less of it" in stands.why
    assert claim.measure(check(control="dummy"), results(dummy=[], **arms), 3).verdict == "INCONCLUSIVE"
    # 9, −5, 8 less 1: the control's interval holds 0, and its lead over the idea too: it may be as good, or better
    noisy = claim.measure(check(control="dummy"), results(dummy=[9.0, -5.0, 8.0], **arms), 3)
    assert noisy.verdict == "INCONCLUSIVE" and "may have as much of it" in noisy.why
    uneven = results(dummy=[1.0, 1.2, 0.8], **arms)
    uneven["dummy"][2]["steps"] = 12
    told = claim.measure(check(control="dummy", budget="steps"), uneven, 3)
    assert (
        told.verdict == "INCONCLUSIVE"
        and "the control: unequal budgets, seed 2: steps is 12 of dummy, 10 of old" in told.why
    )


def test_what_is_not_finite_is_missing() -> None:
    found = claim.measure(check(), results(new=[3.0, math.nan, math.inf], old=[1.0, 1.0, 1.0]), 3)
    assert found.verdict == "INCONCLUSIVE" and found.effects == [2.0]


def test_seeds_that_do_not_differ_are_said() -> None:
    found = claim.measure(check(), results(new=[2.0, 2.0], old=[1.0, 1.0]), 2)
    assert found.verdict == "PASS" and "the seeds do not differ" in found.why


def test_unequal_budgets_decide_nothing() -> None:
    found = results(new=[3.0, 3.1, 2.9], old=[1.0, 1.0, 1.0])
    assert claim.measure(check(budget="steps"), found, 3).verdict == "PASS"
    found["new"][1]["steps"] = 11
    told = claim.measure(check(budget="steps"), found, 3)
    assert told.verdict == "INCONCLUSIVE" and "unequal budgets, seed 1: steps is 11 of new, 10 of old" in told.why
    assert "not recorded" in claim.measure(check(budget="samples"), found, 3).why


def test_a_step_of_a_pipeline_is_an_arm(tmp_path: Path) -> None:
    for step, value in (("a", 5.0), ("b", 2.0)):
        (tmp_path / step).mkdir()
        (tmp_path / step / "result.json").write_text(json.dumps({"x": value}), encoding="utf-8")
    whole = {"all": {s: {"steps_done": {k: str(tmp_path / k) for k in ("a", "b")}} for s in (0, 1)}}
    found = claim.measure(check(of="all/a", than="all/b", metric="x"), whole, 2)
    assert found.effects == [3.0, 3.0] and found.verdict == "PASS"
    assert "no x in all/c" in claim.measure(check(of="all/c", than="all/b", metric="x"), whole, 2).why


def test_one_number_is_an_effect_by_itself() -> None:
    """1, 2, 3: 2 [-0.484, 4.484]; of 60, 61, 62 all is above 50."""
    alone = check(than=None, least=50.0)
    assert claim.measure(alone, results(new=[60.0, 61.0, 62.0]), 3).verdict == "PASS"
    assert claim.measure(alone, results(new=[1.0, 2.0, 3.0]), 3).verdict == "FAIL"
    assert claim.measure(check(than=None), results(new=[1.0, 2.0, 3.0]), 3).verdict == "INCONCLUSIVE"
    refuted = claim.measure(check(than=None, control="old"), results(new=[5.0, 6.0, 7.0], old=[5.0, 6.0, 7.0]), 3)
    assert refuted.verdict == "FAIL" and "without the idea" in refuted.why


def test_two_numbers_of_one_run_are_compared() -> None:
    runs = {"new": {s: {"a": 2.0 + s / 10, "b": 1.0} for s in (0, 1, 2)}}
    found = claim.measure(check(metric="a", than="new", than_metric="b"), runs, 3)
    assert found.verdict == "PASS" and found.effects == pytest.approx([1.0, 1.1, 1.2])
    assert "no c in new" in claim.measure(check(metric="a", than="new", than_metric="c"), runs, 3).why


def test_a_metric_is_read_where_another_first_reaches_a_level(tmp_path: Path) -> None:
    """Reward 0, 2, 6, 5 at KL 0 (not logged yet), 1, 3, 5: at KL 2 it is half way from 2 to 6."""
    lines = [{"r": 0.0}, {"kl": 1.0, "r": 2.0}, {"kl": 2.9}, {"kl": 3.0, "r": 6.0}, {"kl": 5.0, "r": 5.0}]
    (tmp_path / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n", encoding="utf-8")
    points = claim.trace(tmp_path, "r")
    assert points == [(0.0, 0.0), (1.0, 2.0), (3.0, 6.0), (5.0, 5.0)]
    assert (
        claim.reached(points, 2.0) == 4.0 and claim.reached(points, 0.5) == 1.0 and claim.reached(points, 6.0) is None
    )
    runs = {"new": {0: {"directory": str(tmp_path)}, 1: {"directory": str(tmp_path)}}}
    found = claim.measure(check(metric="r", than=None, at={"kl": 2.0}), runs, 2)
    assert found.effects == [4.0, 4.0]
    assert "no r at kl 6 in new" in claim.measure(check(metric="r", than=None, at={"kl": 6.0}), runs, 2).why


def test_overall() -> None:
    one = {v: claim.Found(v, "", []) for v in claim.VERDICTS}
    assert claim.overall(one) == "FAIL"
    assert claim.overall({k: one[k] for k in ("PASS", "INCONCLUSIVE")}) == "INCONCLUSIVE"
    assert claim.overall({"PASS": one["PASS"]}) == "PASS"


SHIPPED = sorted(p.stem for p in (claim.conf_dir() / "claim").glob("*.yaml"))


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_claims_can_be_run(name: str) -> None:
    """Their words compose, and their pipelines have the steps that they name."""
    from running import composed

    from alignkit.stages import pipeline

    found = claim.load(name)
    assert found.name == name
    for arm, words in found.arms.items():
        for more in ([], found.quick):
            cfg = composed([*words, *found.words, *more])
            if cfg.stage == "pipeline":
                steps = pipeline.steps(cfg)
                named = {
                    end.partition("/")[2]
                    for c in found.checks.values()
                    for end in (c.of, c.than or arm, c.control or arm)
                    if end.partition("/")[0] == arm
                }
                assert named - {""} <= set(steps)


TINY = {
    "name": "tiny", "paper": "none", "scale": "tiny",
    "arms": {"long": ["+algo=sft", "algo.steps=8"], "short": ["+algo=sft", "algo.steps=2"]},
    "words": ["data=rnnlg", *SMALL_SEQ2SEQ, *SMALL_RUN, "algo.batch_size=8", "evaluate.every=0", "algo.lr=0.02", "algo.warmup=0"],
    "seeds": [0, 1, 2], "quick_seeds": [0],
    "checks": {
        "steps": {"says": "more steps are more steps", "metric": "steps", "of": "long", "than": "short", "direction": "higher", "least": 5.5},
        "longer": {"says": "fewer steps are more", "metric": "steps", "of": "short", "than": "long", "direction": "higher"},
    },
}  # fmt: skip


def place(folder: Path, **changes: Any) -> Path:
    (folder / "claim").mkdir(exist_ok=True)
    (folder / "claim" / "tiny.yaml").write_text(yaml.safe_dump({**TINY, **changes}), encoding="utf-8")
    return folder


def test_the_command_runs_what_is_missing_and_exits_by_the_verdict(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["claim", "tiny", "--config-dir", str(place(tmp_path)), f"run.root={tmp_path}/runs"]
    with pytest.raises(SystemExit) as left:
        main(words)
    assert left.value.code == 1  # one of the two fails
    told = capsys.readouterr().out
    html = (tmp_path / "runs" / "claims" / "tiny" / "claim.html").read_text(encoding="utf-8")
    assert "<h1>tiny: FAIL</h1>" in html and "more steps are more steps" in html and "6 [6, 6] (long − short)" in html
    assert "# tiny: FAIL" in told and "| more steps are more steps | 6 [6, 6] (long − short) | 3 |" in told
    record = json.loads((tmp_path / "runs" / "claims" / "tiny" / "claim.json").read_text(encoding="utf-8"))
    assert record["checks"]["steps"]["verdict"] == "PASS" and record["checks"]["longer"]["verdict"] == "FAIL"
    assert len(set(record["runs"]["long"].values())) == 3
    with pytest.raises(SystemExit) as left:
        main([*words, "--quick"])
    assert left.value.code == 2
    again = capsys.readouterr()
    assert again.out.count("is finished; nothing to do") == 2  # seed 0 of both arms
    assert "# tiny: INCONCLUSIVE (quick: no verdict to quote)" in again.out
    assert "This was a quick look" in (tmp_path / "runs" / "claims" / "tiny-quick" / "claim.html").read_text(
        encoding="utf-8"
    )
    with pytest.raises(SystemExit) as left:  # other words: beside the verdict, not in its place
        main([*words, "--seeds", "0", "1", "algo.lr=0.01"])
    beside = [p.name for p in (tmp_path / "runs" / "claims").iterdir()]
    assert len(beside) == 3 and json.loads((tmp_path / "runs" / "claims" / "tiny" / "claim.json").read_text())[
        "seeds"
    ] == [0, 1, 2]


def test_an_arm_that_cannot_be_composed_is_refused_before_any_is_run(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arms = {**TINY["arms"], "short": ["+algo=sft", "algo.lrr=1"]}
    with pytest.raises(SystemExit) as left:
        main(["claim", "tiny", "--config-dir", str(place(tmp_path, arms=arms)), f"run.root={tmp_path}/runs"])
    assert left.value.code == 2
    told = capsys.readouterr().err
    assert "arms.short:" in told and "algo.lrr: unknown" in told and not (tmp_path / "runs").exists()


def test_an_arm_that_fails_leaves_the_claim_open(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arms = {**TINY["arms"], "short": ["+algo=sft", "algo.steps=0"]}
    with pytest.raises(SystemExit) as left:
        main(["claim", "tiny", "--config-dir", str(place(tmp_path, arms=arms, seeds=[0])), f"run.root={tmp_path}/runs"])
    assert left.value.code == 2
    told = capsys.readouterr()
    assert "error: short, seed 0:" in told.err and "steps" in told.err


def test_a_fault_in_one_arm_leaves_the_others(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A class of one's own that raises what nobody foresaw."""
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "faulty.yaml").write_text("_target_: faulty.Faulty\n", encoding="utf-8")
    (tmp_path / "faulty.py").write_text(
        "class Faulty:\n    def __call__(self, batch):\n        raise ZeroDivisionError('of its own')\n",
        encoding="utf-8",
    )
    arms = {
        "short": ["+algo=sft", "algo.steps=2"],
        "long": ["+algo=reinforce", "algo.steps=2", "reward=faulty"],
    }
    changes = {"arms": arms, "seeds": [0], "words": ["data=rnnlg", *SMALL_SEQ2SEQ, *SMALL_RUN, "evaluate.every=0"]}
    with pytest.raises(SystemExit) as left:
        main(["claim", "tiny", "--config-dir", str(place(tmp_path, **changes)), f"run.root={tmp_path}/runs"])
    assert left.value.code == 2
    record = json.loads((tmp_path / "runs" / "claims" / "tiny" / "claim.json").read_text(encoding="utf-8"))
    assert list(record["runs"]["short"]) == ["0"] and record["runs"]["long"] == {}
    assert "error: long, seed 0: " in capsys.readouterr().err


def test_docs_hold_the_verdicts_as_they_were_measured() -> None:
    """docs/papers.md is what scripts/claims_table.py writes, and no verdict there is of a quick look."""
    spec = importlib.util.spec_from_file_location("claims_table", ROOT / "scripts" / "claims_table.py")
    assert spec is not None and spec.loader is not None
    table = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(table)
    text = (ROOT / "docs" / "papers.md").read_text(encoding="utf-8")
    assert table.written(text) == text
    for file in (ROOT / "docs" / "claims").glob("*.json"):
        record = json.loads(file.read_text(encoding="utf-8"))
        found = claim.load(record["claim"])
        assert (
            not record["quick"]
            and record["seeds"] == found.seeds
            and record["words"] == []
            and len(record["commits"]) >= 1
        )
        assert (
            record["definition"] == {key: vars(one) for key, one in found.checks.items()}
            and record["arms"] == found.arms
        )
        for key, one in record["checks"].items():
            again = claim.interval(one["effects"], found.checks[key].effect)
            assert again == pytest.approx((one["mean"], one["low"], one["high"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"check": {}}, "check: no such key. Did you mean 'checks'"),
        ({"checks": {}}, "there is nothing to measure"),
        ({"checks": {"a": {**TINY["checks"]["steps"], "of": "lang"}}}, "checks.a.of: 'lang' is no arm. Did you mean 'long'"),
        ({"checks": {"a": {**TINY["checks"]["steps"], "direction": "up"}}}, "must be higher or lower"),
        ({"checks": {"a": {"says": "x"}}}, "must be given"),
        ({"checks": {"a": {**TINY["checks"]["steps"], "than": None, "budget": "steps"}}}, "checks.a.budget: there is nothing to compare with"),
        ({"checks": {"a": {**TINY["checks"]["steps"], "than": None, "effect": "ratio"}}}, "a ratio needs than"),
        ({"checks": {"a": {**TINY["checks"]["steps"], "at": {"kl": 1, "x": 2}}}}, "give one column and its value"),
    ],
)  # fmt: skip
def test_a_file_with_a_mistake_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as told:
        claim.load("tiny", [place(tmp_path, **changes)])
    assert message in str(told.value) and "tiny.yaml" in str(told.value)


def test_an_unknown_claim_is_refused_with_a_suggestion(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as left:
        main(["claim", "pcrn"])
    assert left.value.code == 2
    assert "there is no such claim. Did you mean 'pcrm'" in capsys.readouterr().err
