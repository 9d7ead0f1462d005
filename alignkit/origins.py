"""Where the values of a composed configuration come from: classes, files of ``conf``, words, in order of precedence."""

from __future__ import annotations

import ast
import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from alignkit.config import conf_dir
from alignkit.signature import lineage, settings_of

PRIVATE = ("_target_", "_recursive_", "_convert_", "_partial_")
SECTIONS = {  # node of the schema → its class
    "": "Config", "model": "Model", "model.lora": "Lora", "model.steer": "Steer", "evaluate": "Evaluate",
    "audit": "AuditSettings", "run": "RunSettings",
}  # fmt: skip
YAML_LOADER: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@dataclass
class Layer:
    """What one file or one word sets."""

    where: str  # a file, or the word itself
    given: bool  # by the user: a word, a preset, a file of a --config-dir
    values: dict[str, Any] = field(default_factory=dict)  # dotted key → value
    lines: dict[str, int] = field(default_factory=dict)  # dotted key → its line in the file
    chosen: dict[str, tuple[Any, int]] = field(default_factory=dict)  # node → option of its group, line
    removes: str = ""  # the key that a word takes away

    def place(self, line: int | None) -> str:
        return f"{self.where}:{line}" if line else self.where


def layers(words: list[str]) -> list[Layer]:
    """The files that Hydra composes for these words, then the words; later ones win. Hydra must be initialised, as it is
    within a job and within ``initialize_config_dir``.

    Raises:
        HydraException: the words cannot be composed.
    """
    from hydra.core.global_hydra import GlobalHydra
    from hydra.types import RunMode

    loader: Any = GlobalHydra.instance().config_loader()
    composed = loader.compute_defaults_list("config", words, RunMode.RUN)
    repository = loader._parse_overrides_and_create_caching_repo("config", words)[1]  # knows hydra.searchpath too
    shipped = conf_dir().resolve()
    found = []
    for part in composed.defaults:
        if part.config_path is None or part.config_path.startswith("hydra/") or part.config_path == "schema":
            continue
        source = repository.load_config(part.config_path)
        folder = Path(source.path.removeprefix("file://"))
        file = folder / f"{part.config_path}.yaml"
        own = folder.resolve() != shipped or part.config_path.startswith("preset/")
        found.append(_of_file(file, part.package or "", own))
    for override in _parsed(words):
        key = override.key_or_group
        layer = Layer(override.input_line or "", True)
        if override.is_delete():
            layer.removes = key
        elif repository.group_exists(key):
            layer.chosen[override.package or key] = (override.value(), 0)
        else:
            layer.values = flat(override.value(), key)
        found.append(layer)
    return found


def _parsed(words: list[str]) -> list[Any]:
    from hydra.core.override_parser.overrides_parser import OverridesParser

    found: list[Any] = OverridesParser.create().parse_overrides(words)
    return found


def _of_file(file: Path, package: str, own: bool) -> Layer:
    text = file.read_text(encoding="utf-8")
    content: Any = OmegaConf.to_container(OmegaConf.create(text)) or {}
    layer = Layer(shown(file), own)
    layer.values = flat({k: v for k, v in content.items() if k not in ("defaults", "hydra")}, package)
    root = yaml.compose(text, Loader=YAML_LOADER)
    layer.lines = dict(_lines(root, package))
    for key, value in root.value if isinstance(root, yaml.MappingNode) else ():
        for entry in value.value if key.value == "defaults" else ():
            if isinstance(entry, yaml.MappingNode):
                for group, option in entry.value:
                    name, _, at = group.value.removeprefix("override ").lstrip("/").partition("@")
                    chosen = None if option.value in ("null", "") else option.value
                    layer.chosen[at or name] = (chosen, option.start_mark.line + 1)
    return layer


def _lines(node: Any, path: str) -> Iterator[tuple[str, int]]:
    for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
        here = f"{path}.{key.value}" if path else str(key.value)
        yield here, key.start_mark.line + 1
        yield from _lines(value, here)


def flat(value: Any, path: str = "") -> dict[str, Any]:
    """Dotted key → value; an empty mapping is a value."""
    if not isinstance(value, dict) or not value:
        return {path: value} if path else {}
    found: dict[str, Any] = {}
    for key, item in value.items():
        found |= flat(item, f"{path}.{key}" if path else str(key))
    return found


def shown(path: Path) -> str:
    """A file as it is said: from the working folder, from where ``conf`` and ``alignkit`` lie, or whole."""
    for base in (Path(os.getcwd()).resolve(), conf_dir().resolve().parent):
        if path.resolve().is_relative_to(base):
            return str(path.resolve().relative_to(base))
    return str(path)


def given_keys(words: list[str]) -> dict[str, str]:
    """Dotted key → where the user has set it: a word, a preset, a file of a ``--config-dir``."""
    found: dict[str, str] = {}
    for layer in layers(words):
        if layer.given:
            for key in layer.values:
                if key.rpartition(".")[2] not in PRIVATE:
                    found[key] = layer.place(layer.lines.get(key))
    return found


def owner(cfg: DictConfig, key: str) -> tuple[str, str, str]:
    """(node, class, setting) that a dotted key belongs to: the setting itself, or the one whose value holds it.

    ``algo.critic.lr`` → ("algo.critic", "alignkit.critic.Critic", "lr"), ``reward.weights.bleu`` → ("reward", …, "weights");
    the class is empty where none is known.
    """
    parts = key.split(".")
    for depth in range(len(parts) - 1, -1, -1):
        node = ".".join(parts[:depth])
        if node in SECTIONS:
            return node, f"alignkit.config.{SECTIONS[node]}", parts[depth]
        found: Any = OmegaConf.select(cfg, node)
        if isinstance(found, DictConfig) and found.get("_target_"):
            return node, found._target_, parts[depth]
    raise AssertionError("the root is a section")


@dataclass
class Default:
    """A setting's default in a class."""

    value: str | None  # as written; None: the class has none
    where: str  # file:line (class)


def defaults(target: str, name: str) -> list[Default]:
    """The defaults of a setting, of the class itself first, then of the bases that it overrides."""
    found = []
    for file, node in lineage(target):
        init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
        if init is not None:
            line = next((a.lineno for a in [*init.args.args, *init.args.kwonlyargs] if a.arg == name), None)
            setting = (settings_of(target) or {}).get(name)
            if line is not None and setting is not None:
                found.append(Default(setting.default, f"{shown(file)}:{line} ({node.name})"))
            return found
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name) and item.target.id == name:
                value = ast.unparse(item.value) if item.value else None
                made = re.fullmatch(r"field\(default_factory=(.*)\)", value or "")
                value = {"dict": "{}", "list": "[]"}.get(made[1], f"{made[1]}()") if made else value
                found.append(Default(value, f"{shown(file)}:{item.lineno} ({node.name})"))
    return found
