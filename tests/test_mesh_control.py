"""Control, tables and games on a mesh of four devices: the numbers of one device, and the work split, not repeated."""

import dataclasses
import re
from functools import cache

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.stages import control
from experiments.stages.control_layout import Layout, lay_out
from rlhfjax import mesh as on_mesh
from rlhfjax.config import (
    DQN,
    MLP,
    PPO,
    PQN,
    ControlDQN,
    ControlPPO,
    ControlPQN,
    ControlTabular,
    Decoder,
    Mesh,
    Optimizer,
)
from rlhfjax.environments import cart_pole, frozen_lake, play
from rlhfjax.environments.text import converse, maze_player, maze_world, row_length
from rlhfjax.networks import decoder
from rlhfjax.recipes import play_games
from rlhfjax.recipes.control import train

ENV = cart_pole(limit=12)  # episodes end in both ways
WIDTH, WORLDS, STEPS, MINIBATCH, REPLAYED = 13, 8, 12, 48, 24
SHARED = {
    "environment_steps": 960,
    "worlds": WORLDS,
    "steps": STEPS,
    "network": MLP(hidden=(WIDTH,), activation="tanh"),
    # Adam hardly moves, so that its moments hold the gradients: what it makes of rounding in those is not compared.
    "optimizer": Optimizer(learning_rate=1e-6, b1=0.5, max_grad_norm=None),
}
CONFIGS = {
    "ppo": ControlPPO(
        **SHARED, algorithm=PPO(kl_coefficient=0.0, entropy_coefficient=0.01, epochs=1, minibatches=2)
    ),
    "pqn": ControlPQN(**SHARED, algorithm=PQN(epochs=1, minibatches=2)),
    "dqn": ControlDQN(
        **SHARED,
        updates=2,
        batch=REPLAYED,
        capacity=WORLDS * 16,
        learning_starts=WORLDS * STEPS,
        n_step=3,
        prioritised=True,
        algorithm=DQN(bootstrap="double", period=3),
    ),
}
# Rows of the hidden layer that no device may have: those of all worlds in acting, and all that are learnt from.
WHOLE_ROWS = {"ppo": {WORLDS, WORLDS * STEPS}, "pqn": {WORLDS, WORLDS * STEPS}, "dqn": {WORLDS, REPLAYED}}
LEARNT_ROWS = {"ppo": MINIBATCH, "pqn": MINIBATCH, "dqn": REPLAYED}
MESHES = {
    "data": Mesh(data=4, fsdp=1),
    "data_fsdp": Mesh(data=2, fsdp=2),
    "fsdp_tensor": Mesh(data=1, fsdp=2, tensor=2),
    "data_sequence": Mesh(data=2, fsdp=1, sequence=2),
}

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def two_iterations(iterate, run):
    for i in range(2):
        run, metrics = jax.block_until_ready(iterate(run, jax.random.key(i)))
    return on_mesh.fetch((run, metrics))


@cache
def on_one(name):
    training = control.TRAININGS[name](ENV, CONFIGS[name])
    return two_iterations(jax.jit(training.iterate), jax.jit(training.init)(jax.random.key(7)))


def hidden_rows(compiled) -> set[int]:
    """The numbers of rows that hidden layers have on each device."""
    shapes = re.findall(r"f32\[([\d,]+)\]", compiled.as_text() or "")
    sizes = [tuple(map(int, shape.split(","))) for shape in shapes]
    return {int(np.prod(size[:-1])) for size in sizes if size[-1] == WIDTH}


def all_close(found, expected, rtol=1e-3, atol=1e-5):
    """Keys, integers and flags to the bit."""

    def plain(x):
        return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x

    chex.assert_trees_all_close(
        jax.tree.map(plain, found), jax.tree.map(plain, expected), rtol=rtol, atol=atol
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "shape"),
    [(name, shape) for name in CONFIGS for shape in MESHES],
)
def test_worlds_of_a_run_are_split(name, shape):
    mesh = on_mesh.make_mesh(MESHES[shape])
    parts = on_mesh.row_parts(mesh)
    training = control.TRAININGS[name](ENV, CONFIGS[name], mesh=mesh)
    run = jax.jit(training.init)(jax.random.key(7))
    compiled = jax.jit(training.iterate).lower(run, jax.random.key(0)).compile()
    # The compiled program takes its own result, so that nothing is compiled again.
    all_close(two_iterations(compiled, run), on_one(name))
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(run.worlds)} == {
        WORLDS // parts
    }
    assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves((run.learner, run.replay)))
    rows = hidden_rows(compiled)
    assert LEARNT_ROWS[name] // parts in rows and WORLDS // parts in rows
    assert not rows & WHOLE_ROWS[name]


