"""Read a class's settings from its source: names, types, defaults, comments, docstring. Nothing is imported.

A method's class is the schema of its YAML. Importing it would import torch, which takes seconds; ``list``,
``show`` and ``check`` should answer at once, so they parse the file instead.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import re
from dataclasses import dataclass
from functools import cache
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from typing import Any

from alignkit.errors import suggest

SCALARS = {"int": int, "float": (int, float), "str": str, "bool": bool}


@dataclass
class Setting:
    name: str
    type: str  # the annotation as written: "int", "float | None", "Literal['a', 'b']"; "" when there is none
    default: str | None  # as written; None: required
    comment: str  # the comment at the end of its line

    @property
    def required(self) -> bool:
        return self.default is None

    def accepts(self, value: Any) -> bool:
        """Whether a configuration value fits the annotation; what is not a scalar type is let through."""
        if not self.type:
            return True
        return any(_fits(value, option) for option in _options(ast.parse(self.type, mode="eval").body))


@dataclass
class Source:
    doc: str
    settings: dict[str, Setting]
    open: bool = False  # takes any keyword


def settings_of(target: str) -> dict[str, Setting] | None:
    """Settings of the class or function at a dotted path; None when it takes any keyword.

    Raises:
        ImportError, AttributeError: there is no such module or name; the text says which.
    """
    module, _, name = target.rpartition(".")
    found = _class(module, name)
    if found is not None:
        return None if found.open else found.settings
    _refuse_unknown(module, name)
    return _imported(module, name)


def file_of(target: str) -> Path | None:
    """The Python file of the module that a dotted path names; None where there is none, as for compiled ones."""
    origin = _spec(target.rpartition(".")[0]).origin
    return Path(origin) if origin and origin.endswith(".py") else None


def doc_of(target: str) -> str:
    """Docstring of the class at a dotted path."""
    module, _, name = target.rpartition(".")
    found = _class(module, name)
    return found.doc if found else ""


def lineage(target: str) -> list[tuple[Path, ast.ClassDef]]:
    """(file, class) of the class at a dotted path and of the bases that its source names, the nearest first; empty where
    there is no such source.

    Raises:
        ImportError: there is no such module.
    """
    module, _, name = target.rpartition(".")
    parsed, file = _tree(module), file_of(target)
    if parsed is None or file is None:
        return []
    tree, found = parsed[0], list[tuple[Path, ast.ClassDef]]()
    for node in tree.body:
        if isinstance(node, ast.ClassDef) and node.name == name:
            found.append((file, node))
            for base in node.bases:
                if isinstance(base, ast.Name):
                    found += lineage(f"{_home(tree, module, base.id)}.{base.id}")
    return found


def _home(tree: ast.Module, module: str, name: str) -> str:
    """The module that a name of this one comes from."""
    for node in tree.body:
        if isinstance(node, ast.ImportFrom) and node.module and any(a.name == name for a in node.names):
            return node.module
    return module


def _options(node: ast.expr) -> list[ast.expr]:
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        return _options(node.left) + _options(node.right)
    return [node]


def _fits(value: Any, node: ast.expr) -> bool:
    if isinstance(node, ast.Constant) and node.value is None:
        return value is None
    if isinstance(node, ast.Subscript) and isinstance(node.value, ast.Name):
        kind = node.value.id
        if kind == "Literal":
            return (
                value in ast.literal_eval(node.slice)
                if isinstance(node.slice, ast.Tuple)
                else value == ast.literal_eval(node.slice)
            )
        return {"list": list, "tuple": list, "dict": dict}.get(kind, object) is object or isinstance(
            value, {"list": list, "tuple": list, "dict": dict}[kind]
        )
    if isinstance(node, ast.Name) and node.id in SCALARS:
        if isinstance(value, bool) and node.id != "bool":
            return False
        return isinstance(value, SCALARS[node.id])  # type: ignore[arg-type]
    return True


@cache
def _tree(module: str) -> tuple[ast.Module, list[str]] | None:
    spec = _spec(module)
    if not spec.origin or not spec.origin.endswith(".py"):
        return None
    text = Path(spec.origin).read_text(encoding="utf-8")
    return ast.parse(text), text.split("\n")


def _spec(module: str) -> ModuleSpec:
    """Where a module is; the packages around it are not imported, since that may take torch in."""
    top, *parts = module.split(".")
    spec, name = importlib.util.find_spec(top), top
    for part in parts:
        if spec is None:
            break
        name = f"{name}.{part}"
        inside = spec.submodule_search_locations
        spec = None if inside is None else PathFinder.find_spec(name, list(inside))
    if spec is None:
        raise ImportError(f"no module '{name}'")
    return spec


def _refuse_unknown(module: str, name: str) -> None:
    """A name that the file does not even mention is not there: said without importing it."""
    parsed = _tree(module)
    if parsed is None:
        return
    tree, lines = parsed
    if not any(re.search(rf"\b{re.escape(name)}\b|import \*|__getattr__", line) for line in lines):
        known = [n.name for n in tree.body if isinstance(n, ast.ClassDef | ast.FunctionDef) and n.name[0] != "_"]
        raise AttributeError(f"module '{module}' has no '{name}'.{suggest(name, known)}")


def _class(module: str, name: str) -> Source | None:
    """The class from source, its base classes' settings first; None when the file does not define it."""
    parsed = _tree(module)
    if parsed is None:
        return None
    tree, lines = parsed
    node = next((n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == name), None)
    if node is None:
        return None
    settings: dict[str, Setting] = {}
    for base in node.bases:
        if isinstance(base, ast.Name) and (origin := _origin(tree, module, base.id)):
            settings.update(origin.settings)
    init = next((n for n in node.body if isinstance(n, ast.FunctionDef) and n.name == "__init__"), None)
    if init is not None:
        settings = _parameters(init)
    else:
        for item in node.body:
            if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name):
                if ast.unparse(item.annotation).startswith("ClassVar"):
                    continue
                written = lines[
                    item.lineno - 1 : item.end_lineno
                ]  # a long setting has its comment on a line of its own
                comment = next((c for line in written if (c := _comment(line))), "")
                if not comment and item.target.id in settings:
                    comment = settings[item.target.id].comment  # another default, the same setting
                settings[item.target.id] = Setting(
                    item.target.id,
                    ast.unparse(item.annotation),
                    ast.unparse(item.value) if item.value else None,
                    comment,
                )
    return Source(ast.get_docstring(node) or "", settings, init is not None and init.args.kwarg is not None)


