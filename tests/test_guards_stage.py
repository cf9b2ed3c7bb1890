"""Guards in a running stage: when they act, what is returned, and that a kill at any step costs no bit."""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.loop import Show, run_stage
from experiments.stages import guards, policy
from experiments.stages.chats import Examples
from experiments.stages.configs import GRPOStage, Guards, OnlineDPOStage, PPOStage, RAFTStage
from rlhfjax import run_folder
from rlhfjax.config import GRPO
from rlhfjax.run_folder import read_lines

STEPS = 14


class State(NamedTuple):
    done: jax.Array
    paid: jax.Array  # sum of the coefficients so far: tells with which each step was made
    kl_coefficient: jax.Array


@partial(jax.jit, donate_argnums=0)
def update(state: State):
    """gold is 1 up to step 4 and then falls by 0.1 a step."""
    done = state.done + 1
    metrics = {
        "gold": 1.0 - 0.1 * jnp.maximum(done - 4, 0),
        "objective/kl_coefficient": state.kl_coefficient,
    }
    return State(done, state.paid + state.kl_coefficient, state.kl_coefficient), metrics


class Killed(BaseException):
    pass


def guarded_run(path, config: Guards, *, checkpoint_every=4, kills=(), steps=STEPS, measure=None):
    """A stage under guards, killed in the steps `kills` and run again each time; its last state and logged lines."""
    folder = run_folder.create(path, "experiment: fake\n", experiment="fake", seed=0, exact=True)
    left = list(kills)
    while True:
        guarding = guards.Guarding(config)

        def step(state, i, guarding=guarding):
            if i in left:
                left.remove(i)
                raise Killed
            state, metrics = update(guarding.raise_in(state, i))
            return state, metrics, None

        def scores(i, aux, guarding=guarding):
            return {} if measure is None else measure(guarding, i)

        try:
            state = run_stage(
                "ppo",
                folder=folder,
                init=lambda: State(jnp.int32(0), jnp.zeros(()), jnp.float32(0.0)),
                step=step,
                steps=steps,
                checkpoint_every=checkpoint_every,
                keep=guarding.keep(checkpoint_every),
                nullable=guarding.nullable,
                show=Show(measure=scores),
                watch=guarding.watch,
            )
        except Killed:
            continue
        return state, read_lines(folder.path / "metrics.jsonl"), folder


STOP = Guards(watch=("gold<0.75:stop",), window=1, patience=2)
RAISE = Guards(watch=("gold<0.75:raise",), window=1, patience=2, factor=2.0, least=0.25, most=0.8)


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_stop_ends_the_stage_one_step_later_and_returns_what_held(tmp_path, checkpoint_every):
    """0.7 at step 7, 0.6 at step 8: two in a row, so the stage ends with step 9. It held last at step 6, whose texts
    are those of the policy of 5 updates."""
    state, lines, _ = guarded_run(tmp_path / "held", STOP, checkpoint_every=checkpoint_every)
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["step"] for line in lines if line["guard/gold/acted"]] == [8]
    assert int(state.done) == 5
    last = Guards(watch=STOP.watch, window=1, patience=2, keep="last")
    state, lines, _ = guarded_run(tmp_path / "last", last, checkpoint_every=checkpoint_every)
    assert int(state.done) == 9 and lines[-1]["step"] == 9


def test_a_stop_at_the_last_step_counts(tmp_path):
    state, lines, _ = guarded_run(tmp_path / "run", STOP, steps=8)
    assert lines[-1]["step"] == 8 and int(state.done) == 5


def test_a_guard_that_never_held_returns_the_start(tmp_path):
    config = Guards(watch=("gold<2:stop",), window=2, patience=1)
    state, lines, _ = guarded_run(tmp_path / "run", config)
    assert lines[-1]["step"] == 2 and int(state.done) == 0


@pytest.mark.parametrize("checkpoint_every", [1, 4])
def test_a_raise_acts_two_steps_later_up_to_its_most(tmp_path, checkpoint_every):
    """Acts at steps 8, 10, 12, 14: from 0 to `least`, then twice as much, then `most`."""
    _, lines, _ = guarded_run(tmp_path / "run", RAISE, checkpoint_every=checkpoint_every)
    found = [line["objective/kl_coefficient"] for line in lines]
    np.testing.assert_allclose(found, [0.0] * 9 + [0.25] * 2 + [0.5] * 2 + [0.8], rtol=1e-6)


