"""Stage judge from the command line: outputs of several systems on the same rows, compared by rewards and chat models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from running import SMALL_RUN, SMALL_SEQ2SEQ, command, lines, train

from alignkit.errors import UserError

ROWS = [{"prompt": f"q{i}", "refs": [f"r{i}"], "kind": "ab"[i % 2]} for i in range(4)]
SAID = {
    "base": ["r0", "xx", "xx", "xx"],
    "tuned": ["r0", "r1", "r2", "xxx"],
    "empty": ["", "", "", ""],
}


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with four rows of data and the outputs of three systems: a file, a trained run, an evaluated run."""
    write(tmp_path / "rows.jsonl", ROWS)
    write(tmp_path / "base.jsonl", entries("base"))
    write(tmp_path / "tuned" / "outputs-after.jsonl", entries("tuned"))
    write(tmp_path / "tuned" / "outputs-before.jsonl", entries("base"))
    write(tmp_path / "empty" / "outputs-test.jsonl", entries("empty"))
    return tmp_path


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def entries(name: str) -> list[dict[str, Any]]:
    return [
        {"prompt": r["prompt"], "references": r["refs"], "response": y} for r, y in zip(ROWS, SAID[name], strict=True)
    ]


def words(place: Path, *names: str) -> list[str]:
    where = {"base": place / "base.jsonl", "tuned": place / "tuned", "empty": place / "empty"}
    outputs = ", ".join(f"{name}: {where[name]}" for name in names)
    return [
        "+algo=judge", "data=custom", "data.train=null", f"data.test={place / 'rows.jsonl'}", "data.response=null",
        "data.references=refs", "reward=exact_match", f"algo.outputs={{{outputs}}}", "run.wandb=disabled",
    ]  # fmt: skip


LENGTH = (
    "algo.judges={long: {_target_: alignkit.judges.ByReward, reward: {_target_: alignkit.rewards.rule.Length, target: 3, "
    "unit: characters}}}"
)


def test_from_the_command_line(place: Path) -> None:
    ran = command("train", *words(place, "base", "empty", "tuned"), LENGTH, "algo.bootstrap=50", cwd=place)
    assert ran.returncode == 0, ran.stderr
    (folder,) = (place / "runs").iterdir()
    result = json.loads((folder / "result.json").read_text(encoding="utf-8"))
    assert (result["status"], result["stage"], result["candidate"], result["rows"]) == ("finished", "judge", "tuned", 4)
    base, empty = result["comparisons"]["base"], result["comparisons"]["empty"]
    # exact match: 1, 1, 1, 0 against 1, 0, 0, 0 and against 0, 0, 0, 0; characters: 2, 2, 2, 3 against 2 everywhere and 0
    assert base["reward"]["win_rate"]["value"] == 75.0
    assert [base["reward"][k] for k in ("wins", "ties", "losses", "failed")] == [2, 2, 0, 0]
    assert base["long"]["win_rate"]["value"] == 62.5
    assert empty["reward"]["win_rate"]["value"] == 87.5
    assert empty["long"]["win_rate"]["value"] == 100.0
    assert base["reward"]["win_rate"]["low"] < 75 < base["reward"]["win_rate"]["high"]
    assert result["evaluation"]["test"]["win_rate/base/reward"] == base["reward"]["win_rate"]
    systems = result["systems"]
    assert {name: one["characters"] for name, one in systems.items()} == {"base": 2.0, "empty": 0.0, "tuned": 2.25}
    assert {name: one["scores"]["reward"] for name, one in systems.items()} == {
        "base": 0.25,
        "empty": 0.0,
        "tuned": 0.75,
    }
    # reward: tie win win tie, win win win tie; long: tie tie tie win, win win win win: the same on 1 + 3 of 8 rows
    # chance: win 5/8 * 5/8 + tie 3/8 * 3/8 = 34/64, so kappa = (32 - 34) / (64 - 34)
    assert result["agreement"] == {"reward, long": {"same": 0.5, "kappa": pytest.approx(-2 / 30), "n": 8}}
    assert not any(result["cost"].values())
    table = (folder / "table.md").read_text(encoding="utf-8")
    assert table.strip() in ran.stdout
    assert "| base | reward | 75.00 [" in table
    assert "| tuned | 2.2 | 0.750 | " in table
    record = lines(folder / "judgements.jsonl")
    assert len(record) == 4 * 2 * 2
    assert record[4] == {
        "row": 1, "prompt": "q1", "candidate": "tuned", "opponent": "base", "judge": "reward", "responses": ["r1", "xx"],
        "preference": 1.0, "verdict": "win", "scores": [1.0, 0.0],
    }  # fmt: skip
    assert "tuned wins 75.00 [" in ran.stdout


