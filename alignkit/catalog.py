"""What there is: methods, presets and groups, read from ``conf/`` and from the classes' source. No torch, no Hydra."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
from pathlib import Path
from typing import Any

import yaml

from alignkit.config import GROUPS, PARTS, conf_dir
from alignkit.errors import UserError, suggest
from alignkit.signature import doc_of, settings_of

EXAMPLES = {  # group → a method that takes one
    "reward": "esrl", "critic": "srt_collect", "prompt": "srt_collect",
    "engine": "reinforce model=tiny_arithmetic data=arithmetic reward=answer",
}  # fmt: skip
STAGES = (
    "sft",
    "pref",
    "rm",
    "rl",
    "trl",
    "distill",
    "select",
    "refine",
    "evaluate",
    "evaluate_rm",
    "evaluate_classes",
    "judge",
    "study",
    "pipeline",
)


def options(group: str, extra: list[Path] = []) -> dict[str, Path]:  # noqa: B006
    """Option name → file of a config group, in the shipped ``conf`` and in ``--config-dir`` folders."""
    found = {}
    for root in (conf_dir(), *extra):
        for path in sorted((root / group).glob("**/*.yaml")):
            if not path.name.startswith("_"):
                found[str(path.relative_to(root / group).with_suffix(""))] = path
    return found


def read(path: Path) -> dict[str, Any]:
    """A config file over the private bases (``_rl``) that its defaults name."""
    try:
        content: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except yaml.YAMLError as e:
        raise UserError(f"{path}: not valid YAML ({' '.join(str(e).split())}).") from None
    merged: dict[str, Any] = {}
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("_") and entry != "_self_":
            merged.update(read(_base(path, entry)))
    return {**merged, **content}


def _base(path: Path, name: str) -> Path:
    """The file of a private base: beside the file that names it, else the shipped one, as Hydra finds it."""
    beside = path.with_name(f"{name}.yaml")
    return beside if beside.is_file() else conf_dir() / path.parent.name / beside.name


def listing(extra: list[Path] = []) -> str:  # noqa: B006
    """Methods by stage, one line each, presets and the other groups; ``extra``: folders of ``--config-dir``."""
    lines = []
    files = options("algo", extra)
    methods = {name: read(path) for name, path in files.items()}
    for stage in STAGES:
        here = {n: c for n, c in methods.items() if c.get("stage") == stage}
        if here:
            lines.append(f"{stage}:")
            lines += [f"  +algo={n:<14} {_idea(c) or _header(files[n])}" for n, c in here.items()]
    lines.append("presets:")
    lines += [f"  +preset={name:<20} {_header(path)}" for name, path in options("preset", extra).items()]
    for group in ("model", "data", "reward", "engine", "critic", "prompt"):
        lines.append(f"{group}:")
        lines += [f"  {group}={name:<20} {_header(path)}" for name, path in options(group, extra).items()]
    lines.append("claims:")
    lines += [f"  alignkit claim {name:<14} {_header(path)}" for name, path in options("claim", extra).items()]
    lines += ["", "More of one: alignkit show NAME. Run one: alignkit train +algo=NAME."]
    return "\n".join(lines)


def card(name: str, extra: list[Path] = []) -> str:  # noqa: B006
    """A method's card: idea, settings with defaults, example. Presets and other options: their file."""
    if name == "settings":
        return _settings()
    for group in GROUPS:
        path = options(group, extra).get(name)
        if path is None:
            continue
        content = read(path)
        target = (content.get("algo") or {}).get("_target_") if group == "algo" else None
        plus = "+" if group in ("algo", "preset") else ""
        lines = [f"{name}  ({group}" + (f", stage {content['stage']})" if content.get("stage") else ")"), ""]
        if target is None:
            bases = [
                e for e in content.get("defaults", []) if isinstance(e, str) and e.startswith("_") and e != "_self_"
            ]
            lines += [path.read_text(encoding="utf-8").rstrip()]
            for base in bases:
                lines += ["", f"{base}:", _base(path, base).read_text(encoding="utf-8").rstrip()]
            lines += [*(_memory(content) if group == "preset" else [])]
            if "_target_" in content:
                where = f"algo.{group}" if group in PARTS else group
                lines += ["", doc_of(content["_target_"]), "", f"settings ({where}.NAME=VALUE):", *_lines(content)]
        else:
            lines += [doc_of(target), "", "settings (algo.NAME=VALUE):"]
            lines += _lines(content["algo"])
            groups = [e for e in content.get("defaults", []) if isinstance(e, dict)]
            chosen = {k.removeprefix("override ").strip("/").partition("@")[0]: v for e in groups for k, v in e.items()}
            lines += ["", "brings: " + ", ".join(f"{k}={v}" for k, v in chosen.items())] if chosen else []
        example = (
            f"alignkit train {plus}{group}={name}"
            if plus
            else f"alignkit train +algo={EXAMPLES.get(group, 'sft')} {group}={name}"
        )
        if content.get("stage") == "evaluate":
            example = "alignkit evaluate RUN_OR_MODEL"
        if content.get("stage") == "evaluate_rm":  # what `alignkit evaluate RUN` does with a reward model
            example = "alignkit train +algo=evaluate_rm model.path=RUN data=polite"
        if content.get("stage") == "evaluate_classes":
            example = "alignkit train +algo=evaluate_classes model.path=RUN data=brackets"
        if content.get("stage") == "judge":
            example = (
                "alignkit train +algo=judge data=tatoeba_en_de reward=chrf 'algo.outputs={base: runs/A, tuned: runs/B}'"
            )
        if (group, name) == ("prompt", "pairwise"):
            example = (
                "alignkit train +algo=judge data=tatoeba_en_de 'algo.outputs={base: runs/A, tuned: runs/B}' "
                "+algo.judges.chat._target_=alignkit.judges.ByChat +prompt@algo.judges.chat.prompt=pairwise "
                "+critic@algo.judges.chat.critic=local algo.judges.chat.critic.model=VALUE"
            )
        example += "".join(f" {key}=VALUE" for key in _left_open(group, path, extra))
        return "\n".join([*lines, "", f"example: {example}"])
    every = [n for group in GROUPS for n in options(group, extra)]
    raise UserError(
        f"'{name}' is neither a method nor a preset, model, data set, reward, engine, critic or prompt.{suggest(name, [*every, 'settings'])}"
    )


