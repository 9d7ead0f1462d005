"""From the settings of ``model`` to a transformers model and its tokenizer: hub, folder, run, bundled, or from scratch."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoTokenizer, PreTrainedTokenizerFast
from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from alignkit.config import Lora, Model
from alignkit.errors import UserError, suggest

transformers_logging.disable_progress_bar()  # the run has a bar of its own
transformers_logging.set_verbosity_error()  # weights that are missing or left over are looked at here

BUNDLED = Path(__file__).parent / "assets" / "models"
# what architectures call the number of their layers
COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_encoder_layers", "num_decoder_layers",
          "encoder_layers", "decoder_layers")  # fmt: skip
Auto = Callable[[Any], Any]  # a model's configuration → the transformers class that builds it


def kind_of(config: Any) -> str:
    """``seq2seq``, ``encoder`` (bidirectional) or ``causal``, of a model's configuration."""
    if config.is_encoder_decoder:
        return "seq2seq"
    decodes = getattr(config, "is_decoder", False)  # many encoders do not have the setting
    return "encoder" if config.model_type in MODEL_FOR_MASKED_LM_MAPPING_NAMES and not decodes else "causal"


def read(
    cfg: Model,
    seed: int,
    texts: list[str],
    checkpoint: Path | None,
    auto: Auto,
    task: Callable[[Any], str | None],
    prepare: Callable[[Any, Any], object] = lambda model, tokenizer: None,
    fresh: tuple[str, ...] = (),
) -> tuple[Any, Any, torch.dtype]:
    """(model in evaluation mode, tokenizer, precision to compute in) as ``cfg`` describes them.

    Args:
        texts: what a tokenizer is trained on, where the model is built from scratch.
        checkpoint: folder of the weights with which a run goes on.
        task: a model's configuration → peft's name of the task, for adapters.
        prepare: what is done to model and tokenizer before adapters are put on.
        fresh: beginnings of the names of weights that a path may lack, or have in another size, which are then new.

    Raises:
        UserError: no such model, a folder without weights, a model of another kind, a device that is not there.
    """
    device = device_of(cfg.device)
    if device.startswith("cuda"):
        # cuDNN's attention in bfloat16 prepares a plan for each new shape: 12 steps of the demo on an H100 took 51 s, not 10
        torch.backends.cuda.enable_cudnn_sdp(False)
    dtype = getattr(torch, cfg.dtype)
    if checkpoint and not cfg.lora.r:
        model, tokenizer = _pretrained(str(checkpoint), cfg, dtype, auto, ())
    elif cfg.path:
        model, tokenizer = _pretrained(resolve(cfg.path), cfg, dtype, auto, fresh)
        model = model if cfg.layers is None else _with_layers(model, cfg, dtype, auto)
    elif cfg.config:
        model, tokenizer = _from_scratch(cfg, texts, seed, auto)
        model = model.to(dtype)
    else:
        raise UserError("model: give model.path (an id, a folder, a run) or model.config (built from scratch).")
    prepare(model, tokenizer)
    if cfg.compute == "bfloat16" and device == "cpu" and model.config._attn_implementation == "sdpa":
        model.set_attn_implementation("sdpa_float32")
        for module in model.modules():  # transformers 5.17 leaves out T5's stacks, whose configurations are copies
            if getattr(module, "config", None) is not None and module.config._attn_implementation == "sdpa":
                module.config._attn_implementation = "sdpa_float32"
    if cfg.gradient_checkpointing:
        # transformers before 5.2 has but the older name, which the later ones warn of
        enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
        enable({"use_reentrant": False})
    if cfg.lora.r:
        with warnings.catch_warnings():  # peft asks for it by its older name
            warnings.filterwarnings("ignore", "`is_gradient_checkpointing` is deprecated", FutureWarning)
            model = _with_lora(model, cfg.lora, checkpoint, seed, task(model.config))
    return model.to(device).eval(), tokenizer, torch.bfloat16 if cfg.compute == "bfloat16" else dtype


