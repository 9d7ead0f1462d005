"""A configuration of TRL in alignkit's words: the command composes, means the same, and no key of the file is lost."""

from __future__ import annotations

import dataclasses
import json
import resource
import shlex
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from omegaconf import OmegaConf
from running import command, composed

from alignkit.config import check, whole
from alignkit.errors import UserError
from alignkit.from_trl import DEFAULTS, FIELDS, OPTIMIZER, Translation, guess, said, translate

CONFIGS = {"sft": "SFTConfig", "dpo": "DPOConfig", "kto": "KTOConfig", "reward": "RewardConfig", "grpo": "GRPOConfig",
           "rloo": "RLOOConfig"}  # fmt: skip
BASE = "model_name_or_path: Qwen/Qwen2.5-0.5B\ndataset_name: org/data\n"


def real(trainer: str) -> dict[str, Any]:
    """Field → default of the installed TRL's command line for a trainer."""
    import trl
    from trl.scripts.grpo import GRPOScriptArguments
    from trl.scripts.rloo import RLOOScriptArguments
    from trl.scripts.utils import DatasetMixtureConfig, ScriptArguments

    scripts = {"grpo": GRPOScriptArguments, "rloo": RLOOScriptArguments}.get(trainer, ScriptArguments)
    found = {}
    for cls in (getattr(trl, CONFIGS[trainer]), trl.ModelConfig, scripts, DatasetMixtureConfig):
        for f in dataclasses.fields(cls):
            found[f.name] = f.default_factory() if f.default is dataclasses.MISSING else f.default  # type: ignore[misc]
    return found


def of(text: str, trainer: str) -> Translation:
    return translate(yaml.safe_load(text), trainer)


def built(found: Translation) -> Any:
    """The command as a shell hands it on, composed and checked."""
    verb, *words = shlex.split(said(found, "x.yaml").split("\n")[0])[1:]
    assert verb == "train"
    cfg = composed(words)
    check(cfg)
    return cfg


def values(cfg: Any, *keys: str) -> list[Any]:
    """Of the composed configuration with the defaults of its classes."""
    filled = OmegaConf.create(whole(cfg))
    found = [OmegaConf.select(filled, key) for key in keys]
    return [OmegaConf.to_container(x) if OmegaConf.is_config(x) else x for x in found]


# ---- facts about TRL -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("trainer", FIELDS)
def test_names_and_defaults_are_those_of_the_installed_trl(trainer: str) -> None:
    theirs = real(trainer)
    assert FIELDS[trainer] == set(theirs)
    plain = {k: getattr(v, "value", v) for k, v in theirs.items()}
    for key, value in {**OPTIMIZER, **DEFAULTS[trainer]}.items():
        assert plain[key] == value, key


# ---- one realistic file a trainer ----------------------------------------------------------------------------

