"""The rm stage through the real ``train``, every method by listing: what it learns, resume, what it measures, bad data."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import ANSWERS, WORDS
from hydra.utils import instantiate
from running import SMALL_CAUSAL, SMALL_RUN, SMALL_SEQ2SEQ, composed, lines, train
from safetensors.torch import load_file
from scoring_models import cfg, model_of
from test_invariance import _merged
from test_stage_rl import stop_after
from transformers import AutoModel, AutoTokenizer

from alignkit import metrics, ops, policy, reward_model
from alignkit.algos._rm import RM
from alignkit.config import check, conf_dir
from alignkit.errors import Stopped, UserError
from alignkit.heads import Attributes

NAMES = sorted(p.stem for p in (conf_dir() / "algo").glob("*.yaml") if not p.stem.startswith("_"))
METHODS = [name for name in NAMES if _merged(name)["stage"] == "rm"]
SMALL = {
    "causal": SMALL_CAUSAL,
    "seq2seq": SMALL_SEQ2SEQ,
    "encoder": [
        "model=tiny_encoder", "model.vocab_size=300", "model.config.hidden_size=16", "model.config.intermediate_size=32",
        "model.config.num_hidden_layers=1", "model.config.num_attention_heads=2",
    ],
}  # fmt: skip
QUICK = [*SMALL_RUN, "algo.batch_size=8", "algo.steps=6", "algo.warmup=0", "evaluate.every=0", "evaluate.test=false"]
CASES = [(name, kind) for name in METHODS for kind in SMALL if (name, kind) != ("pairwise_rm", "encoder")]


def method(name: str, **settings: object) -> Any:
    return instantiate({**_merged(name)["algo"], **settings}, _convert_="object")


@pytest.fixture
def rows() -> list[dict[str, Any]]:
    """Six prompts, each with its own answer before another's, of different lengths; and ratings."""
    return [
        {"id": i, "prompt": w, "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 2) % 6], "response": ANSWERS[i],
         "references": [], "ratings": {"rating": [0.1, 0.9, 0.5, None, 0.2, 0.7][i]}}
        for i, w in enumerate(WORDS)
    ]  # fmt: skip


def built(name: str, kind: str) -> tuple[Any, Any]:
    """(method, model), the model tiny."""
    algo = method(name, **({"template": "{prompt} {first} {second}"} if name == "pairwise_rm" else {}))
    return algo, algo.build(cfg(kind), 0, WORDS + ANSWERS, None)


def test_methods_are_found() -> None:
    assert {"bt", "pcrm", "rm_regression", "pairwise_rm"} <= set(METHODS)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_micro_batches_do_not_change_the_gradient(name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    algo, model = built(name, kind)
    reader = model if isinstance(algo, RM) else model.policy
    reader.model.double()
    reader.compute = torch.float64
    batch = algo.whole(model, algo.batch(model, rows), torch.Generator())

    def gradient(parts: list[Any]) -> torch.Tensor:
        model.model.zero_grad(set_to_none=True)
        count = 0.0
        for part in parts:
            loss = algo.loss(model, part)
            loss.total.backward()
            count += loss.count
        return torch.cat([p.grad.flatten() for p in model.model.parameters() if p.grad is not None]) / count

    once, parts = gradient([batch]), batch.split(1)
    assert len(parts) == 6
    scale = float(once.abs().max())  # outputs are float32 whatever the model is
    torch.testing.assert_close(gradient(parts) / scale, once / scale, atol=1e-5, rtol=0)


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_few_steps_learn_a_handful_of_rows(name: str, kind: str, rows: list[dict[str, Any]]) -> None:
    algo, model = built(name, kind)
    optimizer = torch.optim.AdamW(model.model.parameters(), lr=0.01)
    batch = algo.whole(model, algo.batch(model, rows), torch.Generator())
    losses = []
    for _ in range(40):
        loss = algo.loss(model, batch)
        losses.append(float(loss.total.detach()) / loss.count)
        optimizer.zero_grad()
        (loss.total / loss.count).backward()
        optimizer.step()
    assert losses[-1] < 0.7 * losses[0]
    if algo.wants != "ratings":
        assert (model.compare(rows) > 0.5).all()
    else:
        found = torch.tensor([r["rating"] for r in model.ratings(rows)])
        known = [0, 1, 2, 4, 5]
        assert np.corrcoef(found[known], [0.1, 0.9, 0.5, 0.2, 0.7])[0, 1] > 0.8


@pytest.mark.parametrize(("name", "kind"), CASES)
def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, kind: str
) -> None:
    words = [f"+algo={name}", *SMALL[kind], *QUICK, "run.save_every=1"]
    words += ["model.config.max_position_embeddings=512"] if kind == "seq2seq" else []
    whole, run = train(tmp_path / "whole", *words)
    assert whole["status"] == "finished" and whole["stage"] == "rm"
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    broken, other = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]
    one, same = (json.loads((d / "final" / "reward_model.json").read_text()) for d in (run, other))
    assert one == same
    model = reward_model.load(str(run), "cpu")
    model.check()
    assert model.compare([{"id": 0, "prompt": "a", "chosen": "b", "rejected": "c"}]).isfinite().all()


