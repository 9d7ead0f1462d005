"""Stage refine through the command line: parts and data, kills and stops, the card, evaluation by protocol, user's mistakes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from critical import FIRST, PROMPTS, REFINED, critical_policy
from running import SMALL_CAUSAL, SMALL_SEQ2SEQ, lines, train

QUIET = ["run.threads=1", "run.wandb=disabled"]
CRITIC = '''
import json, os, time
from alignkit.feedback import Answer


class Slow:
    """Scores a text by its characters, rewrites it by one more, notes what it is asked, and takes its time."""

    def __init__(self, log: str, seconds: float = 0.0) -> None:
        self.log, self.seconds = log, seconds

    def ask(self, questions, account):
        return [self.answer(q) for q in questions]

    def answer(self, q):
        with open(self.log, "a") as file:
            file.write(json.dumps([q.row["prompt"], q.response, q.attempt]) + "\\n")
        time.sleep(self.seconds)
        if q.response == "unclear":
            return Answer(None, "empty")
        score = 1 + sum(map(ord, q.response)) % 10
        return Answer(f"Weaknesses: w\\nSuggestions: s\\nOverall Score: [[{score}]]\\n### Improved Response\\n{q.response}!")


class Length:
    """A reward that breaks off at a prompt, as Ctrl-C does, while the environment names one."""

    def __call__(self, batch):
        if any(row["prompt"] == os.environ.get("BREAK_AT") for row in batch.rows):
            raise KeyboardInterrupt
        return [float(len(text)) for text in batch.responses]
'''
DRAFTS = ["a", "b", "c", "d", "unclear", "f", "g", "h"]


def score(text: str) -> int:
    return 1 + sum(map(ord, text)) % 10


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a critic and a reward of the user's own, `own_parts.Slow` and `own_parts.Length`, and rows with drafts."""
    folder = tmp_path_factory.mktemp("own")
    (folder / "own_parts.py").write_text(CRITIC)
    rows = [{"prompt": f"p{i}", "draft": draft, "source": "s", "score": "x"} for i, draft in enumerate(DRAFTS)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def collecting(own: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """The words of a run that asks the critic about the drafts; its log lies in the test's folder."""
    monkeypatch.syspath_prepend(str(own))

    def words(*more: str, log: str = "log") -> list[str]:
        return [
            "+algo=srt_collect", "data=custom", f"data.train={own}/rows.jsonl", "data.response=null", *SMALL_CAUSAL, *QUIET,
            "algo.critic._target_=own_parts.Slow", f"algo.critic.log={tmp_path}/{log}", "algo.drafts=draft",
            "algo.rows_per_part=2", "run.name=run", *more,
        ]  # fmt: skip

    return words


def asked(log: Path) -> list[list[Any]]:
    return lines(log) if log.exists() else []  # type: ignore[return-value]


def started(words: list[str], root: Path, cwd: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-m", "alignkit", "train", *words, f"run.root={root}"], cwd=cwd, text=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=dict(os.environ),
    )  # fmt: skip


def wait_for(what: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    begun = time.monotonic()
    while not what():
        assert process.poll() is None, f"it ended too early: {process.communicate()[1]}"
        assert time.monotonic() - begun < 120, "it does not get there"
        time.sleep(0.01)


# ---- parts and data ------------------------------------------------------------------------------------------------


def test_the_data_are_the_parts_without_what_was_dropped(tmp_path: Path, collecting: Any) -> None:
    result, run = train(tmp_path, *collecting())
    parts = sorted((run / "parts").glob("*.jsonl"))
    assert [len(lines(part)) for part in parts] == [2, 2, 2, 2]
    every = [line for part in parts for line in part.read_text().splitlines()]
    kept = [line for line in every if "dropped" not in json.loads(line)]
    assert (run / "data.jsonl").read_text() == "".join(line + "\n" for line in kept)
    # by hand: y gains by y! unless its score passes 10, ord("!") being 33: 3 more, or 7 less
    gains = {y: score(y + "!") >= score(y) for y in DRAFTS if y != "unclear"}
    assert 0 < sum(gains.values()) < len(gains)
    assert [row["response"] for row in lines(run / "data.jsonl")] == [y for y, gain in gains.items() if gain]
    lost = len(gains) - sum(gains.values())
    assert result["rows"] == {"read": 8, "kept": sum(gains.values()), "dropped": {"no gain": lost, "empty": 1}}
    assert [row["source"] for row in lines(run / "data.jsonl")] == ["critic"] * sum(gains.values())
    log = asked(tmp_path / "log")
    assert Counter(json.dumps(one) for one in log).most_common(1)[0][1] == 1  # nothing twice
    assert [one for one in log if one[1] == "unclear"] == [["p4", "unclear", 0], ["p4", "unclear", 1]]
    metrics = lines(run / "metrics.jsonl")
    assert [m["step"] for m in metrics] == [1, 2, 3, 4] and metrics[-1]["rows/read"] == 8
    assert metrics[-1]["kept"] == pytest.approx(sum(gains.values()) / 8)


def test_the_card_counts_what_came_through(tmp_path: Path, collecting: Any, capsys: pytest.CaptureFixture[str]) -> None:
    result, run = train(tmp_path, *collecting("algo.rounds=2"))
    card = (run / "README.md").read_text()
    rows = result["rows"]
    assert f"| read | 8 |\n| dropped: no gain | {rows['dropped']['no gain']} |\n| dropped: empty | 1 |" in card
    assert f"| kept | {rows['kept']} |" in card and result["data_sha256"] in card
    assert "## Dropped: no gain" in card and "## Dropped: empty" in card
    drafts = [score(y) for y in DRAFTS if y != "unclear"]
    found = result["scores"]["score_response"]
    assert (found["n"], found["mean"]) == (7, pytest.approx(sum(drafts) / 7))
    assert {int(k): n for k, n in found["of"].items() if n} == dict(Counter(drafts))
    chains = [[score(y + "!" * k) for k in range(3)] for y in DRAFTS if y != "unclear"]
    assert result["scores"]["by_round"] == pytest.approx([sum(column) / 7 for column in zip(*chains, strict=True)])
    best = [max(chain[1:]) for chain in chains]
    assert result["scores"]["score_refinement"]["mean"] == pytest.approx(sum(best) / 7)
    assert "mean score by round, drafts first: " in capsys.readouterr().out


def test_the_size_of_a_part_and_a_repetition_change_nothing(tmp_path: Path, collecting: Any) -> None:
    _, one = train(tmp_path / "one", *collecting())
    _, other = train(tmp_path / "other", *collecting("algo.rows_per_part=3", log="log_of_other"))
    assert (one / "data.jsonl").read_bytes() == (other / "data.jsonl").read_bytes()
    before = asked(tmp_path / "log")
    result, _ = train(tmp_path / "one", *collecting())  # is finished
    assert asked(tmp_path / "log") == before and result["rows"]["read"] == 8


def test_another_setting_in_the_same_directory_is_refused(tmp_path: Path, collecting: Any, cli: Any) -> None:
    words = collecting(f"run.dir={tmp_path}/fixed")
    assert cli("train", *words)[0] == 0
    (tmp_path / "fixed" / "result.json").unlink()  # as if it had been stopped before its end
    done = len(asked(tmp_path / "log"))
    code, _, err = cli("train", *words, "algo.min_gain=1")
    assert code == 2 and "algo.min_gain: 0 → 1" in err
    assert cli("train", *words)[0] == 0 and len(asked(tmp_path / "log")) == done  # all parts are there


def test_columns_of_the_data_are_no_scores_of_the_run(tmp_path: Path, own: Path, collecting: Any) -> None:
    """The rows have a `source` and a text in `score`; best of n has scores of its own, and no rounds."""
    result, run = train(
        tmp_path, "+algo=best_of_n", "data=custom", f"data.train={own}/rows.jsonl", "data.response=null", *SMALL_CAUSAL,
        *QUIET, "reward=length", "reward._target_=own_parts.Length", "algo.n=3", "algo.max_new_tokens=6",
    )  # fmt: skip
    assert set(result["scores"]) == {"score"} and result["scores"]["score"]["n"] == 8
    found = lines(run / "data.jsonl")
    assert result["scores"]["score"]["mean"] == pytest.approx(sum(max(map(len, row["responses"])) for row in found) / 8)
    assert all(row["source"] == "s" for row in found)


# ---- kills and stops -----------------------------------------------------------------------------------------------


def test_killed_in_the_middle_it_ends_as_if_it_had_not_been(tmp_path: Path, own: Path, collecting: Any) -> None:
    """Parts that were finished are not asked about again; the one in the middle is."""
    _, whole = train(tmp_path / "whole", *collecting(log="log_of_whole"))
    words, log, run = collecting("algo.critic.seconds=0.2"), tmp_path / "log", tmp_path / "runs" / "run"
    process = started(words, tmp_path / "runs", own)
    state = run / "parts" / "run.json"
    wait_for(lambda: state.exists() and json.loads(state.read_text())["step"] >= 2, process)
    wait_for(lambda: any(one[0] == "p4" for one in asked(log)), process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    finished = json.loads(state.read_text())["step"]
    assert process.returncode == -signal.SIGKILL and finished < 4 and not (run / "data.jsonl").exists()
    before = [(part.name, part.stat().st_mtime_ns) for part in sorted((run / "parts").glob("*.jsonl"))][:finished]
    train(tmp_path / "runs", *words)
    assert (run / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()
    after = [(part.name, part.stat().st_mtime_ns) for part in sorted((run / "parts").glob("*.jsonl"))][:finished]
    assert after == before
    once = Counter(json.dumps(one) for one in asked(tmp_path / "log_of_whole"))
    twice = Counter(json.dumps(one) for one in asked(log))
    assert set(once) == set(twice)
    for one, n in twice.items():
        assert n == 1 if int(json.loads(one)[0][1:]) < 2 * finished else n <= 2
    assert sum(twice.values()) > sum(once.values())


def test_ctrl_c_stops_after_the_part_and_says_how_to_go_on(tmp_path: Path, own: Path, collecting: Any) -> None:
    _, whole = train(tmp_path / "whole", *collecting(log="log_of_whole"))
    words, run = collecting("algo.critic.seconds=0.2"), tmp_path / "runs" / "run"
    process = started(words, tmp_path / "runs", own)
    wait_for(lambda: (run / "parts" / "run.json").exists(), process)
    process.send_signal(signal.SIGINT)
    err = process.communicate(timeout=60)[1]
    assert process.returncode == 130
    done = int(re.findall(r"stopped after part (\d) of 4, saved in .*parts\.", err)[0])
    assert "Repeat the command to go on" in err and "Traceback" not in err
    assert 1 <= done < 4 and len(list((run / "parts").glob("*.jsonl"))) == done
    assert Counter(one[0] for one in asked(tmp_path / "log")).keys() == {f"p{i}" for i in range(2 * done)}
    train(tmp_path / "runs", *words)
    assert (run / "data.jsonl").read_bytes() == (whole / "data.jsonl").read_bytes()
    assert sorted(map(json.dumps, asked(tmp_path / "log"))) == sorted(map(json.dumps, asked(tmp_path / "log_of_whole")))


def test_what_is_sampled_does_not_depend_on_where_a_run_broke_off(
    tmp_path: Path, own: Path, collecting: Any, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped at once in the third part: the rows are those of an unbroken run, bit for bit."""
    words = [
        "train", "+algo=best_of_n", "data=custom", f"data.train={own}/rows.jsonl", "data.response=null", *SMALL_CAUSAL,
        *QUIET, "run.preflight=false", "reward=length", "reward._target_=own_parts.Length",  "algo.n=3", "algo.max_new_tokens=6",
        "algo.rows_per_part=2",
    ]  # fmt: skip
    assert cli(*words, "run.dir=whole")[0] == 0
    monkeypatch.setenv("BREAK_AT", "p5")
    code, _, err = cli(*words, "run.dir=broken")
    assert code == 130 and "stopped at once" in err and "go on" in err
    assert len(list(Path("broken/parts").glob("*.jsonl"))) == 2
    monkeypatch.delenv("BREAK_AT")
    assert cli(*words, "run.dir=broken")[0] == 0
    assert Path("broken/data.jsonl").read_bytes() == Path("whole/data.jsonl").read_bytes()
    assert cli(*words, "run.dir=other", "seed=1")[0] == 0
    Path("alike.jsonl").write_text(json.dumps({"prompt": "p0"}) + "\n" + json.dumps({"prompt": "p0"}) + "\n")
    alike = [w for w in words if not w.startswith(("data.train", "algo.rows_per_part"))]
    assert cli(*alike, "data.train=alike.jsonl", "algo.rows_per_part=1", "run.dir=alike")[0] == 0
    first, second = lines(Path("alike/data.jsonl"))
    assert first["responses"] != second["responses"]  # each part draws anew
    assert Path("other/data.jsonl").read_bytes() != Path("whole/data.jsonl").read_bytes()


# ---- evaluation by protocol ----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def knowing(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model that knows its dialogues by heart, saved, and its prompts with their right answers."""
    folder = tmp_path_factory.mktemp("knowing")
    critical_policy().save(folder / "model")
    rows = [{"prompt": p, "answer": r} for p, r in zip(PROMPTS, REFINED, strict=True)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("protocol", "texts", "first"),
    [
        ("plain", None, None),
        ("first", FIRST, None),
        ("refine", REFINED, FIRST),
        ("rerank", [*REFINED[:3], FIRST[3]], None),
    ],
)
def test_an_evaluation_writes_what_the_protocol_took(
    knowing: Path, cli: Any, protocol: str, texts: list[str] | None, first: list[str] | None
) -> None:
    code, out, err = cli(
        "evaluate", str(knowing / "model"), "data=custom", f"data.test={knowing}/rows.jsonl", "data.response=null",
        "data.references=answer", "reward=exact_match", f"evaluate.protocol={protocol}", "evaluate.max_new_tokens=60",
        "evaluate.batch_size=3", "evaluate.temperature=0.6", "evaluate.bootstrap=20", *QUIET, "run.dir=run",
    )  # fmt: skip
    assert code == 0, err
    found = lines(Path("run/outputs-test.jsonl"))
    table = json.loads(Path("run/result.json").read_text())["evaluation"]["test"]
    if texts is None:
        assert not {"tokens", "first", "parse_failed"} & set(found[0]) and "parse_failed" not in table
        return
    assert [row["response"] for row in found] == texts
    right = [float(a == b) for a, b in zip(texts, REFINED, strict=True)]
    assert [row["reward"] for row in found] == right
    assert table["exact_match"]["value"] == pytest.approx(100 * sum(right) / 4)
    assert table["tokens"]["value"] == pytest.approx(sum(row["tokens"] for row in found) / 4)
    assert [row["characters"] for row in found] == [5.0] * 4
    assert ("parse_failed" in table) == (protocol != "first") and "tokens written" in out
    if protocol == "refine":
        assert [row["parse_failed"] for row in found] == [0.0] * 4 and table["parse_failed"]["value"] == 0
    if first is not None:
        assert [row["first"] for row in found] == first
        assert [row["first_exact_match"] for row in found] == [row["first_reward"] for row in found] == [0, 0, 1, 0]
        assert table["first_exact_match"]["value"] == pytest.approx(25)


def test_a_tokens_count_grows_from_first_to_refine_to_rerank(knowing: Path) -> None:
    """The comparison at equal compute needs them: first is part of refine, and rerank writes every answer and its critique."""
    from alignkit.config import Evaluate
    from alignkit.protocols import answers

    rows = [{"prompt": p, "references": [], "id": i} for i, p in enumerate(PROMPTS)]
    counts = []
    for protocol in ("first", "refine", "rerank"):
        cfg = Evaluate(protocol=protocol, max_new_tokens=60, samples=4)
        counts.append(answers(critical_policy(), rows, cfg, torch.Generator().manual_seed(0)).measured["tokens"])
    assert all(a < b < c for a, b, c in zip(*counts, strict=True))


# ---- a user's mistakes ---------------------------------------------------------------------------------------------


def refused(cli: Any, *words: str) -> str:
    """The one message of a command that is refused; nothing is left of its run."""
    code, _, err = cli(*words, *QUIET, "run.dir=refused")
    assert code == 2 and err.count("error:") == 1 and "Traceback" not in err, err
    return err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["+algo=best_of_n", "reward=null"], r"best_of_n goes by a reward: choose one with reward=NAME"),
        (["+algo=rejection", "reward=null"], r"rejection goes by a reward: choose one with reward=NAME"),
        (["+algo=srt_collect", "algo.drafts=darft"], r"row 0 has no text in column 'darft', which algo\.drafts asks for"),
        (["+algo=srt_self", *SMALL_SEQ2SEQ], r"srt_self: a model that goes on from its own answer must be causal"),
        (["+algo=self_rank", "algo.score=critique", *SMALL_SEQ2SEQ], r"algo\.score=critique needs a causal model; take algo\.score=loglik_norm"),
        (["+algo=best_of_n", "algo.n=1"], r"algo: n must be at least 2, is 1"),
        (["+algo=rejection", "algo.max_per_prompt=0"], r"algo: max_per_prompt must be at least 1, is 0"),
        (["+algo=self_rank", "algo.write=worst"], r"algo\.write: must be .*'best', 'pairs'.*, is 'worst'"),
        (["+algo=srt_collect", "algo.reask=2"], r"algo\.reask: unknown\. Did you mean 'reasks'\?"),
        (["+algo=srt_self", "evaluate.protocol=refine", "evaluate.decode=beam"], r"evaluate\.decode: beam search has no place in a protocol"),
        (["+algo=srt_self", "evaluate.protocol=last"], r"evaluate\.protocol: must be one of plain, first, refine, rerank"),
        (["+algo=srt_self", "algo.not_in=nowhere"], r"nowhere: no such file"),
    ],
)  # fmt: skip
def test_refine_refuses(own: Path, cli: Any, words: list[str], said: str) -> None:
    model = [] if any(w.startswith("model=") for w in words) else SMALL_CAUSAL
    reward = (
        ["reward=length"] if words[0] in ("+algo=best_of_n", "+algo=rejection") and words[1][:6] != "reward" else []
    )
    given = ["data=custom", f"data.train={own}/rows.jsonl", "data.response=null"]
    err = refused(cli, "train", words[0], *model, *given, *reward, *words[1:])
    assert re.search(said, err), err
    assert not Path("refused").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["data.response='{draft}'"], r"training row 0 has no 'feedback', which srt learns.*data\.train=RUN"),
        (["data.response='{draft}'", "algo.keep=nothing"], r"algo\.keep: must be .*'no_feedback'.*, is 'nothing'"),
        ([], r"line 1: no column 'response', which data\.response asks for"),
        (
            ["data.response='{draft}'", "evaluate.decode=beam"],
            r"beam search has no place in a protocol",
        ),  # srt's: refine
    ],
)
def test_srt_refuses(own: Path, cli: Any, words: list[str], said: str) -> None:
    given = ["data=critiques", f"data.train={own}/rows.jsonl", "data.prompt='{prompt}'", *SMALL_CAUSAL]
    assert re.search(said, refused(cli, "train", "+algo=srt", *given, *words))


