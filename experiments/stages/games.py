"""Learning to play a world in words from games that others played: cloning, and Q-learning over tokens.

Shapes: B games of the data or rows of a batch, N tokens of a row, G games that are evaluated.
"""

import functools
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import Show, run_once, run_stage
from experiments.stages.game_configs import CloneStage, Network, Play, SoftStage, ValueStage
from rlhfjax.algorithms import Algorithm, ilql, make_optimizer, sft, soft_q
from rlhfjax.config import Decoder
from rlhfjax.environments.text import Conversation, Player, TextWorld, converse, render, row_length
from rlhfjax.generation import Sampling, guided
from rlhfjax.mesh import (
    Devices,
    activations,
    check_rows,
    fetch,
    gathered_to_decode,
    init_on,
    kept,
    make_mesh,
    place_rows,
    put,
    whole,
)
from rlhfjax.networks import LanguageModel, decoder
from rlhfjax.ops import discounted_returns
from rlhfjax.recipes import (
    best_games,
    cut_games,
    game_episodes,
    guide_params,
    init_text_values,
    play_games,
    soft_batch,
    text_logp,
    text_soft_q,
    text_values,
    turn_states,
)
from rlhfjax.run_folder import RunFolder

VALUE_METHODS = ("ilql", "monte_carlo", "dqn")
METHODS = ("clone", "best", *VALUE_METHODS, "soft_q")


class Task(NamedTuple):
    """A world, and who played the games in the data."""

    world: TextWorld
    demonstrator: Player
    memory: int | None = None  # turns that the model's attention reaches back over
    piece: int | None = None  # turns of a row that is trained on; None: whole games


class Policy(NamedTuple):
    """A way to play."""

    name: str
    lm: LanguageModel
    params: Any


class Method(NamedTuple):
    """How a stage learns, and what plays by what it has learnt."""

    algorithm: Algorithm
    lm: LanguageModel  # of its policies
    as_batch: Callable[[Any, ilql.Episodes], Any]  # (frozen, episodes) -> the algorithm's batch
    start: Callable[[dict], Any]  # from the clone's params to those that training starts from
    policies: Callable[[Any], list[Policy]]  # of the trained params; the last one is tried out on the way
    column: str  # the loss that is shown
    keeps_clone: bool = False  # whether the batch is made with the clone, which is then `frozen`, else ()


class Outcome(NamedTuple):
    """Games of one policy, [G] each."""

    score: np.ndarray
    success: np.ndarray
    turns: np.ndarray
    greedy_score: np.ndarray  # by the same policy at temperature 0; in the same worlds


def language_model(task: Task, network: Network, mesh: Devices) -> LanguageModel:
    """A decoder over the world's vocabulary that holds its longest game."""
    config = Decoder(
        vocab_size=len(task.world.vocabulary),
        width=network.width,
        layers=network.layers,
        heads=network.heads,
        kv_heads=network.heads,
        head_size=network.width // network.heads,
        mlp_width=network.mlp_width,
        max_positions=row_length(task.world),
    )
    return gathered_to_decode(mesh, decoder(config, place=activations(mesh)))


def collect(task: Task, count: int, folder: RunFolder) -> Conversation:
    """Games of the demonstrator: NumPy, no longer than the longest of them."""

    def compute():
        converses = scripted_games(task.world, task.demonstrator, count, make_mesh(folder.mesh))
        games = fetch(converses(run_key(folder, "data")))
        longest = int(games.mask_BN.sum(axis=1).max())
        games = games._replace(
            **{name: getattr(games, name)[:, :longest] for name in ("token_BN", "mask_BN", "turn_BN")},
            **{name: getattr(games, name)[:, : longest - 1] for name in ("agent_BT", "reward_BT")},
        )
        numbers = {"game/score": games.score_B.mean(), "game/won": games.success_B.mean()}
        rows = [{"game": render(task.world, games, i)} for i in range(min(2, count))]
        return games._asdict(), numbers | {"game/turns": games.turns_B.mean()}, rows

    stored: dict[str, Any] = run_once("data", folder=folder, compute=compute)
    return Conversation(**stored)


