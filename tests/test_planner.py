"""The planner: what is read from compiled programs, against what can be counted by hand or by other means."""

import functools
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hlo_texts import KERNELS, LOOP, TPU
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jax.sharding import PartitionSpec as P

from rlhfjax.accelerators import lookup
from rlhfjax.config import Decoder
from rlhfjax.networks import decoder
from rlhfjax.networks.flops import forward_flops
from rlhfjax.planner import (
    Analysis,
    Memory,
    analyse,
    aot_devices,
    bytes_per_device,
    compile_to_read,
    count,
    deepened,
)
from rlhfjax.planner.hlo import arrays, parse, replica_groups

pytestmark = pytest.mark.skipif(jax.device_count() < 4, reason="needs 4 devices")

F32 = jnp.float32


def shape(*dims, dtype=F32, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


@functools.cache
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:4]).reshape(2, 2), ("a", "b"))


def over(*axes) -> NamedSharding:
    return NamedSharding(mesh(), PartitionSpec(*axes))


def compiled(function, *arguments, **options):
    return jax.jit(function, **options).lower(*arguments).compile()


def text_only(text: str):
    """As much of a compiled program as the text of one gives."""
    names = ("argument", "output", "alias", "temp")
    stats = SimpleNamespace(**{f"{name}_size_in_bytes": 0 for name in names})
    return SimpleNamespace(as_text=lambda: text, memory_analysis=lambda: stats)


# Products: counted by hand; by XLA where there are no loops; by the formulas of a decoder.


def scanned(turns: int):
    return lambda x, w: lax.scan(lambda y, _: (jnp.tanh(y @ w), None), x, None, length=turns)[0]


def nested(x, w):
    return lax.scan(lambda y, _: (scanned(5)(y, w), None), x, None, length=3)[0]


@pytest.mark.parametrize(("function", "turns"), [(scanned(1), 1), (scanned(7), 7), (nested, 15)])
def test_products_are_counted_as_often_as_loops_turn(function, turns):
    analysis = analyse(compiled(function, shape(8, 16), shape(16, 16)))
    assert analysis.flops == turns * 2 * 8 * 16 * 16
    assert all(loop.told_by == "program" for loop in analysis.loops)
    assert not analysis.uncounted and not analysis.collectives


def test_products_without_loops_are_those_that_xla_counts():
    program = compiled(lambda x, w: jnp.einsum("bij,bjk->bik", x, w), shape(3, 8, 16), shape(3, 16, 4))
    counted = program.cost_analysis()
    assert counted and analyse(program).flops == counted["flops"] == 2 * 3 * 8 * 16 * 4


CONVOLUTIONS = [
    dict(window_strides=(1, 1), padding="SAME"),
    dict(window_strides=(2, 1), padding=((1, 2), (0, 3))),
    dict(window_strides=(1, 1), padding=((0, 0), (0, 1)), lhs_dilation=(2, 3), rhs_dilation=(1, 2)),
]


@pytest.mark.parametrize("options", CONVOLUTIONS)
def test_convolutions_are_counted_pair_by_pair(options):
    x, kernel = jnp.ones((2, 3, 7, 9)), jnp.ones((4, 3, 2, 3))

    def convolved(x, kernel):
        return lax.conv_general_dilated(x, kernel, **options)

    # With ones for numbers each product adds one to the result.
    assert analyse(compiled(convolved, x, kernel)).flops == 2 * float(jnp.sum(convolved(x, kernel)))


def test_a_product_that_is_split_is_a_part_of_it_on_each_device():
    x, w = shape(8, 16, sharding=over("a", "b")), shape(16, 32, sharding=over("b", None))
    analysis = analyse(compiled(lambda x, w: x @ w, x, w, out_shardings=over("a")))
    assert analysis.flops == 2 * 8 * 16 * 32 / 4
    (sent,) = analysis.collectives
    assert (sent.kind, sent.size, sent.bytes, sent.calls) == ("all-reduce", 2, 4 * 32 * 4, 1)
    assert sorted(map(sorted, sent.groups)) == [[0, 1], [2, 3]]


def test_a_decoders_products_are_those_of_its_formula():
    config = Decoder(
        vocab_size=40, width=16, layers=3, heads=4, kv_heads=2, head_size=8, mlp_width=24, max_positions=16
    )
    lm = decoder(config)
    batch, length = 2, 12

    def forward(params, token_BT):
        position_BT = jnp.broadcast_to(jnp.arange(length), (batch, length))
        mask_BTS = jnp.ones((batch, length, length), bool)
        hidden_BTD, _ = lm.apply(params, token_BT, position_BT=position_BT, mask_BTS=mask_BTS)
        return lm.logits(params, hidden_BTD)

    params = jax.eval_shape(lm.init, jax.random.key(0))
    analysis = analyse(compiled(forward, params, shape(batch, length, dtype=jnp.int32)))
    tokens = batch * length
    expected = forward_flops(config, positions=tokens, pairs=tokens * length, logits=tokens)
    assert analysis.flops == pytest.approx(expected, rel=0.02)  # rotary angles are a product too


