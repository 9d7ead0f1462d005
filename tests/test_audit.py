"""The audit: each measure by hand, each alarm on a collapse and on a healthy run, and real runs through ``train``."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from running import SMALL_CAUSAL, SMALL_RL, SMALL_SFT, command, composed, lines, train
from test_stage_rl import stop_after

from alignkit.audit import Audit, copied, distinct, error, measures, ngrams, repetition, rings, words
from alignkit.batch import Batch
from alignkit.cli import hydra_words
from alignkit.config import AuditSettings, check, schema_keys
from alignkit.errors import Stopped, UserError
from alignkit.rewards.rule import Constant
from alignkit.run import Run

# ---- measures --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("ids", "share"),
    [
        ([], 0.0),
        ([7, 7], 0.0),  # no 3-gram
        ([1, 2, 3, 4, 5], 0.0),
        ([7, 7, 7, 7], 1 / 2),  # 777 777
        ([1, 2, 3, 1, 2, 3], 1 / 4),  # 123 231 312 123
        ([5] * 12, 9 / 10),
    ],
)
def test_repetition(ids: list[int], share: float) -> None:
    assert repetition(ids) == pytest.approx(share)


def test_distinct() -> None:
    responses = [[1, 2, 3], [1, 2, 1]]
    assert distinct(responses, 1) == 3 / 6
    assert distinct(responses, 2) == 3 / 4  # 12 23 12 21; none across two responses
    assert distinct([[1], []], 2) == 1.0


def test_copied() -> None:
    prompt = set(ngrams(words("name='Red Door'; area=north"), 3))
    assert copied("red door", prompt) == 0.0  # no 3-gram
    assert copied("'red door' is north", prompt) == 2 / 4  # 'red door | red door '; not door ' is | ' is north
    assert copied("NAME='RED DOOR'; AREA=NORTH", prompt) == 1.0
    assert copied("one two three", set()) == 0.0


def test_words() -> None:
    assert words("The cat's 3rd day, Äh!") == ["the", "cat", "'", "s", "3rd", "day", ",", "äh", "!"]


def batch(ids: list[list[int]], sizes: list[int], texts: list[str], **more: Any) -> Batch:
    """Responses of these tokens and texts, ``sizes`` of them to each prompt; the prompts are ``a b c d``, then chat."""
    mask = torch.arange(max(map(len, ids))) < torch.tensor([len(x) for x in ids])[:, None]
    padded = torch.zeros(mask.shape, dtype=torch.long)
    padded[mask] = torch.tensor([token for x in ids for token in x])
    prompts = ["a b c d", [{"role": "system", "content": "a b"}, {"role": "user", "content": "x y z"}]]
    rows = [{"id": g, "prompt": prompts[g % 2], "references": [["abc"], []][g % 2]} for g in range(len(sizes))]
    group = torch.tensor([g for g, n in enumerate(sizes) for _ in range(n)])
    one = torch.ones(len(ids), 1, dtype=torch.long)
    return Batch(
        prompt_ids=one, prompt_mask=one.bool(), response_ids=padded, mask=mask, group=group,
        rows=[rows[g] for g in group.tolist()], responses=texts,
        scores=more.get("scores"), extra={"ended": more.get("ended", torch.ones(len(ids), dtype=torch.bool))},
    )  # fmt: skip


def test_measures_are_means_over_prompts() -> None:
    """Two responses to the first prompt and one to the second, so that means over responses would differ."""
    given = batch(
        [[7, 7, 7, 7], [1, 2], [1, 2, 3]], [2, 1], ["a b c e", "a b c e", "b x y z"],
        scores=torch.tensor([0.0, 1.0, 0.25]), ended=torch.tensor([True, False, True]),
    )  # fmt: skip
    assert measures([given], Constant(value=3.0)) == {
        "length": [3.0, 3.0],
        "cut_off": [0.5, 0.0],
        "repetition": [0.25, 0.0],  # 1/2 and 0; 0
        "copy": [0.5, 0.5],  # abc, not bce; xyz of the user's turn, not bxy
        "reward": [0.5, 0.25],
        "second": [3.0, 3.0],
        "unique": [0.5, 1.0],
        "reference": [pytest.approx(CHRF)],  # the second prompt has none
        "distinct_1": [4 / 7],  # 7777 and 123
        "distinct_2": [3 / 5],  # 77 77 77, 12 23
    }
    alone = measures([given.take(torch.tensor([2]))])
    assert not {"unique", "reference", "second"} & set(alone), "not known, rather than 0"


# chrF ignores spaces: "abce" against "abc". Shares of n-grams that match: precision 3/4 2/3 1/2 0, recall 1 1 1; means
# over the orders that both have, 1 to 3: P = 23/36, R = 1; F with beta 2 is 5 P R / (4 P + R)
CHRF = 100 * 5 * (23 / 36) / (4 * (23 / 36) + 1)


def test_references_are_consulted_for_the_first_prompts() -> None:
    given = batch([[1]] * 6, [1] * 6, ["abc", "abc", "abc", "abc", "zzz", "zzz"])
    assert measures([given])["reference"] == pytest.approx([100, 100, 0])
    assert measures([given, given], referred=3)["reference"] == pytest.approx([100, 100, 100, 100])  # two of each batch


def test_the_second_reward_leaves_torchs_generator_alone() -> None:
    given = batch([[1, 2]], [1], ["a"])
    torch.manual_seed(0)
    one = torch.rand(1)
    torch.manual_seed(0)
    measures([given], lambda b: torch.rand(len(b)))  # type: ignore[arg-type, return-value]
    assert torch.equal(torch.rand(1), one)


def test_the_error_of_a_mean() -> None:
    assert error([1.0, 3.0]) == pytest.approx(1.0)  # deviation sqrt(2), over sqrt(2)
    assert error([2.0, 2.0, 2.0]) == 0
    assert error([5.0]) == float("inf")


# ---- alarms ----------------------------------------------------------------------------------------------------------

HEALTHY = {
    "length": [10.0, 14.0], "repetition": [0.0, 0.02], "copy": [0.1, 0.2], "distinct_2": [0.8], "reward": [0.4, 0.5, 0.6],
    "reference": [50.0, 60.0, 70.0], "second": [0.4, 0.5, 0.6],
}  # fmt: skip
BETTER = {"reward": [0.9, 0.9, 1.0]}


@pytest.mark.parametrize(
    ("changed", "names"),
    [
        ({}, []),
        (BETTER, []),
        ({**BETTER, "reference": [50.0, 58.0, 66.0], "second": [0.3, 0.5, 0.6]}, []),  # within the noise
        ({**BETTER, "reference": [1.0], "second": [0.0]}, []),  # one value says nothing of others
        ({"reference": [1.0, 1.0, 1.0], "second": [0.0, 0.0, 0.0]}, []),  # bad, but no gain to the reward
        ({"length": [16.0, 19.0], "repetition": [0.1, 0.1], "copy": [0.3, 0.3], "distinct_2": [0.41]}, []),
        ({"length": [17.0, 19.5]}, ["length"]),  # 18.25 of 12
        ({"length": [7.9, 7.9]}, ["length"]),
        ({"length": [8.1, 8.1]}, []),
        ({"repetition": [0.1, 0.13]}, ["repetition"]),  # 0.115 over 0.01
        ({"distinct_2": [0.39]}, ["diversity"]),
        ({"copy": [0.3, 0.42]}, ["copy"]),
        ({**BETTER, "reference": [20.0, 22.0, 24.0]}, ["reference"]),
        ({**BETTER, "second": [0.1, 0.1, 0.0]}, ["second"]),
    ],
)
def test_what_rings(changed: dict[str, list[float]], names: list[str]) -> None:
    found = rings(AuditSettings(), HEALTHY, {**HEALTHY, **changed})
    assert [name for name, one in found.items() if one] == names
    assert set(found) == {"length", "repetition", "diversity", "copy", "reference", "second"}


def test_the_same_prompts_are_compared_one_by_one() -> None:
    """Each loses as much: far below the spread over prompts, and beyond doubt."""
    now = {**HEALTHY, "reward": [0.45, 0.55, 0.66], "reference": [48.0, 58.0, 68.1]}
    assert not rings(AuditSettings(), HEALTHY, now)["reference"]
    assert rings(AuditSettings(), HEALTHY, now, paired=True)["reference"]


def test_an_alarm_can_be_switched_off() -> None:
    off = AuditSettings(length=None, repetition=None, diversity=None, copy=None, spread=None)
    assert rings(off, HEALTHY, {**HEALTHY, "length": [99.0]}) == {}
    assert "second" not in rings(AuditSettings(), {k: v for k, v in HEALTHY.items() if k != "second"}, HEALTHY)


def series(audit: Audit, lengths: list[int]) -> list[float]:
    """Whether ``audit/length`` rings at each step of a series of mean lengths."""
    found = []
    for step, n in enumerate(lengths, 1):
        given = batch([list(range(n)), list(range(n))], [1, 1], ["a", "b"], scores=torch.tensor([0.5, 0.6]))
        found.append(audit.look(step, [given])["audit/length"])
    return found


def test_an_alarm_says_what_was_seen_once() -> None:
    audit = Audit(AuditSettings(window=2))
    assert series(audit, [10, 12, 11, 13]) == [0, 0, 0, 0]
    assert series(Audit(AuditSettings(window=2)), [10, 12, 20, 20, 10, 10]) == [0, 0, 0, 1, 0, 0]  # 11, 16, 20, 15, 10
    audit = Audit(AuditSettings(window=2))
    series(audit, [10, 12, 20, 20])
    assert audit.alarms == [
        {
            "name": "audit/length",
            "step": 4,
            "was": 11.0,
            "is": 20.0,
            "text": "audit/length rings at step 4: the mean length of a response, in tokens, went from 11 (steps 1 to 2) "
            "to 20 (steps 3 to 4).",
        }
    ]
    assert audit.new == [audit.alarms[0]["text"]] and audit.ringing == ["audit/length"] and not audit.over
    audit.look(5, [batch([[1] * 20], [1], ["a"], scores=torch.tensor([0.5]))])
    assert len([a for a in audit.alarms if a["name"] == "audit/length"]) == 1
    assert not any("length" in text for text in audit.new)


def test_dev_has_a_start_of_its_own() -> None:
    audit = Audit(AuditSettings(window=2, stop=True))
    long, short = (batch([list(range(n))], [1], ["a"], scores=torch.tensor([0.5])) for n in (20, 5))
    audit.look(0, [long], "dev/")
    series(audit, [5, 5])
    assert not audit.alarms
    found = audit.look(2, [short], "dev/")
    assert (found["dev/length"], found["dev/audit/length"]) == (5.0, 1.0)
    text = audit.alarms[0]["text"]
    assert text.startswith("dev/audit/length rings") and "went from 20 (step 0) to 5 (step 2)" in text
    assert audit.ringing == [] and not audit.over, "what ends the run is looked at after samples alone"
    series(audit, [5])
    assert audit.over


def test_the_state_is_json_and_brings_back_every_look() -> None:
    whole, broken = (Audit(AuditSettings(window=2)) for _ in range(2))
    series(whole, [10, 12, 20, 20, 25])
    series(broken, [10, 12, 20])
    again = Audit(AuditSettings(window=2))
    again.load_state(json.loads(json.dumps(broken.state())))
    for step, n in ((4, 20), (5, 25)):
        again.look(step, [batch([list(range(n))] * 2, [1, 1], ["a", "b"], scores=torch.tensor([0.5, 0.6]))])
    assert again.state() == whole.state() and again.alarms


# ---- runs ------------------------------------------------------------------------------------------------------------

# a rate at which the small model, whose responses are all cut off at 8 tokens, learns within some steps to end them early
GAMED = [
    "+algo=reinforce", *SMALL_CAUSAL, *SMALL_RL, "data=rnnlg", "reward=length", "reward.target=4", "algo.k=8",
    "algo.prompts_per_step=8", "algo.lr=0.05", "algo.warmup=0", "algo.schedule=constant", "algo.steps=16", "algo.baseline=batch",
    "audit.window=2", "evaluate.every=8", "evaluate.test=false", "evaluate.select=reward", "run.samples_every=100",
]  # fmt: skip


@pytest.fixture(scope="module")
def gamed(tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], Path]:
    return train(tmp_path_factory.mktemp("gamed"), *GAMED)


def test_a_run_whose_length_collapses(gamed: tuple[dict[str, Any], Path]) -> None:
    result, run = gamed
    alarm = next(a for a in result["audit"] if a["name"] == "audit/length")
    assert alarm["is"] < alarm["was"] / 1.5
    logged = {m["step"]: m for m in lines(run / "metrics.jsonl")}
    rung = [step for step, m in logged.items() if m.get("audit/length")]
    assert rung[0] == alarm["step"] > 2
    samples = {s["step"]: s.get("audit", []) for s in lines(run / "samples.jsonl")}
    assert "audit" not in next(s for s in lines(run / "samples.jsonl") if s["step"] == 1)
    assert "audit/length" in samples[alarm["step"]], "written although samples were not due"
    assert alarm["text"] in (run / "final" / "README.md").read_text()
    assert result["ended_by"] == "algo.steps"


def test_dev_is_watched_too(gamed: tuple[dict[str, Any], Path]) -> None:
    result, run = gamed
    found = {m["step"]: m for m in lines(run / "metrics.jsonl") if "dev/reward" in m}
    assert set(found) == {0, 8, 16}
    assert {"dev/length", "dev/repetition", "dev/copy", "dev/distinct_2", "dev/audit/length"} <= set(found[0])
    assert found[0]["dev/audit/length"] == 0
    assert [a["step"] for a in result["audit"] if a["name"] == "dev/audit/length"] == [
        step for step, m in found.items() if m["dev/audit/length"]
    ][:1]


def test_an_alarm_is_said_once_and_again_at_the_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    result, _ = train(tmp_path, *GAMED, "evaluate.every=0")
    said, text = capsys.readouterr(), result["audit"][0]["text"]
    assert said.err.count(text) == 1 and said.out.count(text) == 1


@pytest.mark.parametrize("at", ["before", "after"])
def test_a_stopped_run_has_the_same_alarms(
    gamed: tuple[dict[str, Any], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    first = gamed[0]["audit"][0]["step"]
    with monkeypatch.context() as m:
        stop_after(2 if at == "before" else first, m)
        with pytest.raises(Stopped):
            train(tmp_path, *GAMED)
    result, run = train(tmp_path, *GAMED)
    assert result["resumes"] == 1 and result["audit"] == gamed[0]["audit"]
    assert result["weights_sha256"] == gamed[0]["weights_sha256"]
    for name, keep in (("metrics.jsonl", "audit/"), ("samples.jsonl", "audit")):
        one, other = ([{k: v for k, v in x.items() if keep in k} for x in lines(d / name)] for d in (run, gamed[1]))
        assert one == other


def test_an_alarm_can_end_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also one that is killed after its last checkpoint and before its result: repeated, it trains no further."""
    words = [*GAMED, "evaluate.every=0", "audit.stop=true"]
    result, run = train(tmp_path / "whole", *words)
    assert (result["ended_by"], result["steps"]) == ("audit.stop", result["audit"][0]["step"])
    assert result["steps"] < 16 and (run / f"checkpoint-{result['steps']}").is_dir()

    def killed(self: Run, *rest: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as m:
        m.setattr(Run, "finish", killed)
        with pytest.raises(KeyboardInterrupt):
            train(tmp_path / "broken", *words)
    again, _ = train(tmp_path / "broken", *words)
    assert [again[k] for k in ("steps", "ended_by", "audit")] == [result[k] for k in ("steps", "ended_by", "audit")]


def test_an_alarm_on_dev_ends_the_run_after_the_next_step(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Exactly there also where the run was stopped between the two."""
    words = [*GAMED, "audit.stop=true", "audit.window=24", "evaluate.every=6"]
    whole, _ = train(tmp_path / "whole", *words)
    step = whole["audit"][0]["step"]
    assert whole["audit"][0]["name"].startswith("dev/") and whole["steps"] == step + 1
    with monkeypatch.context() as m:
        stop_after(step, m)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    broken, _ = train(tmp_path / "broken", *words)
    assert (broken["steps"], broken["ended_by"], broken["audit"]) == (step + 1, "audit.stop", whole["audit"])
    assert broken["weights_sha256"] == whole["weights_sha256"]


def test_training_never_sees_the_second_reward(gamed: tuple[dict[str, Any], Path], tmp_path: Path) -> None:
    """It is logged, on dev too, and the weights are those of a run without it, and of one without any audit."""
    result, run = train(tmp_path, *GAMED, "+reward@audit.reward=length", "audit.reward.target=8")
    logged = lines(run / "metrics.jsonl")
    assert all("second" in m and "audit/second" in m for m in logged[1:])
    assert {"dev/second", "dev/audit/second"} <= set(logged[0])
    # rewards of lengths: one falls where the other rises
    second = next(a for a in result["audit"] if a["name"] == "audit/second")
    assert second["is"] < second["was"] and "the reward rose from" in second["text"]
    off, silent = train(tmp_path, *GAMED, "audit.on=false")
    assert not any("audit" in key for m in lines(silent / "metrics.jsonl") for key in m) and off["audit"] == []
    assert gamed[0]["weights_sha256"] == result["weights_sha256"] == off["weights_sha256"]


def test_a_healthy_run_is_silent(tmp_path: Path) -> None:
    """The bundled model with the reward that it knows."""
    result, _ = train(
        tmp_path, "+algo=grpo", "data=rnnlg_acts", *SMALL_RL, "algo.max_new_tokens=32", "algo.k=4", "audit.window=1"
    )
    assert result["audit"] == []


def test_other_stages_are_not_audited(tmp_path: Path) -> None:
    result, run = train(tmp_path, *SMALL_SFT, "model=tiny", "evaluate.every=2", "evaluate.test=false")
    assert not any("audit" in key for m in lines(run / "metrics.jsonl") for key in m) and result["audit"] == []


# ---- settings --------------------------------------------------------------------------------------------------------

CHRF_NODE = "alignkit.rewards.metric.ChrF"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["audit.window=0"], r"audit\.window: must be at least 1"),
        (["audit.length=1"], r"audit\.length: must be above 1, or null"),
        (["audit.diversity=1.5"], r"audit\.diversity: must be between 0 and 1"),
        (["audit.repetition=0"], r"audit\.repetition: must be above 0"),
        (["audit.copy=-1"], r"audit\.copy: must be above 0"),
        (["audit.spread=nan"], r"audit\.spread: must be above 0"),
        (["audit.reward=chrf"], r"audit\.reward: names no _target_; give audit\.reward\._target_"),
        (["audit.reward={word_order: 2}"], r"audit\.reward: names no _target_"),
        ([f"audit.reward={{_target_: {CHRF_NODE}, order: 2}}"], r"audit\.reward\.order: unknown.*word_order"),
        ([f"audit.reward={{_target_: {CHRF_NODE}, word_order: two}}"], r"audit\.reward\.word_order: must be int"),
        (["audit.reward={_target_: alignkit.rewards.metric.Chrf}"], r"audit\.reward\._target_: .*Did you mean 'ChrF'"),
        ([f"audit.reward={{_target_: {CHRF_NODE}}}", "audit.on=false"], r"audit\.reward: has no effect with audit\.on=false"),
        (["+reward@audit.reward=chrf", "stage=sft"], r"audit\.reward: has no effect in stage sft"),
    ],
)  # fmt: skip
def test_bad_settings_are_refused(words: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        check(composed(["+algo=grpo", *words]))


@pytest.mark.parametrize(
    "words",
    [
        [f"audit.reward={{_target_: {CHRF_NODE}, word_order: 2}}"],
        ["+reward@audit.reward=bleu_chrf", "audit.reward.weights.bleu=1.0"],
        ["audit.length=null", "audit.spread=null", "audit.reward=null"],
    ],
)
def test_good_settings_pass(words: list[str]) -> None:
    check(composed(["+algo=grpo", *words]))


@pytest.mark.parametrize(
    ("word", "said"),
    [("audit.lenght=2", "audit.lenght: no such key. Did you mean 'length'?"), ("+reward@audit.reward=chrff", "no such reward. Did you mean 'chrf'?")],
)  # fmt: skip
def test_unknown_words_are_refused(word: str, said: str) -> None:
    with pytest.raises(UserError) as caught:
        hydra_words(["+algo=grpo", word])
    assert said in str(caught.value)


def test_a_value_that_its_class_refuses_names_the_node(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^audit\.reward: target must be at least 1, is 0"):
        train(tmp_path, *GAMED, "+reward@audit.reward=length", "audit.reward.target=0")


def test_a_second_reward_of_ones_own_is_fingerprinted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: Callable[[str], str]
) -> None:
    word = own("class R:\n    def __call__(self, batch):\n        return [1.0] * len(batch)\n")
    words = [*GAMED, "algo.steps=2", "evaluate.every=0", f"audit.reward={{_target_: {word}.R}}"]
    train(tmp_path, *words)
    train(tmp_path, *words)  # is finished
    file = tmp_path / f"{word}.py"
    file.write_text(file.read_text() + "\n")
    with pytest.raises(UserError, match=r"another audit\.reward\._target_"):
        train(tmp_path, *words)


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], str]:
    """Write a module of the user's own; its name."""

    def write(code: str) -> str:
        name = f"second_{tmp_path.name}"
        (tmp_path / f"{name}.py").write_text(code)
        monkeypatch.syspath_prepend(str(tmp_path))
        return name

    return write


def test_the_settings_are_shown() -> None:
    shown = command("show", "settings").stdout
    keys = schema_keys("audit")
    assert keys and all(f"  audit.{key}: " in shown for key in keys)


def test_an_unknown_key_of_a_file_is_refused() -> None:
    """The node is open for the sake of the second reward; `check` closes it."""
    cfg = composed(["+algo=grpo"])
    cfg.audit.lenght = 2
    with pytest.raises(UserError, match=r"audit\.lenght: unknown. Did you mean 'length'\?"):
        check(cfg)
