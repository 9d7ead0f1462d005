"""Stage ``select``: a student is trained again and again, and what it should learn from is found out on held-out rows."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf

from alignkit import plots, preflight
from alignkit.algos._distill import KNOWLEDGE
from alignkit.algos._select import Select
from alignkit.classifier import Classifier
from alignkit.config import signature
from alignkit.data import Data, Row, overlap
from alignkit.errors import Stopped, UserError
from alignkit.ops import warmup_decay
from alignkit.run import Run
from alignkit.selector import LOSSES
from alignkit.stages.distill import tell_cut


def run(cfg: DictConfig, run: Run, data: Data, algo: Select, reward: Any) -> dict[str, Any]:
    """Train the method's selector over its episodes; write the one of the episode with the lowest loss on selection rows.

    The dev rows are cut in two: one half gives the reward, the other picks the episode; test rows are never read.
    """
    rows = algo.prepare(data.rows("train"), data.sides)
    rewarding, choosing = halves(data.rows("dev"), data.rows("test"))
    rewarding = rewarding[: algo.reward_rows]
    model: Any = OmegaConf.to_object(cfg.model)
    student = algo.build(model, cfg.seed, data.texts(), run.checkpoint)
    if isinstance(student, Classifier):
        tell_cut(student, rows)
        student.know_labels(data.rows("dev"), "dev")
    begun = algo.build(model, cfg.seed, data.texts(), None) if run.checkpoint else student
    start = {name: {k: v.clone() for k, v in module.state_dict().items()} for name, module in _trained(begun).items()}
    algo.survey(student, rows, run, data.texts())
    algo.start(student, cfg.seed)

    per = algo.steps_over(len(rows))
    ends, episodes = algo.phase_ends(per), algo.episodes_
    found: dict[str, Any] = {"episodes": [], "loss": 0.0, "best": None}
    optimizer = run.optimizer(student, algo, per)
    if run.checkpoint:
        algo.load_state(run.state["algo"]["method"])
        algo.load_tensors(torch.load(run.checkpoint / "state" / "algo.pt", weights_only=True))
        found = run.state["algo"]["found"]
    steps = per * episodes
    preflight.fit(run, student, algo, rows, algo.collate(student), optimizer, steps)
    with run.training(steps):
        for step in range(run.first_step, steps):
            episode, t = divmod(step, per)
            metrics: dict[str, float] = {"episode": episode}
            if t == 0:
                for name, module in _trained(student).items():
                    module.load_state_dict(start[name])
                optimizer = run.optimizer(student, algo, per, fresh=True)
                algo.begin_episode(episode, episodes)
                with run.phase("evaluate"):
                    found["loss"] = algo.held_out_loss(student, rewarding)
                run.count("evaluations/reward", 1)
                found["episodes"].append({"start": found["loss"], "weights": [0.0] * 4, "losses": []})
            run.seed_globally(t)  # rows and dropout are the same in each episode: only the weights differ
            student.model.train()
            with run.phase("update"):
                batch = algo.collate(student)(run.draw(rows, algo.batch_size, t))
                rate = algo.lr * warmup_decay(t, per, algo.warmup, algo.schedule, algo.floor)
                with torch.no_grad():
                    parts = algo.whole(student, batch, run.generator(step, "whole")).split(algo.micro_tokens)
                metrics |= run.update(
                    optimizer, lambda part: algo.loss(student, part), parts, algo.max_grad_norm, step,
                    [rate] * len(optimizer.param_groups),
                )  # fmt: skip
                run.count("tokens/trained", float(batch.mask.sum()))
            student.model.eval()
            now = found["episodes"][-1]
            now["weights"] = [a + metrics[f"weight/{k}"] / per for a, k in zip(now["weights"], KNOWLEDGE, strict=True)]
            if t + 1 in ends:
                metrics |= _end_phase(run, algo, student, rewarding, found, step, t + 1 == per)
            if t + 1 == per:
                with run.phase("evaluate"):
                    now["chosen_by"] = algo.held_out_loss(student, choosing)
                metrics["selection_loss"] = now["chosen_by"]
                if found["best"] is None or now["chosen_by"] < found["episodes"][found["best"]]["chosen_by"]:
                    found["best"] = episode
                    algo.keep()
            run.log(step + 1, {**metrics, "lr": rate})
            stopping = run.stop_asked  # read once, as in Run.end_step
            if stopping or t + 1 == per or (step + 1) % cfg.run.save_every == 0:
                run.save(step + 1, student, optimizer, {"method": algo.state(), "found": found}, algo.tensors())
            if stopping and step + 1 < steps:
                raise Stopped(
                    f"stopped after step {step + 1} (episode {episode + 1} of {episodes}), saved in {run.dir}."
                )
    return _finish(cfg, run, algo, found, steps, {"reward": len(rewarding), "selection": len(choosing)})


def _end_phase(
    run: Run, algo: Select, student: Any, rewarding: list[Row], found: dict[str, Any], step: int, last: bool
) -> dict[str, float]:
    """Measure the held-out loss and let the method learn from its change."""
    with run.phase("evaluate"):
        after = algo.held_out_loss(student, rewarding)
    run.count("evaluations/reward", 1)
    with run.phase("learn"):
        metrics = algo.end_phase(found["loss"], after, last, run.generator(step, "learn"))
    found["loss"] = after
    found["episodes"][-1]["losses"].append(after)
    return {"reward_loss": after, **metrics}


def halves(dev: list[Row], test: list[Row]) -> tuple[list[Row], list[Row]]:
    """The dev rows in two: which half a row is in depends on its prompt alone, so none stands in both.

    Raises:
        UserError: too few of them, or one stands in test too.
    """
    if not dev:
        raise UserError("data.dev: must be given: one half of it gives the reward, the other selects.")
    both = overlap(dev, test)
    if both:
        raise UserError(
            f"{both} test prompts stand in dev too, on which the selection is learned: what is reported on test would be too "
            "good. Take them out of one."
        )
    parts: tuple[list[Row], list[Row]] = ([], [])
    for row in dev:
        parts[hashlib.sha256(json.dumps(row["prompt"]).encode()).digest()[0] % 2].append(row)
    if not all(parts):
        raise UserError(
            f"data.dev: {len(dev)} rows; one half gives the reward, the other selects, so there must be more."
        )
    return parts


def _trained(student: Any) -> dict[str, torch.nn.Module]:
    return {"model": student.model, **({"beside": student.beside} if student.beside is not None else {})}


def _finish(
    cfg: DictConfig, run: Run, algo: Select, found: dict[str, Any], steps: int, rows: dict[str, int]
) -> dict[str, Any]:
    with run.folder(run.dir / "final") as folder:
        algo.selector().save(folder)
        (folder / LOSSES).write_text(json.dumps(algo.losses(), indent=2) + "\n", encoding="utf-8")
    _plot(run, found)
    result = {
        "status": "finished", "stage": "select", "name": cfg.name, "seed": cfg.seed, "signature": signature(cfg),
        "episodes": found["episodes"], "best_episode": found["best"], "rows": rows, "steps": steps,
        "student_runs": len(found["episodes"]), "evaluations": int(run.ledger["evaluations/reward"]),
        "seconds": {k.removeprefix("seconds/"): round(v, 3) for k, v in run.ledger.items() if k.startswith("seconds/")},
        "resumes": run.resumes, "directory": str(run.dir),
    }  # fmt: skip
    run.write_json("result.json", result)
    run.tracker.finish(result)
    return result


def _plot(run: Run, found: dict[str, Any]) -> None:
    """trajectories.svg: the weights over the first, the best and the last episode; losses.svg: the reward rows' loss of all."""
    weights: dict[int, list[list[float]]] = {}
    for line in (run.dir / "metrics.jsonl").read_text(encoding="utf-8").split("\n"):
        step = json.loads(line) if line else {}
        if "episode" in step:
            weights.setdefault(step["episode"], []).append([step[f"weight/{k}"] for k in KNOWLEDGE])
    shown = {0: "first", max(weights): "last", found["best"]: "best"}
    panels = {f"episode {i + 1} ({what})": weights[i] for i, what in sorted(shown.items())}
    plots.trajectories(panels, KNOWLEDGE, run.dir / "trajectories.svg")
    plots.losses([one["losses"] for one in found["episodes"]], {}, run.dir / "losses.svg")


def report(result: dict[str, Any]) -> str:
    """What a finished run prints."""
    then = f"alignkit train +algo=selected algo.selector={result['directory']} …"
    return f"\n{summary(result)}\nfiles: {result['directory']} (final/selector.json, trajectories.svg, losses.svg). Distil with it: {then}"


def summary(result: dict[str, Any]) -> str:
    """A line an episode: what counted how much, and the held-out losses."""
    lines = [f"| episode | {' | '.join(KNOWLEDGE)} | loss, reward rows | loss, selection rows |", "|---" * 7 + "|"]
    for i, one in enumerate(result["episodes"]):
        mark = " **best**" if i == result["best_episode"] else ""
        cells = [f"{w:.2f}" for w in one["weights"]]
        lines.append(f"| {i + 1}{mark} | {' | '.join(cells)} | {one['losses'][-1]:.4f} | {one['chosen_by']:.4f} |")
    seconds = sum(result["seconds"].values())
    lines += [
        "",
        f"{result['student_runs']} student trainings, {result['steps']:,} steps, {result['evaluations']} evaluations of "
        f"{result['rows']['reward']} rows for the reward, {seconds:.0f} seconds.",
    ]
    return "\n".join(lines)
