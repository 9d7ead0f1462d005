"""``alignkit explain KEY``: a setting's value, which file or word set it, what it overrode, and what reads it. No torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from alignkit.config import schema_keys
from alignkit.errors import UserError, suggest
from alignkit.origins import PRIVATE, SECTIONS, Layer, defaults, layers, owner, shown
from alignkit.signature import Setting, lineage, settings_of

MOST = 12  # places of readers that are printed
PACKAGE = Path(__file__).parent
SHOW_ALONE = (
    "catalog.py",
    "explain.py",
    "origins.py",
    "unread.py",
    "dry_run.py",
    "estimate.py",
)  # they speak of settings, and use none


def main(words: list[str]) -> None:
    """``KEY [+algo=NAME] [key=value …]``, in any order."""
    from alignkit.cli import hydra_words, uncomposed, use_config_dirs, without_config_dirs

    extra = use_config_dirs(words)
    rest = without_config_dirs(words)
    keys = [w for w in rest if "=" not in w and not w.startswith(("-", "~"))]
    flags = [w for w in rest if w.startswith("-")]
    if len(keys) != 1 or flags:
        raise UserError(
            f"explain: {flags[0]} is no flag; there is --config-dir."
            if flags
            else "explain: name one key, as in `alignkit explain algo.lr +algo=esrl`."
        )
    from hydra import compose, initialize_config_dir
    from hydra.errors import HydraException
    from omegaconf.errors import OmegaConfBaseException

    from alignkit.config import conf_dir, register

    register()
    given = [w for f in extra for w in ("--config-dir", str(f))]
    rest = hydra_words([*given, *(w for w in rest if w != keys[0])])[len(given) :]
    rest += [f"hydra.searchpath=[{','.join(f'file://{f.resolve()}' for f in extra)}]"] if extra else []
    try:
        with initialize_config_dir(str(conf_dir().resolve()), version_base="1.3"):
            print(explain(keys[0], compose("config", rest), rest))
    except (HydraException, OmegaConfBaseException) as e:
        raise UserError(uncomposed(e, rest)) from None


def explain(key: str, cfg: DictConfig, words: list[str]) -> str:
    """What there is to say of a dotted key of ``cfg``, which is composed of ``words``; of a section, a line a key.

    Raises:
        UserError: no such key; suggests one.
    """
    _refuse_unknown(cfg, key)
    found = layers(words)
    node, target, name = owner(cfg, key)
    value = OmegaConf.select(cfg, key) if not _is_missing(cfg, key) else "???"
    section = isinstance(value, DictConfig) and (bool(value) or key in SECTIONS)
    lines = _section(cfg, key, found) if section else _value(cfg, key, found)
    if not section or (node and f"{node}.{name}" == key and "_target_" not in value):
        setting = (settings_of(target) or {}).get(name) if target else None
        lines += _says(setting)
        lines += _readers(cfg, node, target, name)
    if not cfg.algo and cfg.get("stage", "???") == "???" and not any(w.startswith("+preset=") for w in words):
        lines += ["", "No method is named: +algo=NAME or +preset=NAME may set it too."]
    return "\n".join(lines)


def _refuse_unknown(cfg: DictConfig, key: str) -> None:
    parts = key.split(".")
    for depth, part in enumerate(parts):
        above = ".".join(parts[:depth])
        known = _keys(cfg, above)
        if part in known:
            continue
        if above in ("algo", "data", "reward", "engine") and not known:
            what = {"algo": "a method: name one with +algo=NAME", "data": "the data: choose some with data=NAME",
                    "reward": "a reward: choose one with reward=NAME",
                    "engine": "an engine: choose one with engine=NAME"}[above]  # fmt: skip
            raise UserError(f"explain: {key} is a setting of {what}, or a preset with +preset=NAME.")
        if not known:
            raise UserError(f"explain: {above} is a value, so {key} is no key.")
        raise UserError(f"{above}.{part}: no such key.{suggest(part, known)}" if above else
                        f"{part}: no such key.{suggest(part, known)}")  # fmt: skip


def _keys(cfg: DictConfig, node: str) -> list[str]:
    """Keys below a node: those of its class, and what is there."""
    value: Any = cfg if not node else OmegaConf.select(cfg, node)
    keys = [str(k) for k in value] if isinstance(value, DictConfig) else []
    if isinstance(value, DictConfig) and "_target_" in value:
        keys += list(settings_of(value._target_) or {})
    return list(dict.fromkeys([*keys, *(schema_keys(node) or [])]))


def _is_missing(cfg: DictConfig, key: str) -> bool:
    above, _, last = key.rpartition(".")
    node: Any = OmegaConf.select(cfg, above) if above else cfg
    return isinstance(node, DictConfig) and last in node.keys() and OmegaConf.is_missing(node, last)  # noqa: SIM118


# ---- values ----------------------------------------------------------------------------------------------------


@dataclass
class Source:
    """One of the places that set a key."""

    value: str
    where: str


def sources(cfg: DictConfig, key: str, found: list[Layer]) -> list[Source]:
    """All places that set a key, the one that wins first."""
    chain: list[Source] = []
    for layer in found:
        if layer.removes and (key == layer.removes or key.startswith(f"{layer.removes}.")):
            chain.append(Source("nothing", layer.where))
            continue
        inside = {k: v for k, v in layer.values.items() if k == key or k.startswith(f"{key}.")}
        above = next((k for k in layer.values if key.startswith(f"{k}.")), None)
        if inside:
            at = min(layer.lines.get(k, 0) for k in (*inside, key) if k in layer.lines) if layer.lines else 0
            value = inside[key] if key in inside else {k.removeprefix(f"{key}."): v for k, v in inside.items()}
            chain.append(Source(_plain(value), layer.place(at)))
        elif above is not None:
            chain.append(Source(_plain(layer.values[above]), layer.place(layer.lines.get(above))))
    node, target, name = owner(cfg, key)
    own = f"{node}.{name}" if node else name
    if own == key and target:
        chain = [
            Source(_written(d.value), d.where) for d in reversed(defaults(target, name)) if d.value is not None
        ] + chain
    return chain[::-1]


def _value(cfg: DictConfig, key: str, found: list[Layer]) -> list[str]:
    chain = sources(cfg, key, found)
    _, target, name = owner(cfg, key)
    setting = (settings_of(target) or {}).get(name) if target else None
    value = _said(cfg, key, chain)
    lines = [f"{key} = {value}" + (f"   ({setting.type})" if setting and setting.type else "")]
    for i, one in enumerate(chain):
        what = "set by   " if not i else "overrides" if i == 1 else "         "
        lines.append(f"  {what}  {one.where}" + (f"   {one.value}" if i else ""))
    if not chain:
        lines.append("  nothing sets it; it must be given.")
    return lines


def _said(cfg: DictConfig, key: str, chain: list[Source]) -> str:
    """The composed value; of one that is taken from elsewhere, both."""
    if _is_missing(cfg, key):
        return "??? (must be given)"
    above, _, last = key.rpartition(".")
    parent: Any = OmegaConf.select(cfg, above) if above else cfg
    if not isinstance(parent, DictConfig) or last not in parent:
        return chain[0].value if chain else "??? (must be given)"
    plain: Any = OmegaConf.to_container(parent)
    raw = plain[last]
    try:
        value = parent[last]
        value = OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
    except Exception as e:  # an interpolation that this configuration leaves open
        return f"{_plain(raw)} (not resolved: {str(e).splitlines()[0]})"
    return _plain(value) + (f"   from {raw}" if isinstance(raw, str) and "${" in raw else "")


def _section(cfg: DictConfig, key: str, found: list[Layer]) -> list[str]:
    value: Any = OmegaConf.select(cfg, key)
    target = value.get("_target_") or (f"alignkit.config.{SECTIONS[key]}" if key in SECTIONS else "")
    chosen = [
        (option, layer.place(line)) for layer in found if key in layer.chosen for option, line in [layer.chosen[key]]
    ]
    lines = [f"{key}: {target}" if target else f"{key}:"]
    for i, (option, where) in enumerate(reversed(chosen)):
        what = "chosen by" if not i else "overrides" if i == 1 else "         "
        lines.append(f"  {what}  {where}   {option if option is not None else 'null'}")
    rows = []
    for name in _keys(cfg, key):
        if name in PRIVATE:
            continue
        below = f"{key}.{name}" if key else name
        chain = sources(cfg, below, found)
        inner: Any = OmegaConf.select(cfg, below) if not _is_missing(cfg, below) else None
        text = "…" if isinstance(inner, DictConfig) and inner else _said(cfg, below, chain)
        rows.append((below, text if len(text) <= 40 else text[:39] + "…", chain[0].where if chain else ""))
    widths = [max(len(row[i]) for row in rows) for i in (0, 1)] if rows else [0, 0]
    lines += ["", *(f"  {a:<{widths[0]}}  {b:<{widths[1]}}  {c}".rstrip() for a, b, c in rows)]
    return [*lines, "", f"More of one: alignkit explain {rows[0][0] if rows else key} …"]


def _says(setting: Setting | None) -> list[str]:
    return ["", f"  {setting.comment}"] if setting is not None and setting.comment else []


def _plain(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _written(text: str | None) -> str:
    """A default as a configuration has it: null for None."""
    try:
        return _plain(ast.literal_eval(text or ""))
    except (ValueError, SyntaxError):
        return str(text)


# ---- readers ---------------------------------------------------------------------------------------------------


@dataclass
class Reader:
    """A place of the source that reads a setting."""

    file: Path
    line: int
    function: str
    text: str

    by_name: bool = True  # else through a name that is put together: getattr(self, split)

    @property
    def checks(self) -> bool:
        return self.function.endswith("__post_init__")


def _readers(cfg: DictConfig, node: str, target: str, name: str) -> list[str]:
    found = readers(cfg, node, target, name)
    if not found:
        who = (
            "transformers, as the model's configuration" if f"{node}.{name}" == "model.config" else "nothing was found"
        )
        return ["", f"  read by    {who}" + ("" if "trans" in who else "; a library or a check may read it")]
    lines = [""]
    for i, one in enumerate(found[:MOST]):
        what = "" if i else "read by"
        lines.append(f"  {what:<9}  {shown(one.file)}:{one.line}  {one.function}   {one.text}")
    return [*lines, f"             … and {len(found) - MOST} more"] if len(found) > MOST else lines


def readers(cfg: DictConfig, node: str, target: str, name: str) -> list[Reader]:
    """Where the source of alignkit, or of a class of one's own, reads setting ``name`` of class ``target``.

    An attribute counts where its object is known to be the settings: ``self`` in the class and its bases, a parameter or
    variable that is annotated with one of them, ``cfg.NODE``, a name like ``algo`` that says so. Reads through a name that
    is put together, ``getattr(self, split)``, are said of the class itself where it has no other.
    """
    family = lineage(target)
    own = {file for file, _ in family}
    classes = {item.name for _, item in family}
    found: list[Reader] = []
    word = re.escape(name)
    reads = re.compile(rf"\.{word}\b|\[[\"']{word}[\"']\]|\.get\([\"']{word}[\"']|\bgetattr\(")
    for file in dict.fromkeys([*own, *_searched(cfg, own)]):
        text = file.read_text(encoding="utf-8")
        at = [text.count("\n", 0, match.start()) + 1 for match in reads.finditer(text)]
        if at:
            found += _Search(file, text, at, node, classes, name).found
    if any(one.by_name and not one.checks and one.file in own for one in found):
        found = [one for one in found if one.by_name]
    found = [one for one in found if one.by_name or (one.file in own and not one.checks)]
    unique = {(one.file, one.line): one for one in found}
    return sorted(unique.values(), key=lambda one: (one.checks, one.file not in own, str(one.file), one.line))


def _searched(cfg: DictConfig, own: set[Path]) -> Iterator[Path]:
    """The files of alignkit that may take part in a run of this stage."""
    stage = cfg.stage if not OmegaConf.is_missing(cfg, "stage") else None
    stages = _stages(stage) if stage else None
    for file in sorted(PACKAGE.rglob("*.py")):
        part = file.relative_to(PACKAGE).parts
        if part[0] in ("report", "assets") or part[-1] in SHOW_ALONE:
            continue
        if part[0] == "algos" and part[-1][0] != "_" and file not in own:
            continue  # another method
        if part[0] == "stages" and stages is not None and file.stem not in stages:
            continue
        yield file


def _stages(stage: str) -> set[str]:
    """A stage's module and those of other stages that it imports."""
    found, left = set[str](), [stage]
    while left:
        one = left.pop()
        file = PACKAGE / "stages" / f"{one}.py"
        if one not in found and file.is_file():
            found.add(one)
            left += re.findall(r"^from alignkit\.stages\.(\w+) import", file.read_text(encoding="utf-8"), re.M)
            both = re.findall(r"^from alignkit\.stages import (.+)", file.read_text(encoding="utf-8"), re.M)
            left += [name.strip() for line in both for name in line.split(",")]
    return found