def device_of(device: str) -> str:
    """The device that a setting names; ``auto`` is the best there is, ``meta`` has shapes alone (a dry run).

    Raises:
        UserError: it is not there.
    """
    if device == "auto":
        return "cuda" if torch.cuda.is_available() else "mps" if torch.backends.mps.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as e:
        raise UserError(
            f"model.device={device}: torch {torch.__version__} cannot use it ({str(e).splitlines()[0]})."
        ) from None
    return device


def resolve(path: str) -> str:
    """``bundled:NAME`` and run directories → the folder that holds the weights; the rest is returned as is.

    Raises:
        UserError: unknown bundled name, a folder without a model in it.
    """
    if path.startswith("bundled:"):
        folder = BUNDLED / path.removeprefix("bundled:")
        if not folder.is_dir():
            raise UserError(
                f"model.path={path}: not bundled.{suggest(folder.name, [p.name for p in BUNDLED.glob('*')])}"
            )
        return str(folder)
    folder = Path(path).expanduser()
    if not folder.is_dir():
        if folder.exists() or path.startswith((".", "/", "~")) or path.count("/") > 1:
            raise UserError(f"model.path={path}: no such folder.")
        if folder.parent.is_dir() and "/" in path:
            near = [str(p) for p in folder.parent.iterdir() if p.is_dir()]
            raise UserError(f"model.path={path}: no such run or folder.{suggest(path, near)}")
        return path  # a hub id
    if (folder / "final").is_dir():
        folder = folder / "final"
    elif not any((folder / name).exists() for name in ("config.json", "adapter_config.json")):
        saved = sorted(
            (p for p in folder.glob("checkpoint-*") if p.name[11:].isdigit()),
            key=lambda p: int(p.name.rpartition("-")[2]),
        )
        if not saved:
            if (folder / "report.md").exists() or any(
                p.is_dir() and (p / "command.txt").exists() for p in folder.iterdir()
            ):
                steps = [str(p) for p in folder.iterdir() if (p / "command.txt").exists()]
                raise UserError(f"model.path={path}: is a pipeline; name one of its steps: {', '.join(sorted(steps))}.")
            if (folder / "command.txt").exists():
                raise UserError(f"model.path={path}: this run has not come to a checkpoint. Repeat its command first.")
            raise UserError(f"model.path={path}: neither a model (config.json) nor a run with final/ or checkpoint-N/.")
        folder = saved[-1]
    if (folder / "selector.json").exists():
        raise UserError(
            f"model.path={path}: holds a selector, which is no model. Distil with it: +algo=selected algo.selector={path}."
        )
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"model.path={path}: {folder.name} is a LoRA adapter alone. Finish the run: its final/ is a whole model."
        )
    weights = [p for p in folder.iterdir() if p.suffix == ".safetensors" or p.name.endswith(".safetensors.index.json")]
    if not weights:
        raise UserError(f"model.path={path}: {folder} has no weights (*.safetensors). Other formats are not loaded.")
    return str(folder)


