"""``alignkit from-trl CONFIG.yaml``: a configuration of TRL's command line in alignkit's words.

The names and defaults below are facts of TRL 1.16 (``trl sft|dpo|kto|reward|grpo|rloo --config FILE``); a test compares them
with the installed TRL. Nothing of TRL is imported. What a file leaves to TRL's default, and alignkit's default differs from, is
written into the command too, so that the command trains what TRL would have trained.
"""

from __future__ import annotations

import ast
import json
import math
import re
import shlex
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from alignkit import catalog
from alignkit.data import SUFFIXES
from alignkit.errors import UserError, suggest
from alignkit.signature import settings_of

COMMON = """
accelerator_config activation_checkpointing activation_checkpointing_kwargs adam_beta1 adam_beta2 adam_epsilon
attn_implementation auto_find_batch_size average_tokens_across_devices batch_eval_metrics bf16 bf16_full_eval
bnb_4bit_quant_storage bnb_4bit_quant_type data_seed dataloader_drop_last dataloader_in_order
dataloader_multiprocessing_context dataloader_num_workers dataloader_persistent_workers dataloader_pin_memory
dataloader_prefetch_factor dataset_config dataset_name dataset_streaming dataset_test_split dataset_train_split
datasets ddp_backend ddp_broadcast_buffers ddp_bucket_cap_mb ddp_find_unused_parameters ddp_static_graph
ddp_timeout debug deepspeed disable_tqdm do_eval do_predict do_train dtype enable_jit_checkpoint
eval_accumulation_steps eval_delay eval_do_concat_batches eval_on_start eval_steps eval_strategy
eval_use_gather_object fp16 fp16_full_eval fsdp fsdp_config full_determinism gradient_accumulation_steps
gradient_checkpointing gradient_checkpointing_kwargs greater_is_better hub_always_push hub_model_id
hub_private_repo hub_revision hub_strategy hub_token ignore_bias_buffers ignore_data_skip include_for_metrics
include_num_input_tokens_seen label_names label_smoothing_factor learning_rate length_column_name
liger_kernel_config load_best_model_at_end load_in_4bit load_in_8bit local_rank log_level log_level_replica
log_on_each_node logging_first_step logging_nan_inf_filter logging_steps logging_strategy lora_alpha lora_dropout
lora_modules_to_save lora_r lora_target_modules lora_target_parameters lora_task_type lr_scheduler_kwargs
lr_scheduler_type max_grad_norm max_steps metric_for_best_model model_init_kwargs model_name_or_path
model_revision neftune_noise_alpha num_train_epochs optim optim_args optim_target_modules output_dir
pad_to_multiple_of parallelism_config per_device_eval_batch_size per_device_train_batch_size prediction_loss_only
project push_to_hub remove_unused_columns report_to restore_callback_states_from_checkpoint resume_from_checkpoint
run_name save_on_each_node save_only_model save_steps save_strategy save_total_limit seed skip_memory_metrics
streaming test_split_size tf32 torch_compile torch_compile_backend torch_compile_mode torch_empty_cache_steps
trackio_bucket_id trackio_space_id trackio_static_space_id train_sampling_strategy trust_remote_code
use_bnb_nested_quant use_cache use_cpu use_dora use_liger_kernel use_peft use_rslora warmup_steps weight_decay
"""
RL = """
beta cache_implementation chat_template_kwargs disable_dropout ds3_gather_for_generation epsilon epsilon_high
generation_batch_size generation_kwargs log_completions log_multimodal log_unique_prompts
mask_truncated_completions max_completion_length min_p num_completions_to_print num_generations
num_generations_eval num_iterations ref_model_mixup_alpha ref_model_sync_steps repetition_penalty reward_weights
router_aux_loss_coef shuffle_dataset steps_per_generation sync_ref_model temperature top_k top_p
transformers_continuous_batching_config use_transformers_continuous_batching use_transformers_paged use_vllm
vllm_enable_sleep_mode vllm_gpu_memory_utilization vllm_group_port vllm_max_model_length vllm_mode vllm_model_impl
vllm_server_base_url vllm_server_host vllm_server_port vllm_server_timeout vllm_structured_outputs_regex
vllm_tensor_parallel_size reward_funcs reward_model_name_or_path
"""
OWN = {  # trainer → its fields besides the common ones
    "sft": """
activation_offloading assistant_only_loss chat_template_path completion_only_loss dataset_kwargs dataset_num_proc
dataset_text_field eos_token eval_packing loss_type max_length packing packing_strategy pad_token padding_free
router_aux_loss_coef shuffle_dataset truncation_mode""",
    "dpo": """
activation_offloading beta dataset_num_proc disable_dropout discopop_tau f_alpha_divergence_coef f_divergence_type
label_smoothing ld_alpha loss_type loss_weights max_length pad_token padding_free precompute_ref_batch_size
precompute_ref_log_probs ref_model_mixup_alpha ref_model_sync_steps router_aux_loss_coef sync_ref_model truncation_mode
use_weighting""",
    "kto": """
activation_offloading beta dataset_num_proc desirable_weight disable_dropout loss_type max_length
precompute_ref_batch_size precompute_ref_log_probs ref_model_mixup_alpha ref_model_sync_steps router_aux_loss_coef
sync_ref_model undesirable_weight""",
    "reward": """
activation_offloading center_rewards_coefficient chat_template_path dataset_num_proc disable_dropout eos_token max_length
pad_token""",
    "grpo": f"""{RL}
cast_lm_head_to_fp32 delta entropy_coef entropy_coef_delta entropy_coef_max entropy_coef_min entropy_target
importance_sampling_level log_completions_hub_repo loss_type max_tool_calling_iterations multi_objective_aggregation
off_policy_mask_threshold sapo_temperature_neg sapo_temperature_pos scale_rewards top_entropy_quantile
use_adaptive_entropy use_bias_correction_kl vespo_k_neg vespo_k_pos vespo_lambda_neg vespo_lambda_pos
vllm_importance_sampling_cap vllm_importance_sampling_clip_max vllm_importance_sampling_clip_min
vllm_importance_sampling_correction vllm_importance_sampling_mode""",
    "rloo": f"{RL} normalize_advantages reward_clip_range",
}
FIELDS = {trainer: {*COMMON.split(), *own.split()} for trainer, own in OWN.items()}
RENAMED = {  # what earlier versions called it, or what is commonly written
    "torch_dtype": "dtype", "max_seq_length": "max_length", "evaluation_strategy": "eval_strategy",
    "warmup_ratio": "warmup_steps", "dataset_path": "dataset_name", "attn": "attn_implementation",
    "max_new_tokens": "max_completion_length", "no_cuda": "use_cpu",
}  # fmt: skip
GONE = {  # names of earlier versions without a successor → why and what instead
    "max_prompt_length": "prompts are never cut; leave out rows that are too long",
    "overwrite_output_dir": "run.overwrite=true starts anew; without it the same command resumes",
    "logging_dir": "metrics.jsonl lies in the run's directory",
    "group_by_length": "micro-batches are filled by tokens anyway: algo.micro_tokens",
    "generate_during_eval": "samples.jsonl holds samples: run.samples_every",
    "rpo_alpha": "no likelihood term in dpo; +algo=cpo and +algo=orpo have one",
    "reference_free": "+algo=simpo and +algo=cpo have no reference model",
    "save_safetensors": "checkpoints are always safetensors",
}
LAUNCH = ("num_processes", "num_machines", "accelerate_config", "config_file", "mixed_precision", "env", "config")
OPTIMIZER = {
    "per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "num_train_epochs": 3.0, "max_steps": -1,
    "lr_scheduler_type": "linear", "warmup_steps": 0, "weight_decay": 0.0, "adam_beta1": 0.9, "adam_beta2": 0.999,
    "max_grad_norm": 1.0, "logging_steps": 10, "save_steps": 500, "eval_strategy": "no", "bf16": None,
    "gradient_checkpointing": True, "dtype": "float32", "load_best_model_at_end": False, "lora_r": 16, "lora_alpha": 32,
    "lora_dropout": 0.05, "dataset_train_split": "train", "dataset_test_split": "test",
}  # fmt: skip
SAMPLING = {
    "max_completion_length": 512,
    "temperature": 1.0,
    "top_p": 1.0,
    "top_k": 0,
    "num_iterations": 1,
    "epsilon": 0.2,
}
DEFAULTS: dict[str, dict[str, Any]] = {  # TRL 1.16
    "sft": {"learning_rate": 2e-5, "max_length": 1024},
    "dpo": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1, "label_smoothing": 0.0, "loss_type": ["sigmoid"]},
    "kto": {"learning_rate": 1e-6, "max_length": 1024, "beta": 0.1, "desirable_weight": 1.0, "undesirable_weight": 1.0,
            "loss_type": "kto"},
    "reward": {"learning_rate": 1e-4, "max_length": 1024},
    "grpo": {"learning_rate": 1e-6, "num_generations": 8, "beta": 0.0, "scale_rewards": "group", "loss_type": "dapo",
             "importance_sampling_level": "token", **SAMPLING},
    "rloo": {"learning_rate": 1e-6, "num_generations": 2, "beta": 0.05, "normalize_advantages": False, **SAMPLING},
}  # fmt: skip
SCHEDULES = {
    "linear": "linear", "cosine": "cosine", "constant": "constant", "constant_with_warmup": "constant",
    "inverse_sqrt": "inverse_sqrt", "cosine_with_min_lr": "cosine",
}  # fmt: skip
MEANS = {"grpo": "responses", "dapo": "tokens", "bnpo": "tokens", "dr_grpo": "constant"}
WHY = (  # pattern of keys → why there is no equivalent, and what to do instead; the first that fits
    (r"vllm_|use_vllm|.*continuous_batching|use_transformers_paged|cache_impl", "alignkit samples by its own decoder, in the training process, unless engine=vllm or engine=vllm_server is chosen"),
    (r"deepspeed|fsdp|ddp_|parallelism|accelerator_config|local_rank|ds3_|average_tokens",
     "a run is one process on one device; choose a model that fits, or model.lora.r=8"),
    (r"load_in_|bnb_|use_bnb", "no quantised weights; model.compute=bfloat16 and model.lora.r=8 save memory"),
    (r"push_to_hub|hub_|trackio", "nothing is uploaded; final/ is a from_pretrained folder that you can upload"),
    (r"dataloader_|dataset_num_proc|.*streaming|data_seed|shuffle_dataset|remove_unused|train_sampling|ignore_data_skip",
     "rows are drawn from a permutation that `seed` decides"),
    (r"packing|.*_packing|padding_free|pad_|packing_strategy", "micro-batches are filled up to algo.micro_tokens, which changes no result"),
    (r"logging_|log_|disable_tqdm|num_completions|include_num|skip_memory", "every step is in metrics.jsonl; run.samples_every says how often samples are kept"),
    (r"resume_from|restore_callback|save_only|save_on|enable_jit|auto_find", "the same command resumes from the last checkpoint"),
    (r"precompute_ref", "log-probabilities of the start model are always computed once and kept"),
    (r"sync_ref|ref_model_", "the reference is the start model and stays fixed"),
    (r"torch_compile|use_liger|liger_|use_cache|torch_empty|tf32|attn_impl|.*offloading|activation_check|use_kernels|cast_lm|gradient_checkpointing_kwargs",
     "speed and memory: see algo.micro_tokens, model.compute, model.gradient_checkpointing"),
    (r"chat_template|eos_token|truncation_mode|dataset_kwargs", "the tokenizer's own template (data.chat, data.messages) and end token are used"),
    (r"disable_dropout", "preferences and RL run without dropout, SFT with the model's own"),
    (r"do_|eval_|per_device_eval|prediction_loss|batch_eval|bf16_full|fp16_full|label_names|include_for|num_generations_eval",
     "see evaluate.* in `alignkit show settings`"),
    (r"lora_|use_dora|use_rslora", "LoRA has r, alpha, dropout and target_modules here"),
    (r"optim|adam_eps", "the optimizer is torch's AdamW, eps 1e-8"),
    (r"entropy|top_entropy|use_adaptive", "no entropy term; the KL (algo.kl) is the only regulariser"),
)  # fmt: skip


