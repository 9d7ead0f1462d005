"""``alignkit completion bash|zsh|fish``: what a shell offers at the tab key.

The scripts ask the program itself, ``alignkit completion --words WORD …`` with the words behind ``alignkit``, the last of which is
being written: candidates come one a line. No torch, no Hydra; a candidate that ends with ``=`` or ``.`` wants no space behind it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from alignkit import catalog
from alignkit.config import GROUPS, PARTS, schema_keys
from alignkit.errors import UserError, suggest
from alignkit.signature import settings_of

SCRIPTS = {
    # `=` and `:` end a word in bash, so a word is put together again, and what stands before the last of them is taken off
    "bash": r"""_alignkit() {
    local line="${COMP_LINE:0:$COMP_POINT}" cur words=() lead
    if [[ -n "$line" ]]; then
        read -ra words <<< "$line"
        [[ "$line" == *[[:space:]] ]] && words+=("")
    else
        words=("${COMP_WORDS[@]:0:COMP_CWORD+1}")
    fi
    cur="${words[${#words[@]}-1]}"
    local IFS=$'\n'
    COMPREPLY=($(alignkit completion --words "${words[@]:1}" 2> /dev/null))
    if [[ "$cur" == *=* && "$COMP_WORDBREAKS" == *"="* ]]; then
        lead="${cur%"${cur##*=}"}"
        COMPREPLY=("${COMPREPLY[@]#"$lead"}")
    fi
    [[ ${#COMPREPLY[@]} -eq 1 && "${COMPREPLY[0]}" == *[=./] ]] && compopt -o nospace 2> /dev/null
    return 0
}
complete -F _alignkit alignkit
""",
    "zsh": r"""#compdef alignkit
_alignkit() {
    local -a found open closed
    found=("${(@f)$(alignkit completion --words "${(@)words[2,CURRENT]}" 2> /dev/null)}")
    open=(${(M)found:#*[=./]})
    closed=(${found:#*[=./]})
    (( ${#open} )) && compadd -Q -S '' -a open
    (( ${#closed} )) && compadd -Q -a closed
    return 0
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit -u; }
compdef _alignkit alignkit
""",
    "fish": r"""function __alignkit_words
    set -l words (commandline -opc) (commandline -ct)
    alignkit completion --words $words[2..-1] 2> /dev/null
end
complete -c alignkit -f -a '(__alignkit_words)'
""",
}
FLAGS = {
    "train": ("-m", "--dry-run", "--config-dir", "--cfg", "--help"),
    "explain": ("--config-dir",),
    "verify-resume": ("--steps", "--more", "--config-dir"),
    "evaluate": (),
    "claim": ("--quick", "--seeds", "--config-dir"),
    "report": ("--baseline", "--output", "--title", "--rows", "--interval"),
    "compare": ("--interval",),
    "table": ("--latex", "--markdown", "--csv", "--metrics"),
    "list": ("--config-dir",),
    "show": ("--config-dir",),
    "from-trl": ("--trainer",),
}
RUNS = ("evaluate", "report", "compare", "diff", "table")  # verbs that name run directories


def main(words: list[str]) -> None:
    """``bash|zsh|fish``: print the script. ``--words …``: print the candidates for the last of these words."""
    if words[:1] == ["--words"]:
        print("".join(f"{word}\n" for word in candidates(words[1:])), end="")
        return
    if len(words) != 1 or words[0] not in SCRIPTS:
        wrong = suggest(words[0], SCRIPTS) if len(words) == 1 else ""
        raise UserError(f"completion: name one shell: bash, zsh or fish.{wrong}")
    print(SCRIPTS[words[0]], end="")


def candidates(words: list[str]) -> list[str]:
    """What the last of ``words``, those behind ``alignkit``, may become: whole words that begin with it."""
    from alignkit.cli import VERBS

    *before, current = words or [""]
    verb = before[0] if before else ""
    if not before:
        found: Iterable[str] = VERBS
    elif before[-1] in ("--config-dir", "-cd"):
        found = _paths(current, folders=True)
    elif current.startswith("-"):
        found = FLAGS.get(verb, ())
    elif verb == "show":
        found = ["settings", *(name for group in GROUPS for name in catalog.options(group, _extra(before)))]
    elif verb == "completion":
        found = SCRIPTS
    elif verb == "from-trl":
        from alignkit.from_trl import FIELDS

        found = FIELDS if before[-1] == "--trainer" else _paths(current, ".yaml", ".yml")
    elif (
        verb == "claim"
        and "=" not in current
        and not any(w in catalog.options("claim", _extra(before)) for w in before[1:])
    ):
        found = catalog.options("claim", _extra(before))
    elif verb in RUNS and "=" not in current and (verb != "evaluate" or len(before) == 1):
        found = _paths(current, folders=True)
    elif verb in ("train", "evaluate", "claim", "verify-resume"):
        found = _settings(before, current)
    elif verb == "explain":
        words = _settings(before, current)
        found = [
            *words,
            *(word.removesuffix("=") for word in words if "." in word),
        ]  # the key itself, and what it is asked with
    else:
        found = ()
    return sorted({word for word in found if word.startswith(current)})


def _settings(before: list[str], current: str) -> list[str]:
    """``key=`` and, behind the sign, the values that there are."""
    extra, key = _extra(before), current.partition("=")[0]
    if "=" in current:
        return [f"{key}={value}" for value in _values(before, key, current.partition("=")[2], extra)]
    chosen = any(word.lstrip("+").startswith(("algo=", "preset=")) for word in before)
    found = [] if chosen or before[0] not in ("train", "explain", "verify-resume") else ["+algo=", "+preset="]
    found += [f"{key}=" for key in ("model", "data", "reward", "engine", "seed")]
    nodes = {
        "model": schema_keys("model"),
        "evaluate": schema_keys("evaluate"),
        "run": schema_keys("run"),
        "audit": schema_keys("audit"),
    }
    for node in ("algo", "data", "reward", "engine", *nodes):
        if not current.startswith(f"{node}."):
            found.append(f"{node}.")
            continue
        keys = nodes.get(node) or list(_node(before, node, extra))
        below = {part: schema_keys(f"{node}.{part}") for part in keys}
        for part in keys:
            inside = below[part] if node in nodes else None
            found += [f"{node}.{part}.{name}=" for name in inside] if inside else [f"{node}.{part}="]
    method = catalog.read(path)["algo"] if (path := _method(before, extra)) and "algo" in catalog.read(path) else {}
    found += [f"{part}=" for part in PARTS if part in method or part in _node(before, "algo", extra)]
    return found


def _values(before: list[str], key: str, value: str, extra: list[Path]) -> list[str]:
    """Options of a group, or what a setting's type allows."""
    group = key.lstrip("+~").partition("@")[0]
    written = value.split(",")[:-1]  # of several options the last is being written
    if group in GROUPS:
        return [",".join([*written, name]) for name in catalog.options(group, extra) if name not in written]
    node, _, name = group.partition(".")
    setting = (_settings_of(_target(before, node, extra)) if node in ("algo", "data", "reward", "engine") else {}).get(
        name
    )
    if node in ("model", "evaluate", "run", "audit"):
        setting = _settings_of({"model": "alignkit.config.Model", "evaluate": "alignkit.config.Evaluate",
                                "run": "alignkit.config.RunSettings", "audit": "alignkit.config.AuditSettings"}[node]).get(name)  # fmt: skip
    if group in ("run.dir", "run.root", "model.path", "data.train", "data.dev", "data.test"):
        return _paths(value)
    if setting is None:
        return []
    if setting.type.startswith("Literal["):
        import ast

        return [str(x) for x in ast.literal_eval(f"({setting.type[8:-1]},)")]
    if setting.type == "bool":
        return ["true", "false"]
    return (
        [word for word in setting.comment.partition(":")[0].split(" | ") if word.isidentifier()]
        if " | " in setting.comment
        else []
    )


def _method(before: list[str], extra: list[Path]) -> Path | None:
    """The file of the chosen method, or of the one that the chosen preset stands on."""
    for group in ("algo", "preset"):
        for word in reversed(before):
            key, _, name = word.lstrip("+").partition("=")
            path = catalog.options(group, extra).get(name.partition(",")[0]) if key == group else None
            if path is None:
                continue
            if group == "algo":
                return path
            for entry in catalog.read(path).get("defaults", []):
                if isinstance(entry, dict) and "/algo" in entry:
                    return catalog.options("algo", extra).get(entry["/algo"])
    return None


def _target(before: list[str], node: str, extra: list[Path]) -> str | None:
    """The class behind a node: of the method, or of the data or reward that is named or that the method brings."""
    path = _method(before, extra)
    if node == "algo":
        return (catalog.read(path).get("algo") or {}).get("_target_") if path else None
    names = [word.partition("=")[2] for word in before if word.lstrip("+").startswith(f"{node}=")]
    if not names and path:
        entries = [e for e in catalog.read(path).get("defaults", []) if isinstance(e, dict)]
        names = [v for e in entries for k, v in e.items() if k.removeprefix("override ").strip("/") == node]
    option = catalog.options(node, extra).get(names[-1]) if names else None
    named = catalog.read(option).get("_target_") if option else None
    return named or ("alignkit.data.Data" if node == "data" else None)


def _node(before: list[str], node: str, extra: list[Path]) -> Iterable[str]:
    return _settings_of(_target(before, node, extra))


def _settings_of(target: str | None) -> dict:  # type: ignore[type-arg]
    try:
        return (settings_of(target) if target else None) or {}
    except (ImportError, AttributeError, SyntaxError, ValueError):
        return {}


def _extra(before: list[str]) -> list[Path]:
    """Folders of ``--config-dir`` among the words."""
    found = [before[i + 1] for i, word in enumerate(before[:-1]) if word in ("--config-dir", "-cd")]
    found += [word.partition("=")[2] for word in before if word.startswith(("--config-dir=", "-cd="))]
    return [Path(folder) for folder in found if Path(folder).is_dir()]


def _paths(current: str, *suffixes: str, folders: bool = False) -> list[str]:
    """Folders (with ``/``) and, unless folders alone are asked for, files that the word may become; of runs the folder itself."""
    shown, _, begun = current.rpartition("/")
    lead = f"{shown}/" if "/" in current else ""
    found = []
    try:
        inside = sorted(Path(lead or ".").expanduser().iterdir())
    except OSError:
        return []
    for path in inside:
        if path.name.startswith(".") and not begun.startswith("."):
            continue
        if path.is_dir():
            found.append(f"{lead}{path.name}" + ("" if (path / "config.yaml").is_file() else "/"))
        elif not folders and (not suffixes or path.suffix in suffixes):
            found.append(f"{lead}{path.name}")
    return found