FILES = {
    "sft": (
        BASE
        + """
        learning_rate: 2.0e-4
        per_device_train_batch_size: 4
        gradient_accumulation_steps: 8
        max_steps: 1000
        warmup_ratio: 0.03
        lr_scheduler_type: cosine
        max_length: 2048
        packing: true
        assistant_only_loss: true
        use_peft: true
        lora_r: 32
        lora_target_modules: all-linear
        bf16: true
        output_dir: out/sft
        report_to: none
        seed: 42
        """,
        {
            "stage": "sft", "algo.lr": 2e-4, "algo.batch_size": 32, "algo.steps": 1000, "algo.warmup": 30,
            "algo.schedule": "cosine", "algo.max_response_tokens": 2048, "data.messages": "messages", "model.lora.r": 32,
            "model.lora.alpha": 32, "model.lora.dropout": 0.05, "model.lora.target_modules": "all-linear",
            "model.compute": "bfloat16", "run.dir": "out/sft", "run.wandb": "disabled", "seed": 42,
            "data.train": "hf:org/data", "model.path": "Qwen/Qwen2.5-0.5B", "algo.weight_decay": 0.0,
        },
    ),
    "dpo": (
        BASE
        + """
        learning_rate: 5e-7
        num_train_epochs: 2
        warmup_steps: 20
        beta: 0.05
        loss_type: robust
        label_smoothing: 0.1
        eval_strategy: steps
        eval_steps: 100
        save_steps: 200
        save_total_limit: 3
        gradient_checkpointing: true
        load_best_model_at_end: true
        """,
        {
            "stage": "pref", "algo._target_": "alignkit.algos.dpo.DPO", "algo.lr": 5e-7, "algo.epochs": 2, "algo.warmup": 20,
            "algo.beta": 0.05, "algo.smoothing": 0.1, "algo.correction": "robust", "algo.batch_size": 8,
            "data.dev": "hf:org/data:test", "evaluate.every": 100, "evaluate.final": "best", "run.save_every": 200, "run.keep": 3,
            "model.gradient_checkpointing": True, "algo.max_response_tokens": 1024, "algo.betas": [0.9, 0.999],
            "data.chosen": "{chosen}", "data.rejected": "{rejected}", "model.dtype": "float32",
        },
    ),
    "kto": (
        BASE + "beta: 0.2\ndesirable_weight: 1.33\ntorch_dtype: bfloat16\nlr_scheduler_type: constant_with_warmup\n",
        {
            "algo._target_": "alignkit.algos.kto.KTO", "algo.beta": 0.2, "algo.desirable_weight": 1.33,
            "algo.undesirable_weight": 1.0, "data.desirable": "label", "data.response": "{completion}", "model.dtype": "bfloat16",
            "algo.lr": 1e-6, "algo.epochs": 3, "algo.schedule": "constant", "algo.warmup": 0,
        },
    ),
    "reward": (
        BASE + "center_rewards_coefficient: 0.01\nmax_length: 512\nlearning_rate: 1.0e-5\ndataset_train_split: train_prefs\n",
        {
            "stage": "rm", "algo._target_": "alignkit.algos.bt.BT", "algo.centring": 0.01, "algo.max_tokens": 512,
            "algo.lr": 1e-5, "algo.epochs": 3, "algo.schedule": "linear", "data.train": "hf:org/data:train_prefs",
        },
    ),
    "grpo": (
        BASE
        + """
        reward_funcs: [accuracy_reward]
        per_device_train_batch_size: 8
        gradient_accumulation_steps: 4
        steps_per_generation: 8
        num_generations: 16
        num_iterations: 2
        max_completion_length: 1024
        max_steps: 600
        warmup_steps: 40
        temperature: 0.7
        top_p: 0.95
        top_k: 50
        beta: 0.001
        use_vllm: true
        """,
        {
            # a generation batch is 8 x 8 = 64 completions, 4 prompts; 64 / (8 x 4) = 2 updates a pass, 2 passes: 600 / 4 steps
            "algo._target_": "alignkit.algos.grpo.GRPO", "algo.k": 16, "algo.prompts_per_step": 4, "algo.minibatches": 2,
            "algo.epochs": 2, "algo.steps": 150, "algo.warmup": 10, "algo.max_new_tokens": 1024, "evaluate.max_new_tokens": 1024,
            "algo.temperature": 0.7, "algo.top_p": 0.95, "algo.top_k": 50, "algo.kl": 0.001, "algo.normalize": "tokens",
            "algo.lr": 1e-6, "reward._target_": "alignkit.rewards.rule.Answer", "reward.column": "solution", "data.response": None,
        },
    ),
    "rloo": (
        BASE
        + """
        reward_model_name_or_path: org/rm
        num_generations: 4
        per_device_train_batch_size: 16
        max_steps: 100
        epsilon: 0.1
        normalize_advantages: true
        reward_clip_range: [-5, 5]
        """,
        {
            "algo._target_": "alignkit.algos.rloo.RLOO", "algo.k": 4, "algo.prompts_per_step": 4, "algo.steps": 100,
            "algo.ratio": "sequence", "algo.clip": 0.1, "algo.whiten": True, "algo.reward_clip": 5.0, "algo.kl": 0.05,
            "algo.max_new_tokens": 512, "reward._target_": "alignkit.rewards.learned.Learned", "reward.model": "org/rm",
        },
    ),
}  # fmt: skip


@pytest.mark.parametrize("trainer", FILES)
def test_a_file_becomes_a_command_that_composes(trainer: str) -> None:
    text, wanted = FILES[trainer]
    config = yaml.safe_load("\n".join(line.strip() for line in text.split("\n")))
    cfg = built(translate(config, trainer))
    assert dict(zip(wanted, values(cfg, *wanted), strict=True)) == wanted


