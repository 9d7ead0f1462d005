"""Knowledge selection: an actor-critic module learns, over repeated student trainings, what the teacher should teach when."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from alignkit import selector
from alignkit.algos._select import Select
from alignkit.batch import Batch
from alignkit.errors import need
from alignkit.selector import KSM as Module
from alignkit.selector import Shape

REPLAY = 20_000  # the last so many steps' states, from which the actor learns


@dataclass(kw_only=True)
class KSM(Select):
    """Knowledge selection for distillation (KSM, arXiv 2302.00444): an actor chooses, at every step, how much the labels, the
    teacher's responses, its features and its relations count; it is rewarded by how far the loss on held-out rows falls.

    Stage A of two: students are trained ``episodes`` times, a phase of each at a time, after which the critic learns from the
    phase's reward and the actor from the critic. ``+algo=selected algo.selector=RUN`` then distils with the frozen actor.
    From a secondary summary: the four losses, the networks' depths, the reward, deterministic policy gradients, phases, two
    stages. Ours: every number, the forms of the exploration bonus, replay and targets, the scaling of the losses.
    """

    episodes: int = 20  # student trainings
    action: Literal["soft", "hard"] = "soft"  # hard: a kind of knowledge is used or not
    threshold: float = 0.5  # lambda: a hard action uses what is above it
    gamma: float = 0.9
    td_form: Literal["standard", "as_summarised"] = "standard"  # r + gamma Q', or gamma r + Q' as the summary writes it
    credit: Literal["phase", "uniform"] = "phase"  # one transition a phase, or one a step with its share of the reward
    exploration: float = 0.05  # eta: weight of the bonus for actions that are new, beside drops of the loss in nats
    sigma: float = 0.2  # deviation of the noise on actions in the first episode …
    sigma_end: float = 0.02  # … and in the last, geometrically between
    hidden: int = 128  # width of the networks
    actor_lr: float = 1e-4
    critic_lr: float = 1e-3
    updates: int = 50  # of critic and actor at the end of each phase
    replay_batch: int = 64  # transitions, and states, of an update
    tau: float = 0.005  # share by which the target networks follow

    def __post_init__(self) -> None:
        super().__post_init__()
        need(
            self, "episodes >= 1", "gamma >= 0", "gamma <= 1", "exploration >= 0", "sigma > 0", "sigma_end > 0",
            "hidden >= 1", "actor_lr > 0", "critic_lr > 0", "updates >= 0", "replay_batch >= 1", "tau > 0", "tau <= 1",
        )  # fmt: skip

    @property
    def episodes_(self) -> int:
        return self.episodes

    def start(self, student: Any, seed: int) -> None:
        shape = Shape(
            student=student.width, teacher=self.teacher_model.width, hidden=self.hidden, action=self.action,
            threshold=self.threshold,
        )  # fmt: skip
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.module = Module(shape)
        self.target = copy.deepcopy(self.module).requires_grad_(False)
        maps = [*self.module.of_student.parameters(), *self.module.of_teacher.parameters()]
        self._critic = torch.optim.Adam([*self.module.critic.parameters(), *maps], lr=self.critic_lr)
        self._actor = torch.optim.Adam([*self.module.actor.parameters(), *maps], lr=self.actor_lr)
        self._best = copy.deepcopy(self.module.state_dict())
        self._seen: dict[str, Tensor] = {}  # of all steps: states (M, d_S) and (M, d_T)
        self._memory: dict[str, Tensor] = {}  # transitions, see `_remember`
        self._phase: list[tuple[Tensor, Tensor, Tensor]] = []  # states and executed weights of this phase's steps
        self._waiting: dict[str, Tensor] = {}  # what the phase before lacks: the state that follows
        self._before: Tensor | None = None  # mean action of the phase before
        self._uses: dict[str, int] = {}  # hard action → how often it was used in this episode
        self._sigma = self.sigma

    def begin_episode(self, episode: int, episodes: int) -> None:
        super().begin_episode(episode, episodes)
        self._phase, self._waiting, self._before, self._uses = [], {}, None, {}
        share = episode / max(1, episodes - 1)
        self._sigma = self.sigma * (self.sigma_end / self.sigma) ** share

    def weigh(self, student: Any, batch: Batch, generator: torch.Generator) -> Tensor:
        ours, theirs = self.states(student, batch)
        with torch.no_grad():
            action = self.module.mu(ours[None], theirs[None])[0]
        noise = self._sigma * torch.randn(4, generator=generator)
        weights = selector.executed((action + noise).clamp(0, 1), self.action, self.threshold)
        self._phase.append((ours, theirs, weights))
        return weights

    def end_phase(self, before: float, after: float, last: bool, generator: torch.Generator) -> dict[str, float]:
        ours, theirs, weights = (torch.stack(x) for x in zip(*self._phase, strict=True))
        mean = weights.mean(0)
        bonus = self._bonus(weights, mean)
        reward = before - after + self.exploration * bonus
        seen = _joined(self._seen, {"student": ours, "teacher": theirs})
        self._seen = {k: v[-REPLAY:] for k, v in seen.items()}
        steps = slice(None) if self.credit == "uniform" else slice(0, 1)
        size = len(weights) if self.credit == "uniform" else 1
        now = {
            "student": ours[steps],
            "teacher": theirs[steps],
            "action": weights if self.credit == "uniform" else mean[None],
            "reward": torch.full((size,), reward / size),
        }
        self._remember(now, last)
        self._phase, self._before = [], mean
        losses = [self._update(generator) for _ in range(self.updates if self._memory else 0)]
        critic, value = (sum(x) / len(x) for x in zip(*losses, strict=True)) if losses else (0.0, 0.0)
        return {"reward": reward, "bonus": bonus, "critic_loss": critic, "actor_value": value, "sigma": self._sigma}

    def _bonus(self, weights: Tensor, mean: Tensor) -> float:
        if self.action == "soft":
            return 0.0 if self._before is None else selector.soft_bonus(self._before, mean)
        uses = []
        for one in weights.tolist():
            key = "".join(str(int(w)) for w in one)
            self._uses[key] = self._uses.get(key, 0) + 1
            uses.append(self._uses[key])
        return selector.hard_bonus(uses)

    def _remember(self, now: dict[str, Tensor], last: bool) -> None:
        """Complete the transitions that wait for the state which follows them; the last of an episode has none."""
        waiting = _joined(self._waiting, now)
        student, teacher = waiting["student"], waiting["teacher"]
        whole = len(student) if last else len(student) - 1
        following = [torch.cat([x[1:], x[-1:]]) for x in (student, teacher)]
        done = torch.zeros(len(student))
        done[-1] = float(last)
        full = {**waiting, "next_student": following[0], "next_teacher": following[1], "done": done}
        if whole:
            self._memory = _joined(self._memory, {k: v[:whole] for k, v in full.items()})
        self._waiting = {} if last else {k: v[whole:] for k, v in waiting.items()}

    def _update(self, generator: torch.Generator) -> tuple[float, float]:
        """One step of the critic, then one of the actor with the critic as it is: (squared error, mean value of mu)."""
        m = self._memory
        pick = torch.randint(len(m["reward"]), (self.replay_batch,), generator=generator)
        with torch.no_grad():
            following = m["next_student"][pick], m["next_teacher"][pick]
            expected = self.target.q(*following, self.target.mu(*following))
            wanted = selector.td_target(m["reward"][pick], expected, m["done"][pick], self.gamma, self.td_form)
        error = (self.module.q(m["student"][pick], m["teacher"][pick], m["action"][pick]) - wanted).square().mean()
        self.module.zero_grad(set_to_none=True)
        error.backward()
        self._critic.step()
        pick = torch.randint(len(self._seen["student"]), (self.replay_batch,), generator=generator)
        states = self._seen["student"][pick], self._seen["teacher"][pick]
        value = self.module.q(*states, self.module.mu(*states)).mean()
        self.module.zero_grad(set_to_none=True)
        (-value).backward()
        self._actor.step()
        with torch.no_grad():
            for slow, fast in zip(self.target.parameters(), self.module.parameters(), strict=True):
                slow.lerp_(fast, self.tau)
        return float(error.detach()), float(value.detach())

    def selector(self) -> Module:
        best = copy.deepcopy(self.module)
        best.load_state_dict(self._best)
        return best

    def keep(self) -> None:
        self._best = copy.deepcopy(self.module.state_dict())

    def tensors(self) -> dict[str, Any]:
        return {
            "module": self.module.state_dict(), "target": self.target.state_dict(), "best": self._best,
            "critic": self._critic.state_dict(), "actor": self._actor.state_dict(),
            "seen": self._seen, "memory": self._memory, "waiting": self._waiting,
            "phase": [list(step) for step in self._phase], "before": self._before,
        }  # fmt: skip

    def load_tensors(self, found: dict[str, Any]) -> None:
        self.module.load_state_dict(found["module"])
        self.target.load_state_dict(found["target"])
        self._critic.load_state_dict(found["critic"])
        self._actor.load_state_dict(found["actor"])
        self._best, self._seen, self._memory = found["best"], found["seen"], found["memory"]
        self._waiting, self._before = found["waiting"], found["before"]
        self._phase = [tuple(step) for step in found["phase"]]

    def state(self) -> dict[str, object]:
        return {**super().state(), "uses": self._uses, "sigma": self._sigma}

    def load_state(self, state: dict[str, Any]) -> None:
        super().load_state(state)
        self._uses, self._sigma = dict(state["uses"]), float(state["sigma"])


def _joined(before: dict[str, Tensor], now: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: torch.cat([before[k], v]) for k, v in now.items()} if before else now
