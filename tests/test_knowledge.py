"""Four kinds of knowledge and what weighs them, against the vectors of the method card (arXiv 2302.00444) and against losses
written out row by row with transformers' own models, without a batch."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import ANSWERS, CAUSAL, SEQ2SEQ, WORDS
from distilling import BERT, LABELS, LLAMA, TEXTS, rows_of, teacher_in
from torch import Tensor
from torch.nn import functional as F

from alignkit import losses, ops, selector
from alignkit.algos._distill import Distill
from alignkit.algos.all_equal import AllEqual
from alignkit.algos.constant_mix import ConstantMix
from alignkit.algos.ksm import KSM
from alignkit.batch import Batch
from alignkit.config import Model

CLASSIFIERS, WRITERS = ["bert", "llama"], ["causal", "seq2seq"]
CONFIGS: dict[str, dict[str, Any]] = {
    "bert": BERT, "llama": LLAMA, "causal": CAUSAL,
    "seq2seq": {**SEQ2SEQ, "decoder_layers": 2, "encoder_layers": 2, "dropout": 0.0},
}  # fmt: skip
every_kind = pytest.mark.parametrize("kind", [*CLASSIFIERS, *WRITERS])


def deep(kind: str, layers: int) -> dict[str, Any]:
    return {"decoder_layers": layers} if kind == "seq2seq" else {"num_hidden_layers": layers}


def wide(kind: str, width: int) -> dict[str, Any]:
    return {"d_model": width} if kind == "seq2seq" else {"hidden_size": width}


def written_rows() -> list[dict[str, Any]]:
    pairs = zip(WORDS, ANSWERS, strict=True)
    return [{"id": i, "prompt": w, "response": a, "references": [a]} for i, (w, a) in enumerate(pairs)]


@pytest.fixture
def learns(tmp_path: Path, build_policy: Any) -> Callable[..., tuple[Any, Any, list[dict[str, Any]]]]:
    """``learns(algo, kind, student, teacher)``: (student, teacher, rows) that the method has put together, settings of the
    models by name. The student has 2 layers, the teacher 4."""

    def make(
        algo: Distill, kind: str, student: dict[str, Any] | None = None, teacher: dict[str, Any] | None = None
    ) -> Any:
        folder = tmp_path / "teacher"
        if kind in CLASSIFIERS:
            teacher_in(folder, kind, **(teacher or {}))
            rows, texts = rows_of(7), TEXTS
        else:
            build_policy(kind, seed=7, **{**CONFIGS[kind], **deep(kind, 4), **(teacher or {})}).save(folder)
            rows, texts = written_rows(), WORDS + ANSWERS
        algo.task = "classify" if kind in CLASSIFIERS else "write"
        algo.teacher = str(folder)
        algo.prepare(rows_of() if kind in CLASSIFIERS else rows, ("response",))
        cfg = Model(config={**CONFIGS[kind], **(student or {})}, vocab_size=300, device="cpu")
        return algo.build(cfg, 0, texts, None), algo.teacher_model, rows

    return make


def alone(reader: Any, row: dict[str, Any]) -> tuple[Tensor, list[Tensor], Tensor]:
    """(logits (n, V), states (W, d) of the embeddings and of each layer, targets (n,)) of one row, read by itself."""
    prompt = reader.prompt_ids([row])[0]
    if hasattr(reader, "labels"):
        out = reader.model(input_ids=torch.tensor([prompt]), output_hidden_states=True)
        return out.logits, [h[0] for h in out.hidden_states], torch.tensor([LABELS.index(row["response"])])
    said = reader.encode_responses([row["response"]])[0]
    if reader.is_encoder_decoder:
        begun = [reader.model.config.decoder_start_token_id, *said[:-1]]
        out = reader.model(
            input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([begun]), output_hidden_states=True
        )
        return out.logits[0], [h[0] for h in out.decoder_hidden_states], torch.tensor(said)
    out = reader.model(input_ids=torch.tensor([[*prompt, *said]]), output_hidden_states=True)
    before = slice(len(prompt) - 1, -1)
    return out.logits[0, before], [h[0, before] for h in out.hidden_states], torch.tensor(said)


def four_of(
    student: Any, teacher: Any, row: dict[str, Any], layers: list[tuple[int, int]], temperature: float = 2.0
) -> Tensor:
    """(n, 4) of one row; ``layers``: (the student's, the teacher's), 0 being the embeddings."""
    z, ours, target = alone(student, row)
    with torch.no_grad():
        z_t, theirs, _ = alone(teacher, row)
    maps = student.beside if student.beside is not None else [lambda x: x] * len(layers)
    pairs = [(m(ours[a]), theirs[b]) for m, (a, b) in zip(maps, layers, strict=True)]
    response = temperature**2 * F.kl_div(
        (z / temperature).log_softmax(-1), (z_t / temperature).softmax(-1), reduction="none"
    ).sum(-1)
    feature = torch.stack([(a - b).square().mean(-1) for (a, b), (j, _) in zip(pairs, layers, strict=True) if j]).mean(
        0
    )
    if hasattr(student, "labels"):
        feature = feature.mean().expand(1)
    n = len(pairs[0][0])
    flows = [[x[i].T @ y[i] / n for i in (0, 1)] for x, y in pairwise(pairs)]
    relation = torch.stack([(a - b).square().mean() for a, b in flows]).mean().expand(len(z))
    return torch.stack([F.cross_entropy(z, target, reduction="none"), response, feature, relation], -1)


def wider(batch: Batch, kind: str) -> Batch:
    """Three more columns at the prompts' padded side and two behind the responses, filled with a real token.

    Not for a causal classifier: which token is a text's last, transformers tells by the padding's id.
    """
    n, left, fill_id = len(batch), kind == "causal", 0 if kind == "llama" else 9

    def more(x: Tensor, columns: int, value: int, before: bool) -> Tensor:
        fill = torch.full((n, columns), value, dtype=x.dtype)
        return torch.cat([fill, x] if before else [x, fill], 1)

    return batch.with_(
        prompt_ids=more(batch.prompt_ids, 3, fill_id, left), prompt_mask=more(batch.prompt_mask, 3, 0, left),
        response_ids=more(batch.response_ids, 2, 9, False), mask=more(batch.mask, 2, 0, False),
    )  # fmt: skip


# ---- the card's vectors --------------------------------------------------------------------------------------------


def test_e1_losses() -> None:
    student, teacher = torch.tensor([[2.0, 0.5]]), torch.tensor([[1.0, 3.0]])
    assert -ops.token_logprobs(student, torch.tensor([1])).item() == pytest.approx(1.701413, abs=1e-6)
    assert losses.response(student, teacher, 1.0).tolist() == pytest.approx([1.157275], abs=1e-6)
    assert losses.response(student, teacher, 2.0).tolist() == pytest.approx([1.411847], abs=1e-6)
    a, b = torch.tensor([[1.0, 0, 2]]), torch.tensor([[0.0, 1, 2]])
    assert losses.feature(a, b).tolist() == pytest.approx([0.666667], abs=1e-6)
    assert losses.patient(a, b).tolist() == pytest.approx([0.133333], abs=1e-6)


def test_e2_relation() -> None:
    ours = [torch.tensor([[[1.0, 0], [0, 1]]]), torch.tensor([[[1.0, 1], [0, 2]]])]
    theirs = [torch.tensor([[[1.0, 1], [0, 1]]]), torch.tensor([[[2.0, 0], [1, 1]]])]
    where = torch.ones(1, 2, dtype=torch.bool)
    assert losses.fsp(*ours, where).tolist() == [[[0.5, 0.5], [0, 1]]]
    assert losses.fsp(*theirs, where).tolist() == [[[1, 0], [1.5, 0.5]]]
    assert losses.relation(ours, theirs, where).tolist() == [0.75]
    # the mean over pairs of layers: a third layer equal to the second on both sides, whose flows are worked by hand:
    # [[1,1],[0,2]]' itself / 2 = [[.5,.5],[.5,2.5]]; [[2,0],[1,1]]' itself / 2 = [[2.5,.5],[.5,.5]]; mean of squares 2
    found = losses.relation([*ours, ours[1]], [*theirs, theirs[1]], where)
    assert found.tolist() == pytest.approx([(0.75 + 2.0) / 2])


def test_e2_tokens_that_do_not_count_are_not_in_the_flow() -> None:
    ours = [torch.tensor([[[1.0, 0], [0, 1], [7, 7]]]), torch.tensor([[[1.0, 1], [0, 2], [7, 7]]])]
    theirs = [torch.tensor([[[1.0, 1], [0, 1], [9, 5]]]), torch.tensor([[[2.0, 0], [1, 1], [5, 9]]])]
    where = torch.tensor([[True, True, False]])
    assert losses.relation(ours, theirs, where).tolist() == [0.75]


def test_e3_actions() -> None:
    loss, action = torch.tensor([0.9, 0.4, 0.6, 0.2]), torch.tensor([0.8, 0.6, 0.1, 0.5])
    assert float(selector.executed(action, "soft", 0.5) @ loss) == pytest.approx(1.12)
    assert selector.executed(action, "hard", 0.5).tolist() == [1, 1, 0, 0]  # strict: with >= the fourth would be 1
    assert float(selector.executed(action, "hard", 0.5) @ loss) == pytest.approx(1.3)
    assert float(selector.executed(action, "hard", 0.49) @ loss) == pytest.approx(1.5)
    assert selector.executed(action, "hard", 0.8).tolist() == [1, 0, 0, 0]  # none above it: the labels teach


def test_e4_targets_and_bonuses() -> None:
    reward, following = torch.tensor([0.693 - 0.650]), torch.tensor([0.5])
    standard = selector.td_target(reward, following, torch.zeros(1), 0.9, "standard")
    summarised = selector.td_target(reward, following, torch.zeros(1), 0.9, "as_summarised")
    assert standard.tolist() == pytest.approx([0.493])
    assert summarised.tolist() == pytest.approx([0.5387])
    assert (0.40 - standard).square().tolist() == pytest.approx([0.008649], abs=1e-6)
    assert (0.40 - summarised).square().tolist() == pytest.approx([0.019238], abs=1e-6)
    assert selector.td_target(reward, following, torch.ones(1), 0.9, "standard").tolist() == pytest.approx([0.043])
    assert selector.td_target(reward, following, torch.ones(1), 0.9, "as_summarised").tolist() == pytest.approx(
        [0.0387]
    )
    bonus = selector.soft_bonus(torch.tensor([0.7, 0.7, 0.2, 0.4]), torch.tensor([0.8, 0.6, 0.1, 0.5]))
    assert bonus == pytest.approx(0.015864, abs=1e-6)
    assert [round(selector.hard_bonus([n]), 4) for n in (1, 2, 3)] == [1.0, 0.7071, 0.5774]
    assert selector.hard_bonus([1, 2, 3]) == pytest.approx((1.0 + 0.7071 + 0.5774) / 3, abs=1e-4)


# ---- losses of models ------------------------------------------------------------------------------------------------


@every_kind
@pytest.mark.parametrize("widths", [(16, 16), (8, 16)], ids=["equal", "mapped"])
def test_losses_of_a_batch_are_those_of_its_rows_alone(learns: Any, kind: str, widths: tuple[int, int]) -> None:
    """All four, whatever the padding around them; of widths that differ, through the student's maps."""
    algo = AllEqual()
    student, teacher, rows = learns(algo, kind, wide(kind, widths[0]), wide(kind, widths[1]))
    assert (student.beside is None) == (widths[0] == widths[1])
    wanted = [four_of(student, teacher, row, [(1, 2), (2, 4)]).detach() for row in rows]
    assert len({len(one) for one in wanted}) > 1 or kind in CLASSIFIERS, "lengths that differ"
    batch = algo.collate(student)(rows)
    assert not batch.prompt_mask.all(), "prompts that are padded"
    for one in (batch, wider(batch, kind)):
        found, _ = algo.knowledge(student, one)
        torch.testing.assert_close(found[one.mask].detach(), torch.cat(wanted), rtol=2e-4, atol=2e-5)
        loss = algo.loss(student, algo.whole(student, one, torch.Generator()))
        assert loss.count == float(batch.mask.sum())
        assert float(loss.total.detach()) == pytest.approx(float(torch.cat(wanted).sum()), rel=1e-4)
    means = torch.cat(wanted).mean(0).tolist()
    names = ("finetune", "response", "feature", "relation")
    assert [loss.metrics[f"loss/{k}"] for k in names] == pytest.approx(means, rel=1e-4)
    assert [loss.metrics[f"weight/{k}"] for k in names] == [1, 1, 1, 1]


