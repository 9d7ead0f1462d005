"""Classifiers: labels, texts that are cut, what is saved, what is measured of one, and which stage measures a folder."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, CAUSAL
from distilling import BERT, LABELS, LLAMA, TEXTS, build, rows_of, teacher_in, words_of, written
from running import SMALL_CAUSAL, SMALL_RUN, lines, train
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer

from alignkit import classifier
from alignkit.cli import evaluate_words
from alignkit.config import Model
from alignkit.errors import UserError

every_kind = pytest.mark.parametrize("kind", ["bert", "llama"])


@torch.no_grad()
def by_transformers(folder: Path | str, rows: list[dict[str, Any]], closed: bool = True) -> torch.Tensor:
    """(N, C) logits by transformers' own classes, a row at a time."""
    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        ids = tokenizer(row["prompt"])["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id
        found.append(model(input_ids=torch.tensor([ids if closed else ids[:-1]])).logits[0])
    return torch.stack(found)


# ---- the model -------------------------------------------------------------------------------------------------------


@every_kind
def test_a_saved_one_is_transformers_own(kind: str, tmp_path: Path) -> None:
    """The same logits, for any cut into parts, in the order of the rows; of a causal one the text stays open."""
    model, rows = build(kind), rows_of(30)
    model.save(tmp_path)
    wanted = by_transformers(tmp_path, rows, closed=kind == "bert")
    for budget in (16384, 25):
        torch.testing.assert_close(model.logits(rows, budget), wanted, rtol=1e-4, atol=1e-5)
    again = classifier.load(Model(path=str(tmp_path), device="cpu"), 5)
    assert torch.equal(again.logits(rows), model.logits(rows))
    assert type(again.model).__name__.endswith("ForSequenceClassification")


def test_an_encoder_that_is_built_reads_a_first_token_of_its_own() -> None:
    """<s> text </s>: the state of the first token stands for the text, as BERT's [CLS]."""
    model = build()
    batch = model.demonstrations(rows_of(5))
    ends = batch.prompt_mask.sum(1) - 1
    assert batch.prompt_ids[:, 0].tolist() == [model.tokenizer.bos_token_id] * 5
    assert batch.prompt_ids[torch.arange(5), ends].tolist() == [model.tokenizer.eos_token_id] * 5


def test_labels_keep_their_order(tmp_path: Path) -> None:
    """That of the alphabet, by code points; a text that looks like a number is a text."""
    given = ["9", "10", "été", "Zoo", "a b", "true", "null"]
    labels = classifier.labels_of([{"id": i, "response": t} for i, t in enumerate(given * 3)])
    assert labels == ["10", "9", "Zoo", "a b", "null", "true", "été"]
    model = classifier.load(Model(config=BERT, vocab_size=300, device="cpu"), 0, TEXTS, labels)
    model.save(tmp_path)
    again = classifier.load(Model(path=str(tmp_path), device="cpu"), 0)
    assert again.labels == model.labels == labels
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["id2label"] == {str(i): t for i, t in enumerate(labels)}
    assert config["label2id"] == {t: i for i, t in enumerate(labels)}
    rows = [{"id": i, "prompt": "x", "response": t} for i, t in enumerate(given)]
    assert again.demonstrations(rows).response_ids[:, 0].tolist() == [1, 0, 6, 2, 3, 5, 4]


@every_kind
def test_a_label_is_one_token_of_the_response(kind: str) -> None:
    batch = build(kind).demonstrations(rows_of(3))  # food, animal, place
    assert batch.response_ids.tolist() == [[1], [0], [2]]
    assert batch.mask.all() and batch.responses == ["food", "animal", "place"]


@every_kind
def test_a_text_that_is_cut_keeps_its_closing_token(kind: str) -> None:
    model = build(kind)
    long = {"id": 0, "prompt": "the good harbour " * 30, "response": "place"}
    short = {"id": 1, "prompt": "snail", "response": "animal"}
    full = model.tokenizer(long["prompt"])["input_ids"]
    assert len(full) > 64
    for limit in (10, None):
        one = classifier.Classifier(model.model, model.tokenizer, max_tokens=limit)
        batch = one.demonstrations([long, short])
        n = limit or 64  # the model's positions
        cut = [*full[: n - 1], full[-1]] if kind == "bert" else full[:n]
        assert batch.prompt_ids[0].tolist() == cut
        assert batch.prompt_mask[1].sum() < n
        assert one.too_long([long, short]) == 1
        assert torch.isfinite(one.logits([long, short])).all()


def test_a_head_that_a_path_lacks_is_drawn_from_the_seed(tmp_path: Path) -> None:
    AutoModel.from_pretrained(teacher_in(tmp_path / "t")).save_pretrained(tmp_path / "backbone")
    shutil.copytree(tmp_path / "t", tmp_path / "backbone", dirs_exist_ok=True, ignore=lambda _, names: [
        n for n in names if not n.startswith("tokenizer")])  # fmt: skip
    cfg = Model(path=str(tmp_path / "backbone"), device="cpu")
    heads = [classifier.load(cfg, seed, (), LABELS).model.classifier.weight for seed in (0, 0, 1)]
    assert heads[0].shape == (3, 16)
    assert torch.equal(heads[0], heads[1]) and not torch.equal(heads[0], heads[2])
    with pytest.raises(UserError, match="the weights lack classifier"):
        classifier.load(cfg, 0)


@pytest.mark.parametrize("labels", [["animal", "drink", "food"], ["no", "yes"]], ids=["other", "fewer"])
def test_a_head_of_other_labels_is_drawn_anew(tmp_path: Path, labels: list[str]) -> None:
    """What it has learned is of other labels, whether or not there are as many; the backbone is kept."""
    cfg = Model(path=teacher_in(tmp_path / "t"), device="cpu")
    same, other = classifier.load(cfg, 0, (), LABELS), classifier.load(cfg, 0, (), labels)
    old = AutoModelForSequenceClassification.from_pretrained(tmp_path / "t")
    assert torch.equal(same.model.classifier.weight, old.classifier.weight)
    assert other.labels == labels and other.model.classifier.weight.shape == (len(labels), 16)
    assert not torch.equal(other.model.classifier.weight[:2], old.classifier.weight[:2])
    assert torch.equal(other.model.bert.embeddings.word_embeddings.weight, old.bert.embeddings.word_embeddings.weight)


# ---- what is measured ------------------------------------------------------------------------------------------------


def test_what_is_measured(tmp_path: Path, cli: Any) -> None:
    """Accuracy, NLL of the label and agreement with the teacher, worked out from transformers' logits; by the run and by
    ``alignkit evaluate RUN``, which has no teacher."""
    teacher = teacher_in(tmp_path / "t")
    words = [w for w in words_of(tmp_path / "d", teacher) if not w.startswith("evaluate")]
    words = [*words, "evaluate.bootstrap=50", "evaluate.every=5"]
    code, _, err = cli("train", "+algo=kd", *words, f"run.root={tmp_path}/runs")
    assert code == 0, err
    (run,) = (tmp_path / "runs").iterdir()
    result = json.loads((run / "result.json").read_text())
    dev, test = rows_of()[24:40], rows_of()[40:]
    ours, theirs = by_transformers(run / "final", test), by_transformers(teacher, test)
    wanted = torch.tensor([LABELS.index(r["response"]) for r in test])
    logprobs = ours - ours.logsumexp(-1, keepdim=True)
    nll = [-float(logprobs[i, w]) for i, w in enumerate(wanted)]
    right = [int(logprobs[i].argmax()) == w for i, w in enumerate(wanted.tolist())]
    agree = [int(a.argmax()) == int(b.argmax()) for a, b in zip(ours, theirs, strict=True)]
    table = result["evaluation"]["after"]["test"]
    assert table["accuracy"]["value"] == pytest.approx(100 * sum(right) / 8)
    assert table["label_nll"]["value"] == pytest.approx(sum(nll) / 8, rel=1e-4)
    assert table["agreement"]["value"] == pytest.approx(100 * sum(agree) / 8)
    assert table["accuracy"]["n"] == 8
    assert table["label_nll"]["low"] < sum(nll) / 8 < table["label_nll"]["high"]
    outputs = lines(run / "outputs-after.jsonl")
    assert [o["prompt"] for o in outputs] == [r["prompt"] for r in test]
    assert [o["label"] for o in outputs] == [r["response"] for r in test]
    assert [o["response"] for o in outputs] == [LABELS[int(x.argmax())] for x in ours]
    assert [o["label_nll"] for o in outputs] == pytest.approx(nll, rel=1e-4)

    on_dev = by_transformers(run / "final", dev).argmax(-1)
    right_on_dev = sum(LABELS[int(x)] == r["response"] for x, r in zip(on_dev, dev, strict=True))
    assert result["best"] == {"step": 5, "value": pytest.approx(100 * right_on_dev / 16)}

    code, out, err = cli("evaluate", str(run), f"run.root={tmp_path}/e", "run.wandb=disabled")
    assert code == 0, err
    again = json.loads(next((tmp_path / "e").glob("evaluate_classes-*/result.json")).read_text())["evaluation"]["test"]
    assert again["accuracy"]["value"] == table["accuracy"]["value"]
    assert again["label_nll"]["value"] == pytest.approx(table["label_nll"]["value"], rel=1e-6)
    assert "agreement" not in again
    assert f"| accuracy % | {100 * sum(right) / 8:.2f}" in out


def test_a_model_that_is_trained_on_has_its_start_measured_too(tmp_path: Path) -> None:
    start = teacher_in(tmp_path / "t")
    words = [w for w in words_of(tmp_path / "d", None) if not w.startswith(("model", "+model", "evaluate"))]
    result, _ = train(tmp_path / "runs", "+algo=finetune", "model=hf", f"model.path={start}", *words, "evaluate.every=5",
                      "evaluate.final=last", "evaluate.bootstrap=20")  # fmt: skip
    test = rows_of()[40:]
    wanted = torch.tensor([LABELS.index(r["response"]) for r in test])
    before = torch.nn.functional.cross_entropy(by_transformers(start, test), wanted)
    table = result["evaluation"]
    assert table["before"]["test"]["label_nll"]["value"] == pytest.approx(float(before), rel=1e-4)
    fell = table["after"]["test"]["label_nll"]["value"] - float(before)
    assert table["after"]["difference"]["label_nll"]["value"] == pytest.approx(fell, rel=1e-3)


# ---- which stage measures --------------------------------------------------------------------------------------------


def test_evaluate_takes_the_stage_of_what_it_is_given(tmp_path: Path) -> None:
    def stage(folder: Path) -> str:
        return evaluate_words([str(folder), "data=rnnlg"])[0]

    _, run = train(tmp_path, "+algo=finetune", *words_of(tmp_path / "d", None))
    assert stage(run) == stage(run / "final") == "+algo=evaluate_classes"
    shutil.rmtree(run / "final")
    assert stage(run) == "+algo=evaluate_classes"  # of an unfinished run, its checkpoint

    quick = [*SMALL_CAUSAL, *SMALL_RUN, "algo.steps=1", "algo.batch_size=4", "evaluate.every=0", "evaluate.test=false",
             "evaluate.final=last"]  # fmt: skip
    _, run = train(tmp_path, "+algo=sft", "data=rnnlg", *quick)
    assert stage(run) == stage(run / "final") == "+algo=evaluate"
    _, run = train(tmp_path, "+algo=bt", *quick)
    assert stage(run) == stage(run / "final") == "+algo=evaluate_rm"

    one = classifier.load(Model(config=LLAMA, vocab_size=300, device="cpu"), 0, TEXTS, ["score"])
    one.save(tmp_path / "one")  # as transformers keeps reward models
    assert stage(tmp_path / "one") == "+algo=evaluate_rm"
    plain = AutoModelForSequenceClassification.from_config(build().model.config.__class__(**{
        k: v for k, v in BERT.items() if k != "model_type"}, vocab_size=300))  # fmt: skip
    plain.save_pretrained(tmp_path / "two")  # two labels, which its config.json does not name
    assert stage(tmp_path / "two") == "+algo=evaluate_classes"


# ---- a user's mistakes -----------------------------------------------------------------------------------------------


def refused(tmp_path: Path, rows: list[dict[str, Any]], message: str, *more: str) -> None:
    words = [w for w in words_of(tmp_path / "d", None) if not w.startswith("data.")]
    file = written(tmp_path / "own.jsonl", rows)
    with pytest.raises(UserError, match=message):
        train(tmp_path / "runs", "+algo=finetune", *words, f"data.train={file}", *more)
    assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))


