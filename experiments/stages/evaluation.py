"""All policies on the same prompts: gold score, reward, KL, length, and what each claim must be held against.

Shapes: B prompts, G completions of each, C completion length.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import run_once
from experiments.stages.configs import EvaluationStage as Config
from experiments.stages.preferences import BRANCHES, Gold, column_groups, sample_policy
from experiments.stages.text import Examples, Text, Writer
from rlhfjax.mesh import fetch
from rlhfjax.networks import Branches, LanguageModel
from rlhfjax.recipes import completion_logp
from rlhfjax.report import Interval, bootstrap_interval, paired_difference_interval
from rlhfjax.run_folder import RunFolder


@dataclass(frozen=True)
class Policy:
    """One way to write a completion, measured: an array per prompt for everything."""

    name: str  # e.g. "sft, temperature 0.7"
    group: str  # sft, best of n, ppo
    gold: np.ndarray  # [B]
    reward: np.ndarray  # [B]
    kl: np.ndarray  # [B] nats; best-of-n: the same bound for all
    kl_estimator: str
    length: np.ndarray  # [B] tokens
    finished: np.ndarray  # [B] 0 or 1
    texts: list[str]

    def interval(self, field: str) -> Interval:
        """Mean over prompts with its bootstrap interval."""
        return bootstrap_interval(getattr(self, field), 0)


_ARRAYS = ("gold", "reward", "kl", "length", "finished")


class Scorer(NamedTuple):
    """What best-of-n goes by, and what the reward of a policy is measured with."""

    reward: Callable[[LanguageModel], Callable[..., jax.Array]] | None = None  # on the device; None: `judge`
    params: Any = None
    numbered: bool = False  # whether the reward asks for the numbers of the prompts too
    judge: Callable[[Examples], Gold] | None = None  # in Python; None without a reward: the gold score itself


def evaluate_policies(
    config: Config,
    text: Text,
    reference: dict,
    policies: Mapping[str, Writer],
    scorer: Scorer,
    gold: Callable[[Examples], Gold],
    folder: RunFolder,
    *,
    temperature: float,
    split: str = "validation",
    points: Mapping[str, Writer] = MappingProxyType({}),
    start: str = "sft",
) -> list[Policy]:
    """Measures the reference, best-of-n by the scorer, and every policy of `policies` and `points`.

    The reference is called `start`.

    Each policy is decoded at `temperature` (that of the rollouts, at which KL and best-of-n are defined), at the
    configured others and greedily, all in one pass per prompt batch; those of `points` at `temperature` only.
    """
    examples = text.load(split)
    rows = np.arange(min(config.prompts, len(examples)))
    score = _scores(text, reference, scorer, examples, config.batch, temperature)
    others = [other for other in config.temperatures if other != temperature]
    root = jax.random.fold_in(jax.random.key(folder.seed), 5)
    writers = {start: Writer(reference), **policies, **points}

    def compute():
        found = []
        for number, (label, writer) in enumerate(writers.items()):
            best_of = config.best_of if label == start else ()
            most = max(best_of, default=1)
            more = [] if label in points else [*others, 0.0]
            temperatures = np.asarray([temperature] * most + more, np.float32)
            out = sample_policy(
                text,
                writer,
                examples,
                rows,
                jax.random.fold_in(root, number),
                temperatures=temperatures,
                batch=config.batch,
            )
            scores = score(rows, out, (0, *range(most, len(temperatures))))
            if scorer.reward is None and scorer.judge is not None:
                texts = text.decode(out["token_BGC"], out["mask_BGC"])
                scores = np.asarray(scorer.judge(examples)(rows, texts), np.float64), scores[1]
            found += _measure(label, out, temperatures, most, best_of, scores, text, rows, gold(examples))
        metrics = {
            f"{policy.name}/{field}": float(getattr(policy, field).mean())
            for field in _ARRAYS
            for policy in found
        }
        arrays = _to_arrays(found) | {"prompt": np.asarray(examples.prompts[: len(rows)])}  # for annotate.py
        return arrays, metrics, _sample_rows(found, examples)

    return _from_arrays(run_once(split, folder=folder, compute=compute))


def _scores(text: Text, reference: dict, scorer: Scorer, examples: Examples, batch: int, temperature: float):
    """(rows, generation, kept) -> reward (None without one) and log-probability under the reference, each [B, G].

    The latter only of groups of columns with one of `kept` in them; 0 elsewhere.
    """

    def of_completions(lm: LanguageModel):
        def logp(reference, branches: Branches):
            logp_BGC = completion_logp(lm, reference, branches, temperature)
            return jnp.sum(logp_BGC, axis=2, where=branches.completion_mask_BGC)

        return logp

    logp_ref = text.jit(of_completions)
    rewards = None if scorer.reward is None else text.jit(scorer.reward)

    def score(rows, out, kept: Sequence[int]):
        samples = out["token_BGC"].shape[1]
        total = np.zeros((2, len(rows), samples))
        for start in range(0, len(rows), batch):
            index = np.arange(start, min(start + batch, len(rows)))
            padded = np.resize(index, batch)  # filled up, so that nothing compiles twice
            prompts = text.batch(examples, rows[padded])
            for columns in column_groups(samples):
                filled = np.resize(columns, min(samples, BRANCHES))
                token, mask = (jnp.asarray(out[x][padded][:, filled]) for x in ("token_BGC", "mask_BGC"))
                branches = Branches(*prompts[:2], *text.rows((token, mask)))
                cell = np.ix_(index, columns)
                shape = len(index), len(columns)
                if rewards is not None:
                    index_B = (prompts.index_B,) if scorer.numbered else ()
                    found = fetch(rewards(scorer.params, branches, *index_B))
                    total[0][cell] = found[: shape[0], : shape[1]]
                if not set(kept).isdisjoint(columns):
                    total[1][cell] = fetch(logp_ref(reference, branches))[: shape[0], : shape[1]]
        return None if rewards is None else total[0], total[1]

    return score


def _measure(label, out, temperatures, most, best_of: Sequence[int], scores, text: Text, rows, gold: Gold):
    """The policies of one generation: first sample at the rollouts' temperature, others, greedy, best of n."""
    reward_BG, logp_ref_BG = scores
    texts = text.decode(out["token_BGC"], out["mask_BGC"])
    gold_BG = np.asarray(gold(rows, texts), np.float64)
    reward_BG = gold_BG if reward_BG is None else reward_BG
    logp_BG = out["logp_BGC"].sum(axis=2)
    length_BG, finished_BG = out["mask_BGC"].sum(axis=2), out["finished_BG"]

    def take(column_B, name, group, kl_B, estimator):
        index = np.arange(len(rows)), column_B
        return Policy(
            f"{label}, {name}",
            group,
            gold_BG[index],
            reward_BG[index].astype(np.float64),
            np.asarray(kl_B, np.float64),
            estimator,
            length_BG[index].astype(np.float64),
            finished_BG[index].astype(np.float64),
            [texts[b][g] for b, g in zip(*index, strict=True)],
        )

    found = []
    for g in (0, *range(most, len(temperatures))):
        # A sampled completion gives k1, an unbiased estimate; a greedy one is certain, so that its KL from the
        # reference is exactly -log reference (its own logp is kept as 0).
        greedy = temperatures[g] == 0
        found.append(
            take(
                np.full(len(rows), g),
                "greedy" if greedy else f"temperature {temperatures[g]:g}",
                label,
                (logp_BG - logp_ref_BG)[:, g],
                "exact, of a point mass" if greedy else "k1",
            )
        )
    for n in best_of:
        bound = np.log(n) - (n - 1) / n
        best = reward_BG[:, :n].argmax(axis=1)
        found.append(
            take(best, f"best of {n}", "best of n", np.full(len(rows), bound), "bound log n - (n-1)/n")
        )
    return found