@pytest.mark.parametrize("trainer", FILES)
def test_what_a_file_leaves_out_is_trl_s_default(trainer: str) -> None:
    """With no more than a model and data, the optimizer is TRL's, not alignkit's."""
    reward = "reward_model_name_or_path: org/rm\n" if trainer in ("grpo", "rloo") else ""
    found = of(BASE + reward, trainer)
    cfg = built(found)
    wanted = {"algo.lr": DEFAULTS[trainer]["learning_rate"], "algo.schedule": "linear", "algo.warmup": 0,
              "algo.weight_decay": 0.0, "algo.betas": [0.9, 0.999], "algo.max_grad_norm": 1.0}  # fmt: skip
    if trainer not in ("grpo", "rloo"):
        wanted |= {"algo.batch_size": 8, "algo.epochs": 3}
    if trainer == "grpo":  # dapo's mean over tokens, no KL
        wanted |= {
            "algo.normalize": "tokens",
            "algo.kl": 0.0,
            "algo.k": 8,
            "algo.prompts_per_step": 1,
            "algo.clip": 0.2,
        }
    if trainer == "rloo":
        wanted |= {"algo.ratio": "sequence", "algo.kl": 0.05, "algo.k": 2, "algo.prompts_per_step": 4}
    assert dict(zip(wanted, values(cfg, *wanted), strict=True)) == wanted
    assert any(
        left == "learning_rate: " + str(wanted["algo.lr"]) and "alignkit's own" in right
        for left, right in found.defaults
    )


SAMPLES: dict[str, Any] = {"datasets": [{"path": "org/other"}], "dtype": "bfloat16", "lr_scheduler_type": "cosine"}


@pytest.mark.parametrize("trainer", FIELDS)
def test_no_key_is_lost(trainer: str) -> None:
    """Every key that TRL has, with another value than its default: said to be translated, or why it is not."""
    for key, default in real(trainer).items():
        if key in ("model_name_or_path", "dataset_name", "reward_model_name_or_path"):
            continue
        default = getattr(default, "value", default)
        value: Any = SAMPLES.get(key)
        if value is None:
            value = (not default if isinstance(default, bool) else default + 1 if isinstance(default, int | float) else
                     "something" if isinstance(default, str) or default is None else default)  # fmt: skip
        if key in ("epsilon_high", "steps_per_generation", "generation_batch_size", "center_rewards_coefficient", "eval_steps",
                   "save_total_limit"):  # fmt: skip
            value = 8
        config = {"model_name_or_path": "a/b", "reward_model_name_or_path": "org/rm"} | {key: value}
        if "reward_funcs" not in FIELDS[trainer]:
            del config["reward_model_name_or_path"]
        if key != "datasets":
            config["dataset_name"] = "org/data"
        found = translate(config, trainer)
        assert not found.unknown
        rows = [left for left, _ in (*found.translated, *found.missing)]
        assert any(f", {key}: " in f", {left}" for left in rows), key


def test_what_is_off_needs_no_word() -> None:
    found = of(
        BASE + "packing: false\nbf16: false\ngradient_checkpointing: false\nload_best_model_at_end: false\n", "sft"
    )
    assert not found.missing
    assert {left for left, right in found.translated if right.startswith("nothing to set")} == {
        "packing: false", "bf16: false", "gradient_checkpointing: false", "load_best_model_at_end: false",
    }  # fmt: skip
    assert of(BASE + "disable_dropout: false\n", "dpo").missing  # here there is none


