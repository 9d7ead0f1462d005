"""Stage select through the command line's own path: episodes and their rewards, the held-out rows it may see, stops and kills, what
``selected`` makes of it, and a user's mistakes."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from distilling import LABELS, NOUNS, rows_of, stop_at, teacher_in, words_of, written
from running import lines, train
from safetensors.torch import load_file
from torch.nn import functional as F
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from alignkit.algos._select import Select
from alignkit.errors import Stopped, UserError
from alignkit.run import Run
from alignkit.stages.select import halves

KSM = ["+algo=ksm", "algo.episodes=3", "algo.phases=2", "algo.updates=3", "algo.hidden=8", "algo.replay_batch=4"]
GRID = ["+algo=constant_grid", "algo.phases=2", "algo.grid=[[1,0,0,0],[0,1,0,0],[1,1,0.3,0.3]]"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return teacher_in(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture
def words(tmp_path: Path, teacher: str) -> list[str]:
    """Of episodes of five steps; the student is half as wide as its teacher and has dropout."""
    return words_of(tmp_path / "d", teacher, hidden_size=8, hidden_dropout_prob=0.1)


def chosen(run: Path) -> dict[str, Any]:
    """What ``final/`` holds."""
    weights = run / "final" / "selector.safetensors"
    return {
        **json.loads((run / "final" / "selector.json").read_text()),
        **(load_file(weights) if weights.exists() else {}),
    }


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(
        torch.equal(a[k], b[k]) if isinstance(a[k], torch.Tensor) else a[k] == b[k] for k in a
    )


# ---- episodes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [KSM, GRID], ids=["ksm", "grid"])
def test_an_episode(tmp_path: Path, words: list[str], method: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariants 4 and 6 of the card, and of five steps two phases: they end after the second and the fifth."""
    read: list[int] = []
    measure = Select.held_out_loss

    def counted(self: Select, student: Any, rows: list[dict[str, Any]]) -> float:
        read.append(len(rows))
        return measure(self, student, rows)

    monkeypatch.setattr(Select, "held_out_loss", counted)
    result, run = train(tmp_path / "runs", *method, *words)
    assert json.loads((run / "result.json").read_text())["episodes"] == json.loads(json.dumps(result["episodes"]))
    episodes = result["episodes"]
    assert len(episodes) == result["student_runs"] == 3
    assert len({e["start"] for e in episodes}) == 1
    assert result["evaluations"] == 3 * (2 + 1)
    reward, selection = result["rows"]["reward"], result["rows"]["selection"]
    assert reward != selection and read == 3 * [reward, reward, reward, selection]
    assert [m["step"] for m in lines(run / "metrics.jsonl") if "reward_loss" in m] == [2, 5, 7, 10, 12, 15]
    assert [m["step"] for m in lines(run / "metrics.jsonl") if "selection_loss" in m] == [5, 10, 15]
    ends = [e["losses"] for e in episodes]
    assert all(len(x) == 2 for x in ends) and len({x[-1] for x in ends}) == 3, "only the weights differ"
    assert result["rows"]["reward"] + result["rows"]["selection"] == 16
    losses = [e["chosen_by"] for e in episodes]
    assert result["best_episode"] == losses.index(min(losses))
    for e, first in zip(episodes, (0, 5, 10), strict=True):
        logged = lines(run / "metrics.jsonl")[first : first + 5]
        means = [sum(m[f"weight/{k}"] for m in logged) / 5 for k in ("finetune", "response", "feature", "relation")]
        assert e["weights"] == pytest.approx(means)
    assert not (run / "final" / "model.safetensors").exists()