def test_a_coefficient_beyond_the_most_stays():
    guarding = guards.Guarding(RAISE)
    guarding._raised[3] = 1
    state = State(jnp.int32(0), jnp.zeros(()), jnp.float32(0.9))
    assert guarding.raise_in(state, 3) is state
    assert float(guarding.raise_in(state, 4).kl_coefficient) == np.float32(0.9)


@pytest.mark.parametrize("config", [STOP, RAISE], ids=["stop", "raise"])
@pytest.mark.parametrize("kills", [(3, 7), (6, 7, 8, 9)])
def test_a_kill_costs_no_bit(tmp_path, config, kills):
    whole, lines, _ = guarded_run(tmp_path / "whole", config)
    again, others, folder = guarded_run(tmp_path / "killed", config, kills=kills)
    assert lines == others
    jax.tree.map(np.testing.assert_array_equal, whole, again)


def test_a_stage_that_ended_is_not_continued(tmp_path):
    """Run again, it reads the state that it returned; a later stage's checkpoints are left alone."""
    state, lines, folder = guarded_run(tmp_path / "run", STOP)
    folder.log_metrics("later", 1, {"x": 1.0})

    def never(*_):
        raise AssertionError("no step is to be done")

    guarding = guards.Guarding(STOP)
    again = run_stage(
        "ppo",
        folder=folder,
        init=lambda: State(jnp.int32(0), jnp.zeros(()), jnp.float32(0.0)),
        step=never,
        steps=STEPS,
        watch=guarding.watch,
    )
    jax.tree.map(np.testing.assert_array_equal, state, again)
    assert folder.metrics("later") == [{"stage": "later", "step": 1, "x": 1.0}]
    assert folder.metrics("ppo") == lines


def test_enough_checkpoints_are_kept_to_go_back(tmp_path):
    """With a checkpoint a step, the one of step 5 must outlive those of steps 6 to 9."""
    config = Guards(watch=("gold<0.75:stop",), window=1, patience=5)
    state, lines, folder = guarded_run(tmp_path / "run", config, checkpoint_every=1)
    assert lines[-1]["step"] == 12 and int(state.done) == 5
    kept = sorted(int(x.name) for x in folder.checkpoints("ppo").iterdir())
    assert kept[0] <= 5


def test_a_metric_that_is_not_there_is_named(tmp_path):
    config = Guards(watch=("objective/kl_coeficient>3:warn",))
    with pytest.raises(
        ValueError, match=r"no metric 'objective/kl_coeficient'; did you mean 'objective/kl_coeff"
    ):
        guarded_run(tmp_path / "run", config)


def test_a_warning_is_shown_and_nothing_else_happens(tmp_path, capsys):
    config = Guards(watch=("gold<0.75:warn",), window=1, patience=2)
    state, lines, _ = guarded_run(tmp_path / "run", config)
    assert int(state.done) == STEPS and len(lines) == STEPS
    assert [line["step"] for line in lines if line["guard/gold/acted"]] == [8, 10, 12, 14]
    shown = capsys.readouterr().out
    assert "guard gold<0.75:warn: at step 8 the mean is 0.6, below 0.75 for 2 values" in shown


# ---- functions of texts

EXAMPLES = Examples(["p0", "p1", "p2"], ["r0", "r1", "r2"], [[0], [1], [2]], 0)
FUNCTIONS = """
def vowels(prompts, completions, reference, **_):
    assert [p[1] for p in prompts] == [r[1] for r in reference] == list("220011")
    return [None if text == "-" else sum(x in "aeiou" for x in text) for text in completions]

def broken(prompts, completions, **_):
    raise KeyError("oh")

def short(prompts, completions, **_):
    return [1.0]

def nothing(prompts, completions, **_):
    return [None] * len(completions)

def words(prompts, completions, **_):
    return ["a"] * len(completions)
"""
TEXTS = [["aa", "-"], ["b", "aei"], ["-", "o"]]


@pytest.fixture(scope="module")
def functions(tmp_path_factory) -> str:
    file = tmp_path_factory.mktemp("functions") / "of_texts.py"
    file.write_text(FUNCTIONS)
    return str(file)