CLASSES = {"model": "Model", "evaluate": "Evaluate", "run": "RunSettings"}


@dataclass
class Translation:
    """What became of a file: the words of ``alignkit train``, and (what TRL's file or default says, what came of it)."""

    trainer: str
    words: list[str] = field(default_factory=list)
    translated: list[tuple[str, str]] = field(default_factory=list)  # key: value → word
    missing: list[tuple[str, str]] = field(default_factory=list)  # key: value → why, and what to do instead
    unknown: list[tuple[str, str]] = field(default_factory=list)  # key → no key of this trainer
    notes: list[tuple[str, str]] = field(default_factory=list)  # what TRL does → what is done here
    defaults: list[tuple[str, str]] = field(
        default_factory=list
    )  # TRL's default of a key the file leaves out → what of it


def main(words: list[str]) -> None:
    """``CONFIG.yaml [--trainer KIND]``: print the command and what became of each key."""
    rest, trainer = list(words), None
    for i, word in enumerate(words):
        if word == "--trainer" or word.startswith("--trainer="):
            trainer = word.partition("=")[2] or (words[i + 1] if i + 1 < len(words) else "")
            rest = [w for j, w in enumerate(words) if j != i and not (word == "--trainer" and j == i + 1)]
    if len(rest) != 1 or rest[0].startswith("-"):
        raise UserError("from-trl: name one file, as in `alignkit from-trl dpo.yaml --trainer dpo`.")
    config = read(Path(rest[0]))
    trainer = guess(config, rest[0]) if trainer is None else trainer
    if trainer not in FIELDS:
        raise UserError(f"--trainer {trainer}: no such trainer.{suggest(trainer, FIELDS)}")
    print(said(translate(config, trainer, rest[0]), rest[0]))