@pytest.mark.parametrize("kind", ["bert", "causal"])
@pytest.mark.parametrize(
    ("depths", "layers"),
    [((2, 4), [(1, 2), (2, 4)]), ((3, 12), [(1, 4), (2, 8), (3, 12)]), ((2, 5), [(1, 2), (2, 5)]),
     ((3, 3), [(1, 1), (2, 2), (3, 3)])],
)  # fmt: skip
def test_which_layers_look_at_which(learns: Any, kind: str, depths: tuple[int, int], layers: Any) -> None:
    algo = AllEqual()
    student, teacher, rows = learns(algo, kind, deep(kind, depths[0]), deep(kind, depths[1]))
    wanted = torch.cat([four_of(student, teacher, row, layers) for row in rows[:3]]).detach()
    batch = algo.collate(student)(rows[:3])
    torch.testing.assert_close(algo.knowledge(student, batch)[0][batch.mask].detach(), wanted, rtol=2e-4, atol=2e-5)


@every_kind
@pytest.mark.parametrize(
    ("how", "student_depth", "layers"),
    [("last", 2, [(1, 3), (2, 4)]), ("first", 2, [(1, 1), (2, 2)]), ("last", 1, [(0, 0), (1, 4)]),
     ("first", 1, [(0, 0), (1, 1)])],
)  # fmt: skip
def test_other_maps_of_layers(learns: Any, kind: str, how: Any, student_depth: int, layers: Any) -> None:
    """Of a teacher of four; embeddings look at embeddings. With the teacher in memory too."""
    algo = AllEqual(layer_map=how)
    student, teacher, rows = learns(algo, kind, deep(kind, student_depth))
    wanted = torch.cat([four_of(student, teacher, row, layers) for row in rows]).detach()
    batch = algo.collate(student)(rows)
    torch.testing.assert_close(algo.knowledge(student, batch)[0][batch.mask].detach(), wanted, rtol=2e-4, atol=2e-5)
    teacher_in_memory = algo._teacher
    assert teacher_in_memory is not None
    teacher_in_memory.ask(rows, algo.collate(teacher), 30, 0.1)
    torch.testing.assert_close(algo.knowledge(student, batch)[0][batch.mask].detach(), wanted, rtol=2e-4, atol=2e-5)