def _pretrained(path: str, cfg: Model, dtype: torch.dtype, auto: Auto, fresh: tuple[str, ...]) -> tuple[Any, Any]:
    try:
        config = AutoConfig.from_pretrained(path)
        kind = kind_of(config)
        if cfg.kind not in ("auto", kind):
            raise UserError(f"model.path={path} is a {kind} model, but model.kind={cfg.kind} was asked for.")
        if cfg.device == "meta":  # a dry run: the weights are not read
            with torch.device("meta"):
                return auto(config).from_config(config, dtype=dtype), read_tokenizer(cfg.tokenizer or path)
        loaded: Any = auto(config).from_pretrained(
            path,
            config=config,
            dtype=dtype,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=bool(fresh),
        )
        model, info = loaded
        tokenizer = read_tokenizer(cfg.tokenizer or path)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as e:
        reason = str(e).split("\n")[0]
        way = "Check the id or folder; with HF_HUB_OFFLINE=1 only what lies in the cache is found."
        if (Path(path) / "state").is_dir():
            way = "This checkpoint is damaged: delete it to go on from the one before, or from the beginning."
        raise UserError(f"model.path={path}: cannot be loaded ({type(e).__name__}: {reason}). {way}") from None
    missing = sorted(name for name in info["missing_keys"] if not name.startswith(fresh) and "pooler." not in name)
    if missing:
        raise UserError(f"model.path={path}: the weights lack {', '.join(missing[:3])}.")
    sized = sorted(name for name, *_ in info["mismatched_keys"] if not name.startswith(fresh))
    if sized:
        raise UserError(
            f"model.path={path}: weights are of another size than config.json says: {', '.join(sized[:3])}."
        )
    return model, tokenizer


def _with_layers(model: Any, cfg: Model, dtype: torch.dtype, auto: Auto) -> Any:
    """A model of ``cfg.layers`` of the layers of ``model``, of each stack where it has two; all else is kept.

    Layer j of N, counted from 1, is the loaded layer j · L / N (``skip``: 2, 4, …, 12 of 12 layers for 6) or j (``first``).

    Raises:
        UserError: more layers than there are, a number that does not divide theirs, layers that differ in kind.
    """
    settings, keep = model.config.to_dict(), cfg.layers
    assert keep is not None
    counts = {k: settings[k] for k in COUNTS if k in settings}
    stacks = [  # (path of the list of layers, the loaded layers that are kept, counted from 0)
        (path, _chosen(len(module), cfg))
        for path, module in model.named_modules()
        if isinstance(module, torch.nn.ModuleList) and len(module) in counts.values() and not re.search(r"\.\d", path)
    ]
    if not stacks:
        raise UserError(
            f"model.layers={keep}: {cfg.path} is a {model.config.model_type} model, whose layers cannot be told apart. Leave it null."
        )
    for key, value in settings.items():  # per layer, as layer_types; Longformer's name does not say so
        per_layer = "layer" in key or key == "attention_window"
        if per_layer and isinstance(value, list) and len(value) in counts.values():
            settings[key] = [value[i] for i in _chosen(len(value), cfg)]
    weights = {}
    for name, weight in model.state_dict().items():
        path, chosen = next(((p, c) for p, c in stacks if name.startswith(f"{p}.")), ("", []))
        if not path:
            weights[name] = weight
            continue
        index, _, rest = name.removeprefix(f"{path}.").partition(".")
        if int(index) in chosen:
            weights[f"{path}.{chosen.index(int(index))}.{rest}"] = weight
        elif index == "0" and "relative_attention_bias" in rest:  # T5's first layer has it for all
            weights.setdefault(name, weight)
    try:
        config = type(model.config).from_dict({**settings, **dict.fromkeys(counts, keep)})
        small = auto(config).from_config(config, dtype=dtype)
        small.load_state_dict(weights, assign=True)
    except (RuntimeError, ValueError, AssertionError, StrictDataclassError) as e:
        raise UserError(
            f"model.layers={keep}: layers of {cfg.path} differ in kind, and what is left is no {model.config.model_type} "
            f"model ({' '.join(str(e).split())[:200]}). Try model.layers_from={'first' if cfg.layers_from == 'skip' else 'skip'}."
        ) from None
    small.tie_weights()  # weights that were one are one again
    if hasattr(model, "generation_config"):
        small.generation_config = model.generation_config
    return small