@dataclass
class _Search:
    """Walks one file; ``found`` are the places that read the setting."""

    file: Path
    text: str
    at: list[int]  # lines that are worth a look
    node: str
    classes: set[str]
    name: str
    found: list[Reader] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lines = self.text.split("\n")
        self.word = self.node.rpartition(".")[2]  # what such an object is called: algo, data, critic
        self._held: set[str] = set()  # attributes of the present class that are the settings: cfg of HeldOut
        self._walk(ast.parse(self.text), "", {}, within=False)

    def _worth(self, node: ast.AST) -> bool:
        first, last = getattr(node, "lineno", 0), getattr(node, "end_lineno", 10**9)
        return any(first <= line <= last for line in self.at)

    def _walk(self, node: ast.AST, where: str, names: dict[str, bool], within: bool) -> None:
        """``names``: variables → whether they are the settings; ``within``: ``self`` is."""
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.ClassDef | ast.FunctionDef) and not self._worth(child):
                continue
            if isinstance(child, ast.ClassDef):
                held, self._held = self._held, self._attributes(child)
                self._walk(child, f"{where}{child.name}.", names, child.name in self.classes)
                self._held = held
            elif isinstance(child, ast.FunctionDef):
                if (self.file.name, child.name) == ("config.py", "check"):
                    continue
                inner = names | self._parameters(child)
                self._walk(child, f"{where}{child.name}.", inner, within)
            else:
                if isinstance(child, ast.Assign) and len(child.targets) == 1 and isinstance(child.targets[0], ast.Name):
                    names[child.targets[0].id] = self._is(child.value, names, within)
                elif isinstance(child, ast.AnnAssign) and isinstance(child.target, ast.Name):
                    annotated = self._annotated(child.annotation)
                    if annotated is not None and where:
                        names[child.target.id] = annotated
                if self._reads(child, names, within):
                    line: int = child.lineno  # type: ignore[attr-defined]
                    text = " ".join(self.lines[line - 1].split())
                    named = not isinstance(child, ast.Call) or not isinstance(child.func, ast.Name)
                    self.found.append(Reader(self.file, line, where.rstrip(".") or "module", text[:100], named))
                self._walk(child, where, names, within)

    def _reads(self, node: ast.AST, names: dict[str, bool], within: bool) -> bool:
        if isinstance(node, ast.Attribute):
            return node.attr == self.name and isinstance(node.ctx, ast.Load) and self._is(node.value, names, within)
        if isinstance(node, ast.Subscript) and isinstance(node.slice, ast.Constant):
            return node.slice.value == self.name and self._is(node.value, names, within)
        if (
            isinstance(node, ast.Call)
            and isinstance(node.func, ast.Attribute)
            and node.func.attr == "get"
            and node.args
        ):
            first = node.args[0]
            same = isinstance(first, ast.Constant) and first.value == self.name
            return same and self._is(node.func.value, names, within)
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "getattr":
            put_together = isinstance(node.args[1], ast.Name | ast.Attribute)
            return put_together and self._is(node.args[0], names, within)
        return False

    def _is(self, node: ast.AST, names: dict[str, bool], within: bool) -> bool:
        """Whether an expression is the object that holds the setting."""
        if isinstance(node, ast.Name):
            if node.id == "self":
                return within
            if node.id in names:
                return names[node.id]
            return bool(self.node) and "." not in self.node and self.node not in SECTIONS and node.id == self.node
        if not isinstance(node, ast.Attribute):
            return False
        if isinstance(node.value, ast.Name) and node.value.id == "self" and node.attr in self._held:
            return True
        text = ast.unparse(node)
        if self.node in SECTIONS:
            whole = f"cfg.{self.node}" if self.node else "cfg"
            short = {f"cfg.{self.word}", f"model.{self.word}"} if "." in self.node else set[str]()
            return text in {whole, f"self.{whole}", f"run.{whole}", f"self.run.{whole}", *short}
        return text in (f"cfg.{self.node}", f"self.{self.word}", f"algo.{self.word}", f"self.algo.{self.word}")

    def _parameters(self, node: ast.FunctionDef) -> dict[str, bool]:
        arguments = [*node.args.args, *node.args.kwonlyargs]
        found = {}
        for one in arguments:
            annotated = self._annotated(one.annotation)
            if annotated is not None:
                found[one.arg] = annotated
            elif self.node in SECTIONS or "." in self.node:
                found[one.arg] = False
        return found

    def _annotated(self, annotation: ast.expr | None) -> bool | None:
        """Whether an annotation names the class; None where it says nothing."""
        if annotation is None:
            return None
        named = set(re.findall(r"\w+", ast.unparse(annotation)))
        if named & self.classes or (self.node == "" and "DictConfig" in named):
            return True
        return None if named & {"Any", "object"} else False

    def _attributes(self, node: ast.ClassDef) -> set[str]:
        """Attributes of ``self`` that a class takes the settings into: from a parameter of ``__init__`` or as an annotated field."""
        found = {
            item.target.id
            for item in node.body
            if isinstance(item, ast.AnnAssign)
            and isinstance(item.target, ast.Name)
            and self._annotated(item.annotation)
        }
        for function in node.body:
            if not isinstance(function, ast.FunctionDef) or function.name != "__init__":
                continue
            names = self._parameters(function)
            for item in ast.walk(function):
                for target, value in _assigned(item):
                    if (
                        isinstance(target, ast.Attribute)
                        and ast.unparse(target.value) == "self"
                        and isinstance(value, ast.Name)
                        and names.get(value.id)
                    ):
                        found.add(target.attr)
        return found


def _assigned(node: ast.AST) -> Iterator[tuple[ast.expr, ast.expr]]:
    """(target, value) of an assignment, of each of several at once."""
    for target in node.targets if isinstance(node, ast.Assign) else ():
        assert isinstance(node, ast.Assign)
        if isinstance(target, ast.Tuple) and isinstance(node.value, ast.Tuple):
            yield from zip(target.elts, node.value.elts, strict=False)
        else:
            yield target, node.value
