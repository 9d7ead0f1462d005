"""The curve of README's tour, docs/tour.svg, from the metrics of a real run: `python scripts/plot_tour.py runs/esrl-s0-…`."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from alignkit.report.charts import Series, line_chart

STYLE = """<style>
svg { background: #fff; font: 11px system-ui, sans-serif; --ink: #1a1d21; --soft: #565d66; --rule: #d5d9de; --line: #0a5fa5; }
@media (prefers-color-scheme: dark) { svg { background: #14171a; --ink: #e6e8eb; --soft: #a8b0ba; --rule: #3a4048; --line: #6cb6ff; } }
.tick { fill: var(--soft); } .axis { stroke: var(--soft); fill: none; } .grid { stroke: var(--rule); fill: none; }
.line { stroke: var(--line); stroke-width: 2; fill: none; } circle { fill: var(--line); r: 3px; } .title { fill: var(--ink); font-size: 12px; }
</style>"""


def main(run: Path) -> None:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").split("\n") if line]
    dev = [(float(x["step"]), x["dev/bleu"]) for x in lines if "dev/bleu" in x]
    series = Series("dev BLEU", [x for x, _ in dev], [y for _, y in dev])
    svg = line_chart("ESRL on the bundled data-to-text model: dev BLEU", "step", "BLEU", [series], "tour")
    svg = re.sub(r"^<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="460" height="250" ', svg)
    title = '<text class="title" x="66" y="24">dev BLEU, greedy, seed 0</text>'
    svg = svg.replace("</desc>", f"</desc>{STYLE}{title}", 1)
    (Path(__file__).parent.parent / "docs" / "tour.svg").write_text(svg + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "metrics.jsonl").is_file():
        sys.exit("usage: python scripts/plot_tour.py RUN")
    main(Path(sys.argv[1]))