def _sample_rows(found: list[Policy], examples: Examples) -> list[dict[str, Any]]:
    # Before and after side by side: a terminal may have room for the first columns only.
    decodings = dict.fromkeys((found[0].name.split(", ", 1)[1], "greedy"))
    first = [p for how in decodings for p in found if p.name.endswith(f", {how}")]
    ordered = first + [p for p in found if p not in first]
    return [
        examples.shown(b) | {policy.name: policy.texts[b] for policy in ordered}
        for b in range(min(20, len(found[0].texts)))
    ]


def _to_arrays(found: list[Policy]) -> dict[str, np.ndarray]:
    arrays = {field: np.stack([getattr(policy, field) for policy in found]) for field in _ARRAYS}
    words = {field: np.asarray([getattr(policy, field) for policy in found]) for field in ("name", "group")}
    words["kl_estimator"] = np.asarray([policy.kl_estimator for policy in found])
    return arrays | words | {"texts": np.asarray([policy.texts for policy in found])}


def _from_arrays(arrays: dict[str, np.ndarray]) -> list[Policy]:
    return [
        Policy(
            name=str(arrays["name"][i]),
            group=str(arrays["group"][i]),
            kl_estimator=str(arrays["kl_estimator"][i]),
            texts=[str(x) for x in arrays["texts"][i]],
            **{field: arrays[field][i] for field in _ARRAYS},
        )
        for i in range(len(arrays["name"]))
    ]


@dataclass(frozen=True)
class Comparison:
    """A claim and what it is held against: the mean difference in gold over the same prompts."""

    claim: str
    difference: Interval

    @property
    def holds(self) -> bool:
        """Whether the whole interval lies above zero."""
        return self.difference.low > 0


def compare(
    found: list[Policy], temperature: float, treated: str = "ppo", start: str = "sft"
) -> list[Comparison]:
    """The controls beside every claim: same temperature, best temperature of each, greedy, best-of-n at equal KL."""
    by_name = {policy.name: policy for policy in found}
    sampled, greedy = by_name[f"{treated}, temperature {temperature:g}"], by_name[f"{treated}, greedy"]
    base = [policy for policy in found if policy.group == start and policy.name != f"{start}, greedy"]
    own = [policy for policy in found if policy.group == treated and policy.name != f"{treated}, greedy"]
    best_base, best_own = (max(group, key=lambda policy: policy.gold.mean()) for group in (base, own))
    pairs = [
        (sampled, by_name[f"{start}, temperature {temperature:g}"]),
        (sampled, best_base),
        (best_own, best_base),
        (sampled, by_name[f"{start}, greedy"]),
        (greedy, by_name[f"{start}, greedy"]),
    ]
    bests = [policy for policy in found if policy.group == "best of n"]
    points = [policy for policy in found if policy.group.startswith(f"{treated}-")]
    for one in (sampled, *points) if bests else ():
        price = one.kl.mean()
        pairs.append((one, min(bests, key=lambda policy: abs(policy.kl.mean() - price))))
    unique = dict.fromkeys((left.name, right.name) for left, right in pairs)
    return [
        Comparison(
            f"{left} against {right}",
            paired_difference_interval(by_name[left].gold, by_name[right].gold, 0),
        )
        for left, right in unique
    ]
