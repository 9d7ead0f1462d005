"""What chooses how much each kind of knowledge counts: a small actor-critic module, or constants; and its arithmetic."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from alignkit.errors import UserError

SETTINGS = "selector.json"
WEIGHTS = "selector.safetensors"
LOSSES = "losses.json"  # what the losses were that the weights are of


@dataclass(kw_only=True)
class Shape:
    """Sizes of a ``KSM`` and how its actions are executed."""

    student: int  # width of the student's states
    teacher: int  # width of the teacher's
    hidden: int = 128
    size: int = 32  # of what is made of each side's state
    action: Literal["soft", "hard"] = "soft"
    threshold: float = 0.5


class KSM(torch.nn.Module):
    """The knowledge selection module of arXiv 2302.00444: what it makes of both models' states, an actor, and a critic.

    Layers as summarised (2-layer maps, 3-layer actor and critic); the sigmoid at the actor's end and all widths are ours.
    """

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        h, m = shape.hidden, shape.size
        self.of_student = _mlp(shape.student, h, m)
        self.of_teacher = _mlp(shape.teacher, h, m)
        self.actor = _mlp(2 * m, h, h, 4)
        self.critic = _mlp(2 * m + 4, h, h, 1)

    def mu(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(N, 4) actions in [0, 1] for the mean last states of a batch, (N, d_S) and (N, d_T)."""
        return torch.sigmoid(self.actor(self._state(student, teacher)))

    def q(self, student: Tensor, teacher: Tensor, action: Tensor) -> Tensor:
        """(N,) what the critic expects of actions (N, 4) in these states."""
        return self.critic(torch.cat([self._state(student, teacher), action], -1)).squeeze(-1)  # type: ignore[no-any-return]

    @torch.no_grad()
    def weights(self, student: Tensor, teacher: Tensor) -> Tensor:
        """(4,) executed weights for one batch's mean states (d_S,) and (d_T,): no noise, nothing is drawn."""
        return executed(self.mu(student[None], teacher[None])[0], self.shape.action, self.shape.threshold)

    def _state(self, student: Tensor, teacher: Tensor) -> Tensor:
        return torch.cat([self.of_student(student), self.of_teacher(teacher)], -1)

    def save(self, folder: Path) -> None:
        """Write settings and weights into a folder."""
        save_file({k: v.contiguous() for k, v in self.state_dict().items()}, folder / WEIGHTS)
        _write(folder, {"kind": "ksm", **asdict(self.shape)})


@dataclass
class Constant:
    """The same weights at every step."""

    of: list[float]

    def save(self, folder: Path) -> None:
        """Write the weights into a folder."""
        _write(folder, {"kind": "constant", "weights": self.of})


def load(path: str) -> KSM | Constant:
    """The selector of a finished run of stage ``select``, or of a folder.

    Raises:
        UserError: there is none.
    """
    folder = Path(path).expanduser()
    file = next((f for f in (folder / "final" / SETTINGS, folder / SETTINGS) if f.is_file()), None)
    if file is None:
        unfinished = (folder / "command.txt").exists() and not (folder / "result.json").exists()
        raise UserError(
            f"algo.selector={path}: {'this run is not finished: repeat its command first' if unfinished else 'there is no selector'}."
            f" Train one with +algo=ksm or +algo=constant_grid."
        )
    try:
        settings: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        kind = settings.pop("kind")
        if kind == "constant":
            return Constant(settings["weights"])
        module = KSM(Shape(**settings))
        module.load_state_dict(load_file(file.with_name(WEIGHTS)))
    except (KeyError, TypeError, ValueError, RuntimeError, OSError) as e:
        raise UserError(f"{file} is damaged, or of another version ({type(e).__name__}: {e}).") from None
    return module.requires_grad_(False)


def losses_of(path: str) -> dict[str, Any]:
    """Settings of the losses with which a selector was learned; empty where they were not kept."""
    folder = Path(path).expanduser()
    file = next((f for f in (folder / "final" / LOSSES, folder / LOSSES) if f.is_file()), None)
    found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8")) if file else {}
    return found


def executed(action: Tensor, kind: str, threshold: float) -> Tensor:
    """(4,) weights of an action (4,): itself, or 1 where it is above the threshold; where none is, the labels teach (ours)."""
    if kind == "soft":
        return action
    return or_first((action > threshold).float())


def or_first(chosen: Tensor) -> Tensor:
    """(n,) 0 or 1, the first 1 where all are 0."""
    return chosen if bool(chosen.any()) else torch.eye(len(chosen))[0]


def td_target(reward: Tensor, following: Tensor, done: Tensor, gamma: float, form: str) -> Tensor:
    """(N,) what Q(s, a) is drawn to: ``standard`` r + gamma Q(s', a'); ``as_summarised`` gamma r + Q(s', a').

    Args:
        following: (N,) Q(s', a'), which does not count where ``done`` (N,) is 1.
    """
    rest = (1 - done) * following
    return reward + gamma * rest if form == "standard" else gamma * reward + rest


def soft_bonus(before: Tensor, now: Tensor) -> float:
    """1 - cos of the mean actions (4,) of two phases: 0 where nothing new is tried (the form is ours)."""
    return float(1 - torch.nn.functional.cosine_similarity(before, now, dim=0))


def hard_bonus(uses: list[int]) -> float:
    """Mean of 1 / sqrt(N) over a phase's steps, N how often a step's action had been used, itself included (ours)."""
    return sum(1 / math.sqrt(n) for n in uses) / len(uses)


def _mlp(*sizes: int) -> torch.nn.Sequential:
    layers: list[torch.nn.Module] = []
    for i in range(len(sizes) - 1):
        layers += [torch.nn.Linear(sizes[i], sizes[i + 1])] + ([torch.nn.ReLU()] if i + 2 < len(sizes) else [])
    return torch.nn.Sequential(*layers)


def _write(folder: Path, settings: dict[str, Any]) -> None:
    (folder / SETTINGS).write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
