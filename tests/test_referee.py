"""The referee's own answers against independent ones, short runs to them, and (slow) the whole table's thresholds."""

import json
import re
from functools import cache, partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments import referee, run
from experiments.stages import enumerated, hard_labels, referees
from experiments.stages.enumerated import Labelled
from rlhfjax.algorithms import dpo, grpo, make_optimizer, ppo
from rlhfjax.config import DPO, Decoder, Enumerable, Optimizer
from rlhfjax.environments import enumerable
from rlhfjax.networks import Branches
from rlhfjax.recipes.text import text_actor_critic

MODEL = Enumerable(vocab_size=3, length=2)


@pytest.fixture(scope="module")
def world():
    return enumerated.tabular_world(MODEL, jax.random.key(1))


def slope(loss, x, step=1e-6):
    return np.array([(loss(x + step * e) - loss(x - step * e)) / (2 * step) for e in np.eye(x.size)])


def log_sigmoid(x):
    return -np.log1p(np.exp(-x))


# ---- fixed points


def test_exact_labels_lead_dpo_to_the_optimum(world):
    pairs = enumerated.all_pairs(world)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=0.3)
    np.testing.assert_allclose(enumerated.sigmoid_optimum(world, pairs, beta=0.3), best, atol=1e-10)


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_no_slope_is_left_at_the_optimum_of_the_smoothed_loss(smoothing, world):
    """The loss of cDPO written out, in log-ratios; any labels."""
    beta, rng = 0.4, np.random.default_rng(0)
    first, second = np.triu_indices(9, 1)
    pairs = Labelled(first, second, rng.uniform(0.1, 0.9, first.size))
    logp = enumerated.sigmoid_optimum(world, pairs, beta=beta, smoothing=smoothing)

    def loss(log_ratio):
        h = beta * (log_ratio[first] - log_ratio[second])
        right = (1 - smoothing) * log_sigmoid(h) + smoothing * log_sigmoid(-h)
        wrong = (1 - smoothing) * log_sigmoid(-h) + smoothing * log_sigmoid(h)
        return -np.sum(pairs.label_K * right + (1 - pairs.label_K) * wrong)

    np.testing.assert_allclose(slope(loss, logp - world.logp_ref_N), 0, atol=1e-7)
    assert abs(np.exp(logp).sum() - 1) < 1e-12


def test_in_a_chain_of_pairs_each_has_the_log_ratio_of_its_smoothed_label(world):
    """sigmoid(beta h) = (1 - e) p + e (1 - p): in a tree no pair contradicts another."""
    chain = Labelled(np.arange(8), np.arange(1, 9), np.linspace(0.05, 0.95, 8))
    logp = enumerated.sigmoid_optimum(world, chain, beta=0.5, smoothing=0.1)
    h = -np.diff(logp - world.logp_ref_N)
    wanted = 0.9 * chain.label_K + 0.1 * (1 - chain.label_K)
    np.testing.assert_allclose(1 / (1 + np.exp(-0.5 * h)), wanted, rtol=1e-9)


def test_ipo_ends_at_its_closed_form(world):
    """ref exp(mean over y' of P(y preferred to y') / beta) / Z, with y' even over all sequences, y itself included."""
    difference = world.reward_N[:, None] - world.reward_N[None, :]
    wins = (1 / (1 + np.exp(-difference))).mean(axis=1)
    tilted = np.exp(world.logp_ref_N) * np.exp(wins / 0.2)
    found = enumerated.ipo_optimum(world, enumerated.all_pairs(world), beta=0.2)
    np.testing.assert_allclose(np.exp(found), tilted / tilted.sum(), rtol=1e-9)


def test_judgements_are_shares_with_the_right_mean(world):
    pairs, rng = enumerated.all_pairs(world), np.random.default_rng(0)
    labels = np.stack([enumerated.judged(pairs, 4, rng).label_K for _ in range(4000)])
    assert set(np.unique(labels)) <= {0, 0.25, 0.5, 0.75, 1}
    np.testing.assert_allclose(labels.mean(axis=0), pairs.label_K, atol=0.025)


# ---- runs