def test_it_is_done_again_when_the_outputs_have_changed(place: Path) -> None:
    assert train(place / "runs", *words(place, "base", "tuned"))[0]["comparisons"]["base"]["reward"]["wins"] == 2
    write(place / "base.jsonl", entries("tuned"))
    assert train(place / "runs", *words(place, "base", "tuned"))[0]["comparisons"]["base"]["reward"]["wins"] == 0


def test_the_order_of_the_systems_does_not_matter(place: Path) -> None:
    one, _ = train(place / "one", *words(place, "base", "empty", "tuned"), LENGTH, "algo.candidate=empty")
    other, _ = train(place / "two", *words(place, "tuned", "empty", "base"), LENGTH, "algo.candidate=empty")
    for key in ("comparisons", "systems", "agreement", "evaluation"):
        assert one[key] == other[key]


def test_two_systems_that_change_places(place: Path) -> None:
    one, _ = train(place / "one", *words(place, "base", "tuned"), "algo.candidate=base")
    other, _ = train(place / "two", *words(place, "base", "tuned"), "algo.candidate=tuned")
    a, b = one["comparisons"]["tuned"]["reward"], other["comparisons"]["base"]["reward"]
    assert a["win_rate"]["value"] == 25.0
    assert a["win_rate"]["low"] == pytest.approx(100 - b["win_rate"]["high"])
    assert (a["wins"], a["ties"], a["losses"]) == (0, 2, 2)


def test_outputs_of_the_first_rows_are_judged_alone(place: Path) -> None:
    for path in (place / "base.jsonl", place / "tuned" / "outputs-after.jsonl"):
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:3]))
    assert train(place / "runs", *words(place, "base", "tuned"))[0]["rows"] == 3
    assert train(place / "fewer", *words(place, "base", "tuned"), "evaluate.rows=2")[0]["rows"] == 2


def test_dev_rows_where_there_is_no_test(place: Path) -> None:
    own = [w.replace("data.test=", "data.dev=") for w in words(place, "base", "tuned")]
    assert train(place / "runs", *own)[0]["split"] == "dev"


def test_outputs_that_a_run_has_written(tmp_path: Path) -> None:
    """What stage evaluate writes can be judged, with all columns of its rows; who is compared with himself ties."""
    _, run = train(tmp_path, "+algo=evaluate", *SMALL_SEQ2SEQ, "data=rnnlg", *SMALL_RUN, "reward=slots")
    outputs = f"algo.outputs={{one: {run}, same: {run}}}"
    result, _ = train(tmp_path, "+algo=judge", "data=rnnlg", "reward=slots", outputs, "run.wandb=disabled")
    found = result["comparisons"]["one"]["reward"]
    assert (found["win_rate"]["value"], found["ties"], result["rows"]) == (50.0, 12, 12)
    before = lines(run / "outputs-test.jsonl")
    assert result["systems"]["one"]["scores"]["reward"] == pytest.approx(
        sum(e["reward"] for e in before) / 12, abs=1e-6
    )


