"""Guards of a stage of policy optimisation: what they look at, what they do, and what the report says of them."""

import math
from collections.abc import Mapping, Sequence, Sized
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.options import did_you_mean
from experiments.stages.chats import Examples
from experiments.stages.configs import Guards as Config
from experiments.watch import Watch
from rlhfjax import processes
from rlhfjax.figures import Panel
from rlhfjax.guards import Guard, Memory, Verdict, observe, parse_guard
from rlhfjax.rewards import HostReward, score_on_host

ACTED = "/acted"
MEAN = "/mean"
PREFIX = "guard/"


def check(config: Config, *, why_not: str = "") -> None:
    """Raises ValueError where a guard cannot be read, its function cannot be found, or its action cannot be done.

    why_not: why the method has no KL coefficient that can be raised, in words; empty where it has.
    """
    guards = [parse_guard(text) for text in config.watch]
    for name in ("window", "patience", "every"):
        if getattr(config, name) < 1:
            raise ValueError(f"guards.{name}={getattr(config, name)} must be at least 1")
    if not config.factor > 1 or not 0 <= config.least <= config.most:
        raise ValueError(
            f"guards.factor={config.factor} must be above 1, and guards.least={config.least} and "
            f"guards.most={config.most} in order, from 0 up: each raise makes the KL coefficient larger"
        )
    for guard in guards:
        if guard.action == "raise" and why_not:
            raise ValueError(f"guard {guard.text!r} cannot raise the KL coefficient: {why_not}")
    functions_of(guards)


def functions_of(guards: Sequence[Guard]) -> dict[str, HostReward]:
    """Metric -> function, of the guards that name a function. Raises ValueError where one cannot be found."""
    from experiments.stages.host_reward import find_reward  # it imports what imports this

    names = dict.fromkeys(guard.name for guard in guards if ":" in guard.name)
    found = {metric_of(name): find_reward(name) for name in names}
    if len(found) < len(names):
        raise ValueError(f"guards name two functions of one name: {', '.join(names)}; rename one of them")
    return found


def metric_of(name: str) -> str:
    """What a guard looks at: the metric of this name, or that of the function's scores."""
    return PREFIX + name.rpartition(":")[2] if ":" in name else name


class Guarding:
    """The guards of one stage: what they remember and have decided, each a function of the metrics seen so far."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self._guards = [parse_guard(text) for text in config.watch]
        self._functions = functions_of(self._guards)
        self._memories = [Memory() for _ in self._guards]
        self._raised: dict[int, int] = {}  # step -> how many raises its metrics asked for
        self._stopped: int | None = None  # the first step whose metrics asked for a stop
        self._held = 0  # the last step before at which that guard held
        means = (PREFIX + guard.name + MEAN for guard in self._guards)
        self.nullable = frozenset((*self._functions, *means))
        self.watch = Watch(self._observe, self._over, self._kept) if self._guards else None

    def keep(self, checkpoint_every: int) -> int:
        """How many checkpoints must be kept, so that one before the last step at which all held is among them."""
        if not any(guard.action == "stop" for guard in self._guards):
            return 2
        back = self.config.patience * (self.config.every if self._functions else 1) + 2
        return 2 + math.ceil(back / checkpoint_every)

    def scores(
        self, step: int, examples: Examples, index: Sequence[int] | np.ndarray, texts: list[list[str]]
    ) -> dict[str, float]:
        """Metrics of the functions of texts: means over the completions that they apply to, NaN at steps between."""
        if not self._functions or (step - 1) % self.config.every:
            return dict.fromkeys(self._functions, math.nan)
        rows = [row for row, group in zip(index, texts, strict=True) for _ in group]
        completions = [text for group in texts for text in group]
        prompts, references = (
            [column[row] for row in rows] for column in (examples.prompts, examples.references)
        )
        return processes.from_first(
            f"guards of step {step}",
            lambda: {
                name: _mean_score(name, function, prompts, completions, references)
                for name, function in self._functions.items()
            },
        )

    def raise_in(self, state: Any, i: int) -> Any:
        """The algorithm's state for step i, counted from 0: its KL coefficient raised where that is due."""
        config = self.config
        for _ in range(self._raised.get(i - 1, 0)):
            old = state.kl_coefficient
            new = _raised(old, config.factor, config.least, config.most)
            state = state._replace(kl_coefficient=jax.device_put(new, old.sharding))
        return state

    def _observe(self, step: int, metrics: Mapping[str, Any]) -> tuple[dict[str, float], list[str]]:
        more: dict[str, float] = {}
        lines = []
        for place, guard in enumerate(self._guards):
            value = self._value(guard, metrics)
            self._memories[place], verdict = observe(
                guard,
                self._memories[place],
                step,
                value,
                window=self.config.window,
                patience=self.config.patience,
            )
            name = PREFIX + guard.name
            more[name + MEAN] = verdict.mean
            more[name + ACTED] = more.get(name + ACTED, 0) + int(verdict.acts)
            if verdict.acts:
                lines.append(self._act(guard, self._memories[place], verdict, step))
        return more, lines

    def _value(self, guard: Guard, metrics: Mapping[str, Any]) -> float | None:
        name = metric_of(guard.name)
        if name not in metrics:
            known = [
                key
                for key in metrics
                if not key.startswith((PREFIX, "perf/")) and key not in ("stage", "step")
            ]
            raise ValueError(
                f"guard {guard.text!r}: the stage has no metric {guard.name!r}{did_you_mean(guard.name, known)}; it "
                f"has {', '.join(known)}"
            )
        return metrics[name]

    def _act(self, guard: Guard, memory: Memory, verdict: Verdict, step: int) -> str:
        side = "above" if guard.above else "below"
        seen = (
            f"guard {guard.text}: at step {step} the mean is {verdict.mean:.4g}, {side} {verdict.bound:.4g} for "
            f"{verdict.broken} values"
        )
        if guard.action == "raise":
            self._raised[step] = self._raised.get(step, 0) + 1
            return f"{seen}; KL coefficient raised from step {step + 2} on"
        if guard.action == "warn":
            return seen
        if self._stopped is None:
            self._stopped, self._held = step, memory.held
        return f"{seen}; the stage ends with step {step + 1}"

    def _over(self, steps: int) -> bool:
        return self._stopped is not None and self._stopped < steps

    def _kept(self) -> int | None:
        # The texts of a step are those of the policy before its update.
        return None if self._stopped is None or self.config.keep == "last" else max(0, self._held - 1)


