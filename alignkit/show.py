"""``data.show=N``: rendered rows with the trained tokens marked, so that templates are seen before they are trained."""

from __future__ import annotations

from omegaconf import DictConfig, OmegaConf

from alignkit.data import Data


def show_rows(cfg: DictConfig, data: Data) -> None:
    """Print rows as the model will see them: prompt tokens dim, trained response tokens in brackets, then their ids."""
    from rich.console import Console
    from rich.text import Text

    from alignkit.policy import load

    rows = data.rows("train")
    policy = load(OmegaConf.to_object(cfg.model), cfg.seed, data.texts())  # type: ignore[arg-type]
    console = Console()
    for row, ids in zip(rows[: data.show], policy.encode_prompts(rows[: data.show]), strict=True):
        line = Text(f"row {row['id']}  ", style="bold")
        line.append(policy.tokenizer.decode(ids), style="dim")
        answer = policy.encode_responses([row["response"]])[0] if row["response"] is not None else []
        for token in answer:
            line.append(f"[{policy.tokenizer.decode([token])}]", style="green")
        console.print(line, soft_wrap=True)
        console.print(
            f"  {len(ids)} prompt tokens; {len(answer)} trained: {answer}; references: {row['references']}",
            style="dim",
            markup=False,
        )