def test_rows_without_a_label(tmp_path: Path) -> None:
    refused(tmp_path, rows_of(9), r"training row 0 has no label\. Set data\.response", "data.response=null")


def test_one_label(tmp_path: Path) -> None:
    rows = [{**r, "response": "food"} for r in rows_of(9)]
    refused(tmp_path, rows, r"every training row has the label 'food': there is nothing to tell apart")


def test_sentences_are_no_labels(tmp_path: Path) -> None:
    """More than 20, and more than half as many as rows."""
    rows = [{**r, "response": f"sentence {i}"} for i, r in enumerate(rows_of(24))]
    refused(
        tmp_path,
        rows,
        r"the 24 training rows have 24 different responses, so these are hardly labels\. .*algo\.task=write",
    )
    assert len(classifier.labels_of([{"id": i, "response": f"{i % 24}"} for i in range(48)])) == 24
    assert len(classifier.labels_of([{"id": i, "response": f"{i}"} for i in range(20)])) == 20


def test_a_label_that_the_model_does_not_have(tmp_path: Path, cli: Any) -> None:
    rows = rows_of(6)
    rows[4]["response"] = "fod"
    file = written(tmp_path / "odd.jsonl", rows)
    code, _, err = cli("evaluate", teacher_in(tmp_path / "t"), "data=custom", f"data.test={file}", "run.wandb=disabled")
    assert code == 2
    assert "row 4: the response 'fod' is none of the model's 3 labels. Did you mean 'food'?" in err