# ---- losses --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("more", "trainer", "wanted"),
    [
        ("loss_type: ipo", "dpo", {"algo._target_": "alignkit.algos.ipo.IPO", "algo.logprobs": "mean"}),
        ("loss_type: [sigmoid]\nlabel_smoothing: 0.1", "dpo", {"algo.smoothing": 0.1, "algo.correction": "conservative"}),
        ("loss_type: grpo", "grpo", {"algo._target_": "alignkit.algos.grpo.GRPO", "algo.normalize": "responses"}),
        ("loss_type: dr_grpo", "grpo", {"algo._target_": "alignkit.algos.grpo.GRPO", "algo.normalize": "constant"}),
        ("loss_type: dr_grpo\nscale_rewards: false", "grpo", {"algo._target_": "alignkit.algos.dr_grpo.DrGRPO"}),
        ("scale_rewards: none\nbeta: 0.1", "grpo", {"algo._target_": "alignkit.algos.dr_grpo.DrGRPO", "algo.kl_in": "loss",
                                                    "algo.normalize": "tokens", "algo.kl_estimator": "k3", "algo.kl": 0.1}),
        ("epsilon_high: 0.3", "grpo", {"algo._target_": "alignkit.algos.dapo.DAPO", "algo.clip_high": 0.3, "algo.refills": 0,
                                       "algo.clip_low": 0.2}),
        ("epsilon_high: 0.2", "grpo", {"algo._target_": "alignkit.algos.grpo.GRPO"}),
    ],
)  # fmt: skip
def test_losses(more: str, trainer: str, wanted: dict[str, Any]) -> None:
    reward = "reward_model_name_or_path: org/rm\n" if trainer == "grpo" else ""
    cfg = built(of(BASE + reward + more, trainer))
    assert dict(zip(wanted, values(cfg, *wanted), strict=True)) == wanted


@pytest.mark.parametrize(
    ("more", "trainer", "key"),
    [
        ("loss_type: hinge", "dpo", "loss_type: hinge"),
        ("loss_type: [sigmoid, sft]", "dpo", 'loss_type: ["sigmoid", "sft"]'),
        ("loss_type: cispo", "grpo", "loss_type: cispo"),
        ("importance_sampling_level: sequence", "grpo", "importance_sampling_level: sequence"),
        ("reward_clip_range: [0, 5]", "rloo", "reward_clip_range: [0, 5]"),
        ("loss_type: dft", "sft", "loss_type: dft"),
        ("deepspeed: zero3.json", "sft", "deepspeed: zero3.json"),
        ("vllm_mode: server", "grpo", "vllm_mode: server"),
        ("max_prompt_length: 512", "dpo", "max_prompt_length: 512"),
        ("use_peft: true\nlora_dropout: 0.1", "dpo", "lora_dropout: 0.1"),
        ("lora_r: 8", "sft", "lora_r: 8"),  # without use_peft
        ("warmup_ratio: 0.1", "sft", "warmup_ratio: 0.1"),  # of a number of steps that nobody knows
    ],
)
def test_what_has_no_equivalent_is_said(more: str, trainer: str, key: str) -> None:
    found = of(BASE + ("reward_model_name_or_path: org/rm\n" if trainer in ("grpo", "rloo") else "") + more, trainer)
    assert [left for left, right in found.missing if left == key and right]
    built(found)


def test_a_step_without_prompts_is_refused() -> None:
    with pytest.raises(UserError, match="a value is none that `trl grpo` takes"):
        of(BASE + "num_generations: 0", "grpo")


def test_several_data_sets() -> None:
    text = "model_name_or_path: a/b\ndatasets:\n  - {path: org/one, split: part}\n  - {path: org/two}\n"
    found = of(text, "sft")
    assert built(found).data.train == "hf:org/one:part"
    assert any(left.startswith("datasets: ") and "org/one alone" in right for left, right in found.missing)
    one = of("model_name_or_path: a/b\ndatasets: [{path: json, data_files: my.jsonl}]", "sft")
    assert built(one).data.train == "my.jsonl"
    assert not one.missing


def test_a_reward_of_one_s_own_is_left_to_the_user() -> None:
    found = of(BASE + "reward_funcs: [my_lib.my_reward]", "grpo")
    assert any(left == "reward_funcs: my_lib.my_reward" for left, _ in found.missing)
    with pytest.raises(UserError, match="reward=NAME: there is no such reward"):
        built(found)


def test_rows_that_lie_here_are_counted(tmp_path: Path) -> None:
    """100 rows in batches of 8 over 3 epochs: 38 steps, a tenth of them 4; 3 epochs of 2 prompts a step: 150."""
    file = tmp_path / "my.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(100)), encoding="utf-8")
    text = f"model_name_or_path: a/b\ndataset_name: {file}\nwarmup_ratio: 0.1\n"
    cfg = built(of(text, "sft"))
    assert values(cfg, "algo.warmup", "data.train", "data.prompt", "data.response") == [4, str(file), "", "{text}"]
    file.write_text(json.dumps({"prompt": "a", "solution": "1"}) + "\n" * 2, encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8").strip() + "\n", encoding="utf-8")
    file.write_text(file.read_text(encoding="utf-8") * 100, encoding="utf-8")
    found = of(text + "num_generations: 4\nreward_funcs: accuracy_reward", "grpo")
    assert built(found).algo.steps == 150
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}) + "\n", encoding="utf-8")
    assert built(of(text, "sft")).data.messages == "messages"