def trained(world, algorithm, as_batch, steps):
    key = jax.random.key(2)
    run = partial(enumerated.train_online, world, algorithm, as_batch, steps=steps, shape=(32, 4))
    return enumerated.policy_logp(world, jax.jit(run)(key))


def adam(steps):
    return make_optimizer(Optimizer(learning_rate=0.1, max_grad_norm=None), steps)


def settings_of(method, **changes):
    settings = {"ppo": referees.PPO_K1} | {name: x for name, (_, x, _) in referees._online(4).items()}
    return referees.replace(settings[method], kl_coefficient=0.5, **changes)


@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo_no_std"])
def test_a_short_run_ends_at_the_optimum(method, world):
    settings, steps = settings_of(method), 300
    algorithm, batch = (ppo, enumerated.ppo_batch) if method == "ppo" else (grpo, enumerated.grpo_batch)
    total = steps * settings.epochs * settings.minibatches
    made = algorithm.make(enumerated.evaluate_with(world), adam(total), settings)
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=0.5)
    assert enumerable.total_variation(world.logp_ref_N, best) > 0.3
    assert enumerable.total_variation(trained(world, made, batch(world), steps), best) < 0.02


def test_dpo_by_its_batch_ends_at_the_optimum_and_its_batch_is_sound(world):
    batch = enumerated.pair_batch(world, enumerated.all_pairs(world))
    dpo.check_pairs(batch)
    made = dpo.make(enumerated.pair_evaluate(world), adam(400), DPO(beta=0.5))
    params, (loss, _) = jax.jit(lambda: enumerated.train_on_pairs(world, made, batch, steps=400))()
    best = enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=0.5)
    assert enumerable.total_variation(enumerated.policy_logp(world, params), best) < 0.001
    assert loss.shape == (400,) and loss[-1] < loss[0]


def test_the_transformer_of_the_table_is_the_one_of_the_text_recipe():
    """Its table, read prefix by prefix, gives each token what `text_actor_critic` gives it in a completion."""
    config = Decoder(
        vocab_size=3, width=8, layers=1, heads=1, kv_heads=1, head_size=8, mlp_width=8, max_positions=8,
        embedding_stddev=1.0, positions="learned",
    )  # fmt: skip
    world = enumerated.transformer_world(MODEL, config, jax.random.key(0))
    params = jax.tree.map(lambda x: x, world.params)
    params["critic"]["head"]["kernel"] = jnp.arange(8.0)
    logp, entropy, value, kl = jax.jit(enumerated.evaluate_with(world))(params, world.every)
    lm = enumerated.decoder(config)
    branches = Branches(
        jnp.zeros((1, 1), jnp.int32),
        jnp.ones((1, 1), bool),
        jnp.asarray(world.every.token)[None],
        jnp.asarray(world.every.mask)[None],
    )
    wanted = jax.jit(text_actor_critic(lm))(params, branches)
    for found, named in zip((logp, entropy, value), ("logp", "entropy", "value"), strict=True):
        np.testing.assert_allclose(found, getattr(wanted, named)[0], atol=1e-5, err_msg=named)
    np.testing.assert_allclose(kl, 0, atol=1e-6)


def test_a_transformer_of_another_vocabulary_is_refused():
    with pytest.raises(ValueError, match=r"transformer.vocab_size \(8\) must be model.vocab_size \(3\)"):
        referee.run(referee.Config(model=MODEL), run.run_folder.RunFolder(None))  # pyright: ignore


def test_the_code_of_the_guide_runs(capsys):
    guide = (Path(__file__).parents[1] / "docs" / "referee.md").read_text()
    exec(re.search(r"```python\n(.*?)```", guide, re.DOTALL)[1], {})  # pyright: ignore[reportOptionalSubscript]
    divergence, best = map(float, capsys.readouterr().out.splitlines()[0].split())
    assert divergence > 0 and np.isfinite(best)


# ---- the whole table


@cache
def trials():
    return referees.trials(referee.Config(), jax.random.key(0), None)