def test_where_every_row_is_dropped_the_filters_are_named(tmp_path: Path, collecting: Any, cli: Any) -> None:
    """... and what was answered is kept: with the same settings nobody is asked again."""
    words = ["train", *collecting("algo.min_gain=9", f"run.dir={tmp_path}/none")]
    code, _, err = cli(*words)
    assert code == 2 and err.count("error:") == 1
    assert re.search(
        r"no row is left: 7 no gain, 1 empty\. The first critique: .* What there was lies in .*none/parts\.", err
    )
    assert not (tmp_path / "none" / "data.jsonl").exists() and not (tmp_path / "none" / "result.json").exists()
    before = asked(tmp_path / "log")
    assert cli(*words)[0] == 2 and asked(tmp_path / "log") == before


def test_a_chat_of_several_turns_is_refused_before_anyone_is_asked(tmp_path: Path, own: Path, cli: Any) -> None:
    turns = [{"role": r, "content": c} for r, c in (("user", "a"), ("assistant", "b"), ("user", "c"))]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"turns": turns, "draft": "d"}) + "\n")
    words = ["+algo=srt_collect", "data=custom", f"data.train={tmp_path}/chats.jsonl", "data.messages=turns"]
    code, _, err = cli("train", *words, "data.response=null", "algo.drafts=draft", "critic=fixed", "run.wandb=disabled")
    assert code == 2 and "row 0 is a chat with 2 user turns" in err and not list(tmp_path.glob("runs/*/parts"))