def _comment(line: str) -> str:
    """The comment at the end of a line, without what is addressed to a type checker."""
    return re.sub(r"^type: ignore\S*\s*(#\s*)?", "", line.partition("  # ")[2].strip())


def _origin(tree: ast.Module, module: str, name: str) -> Source | None:
    return _class(_home(tree, module, name), name)


def _parameters(init: ast.FunctionDef) -> dict[str, Setting]:
    args = [*init.args.args[1:], *init.args.kwonlyargs]
    positional = [None] * (len(init.args.args) - len(init.args.defaults)) + list(init.args.defaults)
    defaults = [*positional[1:], *init.args.kw_defaults]
    return {
        a.arg: Setting(a.arg, ast.unparse(a.annotation) if a.annotation else "", ast.unparse(d) if d else None, "")
        for a, d in zip(args, defaults, strict=True)
    }


def _imported(module: str, name: str) -> dict[str, Setting] | None:
    """The slow way, for functions and for names that a module imports from elsewhere."""
    try:
        thing = getattr(importlib.import_module(module), name)
    except AttributeError:
        raise AttributeError(f"module '{module}' has no '{name}'") from None
    parameters = inspect.signature(thing).parameters.values()
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return {p.name: Setting(p.name, "", None if p.default is p.empty else repr(p.default), "") for p in parameters}
