"""The mesh: its shape, the rules for every leaf, and where arrays come to lie."""

import dataclasses
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from rlhfjax import mesh as on_mesh
from rlhfjax.algorithms import make_optimizer, sft
from rlhfjax.config import SFT, Decoder, LoRA, Mesh, Optimizer
from rlhfjax.generation import generate, sample_keys
from rlhfjax.networks import decoder, init_lora, init_q_heads, quantise
from rlhfjax.recipes import init_reward_model, packed_logp

SHAPE = Decoder(
    vocab_size=64, width=16, layers=1, heads=4, kv_heads=2, head_size=4, mlp_width=32, max_positions=32
)
RICH = dataclasses.replace(
    SHAPE,
    tie_embeddings=False,
    positions="learned",
    norm="layernorm",
    qk_norm=True,
    post_norms=True,
    attention_bias=True,
    output_bias=True,
    mlp_bias=True,
)

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")


def shapes_of(config: Decoder = SHAPE):
    return jax.eval_shape(decoder(config).init, jax.random.key(0))


def specs(tree, mesh) -> dict[str, tuple]:
    found = jax.tree_util.tree_flatten_with_path(on_mesh.shardings(mesh, tree))[0]
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): tuple(sharding.spec)
        for path, sharding in found
    }


@pytest.mark.parametrize(
    ("asked", "shape"),
    [
        (Mesh(data=4), (4, 1, 1, 1)),
        (Mesh(), (1, 1, 1, 1)),  # a CPU
        (Mesh(fsdp=2, tensor=2), (1, 2, 1, 2)),
        (Mesh(data=2, fsdp=0), (2, 1, 1, 1)),
        (Mesh(data=2, sequence=2), (2, 1, 2, 1)),
    ],
)
def test_axes_are_those_that_are_asked_for(asked, shape):
    mesh = on_mesh.make_mesh(asked)
    assert mesh.axis_names == on_mesh.AXES
    assert tuple(mesh.shape[axis] for axis in on_mesh.AXES) == shape
    assert {kind.name for kind in mesh.axis_types} == {"Auto"}  # on every JAX, whatever its default


def test_an_axis_left_open_takes_what_the_others_leave():
    mesh = on_mesh.make_mesh(Mesh(tensor=2), jax.devices()[:4])
    assert mesh.shape == {"data": 2, "fsdp": 1, "sequence": 1, "tensor": 2}


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        (Mesh(data=8), "asks for 8 devices.*there are 4.*JAX_NUM_CPU_DEVICES=8"),
        (Mesh(tensor=3), "4 devices cannot be laid out as tensor 3 x data.*1 would be idle"),
        (Mesh(tensor=0), "--mesh.tensor 0 must be at least 1"),
        (Mesh(data=-1), "--mesh.data -1 must be at least 0"),
    ],
)
def test_a_mesh_that_cannot_be_is_refused(asked, told):
    with pytest.raises(ValueError, match=told):
        on_mesh.make_mesh(asked, jax.devices())


def accelerators(count: int, slices: int = 1) -> list:
    return [
        SimpleNamespace(
            id=i,
            platform="gpu",
            device_kind="some",
            process_index=i,
            slice_index=i * slices // count,
            memory_stats=lambda: {"bytes_limit": 16e9},
        )
        for i in range(count)
    ]