PIPELINE = """\
# @package _global_
name: compared
stage: pipeline
steps:
  first: [+algo=evaluate, {small}]
  refined: [+algo=evaluate, {small}, model.vocab_size=290]
  judge: [+algo=judge, data=rnnlg, reward=slots, "algo.outputs={{{{first: {{first}}, refined: {{refined}}}}}}", algo.candidate=refined]
"""


def test_the_last_step_of_a_pipeline(tmp_path: Path) -> None:
    (tmp_path / "mine" / "preset").mkdir(parents=True)
    small = ", ".join([*SMALL_SEQ2SEQ, "data=rnnlg", *SMALL_RUN])
    (tmp_path / "mine" / "preset" / "compared.yaml").write_text(PIPELINE.format(small=small))
    ran = command("train", "--config-dir", "mine", "+preset=compared", "run.wandb=disabled", cwd=tmp_path)
    assert ran.returncode == 0, ran.stderr
    (report,) = (tmp_path / "runs").glob("compared-*/report.md")
    assert "| first | reward | 50.00 [50.00, 50.00] |" in report.read_text(encoding="utf-8")
    assert "refined wins 50.00 [50.00, 50.00] % against first by reward." in report.read_text(encoding="utf-8")


OWN = """\
import numpy as np
from alignkit.judges import Verdicts


class Alphabet:
    def prefer(self, rows, first, second, account):
        return Verdicts(np.array([float(a < b) for a, b in zip(first, second)]), [{"kind": row["kind"]} for row in rows])
"""