@pytest.mark.parametrize("how", ["skip", "last", "first"])
@every_kind
def test_the_states_that_a_selection_sees_are_the_last_ones(learns: Any, kind: str, how: Any) -> None:
    """Mean over the rows of [CLS], or of each row's mean state, whichever layers are compared."""
    algo = AllEqual(layer_map=how, micro_tokens=15)
    student, teacher, rows = learns(algo, kind)
    found = algo.states(student, algo.collate(student)(rows))
    for x, reader in zip(found, (student, teacher), strict=True):
        last = [alone(reader, row)[1][-1].detach() for row in rows]
        torch.testing.assert_close(
            x, torch.stack([h[0] if kind == "bert" else h.mean(0) for h in last]).mean(0), rtol=2e-4, atol=2e-5
        )


@every_kind
def test_a_student_of_one_layer_relates_it_to_the_embeddings(learns: Any, kind: str) -> None:
    """The embeddings are in the relation, never in the features."""
    algo = AllEqual()
    student, teacher, rows = learns(algo, kind, deep(kind, 1))
    wanted = torch.cat([four_of(student, teacher, row, [(0, 0), (1, 4)]) for row in rows]).detach()
    batch = algo.collate(student)(rows)
    torch.testing.assert_close(algo.knowledge(student, batch)[0][batch.mask].detach(), wanted, rtol=2e-4, atol=2e-5)


