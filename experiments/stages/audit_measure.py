"""What an audit measures: every reward is asked for every text, and the statistics of `rlhfjax.rewards.audit` follow.

Shapes: N texts, U prompts.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from experiments.loop import run_once
from experiments.stages.audit_rewards import Calls, Reward, Speed
from experiments.stages.audit_texts import Texts
from rlhfjax.report import CalibrationBin, calibration
from rlhfjax.rewards import audit
from rlhfjax.rewards.audit import NOTHING, Estimate, Evidence, Finding
from rlhfjax.run_folder import RunFolder

Features = Mapping[str, tuple[Estimate, Estimate]]
QUICK = 1e-3  # seconds of a text below which nobody waits for a reward


@dataclass(frozen=True)
class Scores:
    """What one reward gives."""

    reward_N: np.ndarray  # NaN where it does not apply
    again: np.ndarray  # the texts scored twice, by index
    again_M: np.ndarray  # their second scores
    probes: dict[str, np.ndarray]  # name -> [U]
    probe_texts: dict[str, list[str]]
    keywords: list[str]
    speed: Speed


@dataclass(frozen=True)
class Measured:
    """One reward, measured."""

    reward: Reward
    scores: Scores
    evidence: Evidence
    findings: list[Finding]
    spearman: Estimate  # with gold
    kendall: Estimate
    temperature: float  # of `audit.calibrate`
    pairs: int  # that gold or preferences decide
    bins: list[CalibrationBin]

    @property
    def verdict(self) -> str:
        return audit.overall(self.findings)


def ask(reward: Reward, texts: Texts, calls: Calls, again: int, timed: int, folder: RunFolder) -> Scores:
    """Asks one reward for all texts, once a run: what has been answered survives what another reward does."""
    generator = np.random.default_rng([folder.seed, 8])
    count = len(texts.texts)
    # Asked again in another order: an answer that depends on its neighbours differs.
    twice = generator.permutation(count)[:again]
    every = texts.prompts_N

    def score(index: np.ndarray) -> np.ndarray:
        group = texts.group_N[index]
        return calls.score(
            reward, [every[i] for i in index], [texts.texts[i] for i in index], texts.columns_of(group)
        )

    def compute():
        reward_N = score(np.arange(count))
        if not np.isfinite(reward_N).any():
            raise ValueError(
                f"reward {reward.label!r} gave None for all {count} texts: it applies to none. Are they of its kind?"
            )
        again_M = score(twice) if len(twice) else np.zeros(0)
        known = _known(texts, reward_N)
        keywords = audit.reward_words(reward_N, texts.texts, texts.group_N)
        probes = _probes(texts, reward_N, keywords, known)
        every_prompt = np.flatnonzero(known)
        scored = {
            name: _spread_out(
                calls.score(
                    reward, [texts.prompts[u] for u in every_prompt], written, texts.columns_of(every_prompt)
                ),
                known,
            )
            for name, written in probes.items()
        }
        speed = Speed(np.nan, np.nan, calls.workers)
        if timed:
            index = np.resize(np.arange(count), timed)
            some = [every[i] for i in index], [texts.texts[i] for i in index]
            speed = calls.time(reward, *some, texts.columns_of(texts.group_N[index]))
        arrays = {
            "reward": reward_N,
            "again": again_M,
            "names": np.asarray(list(probes)),
            "probes": np.stack(list(scored.values())),
            "texts": np.asarray(list(probes.values())),
            "keywords": np.asarray(keywords, str),
            "seconds": np.asarray([speed.alone, speed.threads]),
        }
        metrics = {"reward/mean": float(np.nanmean(reward_N)), "reward/std": float(np.nanstd(reward_N))}
        return arrays, metrics, []

    found = run_once(reward.stage, folder=folder, compute=compute)
    names = [str(name) for name in found["names"]]
    return Scores(
        found["reward"],
        twice,
        found["again"],
        dict(zip(names, found["probes"], strict=True)),
        {name: [str(x) for x in row] for name, row in zip(names, found["texts"], strict=True)},
        [str(word) for word in found["keywords"]],
        Speed(float(found["seconds"][0]), float(found["seconds"][1]), calls.workers),
    )


def _probes(
    texts: Texts, reward_N: np.ndarray, keywords: Sequence[str], known: np.ndarray
) -> dict[str, list[str]]:
    """The probes of the prompts that have a text to which the reward applies."""
    number = np.cumsum(known) - 1
    kept = known[texts.group_N]
    return audit.probe_texts(
        [prompt for prompt, ok in zip(texts.prompts, known, strict=True) if ok],
        [text for text, ok in zip(texts.texts, kept, strict=True) if ok],
        number[texts.group_N[kept]],
        reward_N[kept],
        keywords,
    )


def _known(texts: Texts, reward_N: np.ndarray) -> np.ndarray:
    """Which prompts have a text that the reward applies to, bool [U]."""
    return np.isin(np.arange(len(texts.prompts)), texts.group_N[np.isfinite(reward_N)])


def _spread_out(found: np.ndarray, known: np.ndarray) -> np.ndarray:
    """As an array of all prompts."""
    every = np.full(len(known), np.nan)
    every[known] = found
    return every


def score_gold(gold: Reward, texts: Texts, calls: Calls, folder: RunFolder) -> np.ndarray:
    """Gold of all texts by a function, float64 [N]."""

    def compute():
        found = calls.score(gold, texts.prompts_N, texts.texts, texts.columns_of(texts.group_N))
        return (
            {"gold": found},
            {"gold/mean": float(np.nanmean(found)) if np.isfinite(found).any() else 0.0},
            [],
        )

    return run_once("gold", folder=folder, compute=compute)["gold"]


def score_gold_probes(
    gold: Reward, scores: Scores, texts: Texts, calls: Calls, stage: str, folder: RunFolder
) -> dict[str, np.ndarray]:
    """Gold of the probes made for a reward, name -> [U]."""
    prompts = np.flatnonzero(_known(texts, scores.reward_N))

    def compute():
        found = {}
        for name, written in scores.probe_texts.items():
            score = calls.score(gold, [texts.prompts[u] for u in prompts], written, texts.columns_of(prompts))
            found[name] = np.full(len(texts.prompts), np.nan)
            found[name][prompts] = score
        return found, {}, []

    return run_once(f"gold_probes_{stage}", folder=folder, compute=compute)


def features_of(gold_N: np.ndarray, texts: Texts) -> Features | None:
    """How gold goes with the features; None without gold."""
    if not np.isfinite(gold_N).any():
        return None
    features = audit.shallow_features(texts.prompts_N, texts.texts)
    return audit.feature_correlations(gold_N, features, texts.group_N)


def measure(
    reward: Reward,
    scores: Scores,
    texts: Texts,
    gold_N: np.ndarray,
    gold_probes: Mapping[str, np.ndarray] | None,
    of_gold: Features | None,
) -> Measured:
    """All statistics of one reward. `of_gold`: gold's own correlations with the features, where there is gold."""
    group, reward_N = texts.group_N, scores.reward_N
    pairs = audit.gold_pairs(gold_N, group)
    pairs = audit.Pairs(*(np.r_[a, b].astype(np.int64) for a, b in zip(pairs, texts.pairs, strict=True)))
    has_gold = bool(np.isfinite(gold_N).any())
    spread = audit.spread(reward_N, group, texts.texts)
    features = audit.shallow_features(texts.prompts_N, texts.texts)
    calibrated = audit.calibrate(reward_N, pairs)
    evidence = Evidence(
        spread,
        audit.repeat_noise(reward_N[scores.again], scores.again_M, within_std=spread.within_std),
        audit.duplicate_noise(reward_N, texts.prompts_N, texts.texts, within_std=spread.within_std),
        audit.pair_accuracy(reward_N, pairs, group),
        audit.within_prompt_tau(reward_N, gold_N, group) if has_gold else NOTHING,
        audit.best_of_n_curve(reward_N, gold_N if has_gold else None, group),
        audit.feature_correlations(reward_N, features, group),
        of_gold,
        audit.judge_probes(scores.probes, reward_N, group, gold_probes, gold_N if has_gold else None),
        gold_probes is not None,
    )
    return Measured(
        reward,
        scores,
        evidence,
        audit.judge(evidence),
        audit.spearman_estimate(reward_N, gold_N, group) if has_gold else NOTHING,
        audit.kendall_estimate(reward_N, gold_N, group) if has_gold else NOTHING,
        calibrated.temperature,
        len(pairs.winner_K),
        calibration(calibrated.probability_K, calibrated.right_K, bins=20) if len(calibrated.right_K) else [],
    )