@cache
def worst(trial):
    """Measure -> the worst of all betas, of a trial of the table that the experiment makes with its defaults.

    Each test asks for its own trial only: together they take minutes, which the workers then share.
    """
    _, metrics, _ = trials()[trial].compute()
    return metrics


@pytest.mark.slow
def test_the_experiment_reports_all_trials_and_its_summary_is_what_they_measured(tmp_path):
    assert run.main(["referee", "--max-steps", "2", "--run-dir", str(tmp_path / "run")]) == 0
    report = (tmp_path / "run" / "report.md").read_text()
    for title in ("GRPO without std", "soft Q, one step, uniform data", "DPO on hard labels"):
        assert title in report
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    short = referees.trials(referee.Config(), jax.random.key(0), 2)
    assert {name.split("/")[0] for name in summary} == {*short, "dpo", "overfit"}
    _, measured, _ = short["tabular_ppo"].compute()
    assert {x: summary[f"tabular_ppo/{x}"] for x in measured} == pytest.approx(measured, rel=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize(("policy", "bound"), [("tabular", 0.02), ("transformer", 0.05)])
@pytest.mark.parametrize("method", ["ppo", "rloo", "grpo_no_std"])
def test_on_policy_methods_reach_the_optimum_at_every_beta(policy, method, bound):
    found = worst(f"{policy}_{method}")
    assert found["total_variation"] <= bound
    assert method != "ppo" or found["value_error"] <= 0.01


def test_the_optimum_moves_with_beta():
    world = enumerated.tabular_world(Enumerable(), jax.random.split(jax.random.key(0), 3)[0])
    low, high = referee.Config().betas
    ends = [enumerable.optimal_policy(world.logp_ref_N, world.reward_N, beta=beta) for beta in (low, high)]
    assert enumerable.total_variation(*ends) > 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    "method", ["grpo_no_std_reward", "grpo_no_std_k2", "grpo_no_std_exact", "grpo_no_std_k3"]
)
def test_other_kl_terms_end_at_their_own_fixed_point(method):
    found = worst(f"tabular_{method}")
    assert found["to_own"] <= 0.03 < 0.06 < found["total_variation"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("policy", "method"),
    [
        *(("tabular", name) for name in ("soft_q", "soft_q_whole", "soft_q_mixed", "soft_q_both")),
        ("transformer", "soft_q"),
        ("transformer", "soft_q_both"),
        ("tabular", "soft_q_on_policy"),
        ("transformer", "soft_q_on_policy"),
    ],
)
def test_soft_q_learning_reaches_the_optimum_that_ppo_reaches(policy, method):
    """And its value of the start is beta log Z, as is that of PPO's critic."""
    found = worst(f"{policy}_{method}")
    assert found["total_variation"] <= 1e-3
    assert found["value_error"] <= 1e-3


@pytest.mark.slow
@pytest.mark.parametrize("method", ["ilql", "monte_carlo", "dqn"])
def test_other_values_end_at_their_own_fixed_point(method):
    found = worst(f"tabular_{method}")
    assert found["to_own"] <= 0.03 < 0.2 < found["total_variation"]


@pytest.mark.slow
@pytest.mark.parametrize("method", ["cdpo", "ipo"])
def test_methods_on_pairs_end_at_their_own_fixed_point(method):
    found = worst(f"tabular_{method}")
    assert found["to_own"] <= 0.005 < 0.1 < found["total_variation"]


@pytest.mark.slow
def test_dpo_reaches_the_optimum_on_exact_labels():
    assert worst("tabular_dpo")["total_variation"] <= 0.005


@pytest.mark.slow
def test_dpo_nears_the_optimum_as_the_root_of_the_number_of_hard_labels():
    found, _, _ = hard_labels.judgements(referee.Config(), jax.random.key(0), None)
    assert -0.57 < found["exponent"] < -0.43


@pytest.mark.slow
def test_dpo_overfits_few_labels():
    found, _, _ = hard_labels.overfit(referee.Config(), jax.random.key(0), None)
    assert found["loss_last"] < 0.9 * found["loss_first"]
    assert found["objective_best"] > found["objective_first"] + 0.02
    assert found["objective_last"] < found["objective_first"]