def test_the_temperature_is_of_both_sides_and_squared(learns: Any) -> None:
    algo = AllEqual(temperature=3.5)
    student, teacher, rows = learns(algo, "bert")
    wanted = torch.cat([four_of(student, teacher, row, [(1, 2), (2, 4)], 3.5) for row in rows]).detach()
    batch = algo.collate(student)(rows)
    torch.testing.assert_close(algo.knowledge(student, batch)[0][batch.mask].detach(), wanted, rtol=2e-4, atol=2e-5)


@every_kind
def test_features_of_summaries_are_pkds(learns: Any, kind: str) -> None:
    """States of [CLS], or means where there is no such token, made of length 1: |a - b|² / d, mean over the layers."""
    algo = AllEqual(features="summary")
    student, teacher, rows = learns(algo, kind)
    wanted = []
    for row in rows:
        (_, ours, _), (logits, theirs, _) = alone(student, row), alone(teacher, row)
        apart = []
        for a, b in ((1, 2), (2, 4)):
            x, y = (s[0] if kind == "bert" else s.mean(0) for s in (ours[a], theirs[b]))
            apart.append((x / x.norm() - y / y.norm()).square().sum() / len(x))
        wanted += [sum(apart) / 2] * len(logits)  # type: ignore[list-item]
    batch = algo.collate(student)(rows)
    for one in (batch, wider(batch, kind)):
        found = algo.knowledge(student, one)[0][..., 2]
        torch.testing.assert_close(found[one.mask].detach(), torch.stack(wanted).detach(), rtol=2e-4, atol=2e-5)