# Collectives, of known size.

CASES = {
    "all-reduce": (lambda x: lax.psum(x, "b"), P("a", "b"), P("a"), 4 * 8 * 4),
    "all-gather": (lambda x: lax.all_gather(x, "b", axis=1, tiled=True), P("a", "b"), P("a"), 4 * 16 * 4),
    "reduce-scatter": (
        lambda x: lax.psum_scatter(x, "b", scatter_dimension=1, tiled=True),
        P("a", "b"),
        P("a", "b"),
        4 * 8 * 4,
    ),
    "all-to-all": (lambda x: lax.all_to_all(x, "b", 1, 0, tiled=True), P("a", "b"), P("a", "b"), 4 * 8 * 4),
    "collective-permute": (
        lambda x: lax.ppermute(x, "b", [(0, 1), (1, 0)]),
        P("a", "b"),
        P("a", "b"),
        4 * 8 * 4,
    ),
}


@pytest.mark.parametrize("kind", CASES)
def test_collectives_are_found_with_their_bytes_and_groups(kind):
    function, into, out, size = CASES[kind]
    mapped = jax.shard_map(function, mesh=mesh(), in_specs=into, out_specs=out, check_vma=False)
    analysis = analyse(compiled(mapped, shape(8, 16)))
    (found,) = analysis.collectives
    assert (found.kind, found.bytes, found.calls) == (kind, size, 1)
    pairs = {frozenset(group) for group in found.groups}
    assert pairs == {frozenset({0, 1}), frozenset({2, 3})} and found.size == 2


def test_collectives_in_a_loop_are_counted_as_often_as_it_turns():
    def body(x, _):
        return lax.psum(x, "a") * 0.5 + lax.psum(jnp.sum(x), ("a", "b")), None

    mapped = jax.shard_map(
        lambda x: lax.scan(body, x, None, length=6)[0],
        mesh=mesh(),
        in_specs=P("a", "b"),
        out_specs=P("a", "b"),
        check_vma=False,
    )
    found = analyse(compiled(mapped, shape(8, 16))).collectives
    assert sorted((c.size, c.bytes * c.calls) for c in found) == [(2, 6 * 4 * 8 * 4), (4, 6 * 4)]
    across = next(c for c in found if c.size == 2)
    assert {frozenset(g) for g in across.groups} == {frozenset({0, 2}), frozenset({1, 3})}