def _chosen(layers: int, cfg: Model) -> list[int]:
    """The layers, counted from 0, that are kept of so many."""
    keep = cfg.layers
    assert keep is not None
    if keep > layers:
        raise UserError(f"model.layers={keep}: {cfg.path} has {layers} layers. Give at most so many.")
    if cfg.layers_from == "first":
        return list(range(keep))
    if layers % keep:
        fitting = ", ".join(str(n) for n in range(1, layers + 1) if layers % n == 0)
        raise UserError(
            f"model.layers={keep}: the {layers} layers of {cfg.path} cannot be spread evenly over {keep}. Give one of {fitting}, "
            f"or take the first ones with model.layers_from=first."
        )
    return [(j + 1) * layers // keep - 1 for j in range(keep)]


def read_tokenizer(path: str) -> Any:
    """The tokenizer of a folder, a hub id or a bundled model."""
    path = resolve(path) if path.startswith("bundled:") else path
    file = Path(path) / "tokenizer_config.json"
    if file.is_file():
        named = json.loads(file.read_text(encoding="utf-8")).get("tokenizer_class")
        if named in ("TokenizersBackend", "PreTrainedTokenizerFast"):
            return PreTrainedTokenizerFast.from_pretrained(path)
    return AutoTokenizer.from_pretrained(path)


def _from_scratch(cfg: Model, texts: list[str], seed: int, auto: Auto) -> tuple[Any, Any]:
    settings = dict(cfg.config)
    try:
        tokenizer = read_tokenizer(cfg.tokenizer) if cfg.tokenizer else train_tokenizer(texts, cfg.vocab_size)
    except (OSError, ValueError) as e:
        raise UserError(f"model.tokenizer={cfg.tokenizer}: cannot be loaded ({str(e).splitlines()[0]}).") from None
    if "model_type" not in settings:
        raise UserError(
            "model.config: give model_type (for example m2m_100, t5, llama, bert); the rest are its settings."
        )
    try:
        config = AutoConfig.for_model(
            settings.pop("model_type"),
            **{
                "vocab_size": len(tokenizer),
                "pad_token_id": tokenizer.pad_token_id,
                "bos_token_id": tokenizer.bos_token_id,
                "eos_token_id": tokenizer.eos_token_id,
                "decoder_start_token_id": tokenizer.bos_token_id,
                **settings,
            },
        )
        if cfg.kind not in ("auto", kind_of(config)):
            raise UserError(f"model.config is a {kind_of(config)} model, but model.kind={cfg.kind} was asked for.")
        torch.manual_seed(seed)
        with torch.device("meta") if cfg.device == "meta" else nullcontext():
            return auto(config).from_config(config), tokenizer
    except (ValueError, TypeError, StrictDataclassError) as e:
        raise UserError(f"model.config: {' '.join(str(e).split())[:300]}") from None


def train_tokenizer(texts: list[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE: every text can be written, none is unknown, and decoding gives it back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<pad>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        clean_up_tokenization_spaces=False,
    )


def _with_lora(model: Any, lora: Lora, checkpoint: Path | None, seed: int, task: str | None) -> Any:
    """The model with adapters: of the checkpoint, or new ones drawn from ``seed``.

    Raises:
        UserError: ``target_modules`` names none of the model's layers.
    """
    from peft import LoraConfig, PeftModel, get_peft_model
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as KNOWN

    if checkpoint:
        return PeftModel.from_pretrained(model, checkpoint, is_trainable=True)
    targets = lora.target_modules
    if targets is None and model.config.model_type not in KNOWN:
        targets = "all-linear"
    torch.manual_seed(seed)
    try:
        return get_peft_model(
            model,
            LoraConfig(
                r=lora.r,
                lora_alpha=lora.alpha,
                lora_dropout=lora.dropout,
                target_modules=targets if targets is None or isinstance(targets, str) else list(targets),
                task_type=task,
            ),
        )
    except ValueError as e:
        linear = {n.rpartition(".")[2] for n, m in model.named_modules() if isinstance(m, torch.nn.Linear)}
        raise UserError(
            f"model.lora: {str(e).split(chr(10))[0]} Set model.lora.target_modules; linear layers are: "
            f"{', '.join(sorted(linear))}."
        ) from None