@pytest.mark.parametrize(
    "name", ["tabular", *(pytest.param(name, marks=pytest.mark.slow) for name in CONFIGS)]
)
def test_seeds_are_split_and_have_nothing_to_tell_each_other(name):
    mesh = on_mesh.make_mesh(MESHES["data_fsdp"])
    env = frozen_lake() if name == "tabular" else ENV
    config = CONFIGS.get(name, ControlTabular(environment_steps=640, worlds=4, steps=8))
    training = control.TRAININGS[name](env, config)
    keys = jax.random.split(jax.random.key(3), 4)

    def run_on(layout):
        def advance(runs, first):
            runs, metrics = jax.vmap(lambda key, run: train(training, key, 2, run=run, first=first))(
                keys, runs
            )
            return layout.laid(runs), metrics

        init = jax.jit(lambda: layout.laid(jax.vmap(lambda key: train(training, key, 0)[0])(keys)))
        runs = init()
        compiled = jax.jit(advance).lower(runs, jnp.int32(0)).compile()
        half, _ = jax.block_until_ready(compiled(runs, jnp.int32(0)))
        return jax.block_until_ready(compiled(half, jnp.int32(2))), compiled

    (runs, metrics), compiled = run_on(Layout(mesh, 0))
    expected, _ = run_on(Layout(on_mesh.make_mesh(), 0))
    all_close(on_mesh.fetch((runs, metrics)), on_mesh.fetch(expected))
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in jax.tree.leaves(runs)} == {1}
    text = compiled.as_text() or ""
    assert not re.search(r"all-reduce|all-gather|all-to-all|collective-permute", text)


@dataclasses.dataclass
class Evaluated:
    """The settings that an experiment lays its methods out by."""

    seeds: int = 3
    episodes: int = 8
    final_episodes: int = 8


def test_seeds_are_split_where_they_can_be_else_worlds_else_it_is_told(capsys):
    mesh = on_mesh.make_mesh(MESHES["data_fsdp"])
    assert lay_out(mesh, "ppo", Evaluated(seeds=8), CONFIGS["ppo"]).axis == 0
    assert lay_out(mesh, "ppo", Evaluated(), CONFIGS["ppo"]) == Layout(mesh, 1)
    assert lay_out(mesh, "ppo", Evaluated(seeds=6), CONFIGS["ppo"]).axis == 1
    with pytest.raises(ValueError, match="neither --seeds 3 nor --ppo.worlds 6 can be split over 4 devices"):
        lay_out(mesh, "ppo", Evaluated(), dataclasses.replace(CONFIGS["ppo"], worlds=6))
    with pytest.raises(ValueError, match=r"set of worlds to evaluate in \(--final-episodes\) of 6 rows"):
        lay_out(mesh, "ppo", Evaluated(final_episodes=6), CONFIGS["ppo"])
    assert capsys.readouterr().out == ""
    alone = lay_out(mesh, "sarsa", Evaluated(), ControlTabular(worlds=8))
    assert alone.axis is None and alone.mesh.size == 1
    assert "note: sarsa: --seeds 3 cannot be split over 4 devices" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("ppo", {"worlds": 6}, "a set of worlds of 6 rows cannot be split over 4 devices"),
        ("pqn", {"worlds": 4, "steps": 3}, "minibatch or microbatch of it, of 6 rows cannot be split"),
        ("dqn", {"batch": 22}, "of 22 rows cannot be split over 4 devices"),
    ],
)
def test_what_cannot_be_split_is_told_by_the_recipe(name, change, words):
    mesh = on_mesh.make_mesh(MESHES["data"])
    with pytest.raises(ValueError, match=words):
        control.TRAININGS[name](ENV, dataclasses.replace(CONFIGS[name], **change), mesh=mesh)