# ---- mistakes ------------------------------------------------------------------------------------------------


def test_a_typo_is_no_key_of_trl() -> None:
    found = of(BASE + "lerning_rate: 3\nbeta: 0.3", "sft")
    assert found.unknown[0] == ("lerning_rate", "is no key of `trl sft`. Did you mean 'learning_rate'?")
    assert found.unknown[1][0] == "beta"  # of another trainer


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("dataset_name: a/b", "names no model_name_or_path"),
        ("model_name_or_path: a/b", "names neither dataset_name nor datasets"),
        (BASE + "learning_rate: fast", "learning_rate must be a number, is 'fast'"),
        (BASE + "learning_rate: true", "learning_rate must be a number, is True"),
        (BASE + "max_steps: .inf", "max_steps must be a number, is inf"),
        (
            BASE + "lr_scheduler_type: cosine_with_min_lr\nlr_scheduler_kwargs: {min_lr: low}",
            "a value is none that `trl sft` takes",
        ),
        (BASE + "max_length: 5\nmax_seq_length: 6", "max_seq_length and max_length are the same setting"),
    ],
)
def test_mistakes(text: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        of(text, "sft")


@pytest.mark.parametrize(
    ("more", "trainer"),
    [("packing: true", "sft"), ("label_smoothing: 0.1", "dpo"), ("desirable_weight: 1.3", "kto"), ("reward_funcs: []\nscale_rewards: false", "grpo"),
     ("center_rewards_coefficient: 0.1", "reward"), ("normalize_advantages: true", "rloo"), ("beta: 0.1\nloss_type: ipo", "dpo"), ("loss_type: kto", "kto")],
)  # fmt: skip
def test_the_trainer_is_guessed(more: str, trainer: str) -> None:
    assert guess(yaml.safe_load(BASE + more), "x.yaml") == trainer


def test_a_trainer_that_cannot_be_told_is_asked_for(tmp_path: Path, cli: Callable[..., tuple[int, str, str]]) -> None:
    (tmp_path / "c.yaml").write_text(BASE, encoding="utf-8")
    code, out, err = cli("from-trl", "c.yaml")
    assert (code, out) == (2, "")
    assert err == ("error: c.yaml: its keys are those of several trainers (sft, dpo, kto, reward, grpo, rloo). "
                   "Name one, as in --trainer sft.\n")  # fmt: skip
    code, out, _ = cli("from-trl", "c.yaml", "--trainer", "dpo")
    assert (code, out.startswith("alignkit train +algo=dpo model=hf ")) == (0, True)
    assert cli("from-trl", "--trainer=dpo", "c.yaml")[1] == out
    assert "Did you mean 'dpo'" in cli("from-trl", "c.yaml", "--trainer", "dpoo")[2]
    assert "name one file" in cli("from-trl")[2]
    assert "Did you mean 'c.yaml'" in cli("from-trl", "cc.yaml")[2]
    (tmp_path / "c.yaml").write_text("- a", encoding="utf-8")
    assert "must be a mapping" in cli("from-trl", "c.yaml")[2]
    (tmp_path / "c.yaml").write_text("a: [", encoding="utf-8")
    assert "not valid YAML" in cli("from-trl", "c.yaml")[2]


def test_it_answers_at_once(tmp_path: Path) -> None:
    """Half a second of CPU; neither torch nor TRL nor Hydra is imported."""
    (tmp_path / "c.yaml").write_text(BASE + "packing: true\n", encoding="utf-8")
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = command("from-trl", "c.yaml", cwd=tmp_path, PYTHONPROFILEIMPORTTIME="1")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    imports = {line.rpartition("|")[2].strip() for line in done.stderr.split("\n") if line.startswith("import time:")}
    assert done.returncode == 0 and done.stdout.startswith("alignkit train +algo=sft ")
    assert "alignkit.catalog" in imports and not imports & {"torch", "trl", "transformers", "hydra"}
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 1
