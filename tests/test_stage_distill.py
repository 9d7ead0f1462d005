"""Stage distill through the command line's own path: what it must be equal to, micro-batches, memory of the teacher, resume,
and a user's mistakes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import ANSWERS, CAUSAL, SEQ2SEQ, WORDS
from distilling import BERT, LABELS, TEXTS, build, rows_of, stop_at, teacher_in, words_of, written
from hydra.utils import instantiate
from running import SMALL_CAUSAL, SMALL_RUN, SMALL_SEQ2SEQ, lines, train
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

from alignkit import classifier, selector
from alignkit.algos._distill import Distill
from alignkit.config import Model, conf_dir
from alignkit.errors import Stopped, UserError
from alignkit.loading import train_tokenizer
from alignkit.run import Run
from alignkit.selector import KSM, Constant, Shape

FILES = {p.stem: yaml.safe_load(p.read_text(encoding="utf-8")) for p in (conf_dir() / "algo").glob("[a-z]*.yaml")}
METHODS = sorted(n for n, f in FILES.items() if f.get("stage") == "distill" or "_distill" in f.get("defaults", []))
WRITERS_ONLY: dict[str, dict[str, Any]] = {"on_policy_kd": {"share": 0.0}}  # the responses are the data's, here
LAST = ["evaluate.every=0", "evaluate.final=last", "algo.loss_scale=none"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> str:
    return teacher_in(tmp_path_factory.mktemp("teacher") / "t")


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, build_policy: Any) -> dict[str, str]:
    """Folders of teachers that write."""
    found = {}
    for kind, settings in (("causal", CAUSAL), ("seq2seq", {**SEQ2SEQ, "decoder_layers": 2})):
        folder = tmp_path_factory.mktemp(kind) / "t"
        build_policy(kind, seed=7, **settings).save(folder)
        found[kind] = str(folder)
    return found


def writing(kind: str, folder: Path) -> list[str]:
    """Words of a run that trains a model to write."""
    rows = [{"prompt": f"{w} {i}", "response": ANSWERS[i]} for i, w in enumerate(WORDS)]
    rows += [{"prompt": r["prompt"].upper(), "response": r["response"].upper()} for r in rows]
    file = written(folder / "write.jsonl", rows)
    return [
        *(SMALL_CAUSAL if kind == "causal" else SMALL_SEQ2SEQ), "data=custom", f"data.train={file}", *SMALL_RUN,
        "algo.batch_size=5", "algo.steps=5", "algo.warmup=2", "algo.lr=0.01", "evaluate.every=0", "evaluate.final=last",
        "algo.schedule=linear",
    ]  # fmt: skip


def method(name: str, **settings: Any) -> Distill:
    return instantiate({**FILES[name]["algo"], **WRITERS_ONLY.get(name, {}), **settings}, _convert_="object")  # type: ignore[no-any-return]


# ---- what it must be equal to ----------------------------------------------------------------------------------------


def test_methods_are_found() -> None:
    assert {"finetune", "kd", "pkd", "all_equal", "constant_mix", "random_hard", "random_soft", "dynamic_kd", "on_policy_kd",
            "selected"} <= set(METHODS)  # fmt: skip
    assert not {"ksm", "constant_grid", "sft"} & set(METHODS)


def test_labels_alone_are_plain_fine_tuning_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Invariant 1 of the card: against a loop over transformers' own classifier, from the same start, on the same rows, with
    the same seeds of dropout."""
    drawn: list[tuple[list[dict[str, Any]], int]] = []
    draw = Run.draw

    def recorded(self: Run, *args: Any) -> Any:
        drawn.append((draw(self, *args), torch.initial_seed()))
        return drawn[-1][0]

    monkeypatch.setattr(Run, "draw", recorded)
    words = words_of(tmp_path / "d", None, hidden_dropout_prob=0.1)
    _, run = train(
        tmp_path,
        "+algo=finetune",
        *words,
        *LAST,
        "algo.schedule=constant",
        "algo.max_grad_norm=0.5",
        "run.preflight=false",
    )

    texts = [t for r in rows_of(24) for t in (r["prompt"], r["response"])]
    cfg = Model(config={**BERT, "hidden_dropout_prob": 0.1}, vocab_size=300, device="cpu")
    start = classifier.load(cfg, 0, texts, LABELS)
    model, tokenizer = start.model, start.tokenizer
    assert type(model).__name__ == "BertForSequenceClassification"
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    norms = []
    assert len(drawn) == len({seed for _, seed in drawn}) == 5
    model.train()
    for rows, seed in drawn:
        rows = sorted(rows, key=lambda r: len(tokenizer(r["prompt"])["input_ids"]))  # no matter but for the last bit
        batch = tokenizer([r["prompt"] for r in rows], padding=True, return_tensors="pt", return_token_type_ids=False)
        labels = torch.tensor([[LABELS.index(r["response"])] for r in rows])
        torch.manual_seed(seed)
        logits = model(**batch).logits
        optimizer.zero_grad()
        (logits.logsumexp(-1, keepdim=True) - logits.gather(1, labels)).sum().backward()
        for p in model.parameters():
            p.grad.div_(len(rows))
        norms.append(float(torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)))
        optimizer.step()
    assert max(norms) > 0.5, "some are clipped"
    found, wanted = load_file(run / "final" / "model.safetensors"), model.state_dict()
    assert found.keys() == wanted.keys()
    assert [name for name in found if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("kind", ["causal", "seq2seq"])
def test_labels_alone_are_sft_bit_for_bit(tmp_path: Path, kind: str) -> None:
    """The same, of a model that writes; with dropout where it has some."""
    words = writing(kind, tmp_path)
    sft, _ = train(tmp_path / "runs", "+algo=sft", *words)
    ours, _ = train(tmp_path / "runs", "+algo=finetune", "algo.task=write", "evaluate.select=bleu", *words)
    mixed, _ = train(
        tmp_path / "runs",
        "+algo=constant_mix",
        "algo.weights=[1,0,0,0]",
        "algo.task=write",
        "evaluate.select=bleu",
        *words,
    )
    assert ours["weights_sha256"] == mixed["weights_sha256"] == sft["weights_sha256"]
    other, _ = train(tmp_path / "runs", "+algo=sft", *words, "seed=1")
    assert other["weights_sha256"] != sft["weights_sha256"]


def constant(folder: Path, weights: list[float]) -> str:
    folder.mkdir()
    Constant(weights).save(folder)
    return str(folder)


@pytest.mark.parametrize(
    ("weights", "name"), [([1, 0, 0, 0], "finetune"), ([1, 1, 0, 0], "kd"), ([1, 1, 1, 1], "all_equal")]
)
def test_constant_weights_are_the_method_of_these(tmp_path: Path, teacher: str, weights: list[int], name: str) -> None:
    """Invariants 1 and 2: knowledge with a weight of 0 may be computed, and changes nothing."""
    words = [*words_of(tmp_path / "d", teacher), *LAST]
    wanted, _ = train(tmp_path, f"+algo={name}", *words)
    mixed, _ = train(tmp_path, "+algo=constant_mix", f"algo.weights={weights}".replace(" ", ""), *words)
    folder = constant(tmp_path / "c", [float(w) for w in weights])
    selected, _ = train(tmp_path, "+algo=selected", f"algo.selector={folder}", *words)
    assert mixed["weights_sha256"] == wanted["weights_sha256"]
    assert selected["weights_sha256"] == wanted["weights_sha256"]


# ---- micro-batches, for every method ---------------------------------------------------------------------------------


def together(name: str, kind: str, folder: Path, writers: dict[str, str]) -> tuple[Distill, Any, list[dict[str, Any]]]:
    """A method with a student of half its teacher's width, in float64."""
    folder.mkdir()
    settings: dict[str, Any] = {"loss_scale": "init_mean", "scale_steps": 1}
    if name == "selected":
        torch.manual_seed(3)
        KSM(Shape(student=8, teacher=16, hidden=8)).save(folder)
        settings["selector"] = str(folder)
    if kind == "bert":
        teacher_in(folder / "t")
        rows, texts, config, how = rows_of(24), TEXTS, {**BERT, "hidden_size": 8}, {}
        settings["teacher"] = str(folder / "t")
    else:
        rows = [
            {"id": i, "prompt": w, "response": a, "references": [a]}
            for i, (w, a) in enumerate(zip(WORDS, ANSWERS, strict=True))
        ]
        texts = WORDS + ANSWERS
        config = {**CAUSAL, "hidden_size": 8} if kind == "causal" else {**SEQ2SEQ, "d_model": 8, "decoder_layers": 2}
        settings |= {"task": "write", "teacher": writers[kind]}
        how = {}
    algo = method(name, **settings)
    algo.prepare(rows, ("response",))
    student = algo.build(Model(config=config, vocab_size=300, device="cpu", **how), 0, texts, None)
    for one in filter(None, (student, algo.teacher_model)):
        one.model.double()
        one.compute = torch.float64
    if student.beside is not None:
        student.beside.double()
    return algo, student, rows


def gradient(algo: Distill, student: Any, rows: list[dict[str, Any]], budget: int) -> tuple[torch.Tensor, int]:
    algo.micro_tokens = budget
    algo._sums, algo._steps = [0.0] * 4, 0
    student.model.zero_grad()
    if student.beside is not None:
        student.beside.zero_grad()
    with torch.no_grad():
        parts = algo.whole(student, algo.collate(student)(rows), torch.Generator().manual_seed(11)).split(budget)
    count = 0.0
    for part in parts:
        loss = algo.loss(student, part)
        loss.total.backward()
        count += loss.count
    parameters = [*student.model.parameters(), *(student.beside.parameters() if student.beside is not None else ())]
    return torch.cat([p.grad.flatten() for p in parameters if p.grad is not None]) / count, len(parts)


@pytest.mark.parametrize(
    ("name", "kind"),
    [(n, k) for n in METHODS for k in ("bert", "causal", "seq2seq") if k != "bert" or n not in WRITERS_ONLY],
)
def test_the_cut_into_micro_batches_changes_nothing(
    name: str, kind: str, tmp_path: Path, writers: dict[str, str]
) -> None:
    algo, student, rows = together(name, kind, tmp_path / "x", writers)
    student.drop_dropout()
    whole, one = gradient(algo, student, rows, 10**6)
    parts, several = gradient(algo, student, rows, 20)
    assert one == 1 and several > 2
    assert whole.abs().max() > 1e-3
    torch.testing.assert_close(parts / whole.abs().max(), whole / whole.abs().max(), rtol=0, atol=1e-5)


# ---- the teacher in memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "causal", "seq2seq"])
def test_a_teacher_in_memory_says_the_same(tmp_path: Path, teacher: str, writers: dict[str, str], kind: str) -> None:
    if kind == "bert":
        words = words_of(tmp_path / "d", teacher, hidden_size=8)
    else:
        words = [*writing(kind, tmp_path), "algo.task=write", "evaluate.select=bleu", f"algo.teacher={writers[kind]}"]
    words = ["+algo=random_soft", *words, "algo.micro_tokens=30", "algo.loss_scale=init_mean", "algo.max_tokens=12"]
    _, asked = train(tmp_path / "a", *words)
    _, kept = train(tmp_path / "b", *words, "algo.cache_gb=0.1")
    a, b = (
        [{k: v for k, v in m.items() if "loss" in k} for m in lines(run / "metrics.jsonl") if "loss" in m]
        for run in (asked, kept)
    )
    assert len(a) == 5 and len(a[0]) == 5
    assert [sorted(m) for m in a] == [sorted(m) for m in b]
    for one, other in zip(a, b, strict=True):
        assert other == pytest.approx(one, rel=1e-5, abs=1e-6)


# ---- stopped and gone on with ----------------------------------------------------------------------------------------


def selector_in(folder: Path, student: int = 8, teacher: int = 16) -> str:
    folder.mkdir(parents=True)
    torch.manual_seed(0)
    module = KSM(Shape(student=student, teacher=teacher, hidden=8))
    with torch.no_grad():
        for p in module.parameters():
            p += 0.5 * torch.randn_like(p)
    module.save(folder)
    return str(folder)


def test_a_stopped_run_ends_where_an_unbroken_one_does(
    tmp_path: Path, teacher: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learned selector, losses that are scaled, a map between widths, dropout and the teacher in memory."""
    words = [
        "+algo=selected", f"algo.selector={selector_in(tmp_path / 's')}",
        *words_of(tmp_path / "d", teacher, hidden_size=8, hidden_dropout_prob=0.1), "algo.loss_scale=init_mean",
        "algo.scale_steps=4", "evaluate.every=0", "evaluate.final=last", "algo.cache_gb=0.1", "run.keep=9",
    ]  # fmt: skip
    whole, whole_dir = train(tmp_path / "whole", *words)
    with monkeypatch.context() as m:
        stop_at(3, m)
        with pytest.raises(Stopped, match="after step 3"):
            train(tmp_path / "broken", *words)
    broken, broken_dir = train(tmp_path / "broken", *words)
    assert broken["resumes"] == 1
    assert broken["weights_sha256"] == whole["weights_sha256"]
    assert broken["evaluation"] == whole["evaluation"]
    maps = [load_file(d / "checkpoint-5" / "state" / "beside.safetensors") for d in (whole_dir, broken_dir)]
    assert all(torch.equal(maps[0][k], maps[1][k]) for k in maps[0])
    a, b = ([{k: v for k, v in x.items() if k.startswith(("loss", "weight"))} for x in lines(d / "metrics.jsonl")]
            for d in (whole_dir, broken_dir))  # fmt: skip
    assert a == b and len(a) == 5
    assert a[0]["weight/feature"] != a[4]["weight/feature"], "what is selected follows the states"


def test_maps_are_in_checkpoints_and_not_in_the_final_model(tmp_path: Path, teacher: str) -> None:
    words = words_of(tmp_path / "d", teacher, hidden_size=8)
    _, run = train(tmp_path, "+algo=pkd", *words, "run.save_every=1", "run.keep=9", *LAST[:2], "algo.features=tokens")
    first, last = (load_file(run / f"checkpoint-{n}" / "state" / "beside.safetensors") for n in (1, 5))
    assert sorted(tuple(w.shape) for w in first.values()) == [(16, 8), (16, 8)]
    assert all(not torch.equal(first[k], last[k]) for k in first), "they are trained"
    assert not (run / "final" / "state").exists()
    names = load_file(run / "final" / "model.safetensors").keys()
    assert names == AutoModelForSequenceClassification.from_pretrained(run / "final").state_dict().keys()
    _, run = train(tmp_path, "+algo=pkd", *words_of(tmp_path / "d", teacher), *LAST[:2])
    assert not list(run.rglob("beside.safetensors"))


# ---- a user's mistakes -----------------------------------------------------------------------------------------------


@pytest.fixture
def refused(tmp_path: Path, teacher: str) -> Callable[..., None]:
    """``refused(message, *words)``: the run is refused with the message before its first step; later words win."""

    def run(message: str, *words: str, name: str = "kd", base: list[str] | None = None) -> None:
        base = words_of(tmp_path / "d", teacher) if base is None else base
        keys = {w.partition("=")[0] for w in words}
        kept = [w for w in base if w.partition("=")[0] not in keys]
        with pytest.raises(UserError, match=message):
            train(tmp_path / "runs", f"+algo={name}", *kept, *words)
        assert not list((tmp_path / "runs").glob("*/metrics.jsonl"))
        assert not list((tmp_path / "runs").glob("*/checkpoint-*"))

    return run


def test_no_teacher(refused: Any, tmp_path: Path) -> None:
    refused(r"algo\.teacher: must be given", base=words_of(tmp_path / "d", None))
    refused(r"algo\.teacher=.*nowhere: no such", f"algo.teacher={tmp_path}/nowhere")


def test_a_teacher_of_other_labels(refused: Any, tmp_path: Path) -> None:
    other = classifier.load(Model(config=BERT, vocab_size=300, device="cpu"), 0, TEXTS, ["animal", "drink", "food"])
    other.save(tmp_path / "other")
    refused(
        rf"algo\.teacher={tmp_path}/other: its labels are not .*: only the teacher has 'drink'; only data\.train has 'place'",
        f"algo.teacher={tmp_path}/other",
    )


def test_a_teacher_of_other_tokens(refused: Any, tmp_path: Path) -> None:
    other = build()
    other.tokenizer = train_tokenizer(["quite other texts, of which tokens are made"] * 3, 290)
    other.save(tmp_path / "other")
    base = [w for w in words_of(tmp_path / "d", None) if not w.startswith(("model", "+model"))]
    refused(
        r"algo\.teacher=.*: it reads other tokens than the student\. Set model\.tokenizer", f"model.path={tmp_path}/other",
        "model=hf", f"algo.teacher={teacher_in(tmp_path / 't2')}", base=base,
    )  # fmt: skip


def test_a_teacher_of_fewer_layers(refused: Any) -> None:
    refused(r"algo\.teacher=.*: has 4 layers, fewer than the student's 5", "model.config.num_hidden_layers=5")


def test_a_teacher_of_another_kind(refused: Any, tmp_path: Path, writers: dict[str, str], teacher: str) -> None:
    refused(r"algo\.teacher=.*: the weights lack score\.weight", f"algo.teacher={writers['causal']}")
    base = [*writing("causal", tmp_path), "algo.task=write", "evaluate.select=bleu"]
    refused("its kind is seq2seq, the student's causal", f"algo.teacher={writers['seq2seq']}", base=base)
    causal = teacher_in(tmp_path / "llama", "llama")
    refused(r"algo\.teacher=.*: its kind is causal, the student's encoder", f"algo.teacher={causal}")
    refused("is an encoder, which writes no text", f"algo.teacher={teacher}", base=base)


def test_an_encoder_decoder_classifier(refused: Any, tmp_path: Path) -> None:
    base = [w for w in words_of(tmp_path / "d", None) if not w.startswith(("model", "+model"))]
    refused(r"m2m_100 is an encoder–decoder model; a classifier is an encoder or a causal model", *SMALL_SEQ2SEQ,
            name="finetune", base=base)  # fmt: skip


def test_a_selector_that_cannot_be_used(refused: Any, tmp_path: Path) -> None:
    refused(r"algo\.selector: must be given", name="selected")
    refused(
        r"algo\.selector=.*/none: there is no selector\. Train one", f"algo.selector={tmp_path}/none", name="selected"
    )
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "command.txt").write_text("alignkit train +algo=ksm\n")
    refused(r"algo\.selector=.*/begun: this run is not finished", f"algo.selector={tmp_path}/begun", name="selected")
    folder = selector_in(tmp_path / "s", student=8)
    refused(r"of width 8 and 16; these have 16 and 16", f"algo.selector={folder}", name="selected")
    settings = Path(folder) / selector.SETTINGS
    settings.write_text(settings.read_text().replace('"hidden": 8', '"hidden": 9'))
    refused(r"selector\.json is damaged, or of another version", f"algo.selector={folder}", name="selected")
    settings.write_text("{")
    refused(r"selector\.json is damaged, or of another version", f"algo.selector={folder}", name="selected")


@pytest.mark.parametrize("weights", ["[1,1,1]", "[1,1,-1,0]", "[0,0,0,0]"])
def test_weights_that_are_no_mixture(refused: Any, weights: str) -> None:
    refused(r"algo: weights: must be four numbers of 0 or more, not all 0 \(finetune, response, feature, relation\)",
            f"algo.weights={weights}", name="constant_mix")  # fmt: skip


def test_a_metric_of_another_task(refused: Any, tmp_path: Path, writers: dict[str, str]) -> None:
    refused(r"evaluate\.select: with algo\.task=classify it must be accuracy; is 'bleu'", "evaluate.select=bleu")
    base = [*writing("causal", tmp_path), f"algo.teacher={writers['causal']}"]
    refused(
        r"evaluate\.select: with algo\.task=write it must be one of bleu, .*; is 'accuracy'",
        "algo.task=write",
        base=base,
    )


def test_too_little_memory_for_the_teacher(refused: Any) -> None:
    refused(r"algo\.cache_gb=1e-06: what the teacher says of 24 rows would take about .* GB", "algo.cache_gb=1e-6",
            name="pkd")  # fmt: skip


def test_a_held_out_label_that_is_not_in_the_training_rows(refused: Any, tmp_path: Path) -> None:
    """Also where only test has it, which is read when all training is done."""
    rows = rows_of()
    rows[45]["response"] = "foods"
    file = written(tmp_path / "odd.jsonl", rows[40:])
    for split in ("dev", "test"):
        refused(rf"{split} row 5: the response 'foods' is none of the model's 3 labels\. Did you mean 'food'\?",
                f"data.{split}={file}")  # fmt: skip


@pytest.mark.parametrize(
    ("word", "message"),
    [("algo.temperature=0", "temperature must be above 0"), ("algo.scale_steps=0", "scale_steps must be at least 1"),
     ("algo.cache_gb=-1", "cache_gb must be at least 0"), ("algo.features=cls", "algo.features: must be"),
     ("algo.loss_scale=mean", "algo.loss_scale: must be"), ("algo.task=judge", "algo.task: must be")],
)  # fmt: skip
def test_values_out_of_range(refused: Any, word: str, message: str) -> None:
    refused(message, word)


def test_arms_have_the_teachers_tokens_even_where_labels_alone_teach(tmp_path: Path, teacher: str) -> None:
    """A student from scratch whose tokenizer was trained on its few rows would be another model than those it stands beside."""
    words = [*words_of(tmp_path / "d", teacher), *LAST]
    found = [train(tmp_path, f"+algo={name}", *words)[1] / "final" / "tokenizer.json" for name in ("finetune", "kd")]
    assert found[0].read_text() == found[1].read_text()


@pytest.mark.parametrize("word", ["model.compute=bfloat16", "model.dtype=bfloat16"])
def test_maps_between_widths_in_bfloat16(tmp_path: Path, teacher: str, word: str) -> None:
    """About the losses of float32 at the first step, from the same start."""
    words = ["+algo=all_equal", *words_of(tmp_path / "d", teacher, hidden_size=8), *LAST]
    found = [lines(train(tmp_path, *words, *more)[1] / "metrics.jsonl")[0] for more in ([], [word])]
    names = [f"loss/{k}" for k in ("finetune", "response", "feature", "relation")]
    assert [found[1][n] for n in names] == pytest.approx([found[0][n] for n in names], rel=0.1)
