"""Units of metrics, for the axes of a page: those of docs/metrics.md that are the same whatever the reward is."""

import re

NAMES = {
    "actions": "batch/actions",
    "completions": "completions/count",
    "episodes": "batch/episodes batch/without_action episode/count",
    "items": "batch/count batch/invalid",
    "nats": """
        loss/nll loss/cql objective/reference_point objective/reward_shift policy/logp_gap reward/chosen
        reward/rejected reward/desirable reward/undesirable reward/margin ensemble/loss_std
    """,
    "nats a completion": "logp/chosen logp/rejected logp/desirable logp/undesirable",
    "nats a pair": "loss/preference reward/loss reward/heldout_loss loss_first loss_last",
    "nats a sequence": "objective/kl objective/kl_estimate",
    "nats a token": "loss/ptx policy/log_ratio policy/nll",
    "nats an action": "loss/kl policy/entropy policy/approximate_kl",
    "pairs": "pair/equal labels/count pairs labels labels/ties labels/too_long labels/heldout",
    "sequences": "batch/sequences reward/nonfinite sequences",
    "share": """
        optimizer/refused policy/clip_fraction policy/dual_clip_fraction value/clip_fraction
        advantage/clip_fraction reward/clip_fraction group/equal_rewards pair/accuracy completion/accuracy
        completion/desirable choice/accuracy step/accuracy step/label completions/finished
        completions/padding game/won epsilon labels/equal reward/agreement pair/accuracy_ceiling
        heldout/accuracy heldout/accuracy_ceiling pairs/worlds_with_a_better_game
    """,
    "steps": "episode/length environment_steps step_best",
    "tokens": "length/chosen length/rejected completions/mean_length",
    "transitions": "replay/count",
    "turns": "game/turns",
    "updates": "updates",
}
UNITS = {name: unit for unit, names in NAMES.items() for name in names.split()}


def unit_of(metric: str) -> str | None:
    """The unit; None where the metric has none or its own. METRIC/run_3 and VARIANT/METRIC have that of the metric."""
    name = re.sub(r"/run_\d+$", "", metric)
    return UNITS.get(name) or UNITS.get(name.partition("/")[2])
