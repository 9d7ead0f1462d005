"""The pages of the site that are made of the code: a hook of mkdocs (mkdocs.yml), so that they cannot grow old.

A page for each method of conf/algo (docstring, settings with types, defaults and comments, example, line of docs/papers.md), the
settings of every run, and every option of the other groups. `python scripts/make_docs.py --check site` looks for what a built page
would fetch from another host.
"""

from __future__ import annotations

import re
import sys
from html import escape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent.parent))

from alignkit import catalog
from alignkit.config import GROUPS
from alignkit.signature import doc_of, settings_of

ROOT = Path(__file__).parent.parent
EVERY_RUN = {
    "model": "Model", "model.lora": "Lora", "model.steer": "Steer", "evaluate": "Evaluate", "audit": "AuditSettings",
    "run": "RunSettings",
}  # fmt: skip


def on_config(config: Any) -> Any:
    """Put the methods into the navigation, by stage."""
    for entry in config.nav:
        if "Methods" in entry:
            entry["Methods"] = [{"All methods": "methods/index.md"}]
            entry["Methods"] += [{s: [{n: f"methods/{n}.md"} for n in names]} for s, names in by_stage().items()]
    return config


def on_files(files: Any, config: Any) -> Any:
    """Add the pages."""
    from mkdocs.structure.files import File

    for path, text in pages().items():
        files.append(File.generated(config, path, content=text))
    return files


def pages() -> dict[str, str]:
    """Path in docs/ → Markdown."""
    found = {f"methods/{name}.md": method(name) for names in by_stage().values() for name in names}
    return {**found, "methods/index.md": overview(), "settings.md": settings(), "options.md": options()}


def by_stage() -> dict[str, list[str]]:
    stages: dict[str, list[str]] = {stage: [] for stage in catalog.STAGES}
    for name, path in catalog.options("algo").items():
        stages[catalog.read(path)["stage"]].append(name)
    return {stage: names for stage, names in stages.items() if names}


def overview() -> str:
    lines = [
        "# Methods",
        "",
        "By stage; the first sentence of each. `alignkit list` prints the same, `alignkit show NAME` a card.",
        "",
    ]
    for stage, names in by_stage().items():
        lines += [f"## {stage}", "", "| method | idea |", "|---|---|"]
        lines += [f"| [{n}]({n}.md) | {_cell(_idea(n))} |" for n in names] + [""]
    return "\n".join(lines)


def method(name: str) -> str:
    path = catalog.options("algo")[name]
    content, card = catalog.read(path), catalog.card(name)
    target = (content.get("algo") or {}).get("_target_")
    example = card.rpartition("example: ")[2]
    brings = next((line.removeprefix("brings: ") for line in card.split("\n") if line.startswith("brings: ")), "")
    lines = [f"# {name}", "", f"Stage `{content['stage']}`" + (f", brings `{brings}`." if brings else "."), ""]
    lines += [_docstring(doc_of(target)), ""] if target else [_idea(name), ""]
    lines += ["```bash", example, "```", ""]
    if line := _paper(name):
        lines += ["## Source", "", line, ""]
    if target:
        lines += [
            "## Settings",
            "",
            f"`{target.rpartition('.')[0].replace('.', '/')}.py`; from the shell `algo.NAME=VALUE`.",
            "",
        ]
        lines += _table(content["algo"])
    lines += [
        "",
        "## Configuration",
        "",
        f"`conf/algo/{name}.yaml`",
        "",
        "```yaml",
        path.read_text(encoding="utf-8").rstrip(),
        "```",
        "",
    ]
    return "\n".join(lines)


def settings() -> str:
    lines = [
        "# Settings of every run",
        "",
        "What every command takes besides its method's settings; from the shell `NAME=VALUE`.",
        "",
    ]
    for prefix, cls in EVERY_RUN.items():
        lines += [f"## {prefix}", "", *_table({"_target_": f"alignkit.config.{cls}"}, f"{prefix}."), ""]
    lines += ["## data", "", "Of `data=custom` and the others; what a row is: [Bring your own](howto/own.md).", ""]
    return "\n".join([*lines, *_table({"_target_": "alignkit.data.Data"}, "data.")])


