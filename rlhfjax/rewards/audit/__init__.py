"""What is a reward worth? Statistics of a reward on texts, against gold where there is some, and a verdict in words.

Texts are flat, with the number of the prompt of each beside them, so that prompts may have any number of texts.
`python experiments/run.py audit` does it all; `docs/choosing_a_reward.md` says how to read it.
"""

from rlhfjax.rewards.audit.agreement import (
    Calibration,
    Pairs,
    calibrate,
    gold_pairs,
    kendall_estimate,
    pair_accuracy,
    pairs_within,
    spearman_estimate,
    within_prompt_tau,
)
from rlhfjax.rewards.audit.best_of import Curve, best_of_n_curve
from rlhfjax.rewards.audit.features import feature_correlations, reward_words, shallow_features
from rlhfjax.rewards.audit.learning_curve import (
    LearningCurve,
    expected_accuracy,
    labels_for,
    learning_curve,
)
from rlhfjax.rewards.audit.probes import Probe, judge_probes, probe_texts
from rlhfjax.rewards.audit.ranks import average_ranks, kendall_tau_b, pearson, spearman
from rlhfjax.rewards.audit.resampling import NOTHING, Estimate, mean_estimate
from rlhfjax.rewards.audit.spread import Noise, Spread, calls_for, duplicate_noise, repeat_noise, spread
from rlhfjax.rewards.audit.verdict import GRADES, Evidence, Finding, Limits, judge, overall

__all__ = [
    "Calibration",
    "Curve",
    "Estimate",
    "Evidence",
    "Finding",
    "GRADES",
    "LearningCurve",
    "Limits",
    "NOTHING",
    "Noise",
    "Pairs",
    "Probe",
    "Spread",
    "average_ranks",
    "best_of_n_curve",
    "calibrate",
    "calls_for",
    "duplicate_noise",
    "expected_accuracy",
    "feature_correlations",
    "gold_pairs",
    "judge",
    "judge_probes",
    "kendall_estimate",
    "kendall_tau_b",
    "labels_for",
    "learning_curve",
    "mean_estimate",
    "overall",
    "pair_accuracy",
    "pairs_within",
    "pearson",
    "probe_texts",
    "repeat_noise",
    "reward_words",
    "shallow_features",
    "spearman",
    "spearman_estimate",
    "spread",
    "within_prompt_tau",
]