def test_a_judge_of_ones_own(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "alphabet.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(place))
    own = [*words(place, "base", "tuned"), "~reward", "algo.judges={mine: {_target_: alphabet.Alphabet}}"]
    result, folder = train(place / "runs", *own)
    assert list(result["comparisons"]["base"]) == ["mine"]
    assert (
        result["comparisons"]["base"]["mine"]["wins"] == 2
    )  # r1 and r2 before xx; r0 and xxx are not before r0 and xx
    assert "scores" not in result["systems"]["base"]
    assert [one["kind"] for one in lines(folder / "judgements.jsonl")] == ["a", "b", "a", "b"]


# ---- a chat model ----------------------------------------------------------------------------------------------------

CRITIC = '''\
from alignkit.feedback import Answer


class Longer:
    """Takes the longer response, the first where both are equally long; of q2 it says nothing."""

    def __init__(self, verdict: str = "[[{}]]"):
        self.verdict = verdict

    def ask(self, questions, account):
        assert account.totals()["calls"] == 0
        return [Answer(self.say(q.messages[-1]["content"])) for q in questions]

    def say(self, text):
        a, b = (text.split(f"### Response {x}\\n")[1].split("\\n")[0] for x in "AB")
        return "no idea" if "q2" in text else self.verdict.format("B" if len(b) > len(a) else "A")
'''


def test_a_chat_model_from_the_command_line(place: Path) -> None:
    (place / "own.py").write_text(CRITIC)
    chat = ["+algo.judges.chat._target_=alignkit.judges.ByChat", "+prompt@algo.judges.chat.prompt=pairwise"]
    chat += ["+algo.judges.chat.critic._target_=own.Longer"]
    ran = command("train", *words(place, "base", "tuned"), *chat, cwd=place)
    assert ran.returncode == 0, ran.stderr
    (file,) = (place / "runs").glob("*/result.json")
    result = json.loads(file.read_text(encoding="utf-8"))
    found = result["comparisons"]["base"]["chat"]
    # q0 and q1 are equally long, so the first wins in both orders: ties; q3 is longer: a win; q2 has no verdict
    assert [found[k] for k in ("wins", "ties", "losses", "failed")] == [1, 2, 0, 1]
    assert found["win_rate"]["value"] == pytest.approx(200 / 3)
    assert (found["consistency"], found["first_wins"]) == (pytest.approx(1 / 3), pytest.approx(5 / 6))
    assert found["asked_again"] == 2
    assert "by chat (which contradicts itself: consistency 0.33)" in result["verdict"]
    assert "by reward;" in result["verdict"]  # a reward sees no order
    assert result["cost"]["calls"] == 0
    # reward: tie, win, tie on the rows that both judge; chat: tie, tie, win
    assert result["agreement"]["reward, chat"] == {"same": pytest.approx(1 / 3), "kappa": pytest.approx(-0.5), "n": 3}
    assert [one["orders"] for one in lines(file.parent / "judgements.jsonl") if one["judge"] == "chat"] == [
        ["A", "A"], ["A", "A"], [None, None], ["A", "B"],
    ]  # fmt: skip


def test_a_chat_model_that_never_says_a_verdict(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "mute.py").write_text(CRITIC)
    monkeypatch.syspath_prepend(str(place))
    chat = ["+algo.judges.chat._target_=alignkit.judges.ByChat", "+prompt@algo.judges.chat.prompt=pairwise"]
    chat += ["+algo.judges.chat.critic._target_=mute.Longer", "+algo.judges.chat.critic.verdict=hm"]
    with pytest.raises(UserError, match="judge 'chat' on tuned against base: there is a verdict on none of the rows"):
        train(place / "runs", *words(place, "base", "tuned"), *chat)


# ---- mistakes --------------------------------------------------------------------------------------------------------


def refused(place: Path, said: str, *more: str, names: tuple[str, ...] = ("base", "tuned")) -> None:
    with pytest.raises(UserError, match=said):
        train(place / "runs", *words(place, *names), *more)


def test_settings_that_name_no_comparison(place: Path) -> None:
    refused(place, "outputs must name at least two systems.*has base", names=("base",))
    refused(place, r"candidate 'tunde' is not among the outputs\. Did you mean 'tuned'\?", "algo.candidate=tunde")
    refused(place, "there is no judge. Choose reward=NAME", "~reward")
    refused(place, "algo.outputs: must be dict", "algo.outputs=runs")


def test_outputs_that_are_not_there(place: Path) -> None:
    refused(place, r"algo\.outputs\.base: .*bsae\.jsonl: no such file\. Did you mean 'base\.jsonl'\?",
            f"algo.outputs.base={place / 'bsae.jsonl'}")  # fmt: skip
    (place / "bare").mkdir()
    refused(
        place, r"algo\.outputs\.base: .*bare holds none of outputs-after\.jsonl", f"algo.outputs.base={place / 'bare'}"
    )
    (place / "base.jsonl").write_text("")
    refused(place, r"base\.jsonl \(algo\.outputs\.base\): is empty")


def test_outputs_of_other_rows(place: Path) -> None:
    write(place / "base.jsonl", [entries("base")[i] for i in (0, 2, 1, 3)])
    refused(place, r"base\.jsonl, line 2 \(algo\.outputs\.base\): answers 'q2', but row 1 of the test split asks 'q1'")


def test_outputs_of_more_or_fewer_rows(place: Path) -> None:
    write(place / "base.jsonl", entries("base")[:3])
    refused(place, r"outputs-after\.jsonl \(algo\.outputs\.tuned\): has 4 responses, but .*base\.jsonl .* has 3")
    write(place / "base.jsonl", [*entries("base"), entries("base")[0]])
    refused(place, r"base\.jsonl, line 5 \(algo\.outputs\.base\): the test split has 4 rows only")


@pytest.mark.parametrize(
    "line", ['{"prompt": "q0", "chosen": "r0"}', '{"response": "r0"}', '{"prompt": "q0", "response": null}']
)
def test_outputs_of_another_kind(place: Path, line: str) -> None:
    (place / "base.jsonl").write_text(line + "\n")
    refused(place, r"base\.jsonl, line 1 \(algo\.outputs\.base\): has no prompt and response")


def test_a_column_that_the_reward_misses(place: Path) -> None:
    refused(place, "no column 'answer', which the reward reads", "reward=answer")
