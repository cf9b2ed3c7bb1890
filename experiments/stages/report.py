"""What a run says at its end: figures, report.md, and the numbers of summary.json."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from experiments.stages import guards
from experiments.stages.evaluation import Comparison, Policy
from experiments.stages.reward import Learned
from experiments.stages.text import Examples
from rlhfjax.figures import (
    EvaluatedPolicy,
    Panel,
    plot_calibration,
    plot_gold_against_kl,
    plot_overoptimisation,
    plot_panels,
)
from rlhfjax.report import (
    Interval,
    Section,
    Table,
    accuracy_by_margin,
    bootstrap_interval,
    calibration,
    calibration_error,
)
from rlhfjax.run_folder import RunFolder

GROUPS = 10  # points along PPO in the over-optimisation figure


def result_sections(
    found: Mapping[str, Sequence[Policy]],
    comparisons: Mapping[str, Sequence[Comparison]],
    gold_name: str,
    temperature: float,
) -> list[Section]:
    """Claims and policies, split by split."""
    return [
        section
        for split in found
        for section in (
            comparison_section(comparisons[split], gold_name, split),
            policy_section(found[split], gold_name, split, temperature),
        )
    ]


def policy_section(found: Sequence[Policy], gold_name: str, split: str, temperature: float) -> Section:
    """The table of all policies."""
    header = ["policy", gold_name, "reward", "KL (nats)", "KL by", "tokens", "ended"]
    rows = [
        [
            policy.name,
            policy.interval("gold"),
            policy.interval("reward"),
            _two_decimals(policy.interval("kl"))
            if policy.group != "best of n"
            else f"{policy.kl.mean():.2f}",
            policy.kl_estimator,
            policy.interval("length"),
            policy.interval("finished"),
        ]
        for policy in found
    ]
    text = (
        f"Each policy on the same {len(found[0].gold)} prompts of the {split} split, one completion a prompt; 95 % "
        "bootstrap intervals over prompts. KL is from the policy that it started from, at the temperature of the "
        f"rollouts, {temperature:g}."
    )
    return Section(f"All policies, {split} split", text, Table(header, rows))


def _two_decimals(interval: Interval) -> str:
    """A KL of rounding errors is shown as 0.00, not to the digits of its spread."""
    value, low, high = (round(x, 2) + 0.0 for x in interval)  # + 0.0: no minus before a zero
    return f"{value:.2f} [{low:.2f}, {high:.2f}]"


def comparison_section(comparisons: Sequence[Comparison], gold_name: str, split: str) -> Section:
    """The claims and their controls."""
    rows = [[item.claim, item.difference, "yes" if item.holds else "no"] for item in comparisons]
    return Section(
        f"What survives its control, {split} split",
        f"Paired differences in {gold_name} over the same prompts. A claim holds where the whole interval lies "
        "above 0.",
        Table(["claim", "difference", "holds"], rows),
    )


def text_section(
    found: Sequence[Policy], examples: Examples, temperature: float, number: int = 12
) -> Section:
    """Sampled texts before and after, with what the data has, if anything."""
    by_name = {policy.name: policy for policy in found}
    whole = {policy.group for policy in found if policy.name.endswith(", greedy")}
    endings = (f", temperature {temperature:g}", ", greedy")
    shown = [policy.name for policy in found if policy.group in whole and policy.name.endswith(endings)]
    before = [examples.shown(b) for b in range(min(number, len(found[0].texts)))]
    rows = [[*x.values(), *(by_name[name].texts[b] for name in shown)] for b, x in enumerate(before)]
    return Section("Texts before and after", "", Table([*before[0], *shown], rows))


def verdict(metrics: Sequence[dict[str, float]], gold_name: str) -> str:
    """In words, whether the learned reward and gold went the same way along PPO: first, best and last tenth."""
    part = max(1, len(metrics) // GROUPS)
    reward, gold = (
        np.array([np.mean([m[name] for m in metrics[i : i + part]]) for i in range(0, len(metrics), part)])
        for name in ("objective/score", "gold")
    )
    spread = np.std([m["gold"] for m in metrics[-part * 2 :]]) / np.sqrt(part)
    lines = [
        f"The reward went from {reward[0]:.2f} to {reward[-1]:.2f}, {gold_name} from {gold[0]:.3f} to {gold[-1]:.3f} "
        f"(highest {gold.max():.3f})."
    ]
    if reward[-1] > reward[0] and gold[-1] < gold[0] - 2 * spread:
        lines.append(
            f"**Over-optimisation: the learned reward rose and {gold_name} fell.** The policy exploits the reward "
            "model. Raise kl_coefficient, stop earlier, or train the reward model on more pairs."
        )
    elif reward[-1] > reward[0] and gold[-1] < gold.max() - 4 * spread:
        lines.append(
            f"**{gold_name} has passed its peak** while the learned reward still rose: the beginning of "
            "over-optimisation."
        )
    return " ".join(lines)


PANELS = (  # label, metric, title; a method shows those it logs
    ("reward", "objective/score", "Reward of the samples"),
    ("{gold}", "gold", "Gold score of the samples"),
    ("nats per completion", "objective/kl", "KL from the reference"),
    ("nats per token", "policy/entropy", "Entropy"),
    ("share", "policy/clip_fraction", "Clipped actions"),
    ("loss", "loss/preference", "Preference loss"),
    ("share", "pair/accuracy", "Accuracy of the implicit reward"),
    ("reward", "pair/margin", "Margin of the implicit reward"),
    ("nats per completion", "logp/chosen", "Log-probability of the preferred"),
    ("nats per completion", "logp/rejected", "Log-probability of the other"),
    ("reward", "path/error", "Error of the paths"),
    ("nats per token", "policy/log_ratio", "Log-ratio to the reference, of the data"),
    ("reward", "q/error", "Error of Q"),
    ("reward", "q/taken", "Q of the data"),
    ("reward", "value/advantage", "Advantage of the data"),
    ("tokens", "completions/mean_length", "Length"),
)


def policy_optimisation_section(
    folder: RunFolder, gold_name: str, stage: str = "ppo", *, ahead: bool = False
) -> Section:
    """A method's curves and, where there is a gold score beside its reward, the one against the other along it."""
    metrics = folder.metrics(stage)
    step = [m["step"] for m in metrics]
    panels = [
        Panel(label.format(gold=gold_name), {"": (step, [m[name] for m in metrics])}, title=title)
        for label, name, title in PANELS
        if name in metrics[0]
    ]
    panels += guards.panels(metrics)
    curves = plot_panels(_figures(folder) / f"{stage}.png", panels)
    figures = [(curves, f"{stage}, a point a step")]
    if "gold" in metrics[0]:
        text = verdict(metrics, gold_name)
    elif "objective/score" in metrics[0]:
        scores = [m["objective/score"] for m in metrics]
        part = max(1, len(scores) // GROUPS)
        text = f"The reward went from {np.mean(scores[:part]):.3f} to {np.mean(scores[-part:]):.3f}."
    else:
        text = "Nothing was sampled: it learnt from what had been recorded before."
    if "objective/kl" in metrics[0]:
        if "gold" in metrics[0]:
            figures.append(
                (
                    _overoptimisation(metrics, folder, gold_name, stage),
                    "Reward and gold, in tenths of the run",
                )
            )
        gap = max(m["policy/logp_gap"] for m in metrics)
        text += (
            f" The largest gap between a log-probability kept while decoding and that of the training forward: "
            f"{gap:.1e}{', parameters one update old against those of now' if ahead else ''}."
        )
    return Section("Policy optimisation", text + guards.told(metrics), figures=figures)


def _overoptimisation(
    metrics: Sequence[dict[str, float]], folder: RunFolder, gold_name: str, stage: str
) -> Path:
    groups = np.array_split(np.arange(len(metrics)), min(GROUPS, len(metrics)))

    def grouped(name: str) -> list[Interval]:
        return [bootstrap_interval([metrics[i][name] for i in group], 0) for group in groups]

    return plot_overoptimisation(
        _figures(folder) / f"{stage}_reward_and_gold.png",
        [float(np.mean([metrics[i]["objective/kl"] for i in group])) for group in groups],
        grouped("objective/score"),
        grouped("gold"),
        learned_label="reward",
        gold_label=gold_name,
    )


def reward_model_section(learned: Learned, measured: dict[str, float], folder: RunFolder) -> Section:
    """Held-out accuracy beside what the label noise allows, and calibration."""
    bins = calibration(learned.probability, learned.outcome)
    accuracy, ceiling = measured["heldout/accuracy"], measured["heldout/accuracy_ceiling"]
    figure = plot_calibration(
        _figures(folder) / "reward_model_calibration.png",
        bins,
        note=f"accuracy {accuracy:.3f} of at most {ceiling:.3f}, calibration error {calibration_error(bins):.3f}",
        event="the first of the pair wins",
    )
    sure = (
        f"The temperature that calibrates it best on these pairs is {measured['heldout/temperature']:.2f} (above 1: it "
        "is too sure)."
    )
    agrees = (
        f"On {len(learned.outcome)} held-out pairs the reward model agrees with {accuracy:.1%} of the labels"
    )
    if learned.people:
        differ = f"; nothing that gives a pair one answer agrees with more than {ceiling:.1%} of them"
        text = f"{agrees}, which people gave{differ if ceiling < 1 else ''}. {sure}"
    else:
        text = (
            f"{agrees}; the best guesser could agree with {ceiling:.1%}, since the labels are drawn with noise. Its "
            f"correlation with the gold score is {measured['heldout/correlation']:.2f}, and within the samples of one "
            f"prompt {measured['heldout/correlation_within_prompt']:.2f}. {sure} The table has its accuracy about "
            "which of two completions the gold scorer prefers, from pairs nearly equal to pairs far apart."
        )
    by_gold = not learned.people and learned.margin.any()
    bins_by_margin = accuracy_by_margin(learned.probability - 0.5, learned.margin) if by_gold else []
    rows = [[f"{b.low:.3f} to {b.high:.3f}", b.count, b.accuracy] for b in bins_by_margin]
    curves = _loss_curves(folder)
    table = Table(["difference in gold score", "pairs", "accuracy"], rows) if rows else None
    return Section(
        "Fine-tuning and reward model", text, table, figures=[(curves, "Losses"), (figure, "Calibration")]
    )


def _loss_curves(folder: RunFolder) -> Path:
    sft, reward = folder.metrics("sft"), folder.metrics("reward_model")

    def curve(rows: list[dict[str, float]], name: str):
        return {"": ([row["step"] for row in rows], [row[name] for row in rows])}

    return plot_panels(
        _figures(folder) / "losses.png",
        [
            Panel("nats per token", curve(sft, "loss/nll"), title="Fine-tuning loss"),
            Panel("nats per pair", curve(reward, "loss/preference"), title="Reward-model loss"),
            Panel("share", curve(reward, "pair/accuracy"), title="Reward-model accuracy, training pairs"),
        ],
    )


def frontier_section(found: Sequence[Policy], folder: RunFolder, gold_name: str) -> Section:
    """Gold against KL."""
    points = [
        EvaluatedPolicy(
            policy.name, policy.group.rsplit("-", 1)[0], float(policy.kl.mean()), policy.interval("gold")
        )
        for policy in found
        if "greedy" not in policy.name
    ]
    figure = plot_gold_against_kl(_figures(folder) / "gold_against_kl.png", points, gold_label=gold_name)
    return Section(
        "What was gained, and its price",
        "Greedy decoding is left out: its KL is that of a point mass and dwarfs the rest.",
        figures=[(figure, f"{gold_name} against KL from the policy that it started from")],
    )


def summarise(found: Sequence[Policy], comparisons: Sequence[Comparison], split: str) -> dict[str, float]:
    """Flat names and numbers for summary.json."""
    numbers = policy_numbers(found) | {
        f"{item.claim}/{name}": float(value)
        for item in comparisons
        for name, value in item.difference._asdict().items()
    }
    return {f"{split}/{name}": value for name, value in numbers.items()}


def policy_numbers(found: Sequence[Policy]) -> dict[str, float]:
    """The means of every policy, gold scores first, and the interval of its gold score."""
    numbers = {f"{policy.name}/gold": float(policy.gold.mean()) for policy in found}
    for policy in found:
        for field in ("reward", "kl", "length", "finished"):
            numbers[f"{policy.name}/{field}"] = float(getattr(policy, field).mean())
        low, high = policy.interval("gold")[1:]
        numbers |= {f"{policy.name}/gold_low": low, f"{policy.name}/gold_high": high}
    return numbers


def _figures(folder: RunFolder) -> Path:
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    return path