def _lines(given: dict[str, Any], prefix: str = "") -> list[str]:
    """One line a setting of the class that ``given`` names, with the values that it gives; a part's settings follow."""
    lines = []
    for setting in (settings_of(given["_target_"]) or {}).values():
        value = given.get(setting.name)
        if isinstance(value, dict) and "_target_" in value:
            lines += _lines(value, f"{prefix}{setting.name}.")
            continue
        default = _plain(value) if setting.name in given else setting.default
        left = f"  {prefix}{setting.name}: {setting.type} = {default}"
        lines.append(f"{left:<46} {setting.comment}".rstrip())
    return lines


def _memory(content: dict[str, Any]) -> list[str]:
    """What a preset's training keeps in memory, by the size in its model's name: an estimate without activations."""
    model = content.get("model") or {}
    size = re.search(r"(\d+(?:\.\d+)?)b\b", str(model.get("path", "")).lower())
    if size is None:
        return []
    billions, width = float(size[1]), 2 if model.get("dtype", "float32") != "float32" else 4
    cast = 2 if model.get("compute", "same") == "bfloat16" else 0  # a copy to compute with
    trained = (4 * width + cast) * billions  # weights, gradients and both moments
    algo = content.get("algo") or {}
    more = {
        "a critic as large": trained if "critic" in algo else 0,
        "the start model": width * billions if algo.get("kl") or algo.get("beta") else 0,
        "a reward model as large": 4 * billions if "reward" in content else 0,
    }
    more = {name: gb for name, gb in more.items() if gb}
    what = f"weights, gradients and AdamW's moments of {billions:g}B parameters, {width} bytes each" + (
        ", and a copy in bfloat16" if cast else ""
    )
    return [
        "",
        f"memory: about {trained + sum(more.values()):.0f} GB for {', '.join([what, *more])}; activations come on top.",
    ]


def _settings() -> str:
    """What every run takes beside its method's settings."""
    parts = (
        ("model", "Model"),
        ("model.lora", "Lora"),
        ("model.steer", "Steer"),
        ("evaluate", "Evaluate"),
        ("audit", "AuditSettings"),
        ("run", "RunSettings"),
    )
    lines = ["what every run takes; a method's own settings: alignkit show NAME", ""]
    for name, target in parts:
        found = _lines({"_target_": f"alignkit.config.{target}"}, f"{name}.")
        lines += [*(line for line in found if "default_factory" not in line), ""]
    return "\n".join(lines[:-1])