def read(path: Path) -> dict[str, Any]:
    """The file's keys under the names that TRL has today.

    Raises:
        UserError: no such file, not YAML, not a mapping.
    """
    if not path.is_file():
        near = [p.name for p in path.parent.glob("*.y*ml")] if path.parent.is_dir() else []
        raise UserError(f"{path}: no such file.{suggest(path.name, near)}")
    try:
        found = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as e:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())}).") from None
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UserError(f"{path}: must be a mapping of TRL's keys, as `trl dpo --config {path}` reads it.")
    return found


def guess(config: dict[str, Any], name: str) -> str:
    """The one trainer that knows the most of the keys.

    Raises:
        UserError: several know as many.
    """
    keys = {RENAMED.get(key, key) for key in config}
    fits = {trainer: len(keys & fields) for trainer, fields in FIELDS.items()}
    loss = config.get("loss_type")
    for trainer, losses in (
        ("sft", ("nll", "dft")),
        ("kto", ("kto",)),
        ("grpo", MEANS),
        ("dpo", ("sigmoid", "ipo", "robust")),
    ):
        fits[trainer] += (loss[0] if isinstance(loss, list) and loss else loss) in losses
    best = [trainer for trainer, n in fits.items() if n == max(fits.values())]
    if len(best) > 1:
        raise UserError(
            f"{name}: its keys are those of several trainers ({', '.join(best)}). Name one, as in --trainer {best[0]}."
        )
    return best[0]


def translate(config: dict[str, Any], trainer: str, name: str = "CONFIG.yaml") -> Translation:
    """A configuration of one of TRL's trainers as words of ``alignkit train``.

    Raises:
        UserError: no model or no data set is named, a value that should be a number is none.
    """
    try:
        return _Reading(config, trainer, name).run()
    except (ValueError, TypeError, ArithmeticError) as e:
        raise UserError(f"{name}: a value is none that `trl {trainer}` takes ({e}). Mend it first.") from None