def scripted_games(world: TextWorld, one: Player, count: int, mesh: Devices):
    """Compiled games of a scripted player: `key -> Conversation`."""
    place = place_rows(mesh)
    return jax.jit(lambda key: converse(world, one, key, count, place=place))


def course(stage: Any, play: Play) -> tuple[int, int]:
    """(points of the learning curve, updates from one to the next)."""
    per_point = max(1, stage.steps // play.points)
    return max(1, stage.steps // per_point), per_point


def make_updates(method: Method, stage: Any, play: Play, mesh: Devices, key: jax.Array):
    """The updates up to the next point of the curve, compiled: (state, frozen, episodes, number of the first update) ->
    (state, metrics), which donates the state. Every batch is drawn from the rows of `episodes`."""
    place, (_, per_point) = place_rows(mesh), course(stage, play)

    def advance(state: Any, frozen: Any, episodes: ilql.Episodes, first: jax.Array):
        def update(state, key):
            key_batch, key_update = jax.random.split(key)
            index_B = jax.random.randint(key_batch, (stage.batch,), 0, episodes.mask.shape[0])
            batch = method.as_batch(frozen, place(jax.tree.map(lambda x: x[index_B], episodes)))
            return kept(mesh, method.algorithm.update)(state, batch, key_update)

        keys = jax.vmap(functools.partial(jax.random.fold_in, key))(first + jnp.arange(per_point))
        state, metrics = jax.lax.scan(update, state, keys)
        return state, jax.tree.map(jnp.mean, metrics)

    return jax.jit(kept(mesh, advance), donate_argnums=0)


def learn(
    name: str,
    method: Method,
    cloned: dict,
    games: Conversation,
    task: Task,
    stage: Any,
    play: Play,
    folder: RunFolder,
):
    """Trains by `method` from the params `cloned` on `games` in the stage `name`; returns the params.

    A step of the stage is as many updates as lie between two points of the curve, one compiled program, then games of
    the last of the method's policies.
    """
    mesh, (points, per_point) = make_mesh(folder.mesh), course(stage, play)
    episodes = jax.tree.map(jnp.asarray, game_episodes(cut_games(games, task.piece) if task.piece else games))
    if mesh.size > 1:  # every device draws rows from all of them
        episodes = jax.jit(lambda x: x, out_shardings=whole(mesh))(episodes)
    frozen = cloned if method.keeps_clone else ()
    advance = make_updates(method, stage, play, mesh, run_key(folder, name))
    games_of, key_play = player(method.lm, task, play.games, mesh), run_key(folder, "play")

    @jax.jit
    def try_out(params):
        played = games_of(params, jnp.float32(1.0), key_play)
        return {
            "game/score": jnp.mean(played.score_B),
            "game/won": jnp.mean(played.success_B, dtype=jnp.float32),
        }

    def step(state, i: int):
        # Waited for, lest two programs of several devices meet, see `run_stage`.
        state, metrics = jax.block_until_ready(advance(state, frozen, episodes, jnp.int32(i * per_point)))
        played = jax.block_until_ready(try_out(method.policies(state.params)[-1].params))
        return state, metrics | played | {"updates": jnp.int32((i + 1) * per_point)}

    columns = {"updates": "updates", method.column: "loss", "game/score": "score", "game/won": "won"}
    state = run_stage(
        name,
        folder=folder,
        init=lambda: init_on(
            mesh, method.algorithm.init, jax.tree.map(jnp.array, put(mesh, method.start(cloned)))
        ),
        step=step,
        steps=points,
        checkpoint_every=1,
        show=Show(columns=columns, every=1),
    )
    return state.params


def player(lm: LanguageModel, task: Task, count: int, mesh: Devices):
    """Compiled games of a language model: `(params, temperature, key) -> Conversation`."""

    @jax.jit
    def play(params, temperature, key):
        sampling, place = Sampling(temperature=temperature), place_rows(mesh)
        return play_games(
            lm, params, task.world, key, count, memory=task.memory, sampling=sampling, place=place
        ).games

    return play


def evaluate(policies: Sequence[Policy], task: Task, play: Play, folder: RunFolder) -> dict[str, Outcome]:
    """Games of every policy, sampled and greedy, in the same worlds; in the stage `evaluation`."""

    def compute():
        key, arrays, numbers, rows = run_key(folder, "evaluation"), {}, {}, []
        mesh = make_mesh(folder.mesh)
        compiled = {id(policy.lm): player(policy.lm, task, play.final_games, mesh) for policy in policies}
        for name, lm, params in policies:
            run = compiled[id(lm)]
            sampled, greedy = (fetch(run(params, jnp.float32(t), key)) for t in (1.0, 0.0))
            parts = (sampled.score_B, sampled.success_B, sampled.turns_B, greedy.score_B)
            arrays |= {f"{name}/{field}": x for field, x in zip(Outcome._fields, parts, strict=True)}
            numbers |= {f"{name}/score": sampled.score_B.mean(), f"{name}/greedy": greedy.score_B.mean()}
            rows.append({"player": name, "game": render(task.world, sampled)})
        return arrays, numbers, rows

    found = run_once("evaluation", folder=folder, compute=compute)
    return {
        name: Outcome(*(found[f"{name}/{field}"] for field in Outcome._fields)) for name, _, _ in policies
    }


def scripted(
    players: Mapping[str, Player], task: Task, play: Play, folder: RunFolder
) -> dict[str, np.ndarray]:
    """Scores of scripted players in the worlds that policies are evaluated in, [G] each."""
    key, mesh = run_key(folder, "evaluation"), make_mesh(folder.mesh)
    return {
        name: fetch(scripted_games(task.world, one, play.final_games, mesh)(key).score_B)
        for name, one in players.items()
    }


# ---- methods


def clone(name: str, lm: LanguageModel, stage: CloneStage, task: Task) -> Method:
    """Behaviour cloning of all that the agent says in the games."""
    states = functools.partial(turn_states, memory=task.memory)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    algorithm = sft.make(text_logp(lm, states=states), optimizer, stage.algorithm)

    def as_batch(frozen: Any, episodes: ilql.Episodes) -> sft.Batch:
        del frozen
        return sft.Batch(episodes.inputs, episodes.mask.astype(jnp.float32))

    return Method(
        algorithm, lm, as_batch, lambda cloned: cloned, lambda params: [Policy(name, lm, params)], "loss/nll"
    )


def values(name: str, lm: LanguageModel, stage: ValueStage, task: Task, key: jax.Array) -> Method:
    """Values of the agent's tokens on a trunk that starts as the clone's; the clone is guided by them."""
    config = stage.algorithm
    of_returns = config.bootstrap == "returns"

    def start(cloned: dict) -> Any:
        return init_text_values(
            key,
            lm,
            cloned,
            heads=1 if of_returns else 2,
            state_value=stage.algorithm.expectile is not None,
            scale=stage.scale,
            bias=stage.bias,
        )

    if of_returns:
        config = replace(config, discount=0.0)  # `returned` has put the returns in the rewards' place
    found = text_values(lm, states=functools.partial(turn_states, memory=task.memory))
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    algorithm = ilql.make(found.evaluate, optimizer, config, **found.target())
    model = guided(lm, trunk=lm, min_p=stage.min_p)

    def as_batch(frozen: Any, episodes: ilql.Episodes) -> ilql.Episodes:
        del frozen
        return episodes._replace(truncated=None) if of_returns else episodes

    def policies(params: dict) -> list[Policy]:
        return [Policy(f"{name}, beta {b:g}", model, guide_params(params, b)) for b in stage.betas]

    return Method(algorithm, model, as_batch, start, policies, "loss/q")


def soft(name: str, lm: LanguageModel, stage: SoftStage, task: Task) -> Method:
    """Soft Q-learning from the clone, which is its reference."""
    states = functools.partial(turn_states, memory=task.memory)
    optimizer = make_optimizer(stage.optimizer, stage.steps)
    algorithm = soft_q.make(text_soft_q(lm, states=states), optimizer, stage.algorithm)
    as_batch = functools.partial(soft_batch, lm, states=states)
    label = f"{name}, beta {stage.algorithm.beta:g}"
    return Method(
        algorithm,
        lm,
        as_batch,
        lambda cloned: cloned,
        lambda params: [Policy(label, lm, params)],
        "loss/total",
        keeps_clone=True,
    )


def make_method(name: str, config: Any, lm: LanguageModel, task: Task, key: jax.Array) -> Method:
    """The method of that name, of `METHODS`, by `config`'s section; `key` is for values."""
    stage = getattr(config, name)
    if name in VALUE_METHODS:
        return values(name, lm, stage, task, key)
    if name == "soft_q":
        return soft(name, lm, stage, task)
    return clone(f"best {config.best_fraction:.0%} cloned" if name == "best" else name, lm, stage, task)


def returned(games: Conversation, discount: float) -> Conversation:
    """The games with the discounted return from each of the agent's tokens on in the place of its reward.

    Made of whole games, it stays true when they are cut into pieces.
    """
    reward_BT = discounted_returns(
        jnp.asarray(games.reward_BT), discount=discount, mask=jnp.asarray(games.agent_BT)
    )
    return games._replace(reward_BT=np.asarray(reward_BT))  # pyright: ignore[reportArgumentType]


def learn_one(
    name: str,
    config: Any,
    lm: LanguageModel,
    cloned: dict,
    task: Task,
    games: Conversation,
    folder: RunFolder,
) -> list[Policy]:
    """Runs the method of that name by `config`'s section, from the params `cloned`; returns its policies."""
    _, key_values = jax.random.split(run_key(folder, "networks"))
    method, stage = make_method(name, config, lm, task, key_values), getattr(config, name)
    if name == "best":
        games = best_games(games, config.best_fraction)
    elif name in VALUE_METHODS and stage.algorithm.bootstrap == "returns":
        games = returned(games, stage.algorithm.discount)
    return method.policies(learn(name, method, cloned, games, task, stage, config.play, folder))


def learn_all(names: Sequence[str], config: Any, task: Task, games: Conversation, folder: RunFolder):
    """Runs the methods in order and returns their policies: those of `config`'s sections of the same names.

    The clone is always trained, since the others start from it.
    """
    lm = language_model(task, config.network, make_mesh(folder.mesh))
    key_clone, _ = jax.random.split(run_key(folder, "networks"))
    (cloned,) = learn_one("clone", config, lm, lm.init(key_clone), task, games, folder)
    policies = [cloned] if "clone" in names else []
    for name in names:
        if name != "clone":
            policies += learn_one(name, config, lm, cloned.params, task, games, folder)
    return policies


def check(config: Any, names: Sequence[str], mesh: Devices) -> None:
    """Raises ValueError for numbers that cannot be, before anything is run."""
    for owner, field in ((config, "games"), *((config.play, x) for x in ("points", "games", "final_games"))):
        if getattr(owner, field) < 1:
            raise ValueError(f"{field} must be at least 1, got {getattr(owner, field)}")
    for flag, count in (
        ("--games", config.games),
        ("--play.games", config.play.games),
        ("--play.final-games", config.play.final_games),
    ):
        check_rows(mesh, count, what=f"set of games ({flag})")
    if not 0 < config.best_fraction <= 1:
        raise ValueError(f"best_fraction={config.best_fraction} must lie in (0, 1]; 1 clones all games")
    if config.network.width % (2 * config.network.heads):
        raise ValueError(
            f"network.width={config.network.width} must be a multiple of twice heads={config.network.heads}"
        )
    for name in dict.fromkeys(("clone", *names)):
        stage = getattr(config, name)
        if stage.steps < 1 or stage.batch < 1:
            raise ValueError(f"{name}: steps={stage.steps} and batch={stage.batch} must be at least 1")
        check_rows(mesh, stage.batch, what=f"batch (--{name.replace('_', '-')}.batch)")
        if name in VALUE_METHODS and not stage.betas:
            raise ValueError(f"{name}.betas names none: no policy would be made of the values")
        optimizer = make_optimizer(stage.optimizer, stage.steps)
        maker = {"clone": sft, "best": sft, "soft_q": soft_q}.get(name, ilql)
        maker.make(lambda params, inputs: inputs, optimizer, stage.algorithm)


def run_key(folder: RunFolder, name: str) -> jax.Array:
    """A key of the run for each use, whatever other stages there are."""
    return jax.random.fold_in(jax.random.key(folder.seed), zlib.crc32(name.encode()) & 0x7FFFFFFF)