def doctor() -> tuple[str, list[str]]:
    """(report, what is wrong): versions, devices, threads, caches, switches, plugins; torch is not imported."""
    wrong: list[str] = []
    lines = [f"python        {platform.python_version()}  ({platform.platform()})"]
    if platform.python_version_tuple() < ("3", "11"):
        wrong.append("Python 3.11 or newer is needed.")
    for name, least in REQUIRED.items():
        version = _version(name)
        lines.append(f"{name:<13} {version or 'missing'}")
        if version is None:
            wrong.append(f"{name} is not installed: pip install {name}.")
        elif _tuple(version) < _tuple(least):
            wrong.append(f"{name} {version} is older than {least}: pip install -U '{name}>={least}'.")
    lines.append(f"vllm          {_version('vllm') or 'not installed (engine=vllm needs it)'}")
    torch_version = _version("torch") or ""
    driver = Path("/proc/driver/nvidia/version").exists() or shutil.which("nvidia-smi") is not None
    lines.append(f"devices       {os.cpu_count()} cores" + (", NVIDIA driver" if driver else ", no NVIDIA driver"))
    if driver and torch_version.endswith("+cpu"):
        wrong.append("there is an NVIDIA driver, but torch is a CPU build: install a CUDA build to use the GPU.")
    threads = {k: os.environ[k] for k in ("OMP_NUM_THREADS", "MKL_NUM_THREADS") if k in os.environ}
    lines.append(f"threads       {threads or 'not limited'}  (run.threads sets them for a run)")
    home = Path(os.environ.get("HF_HOME", Path.home() / ".cache" / "huggingface"))
    lines.append(f"hub cache     {home}{'' if home.exists() else '  (not there yet)'}")
    switches = {k: os.environ[k] for k in SWITCHES if k in os.environ}
    lines.append(f"switches      {switches or 'none set'}")
    lines.append(f"wandb         key {'set' if os.environ.get('WANDB_API_KEY') else 'not set'} → " + _wandb(switches))
    free = shutil.disk_usage(Path.cwd()).free / 2**30
    lines.append(f"disk here     {free:.1f} GiB free")
    if free < 1:
        wrong.append(f"only {free:.2f} GiB are free here: checkpoints may not fit. Point run.root elsewhere.")
    if not os.access(Path.cwd(), os.W_OK):
        wrong.append("this folder cannot be written: point run.root at one that can.")
    for name in ("hydra-ax-sweeper", "hydra-nevergrad-sweeper"):
        if _version(name):
            wrong.append(f"{name} {_version(name)} breaks every Hydra program on Python ≥ 3.11: pip uninstall {name}.")
    return "\n".join(lines), wrong


REQUIRED = {  # package → oldest version that is supported
    "torch": "2.11", "transformers": "5.17", "hydra-core": "1.3", "omegaconf": "2.3", "datasets": "3.0", "trl": "1.0",
    "peft": "0.15", "sacrebleu": "2.4", "wandb": "0.19", "rich": "13.0",
}  # fmt: skip
SWITCHES = (
    "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_DATASETS_OFFLINE", "HF_HUB_DISABLE_TELEMETRY", "WANDB_MODE",
    "CUDA_VISIBLE_DEVICES", "TOKENIZERS_PARALLELISM", "HYDRA_FULL_ERROR",
)  # fmt: skip


def _wandb(switches: dict[str, str]) -> str:
    return switches.get("WANDB_MODE") or ("online" if os.environ.get("WANDB_API_KEY") else "offline")


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def _tuple(version: str) -> tuple[int, ...]:
    return tuple(int(x) for x in re.findall(r"\d+", version.split("+")[0])[:3])


def _left_open(group: str, path: Path, extra: list[Path]) -> list[str]:
    """Keys that an option, or one that it chooses, leaves to the user."""
    content = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    where = f"algo.{group}" if group in PARTS else group
    found = [f"{where}.{key}" for key, value in content.items() if value == "???"]
    found += [
        f"algo.{key}" for key, value in (content.get("algo") or {}).items() if value == "???"
    ]  # of a method's file
    for entry in content.get("defaults", []):
        if isinstance(entry, str) and entry.startswith("_") and entry != "_self_":
            found += _left_open(group, _base(path, entry), extra)
        for key, choice in entry.items() if isinstance(entry, dict) else ():
            chosen = key.removeprefix("override ").lstrip("/").partition("@")[0]
            found += _left_open(chosen, options(chosen, extra)[choice], extra)
    return [key for key in found if _at(content, key) in (None, "???")]


def _at(content: dict[str, Any], key: str) -> Any:
    """The value at a dotted key, None where there is none."""
    value: Any = content
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _idea(content: dict[str, Any]) -> str:
    target = (content.get("algo") or {}).get("_target_")
    try:
        doc = doc_of(target) if target else ""
    except (ImportError, AttributeError, SyntaxError, ValueError) as e:
        return f"({target}: {e})"
    first = " ".join(doc.split("\n\n")[0].split())
    ends = [i for mark in ("; ", ". ") if (i := first.find(mark, 40)) > 0]
    return first[: min(ends, default=len(first))].rstrip(".") + "." if first else ""


def _header(path: Path) -> str:
    """The first comment of a file that is not a directive."""
    for line in path.read_text(encoding="utf-8").split("\n"):
        if line.startswith("#") and "@package" not in line:
            return line.lstrip("# ").rstrip()
    return ""


def _plain(value: Any) -> str:
    return repr(value) if isinstance(value, str) else str(value)
