"""Work per device of an iteration of PPO, as the mesh grows: `python experiments/benchmarks/scaling.py [v5e]`.

Compiled for 1, 2, 4 and 8 devices, not run: counts of the compiled program, which no clock has a part in. The devices
are virtual CPUs, computing in float32, or those of an accelerator of `rlhfjax.accelerators`, in bfloat16 over float32
parameters, for which libtpu must be installed.
"""

import dataclasses
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))  # a checkout runs as it lies, from any folder

import jax

from experiments.benchmarks.models import (
    OPTIMIZER,
    OPTIMIZER_STEPS,
    actor_critic_params,
    init,
    language_model,
    random_prompts,
)
from experiments.benchmarks.sizes import Sizes
from experiments.programs import key_shape, row_shapes, state_shapes
from rlhfjax import planner
from rlhfjax.accelerators import lookup
from rlhfjax.algorithms import make_optimizer, ppo
from rlhfjax.config import PPO, Mesh
from rlhfjax.mesh import activations, gathered_to_decode, kept, make_mesh
from rlhfjax.networks import decoder
from rlhfjax.ops import compiling_for
from rlhfjax.recipes import (
    Frozen,
    init_reward_model,
    make_reward_model,
    make_rlhf,
    ppo_batch,
    text_actor_critic,
)
from rlhfjax.report import Table, markdown_table

SIZES = Sizes(prompt_length=64, new_tokens=64, samples=4)  # 4 layers, width 256, 4 heads
VOCABULARY, PROMPTS = 8192, 32
CONFIG = PPO(epochs=2, minibatches=4)
MESHES = {
    "one device": [Mesh(data=1, fsdp=1)],
    "data": [Mesh(data=n, fsdp=1) for n in (2, 4, 8)],
    "fsdp": [Mesh(data=1, fsdp=n) for n in (2, 4, 8)],
    "fsdp x tensor 2": [Mesh(data=1, fsdp=n, tensor=2) for n in (1, 2, 4)],
}


class Work(NamedTuple):
    """Of one iteration, on each device. `learner`: parameters of policy and critic with their optimiser state."""

    devices: int
    flops: float  # matrix products
    learner: int  # bytes
    frozen: int  # bytes
    temporary: int  # bytes
    calls: float  # of collectives
    sent: float  # bytes of collectives, as `planner.Collective` counts them


def targets(name: str = "", counts: Sequence[int] = (1, 2, 4, 8)) -> dict[int, planner.Target]:
    """What to compile for, by the number of devices: those of an accelerator, by default virtual CPUs."""
    if name and not planner.has_tpu_compiler():
        raise ValueError(f"to compile for {name} libtpu must be installed: pip install rlhfjax[tpu]")
    if name:
        return {n: planner.aot_devices(lookup(name), n) for n in counts}
    return {n: planner.Target(jax.devices()[:n], "cpu", f"compiled for {n} virtual CPUs") for n in counts}


def work(
    shape: Mesh,
    target: planner.Target,
    sizes: Sizes = SIZES,
    *,
    prompts: int = PROMPTS,
    vocab_size: int = VOCABULARY,
    config: PPO = CONFIG,
) -> Work:
    """Compiles an iteration on the mesh and counts.

    Raises ValueError where the mesh does not have the target's number of devices, or something cannot be split evenly.
    """
    mesh = make_mesh(shape, target.devices)
    plain = language_model(sizes, vocab_size)
    lm = gathered_to_decode(mesh, decoder(plain.config, place=activations(mesh)))
    evaluate = text_actor_critic(lm)
    algorithm = ppo.make(evaluate, make_optimizer(OPTIMIZER, OPTIMIZER_STEPS), config)
    rlhf = make_rlhf(
        lm,
        algorithm,
        ppo_batch(lm, evaluate),
        reward=make_reward_model(lm),
        samples=sizes.samples,
        max_new_tokens=sizes.new_tokens,
        stop_tokens=(),
    )

    def step(state, frozen, prompts, key):
        state, metrics, _ = rlhf.iterate(state, frozen, prompts, key)
        return state, metrics

    def models() -> Frozen:
        return Frozen(init(plain, 2), init_reward_model(jax.random.key(4), init(plain, 3), sizes.width))

    state = state_shapes(mesh, lambda: algorithm.init(actor_critic_params(plain)))
    frozen = state_shapes(mesh, models)
    batch = row_shapes(mesh, jax.eval_shape(lambda: random_prompts(plain, prompts, sizes.prompt_length)))
    with compiling_for(target.platform):
        program = jax.jit(kept(mesh, step), donate_argnums=0).lower(state, frozen, batch, key_shape(mesh))
        compiled, text = planner.compile_to_read(program, target.platform)
    found = planner.analyse(compiled, text=text)
    return Work(
        mesh.size,
        found.flops,
        planner.bytes_per_device(state),
        planner.bytes_per_device(frozen),
        found.memory.temporary,
        sum(c.calls for c in found.collectives),
        sum(c.bytes * c.calls for c in found.collectives),
    )


def lines(name: str = "") -> Iterator[list[str]]:
    """The cells of each row of the table; a compilation each."""
    by_count = targets(name)
    sizes = dataclasses.replace(SIZES, dtype="bfloat16") if name else SIZES
    alone = None
    for axes, shapes in MESHES.items():
        for shape in shapes:
            target = by_count[shape.data * shape.fsdp * shape.tensor]
            found = work(shape, target, sizes)
            alone = alone or found
            yield [
                axes,
                str(found.devices),
                f"{found.flops / 1e9:.0f}",
                f"{alone.flops / found.flops:.2f}",
                *(f"{x / 2**20:.1f}" for x in (found.learner, found.frozen, found.temporary)),
                f"{found.calls:.0f}",
                f"{found.sent / 2**20:.0f}",
            ]


# Of one device; bytes in MiB.
HEAD = [
    "mesh",
    "devices",
    "GFLOP",
    "split by",
    "learner",
    "frozen",
    "temporary",
    "collectives",
    "their bytes",
]


def main(arguments: Sequence[str]) -> int:
    """Prints the table; returns the exit status."""
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", 8)
    try:
        print(markdown_table(Table(HEAD, list(lines(*arguments[:1])))))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
