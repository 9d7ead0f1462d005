"""Settings that the user gave and that nothing in the run read: a word that does nothing should not look as if it did.

While a run lasts, a setting that was given is a descriptor of its class, which notes that it is asked for; nothing else of the
class is touched, and afterwards it is as it was. A setting counts as read when its value is taken after the object was built, or
when the constructor itself puts it into something else (``ChrF`` builds its metric of ``word_order``). A check, or a copy by
``dataclasses.replace``, is no reader; the copy is watched like the original.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from types import FrameType
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.origins import SECTIONS, given_keys, owner
from alignkit.signature import lineage

WATCHED = ("algo", "reward", "engine", "data", "model", "evaluate", "audit")
PASSES_ON = ("dataclasses", "alignkit.errors")  # modules that ask for a setting only to copy or to check it
MOST = 60  # characters of a value that is said


def given(cfg: DictConfig) -> dict[str, str]:
    """Key → where: what the words of this job, a preset or a file of one's own set; nothing is known outside of Hydra's jobs."""
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.hydra_config import HydraConfig

    if not HydraConfig.initialized() or not GlobalHydra.instance().is_initialized():
        return {}
    return given_keys(list(HydraConfig.get().overrides.task))


class Watch:
    """Notes which of the given settings are read, from ``over`` to the end of its ``with``."""

    def __init__(self, cfg: DictConfig, given: dict[str, str]) -> None:
        self.cfg = cfg
        self.left: dict[str, str] = {}  # setting → where it was given; not read so far
        self._settings: dict[str, tuple[str, str, str]] = {}  # setting → (node, class, name)
        self._undo: list[Callable[[], None]] = []
        for key, where in given.items():
            if key.partition(".")[0] not in WATCHED or not _there(cfg, key):
                continue
            node, target, name = owner(cfg, key)
            if node:
                self._settings[f"{node}.{name}"] = (node, target, name)
                self.left[f"{node}.{name}"] = where

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undo):
            undo()

    def over(self, *tops: str) -> None:
        """Begin to watch the settings of these nodes, whose objects are built."""
        for setting, (node, target, name) in self._settings.items():
            if node.partition(".")[0] not in tops:
                continue
            if not self._watch(setting, node, target, name):
                self.left.pop(setting, None)  # what cannot be watched is not spoken of

    def _watch(self, setting: str, node: str, target: str, name: str) -> bool:
        from hydra.utils import get_class

        try:
            cls: Any = get_class(target)
        except Exception:  # a function, which has had its arguments
            return False
        if not is_dataclass(cls) or name not in {f.name for f in fields(cls)} or name in built_of(target):
            return False
        value: Any = ANY
        if node in SECTIONS:
            held: Any = OmegaConf.select(self.cfg, node)
            plain: Any = OmegaConf.to_container(held, resolve=True)
            value = plain[name]
            self._undo.append(_note_node(held, name, lambda: self.left.pop(setting, None)))
        self._undo.append(_note_class(cls, name, value, lambda: self.left.pop(setting, None)))
        return True

    def unread(self) -> list[str]:
        """``key=value (where)`` of each given setting that nothing has read."""
        found = []
        for setting, where in self.left.items():
            value = OmegaConf.select(self.cfg, setting)
            value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
            text = "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
            text = text if len(text) <= MOST else text[: MOST - 1] + "…"
            found.append(f"{setting}={text}" + ("" if "=" in where else f" ({where})"))
        return found


ANY = object()


def _there(cfg: DictConfig, key: str) -> bool:
    """Whether the composed configuration has a key: a later word may have taken it away."""
    missing = object()
    try:
        return OmegaConf.select(cfg, key, default=missing) is not missing
    except Exception:  # an open interpolation
        return False


class _Noted:
    """A setting of a class that says when it is asked for."""

    def __init__(self, name: str, default: Any, value: Any, noted: Callable[[], object]) -> None:
        self.name, self.default, self.value, self.noted = name, default, value, noted
        self.seen = False

    def __get__(self, instance: Any, cls: type) -> Any:
        if instance is None or self.name not in vars(instance):
            if self.default is ANY:
                raise AttributeError(self.name)
            return self.default
        found = vars(instance)[self.name]
        if not self.seen and (self.value is ANY or found == self.value) and not _passed_on(sys._getframe(1)):
            self.seen = True  # of another value it is another object: a teacher is a Model too
            self.noted()
        return found

    def __set__(self, instance: Any, value: Any) -> None:
        vars(instance)[self.name] = value


def _passed_on(frame: FrameType | None) -> bool:
    """Whether a setting is only copied or checked: by a module that does so, or when a copy is built."""
    if frame is not None and frame.f_globals.get("__name__") in PASSES_ON:
        return True
    for _ in range(3):  # a comprehension is a frame of its own
        if frame is None or frame.f_code.co_name == "__post_init__":
            return frame is not None
        frame = frame.f_back
    return False


def _note_class(cls: Any, name: str, value: Any, noted: Callable[[], object]) -> Callable[[], None]:
    """Put a ``_Noted`` into a class; returns what takes it out."""
    before = vars(cls).get(name, ANY)
    setattr(cls, name, _Noted(name, getattr(cls, name, ANY), value, noted))

    def undo() -> None:
        if before is ANY:
            delattr(cls, name)
        else:
            setattr(cls, name, before)

    return undo


class _NotedNode(DictConfig):
    """A node of the configuration that says which of its keys are asked for."""

    def __getattr__(self, key: str) -> Any:
        _said(self, key)
        return super().__getattr__(key)

    def __getitem__(self, key: Any) -> Any:
        _said(self, key)
        return super().__getitem__(key)

    def get(self, key: Any, default_value: Any = None) -> Any:
        _said(self, key)
        return super().get(key, default_value)


def _said(node: _NotedNode, key: Any) -> None:
    for noted in node.__dict__.get("_noted", {}).get(key, ()):
        noted()


def _note_node(node: DictConfig, name: str, noted: Callable[[], object]) -> Callable[[], None]:
    """Have a node of the configuration say when ``name`` is asked for; returns what ends that."""
    object.__setattr__(node, "__class__", _NotedNode)
    node.__dict__.setdefault("_noted", {}).setdefault(name, []).append(noted)

    def undo() -> None:
        object.__setattr__(node, "__class__", DictConfig)
        node.__dict__.pop("_noted", None)

    return undo


def built_of(target: str) -> set[str]:
    """The settings that a dataclass puts into something else when it is built, read from the source of ``__post_init__``."""
    family = [node for _, node in lineage(target)]
    methods: dict[str, ast.FunctionDef] = {}
    for node in family:
        for item in node.body:
            if isinstance(item, ast.FunctionDef):
                methods.setdefault(item.name, item)
    begun = [m for node in family for m in node.body if isinstance(m, ast.FunctionDef) and m.name == "__post_init__"]
    found: set[str] = set()
    for method in begun:
        for statement in ast.walk(method):
            if isinstance(statement, ast.Assign | ast.AnnAssign | ast.AugAssign) and statement.value is not None:
                found |= _own(statement.value, methods, set())
    return found


def _own(node: ast.AST, methods: dict[str, ast.FunctionDef], seen: set[str]) -> set[str]:
    """Attributes of ``self`` in an expression, those in the methods that it names too."""
    names = {
        n.attr for n in ast.walk(node)
        if isinstance(n, ast.Attribute) and isinstance(n.value, ast.Name) and n.value.id == "self"
    }  # fmt: skip
    for name in (names & methods.keys()) - seen:
        names |= _own(methods[name], methods, seen | {name})
    return names
