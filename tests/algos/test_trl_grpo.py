"""Settings of TRL's GRPO, by alignkit's names and by its own."""

from __future__ import annotations

import re
from types import SimpleNamespace

import pytest

from alignkit.algos.trl_grpo import TrlGRPO
from alignkit.errors import UserError
from alignkit.stages.trl import configured


def test_alignkits_names_and_the_rest():
    algo = TrlGRPO(k=4, prompts_per_step=6, max_new_tokens=9, kl=0.02, lr=3e-4, schedule="constant",
                   trl={"loss_type": "grpo", "gradient_accumulation_steps": 3})  # fmt: skip
    cfg = SimpleNamespace(
        seed=5, reward="any", model=SimpleNamespace(device="cpu", compute="bfloat16", gradient_checkpointing=False),
        run=SimpleNamespace(save_every=7, dir="x"), evaluate=SimpleNamespace(every=0),
    )  # fmt: skip
    found = configured(cfg, algo, 11, 1)
    wanted = {
        "num_generations": 4, "per_device_train_batch_size": 8, "gradient_accumulation_steps": 3, "max_completion_length": 9,
        "beta": 0.02, "learning_rate": 3e-4, "loss_type": "grpo", "max_steps": 11, "seed": 5, "bf16": True, "save_steps": 7,
        "output_dir": "x", "report_to": [], "use_cpu": True, "push_to_hub": False, "epsilon": 0.2,
    }  # fmt: skip
    assert {name: getattr(found, name) for name in wanted} == wanted
    assert found.lr_scheduler_type == "constant_with_warmup"


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("epsilonn", 0.1, "GRPOConfig has no such field. Did you mean 'epsilon'?"),
        ("learning_rate", 1.0, "is alignkit's to set: algo.lr"),
        ("beta", 1.0, "is alignkit's to set: algo.kl"),
        ("activation_checkpointing", True, "is alignkit's to set: model.gradient_checkpointing"),
        ("report_to", "wandb", "is alignkit's to set: run.wandb"),
        ("push_to_hub", True, "cannot be set: nothing is uploaded"),
        ("sync_ref_model", True, "cannot be set: a stopped run could then not go on"),
    ],
)
def test_what_is_no_setting_of_trl_here(name, value, said):
    with pytest.raises(ValueError, match="^" + re.escape(f"trl.{name}: {said}")):
        TrlGRPO(trl={name: value})


def test_a_step_is_cut_into_equal_parts():
    with pytest.raises(ValueError, match=r"gradient_accumulation_steps \(3\) must divide 8"):
        TrlGRPO(prompts_per_step=2, k=4, trl={"gradient_accumulation_steps": 3})


@pytest.mark.parametrize(
    ("per_sampling", "iterations", "parts", "window"),
    [(1, 1, 1, 1), (4, 1, 4, 1), (4, 2, 2, 4), (1, 3, 1, 3), (2, 1, 4, 1)],
)
def test_steps_that_go_by_the_same_samples(per_sampling, iterations, parts, window):
    """TRL samples every steps_per_generation * num_iterations micro-batches; a step is gradient_accumulation_steps of them."""
    config = SimpleNamespace(
        steps_per_generation=per_sampling, num_iterations=iterations, gradient_accumulation_steps=parts
    )
    assert TrlGRPO().window(config) == window


def test_another_trl_is_refused(monkeypatch):
    for version, fine in (("1.16.0", True), ("1.20.3", True), ("1.15.2", False), ("2.0.0", False)):
        monkeypatch.setattr("importlib.metadata.version", lambda name, v=version: v)
        if fine:
            TrlGRPO()
            continue
        with pytest.raises(UserError, match=rf"installed is {version}"):
            TrlGRPO()