@pytest.mark.parametrize(
    ("text", "groups"),
    [
        ("replica_groups={{0,1},{2,3}}", ((0, 1), (2, 3))),
        ("replica_groups={}", ()),
        ("replica_groups=[2,2]<=[4]", ((0, 1), (2, 3))),
        ("replica_groups=[2,2]<=[2,2]T(1,0)", ((0, 2), (1, 3))),
        ("replica_groups=[2,4]<=[2,2,2]T(1,0,2)", ((0, 1, 4, 5), (2, 3, 6, 7))),
        ("replica_groups=mesh['x'=2,'y'=2] {'y'}", ((0, 1), (2, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=2,'y'=2] {'x','y'}", ((0, 1, 2, 3),)),
        ("replica_groups=mesh['x'=4,'y'=2] {'x':(1)2}", ((0, 4), (1, 5), (2, 6), (3, 7))),
        ("replica_groups=mesh['x'=4,'y'=2] {'x':(2)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=([2,2]T(1,0)) {'y'}", ((0, 2), (1, 3))),
        ("replica_groups=mesh['x'=2,'y'=2], device_ids=(0,3,1,2) {'y'}", ((0, 3), (1, 2))),
        ("source_target_pairs={{0,1},{1,0}}", ((0, 1), (1, 0))),
    ],
)
def test_groups_are_read_however_they_are_written(text, groups):
    assert replica_groups(f", channel_id=1, {text}, use_global_device_ids=true") == groups


# Loops.


def decoding(x, w, end, limit):
    """As generation does: up to `limit` turns, and fewer where nothing is left; then as many again."""

    def more(state):
        return (state[0] < limit) & jnp.any(state[1] > 0)

    def again(state):
        return (state[0] < 2 * limit) & jnp.any(state[1] > 1)

    def turn(state):
        return state[0] + 1, jnp.tanh(state[1] @ w)

    state = lax.while_loop(more, turn, (jnp.int32(0), x))
    return lax.while_loop(again, turn, state)


def test_a_loop_that_may_end_early_is_taken_for_its_most_turns():
    program = compiled(
        functools.partial(decoding, limit=10), shape(4, 8), shape(8, 8), shape(dtype=jnp.int32)
    )
    analysis = analyse(program)
    assert [(loop.turns, loop.told_by) for loop in analysis.loops] == [(10, "at most"), (10, "at most")]
    assert analysis.flops == 20 * 2 * 4 * 8 * 8
    fewer = analyse(program, loop_turns={"while": 3})
    assert [loop.told_by for loop in fewer.loops] == ["caller", "caller"]
    assert fewer.flops == 6 * 2 * 4 * 8 * 8


def test_a_loop_whose_end_is_an_argument_takes_the_callers_number():
    def function(x, w, end):
        return lax.while_loop(lambda s: s[0] < end, lambda s: (s[0] + 1, s[1] @ w), (jnp.int32(0), x))[1]

    program = compiled(function, shape(4, 8), shape(8, 8), shape(dtype=jnp.int32))
    unknown = analyse(program)
    assert [(loop.turns, loop.told_by) for loop in unknown.loops] == [(1, "nobody")]
    assert analyse(program, loop_turns={"": 12}).flops == 12 * unknown.flops
    with pytest.raises(
        ValueError, match="'decode' is part of no loop's name that the program leaves open.*while"
    ):
        analyse(program, loop_turns={"decode": 12})
    with pytest.raises(ValueError, match=r"loop_turns\['while'\] = -1 must be 0 or more"):
        analyse(program, loop_turns={"while": -1})


@pytest.mark.parametrize(
    ("first", "step", "compare", "turns"),
    [
        (0, 1, "compare(%i, %end), direction=LT", 10),
        (0, 3, "compare(%i, %end), direction=LT", 4),
        (1, 3, "compare(%i, %end), direction=LE", 4),
        (20, -2, "compare(%i, %end), direction=GT", 5),
        (0, 1, "compare(%end, %i), direction=GT", 10),
        (0, 2, "compare(%i, %end), direction=NE", 5),
        (12, 1, "compare(%i, %end), direction=LT", 0),
    ],
)
def test_turns_are_read_from_the_condition(first, step, compare, turns):
    """Where XLA has not written them down, as on TPU; the loop's bound and step are carried by its state."""
    text = LOOP.replace("@COMPARE@", compare).replace("@FIRST@", str(first)).replace("@STEP@", str(step))
    analysis = analyse(text_only(text))
    assert [(loop.turns, loop.told_by) for loop in analysis.loops] == [(turns, "program")]
    assert analysis.flops == turns * 2 * 4 * 4 * 4
    step_is_no_constant = text.replace("%by = s32[] constant", "%by = s32[] parameter")
    assert analyse(text_only(step_is_no_constant)).loops[0].told_by == "nobody"


def test_the_dearest_branch_counts():
    def function(x, w, small):
        return lax.cond(small, lambda: x @ w, lambda: jnp.tanh(x @ w) @ w @ w)

    analysis = analyse(compiled(function, shape(4, 8), shape(8, 8), shape(dtype=bool)))
    assert analysis.flops == 3 * 2 * 4 * 8 * 8


# Texts as the compilers for TPU and GPU write them.


def test_a_tpus_asynchronous_collectives_are_counted_once():
    gather, reduce = sorted(analyse(text_only(TPU)).collectives)
    assert (gather.kind, gather.bytes, gather.size, gather.calls) == ("all-gather", 128 * 64 * 2, 2, 1)
    assert (reduce.kind, reduce.bytes, reduce.size, reduce.calls) == (
        "all-reduce",
        (8 * 64 + 64 * 32) * 2,
        4,
        1,
    )


def test_what_stays_on_a_tpus_chip_is_no_traffic():
    operations = analyse(text_only(TPU)).operations
    by_name = {operation.name: operation for operation in operations}
    assert by_name["copy-start"].bytes == 8 * 64 * 2  # read; what is written lies on the chip
    assert by_name["step"].flops == 2 * 8 * 64 * 32
    assert by_name["step"].bytes == (64 * 64 + 64 * 32) * 2


def test_products_of_libraries_are_told_or_named():
    analysis = analyse(text_only(KERNELS))
    assert analysis.flops == 2 * 8 * 64 * 32 + 123
    assert analysis.uncounted == {"__cudnn$fmhaSoftmax": 1}


def test_shapes_are_read_with_their_bytes():
    found = arrays(
        "(f32[2,3]{1,0}, bf16[4]{0:T(256)S(1)}, s4[6]{0:E(4)}, s4[6]{0}, pred[5], f8e4m3fn[7], token[], u32[])"
    )
    assert [array.bytes for array in found] == [24, 8, 3, 6, 5, 7, 0, 4]
    assert [array.traffic for array in found][1] == 0
    with pytest.raises(ValueError, match="no text of a compiled program"):
        parse("HloModule jit_f")


# Traffic and memory.


def test_traffic_is_what_is_read_and_written():
    big, row = shape(256, 128), shape(1, 128)
    cases = [
        (lambda x: x + 1, (big,), 2 * 256 * 128 * 4),
        (lambda x, i: lax.dynamic_slice_in_dim(x, i, 4), (big, shape(dtype=jnp.int32)), 2 * 4 * 128 * 4),
    ]
    for function, arguments, expected in cases:
        assert analyse(compiled(function, *arguments)).bytes == pytest.approx(expected, abs=64)
    written = compiled(
        lambda x, r, i: lax.dynamic_update_slice(x, r, (i, 0)),
        big,
        row,
        shape(dtype=jnp.int32),
        donate_argnums=0,
    )
    assert analyse(written).bytes <= 4 * 128 * 4 + 64  # the row, not all 256


def test_peak_is_of_arguments_results_and_what_is_between():
    donated = compiled(lambda x: x + 1, shape(256, 128), donate_argnums=0)
    size = 256 * 128 * 4
    assert analyse(donated).memory == Memory(size, size, size, 0)
    assert analyse(donated).memory.peak == size
    program = compiled(lambda x, w: jnp.sin(x @ w) @ w, shape(64, 64), shape(64, 64))
    memory = analyse(program).memory
    assert memory.peak == sum(memory[:2]) + memory.temporary and memory.temporary >= 64 * 64 * 4


def test_bytes_of_a_device_are_those_of_its_shards():
    tree = {
        "split": jax.device_put(jnp.ones((8, 6)), over("a", "b")),
        "rows": jax.device_put(jnp.ones((8, 3), jnp.bfloat16), over(("a", "b"))),
        "whole": jax.device_put(jnp.ones((5,), jnp.int8), over()),
    }
    held = sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree))
    shapes = jax.tree.map(lambda x: shape(*x.shape, dtype=x.dtype, sharding=x.sharding), tree)
    assert bytes_per_device(tree) == bytes_per_device(shapes) == held
    assert bytes_per_device({"here": shape(4, 4)}) == 64
    assert count(tree) == 48 + 24 + 5