@pytest.mark.parametrize(
    "words",
    [
        ["algo.constraint.kind=cosine"],
        ["algo.constraint.kind=cosine", "algo.constraint.scope=prompt_response", "algo.constraint.angular=false"],
        ["algo.constraint.kind=random"],
        ["algo.constraint.kind=fixed"],
        ["algo.readout=token_mean"],
        ["model.lora.r=2", "model.lora.dropout=0.1"],
        ["algo.trained=head", "algo.pooling=mean"],
    ],
    ids=lambda words: words[0].partition(".")[2] + str(len(words)),
)
def test_settings_that_draw_or_keep_something_resume_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    words = ["+algo=pcrm", *SMALL["causal"], *QUICK, "run.save_every=1", *words]
    whole, run = train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    broken, other = train(tmp_path / "broken", *words)
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert (run / "constraint.json").read_text() == (other / "constraint.json").read_text()
    reward_model.load(str(run), "cpu").check()


def start(folder: Path, pad: str = "<pad>") -> str:
    """The folder of a causal language model whose tokenizer pads with this token."""
    model = policy.load(cfg("causal"), 0, WORDS + ANSWERS)
    model.tokenizer.pad_token = pad
    model.save(folder)
    return str(folder)


@pytest.mark.parametrize("more", [["model.lora.r=2"], []], ids=["lora", "all"])
def test_where_padding_is_the_end_token_a_run_resumes_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    words = [
        *own(tmp_path, *TEXTS),
        "model=hf",
        f"model.path={start(tmp_path / 'start', '</s>')}",
        "run.save_every=1",
        *more,
    ]
    words = [word for word in words if not word.startswith(("model.config", "model.vocab", "model=tiny"))]
    whole, run = train(tmp_path / "whole", *words)
    with monkeypatch.context() as patch:
        stop_after(3, patch)
        with pytest.raises(Stopped):
            train(tmp_path / "broken", *words)
    assert train(tmp_path / "broken", *words)[0]["weights_sha256"] == whole["weights_sha256"]
    model = reward_model.load(str(run), "cpu")
    assert isinstance(model, reward_model.RewardModel) and model.pad not in model.eos
    model.check()


@pytest.mark.parametrize("more", ["model.compute=bfloat16", "model.dtype=bfloat16"])
def test_trained_in_bfloat16_it_is_a_reward_in_float32(tmp_path: Path, more: str) -> None:
    """Its scores are then a little others: no reason to refuse it."""
    words = [*own(tmp_path, *TEXTS), "model=hf", f"model.path={start(tmp_path / 'start')}", more]
    _, run = train(
        tmp_path / "runs", *[w for w in words if not w.startswith(("model.config", "model.vocab", "model=tiny"))]
    )
    model = reward_model.load(str(run), "cpu")
    assert model.tested == "torch.bfloat16"  # type: ignore[union-attr]
    model.check()