def options() -> str:
    lines = ["# Presets, models, data, rewards", "", "`alignkit show NAME` prints the file of any of these.", ""]
    for group in ("preset", *(g for g in GROUPS if g not in ("algo", "preset")), "claim"):
        lines += [f"## {group}", "", "| name | what |", "|---|---|"]
        for name, path in catalog.options(group).items():
            lines.append(f"| `{name}` | {_cell(catalog._header(path))} |")
        lines.append("")
    return "\n".join(lines)


def _idea(name: str) -> str:
    path = catalog.options("algo")[name]
    return catalog._idea(catalog.read(path)) or catalog._header(path)


def _table(given: dict[str, Any], prefix: str = "") -> list[str]:
    rows = ["| setting | type | default | what |", "|---|---|---|---|"]
    parts = []
    for setting in (settings_of(given["_target_"]) or {}).values():
        value = given.get(setting.name)
        if isinstance(value, dict) and "_target_" in value:
            parts += _table(value, f"{prefix}{setting.name}.")[2:]
            continue
        default = catalog._plain(value) if setting.name in given else setting.default
        if made := re.match(r"field\(default_factory=(?:lambda: )?(.*)\)$", str(default), re.S):
            if made[1][0].isupper():  # a part, which has a table of its own
                continue
            default = {"list": "[]", "dict": "{}"}.get(made[1], f"{made[1]}()" if made[1].isidentifier() else made[1])
        shown = "required" if default in (None, "'???'") else _code(str(default))
        rows.append(f"| `{prefix}{setting.name}` | {_code(setting.type)} | {shown} | {_cell(setting.comment)} |")
    return [*rows, *parts]


def _code(text: str) -> str:
    return f"<code>{_cell(text)}</code>" if text else ""


def _cell(text: str) -> str:
    """Plain text in a cell: nothing in it is Markdown."""
    return _ticked(escape(text, quote=False)).replace("|", "&#124;").replace("*", "&#42;").replace("_", "&#95;")


def _ticked(text: str) -> str:
    return re.sub(r"``([^`]+)``|`([^`]+)`", lambda m: f"<code>{m[1] or m[2]}</code>", text)


def _docstring(text: str) -> str:
    """Paragraphs as they are written: a formula is no Markdown. arXiv ids become links."""
    shown = []
    for paragraph in text.split("\n\n"):
        inside = _ticked(escape(paragraph, quote=False))
        shown.append(re.sub(r"arXiv (\d{4}\.\d{5})", r'<a href="https://arxiv.org/abs/\1">arXiv \1</a>', inside))
    return "\n".join(f"<p>{p}</p>" for p in shown)


def _paper(name: str) -> str:
    """The line of docs/papers.md about a method."""
    for line in (ROOT / "docs" / "papers.md").read_text(encoding="utf-8").split("\n"):
        cells = [c.strip() for c in line.strip("|").split(" | ")]
        if line.startswith("|") and len(cells) == 4 and re.search(rf"`{name}`", cells[0]):
            below = cells[3] == "below"
            told = f"[Papers](../papers.md#{name})" if below else f"{cells[3]} ([all papers](../papers.md))"
            return f"{cells[1]}. {told}".replace("– .", "").replace("–. ", "")
    return ""


class _Loads(HTMLParser):
    """What a page fetches by itself: scripts, styles, images, frames, icons. Links that one can follow are none."""

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        link = given.get("href") if tag == "link" else None
        self.found += [x for x in (given.get("src"), given.get("srcset"), link) if x]


def foreign(site: Path) -> list[str]:
    """Page and address of everything that a built site would fetch from another host."""
    wrong = []
    for page in sorted(site.rglob("*.html")):
        loads = _Loads()
        loads.feed(page.read_text(encoding="utf-8"))
        wrong += [f"{page}: {x}" for x in loads.found if re.match(r"(https?:)?//", x)]
    for sheet in sorted(site.rglob("*.css")):
        wrong += [
            f"{sheet}: {x}"
            for x in re.findall(r"(?:url\(|@import )[\"']?((?:https?:)?//[^\"')]+)", sheet.read_text("utf-8"))
        ]
    return wrong


if __name__ == "__main__":
    if sys.argv[1:2] != ["--check"] or len(sys.argv) != 3 or not (Path(sys.argv[2]) / "index.html").is_file():
        sys.exit("usage: python scripts/make_docs.py --check FOLDER_OF_A_BUILT_SITE")
    found = foreign(Path(sys.argv[2]))
    print("\n".join(found) or "nothing is fetched from other hosts.")
    sys.exit(bool(found))