def test_rewards_add_up_to_how_far_the_loss_fell(tmp_path: Path, words: list[str]) -> None:
    """Invariant 5: CE(start) - CE(end), with the bonus off; with it, its share is on top."""
    words = [w for w in words if not w.startswith("algo.steps")]
    for eta in (0.0, 0.5):
        result, run = train(
            tmp_path / str(eta), *KSM, *words, f"algo.exploration={eta}", "algo.phases=3", "algo.steps=6"
        )
        metrics = [m for m in lines(run / "metrics.jsonl") if "reward" in m]
        for i, episode in enumerate(result["episodes"]):
            mine = [m for m in metrics if m["episode"] == i]
            assert len(mine) == 3
            fell = episode["start"] - episode["losses"][-1]
            assert sum(m["reward"] for m in mine) == pytest.approx(fell + eta * sum(m["bonus"] for m in mine), abs=1e-9)
            assert abs(fell) > 1e-3
            assert mine[0]["bonus"] == 0 and mine[1]["bonus"] > 0


def test_constant_weights_are_the_same_in_every_episode_bit_for_bit(tmp_path: Path, words: list[str]) -> None:
    """Rows, dropout, optimizer and start are an episode's own: a point that stands in the grid twice gives one and the same
    student, which is that of stage distill."""
    result, _ = train(
        tmp_path, "+algo=constant_grid", "algo.phases=1", "algo.grid=[[1,1,0,0],[1,0,0,0],[1,1,0,0]]", *words
    )
    a, b, c = result["episodes"]
    assert (a["losses"], a["chosen_by"]) == (c["losses"], c["chosen_by"])
    assert a["losses"] != b["losses"]
    assert result["best_episode"] in (0, 1), "of two that are even the first"


def test_held_out_losses_are_transformers_own(tmp_path: Path, words: list[str]) -> None:
    """Of the last episode, whose student is in the last checkpoint: mean cross-entropy of either half of dev."""
    result, run = train(tmp_path / "runs", *GRID, *words)
    dev = rows_of()[24:40]
    model = AutoModelForSequenceClassification.from_pretrained(run / "checkpoint-15").eval()
    tokenizer = AutoTokenizer.from_pretrained(run / "checkpoint-15")

    @torch.no_grad()
    def loss(rows: list[dict[str, Any]]) -> float:
        logits = [model(input_ids=torch.tensor([tokenizer(r["prompt"])["input_ids"]])).logits[0] for r in rows]
        return float(F.cross_entropy(torch.stack(logits), torch.tensor([LABELS.index(r["response"]) for r in rows])))

    rewarding, choosing = halves(dev, [])
    assert result["episodes"][-1]["losses"][-1] == pytest.approx(loss(rewarding), rel=1e-4)
    assert result["episodes"][-1]["chosen_by"] == pytest.approx(loss(choosing), rel=1e-4)
    fewer, _ = train(tmp_path / "fewer", *GRID, *words, "algo.reward_rows=3")
    assert fewer["rows"]["reward"] == 3
    assert fewer["episodes"][-1]["losses"][-1] == pytest.approx(loss(rewarding[:3]), rel=1e-4)
    assert [e["chosen_by"] for e in fewer["episodes"]] == [e["chosen_by"] for e in result["episodes"]]


# ---- which held-out rows ---------------------------------------------------------------------------------------------


def test_no_prompt_is_in_both_halves() -> None:
    """Also where one stands in dev several times; which half it is in does not depend on the rows around it."""
    rows = [{"prompt": f"text {i % 60}", "id": i} for i in range(100)]
    a, b = halves(rows, [])
    assert {r["prompt"] for r in a} & {r["prompt"] for r in b} == set()
    assert sorted(r["id"] for r in (*a, *b)) == list(range(100))
    assert 30 <= len(a) <= 70
    c, d = halves(rows[::-1][:70], [])
    assert {r["id"] for r in c} == {r["id"] for r in a} & set(range(30, 100))
    assert {r["id"] for r in d} == {r["id"] for r in b} & set(range(30, 100))


def test_rows_that_cannot_be_halved() -> None:
    with pytest.raises(UserError, match=r"data\.dev: 1 rows; one half gives the reward, the other selects"):
        halves([{"prompt": "a"}], [])
    with pytest.raises(UserError, match=r"data\.dev: must be given"):
        halves([], [])
    with pytest.raises(UserError, match=r"data\.dev: 4 rows"):
        halves([{"prompt": "a"}] * 4, [])