# ---- what it measures --------------------------------------------------------------------------------------------------


def test_measures_of_pairs_by_hand() -> None:
    """Margins 2, -1, 0, .5: p .880797, .731059, .5, .622459 stand in bins of their own."""
    margins, lengths = [2.0, -1.0, 0.0, 0.5], [(5, 3), (2, 2), (1, 9), (4, 3)]
    found = metrics.summary(metrics.pairs(margins, lengths, list("pqrs"), ["a", "a", "b", "a"]), 0)
    wanted = {
        "preference_accuracy": 100 * 2.5 / 4,
        "ties": 25.0,
        "margin": 0.375,
        "nll": (0.126928 + 1.313262 + 0.693147 + 0.474077) / 4,
        "ece": (1 - 0.880797 + 0.731059 + 0 + 1 - 0.622459) / 4,
        "longer_wins": 100 * (1 + 0.5 + 0 + 1) / 4,
        "section/a": 100 * 2 / 3,
        "section/b": 50.0,
        "macro": (200 / 3 + 50) / 2,
    }
    assert {name: cell["value"] for name, cell in found.items()} == pytest.approx(wanted, abs=1e-5)


def test_held_out_pairs_are_measured_now_and_then_and_after(tmp_path: Path) -> None:
    words = [
        "+algo=bt",
        *SMALL["encoder"],
        *SMALL_RUN,
        "algo.batch_size=8",
        "algo.steps=4",
        "algo.warmup=0",
        "evaluate.every=2",
    ]
    result, run = train(tmp_path, *words)
    assert result["evaluation"]["before"] is None  # what is built from scratch has nothing to show
    table = {name: cell["value"] for name, cell in result["evaluation"]["after"]["test"].items()}
    outputs = lines(run / "outputs-after.jsonl")
    assert len(outputs) == 12
    model = reward_model.load(str(run), "cpu")
    margins = [one["margin"] for one in outputs]
    for one in outputs:
        scores = model.score(
            [{"id": 0, "prompt": one["prompt"], "response": one[side]} for side in ("chosen", "rejected")]
        )
        assert one["margin"] == pytest.approx(float(scores[0] - scores[1]) * model.std, abs=1e-4)
    assert table["preference_accuracy"] == pytest.approx(100 * np.mean([(np.sign(m) + 1) / 2 for m in margins]))
    assert table["nll"] == pytest.approx(np.mean([math.log1p(math.exp(-m)) for m in margins]), abs=1e-6)
    assert table["margin"] == pytest.approx(np.mean(margins), abs=1e-6)
    assert (table["margin_max"], table["margin_sd"]) == pytest.approx((max(margins), np.std(margins)), abs=1e-6)
    scores = [one[f"score_{side}"] for one in outputs for side in ("chosen", "rejected")]
    longer = np.mean([(np.sign(len(o["chosen"]) - len(o["rejected"])) + 1) / 2 for o in outputs])
    assert table["longer_wins"] == pytest.approx(100 * longer)
    assert table["length_spearman"] == pytest.approx(
        spearman(scores, [len(one[side]) for one in outputs for side in ("chosen", "rejected")]), abs=1e-6
    )
    logged = lines(run / "metrics.jsonl")
    assert [m["step"] for m in logged if "dev/preference_accuracy" in m] == [2, 4]
    assert result["best"]["step"] in (2, 4)


def spearman(a: list[float], b: list[float]) -> float:
    def ranks(x: list[float]) -> np.ndarray:
        return np.array([sum(y < one for y in x) + (sum(y == one for y in x) - 1) / 2 for one in x])

    return float(np.corrcoef(ranks(a), ranks(b))[0, 1])