def summarise(found: Sequence[Measured]) -> dict[str, float]:
    """The numbers of summary.json."""
    summary: dict[str, float] = {}
    for one in found:
        evidence, of = one.evidence, one.reward.label
        summary[f"{of}/grade"] = audit.GRADES.index(one.verdict)  # 0 ok, 1 careful, 2 do not use
        numbers = {
            "accuracy": evidence.accuracy,
            "tau_within_prompts": evidence.tau,
            "spearman": one.spearman,
            "kendall": one.kendall,
            "groups_without_spread": evidence.spread.zero,
            "ties": evidence.spread.ties,
        }
        if evidence.curve is not None:
            curve = evidence.curve
            numbers |= {
                "best_of_n/gain": curve.gain,
                "best_of_n/possible": curve.possible,
                "best_of_n/fall": curve.fall,
            }
            for name, values in (
                ("reward", curve.reward_S),
                ("gold", curve.gold_S),
                ("oracle", curve.oracle_S),
            ):
                numbers |= {f"best_of_{n}/{name}": x for n, x in zip(curve.n_S, values, strict=False)}
            summary[f"{of}/best_of_n/peak"] = curve.peak
        for name, (over_all, within) in (evidence.features or {}).items():
            numbers |= {f"feature/{name}/spearman": over_all, f"feature/{name}/tau_within_prompts": within}
        for name, probe in (evidence.probes or {}).items():
            numbers |= {f"probe/{name}/above_best": probe.above_best, f"probe/{name}/reward": probe.reward}
            if evidence.gold_probed:
                numbers |= {f"probe/{name}/gold": probe.gold}
        for name, x in numbers.items():
            summary |= {f"{of}/{name}": x.value, f"{of}/{name}/low": x.low, f"{of}/{name}/high": x.high}
        spread = evidence.spread
        summary |= {
            f"{of}/{name}": float(getattr(spread, name))
            for name in ("applies", "mean", "std", "levels", "mode", "within_std", "within_share")
        }
        for name, noise in (("again", evidence.again), ("duplicates", evidence.duplicates)):
            if noise is not None and noise.texts:
                summary |= {f"{of}/{name}/{x}": float(getattr(noise, x)) for x in noise._fields}
        summary |= {f"{of}/temperature": one.temperature, f"{of}/pairs": one.pairs}
        summary |= {
            f"{of}/seconds_alone": one.scores.speed.alone,
            f"{of}/seconds_threads": one.scores.speed.threads,
        }
    return summary
