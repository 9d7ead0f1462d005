"""Shrink a finished run's model to half precision and put it into the package, with a card that says how it was made.

    python scripts/bundle_model.py RUN_DIR NAME

The card records the exact command, the data's SHA-256, the seed and the dev and test metrics of the run.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from alignkit.config import Model
from alignkit.policy import load
from alignkit.run import hash_weights

MODELS = Path(__file__).parent.parent / "alignkit" / "assets" / "models"


def main(run: Path, name: str) -> None:
    out = MODELS / name
    policy = load(Model(path=str(run), dtype="float16", device="cpu"), seed=0)
    policy.save(out)
    result = json.loads((run / "result.json").read_text(encoding="utf-8"))
    data = json.loads((run / "data.json").read_text(encoding="utf-8"))
    command = (run / "command.txt").read_text(encoding="utf-8").split("\n")[0]
    test = result["evaluation"]["after"]["test"]
    metrics = "\n".join(f"| {k} | {v['value']:.2f} | {v['low']:.2f} to {v['high']:.2f} |" for k, v in test.items())
    hashes = "\n".join(
        f"- {split}: `{data['sha256'][f'data.{split}']}` ({rows} rows)" for split, rows in data["rows"].items()
    )
    card = f"""---
library_name: transformers
license: {LICENSES[name][0]}
tags: [alignkit, sft]
---
# {name}: a small {"encoder–decoder" if policy.is_encoder_decoder else "causal model"} bundled with alignkit

{LICENSES[name][1]}

Trained from scratch by alignkit's own `sft` stage, stored in half precision
({sum(p.numel() for p in policy.model.parameters()):,} parameters).

```
{command}
```

Seed {result["seed"]}; best dev {run_metric(run)} {result["best"]["value"]:.2f} at step {result["best"]["step"]} of
{result["steps"]}. Weights of the run (float32): `{result["weights_sha256"]}`; of this folder: `{hash_weights(out)}`.

Data, SHA-256 of each split:
{hashes}

Greedy decoding on the test split, before rounding to half precision:

| metric | value | 95 % interval |
|---|---|---|
{metrics}
"""
    (out / "README.md").write_text(card, encoding="utf-8")


def run_metric(run: Path) -> str:
    import yaml

    return str(yaml.safe_load((run / "config.yaml").read_text(encoding="utf-8"))["evaluate"]["select"])


LICENSES = {
    "arithmetic": (
        "apache-2.0",
        "Sums and differences of 4 to 6 digits, worked out step by step. Trained on rows that "
        "scripts/prepare_arithmetic.py makes.",
    ),
    "lists": (
        "apache-2.0",
        "Instructions on lists of digits: sort, reverse, no repeats, keep even. Trained on rows that "
        "scripts/prepare_lists.py makes, 30 % of them faulty; its vocabulary holds the words of a critique too.",
    ),
    "nlg": (
        "apache-2.0",
        "Dialogue act to sentence (restaurants and hotels). Trained on the RNNLG data of the Cambridge University "
        "Engineering Department, T.-H. Wen 2016, Apache-2.0.",
    ),
    "translation": (
        "cc-by-2.0",
        "English to German, short sentences. Trained on sentences from the Tatoeba Project (tatoeba.org), via "
        "www.manythings.org/anki, CC BY 2.0.",
    ),
}


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