def test_held_out_ratings_are_measured(tmp_path: Path) -> None:
    words = ["+algo=rm_regression", *SMALL["encoder"], *SMALL_RUN, "algo.batch_size=8", "algo.steps=4", "algo.warmup=0"]
    result, run = train(tmp_path, *words, "evaluate.every=2")
    table = {name: cell["value"] for name, cell in result["evaluation"]["after"]["test"].items()}
    outputs = lines(run / "outputs-after.jsonl")
    predicted, rated = ([one[key]["rating"] for one in outputs] for key in ("predicted", "ratings"))
    assert table["error"] == pytest.approx(
        np.mean([(a - b) ** 2 for a, b in zip(predicted, rated, strict=True)]), abs=1e-6
    )
    assert table["pearson/rating"] == pytest.approx(np.corrcoef(predicted, rated)[0, 1], abs=1e-6)
    assert table["spearman/rating"] == pytest.approx(spearman(predicted, rated), abs=1e-6)
    assert table["correlation"] == table["pearson/rating"]
    # the head's weight is -1, fewer edits are better; mean and deviation are set when the model is exported, after this


def test_a_start_that_was_trained_is_measured_too_and_evaluate_rm_repeats_the_end(tmp_path: Path) -> None:
    words = [*SMALL["encoder"], *SMALL_RUN, "algo.batch_size=8", "algo.steps=2", "algo.warmup=0", "evaluate.every=0"]
    first, run = train(tmp_path / "one", "+algo=bt", *words)
    result, second = train(
        tmp_path / "two", "+algo=pcrm", *words, f"model.path={run}", "model.config=null", "algo.lr=0.0"
    )
    before, after = (result["evaluation"][when] for when in ("before", "after"))
    end = first["evaluation"]["after"]["test"]
    for name in ("preference_accuracy", "nll", "margin"):
        assert before["test"][name]["value"] == pytest.approx(end[name]["value"], abs=1e-4)  # the head was taken over
        assert after["difference"][name]["value"] == pytest.approx(0, abs=1e-4)  # nothing was learned
    again, there = train(tmp_path / "three", "+algo=evaluate_rm", "data=polite", f"model.path={second}", "evaluate.rows=12",
                         "evaluate.bootstrap=50", "run.wandb=disabled")  # fmt: skip
    for name, cell in after["test"].items():
        assert again["evaluation"]["test"][name]["value"] == pytest.approx(cell["value"], abs=1e-4)
    assert (there / "table.md").exists()


# ---- the constraint ----------------------------------------------------------------------------------------------------


def own(tmp_path: Path, *rows: dict[str, Any], name: str = "bt", kind: str = "encoder") -> list[str]:
    """A run on these pairs."""
    file = tmp_path / "pairs.jsonl"
    good = {"prompt": "hello", "chosen": "good day", "rejected": "what"}
    file.write_text("".join(json.dumps({**good, **row}) + "\n" for row in rows))
    return [
        f"+algo={name}",
        *SMALL[kind],
        *QUICK,
        "data=pairs",
        f"data.train={file}",
        "data.dev=null",
        "data.test=null",
    ]


TEXTS = [{"prompt": w, "chosen": ANSWERS[i], "rejected": ANSWERS[(i + 2) % 6]} for i, w in enumerate(WORDS)]


def test_the_distribution_of_the_ceilings_is_written_down(tmp_path: Path) -> None:
    """Length ratios counted token by token."""
    _, run = train(tmp_path / "runs", *own(tmp_path, *TEXTS, {"rejected": "good evening"}, name="pcrm"))
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    ceilings = []
    for row in [*TEXTS, {"chosen": "good day", "rejected": "good evening"}]:
        a, b = (tokenizer(row[side])["input_ids"] for side in ("chosen", "rejected"))  # closed with </s>
        parted = next(i for i in range(max(len(a), len(b))) if a[i : i + 1] != b[i : i + 1])
        short, long = sorted((len(a) - parted, len(b) - parted))
        ceilings.append(10 / (short / long + 0.001) - 5)
    found = json.loads((run / "constraint.json").read_text())
    assert found["pairs"] == 7
    at = [0.0, 0.1, 0.25, 0.5, 0.75, 0.9, 1.0]
    assert found["quantiles"] == pytest.approx({str(q): np.quantile(ceilings, q) for q in at}, abs=1e-4)
    assert len(set(ceilings)) > 3
    _, run = train(tmp_path / "runs", *own(tmp_path, *TEXTS, name="pcrm"), "algo.constraint.kind=fixed")
    assert set(json.loads((run / "constraint.json").read_text())["quantiles"].values()) == {4.5}