@pytest.mark.parametrize(("state", "fsdp"), [(1e9, 1), (30e9, 4), (1e12, 8)])
def test_as_few_devices_as_hold_the_state_split_it(state, fsdp):
    size = on_mesh._resolved(Mesh(), accelerators(8), state)
    assert size == (8 // fsdp, fsdp, 1, 1)


def test_only_data_spans_slices():
    devices = accelerators(8, slices=2)
    grid = on_mesh._arranged((4, 1, 1, 2), devices)
    slice_of = np.vectorize(lambda device: device.slice_index)(grid)
    assert (slice_of[:2] == 0).all() and (slice_of[2:] == 1).all()
    with pytest.raises(ValueError, match="--mesh.data 1 must be a multiple of the 2 slices"):
        on_mesh._arranged((1, 8, 1, 1), devices)


EXPECTED = {
    "embedding": ("tensor", "fsdp"),
    "unembedding": ("tensor", "fsdp"),
    "positions": (None, "fsdp"),
    "final_norm/scale": (None,),
    "layer_0/attention_post_norm/bias": (None,),
    "layer_0/attention/query_norm/scale": (None,),
    "layer_0/attention/key/kernel": ("fsdp", "tensor"),
    "layer_0/attention/key/bias": ("tensor",),
    "layer_0/attention/output/kernel": ("tensor", "fsdp"),
    "layer_0/attention/output/bias": (None,),
    "layer_0/mlp/up/kernel": ("fsdp", "tensor"),
    "layer_0/mlp/down/kernel": ("tensor", "fsdp"),
}


def test_every_parameter_of_a_decoder_has_a_rule():
    mesh = on_mesh.make_mesh(Mesh(fsdp=2, tensor=2))
    found = specs(shapes_of(RICH), mesh)
    assert EXPECTED.items() <= found.items()


def test_adapters_heads_and_quantised_kernels_have_rules():
    mesh = on_mesh.make_mesh(Mesh(fsdp=2, tensor=2))
    params = jax.jit(decoder(SHAPE).init)(jax.random.key(0))
    tree = {
        "lora": init_lora(jax.random.key(1), params, LoRA(rank=2)),
        "reward": init_reward_model(jax.random.key(2), {}, 16),
        "value": {
            "q": init_q_heads(jax.random.key(3), 16, 64, heads=2),
            "v": init_q_heads(jax.random.key(4), 16, 1, heads=1),
        },
        "int8": quantise(params, 8),
        "nf4": quantise(params, 4, group=8),
    }
    found = specs(tree, mesh)
    query, down = "layer_0/attention/query", "layer_0/mlp/down"
    assert found[f"lora/{query}/lora_a"] == ("fsdp", None)
    assert found[f"lora/{query}/lora_b"] == (None, "tensor")
    assert found[f"lora/{down}/lora_a"] == ("tensor", None)
    assert found[f"lora/{down}/lora_b"] == (None, "fsdp")
    assert found["value/q/outer"] == (None, "tensor", "fsdp")  # heads are stacked in front
    assert found["value/v/outer"] == (None, None, None)
    assert found["reward/head/kernel"] == (None,) and found["reward/gain"] == ()
    assert found[f"int8/{down}/kernel_int8"] == found[f"nf4/{down}/kernel_nf4"] == ("tensor", "fsdp")
    assert found[f"nf4/{query}/kernel_scale"] == (None, "tensor")


@pytest.mark.parametrize("kind", ["adamw", "muon", "adafactor", "schedule_free", "sgd"])
def test_optimiser_state_lies_as_its_parameters_do(kind):
    mesh = on_mesh.make_mesh(Mesh(fsdp=2, tensor=2))
    optimizer = make_optimizer(Optimizer(kind=kind, schedule="constant", warmup_steps=0), 10)
    params = shapes_of(dataclasses.replace(SHAPE, width=128, mlp_width=128))  # so that Adafactor factors
    found = specs(jax.eval_shape(optimizer.init, params), mesh)
    own = specs(params, mesh)
    for path, spec in found.items():
        parameter = next((name for name in own if path.endswith("/" + name)), None)
        if parameter is None:
            assert spec in ((), (None,)), path  # counters, coefficients
        elif kind == "adafactor":
            assert spec in ((), own[parameter]), path  # a factor has fewer axes
        else:
            assert spec == own[parameter], path


def test_what_no_rule_fits_is_named():
    mesh = on_mesh.make_mesh(Mesh(fsdp=2, tensor=2))
    with pytest.raises(ValueError, match=r"no rule says how novel/matrix \[4, 4\] lies"):
        on_mesh.shardings(mesh, {"novel": {"matrix": jnp.zeros((4, 4))}})
    own = (("novel/matrix", ("tensor", None)), *on_mesh.RULES)
    assert on_mesh.shardings(mesh, {"novel": {"matrix": jnp.zeros((4, 4))}}, own)["novel"][
        "matrix"
    ].spec == PartitionSpec("tensor", None)


def test_what_cannot_be_split_evenly_is_named():
    mesh = on_mesh.make_mesh(Mesh(fsdp=2, tensor=2))
    odd = dataclasses.replace(SHAPE, vocab_size=63)
    with pytest.raises(
        ValueError, match=r"embedding \[63, 16\], axis of 63, cannot be split evenly over tensor 2"
    ):
        on_mesh.shardings(mesh, shapes_of(odd))
    with pytest.raises(ValueError, match=r"a batch of 3 rows cannot be split over 2 devices \(fsdp 2\)"):
        on_mesh.put_rows(mesh, {"token_BT": jnp.zeros((3, 5))})
    four = on_mesh.make_mesh(Mesh(fsdp=1, tensor=4))
    lm = decoder(SHAPE, place=on_mesh.activations(four))  # two key-value heads for four devices
    token = jnp.zeros((1, 5), jnp.int32)
    with pytest.raises(ValueError, match="axis N of an activation.*over tensor 4"):
        jax.eval_shape(
            lambda p: lm.apply(p, token, position_BT=token, mask_BTS=jnp.ones((1, 5, 5), bool)), shapes_of()
        )


def test_states_are_made_where_they_belong_and_batches_cut_by_rows():
    mesh = on_mesh.make_mesh(Mesh(data=1, fsdp=2, tensor=2))
    lm = decoder(SHAPE)
    algorithm = sft.make(packed_logp(lm), make_optimizer(Optimizer(kind="adamw", warmup_steps=0), 10), SFT())
    params = on_mesh.init_on(mesh, lm.init, jax.random.key(0))
    state = on_mesh.init_on(mesh, algorithm.init, params)
    kernel = state.params["layer_0"]["mlp"]["up"]["kernel"]
    assert kernel.addressable_shards[0].data.shape == (8, 16)
    moments = [x for x in jax.tree.leaves(state.opt_state) if x.shape == (16, 32)]
    assert len(moments) == 4 and all(x.addressable_shards[0].data.shape == (8, 16) for x in moments)
    expected = jax.jit(lm.init)(jax.random.key(0))
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), jax.device_get(expected))

    key = jax.random.split(jax.random.key(1), 4)
    batch = {"token_BT": np.arange(12).reshape(4, 3), "key_B": key, "share": np.float32(0.5)}
    placed = on_mesh.put_rows(mesh, batch)
    assert placed["token_BT"].addressable_shards[0].data.shape == (2, 3)
    assert placed["share"].sharding.is_fully_replicated
    np.testing.assert_array_equal(jax.random.key_data(placed["key_B"]), jax.random.key_data(key))
    np.testing.assert_array_equal(on_mesh.fetch(placed["token_BT"]), batch["token_BT"])
    again = on_mesh.put(mesh, {"token_BT": placed["token_BT"]})  # by the name of the leaf
    assert again["token_BT"].sharding.is_equivalent_to(placed["token_BT"].sharding, 2)


