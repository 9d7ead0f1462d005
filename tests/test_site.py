"""The pages of the site that are made of the code, and what a page would fetch; the site itself is built by `make docs`."""

from __future__ import annotations

import dataclasses
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest
import yaml
from hydra.utils import get_class

from alignkit import catalog
from alignkit.config import schema_keys

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def made() -> ModuleType:
    spec = importlib.util.spec_from_file_location("make_docs", ROOT / "scripts" / "make_docs.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def pages(made: ModuleType) -> dict[str, str]:
    return made.pages()


@pytest.mark.parametrize("name", catalog.options("algo"))
def test_every_method_has_a_page(name: str, pages: dict[str, str]) -> None:
    """Its idea, every setting of its class with the value that its file gives, the example, the source."""
    page = pages[f"methods/{name}.md"]
    given = catalog.read(catalog.options("algo")[name])
    assert page.startswith(f"# {name}\n") and f"Stage `{given['stage']}`" in page
    assert f"({name}.md)" in pages["methods/index.md"]
    assert re.search(r"^```bash\nalignkit (train|evaluate) ", page, re.M)
    algo = given.get("algo") or {}
    if "_target_" not in algo:
        return
    cls = get_class(algo["_target_"])
    assert (cls.__doc__ or "").split()[0].strip("`") in page
    for setting in dataclasses.fields(cls):
        if isinstance(algo.get(setting.name), dict) and "_target_" in algo[setting.name]:
            continue  # a part: its own settings are in the table
        row = re.search(rf"^\| `{setting.name}` \|.*$", page, re.M)
        assert row, setting.name
        if isinstance(algo.get(setting.name), int | float):
            assert f"<code>{algo[setting.name]}</code>" in row[0]
    assert "## Source" in page


def test_every_setting_of_every_run(pages: dict[str, str]) -> None:
    for node in ("model", "model.lora", "model.steer", "evaluate", "audit", "run"):
        for key in schema_keys(node) or ():
            if (node, key) not in (("model", "lora"), ("model", "steer")):  # tables of their own
                assert f"| `{node}.{key}` |" in pages["settings.md"], (node, key)


def test_rows_of_a_table_have_four_cells(pages: dict[str, str]) -> None:
    for name, page in pages.items():
        for table in re.findall(r"(?:^\|.*\n)+", page, re.M):
            widths = {line.count("|") for line in table.strip().split("\n")}
            assert len(widths) == 1, (name, table)


def test_a_formula_is_no_markup(made: ModuleType) -> None:
    shown = made._docstring("A ``k_min`` < B & C.\n\n*r* of arXiv 2308.02223")
    assert "<code>k_min</code> &lt; B &amp; C." in shown and shown.count("<p>") == 2
    assert '<a href="https://arxiv.org/abs/2308.02223">' in shown


def test_the_navigation_has_every_page(pages: dict[str, str]) -> None:
    """mkdocs warns of a page in the navigation that is not there, `make docs` being strict; here the other way round."""
    config = (ROOT / "mkdocs.yml").read_text(encoding="utf-8")
    named = set(re.findall(r"[\w/]+\.md", yaml.dump(yaml.safe_load(config)["nav"])))
    written = {p.relative_to(ROOT / "docs").as_posix() for p in (ROOT / "docs").rglob("*.md")}
    assert named == written | {"settings.md", "options.md"}
    assert not written & set(pages)


@pytest.mark.parametrize(
    ("markup", "wrong"),
    [
        ('<script src="https://cdn.example/x.js"></script>', 1),
        ('<img src="//cdn.example/x.png">', 1),
        ('<link rel="preconnect" href="https://fonts.example">', 1),
        ('<script src="assets/x.js"></script><img src="tour.svg"><a href="https://arxiv.org">a link</a>', 0),
    ],
)
def test_what_a_page_fetches_from_elsewhere_is_found(made: ModuleType, tmp_path: Path, markup: str, wrong: int) -> None:
    (tmp_path / "index.html").write_text(f"<html>{markup}</html>", encoding="utf-8")
    assert len(made.foreign(tmp_path)) == wrong
    (tmp_path / "a.css").write_text("@import url(https://fonts.example/a.css)", encoding="utf-8")
    assert len(made.foreign(tmp_path)) == wrong + 1


def test_pictures_follow_the_dark_mode() -> None:
    for name in ("architecture.svg", "tour.svg"):
        picture = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert "prefers-color-scheme: dark" in picture and "<title" in picture and "<desc" in picture
        assert not re.search(r"(href|src)=\"https?:|@import", picture)
