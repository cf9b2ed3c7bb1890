"""Every method against the exact answer, on a language model of which every sequence can be listed.

It prints, and writes to report.md, how far each method ends from pi* = ref exp(reward / beta) / Z and, where theory
gives it another fixed point, from that one, and the value that it gives the start from beta log Z; the mean gradient
of every advantage and KL estimator beside the true one; the law of DPO's error in the number of judgements; and how
DPO overfits too few of them.
"""

from dataclasses import dataclass, field

from rlhfjax.config import Decoder, Enumerable

DESCRIPTION = "every method against the exact optimum of a model that can be enumerated"


@dataclass(frozen=True)
class Config:
    model: Enumerable = field(default_factory=Enumerable)
    """The language model of the tables of methods."""
    transformer: Decoder = field(
        default_factory=lambda: Decoder(
            vocab_size=8, width=64, layers=1, heads=4, kv_heads=4, head_size=16, mlp_width=256, max_positions=8,
            embedding_stddev=0.1, positions="learned",
        )
    )  # fmt: skip
    """The policy that is no table. Its vocabulary must be the model's. With rotary positions alone, attention over
    equal tokens gives the same mean however many they are: prefixes 0 and 0 0 could not be told apart."""
    betas: tuple[float, ...] = (0.5, 1.0)
    """Reward per nat of KL: each method is run at each of them."""
    steps: int = 1500
    """Updates of a method that samples."""
    prompts: int = 128
    """Groups of samples of an update."""
    samples: int = 8
    """Samples of a group."""
    learning_rate: float = 0.1
    """Peak step size for a table, falling to 0."""
    transformer_steps: int = 1500
    """Updates of a method that samples, for the transformer."""
    transformer_learning_rate: float = 3e-3
    """Peak step size for the transformer, falling to 0."""
    pairs: int = 16_384
    """Pairs with exact labels for DPO, cDPO and IPO."""
    pair_steps: int = 2000
    """Updates of a method on pairs, on all of them."""
    label_smoothing: float = 0.1
    """Of cDPO."""
    judged: Enumerable = field(default_factory=lambda: Enumerable(vocab_size=4, length=3))
    """The smaller language model whose pairs are judged with noise."""
    judgements: tuple[int, ...] = (1, 4, 16, 64)
    """Of each of its pairs."""
    judged_steps: int = 1000
    """Updates of DPO on them."""
    repetitions: int = 16
    """Independent sets of judgements, of which the error is the mean."""
    few: int = 128
    """Pairs, judged once each, that DPO is to overfit."""
    few_learning_rate: float = 0.01
    """Peak step size for them: small, so that the turn is seen."""


def plan(config: Config, mesh) -> list:
    """The runs of all methods, as shapes: on every device the same."""
    import jax
    import jax.numpy as jnp

    from experiments.programs import Program, whole_shapes
    from experiments.stages import referees

    _check(config)
    return [
        Program(
            stage=name,
            name="a whole run",
            function=trial.train,
            arguments=(whole_shapes(mesh, jax.ShapeDtypeStruct((len(trial.betas),), jnp.float32)),),
            runs=1,
            uncounted="the exact answers, the estimators, judgements and the overfit",
        )
        for name, trial in referees.trials(config, jax.random.key(0), None).items()
    ]


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    import jax

    from experiments.loop import run_once
    from experiments.stages import hard_labels, referees
    from rlhfjax.report import markdown_table, write_report

    _check(config)
    key = jax.random.key(folder.seed)
    rows, summary = [], {}
    for name, trial in referees.trials(config, key, folder.max_steps).items():
        found = run_once(name, folder=folder, compute=trial.compute)
        rows += referees.method_rows(trial, found)
        summary |= {
            f"{name}/{measure}": float(found[measure].max())
            for measure in ("total_variation", "gap", "to_own", "value_error")
            if measure in found
        }
    estimates = run_once("estimators", folder=folder, compute=referees.estimator_tables)
    noise = run_once(
        "judgements", folder=folder, compute=lambda: hard_labels.judgements(config, key, folder.max_steps)
    )
    overfit = run_once(
        "overfit", folder=folder, compute=lambda: hard_labels.overfit(config, key, folder.max_steps)
    )
    sections = referees.sections(config, rows, estimates, noise, overfit)
    for section in sections:
        print(f"\n{section.title}\n\n{markdown_table(section.table)}" if section.table else section.title)
    write_report(folder.path, f"The referee, seed {folder.seed}", sections)
    summary["dpo/error_exponent"] = float(noise["exponent"])
    return summary | {f"overfit/{name}": float(overfit[name]) for name in overfit if overfit[name].ndim == 0}


def _check(config: Config) -> None:
    if config.transformer.vocab_size != config.model.vocab_size:
        raise ValueError(
            f"transformer.vocab_size ({config.transformer.vocab_size}) must be model.vocab_size "
            f"({config.model.vocab_size}): the policy's tokens are the model's"
        )