def test_test_rows_in_dev_are_refused(tmp_path: Path, words: list[str]) -> None:
    both = written(tmp_path / "both.jsonl", rows_of()[38:])
    words = [w for w in words if not w.startswith("data.test")]
    with pytest.raises(UserError, match=r"2 test prompts stand in dev too, on which the selection is learned"):
        train(tmp_path / "runs", *KSM, *words, f"data.test={both}")
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_test_rows_change_nothing(tmp_path: Path, words: list[str]) -> None:
    """Other test rows, even with labels that nothing knows, and none: the same selector and the same losses."""
    rows = [{"prompt": f"quite another {n}", "response": "unheard of"} for n in NOUNS]
    found = []
    for name, word in (
        ("a", ""), ("b", f"data.test={written(tmp_path / 'other.jsonl', rows)}"), ("c", "data.test=null")
    ):  # fmt: skip
        kept = [w for w in words if not (word and w.startswith("data.test"))]
        found.append(train(tmp_path / name, *KSM, *kept, *([word] if word else [])))
    (one, first), *others = found
    for other, run in others:
        assert other["episodes"] == one["episodes"]
        assert same(chosen(run), chosen(first))


# ---- stopped, killed and gone on with --------------------------------------------------------------------------------


def without_clock(run: Path) -> list[dict[str, Any]]:
    return [
        {k: v for k, v in m.items() if not k.startswith(("seconds", "peak_mb"))} for m in lines(run / "metrics.jsonl")
    ]


@pytest.mark.parametrize(
    ("method", "stops"),
    [(KSM, (8,)), ([*KSM, "algo.action=hard", "algo.credit=uniform"], (4, 7, 10)), ([*GRID, "algo.scale_steps=4"], (8,))],
    ids=["ksm", "ksm-hard-uniform", "grid"],
)  # fmt: skip
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch, method: list[str], stops: tuple[int, ...]
) -> None:
    """SIGTERM in the middle of an episode and of a phase, at the end of a phase, and between two episodes."""
    whole, whole_dir = train(tmp_path / "whole", *method, *words)
    for step in stops:
        with monkeypatch.context() as m:
            stop_at(step, m)
            with pytest.raises(Stopped, match=f"after step {step} "):
                train(tmp_path / "broken", *method, *words)
    broken, broken_dir = train(tmp_path / "broken", *method, *words)
    assert broken["resumes"] == len(stops)
    assert broken["episodes"] == whole["episodes"]
    assert (broken["best_episode"], broken["evaluations"]) == (whole["best_episode"], whole["evaluations"])
    assert same(chosen(broken_dir), chosen(whole_dir))
    assert without_clock(broken_dir) == without_clock(whole_dir)


