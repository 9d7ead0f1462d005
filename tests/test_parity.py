"""First-step parity with TRL 1.16: the same tiny model and the same samples give the same loss and the same gradient.

TRL's own trainers compute advantages, reference log-probabilities and loss; only their generation is replaced by
responses fixed beforehand.
"""

from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import ANSWERS, WORDS
from datasets import Dataset
from trl import (
    DPOConfig,
    DPOTrainer,
    GRPOConfig,
    GRPOTrainer,
    KTOConfig,
    KTOTrainer,
    RLOOConfig,
    RLOOTrainer,
)

from alignkit import losses, ops
from alignkit.algos.dapo import DAPO
from alignkit.algos.dr_grpo import DrGRPO
from alignkit.algos.grpo import GRPO
from alignkit.algos.kto import KTO
from alignkit.algos.online_dpo import OnlineDPO
from alignkit.algos.rloo import RLOO
from alignkit.decode import Decode

# TRL tells its users of renamed settings of transformers that it uses itself
pytestmark = pytest.mark.filterwarnings("ignore:`(is_)?gradient_checkpointing` is deprecated:FutureWarning")

K, LONGEST = 4, 6
PLAIN_KL = {"use_bias_correction_kl": False}  # the paper's k3; TRL's default multiplies it by the ratio
SCORES = [1.0, 0.0, 0.25, 0.0, 0.2, 0.9, 0.4, 0.9]


def moved(policy, seed: int, size: float):
    """A policy whose weights lie ``size`` away from those of ``policy``."""
    other = copy.copy(policy)
    other.model = copy.deepcopy(policy.model)
    noise = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in other.model.parameters():
            p += size * torch.randn(p.shape, generator=noise)
    return other


@pytest.fixture(scope="module")
def world(build_policy, tmp_path_factory):
    """The start model (on disk, TRL's reference), the policy that sampled, the one that is trained, and the samples."""
    start = build_policy("causal")
    start.eos = [start.eos[0], *range(97, 160)]  # a good share of the tokens ends a response: lengths differ
    folder = tmp_path_factory.mktemp("start")
    start.save(folder)
    old = moved(start, 1, 0.03)
    current = moved(old, 2, 0.01)
    data = [{"prompt": WORDS[i], "id": i} for i in range(2)]
    generator = torch.Generator().manual_seed(5)
    batch = old.generate(data, K, Decode(max_new_tokens=LONGEST), generator=generator)
    assert batch.lengths.min() < batch.lengths.max(), "rows of unequal length, or the normalisations would agree"
    assert not batch.prompt_mask.all(), "prompts of unequal length"
    batch = batch.with_(scores=torch.tensor(SCORES))
    return SimpleNamespace(start=start, old=old, current=current, batch=batch, folder=folder)


def gradient(model) -> torch.Tensor:
    return torch.cat([p.grad.flatten() for _, p in sorted(model.named_parameters())])