def test_whole_episodes_are_the_same_on_a_mesh():
    mesh = on_mesh.make_mesh(MESHES["data_fsdp"])

    def act(observation, key):
        return (jax.random.uniform(key, observation.shape[:1]) < 0.5).astype(jnp.int32), ()

    def episodes(place):
        return jax.jit(lambda key: play(ENV, act, key, count=16, most_steps=20, place=place))

    found = jax.block_until_ready(episodes(on_mesh.place_rows(mesh))(jax.random.key(0)))
    expected = episodes(on_mesh.place_rows(None))(jax.random.key(0))
    assert {leaf.sharding.shard_shape(leaf.shape) for leaf in found} == {(4,)}
    all_close(on_mesh.fetch(found), on_mesh.fetch(expected))
    with pytest.raises(ValueError, match="a set of worlds of 6 rows cannot be split over 4 devices"):
        play(ENV, act, jax.random.key(0), count=6, most_steps=2, place=on_mesh.place_rows(mesh))


def test_numbers_of_many_runs_lie_whole_and_their_parameters_as_those_of_one():
    mesh = on_mesh.make_mesh(MESHES["data_fsdp"])
    runs = {"step": np.zeros(4), "head": {"bias": np.zeros(4)}, "output": {"kernel": np.zeros((4, 6, 8))}}
    where = on_mesh.shardings(mesh, runs)
    assert where["step"].is_fully_replicated and where["head"]["bias"].is_fully_replicated
    assert where["output"]["kernel"].shard_shape((4, 6, 8)) == (4, 6, 4)


LAYOUT = ("####", "# G#", "#  #", "####")
MAZE = maze_world(LAYOUT, turns=3)


def test_games_of_scripted_players_are_the_same_on_a_mesh():
    mesh = on_mesh.make_mesh(MESHES["data_fsdp"])
    player = maze_player(MAZE, random=0.5)

    def games(place):
        return jax.jit(lambda key: converse(MAZE, player, key, 8, place=place))

    compiled = games(on_mesh.place_rows(mesh)).lower(jax.random.key(0)).compile()
    found = jax.block_until_ready(compiled(jax.random.key(0)))
    expected = games(on_mesh.place_rows(None))(jax.random.key(0))
    assert {leaf.sharding.shard_shape(leaf.shape)[0] for leaf in found} == {2}
    all_close(on_mesh.fetch(found), on_mesh.fetch(expected))
    text, columns = compiled.as_text() or "", row_length(MAZE)
    assert f"s32[2,{columns}]" in text and f"s32[8,{columns}]" not in text


@pytest.mark.parametrize("shape", ["data_fsdp", pytest.param("data", marks=pytest.mark.slow)])
def test_games_of_a_language_model_are_the_same_on_a_mesh(shape):
    mesh = on_mesh.make_mesh(MESHES[shape])
    columns = row_length(MAZE)
    config = Decoder(
        vocab_size=len(MAZE.vocabulary),
        width=16,
        layers=1,
        heads=2,
        kv_heads=2,
        head_size=8,
        mlp_width=20,
        max_positions=columns,
        embedding_stddev=0.5,
    )
    params = jax.jit(decoder(config).init)(jax.random.key(1))

    def played(lm, place):
        return jax.jit(lambda params, key: play_games(lm, params, MAZE, key, 12, memory=2, place=place))

    lm = on_mesh.gathered_to_decode(mesh, decoder(config, place=on_mesh.activations(mesh)))
    laid = on_mesh.put(mesh, params)
    compiled = played(lm, on_mesh.place_rows(mesh)).lower(laid, jax.random.key(2)).compile()
    found = on_mesh.fetch(jax.block_until_ready(compiled(laid, jax.random.key(2))))
    expected = on_mesh.fetch(played(decoder(config), on_mesh.place_rows(None))(params, jax.random.key(2)))
    assert np.unique(expected.games.token_BN, axis=0).shape[0] > 4  # they say different things
    all_close(found, expected, rtol=1e-4, atol=1e-5)
    text = compiled.as_text() or ""
    for kind in ("f32", "s32"):
        assert f"{kind}[3,{columns}]" in text and f"{kind}[12,{columns}]" not in text
    assert re.search(r"f32\[3,(1,)?20\]", text) and not re.search(r"f32\[12,(1,)?20\]", text)