def _mean_score(
    name: str, function: HostReward, prompts: list[str], completions: list[str], references: list[str]
) -> float:
    applies = np.zeros(len(completions), bool)

    def zero_for_none(**given: Any) -> Any:
        found = function(**given)
        if not isinstance(found, Sized) or len(found) != len(completions):
            return found  # whose fault is told where it is called
        applies[:] = [x is not None for x in found]
        return [0.0 if x is None else x for x in found]

    score = partial(score_on_host, {name: zero_for_none}, {name: 1.0}, prompts, completions)
    try:
        score_N = score({"reference": references})
    except (ValueError, TypeError, RuntimeError) as error:
        raise ValueError(f"a guard's function failed: {error}") from error
    return float(score_N[applies].mean(dtype=np.float64)) if applies.any() else math.nan


@jax.jit
def _raised(coefficient: jax.Array, factor: float, least: float, most: float) -> jax.Array:
    """`factor` times as large, from `least` on and up to `most`; one beyond that stays."""
    return jnp.maximum(coefficient, jnp.clip(coefficient * factor, least, most))


def panels(metrics: Sequence[Mapping[str, Any]]) -> list[Panel]:
    """Curves of what the guards of a stage looked at, each with its moving mean; none where there are no guards."""
    step, found = [line["step"] for line in metrics], []
    for name in guarded(metrics):
        own = metric_of(name)
        curves = {
            "a step": (step, [line[own] for line in metrics]),
            "moving mean": (step, [line[PREFIX + name + MEAN] for line in metrics]),
        }
        found.append(Panel(name.rpartition(":")[2], curves, title=f"Guarded: {name.rpartition(':')[2]}"))
    if found and "objective/kl_coefficient" in metrics[0]:
        values = [line["objective/kl_coefficient"] for line in metrics]
        found.append(Panel("reward per nat", {"": (step, values)}, title="KL coefficient"))
    return found


def told(metrics: Sequence[Mapping[str, Any]]) -> str:
    """What the guards of a stage did, in words; empty where there are none."""
    lines = []
    for name in guarded(metrics):
        acted = [line["step"] for line in metrics if line[PREFIX + name + ACTED]]
        means = [line[PREFIX + name + MEAN] for line in metrics if line[PREFIX + name + MEAN] is not None]
        course = (
            f"the moving mean went from {means[0]:.3g} to {means[-1]:.3g}" if means else "it had no value"
        )
        did = f"acted on the metrics of steps {', '.join(map(str, acted))}" if acted else "never acted"
        lines.append(f" The guard on `{name}` {did}; {course}.")
    return "".join(lines)


def guarded(metrics: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names that the guards of a stage looked at, from its logged lines."""
    return [
        key[len(PREFIX) : -len(ACTED)] for key in metrics[0] if key.startswith(PREFIX) and key.endswith(ACTED)
    ]