def test_similarities_of_an_encoder_are_those_of_its_first_states(tmp_path: Path) -> None:
    encoder = model_of("encoder")
    encoder.model.backbone.save_pretrained(tmp_path / "encoder")
    encoder.tokenizer.save_pretrained(tmp_path / "encoder")
    words = [
        *own(tmp_path, *TEXTS, name="pcrm"),
        "algo.constraint.kind=cosine",
        f"algo.constraint.encoder={tmp_path}/encoder",
    ]
    backbone, tokenizer = AutoModel.from_pretrained(tmp_path / "encoder").eval(), encoder.tokenizer

    @torch.no_grad()
    def first(prompt: str, text: str) -> torch.Tensor:
        ids = [*tokenizer(prompt)["input_ids"], *tokenizer(text)["input_ids"]]
        return backbone(input_ids=torch.tensor([ids])).last_hidden_state[0, 0].double()

    for more, scope in (([], False), (["algo.constraint.scope=prompt_response"], True)):
        _, run = train(tmp_path / f"runs{scope}", *words, *more)
        cosines = [
            torch.cosine_similarity(
                *(first(r["prompt"] if scope else "", r[side]) for side in ("chosen", "rejected")), dim=0
            )
            for r in TEXTS
        ]
        wanted = [1 - math.acos(min(max(float(c), 0), 1)) / math.pi for c in cosines]
        assert load_file(next(run.glob("similarity-*.safetensors")))["similarity"].tolist() == pytest.approx(
            wanted, abs=1e-4
        )
    with pytest.raises(UserError, match=r"algo\.constraint\.encoder=.*/nothing"):
        train(tmp_path / "runs", *words[:-1], f"algo.constraint.encoder={tmp_path}/nothing")


def test_similarities_without_an_encoder_are_of_the_start_models_mean_states(tmp_path: Path) -> None:
    _, run = train(tmp_path / "runs", *own(tmp_path, *TEXTS, name="pcrm", kind="causal"), "algo.constraint.kind=cosine",
                   "algo.lr=0.0")  # fmt: skip
    backbone, tokenizer = AutoModel.from_pretrained(run / "final").eval(), AutoTokenizer.from_pretrained(run / "final")

    @torch.no_grad()
    def mean(text: str) -> torch.Tensor:
        ids = tokenizer(text)["input_ids"]
        return backbone(input_ids=torch.tensor([[1, *ids]])).last_hidden_state[0, 1:].mean(0)  # after <s>

    wanted = ops.angular(
        torch.stack([torch.cosine_similarity(mean(r["chosen"]), mean(r["rejected"]), dim=0) for r in TEXTS])
    )
    assert load_file(next(run.glob("similarity-*.safetensors")))["similarity"].tolist() == pytest.approx(
        wanted.tolist(), abs=1e-4
    )


# ---- data --------------------------------------------------------------------------------------------------------------