def test_kinds_of_knowledge_without_a_weight_are_not_computed(learns: Any) -> None:
    algo = ConstantMix(weights=[0.5, 2.0, 0.0, 0.0])
    student, teacher, rows = learns(algo, "bert")
    wanted = torch.cat([four_of(student, teacher, row, [(1, 2), (2, 4)]) for row in rows]).detach()
    loss = algo.loss(student, algo.whole(student, algo.collate(student)(rows), torch.Generator()))
    assert float(loss.total.detach()) == pytest.approx(float((wanted @ torch.tensor([0.5, 2.0, 0, 0])).sum()), rel=1e-4)
    assert {k for k in loss.metrics if k.startswith("loss/")} == {"loss/finetune", "loss/response"}


def test_without_a_teachers_weight_no_teacher_is_loaded(learns: Any) -> None:
    algo = ConstantMix(weights=[1.0, 0.0, 0.0, 0.0])
    learns(algo, "bert")
    assert algo.teacher_model is None


@every_kind
def test_maps_between_widths_are_learned(learns: Any, kind: str) -> None:
    algo = AllEqual()
    student, _, rows = learns(algo, kind, wide(kind, 8), wide(kind, 16))
    assert [tuple(m.weight.shape) for m in student.beside] == [(16, 8), (16, 8)]
    algo.loss(student, algo.whole(student, algo.collate(student)(rows), torch.Generator())).total.backward()
    assert all(m.weight.grad.abs().sum() > 0 for m in student.beside)
    assert not any(name.startswith("beside") for name, _ in student.model.named_parameters())


def test_a_teacher_of_fewer_positions_is_given_no_more_than_it_reads(learns: Any) -> None:
    """Texts are cut for both sides alike."""
    algo = AllEqual()
    student, teacher, rows = learns(algo, "bert", None, {"max_position_embeddings": 5})
    batch = algo.collate(student)(rows)
    assert batch.prompt_ids.shape[1] == 5 and student.max_positions == 64
    assert torch.equal(batch.prompt_ids, teacher.demonstrations(rows).prompt_ids)
    assert torch.isfinite(algo.knowledge(student, batch)[0]).all()
    assert 0 < student.too_long(rows) < len(rows)


# ---- scales ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["bert", "causal"])
def test_losses_are_divided_by_their_mean_over_the_first_steps(learns: Any, kind: str) -> None:
    """Worked out from the losses of three batches: the mean so far, then that of the first two for good. A state that goes
    through JSON brings it back."""
    algo = AllEqual(loss_scale="init_mean", scale_steps=2, micro_tokens=8)
    student, teacher, rows = learns(algo, kind)
    means = []
    for i, part in enumerate((rows[:3], rows[3:5], rows[1:4])):
        if i == 2:
            state = json.loads(json.dumps(algo.state()))
            algo._sums, algo._steps = [0.0] * 4, 0
            algo.load_state(state)
        by_row = torch.cat([four_of(student, teacher, row, [(1, 2), (2, 4)]) for row in part]).detach()
        means.append(by_row.mean(0))
        scale = torch.stack(means[:2]).mean(0)
        batch = algo.whole(student, algo.collate(student)(part), torch.Generator())
        torch.testing.assert_close(batch.extra["scale"], scale.expand(len(part), 4), rtol=2e-4, atol=1e-6)
        loss = algo.loss(student, batch)
        assert float(loss.total.detach()) / loss.count == pytest.approx(float((means[-1] / scale).sum()), rel=1e-3)
        assert loss.metrics["loss/finetune"] == pytest.approx(float(means[-1][0]), rel=1e-4), (
            "what is logged is unscaled"
        )
        with torch.no_grad():
            for p in student.model.parameters():
                p += 0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(i))
    assert not torch.allclose(means[0], means[1], rtol=0.02)