class _Reading:
    def __init__(self, config: dict[str, Any], trainer: str, name: str) -> None:
        self.trainer, self.name, self.out = trainer, name, Translation(trainer)
        self.written: dict[str, str] = {}  # today's name → as the file writes it
        self.given: dict[str, Any] = {}
        for key, value in config.items():
            today = RENAMED.get(key, key)
            if key in GONE:
                self.miss(key, GONE[key], value)
            elif key in LAUNCH:
                self.miss(key, "of the launcher: set environment variables in the shell; a run is one process", value)
            elif today not in FIELDS[trainer]:
                said = f"is no key of `trl {trainer}`.{suggest(key, FIELDS[trainer])}"
                self.out.unknown.append((key, said.partition(" There is:")[0]))
            elif today in self.given:
                raise UserError(f"{name}: {key} and {self.written[today]} are the same setting; leave one out.")
            else:
                self.given[today], self.written[today] = value, key
        self.used: set[str] = set()
        self.steps: int | None = None  # of the training, where it is known
        self.updates = 1  # optimizer steps a step
        self.rows: int | None = None  # of the training file, where it lies here
        self.columns: dict[str, Any] | None = None  # of its first row

    # ---- what the file says, what TRL would take, what alignkit would take

    def value(self, key: str) -> Any:
        """What the file gives, or TRL's default."""
        default = DEFAULTS[self.trainer].get(key, OPTIMIZER.get(key))
        return self.given.get(key, default)

    def number(self, key: str) -> float:
        """A number; YAML reads ``5e-7`` as text."""
        value = self.value(key)
        try:
            if isinstance(value, bool) or not math.isfinite(number := float(value)):
                raise ValueError
            return number
        except (TypeError, ValueError):
            raise UserError(f"{self.name}: {key} must be a number, is {value!r}.") from None

    def whole(self, key: str) -> int:
        return int(self.number(key))

    def own(self, word: str) -> Any:
        """alignkit's default of a setting, by the method that is chosen."""
        node, _, key = word.partition(".")
        return _defaults(self.method if node == "algo" else f"alignkit.config.{CLASSES[node]}")[key]

    def put(self, word: str, value: Any, *keys: str) -> None:
        """``word=value``; a default of TRL goes into the command where alignkit's is another one."""
        self.used |= set(keys)
        text = f"{word}={_text(value)}"
        given = [key for key in keys if key in self.given]
        if given:
            self.out.words.append(text)
            self.out.translated.append((", ".join(self.shown(key) for key in given), text))
        elif (own := self.own(word)) != value:
            self.out.words.append(text)
            shown = ", ".join(f"{key}: {_plain(self.value(key))}" for key in keys)
            self.out.defaults.append((shown, f"{text}, in the command (alignkit's own: {_plain(own)})"))

    def word(self, text: str, *keys: str) -> None:
        """A word that comes of keys in the file."""
        self.used |= set(keys)
        self.out.words.append(text)
        given = [self.shown(key) for key in keys if key in self.given]
        if given:
            self.out.translated.append((", ".join(given), text))

    def miss(self, key: str, why: str, value: Any = None) -> None:
        if key in getattr(self, "given", {}):
            self.used.add(key)
            self.out.missing.append((self.shown(key), why))
        else:
            self.out.missing.append((f"{key}: {_plain(value)}", why))

    def shown(self, key: str) -> str:
        return f"{self.written[key]}: {_plain(self.given[key])}"

    def says(self, key: str) -> bool:
        """Whether the file switches something on."""
        return key in self.given and self.given[key] not in (None, False, "no", "none", 0, "")

    # ---- in the order of the command

    def run(self) -> Translation:
        self.choose_method()
        self.model()
        self.data()
        if self.trainer in ("grpo", "rloo"):
            self.rewards()
            self.sampling()
        else:
            self.passes()
        self.optimizer()
        self.loss()
        self.evaluation()
        self.run_settings()
        for key in self.given:
            if (
                key not in self.used
                and self.given[key] in (False, None)
                and key not in ("disable_dropout", "shuffle_dataset")
            ):
                self.out.translated.append((self.shown(key), "nothing to set: off here too"))
            elif key not in self.used:
                why = next(
                    (why for pattern, why in WHY if re.match(pattern, key)), "no such setting here; leave it out"
                )
                self.miss(key, why)
        rows = [left for left, _ in (*self.out.translated, *self.out.missing)]
        for key in self.given:
            if not any(self.written[key] in re.findall(r"(\w+): ", left) for left in rows):
                self.out.translated.append((self.shown(key), "nothing to set: alignkit does the same"))
        return self.out

    def choose_method(self) -> None:
        """The method, and what the choice depends on."""
        if self.trainer == "dpo":
            loss = self.value("loss_type")
            losses = list(loss) if isinstance(loss, list) else [loss]
            known = [x for x in losses if x in ("sigmoid", "robust", "ipo")]
            self.method = "ipo" if known[:1] == ["ipo"] else "dpo"
            self.robust = known[:1] == ["robust"]
            if len(losses) > 1 or not known:
                self.miss(
                    "loss_type",
                    f"one loss a run: sigmoid and robust are +algo=dpo, ipo is +algo=ipo; the command trains {self.method}",
                )
        elif self.trainer == "kto":
            self.method = "kto"
            if self.value("loss_type") != "kto":
                self.miss("loss_type", "the command trains kto's own loss")
        elif self.trainer == "grpo":
            scale = {True: "group", False: "none"}.get(self.value("scale_rewards"), self.value("scale_rewards"))
            low, high = self.clips()
            self.method = "dr_grpo" if scale == "none" else "dapo" if high != low else "grpo"
            if scale not in ("group", "none"):
                self.miss(
                    "scale_rewards",
                    "advantages are divided by the deviation of their group, or (false) not at all; the command does the first",
                )
            if self.value("loss_type") not in MEANS:
                self.miss("loss_type", f"the command takes dapo's mean over tokens; there are: {', '.join(MEANS)}")
        else:
            self.method = {"sft": "sft", "reward": "bt", "rloo": "rloo"}[self.trainer]
        about = [k for k in ("loss_type", "scale_rewards", "epsilon_high") if k in self.given and k not in self.used]
        self.word(f"+algo={self.method}", *about)

    def clips(self) -> tuple[float, float]:
        low = self.number("epsilon")
        return low, self.number("epsilon_high") if self.says("epsilon_high") else low

    def model(self) -> None:
        path = self.given.get("model_name_or_path")
        if not path:
            raise UserError(
                f"{self.name}: names no model_name_or_path. Add the one that `trl {self.trainer}` is given."
            )
        self.out.words.append("model=hf")
        self.word(f"model.path={_text(path)}", "model_name_or_path")
        if "model_revision" in self.given and self.given["model_revision"] != "main":
            self.miss("model_revision", "download that revision and give its folder as model.path")
        if self.given.get("model_init_kwargs"):
            self.miss("model_init_kwargs", "model.dtype and model.compute say how weights are kept and used")
        if self.says("trust_remote_code"):
            self.miss("trust_remote_code", "models with code of their own are not loaded")
        dtype = self.value("dtype")
        if dtype in ("float32", "bfloat16", "float16"):
            self.put("model.dtype", dtype, "dtype")
        elif dtype is not None:
            self.miss("dtype", "the command takes float32; also model.dtype=bfloat16 or float16")
        if self.says("bf16") and dtype in ("float32", "auto", None):
            self.word("model.compute=bfloat16", "bf16")
        elif self.says("bf16"):
            self.miss("bf16", f"weights are {dtype} and are computed with as they are")
        elif "bf16" not in self.given and dtype == "float32" and not self.says("fp16"):
            self.out.defaults.append(
                ("bf16: on", "not in the command: float32 (model.compute=bfloat16 is the same: faster on a GPU)")
            )
        if self.says("fp16"):
            self.miss("fp16", "no mixed precision in float16; model.compute=bfloat16 is the one there is")
        if self.says("gradient_checkpointing"):
            self.word("model.gradient_checkpointing=true", "gradient_checkpointing")
        elif "gradient_checkpointing" not in self.given:
            self.out.defaults.append(
                (
                    "gradient_checkpointing: true",
                    "not in the command: changes memory and speed alone (model.gradient_checkpointing=true)",
                )
            )
        if self.says("use_cpu"):
            self.word("model.device=cpu", "use_cpu")
        self.lora()

    def lora(self) -> None:
        keys = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules")
        if not self.says("use_peft"):
            for key in keys:
                if key in self.given:
                    self.miss(key, "TRL reads it with use_peft: true alone; model.lora.r switches LoRA on")
            self.used.add("use_peft")
            return
        self.used.add("use_peft")
        rank, alpha = self.whole("lora_r"), self.whole("lora_alpha")
        self.word(f"model.lora.r={rank}", "use_peft", "lora_r")
        self.word(f"model.lora.alpha={alpha}", "lora_alpha")
        if self.method in ("sft", "bt"):
            self.word(f"model.lora.dropout={_text(self.number('lora_dropout'))}", "lora_dropout")
        elif self.says("lora_dropout"):
            self.miss("lora_dropout", "preferences and RL run without dropout")
        left = [
            f"{k}: {self.value(k)}"
            for k in keys[:3]
            if k not in self.given and not (k == "lora_dropout" and self.method not in ("sft", "bt"))
        ]
        if left:
            self.out.defaults.append((", ".join(left), "in the command (alignkit's own: alpha 16, dropout 0)"))
        targets = self.given.get("lora_target_modules")
        if targets:
            one = (
                targets
                if isinstance(targets, str)
                else targets[0]
                if len(targets) == 1 and targets[0] == "all-linear"
                else targets
            )
            self.word(f"model.lora.target_modules={_text(one)}", "lora_target_modules")

    def data(self) -> None:
        train, test, keys = self.sources()
        self.look(train)
        there = self.columns
        kind = "pairs" if self.trainer in ("dpo", "reward") else "custom"
        self.out.words.append(f"data={kind}")
        self.word(f"data.train={_text(train)}", *keys)
        if self.value("eval_strategy") != "no" and test:
            self.word(f"data.dev={_text(test)}", "dataset_test_split" if "dataset_test_split" in self.given else "")
        wanted = {
            "sft": ("prompt", "completion"),
            "kto": ("prompt", "completion", "label"),
            "grpo": ("prompt",),
            "rloo": ("prompt",),
        }.get(self.trainer, ("prompt", "chosen", "rejected"))
        chats = self.trainer == "sft" and (
            bool(self.says("assistant_only_loss")) or (there is not None and "messages" in there)
        )
        text = (
            self.trainer == "sft"
            and not chats
            and ("dataset_text_field" in self.given or (there is not None and "prompt" not in there))
        )
        if chats:
            self.word("data.messages=messages", "assistant_only_loss")
            self.out.notes.append(
                (
                    "every assistant turn is trained (assistant_only_loss) or every token",
                    "the last assistant turn of a row is",
                )
            )
        elif text:
            column = self.given.get("dataset_text_field", "text")
            self.word('data.prompt=""', "dataset_text_field")
            self.out.words.append(f"data.response={_text('{' + str(column) + '}')}")
        elif self.trainer in ("sft", "kto"):
            self.out.words.append(f"data.response={_text('{completion}')}")
        if self.trainer == "kto":
            self.out.words.append("data.desirable=label")
        if self.trainer in ("grpo", "rloo"):
            self.out.words.append("data.response=null")
        if there is None and not chats and not text:
            also = "; data.messages=messages for chats" if self.trainer == "sft" else ""
            self.out.notes.append(
                (f"columns {', '.join(wanted)}", f"taken for granted: the data were not looked at{also}")
            )
        elif there is not None and not chats and not text:
            for column in wanted:
                if column not in there:
                    self.out.missing.append(
                        (
                            f"{train}: no column {column}",
                            f"`trl {self.trainer}` may make do without; here give data.{column} or add it",
                        )
                    )
                elif isinstance(there[column], list):
                    why = "chat messages: columns must be texts (data.chat=true makes a text one user turn), or whole chats in data.messages"
                    self.out.missing.append((f"{train}: column {column}", why))
        if self.says("completion_only_loss"):
            self.used.add("completion_only_loss")
            self.out.translated.append((self.shown("completion_only_loss"), "always so: prompts are not trained"))
        elif "completion_only_loss" in self.given:
            self.miss("completion_only_loss", "prompts are never trained; put everything into the response for that")

    def sources(self) -> tuple[str, str | None, tuple[str, ...]]:
        """(training source, held-out source, keys that name them)."""
        split, held_out = str(self.value("dataset_train_split")), str(self.value("dataset_test_split"))
        several = self.given.get("datasets")
        if several:
            first = several[0] if isinstance(several, list) else several
            first = first if isinstance(first, dict) else {"path": first}
            if isinstance(several, list) and len(several) > 1:
                self.miss(
                    "datasets",
                    f"one source a run: join them in a file first; the command takes {first.get('path')} alone",
                )
            if first.get("name"):
                self.out.missing.append(
                    (
                        f"datasets: name {first['name']}",
                        "a configuration of a hub data set cannot be named: save it as a file first",
                    )
                )
            path, split = str(first.get("path")), str(first.get("split", split))
            files = first.get("data_files")
            files = next(iter(files.values())) if isinstance(files, dict) and files else files
            path = str(files[0] if isinstance(files, list) and files else files) if files else path
            keys: tuple[str, ...] = ("datasets",) if "datasets" not in self.used else ()
        elif self.given.get("dataset_name"):
            path, keys = str(self.given["dataset_name"]), ("dataset_name",)
            if self.given.get("dataset_config"):
                self.miss(
                    "dataset_config", "a configuration of a hub data set cannot be named: save it as a file first"
                )
        else:
            raise UserError(
                f"{self.name}: names neither dataset_name nor datasets. Add the one that `trl {self.trainer}` is given."
            )
        if "dataset_train_split" in self.given:
            keys = (*keys, "dataset_train_split")
        if Path(path.removesuffix(".gz")).suffix in SUFFIXES:
            return path, None, keys
        local = path if not Path(path).is_dir() or path.startswith((".", "/", "~")) else f"./{path}"
        return f"hf:{local}" + ("" if split == "train" else f":{split}"), f"hf:{local}:{held_out}", keys

    def look(self, source: str) -> None:
        """Count the rows of a training file that lies here, and see its columns."""
        path = Path(source).expanduser()
        if path.suffix != ".jsonl" or not path.is_file():
            return
        with path.open(encoding="utf-8", errors="replace") as lines:
            found = [line for line in lines if line.strip()]
        try:
            first = json.loads(found[0]) if found else None
        except json.JSONDecodeError:
            return
        if isinstance(first, dict):
            self.rows, self.columns = len(found), first

    def passes(self) -> None:
        """Batch and length of a training on a data set."""
        size = self.whole("per_device_train_batch_size") * self.whole("gradient_accumulation_steps")
        self.put("algo.batch_size", size, "per_device_train_batch_size", "gradient_accumulation_steps")
        self.steps = self.whole("max_steps") if self.number("max_steps") > 0 else None
        if self.steps:
            self.put("algo.steps", self.steps, "max_steps")
            if "num_train_epochs" in self.given:
                self.miss("num_train_epochs", "max_steps is what counts")
        else:
            self.used.add("max_steps")
            self.put("algo.epochs", _int(self.number("num_train_epochs")), "num_train_epochs")
            self.steps = math.ceil(self.number("num_train_epochs") * self.rows / size) if self.rows else None
        if "max_length" in self.given and self.given["max_length"] is None:
            self.used.add("max_length")
        elif self.method == "bt":
            self.put("algo.max_tokens", self.whole("max_length"), "max_length")
            self.out.notes.append(("longer pairs than max_length are left out", "algo.max_tokens cuts them"))
        else:
            self.put("algo.max_response_tokens", self.whole("max_length"), "max_length")
            self.out.notes.append(
                (
                    "max_length counts prompt and response",
                    "algo.max_response_tokens counts the response; prompts are not cut",
                )
            )

    def sampling(self) -> None:
        """Groups, batch and number of steps: TRL counts completions and optimizer steps, alignkit prompts and sampling steps."""
        k = self.whole("num_generations")
        device, accumulated = self.whole("per_device_train_batch_size"), self.whole("gradient_accumulation_steps")
        per = self.whole("steps_per_generation") if self.says("steps_per_generation") else accumulated
        completions = self.whole("generation_batch_size") if self.says("generation_batch_size") else device * per
        batch = (
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "steps_per_generation",
            "generation_batch_size",
        )
        self.put("algo.k", k, "num_generations")
        self.put(
            "algo.prompts_per_step", max(1, completions // k), *(b for b in batch if b in self.given or b in OPTIMIZER)
        )
        if completions % k:
            self.out.missing.append(
                (
                    f"{completions} completions a step",
                    f"no whole groups of {k} (with several devices they may be): algo.prompts_per_step rounds down",
                )
            )
        updates = max(1, completions // (device * accumulated))
        if updates > 1:
            self.word(f"algo.minibatches={updates}", "steps_per_generation", "generation_batch_size")
        passes = self.whole("num_iterations")
        self.put("algo.epochs", passes, "num_iterations")
        self.updates = updates * passes
        if self.number("max_steps") > 0:
            self.steps = math.ceil(self.whole("max_steps") / self.updates)
            self.put("algo.steps", self.steps, "max_steps")
            if "num_train_epochs" in self.given:
                self.miss("num_train_epochs", "max_steps is what counts")
        elif self.rows:
            self.steps = math.ceil(self.number("num_train_epochs") * self.rows / max(1, completions // k))
            self.put("algo.steps", self.steps, "num_train_epochs")
        else:
            self.steps, said = None, f"{_int(self.number('num_train_epochs'))} × rows / {max(1, completions // k)}"
            why = f"RL counts steps: algo.steps = {said}; as it is the command takes {self.own('algo.steps')}"
            if "num_train_epochs" in self.given:
                self.miss("num_train_epochs", why)
            else:
                self.out.defaults.append(("num_train_epochs: 3", f"not in the command: {why}"))
        self.used.add("max_steps")
        self.put("algo.max_new_tokens", self.whole("max_completion_length"), "max_completion_length")
        self.put("evaluate.max_new_tokens", self.whole("max_completion_length"), "max_completion_length")
        for key, name in (("temperature", "temperature"), ("top_p", "top_p"), ("top_k", "top_k")):
            number = self.number(key)
            self.put(f"algo.{name}", max(0, int(number)) if key == "top_k" else number, key)

    def rewards(self) -> None:
        funcs = self.given.get("reward_funcs") or []
        funcs, taken = [funcs] if isinstance(funcs, str) else list(funcs), False
        if self.given.get("reward_model_name_or_path"):
            taken = True
            self.out.words.append("reward=learned")
            self.word(f"reward.model={_text(self.given['reward_model_name_or_path'])}", "reward_model_name_or_path")
        self.used.add("reward_funcs")
        for name in funcs:
            if name in ("accuracy_reward", "reasoning_accuracy_reward") and not taken:
                taken = True
                self.out.words += ["reward=answer", "reward.column=solution"]
                self.out.translated.append(
                    (
                        f"reward_funcs: {name}",
                        "reward=answer reward.column=solution (last numbers are compared; TRL compares expressions)",
                    )
                )
            elif taken and name in ("accuracy_reward", "reasoning_accuracy_reward"):
                self.out.missing.append(
                    (
                        f"reward_funcs: {name}",
                        "one reward is in the command; alignkit.rewards.mix.Mix adds several up (conf/reward/nlg.yaml)",
                    )
                )
            elif name == "get_soft_overlong_punishment":
                self.out.missing.append((f"reward_funcs: {name}", "algo.overlong=256 of +algo=dapo"))
            else:
                self.out.missing.append(
                    (
                        f"reward_funcs: {name}",
                        "a reward is a class that takes a batch: write one around it (README, Use your own data and model), then reward=NAME",
                    )
                )
        if not taken:
            self.out.words.append("reward=NAME")
            self.out.missing.append(
                ("no reward that alignkit has", "put yours in place of NAME in the command; see `alignkit list`")
            )
        if self.says("reward_weights"):
            self.miss("reward_weights", "weights of several rewards: alignkit.rewards.mix.Mix (conf/reward/nlg.yaml)")

    def optimizer(self) -> None:
        self.put("algo.lr", self.number("learning_rate"), "learning_rate")
        schedule = str(self.value("lr_scheduler_type"))
        if schedule in SCHEDULES:
            self.put("algo.schedule", SCHEDULES[schedule], "lr_scheduler_type")
        else:
            self.miss(
                "lr_scheduler_type",
                f"the command keeps {self.own('algo.schedule')}; there are: constant, linear, cosine, inverse_sqrt",
            )
        more = self.given.get("lr_scheduler_kwargs") or {}
        if isinstance(more, dict) and schedule == "cosine_with_min_lr" and {"min_lr", "min_lr_rate"} & set(more):
            floor = (
                float(more["min_lr_rate"])
                if "min_lr_rate" in more
                else float(more["min_lr"]) / self.number("learning_rate")
            )
            self.word(f"algo.floor={_text(floor)}", "lr_scheduler_kwargs")
        self.warmup(schedule)
        self.put("algo.weight_decay", self.number("weight_decay"), "weight_decay")
        self.put("algo.betas", [self.number("adam_beta1"), self.number("adam_beta2")], "adam_beta1", "adam_beta2")
        self.put("algo.max_grad_norm", self.number("max_grad_norm"), "max_grad_norm")
        if self.given.get("optim") and str(self.given["optim"]).startswith("adamw_torch"):
            self.used.add("optim")
            self.out.translated.append((self.shown("optim"), "always so: torch's AdamW"))

    def warmup(self, schedule: str) -> None:
        warmup = self.number("warmup_steps")
        if schedule == "constant":
            warmup = 0.0
        if 0 < warmup < 1 or (warmup and self.written.get("warmup_steps") == "warmup_ratio"):
            if self.steps is None:
                self.miss(
                    "warmup_steps",
                    f"algo.warmup is in steps: {_plain(warmup)} of all of them; as it is the command takes {self.own('algo.warmup')}",
                )
                return
            warmup = math.ceil(warmup * self.steps)
        else:
            warmup = math.ceil(warmup / self.updates)
        self.put("algo.warmup", int(warmup), "warmup_steps")

    def loss(self) -> None:
        if self.trainer in ("dpo", "kto"):
            self.put("algo.beta", self.number("beta"), "beta")
        if self.trainer == "dpo":
            if self.method == "ipo":
                self.out.words.append("algo.logprobs=mean")
                self.out.defaults.append(
                    ("ipo: log-probabilities a token", "algo.logprobs=mean, in the command (alignkit's own: sum)")
                )
                if self.says("label_smoothing"):
                    self.miss("label_smoothing", "ipo has none")
            else:
                self.put("algo.smoothing", self.number("label_smoothing"), "label_smoothing")
                if self.robust:
                    self.word("algo.correction=robust")
            if self.says("f_divergence_type") and self.given["f_divergence_type"] != "reverse_kl":
                self.miss("f_divergence_type", "reverse_kl is the one there is")
        elif self.trainer == "kto":
            self.put("algo.desirable_weight", self.number("desirable_weight"), "desirable_weight")
            self.put("algo.undesirable_weight", self.number("undesirable_weight"), "undesirable_weight")
        elif self.trainer == "reward":
            if self.says("center_rewards_coefficient"):
                self.put("algo.centring", self.number("center_rewards_coefficient"), "center_rewards_coefficient")
        elif self.trainer == "sft":
            if self.value("loss_type") not in (None, "nll"):
                self.miss("loss_type", "the command trains the likelihood (nll)")
            self.used.add("loss_type")
            if self.says("label_smoothing_factor"):
                self.miss("label_smoothing_factor", "no label smoothing in SFT")
        elif self.trainer == "grpo":
            self.grpo()
        elif self.trainer == "rloo":
            self.rloo()

    def grpo(self) -> None:
        low, high = self.clips()
        if self.method == "dapo":
            self.put("algo.clip_low", low, "epsilon")
            self.put("algo.clip_high", high, "epsilon_high")
            self.word("algo.refills=0")  # no dynamic sampling: GRPO with a wider clip
        else:
            self.put("algo.clip", low, "epsilon")
            if high != low:
                self.miss("epsilon_high", "of dr_grpo both clips are the same; +algo=dapo has two")
        self.used |= {"epsilon_high", "scale_rewards", "loss_type"}
        mean = MEANS.get(str(self.value("loss_type")), "tokens")
        if mean != self.own("algo.normalize"):
            self.word(f"algo.normalize={mean}")
            if "loss_type" not in self.given:
                self.out.defaults.append(
                    (
                        "loss_type: dapo",
                        f"algo.normalize={mean}, in the command (alignkit's own: {self.own('algo.normalize')})",
                    )
                )
        self.put("algo.kl", self.number("beta"), "beta")
        if self.number("beta"):
            for word, value in (("algo.kl_in", "loss"), ("algo.kl_estimator", "k3")):
                if self.own(word) != value:
                    self.word(f"{word}={value}")
        if self.value("importance_sampling_level") != "token":
            self.miss(
                "importance_sampling_level",
                "ratios are a token's (GSPO's are a response's: +algo=rloo algo.ratio=sequence)",
            )
        else:
            self.used.add("importance_sampling_level")
        self.truncated()

    def rloo(self) -> None:
        self.word("algo.ratio=sequence")
        self.put("algo.clip", self.number("epsilon"), "epsilon")
        if self.clips()[0] != self.clips()[1]:
            self.miss("epsilon_high", "both clips are the same")
        self.used.add("epsilon_high")
        self.put("algo.kl", self.number("beta"), "beta")
        self.put("algo.whiten", bool(self.value("normalize_advantages")), "normalize_advantages")
        low_high = self.given.get("reward_clip_range")
        if isinstance(low_high, list) and len(low_high) == 2 and -float(low_high[0]) == float(low_high[1]):
            self.put("algo.reward_clip", float(low_high[1]), "reward_clip_range")
        elif low_high:
            self.miss("reward_clip_range", "algo.reward_clip cuts to ± one number")
        self.truncated()

    def truncated(self) -> None:
        if self.says("mask_truncated_completions"):
            self.miss(
                "mask_truncated_completions",
                "responses that were cut off are trained; algo.missing_eos_penalty makes them cost something",
            )
        for key in ("repetition_penalty", "min_p"):
            if self.given.get(key) not in (None, 1.0, 0):
                self.miss(key, "samples are drawn by temperature, top_k and top_p alone")

    def evaluation(self) -> None:
        strategy = str(self.value("eval_strategy"))
        self.used.add("eval_strategy")
        if strategy == "no":
            return
        held_out = any(word.startswith("data.dev=") for word in self.out.words)
        if not held_out:
            self.miss("eval_strategy", "the data name no held-out split: give data.dev=FILE")
        elif "eval_strategy" in self.given:
            dev = next(word for word in self.out.words if word.startswith("data.dev="))
            self.out.translated.append((self.shown("eval_strategy"), dev))
        every = self.number("eval_steps") if self.says("eval_steps") else self.number("logging_steps")
        if strategy == "steps" and every >= 1:
            self.put(
                "evaluate.every",
                max(1, round(every / self.updates)),
                "eval_steps" if self.says("eval_steps") else "logging_steps",
            )
        else:
            self.miss("eval_steps" if "eval_steps" in self.given else "eval_strategy", "evaluate.every is in steps")
        if held_out and not self.says("load_best_model_at_end"):
            self.put("evaluate.final", "last", "load_best_model_at_end")
        elif held_out:
            self.put("evaluate.final", "best", "load_best_model_at_end")
        if held_out and self.trainer in ("grpo", "rloo"):
            self.out.words.append("evaluate.select=reward")
        if "metric_for_best_model" in self.given:
            self.miss(
                "metric_for_best_model",
                f"evaluate.select picks: {'preference_accuracy' if self.method != 'sft' else 'bleu, chrf, …'}",
            )

    def run_settings(self) -> None:
        if "seed" in self.given:
            self.word(f"seed={self.whole('seed')}", "seed")
        if self.given.get("output_dir"):
            self.word(f"run.dir={_text(self.given['output_dir'])}", "output_dir")
            if "run_name" in self.given:
                self.miss("run_name", "run.dir is the run's name")
        elif self.given.get("run_name"):
            self.word(f"run.name={_text(self.given['run_name'])}", "run_name")
        if self.value("save_strategy") not in (None, "steps"):
            self.miss(
                "save_strategy", "checkpoints are by steps (run.save_every): they are what a stopped run resumes from"
            )
        elif "save_steps" in self.given and self.number("save_steps") < 1:
            self.miss("save_steps", "run.save_every is a number of steps")
        else:
            if "save_steps" in self.given:
                self.put("run.save_every", max(1, round(self.whole("save_steps") / self.updates)), "save_steps")
            self.used.add("save_strategy")
        if self.given.get("save_total_limit"):
            self.put("run.keep", self.whole("save_total_limit"), "save_total_limit")
        if "report_to" in self.given:
            to = self.given["report_to"]
            to = [to] if isinstance(to, str) or to is None else list(to)
            if {"wandb", "all"} & set(to):
                self.word("run.wandb=auto", "report_to")
            elif set(to) <= {"none", None}:
                self.word("run.wandb=disabled", "report_to")
            if others := [str(x) for x in to if x not in ("wandb", "all", "none", None)]:
                self.miss("report_to", f"no {', '.join(others)}: metrics.jsonl, `alignkit report`, or run.wandb=auto")
        if self.given.get("project"):
            self.word(f"run.project={_text(self.given['project'])}", "project")


@cache
def _defaults(name: str) -> dict[str, Any]:
    """Setting → default of a method, as its file and its class have it, or of the class at a dotted path."""
    given = {} if "." in name else catalog.read(catalog.options("algo")[name])["algo"]
    found = {}
    for setting in (settings_of(given.get("_target_", name)) or {}).values():
        try:
            value = given[setting.name] if setting.name in given else ast.literal_eval(str(setting.default))
        except (ValueError, SyntaxError):
            continue  # made by a function: no setting that is asked for here
        found[setting.name] = list(value) if isinstance(value, tuple) else value
    return found


def said(found: Translation, name: str) -> str:
    """The command, and below it what became of each key."""
    lines = [shlex.join(["alignkit", "train", *found.words]), ""]
    parts = (
        (f"translated from {name} (trl {found.trainer})", found.translated, "→ "),
        ("without an equivalent", found.missing, ""),
        ("unknown to TRL", found.unknown, ""),
        ("not the same", found.notes, "→ "),
        ("TRL's defaults where alignkit's differ", found.defaults, "→ "),
    )
    for title, pairs, arrow in parts:
        if pairs:
            width = min(44, max(len(left) for left, _ in pairs))
            lines += [f"{title}:", *(f"  {left:<{width}}  {arrow}{right}" for left, right in pairs), ""]
    return "\n".join(lines).rstrip()


def _text(value: Any) -> str:
    """A value as Hydra reads it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, list | tuple):
        return f"[{','.join(_text(x) for x in value)}]"
    text = str(value)
    if isinstance(value, str) and not re.fullmatch(r"[\w./:@-]+", text):
        return '"' + text.replace("\\", "\\\\").replace('"', r"\"") + '"'
    return text


def _int(number: float) -> float | int:
    return int(number) if number == int(number) else number


def _plain(value: Any) -> str:
    """A value as YAML shows it, in few characters."""
    text = str(value) if isinstance(value, str | float) else json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}…"