def test_bad_pairs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Those of the pref stage are the same code; here that this stage goes through it."""
    with pytest.raises(UserError, match=r"pairs\.jsonl, line 2: the rejected response is empty"):
        train(tmp_path / "runs", *own(tmp_path, {}, {"rejected": " "}))
    _, run = train(tmp_path / "runs", *own(tmp_path, *TEXTS, {"rejected": "good day"}, {"rejected": "good day"}))
    assert "2 train pairs are left out" in capsys.readouterr().err
    assert json.loads((run / "data.json").read_text())["rows"]["train"] == 6


def test_texts_that_are_cut_are_counted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    train(
        tmp_path / "runs", *own(tmp_path, *TEXTS, {"chosen": "".join(map(chr, range(34, 124)))}), "algo.max_tokens=48"
    )
    said = " ".join(capsys.readouterr().err.split())
    assert "warning: 1 training responses do not fit into 48 tokens with their prompts" in said


def test_a_comparison_that_does_not_fit_is_refused_before_the_first_step(tmp_path: Path) -> None:
    words = own(tmp_path, *TEXTS * 20, {"chosen": "".join(map(chr, range(34, 124)))}, name="pairwise_rm", kind="causal")
    with pytest.raises(UserError, match=r"the prompt of row 120 has \d+ tokens; the model takes 128"):
        train(tmp_path / "runs", *words, "model.config.max_position_embeddings=128", "data.limit=200")
    assert not list(tmp_path.glob("runs/*/metrics.jsonl"))


def test_margins_that_are_missing_are_refused_before_the_first_step(tmp_path: Path) -> None:
    rows = [{**row, "margin": 1.0} for row in TEXTS]
    words = [*own(tmp_path, *rows, {}), "algo.margin=subtract"]
    with pytest.raises(UserError, match=r"row 6: column 'margin' must be a number"):
        train(tmp_path / "runs", *words)
    result, _ = train(tmp_path / "runs", *own(tmp_path, *rows), "algo.margin=subtract")
    assert result["status"] == "finished"


@pytest.mark.parametrize(
    ("name", "data", "said"),
    [("bt", "rnnlg", r"pairs: set data\.chosen"), ("pcrm", "mlqe_pe_hter", r"pairs: set data\.chosen"),
     ("pairwise_rm", "rnnlg", r"pairs: set data\.chosen"), ("rm_regression", "rnnlg", r"ratings: set data\.ratings")],
)  # fmt: skip
def test_data_without_what_the_method_learns_from_are_refused(tmp_path: Path, name: str, data: str, said: str) -> None:
    with pytest.raises(UserError, match=f"{name} learns from {said}"):
        train(tmp_path, f"+algo={name}", f"data={data}", *SMALL["causal"], *QUICK)


def rated(tmp_path: Path, *ratings: Any, held_out: list[Any] | None = None) -> list[str]:
    words = ["+algo=rm_regression", *SMALL["encoder"], *QUICK, "data=custom", "data.ratings=rating"]
    for split, values in (("train", list(ratings)), ("dev", held_out)):
        if values is not None:
            file = tmp_path / f"{split}.jsonl"
            rows = [{"prompt": f"p{i}", "response": f"answer {i}", "rating": v} for i, v in enumerate(values)]
            file.write_text("".join(json.dumps({k: v for k, v in row.items() if v != "absent"}) + "\n" for row in rows))
            words.append(f"data.{split}={file}")
    return [*words, "evaluate.every=2"]


@pytest.mark.parametrize("value", ["good", True, [1], {"rating": "x"}, float("nan")])
def test_a_rating_that_is_no_number_is_named(tmp_path: Path, value: Any) -> None:
    with pytest.raises(
        UserError, match=r"train\.jsonl, line 2: the rating 'rating' in column 'rating' must be a number or null"
    ):
        train(tmp_path / "runs", *rated(tmp_path, 1, value))


def test_ratings_that_are_missing(tmp_path: Path) -> None:
    """A column that is not there is refused; null is no rating, in training and held out."""
    with pytest.raises(UserError, match=r"train\.jsonl, line 2: no column 'rating', which data\.ratings asks for"):
        train(tmp_path / "runs", *rated(tmp_path, 1, "absent"))
    with pytest.raises(UserError, match=r"algo\.head\.names: no training row has a rating 'rating'"):
        train(tmp_path / "runs", *rated(tmp_path, None, None))
    result, run = train(tmp_path / "runs", *rated(tmp_path, 1, None, 0.5, held_out=[None, 1.0, 0.25, None, 0.5]))
    assert all(math.isfinite(m["loss"]) for m in lines(run / "metrics.jsonl"))
    dev = [m for m in lines(run / "metrics.jsonl") if "dev/error" in m]
    assert dev and all(math.isfinite(v) for m in dev for k, v in m.items() if k.startswith("dev/"))
    assert result["best"] is not None


def test_an_attribute_that_is_the_same_everywhere_does_not_spoil_the_selection(tmp_path: Path) -> None:
    """It has no correlation; the mean is over those that have one."""
    values = [{"help": i / 4, "tone": 1.0} for i in range(6)]
    head = "algo.head={_target_: alignkit.heads.Attributes, names: [help, tone], weights: [1.0, 0.5]}"
    result, run = train(tmp_path / "runs", *rated(tmp_path, *values, held_out=values), head)
    dev = [m for m in lines(run / "metrics.jsonl") if "dev/correlation" in m]
    assert [m["dev/correlation"] for m in dev] == [m["dev/pearson/help"] for m in dev]
    assert result["best"]["value"] == max(m["dev/correlation"] for m in dev)


def test_one_rated_row_is_enough_to_train(tmp_path: Path) -> None:
    _, run = train(tmp_path / "runs", *rated(tmp_path, 0.5))
    model = reward_model.load(str(run), "cpu")
    assert model.std == 1.0 and math.isfinite(model.mean)


def test_several_attributes(tmp_path: Path) -> None:
    values = [{"help": i, "tone": None if i == 1 else 1.0, "unused": 3} for i in range(4)]
    head = "algo.head={_target_: alignkit.heads.Attributes, names: [help, tone], weights: [1.0, 0.5]}"
    _, run = train(tmp_path / "runs", *rated(tmp_path, *values), head)
    model = reward_model.load(str(run), "cpu")
    assert isinstance(model, reward_model.RewardModel) and isinstance(model.head, Attributes)
    assert list(model.ratings([{"id": 0, "prompt": "a", "response": "b"}])[0]) == ["help", "tone"]


def test_a_comparator_cannot_be_an_encoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="encoder"):
        train(tmp_path, "+algo=pairwise_rm", *SMALL["encoder"], *QUICK)


def test_the_shipped_configurations_are_valid() -> None:
    for name in METHODS:
        check(composed([f"+algo={name}"]))


def test_what_is_kept_is_not_taken_for_another_runs(tmp_path: Path) -> None:
    """A run that was killed before its first checkpoint leaves its similarities; with other settings they are computed anew."""
    words = [
        *own(tmp_path, {}, {"rejected": "no"}, name="pcrm"),
        "algo.constraint.kind=cosine",
        "run.dir=" + str(tmp_path / "run"),
    ]
    train(tmp_path, *words)
    first = json.loads((tmp_path / "run" / "constraint.json").read_text())
    kept = list((tmp_path / "run").glob("similarity-*.safetensors"))
    assert len(kept) == 1
    for path in (tmp_path / "run").iterdir():
        if (path.is_dir() and path.name.startswith("checkpoint")) or path.name in ("result.json", "config.yaml"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    train(tmp_path, *words, "algo.constraint.angular=false")
    assert len(list((tmp_path / "run").glob("similarity-*.safetensors"))) == 2
    assert json.loads((tmp_path / "run" / "constraint.json").read_text()) != first


def test_ratings_without_a_response_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"have ratings but no response\. Set data\.response"):
        train(tmp_path / "runs", *rated(tmp_path, 1.0, 2.0), "data.response=null", "data.references=null")


def test_margins_below_0_cannot_weigh(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"algo\.margin=scale weighs a pair by it, so it must not be negative"):
        train(tmp_path / "runs", *own(tmp_path, {"margin": 1}, {"margin": -3}), "algo.margin=scale")
    train(tmp_path / "runs", *own(tmp_path, {"margin": 1}, {"margin": -3}), "algo.margin=subtract")


def test_the_mark_of_helpsteer_is_no_rating(tmp_path: Path) -> None:
    _, run = train(tmp_path / "runs", *rated(tmp_path, {"a": 1.0, "b": -100}, {"a": 2.0, "b": 3.0}), "algo.head.names=[a,b]",
                   "algo.head.weights=[1.0,1.0]")  # fmt: skip
    first = next(m for m in lines(run / "metrics.jsonl") if "error" in m)
    assert first["error"] < 50