def test_a_killed_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut off at steps that are not saved: it goes back to the last one that is, the third, the fifth, the twelfth."""
    words = [*words, "run.save_every=3"]
    whole, whole_dir = train(tmp_path / "whole", *KSM, *words)
    log = Run.log
    for step in (4, 6, 14):

        def killed(self: Run, done: int, metrics: dict[str, float], at: int = step) -> None:
            log(self, done, metrics)
            if done == at:
                raise KeyboardInterrupt

        with monkeypatch.context() as m:
            m.setattr(Run, "log", killed)
            with pytest.raises(KeyboardInterrupt):
                train(tmp_path / "broken", *KSM, *words)
    broken, broken_dir = train(tmp_path / "broken", *KSM, *words)
    assert broken["resumes"] == 3
    assert broken["episodes"] == whole["episodes"]
    assert same(chosen(broken_dir), chosen(whole_dir))
    assert without_clock(broken_dir) == without_clock(whole_dir)


def test_the_command_says_how_to_go_on_and_then_that_it_is_finished(
    tmp_path: Path, teacher: str, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ["train", *KSM, *words_of(tmp_path / "d", teacher), f"run.root={tmp_path}/runs"]
    with monkeypatch.context() as m:
        stop_at(8, m, signal.SIGINT)
        code, _, err = cli(*words)
    (run,) = (tmp_path / "runs").iterdir()
    assert code == 130
    assert f"stopped after step 8 (episode 2 of 3), saved in {run}. Repeat the command to go on" in err
    code, out, err = cli(*words)
    assert code == 0, err
    assert f"Distil with it: alignkit train +algo=selected algo.selector={run}" in out
    assert "**best**" in out and "3 student trainings, 15 steps, 9 evaluations" in out
    code, out, _ = cli(*words)
    assert code == 0 and "is finished; nothing to do" in out


# ---- what is made of it ----------------------------------------------------------------------------------------------


def test_the_grid_picks_the_point_with_the_lowest_loss_on_selection_rows(tmp_path: Path, words: list[str]) -> None:
    """And a student of ``selected`` with the run is one of ``constant_mix`` with the point."""
    result, run = train(tmp_path, *GRID, *words)
    losses = [e["chosen_by"] for e in result["episodes"]]
    points = [[1, 0, 0, 0], [0, 1, 0, 0], [1, 1, 0.3, 0.3]]
    assert len(set(losses)) == 3
    assert chosen(run) == {"kind": "constant", "weights": points[losses.index(min(losses))]}
    assert [e["weights"] for e in result["episodes"]] == [pytest.approx(p) for p in points]
    scale = ["evaluate.every=0", "evaluate.final=last", "algo.loss_scale=init_mean"]
    of_run, _ = train(tmp_path, "+algo=selected", f"algo.selector={run}", *words, *scale)
    point = str(chosen(run)["weights"]).replace(" ", "")
    mixed, _ = train(tmp_path, "+algo=constant_mix", f"algo.weights={point}", *words, *scale)
    assert of_run["weights_sha256"] == mixed["weights_sha256"]


def test_a_student_is_distilled_with_what_was_learned(tmp_path: Path, words: list[str], teacher: str) -> None:
    """Its first weights are the kept actor's, without noise, for the mean [CLS] of the start's and the teacher's last states
    over the first batch; the final model and the folder ``final/`` of the selector do alike."""
    _, run = train(tmp_path, *KSM, *words)
    last = ["evaluate.every=0", "evaluate.final=last"]
    drawn: list[Any] = []
    draw = Run.draw
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Run, "draw", lambda self, *args: drawn.append(draw(self, *args)) or drawn[-1])
        one, first = train(tmp_path, "+algo=selected", f"algo.selector={run}", *words, *last, "run.preflight=false")
    other, _ = train(tmp_path, "+algo=selected", f"algo.selector={run}/final", *words, *last)
    assert one["weights_sha256"] == other["weights_sha256"]

    tokenizer = AutoTokenizer.from_pretrained(teacher)
    taught = AutoModelForSequenceClassification.from_pretrained(teacher).eval()
    start = _start_of(teacher)

    @torch.no_grad()
    def mean(model: Any) -> torch.Tensor:
        ids = [torch.tensor([tokenizer(r["prompt"])["input_ids"]]) for r in drawn[0]]
        return torch.stack([model(input_ids=x, output_hidden_states=True).hidden_states[-1][0, 0] for x in ids]).mean(0)

    w = load_file(run / "final" / "selector.safetensors")

    def mlp(name: str, x: torch.Tensor, layers: int) -> torch.Tensor:
        for i in range(layers):
            x = w[f"{name}.{2 * i}.weight"] @ x + w[f"{name}.{2 * i}.bias"]
            x = x.relu() if i < layers - 1 else x
        return x

    state = torch.cat([mlp("of_student", mean(start), 2), mlp("of_teacher", mean(taught), 2)])
    wanted = torch.sigmoid(mlp("actor", state, 3)).tolist()
    found = lines(first / "metrics.jsonl")[0]
    assert [found[f"weight/{k}"] for k in ("finetune", "response", "feature", "relation")] == pytest.approx(
        wanted, rel=1e-4
    )
    assert not any(k.startswith("seconds/learn") or k.startswith("evaluations") for k in found)


def _start_of(teacher: str) -> Any:
    """The student's start: of seed 0, with the teacher's tokens."""
    from distilling import BERT

    from alignkit import classifier
    from alignkit.config import Model

    cfg = Model(config={**BERT, "hidden_size": 8}, tokenizer=teacher, device="cpu")
    return classifier.load(cfg, 0, [], LABELS).model


# ---- a user's mistakes -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, words: list[str]) -> Callable[..., None]:
    """``refused(message, *words)``: the run is refused with the message before its first step; later words win."""

    def run(message: str, *more: str, method: list[str] = KSM) -> None:
        keys = {w.partition("=")[0] for w in more}
        kept = [w for w in (*method, *words) if w.partition("=")[0] not in keys]
        with pytest.raises(UserError, match=message):
            train(tmp_path / "runs", *kept, *more)
        assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))

    return run


@pytest.mark.parametrize(
    ("words_", "message"),
    [(["algo.phases=6"], r"algo\.phases=6: an episode has only 5 steps"),
     (["algo.teacher=null"], r"algo\.teacher: must be given"),
     (["data.dev=null"], r"data\.dev: must be given: one half of it gives the reward"),
     (["data.train=null"], r"data\.train: the select stage learns from it"),
     (["algo.episodes=0"], r"algo: episodes must be at least 1"),
     (["algo.action=both"], r"algo\.action: must be"),
     (["algo.td_form=other"], r"algo\.td_form: must be"),
     (["algo.credit=none"], r"algo\.credit: must be")],
    ids=lambda x: x[0] if isinstance(x, list) else "",
)  # fmt: skip
def test_mistakes(refused: Any, words_: list[str], message: str) -> None:
    refused(message, *words_)


@pytest.mark.parametrize("grid", ["[]", "[[1,1,1]]", "[[1,0,0,0],[0,0,0,0]]", "[[1,0,0,-1]]", "[[1,0,0,0],[]]"])
def test_points_that_are_no_mixture(refused: Any, grid: str) -> None:
    refused(r"algo: grid: each point must be four numbers of 0 or more, not all 0", f"algo.grid={grid}", method=GRID)


def test_a_dev_label_that_is_not_in_the_training_rows(refused: Any, tmp_path: Path) -> None:
    """In either half of dev."""
    for i in (26, 31):
        rows = rows_of()[24:40]
        rows[i - 24] = {**rows[i - 24], "response": "foods"}
        refused(rf"dev row {i - 24}: the response 'foods' is none of the model's 3 labels",
                f"data.dev={written(tmp_path / 'dev.jsonl', rows)}")  # fmt: skip


def test_an_unfinished_selection_cannot_be_used(
    tmp_path: Path, words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as m:
        stop_at(3, m)
        with pytest.raises(Stopped):
            train(tmp_path / "runs", *KSM, *words)
    (run,) = (tmp_path / "runs").iterdir()
    with pytest.raises(UserError, match=r"this run is not finished: repeat its command first"):
        train(tmp_path / "other", "+algo=selected", f"algo.selector={run}", *words)


def test_a_selector_is_no_model_and_a_student_no_selector(tmp_path: Path, words: list[str]) -> None:
    _, run = train(tmp_path, *GRID, *words)
    kept = [w for w in words if not w.startswith("algo.teacher")]
    with pytest.raises(UserError, match=r"algo\.teacher=.*: holds a selector, which is no model\. .* algo\.selector="):
        train(tmp_path / "runs", "+algo=kd", *kept, f"algo.teacher={run}")
    _, student = train(tmp_path, "+algo=kd", *words)
    with pytest.raises(UserError, match=r"algo\.selector=.*: there is no selector\. Train one with"):
        train(tmp_path / "runs", "+algo=selected", *words, f"algo.selector={student}")