@pytest.mark.slow
def test_a_tpus_program_does_the_work_of_a_cpus():
    pytest.importorskip("libtpu")
    found = {}
    for name in ("cpu", "v5e"):
        devices = jax.devices()[:4] if name == "cpu" else aot_devices(lookup(name), 4).devices
        grid = Mesh(np.array(devices).reshape(2, 2), ("a", "b"))
        x = shape(64, 256, dtype=jnp.bfloat16, sharding=NamedSharding(grid, P("a")))
        w = shape(3, 256, 256, dtype=jnp.bfloat16, sharding=NamedSharding(grid, P(None, None, "b")))

        def loss(w, x):
            return jnp.sum(lax.scan(lambda y, v: (jnp.tanh(y @ v), None), x, w)[0].astype(F32))

        program, text = compile_to_read(
            jax.jit(jax.grad(loss)).lower(w, x), "cpu" if name == "cpu" else "tpu"
        )
        found[name] = analyse(program, text=text)
    assert found["v5e"].flops == found["cpu"].flops
    assert [loop.turns for loop in found["v5e"].loops] == [3, 3]
    kinds = {name: {(c.kind, c.size) for c in a.collectives} for name, a in found.items()}
    assert kinds["v5e"] & kinds["cpu"]
    assert found["v5e"].memory.temporary < found["cpu"].memory.temporary


def stacked(layers: int) -> Analysis:
    """Of a stack of equal layers, split over two devices."""
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))
    split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
    x = jax.ShapeDtypeStruct((8, 16), jnp.float32, sharding=split)
    kernels = [jax.ShapeDtypeStruct((16, 16), jnp.float32, sharding=everywhere)] * layers

    def loss(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(x @ kernel)
        return jnp.sum(x)

    return analyse(jax.jit(jax.grad(loss)).lower(kernels, x).compile())


def test_a_deep_program_is_told_from_two_shallow_ones():
    told, compiled = deepened(stacked(2), stacked(4), (2, 4), 9), stacked(9)
    assert (
        told.flops == compiled.flops == 9 * 3 * 2 * 4 * 16 * 16 - 2 * 4 * 16 * 16
    )  # none for the input's gradient
    assert told.bytes == pytest.approx(compiled.bytes, rel=0.02)
    assert told.memory.arguments == compiled.memory.arguments
    assert told.memory.temporary == pytest.approx(compiled.memory.temporary, rel=0.1)
    sent = [sum(c.bytes * c.calls for c in a.collectives) for a in (told, compiled)]
    assert sent[0] == pytest.approx(sent[1]) and sent[0] > 0
    with pytest.raises(ValueError, match="depths 4 and 2 must grow, up to 9"):
        deepened(stacked(2), stacked(2), (4, 2), 9)