def test_a_policy_is_no_classifier(tmp_path: Path, build_policy: Any) -> None:
    build_policy("causal", **CAUSAL).save(tmp_path / "p")
    with pytest.raises(UserError, match="the weights lack score"):
        classifier.load(Model(path=str(tmp_path / "p"), device="cpu"), 0)


def test_texts_that_are_cut_are_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = [*rows_of(9), {"prompt": "a long one " * 9, "response": ANSWERS[0]}]
    words = [w for w in words_of(tmp_path / "d", None) if not w.startswith("data.")]
    train(
        tmp_path, "+algo=finetune", *words, f"data.train={written(tmp_path / 'own.jsonl', rows)}", "algo.max_tokens=12"
    )
    assert (
        "warning: 1 of 10 training texts have more than 12 tokens and are cut (algo.max_tokens)"
        in capsys.readouterr().err
    )


def test_a_teachers_order_of_labels_is_taken_over(tmp_path: Path) -> None:
    """Models of the hub do not have their labels in the alphabet's order."""
    from alignkit.algos.kd import KD

    backwards = classifier.load(Model(config=BERT, vocab_size=300, device="cpu"), 3, TEXTS, LABELS[::-1])
    backwards.save(tmp_path)
    rows = rows_of(12)
    for cfg in (Model(config=BERT, device="cpu"), Model(path=str(tmp_path), device="cpu")):
        algo = KD(teacher=str(tmp_path))
        algo.prepare(rows, ("response",))
        student = algo.build(cfg, 0, TEXTS, None)
        assert student.labels == LABELS[::-1]
        assert student.demonstrations(rows[:1]).response_ids.item() == LABELS[::-1].index(rows[0]["response"])
    assert torch.equal(student.model.classifier.weight, backwards.model.classifier.weight)