def test_rows_of_a_process_and_back():
    mesh = on_mesh.make_mesh(Mesh(data=4))
    x: Any = on_mesh.put_rows(mesh, np.arange(8.0, dtype=np.float32).reshape(8, 1))
    own, number = on_mesh.own_rows(x)
    np.testing.assert_array_equal(number, np.arange(8))
    back = on_mesh.from_own_rows(mesh, own, 8)
    assert back.sharding.is_equivalent_to(x.sharding, 2)
    np.testing.assert_array_equal(back, x)


def test_one_device_costs_nothing():
    mesh = on_mesh.make_mesh(Mesh())
    tree = {"anything": jnp.zeros((3, 5))}
    assert on_mesh.put(mesh, tree) is tree and on_mesh.put_rows(mesh, tree) is tree
    assert on_mesh.place_params(mesh) is None
    update = lambda state: (state,)  # noqa: E731
    assert on_mesh.kept(mesh, update) is update
    assert on_mesh.activations(mesh) is None  # and products are of flat matrices, which a CPU wants


def decoding(gather: bool) -> str:
    mesh = on_mesh.make_mesh(Mesh(data=1, fsdp=4))
    lm = decoder(SHAPE, place=on_mesh.activations(mesh))
    lm = on_mesh.gathered_to_decode(mesh, lm) if gather else lm

    def run(params, token_BP, mask_BP):
        keys = sample_keys(jax.random.key(0), jnp.arange(4), 1)
        return generate(lm, params, token_BP, mask_BP, keys, max_new_tokens=4, stop_tokens=(1,))

    params = on_mesh.put(mesh, jax.jit(decoder(SHAPE).init)(jax.random.key(0)))
    batch = on_mesh.put_rows(mesh, (jnp.ones((4, 3), jnp.int32), jnp.ones((4, 3), bool)))
    return jax.jit(run).lower(params, *batch).compile().as_text() or ""


def test_parameters_are_gathered_once_before_they_decode():
    matrices = sum(x.ndim == 2 for x in jax.tree.leaves(shapes_of()))
    assert decoding(gather=True).count(" all-gather(") == matrices
    assert decoding(gather=False).count(" all-gather(") > matrices  # the prompt's, and those of the loop