def test_the_scale_is_measured_without_dropout_and_draws_nothing(learns: Any) -> None:
    algo = AllEqual(loss_scale="init_mean")
    student, teacher, rows = learns(algo, "bert", {"hidden_dropout_prob": 0.5})
    student.model.train()
    before = torch.get_rng_state()
    batch = algo.whole(student, algo.collate(student)(rows), torch.Generator())
    assert torch.equal(torch.get_rng_state(), before)
    assert student.model.training
    student.model.eval()
    wanted = torch.cat([four_of(student, teacher, row, [(1, 2), (2, 4)]) for row in rows]).mean(0).detach()
    torch.testing.assert_close(batch.extra["scale"][0], wanted, rtol=2e-4, atol=1e-6)


# ---- what gradients reach --------------------------------------------------------------------------------------------


@every_kind
def test_nothing_reaches_the_teacher(learns: Any, kind: str) -> None:
    algo = AllEqual()
    student, teacher, rows = learns(algo, kind)
    before = copy.deepcopy(teacher.model.state_dict())
    student.model.train()
    optimizer = torch.optim.SGD(student.model.parameters(), lr=0.1)
    for _ in range(2):
        algo.loss(student, algo.whole(student, algo.collate(student)(rows), torch.Generator())).total.backward()
        optimizer.step()
    assert all(p.grad is None and not p.requires_grad for p in teacher.model.parameters())
    assert not teacher.model.training
    assert all(torch.equal(x, before[k]) for k, x in teacher.model.state_dict().items())


def ksm(learns: Any, kind: str = "bert", **settings: Any) -> tuple[KSM, Any, list[dict[str, Any]]]:
    """A knowledge selection at the start of its first episode."""
    algo = KSM(**{"hidden": 8, "updates": 3, "replay_batch": 5, "loss_scale": "none", **settings})
    student, _, rows = learns(algo, kind)
    algo.start(student, 0)
    algo.begin_episode(0, 3)
    return algo, student, rows


def copied(module: torch.nn.Module) -> dict[str, Tensor]:
    return {k: v.clone() for k, v in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: torch.nn.Module) -> set[str]:
    """First parts of the names of what has changed."""
    return {k.partition(".")[0] for k, v in module.state_dict().items() if not torch.equal(v, before[k])}


@every_kind
def test_the_students_gradient_does_not_reach_the_selection(learns: Any, kind: str) -> None:
    algo, student, rows = ksm(learns, kind)
    before = copied(algo.module)
    batch = algo.whole(student, algo.collate(student)(rows), torch.Generator().manual_seed(0))
    assert not batch.extra["weights"].requires_grad
    algo.loss(student, batch).total.backward()
    assert all(p.grad is None for p in algo.module.parameters())
    assert moved(before, algo.module) == set()


def test_learning_the_selection_leaves_the_student_alone(learns: Any) -> None:
    """Invariant 3 of the card."""
    algo, student, rows = ksm(learns)
    before = copied(student.model)
    for _ in range(2):
        for part in (rows[:3], rows[3:]):
            algo.whole(student, algo.collate(student)(part), torch.Generator().manual_seed(0))
        selection = copied(algo.module)
        algo.end_phase(1.0, 0.9, False, torch.Generator().manual_seed(0))
    assert moved(selection, algo.module) == {"of_student", "of_teacher", "actor", "critic"}
    assert moved(before, student.model) == set()
    assert all(p.grad is None for p in student.model.parameters())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [({"critic_lr": 1e-30}, {"of_student", "of_teacher", "actor"}), ({"actor_lr": 1e-30}, {"of_student", "of_teacher", "critic"})],
    ids=["actor", "critic"],
)  # fmt: skip
def test_what_a_step_of_the_actor_and_of_the_critic_moves(learns: Any, settings: Any, wanted: set[str]) -> None:
    """At a rate of 1e-30 a float32 weight stays: the other one's step is seen alone. Both train the maps of the states."""
    algo, student, rows = ksm(learns, credit="uniform", **settings)
    for part in (rows[:3], rows[3:]):
        algo.whole(student, algo.collate(student)(part), torch.Generator().manual_seed(0))
    before = copied(algo.module)
    algo.end_phase(1.0, 0.9, True, torch.Generator().manual_seed(0))
    assert moved(before, algo.module) == wanted