def ours(algo, world, batch) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of alignkit at the current policy."""
    model = world.current.model
    model.zero_grad()
    loss = algo.loss(world.current, batch)
    (loss.total / loss.count).backward()
    return float(loss.total.detach()) / loss.count, gradient(model)


def theirs(trainer, inputs) -> tuple[float, torch.Tensor]:
    """(loss, gradient) of TRL at the current policy."""
    loss = trainer.compute_loss(trainer.model, inputs)
    loss.backward()
    return float(loss.detach()), gradient(trainer.model)


def assert_same(one: tuple[float, torch.Tensor], other: tuple[float, torch.Tensor]) -> None:
    assert one[0] == pytest.approx(other[0], rel=1e-4, abs=1e-6)
    assert float((one[1] - other[1]).norm() / other[1].norm()) < 1e-4
    assert other[1].norm() > 1e-3


def copied(world, root: Path, model=None):
    """A copy of a model that TRL may change, by default the current one; TRL looks its reference up under its path."""
    model = copy.deepcopy(world.current.model if model is None else model)
    model.config._name_or_path = str(root)
    return model


def common(path: Path) -> dict:
    return {
        "output_dir": str(path), "report_to": "none", "use_cpu": True, "bf16": False, "gradient_checkpointing": False,
        "disable_tqdm": True,
    }  # fmt: skip


def sampler(kind, config_kind, world, tmp_path, model=None, **settings):
    """A GRPO or RLOO trainer that is given the samples, and what it makes of them: its inputs to the loss."""
    batch = world.batch
    config = config_kind(
        **common(tmp_path), per_device_train_batch_size=len(batch), num_generations=K, max_completion_length=LONGEST,
        **settings,
    )  # fmt: skip
    trainer = kind(
        model=copied(world, world.folder, model),
        reward_funcs=lambda completions, **_: SCORES,
        args=config,
        train_dataset=Dataset.from_list([{"prompt": w} for w in WORDS]),
        processing_class=world.start.tokenizer,
    )
    trainer.model.eval()
    prompts = [ids[mask].tolist() for ids, mask in zip(batch.prompt_ids, batch.prompt_mask, strict=True)]
    responses = [ids[mask].tolist() for ids, mask in zip(batch.response_ids, batch.mask, strict=True)]
    if kind is GRPOTrainer:
        trainer._generate = lambda _: (prompts, responses, None, batch.responses, None, {}, None, [])
    else:
        trainer._generate = lambda _: (prompts, responses, batch.responses)
    return trainer, trainer._generate_and_score_completions([{"prompt": row["prompt"]} for row in batch.rows])


@pytest.mark.parametrize(
    ("algo", "settings"),
    [
        # mean of each response's tokens, then over responses; k3 in the loss
        (GRPO(k=K, kl=0.04), {"loss_type": "grpo", "beta": 0.04, **PLAIN_KL}),
        (GRPO(k=K, kl=0.5), {"loss_type": "grpo", "beta": 0.5, **PLAIN_KL}),
        (GRPO(k=K, kl=0.0, clip=0.05), {"loss_type": "grpo", "beta": 0.0, "epsilon": 0.05}),
        # what TRL calls GRPO by default: the mean of all tokens, no KL
        (GRPO(k=K, kl=0.0, normalize="tokens"), {}),
        # clip-higher
        (DAPO(k=K), {"loss_type": "dapo", "epsilon": 0.2, "epsilon_high": 0.28}),
        (DAPO(k=K, clip_low=0.1, clip_high=0.3), {"loss_type": "dapo", "epsilon": 0.1, "epsilon_high": 0.3}),
        (DrGRPO(k=K, max_new_tokens=LONGEST), {"loss_type": "dr_grpo", "scale_rewards": "none"}),
        # log-probabilities of the tempered policy
        (GRPO(k=K, kl=0.04, temperature=0.7), {"loss_type": "grpo", "beta": 0.04, "temperature": 0.7, **PLAIN_KL}),
    ],
    ids=["grpo", "grpo-kl", "grpo-clip", "trl-default", "dapo", "dapo-clip", "dr_grpo", "temperature"],
)
def test_grpo_family(world, tmp_path, algo, settings):
    """Advantages, reference log-probabilities, loss and gradient, off-policy by one small step so that ratios clip.

    baselines.md, "GRPO, Dr. GRPO, DAPO": ddof 1, eps 1e-4. Where TRL is not the paper: its default loss is DAPO's, and its
    default KL is k3 times the ratio (DeepSeek-V3.2's correction), turned off here. dr_grpo divides by the number of
    responses beside the constant, as alignkit does (verl divides by the constant alone).
    """
    trainer, inputs = sampler(GRPOTrainer, GRPOConfig, world, tmp_path, **settings)
    tau = torch.full((len(world.batch),), algo.temperature)
    batch = world.batch.with_(extra={**world.batch.extra, "logprob_temperature": tau})
    with torch.no_grad():
        batch = batch.with_(logprobs=world.old.forward(batch, tau))
        if algo.kl:
            batch = batch.with_(ref_logprobs=world.start.forward(batch, tau))
            torch.testing.assert_close(inputs["ref_per_token_logps"] * batch.mask, batch.ref_logprobs)
    batch = algo.credit(batch)
    torch.testing.assert_close(batch.advantages[:, 0], inputs["advantages"], rtol=1e-4, atol=1e-6)
    inputs["old_per_token_logps"] = batch.logprobs
    with torch.no_grad():
        assert algo.objective(world.current.forward(batch, tau), batch).metrics["clip_fraction"] > 0
    assert_same(ours(algo, world, batch), theirs(trainer, inputs))


def test_trl_weighs_the_kl_by_the_ratio(world, tmp_path):
    """TRL's default KL term is k3 times the token ratio, mean over tokens and responses; the paper's, alignkit's, plain k3."""
    found = []
    for settings in ({}, PLAIN_KL):
        trainer, inputs = sampler(GRPOTrainer, GRPOConfig, world, tmp_path, loss_type="grpo", beta=0.5, **settings)
        inputs["old_per_token_logps"] = world.batch.logprobs
        found.append(theirs(trainer, inputs)[0])
    with torch.no_grad():
        logprobs, ref = world.current.forward(world.batch), world.start.forward(world.batch)
    k3, ratio = ops.kl(logprobs, ref, "k3"), (logprobs - world.batch.logprobs).exp()
    apart = 0.5 * float(ops.masked_mean((ratio - 1) * k3, world.batch.mask).mean())
    assert abs(apart) > 1e-3
    assert found[0] - found[1] == pytest.approx(apart, rel=1e-3)


@pytest.mark.parametrize("kl", [0.0, 0.05])
@pytest.mark.parametrize("whiten", [False, True])
def test_rloo(world, tmp_path, kl, whiten):
    """Leave-one-out advantages with the KL (k1, summed) in the reward; the clipped ratio of the whole response.

    TRL's loss is not the paper's -A log pi(y|x) but the clipped ratio of the sequence: ``ratio=sequence`` here. Its
    whitening divides by std + 1e-4; alignkit's by sqrt(var + 1e-8): 1e-4 apart at a deviation of 1.
    """
    # TRL takes the log-probabilities of the sampling pass from the model as it is: the sampling one, then the current
    trainer, inputs = sampler(
        RLOOTrainer, RLOOConfig, world, tmp_path, world.old.model, beta=kl, epsilon=0.1, normalize_advantages=whiten
    )
    algo = RLOO(k=K, ratio="sequence", clip=0.1, kl=kl, whiten=whiten)
    with torch.no_grad():
        batch = world.batch.with_(ref_logprobs=world.start.forward(world.batch))
    batch = algo.credit(batch)
    wanted = inputs["advantages"]
    torch.testing.assert_close(batch.advantages[:, 0], wanted, rtol=5e-4 if whiten else 1e-4, atol=1e-5)
    torch.testing.assert_close((batch.logprobs * batch.mask).sum(1), inputs["old_logps"], rtol=1e-4, atol=1e-4)
    trainer.model.load_state_dict(world.current.model.state_dict())
    batch = batch.with_(advantages=wanted[:, None] * batch.mask)
    loss = algo.objective(world.current.forward(batch), batch)
    assert 0 < loss.metrics["clip_fraction"] < 1
    assert_same(ours(algo, world, batch), theirs(trainer, inputs))


def test_rloo_on_policy_gradient_is_the_papers(world, tmp_path):
    """At pi = pi_old the clipped sequence ratio has the value -mean A and the gradient of the paper's -A log pi(y|x)."""
    trainer, inputs = sampler(RLOOTrainer, RLOOConfig, world, tmp_path, beta=0.0)
    with torch.no_grad():
        batch = world.batch.with_(logprobs=world.current.forward(world.batch))
    batch = RLOO(k=K).credit(batch)
    found, wanted = ours(RLOO(k=K), world, batch), theirs(trainer, inputs)
    assert float((found[1] - wanted[1]).norm() / wanted[1].norm()) < 1e-4
    assert wanted[0] == pytest.approx(-float(batch.advantages[:, 0].mean()), abs=1e-6)


# ---- preference losses ------------------------------------------------------------------------------------------------


def preferred(world, scores: list[float] = SCORES):
    """The best and the worst of each prompt's samples, with what the start model thinks of them."""
    algo = OnlineDPO(k=K)
    with torch.no_grad():
        batch = world.batch.with_(scores=torch.tensor(scores), ref_logprobs=world.start.forward(world.batch))
    return algo.credit(batch)


def pair_trainer(world, tmp_path, batch, kind: str, beta: float):
    """A DPO trainer, and the pairs of ``batch`` in the form that its collator makes."""
    trainer = DPOTrainer(
        model=copied(world, world.folder),
        ref_model=copied(world, world.folder, world.start.model),
        args=DPOConfig(**common(tmp_path), loss_type=[kind], beta=beta),
        train_dataset=Dataset.from_list(
            [{"prompt": w, "chosen": a, "rejected": "no"} for w, a in zip(WORDS, ANSWERS, strict=True)]
        ),
        processing_class=world.start.tokenizer,
    )
    trainer.model.eval()
    pairs = [
        {
            "prompt_ids": batch.prompt_ids[i][batch.prompt_mask[i]].tolist(),
            "chosen_ids": batch.response_ids[i][batch.mask[i]].tolist(),
            "rejected_ids": batch.response_ids[i + 1][batch.mask[i + 1]].tolist(),
        }
        for i in range(0, len(batch), 2)
    ]
    return trainer, trainer.data_collator(pairs)


@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_dpo(world, tmp_path, beta):
    """-log sigmoid(beta d) of summed log-probabilities: TRL's ``sigmoid`` is the paper's."""
    batch = preferred(world)
    assert len(set(batch.lengths.tolist())) > 1
    trainer, inputs = pair_trainer(world, tmp_path, batch, "sigmoid", beta)
    assert_same(ours(OnlineDPO(k=K, beta=beta), world, batch), theirs(trainer, inputs))


def test_ipo_of_equal_lengths(world, tmp_path):
    """TRL averages IPO's log-ratios over a response's tokens; the paper, and alignkit, sum them.

    Where all responses have n tokens, (d / n - 1 / (2 beta))² = (d - 1 / (2 beta / n))² / n²: TRL's loss is the paper's
    at beta / n, over n².
    """
    n, beta = 3, 0.1
    whole = world.batch.mask[:, :n].all(1).nonzero()[:, 0]
    first, second = (whole[world.batch.group[whole] == g][:2] for g in (0, 1))
    rows = torch.cat([first, second])
    assert len(rows) == 4, "two responses of at least n tokens for each prompt"
    part = world.batch.take(rows)
    part = part.with_(mask=part.mask & (torch.arange(part.mask.shape[1]) < n)).take(torch.arange(4))
    with torch.no_grad():
        part = part.with_(ref_logprobs=world.start.forward(part), scores=torch.tensor([1.0, 0.0, 1.0, 0.0]))
    batch = OnlineDPO(k=2).credit(part)
    trainer, inputs = pair_trainer(world, tmp_path, batch, "ipo", beta)
    loss, grad = ours(OnlineDPO(k=2, preference="ipo", beta=beta / n), world, batch)
    assert_same((loss / n**2, grad / n**2), theirs(trainer, inputs))


def test_ipo_of_unequal_lengths(world, tmp_path):
    """With unequal lengths TRL's IPO is the paper's formula on averages; the paper's own, on sums, is another number."""
    batch = preferred(world)
    trainer, inputs = pair_trainer(world, tmp_path, batch, "ipo", 0.1)
    with torch.no_grad():
        log_ratios = world.current.forward(batch) - batch.ref_logprobs
    average, summed = ops.masked_mean(log_ratios, batch.mask), (log_ratios * batch.mask).sum(1)
    on_averages = float(losses.preference(average[0::2] - average[1::2], "ipo", 0.1).mean())
    on_sums = float(losses.preference(summed[0::2] - summed[1::2], "ipo", 0.1).mean())
    found = theirs(trainer, inputs)[0]
    assert found == pytest.approx(on_averages, rel=1e-4)
    assert ours(OnlineDPO(k=K, preference="ipo"), world, batch)[0] == pytest.approx(on_sums, rel=1e-4)
    assert abs(found - on_sums) > 1e-2 * on_sums


@pytest.mark.parametrize("paired", [True, False], ids=["pairs", "singles"])
def test_kto(world, tmp_path, paired):
    """TRL's loss on a batch whose mismatched responses are those of the next row, as alignkit's data set has them.

    TRL rotates responses within a device's batch; here its collator is given alignkit's. Both take z as the mean over the
    batch, not below 0, and the mean of the loss over responses.
    """
    algo = KTO(beta=0.5, desirable_weight=1.2, undesirable_weight=1.1)
    start, current = world.start, world.current
    sides = ("chosen", "rejected") if paired else ("response",)
    rows = [
        {"id": i, "prompt": w, "chosen": ANSWERS[i], "response": ANSWERS[i - 1], "rejected": ANSWERS[i - 2],
         "desirable": i % 3 > 0, "references": []}
        for i, w in enumerate(WORDS)
    ]  # fmt: skip
    rows = algo.prepare(rows, sides)
    batch = current.pairs(rows) if paired else current.judged(rows)
    with torch.no_grad():
        batch.extra["ref_logprob"] = (start.forward(batch) * batch.mask).sum(1)
        batch.extra |= {q.name: q.answer(start, batch) for q in algo.questions()}
        batch = algo.whole(current, batch, torch.Generator())
    assert batch.extra["reference_point"][0] > 0.02, "a reference point that matters"

    trainer = KTOTrainer(
        model=copied(world, world.folder),
        ref_model=copied(world, world.folder, start.model),
        args=KTOConfig(
            **common(tmp_path), beta=0.5, desirable_weight=1.2, undesirable_weight=1.1, per_device_train_batch_size=len(batch),
            train_sampling_strategy="sequential",
        ),
        train_dataset=Dataset.from_list(
            [{"prompt": w, "completion": a, "label": i > 2} for i, (w, a) in enumerate(zip(WORDS, ANSWERS, strict=True))]
        ),
        processing_class=start.tokenizer,
    )  # fmt: skip
    trainer.model.eval()
    other = current.answered(batch, [text for row in rows for text in row["mismatched"]])
    inputs = trainer.data_collator(
        [
            {
                "prompt_ids": batch.prompt_ids[i][batch.prompt_mask[i]].tolist(),
                "completion_ids": batch.response_ids[i][batch.mask[i]].tolist(),
                "KL_completion_ids": other.response_ids[i][other.mask[i]].tolist(),
                "label": i % 2 == 0 if paired else rows[i]["desirable"],
            }
            for i in range(len(batch))
        ]
    )
    assert_same(ours(algo, world, batch), theirs(trainer, inputs))
