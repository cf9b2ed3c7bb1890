"""Sentiment as a task on text: the scorers, and what a run says of grammaticality beside it."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.stages import sentiment_texts
from experiments.stages.configs import HostRewards
from experiments.stages.guards import PREFIX
from experiments.stages.preferences import Gold
from experiments.stages.task import DeviceReward, OnDevice, OnHost, Task
from experiments.stages.text import Text
from rlhfjax.figures import Panel, plot_panels
from rlhfjax.networks import Branches
from rlhfjax.recipes import completion_reward
from rlhfjax.report import Section
from rlhfjax.rewards import (
    HostReward,
    RewardPool,
    byte_table,
    lexicon_on_device,
    lexicon_reward,
    regex_on_device,
)
from rlhfjax.run_folder import RunFolder

VALID = f"{PREFIX}valid"


def as_task(valid_weight: float, pool: RewardPool | None) -> Task:
    """VADER as gold score (the lexicon where it is not installed); the scorer as reward.

    Raises ValueError for a weight of the grammar that is negative.
    """
    if valid_weight < 0:
        raise ValueError(f"--valid-weight {valid_weight} must not be negative")
    known = find_spec("vaderSentiment") is not None
    gold = sentiment_texts.vader if known else squashed_lexicon()
    measures = {"valid": lambda examples: of_texts(sentiment_texts.valid)}
    reward = OnDevice(lambda text, examples: lexicon_and_grammar(text, valid_weight))
    if pool is not None:
        reward = OnHost(pool, HostRewards(workers=1, calls_of=256))
    return Task("VADER" if known else "lexicon", lambda examples: of_texts(gold), reward, measures)


def open_scorer(scorer: str, valid_weight: float) -> RewardPool | None:
    """A thread that calls VADER, where it is the reward. Raises ValueError where it is not installed."""
    if scorer != "vader":
        return None
    sentiment_texts.vader([""], [""])  # says at once what to install
    functions: dict[str, HostReward] = {"vader": sentiment_texts.vader, "valid": sentiment_texts.valid}
    weights = {"vader": 1.0, "valid": valid_weight}
    return RewardPool(functions, weights, workers=1, batch=256, timeout=120.0)


def lexicon_and_grammar(text: Text, valid_weight: float) -> DeviceReward:
    """The squashed sum of the words' weights, from -1 to 1, and `valid_weight` more for a text of the grammar."""
    table = byte_table(text.token_bytes(), text.lm.config.vocab_size)
    words = completion_reward(lexicon_on_device(table, sentiment_texts.lexicon()))
    # The automaton has a thousand states: it is made where it is asked for.
    grammar = regex_on_device(table, rf"\s*(?:{sentiment_texts.pattern()})\s*") if valid_weight else None
    of_grammar = None if grammar is None else completion_reward(grammar)

    def reward(params: Any, branches: Branches, index_B: jax.Array) -> jax.Array:
        del index_B
        total_BG = words(params, branches)
        score_BG = total_BG * jax.lax.rsqrt(jnp.square(total_BG) + sentiment_texts.SCALE)
        return score_BG if of_grammar is None else score_BG + valid_weight * of_grammar(params, branches)

    return DeviceReward(None, reward)


def squashed_lexicon() -> HostReward:
    """The same of texts, without the grammar."""
    words = lexicon_reward(sentiment_texts.lexicon())

    def score(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
        return [x / float(np.sqrt(x * x + sentiment_texts.SCALE)) for x in words(prompts, completions)]

    return score


def of_texts(function: HostReward) -> Gold:
    """A function of texts alone as (rows, texts [B][G]) -> [B, G]."""

    def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        del rows
        return np.asarray([function([""] * len(group), group) for group in texts], np.float64)

    return gold


def hack_section(parts: Sequence[RunFolder], stages: Mapping[str, Any], folder: RunFolder) -> Section:
    """Along each method that samples: reward, VADER, and the share of its samples that are still of the grammar."""
    panels: dict[str, dict[str, tuple[list[int], list[float]]]] = {
        "reward": {},
        "share of the grammar": {},
        "KL (nats)": {},
    }
    said = []
    for name in stages:
        metrics = [row for row in parts[0].metrics(name) if VALID in row]
        if not metrics:
            continue
        steps = list(range(len(metrics)))
        for label, metric in zip(panels, ("objective/score", VALID, "objective/kl"), strict=True):
            panels[label][name] = (steps, [row[metric] for row in metrics])
        last = metrics[-max(1, len(metrics) // 10) :]
        reward, valid = (np.mean([row[x] for row in last]) for x in ("objective/score", VALID))
        said.append(
            f"{name} ends at a reward of {reward:.2f} with {100 * valid:.0f} % of its samples grammatical."
        )
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    figure = plot_panels(
        path / "grammar.png",
        [
            Panel(label, curves, title=title)
            for (label, curves), title in zip(panels.items(), _TITLES, strict=True)
        ],
    )
    caption = "reward and grammaticality along each method; the first seed"
    return Section("What the reward does not see", " ".join(said), figures=[(figure, caption)])


_TITLES = ("Reward of the samples", "Samples that are of the grammar", "KL from the start")