def test_a_function_is_scored_every_so_many_steps(functions, tmp_path):
    config = Guards(watch=(f"{functions}:vowels<3:warn",), window=2, patience=1, every=3)
    _, lines, _ = guarded_run(
        tmp_path / "run", config, measure=lambda g, i: g.scores(i, EXAMPLES, [2, 0, 1], TEXTS)
    )
    scored = {line["step"]: line["guard/vowels"] for line in lines}
    assert {step: x for step, x in scored.items() if x is not None} == dict.fromkeys((1, 4, 7, 10, 13), 1.5)
    acted = [line["step"] for line in lines if line[f"guard/{functions}:vowels/acted"]]
    assert acted == [1, 4, 7, 10, 13]


def test_where_a_function_never_applies_there_is_no_value(functions):
    guarding = guards.Guarding(Guards(watch=(f"{functions}:nothing<3:stop",)))
    found = guarding.scores(1, EXAMPLES, [2, 0, 1], TEXTS)
    assert np.isnan(found["guard/nothing"])


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("broken", "a guard's function failed: reward 'guard/broken' raised KeyError: 'oh'"),
        ("short", "gave 1 numbers for 6 completions"),
        ("words", "gave 'a' for sample 0"),
    ],
)
def test_a_function_that_fails_is_named(functions, name, why):
    guarding = guards.Guarding(Guards(watch=(f"{functions}:{name}<3:stop",)))
    with pytest.raises(ValueError) as error:
        guarding.scores(1, EXAMPLES, [2, 0, 1], TEXTS)
    assert why in str(error.value)


# ---- what is refused before anything is trained


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"watch": ("gold<0.1",)}, "must read NAME<BOUND:ACTION"),
        ({"watch": ("no_such_file.py:f<1:warn",)}, "there is no file no_such_file.py"),
        ({"window": 0}, "guards.window=0 must be at least 1"),
        ({"patience": 0}, "guards.patience=0 must be at least 1"),
        ({"every": 0}, "guards.every=0 must be at least 1"),
        ({"factor": 1.0}, "guards.factor=1.0 must be above 1"),
        ({"least": 2.0}, "guards.least=2.0 and guards.most=1.0 in order"),
    ],
)
def test_settings_that_cannot_be_are_refused(changes, why):
    with pytest.raises(ValueError) as error:
        policy.check(PPOStage(guards=Guards(**changes)), 1000)
    assert why in str(error.value)


def test_a_raise_where_nothing_can_be_raised_is_refused():
    up = Guards(watch=("gold<0.1:raise",))
    policy.check(PPOStage(guards=up), 1000)
    policy.check(GRPOStage(guards=up), 1000)
    for stage in (
        RAFTStage(guards=up),
        OnlineDPOStage(guards=up),
        GRPOStage(guards=up, algorithm=GRPO(kl_coefficient=None)),
    ):
        with pytest.raises(ValueError, match="'gold<0.1:raise' cannot raise the KL coefficient"):
            policy.check(stage, 1000)


def test_two_functions_of_one_name_are_refused(functions, tmp_path):
    other = tmp_path / "other.py"
    other.write_text("def vowels(prompts, completions, **_):\n    return [0.0] * len(completions)\n")
    config = Guards(watch=(f"{functions}:vowels<3:warn", f"{other}:vowels<3:warn"))
    with pytest.raises(ValueError, match="two functions of one name"):
        policy.check(PPOStage(guards=config), 1000)


def test_what_the_report_says_of_guards():
    lines = [
        {
            "step": 1,
            "gold": 0.5,
            "guard/gold/mean": 0.5,
            "guard/gold/acted": 0,
            "objective/kl_coefficient": 0.0,
        },
        {
            "step": 2,
            "gold": 0.3,
            "guard/gold/mean": 0.4,
            "guard/gold/acted": 1,
            "objective/kl_coefficient": 0.0,
        },
    ]
    assert guards.told(lines) == (
        " The guard on `gold` acted on the metrics of steps 2; the moving mean went from 0.5 to 0.4."
    )
    own, coefficient = guards.panels(lines)
    assert own.curves == {"a step": ([1, 2], [0.5, 0.3]), "moving mean": ([1, 2], [0.5, 0.4])}
    assert coefficient.title == "KL coefficient"
    assert guards.told([{"step": 1, "gold": 0.5}]) == "" and guards.panels([{"step": 1, "gold": 0.5}]) == []
