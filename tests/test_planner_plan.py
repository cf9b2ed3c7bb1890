"""The planner: seconds, memory, plans, against formulas and trees made otherwise."""

from pathlib import Path

import jax
import jax.numpy as jnp
import optax
import pytest

from rlhfjax.accelerators import Accelerator, lookup
from rlhfjax.config import Decoder, LoRA
from rlhfjax.networks import decoder, init_lora
from rlhfjax.planner import (
    Analysis,
    Collective,
    Efficiency,
    Loop,
    Memory,
    Operation,
    Part,
    Plan,
    Usage,
    advice,
    analyse,
    aot_devices,
    bytes_per_device,
    collective_seconds,
    compile_to_read,
    describe,
    estimated_savings,
    expected_seconds,
    fit,
    in_bytes,
    line,
    memory_asked,
    topology_name,
    usage,
)

EXACT = Efficiency(products=1.0, memory=1.0, links=1.0, overhead=0.0, hop=0.0, network_hop=0.0)
ROUND = Accelerator(
    names=("round",),
    flops=1e12,
    memory=1e9,
    bandwidth=1e11,
    link=1e10,
    island=4,
    network=1e9,
    source="round numbers",
)


def shape(*dims, dtype=jnp.float32, sharding=None) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(dims, dtype, sharding=sharding)


# Seconds.


def ring(devices: int, chunk: float, phases: int) -> float:
    """Bytes that each device of a ring sends, step by step: a chunk to its neighbour, n - 1 times a phase."""
    return sum(chunk for _ in range(phases) for _ in range(devices - 1))


@pytest.mark.parametrize(
    ("kind", "phases"), [("all-reduce", 2), ("all-gather", 1), ("reduce-scatter", 1), ("all-to-all", 1)]
)
def test_collectives_take_as_long_as_a_ring_sends(kind, phases):
    size = 1.2e6
    within = Collective(kind, "", (tuple(range(4)),), size, 1)
    assert collective_seconds(within, ROUND, EXACT) == pytest.approx((ring(4, size / 4, phases) / 1e10, 0))
    # Twelve in three islands: those of an island each carry a quarter to the others.
    beyond = Collective(kind, "", (tuple(range(12)),), size, 1)
    links, network = collective_seconds(beyond, ROUND, EXACT)
    if kind == "all-to-all":  # a twelfth to each: three near, eight far
        assert (links, network) == pytest.approx((3 * size / 12 / 1e10, 8 * size / 12 / 1e9))
    else:
        assert links == pytest.approx(ring(4, size / 4, phases) / 1e10)
        assert network == pytest.approx(ring(3, size / 4 / 3, phases) / 1e9)


def test_a_permute_crosses_the_network_where_a_pair_does():
    def seconds(*pairs):
        return collective_seconds(Collective("collective-permute", "", pairs, 1e6, 1), ROUND, EXACT)

    assert seconds((0, 1), (1, 0)) == (1e-4, 0)
    assert seconds((0, 1), (3, 4)) == (0, 1e-3)
    assert seconds((0, 0), (1, 1)) == (0, 0)


def test_hops_count_between_devices():
    slow = Efficiency(links=1.0, hop=1e-3, network_hop=1.0)
    links, network = collective_seconds(
        Collective("all-reduce", "", (tuple(range(16)),), 0.0, 1), ROUND, slow
    )
    assert (links, network) == pytest.approx(
        (2 * 3 * 1e-3, 2 * 2 * 1.0)
    )  # rings of four, trees of four islands


def analysis_of(*operations: Operation, collectives=(), memory=Memory(0, 0, 0, 0)) -> Analysis:  # noqa: B008
    return Analysis(memory, operations, tuple(collectives), (), {})


def test_an_operation_takes_what_limits_it():
    compute = Operation("product", flops=4e9, bytes=1e6, calls=10)  # 4 ms at 1e12, 10 us at 1e11
    copy = Operation("copy", flops=0, bytes=1e8, calls=3)  # 1 ms
    sent = Collective("all-gather", "", ((0, 1, 2, 3),), 4e7, 2)  # 3 ms
    found = expected_seconds(analysis_of(compute, copy, collectives=[sent]), ROUND, EXACT)
    assert found == pytest.approx((0.04, 0.003, 0, 0.006, 0))
    assert found.total == pytest.approx(0.049) and found.limit == "products"
    half = Efficiency(products=0.5, memory=0.25, links=0.1, overhead=1e-3, hop=0, network_hop=0)
    slower = expected_seconds(analysis_of(compute, copy, collectives=[sent]), ROUND, half)
    assert slower == pytest.approx((0.08, 0.012, 0.013, 0.06, 0))


# Does it fit?


@pytest.mark.parametrize("multiple", [1, 4])
@pytest.mark.parametrize("memory", [0, 9, 10, 17, 100, 1000, 10**9])
def test_the_largest_batch_is_that_of_trying_all(multiple, memory):
    def peak(batch):
        assert batch % multiple == 0
        return 6 + 3 * batch + batch**2 // 50

    tried = [batch for batch in range(multiple, 401, multiple) if peak(batch) <= memory]
    assert fit(peak, memory, multiple=multiple, most=400) == max(tried, default=0)


def test_two_compilations_make_a_line():
    peak = line((8, 180.0), (2, 120.0))
    assert [peak(batch) for batch in (0, 2, 8, 10)] == [100, 120, 180, 200]
    assert fit(peak, 155) == 5
    with pytest.raises(ValueError, match="two batches, got 4 twice"):
        line((4, 1.0), (4, 2.0))
    with pytest.raises(ValueError, match="the peak falls from 200 to 100"):
        line((4, 200.0), (8, 100.0))
    with pytest.raises(ValueError, match="multiple=0"):
        fit(peak, 155, multiple=0)


CONFIG = Decoder(vocab_size=64, width=32, layers=2, heads=4, kv_heads=4, head_size=8, mlp_width=48)


def test_savings_are_those_of_the_changed_trees():
    params = jax.eval_shape(decoder(CONFIG).init, jax.random.key(0))
    moments = jax.eval_shape(optax.adam(1e-3).init, params)
    size = bytes_per_device(params)
    used = usage(
        Memory(4 * size + 8, 3 * size + 4, 3 * size, 5 * size),
        parameters=params,
        optimiser=moments,
        frozen=params,
    )
    # Adam's count of steps is a number of four bytes, so that `other` has four less of the arguments.
    assert used.parameters == used.frozen == size and used.temporary == 5 * size and used.other == 8
    saved = estimated_savings(used, params, fsdp=2, rank=3, reference=size)

    adapters = jax.eval_shape(lambda key: init_lora(key, params, LoRA(rank=3)), jax.random.key(0))
    adapter_moments = jax.eval_shape(optax.adam(1e-3).init, adapters)
    gradients = size
    before = size + bytes_per_device(moments) + size + gradients
    after = (
        size + 2 * bytes_per_device(adapters) + bytes_per_device(adapter_moments)
    )  # base, adapters, gradients
    assert saved["LoRA of rank 3"] == pytest.approx(before - after, rel=1e-3)
    assert saved["LoRA of rank 3 on a base in 8 bits"] == pytest.approx(
        before - after + 0.75 * size, rel=1e-3
    )

    narrow = jax.tree.map(lambda x: shape(*x.shape, dtype=jnp.bfloat16), params)
    assert saved["parameters in bfloat16"] == 2 * (size - bytes_per_device(narrow))
    assert saved["twice the devices along fsdp (2 -> 4)"] == pytest.approx(before / 2)
    assert (
        saved["half the rows at a time (batch, samples of a prompt, or minibatch)"]
        == (5 * size - gradients) / 2
    )
    assert "parameters in bfloat16" not in estimated_savings(used, narrow)


def test_advice_says_how_much_is_missing_and_what_suffices():
    used = Usage(parameters=4e9, optimiser=8e9, temporary=2e9)
    savings = {"one": 1e9, "two": 3e9}
    assert advice(used, 14e9, savings) == []
    first, *rest = advice(used, 12e9, savings)
    assert "14 GB are needed on a device, 12 GB are there: 2 GB too much" in first
    assert "The largest part: optimiser state, 8 GB" in first
    assert rest == [
        "two: saves 3 GB, enough alone.",
        "one: saves 1 GB, 1 GB too much would be left.",
    ]
    assert "None of these is enough alone" in advice(used, 5e9, savings)[-1]
    assert "3 times the memory" in advice(used, 5e9, savings)[-1]


# The plan.


def test_a_plan_says_what_it_needs_and_costs():
    work = Operation("product", flops=4e9, bytes=1e6, calls=10)
    sent = Collective("all-gather", "", ((0, 1, 2, 3),), 4e7, 2)
    parts = {
        "rollout": Part(analysis_of(work, collectives=[sent])),
        "update": Part(analysis_of(work), runs=4),
    }
    used = Usage(parameters=4e8, optimiser=8e8, batch=1e6)
    plan = Plan(
        "PPO", ROUND, 4, 10**8, used, parts, "compiled by hand", iterations=900, price=2.5, efficiency=EXACT
    )
    assert plan.seconds == pytest.approx((0.2, 0, 0, 0.006, 0)) and plan.flops == 5 * 4e10
    assert plan.device_hours == pytest.approx(0.206 * 900 * 4 / 3600) and plan.cost == pytest.approx(
        0.206 * 2.5
    )
    assert not plan.fits
    text = describe(plan, ["take more"])
    rows = [
        [cell.strip() for cell in row.strip("|").split("|")] for row in text.splitlines() if row[:1] == "|"
    ]
    for row in [
        ["devices", "4 x round"],
        ["parameters", "100 M"],
        ["memory of a device", "1.2 GB of 900 MB: does NOT fit, 301 MB too much"],
        ["products of an iteration", "800 GFLOP, 200 GFLOP a device"],
        ["what limits", "products (compute), 97.1% of the time"],
        ["share of the peak", "97.1%"],
        ["run of 900 iterations", "3.09 minutes"],
        ["cost, at 2.5 a device hour", "0.52"],
        ["optimiser state", "800 MB", "66.6%"],
        ["update", "160 GFLOP", "40 MB", "0 B", "0.16", "100.0%", "0.0%", "0.0%", "0.0%", "0.0%"],
        ["rollout", "all-gather", "4", "2", "80 MB", "0.006"],
    ]:
        assert row in rows, text
    assert "- take more" in text and "compiled by hand" in text and "frozen" not in text
    assert {len(set(map(len, table.splitlines()))) for table in text.split("\n\n") if table[:1] == "|"} == {1}


def test_a_plan_tells_what_it_takes_for_granted():
    told = ("at most", "at most", "caller", "nobody", "program")
    loops = tuple(Loop(f"loop {by}", 10.0 + i, by) for i, by in enumerate(told))
    analysis = Analysis(Memory(0, 0, 0, 0), (), (), loops, {"kernel": 3.0})
    text = describe(Plan("p", ROUND, 1, 64, Usage(1, 0), {"rollout": Part(analysis)}, "compiled"))
    assert "loop at most of rollout is taken to turn 10, then 11 times: the most" in text
    assert "loop caller of rollout is taken to turn 12 times, as asked for" in text
    assert "loop nobody of rollout is taken to turn 13 times, for want of a number" in text
    assert "loop program" not in text
    assert "The products of kernel (3 calls in rollout) are not known" in text


# Devices that are not there.


@pytest.mark.parametrize(
    ("name", "devices", "topology"),
    [
        ("v5e", 1, "v5e:1x1"),
        ("v5e", 2, "v5e:2x1"),
        ("v5e", 8, "v5e:2x4"),
        ("v5e", 64, "v5e:8x8"),
        ("v5e", 512, "v5e:16x16"),
        ("v5p", 4, "v5p:2x2x1"),
        ("v5p", 32, "v5p:2x4x4"),
        ("v4", 64, "v4:4x4x4"),
    ],
)
def test_topologies_are_even_grids(name, devices, topology):
    assert topology_name(lookup(name), devices) == topology


def test_devices_that_cannot_be_had_are_told():
    with pytest.raises(
        ValueError, match="6 devices of v5e: TPU slices have 1, 2, 4, 8, ... devices; take 4 or 8"
    ):
        topology_name(lookup("v5e"), 6)
    with pytest.raises(ValueError, match="for 1 device or more, not 0"):
        aot_devices(ROUND, 0)


def test_without_a_tpus_compiler_virtual_cpus_stand_in(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    target = aot_devices(lookup("h100"), 4)
    assert target.devices == jax.devices()[:4] and target.platform == "cpu"
    assert "4 virtual CPUs in place of h100" in target.words and "overstated" in target.words
    with pytest.raises(ValueError, match="JAX_NUM_CPU_DEVICES=8 before JAX starts"):
        aot_devices(lookup("h100"), 8)


class Lowered:
    """What `compile_to_read` asks of a lowered program; one whose compiler writes what jaxlib cannot read back."""

    def __init__(self, written: bool):
        self.written = written
        self.options = None

    def compile(self, compiler_options=None):
        self.options = compiler_options
        if compiler_options and self.written:
            folder = Path(compiler_options["xla_dump_to"])
            (folder / "module_0000.jit_f.before_optimizations.txt").write_text("early")
            (folder / "module_0000.jit_f.after_codegen.txt").write_text("late")
        return self

    def as_text(self):
        raise jax.errors.JaxRuntimeError("async-update instruction should have 1 operands but sees 3")


def test_a_text_that_cannot_be_read_back_is_the_compilers_own():
    lowered = Lowered(written=True)
    assert compile_to_read(lowered, "tpu") == (lowered, "late")
    for platform, written in (("tpu", False), ("cpu", True)):
        with pytest.raises(jax.errors.JaxRuntimeError, match="async-update"):
            compile_to_read(Lowered(written), platform)
    program = jax.jit(lambda x: x @ x).lower(shape(4, 4))
    compiled, text = compile_to_read(program, "cpu")
    assert analyse(compiled, text=text) == analyse(compiled) and "ENTRY" in text
    assert analyse(compiled, text=text.replace("f32[4,4]", "f32[8,4]")).flops == 2 * analyse(compiled).flops


def test_a_compilers_refusal_says_how_much_it_asked_for():
    error = RuntimeError(
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (27.97G) exceeds available HBM (15.75G). HLO module: jit__lambda."
    )
    assert memory_asked(error) == pytest.approx((27.97 * 2**30, 15.75 * 2**30))
    assert memory_asked(RuntimeError("something else")) is None


def test_in_bytes():
    assert [in_bytes(x) for x in (0, 999, 1500, 2.5e6, 16e9, 3e12)] == [
        "0 B",
        "999 B",
        "1.5 kB",
        "2.5 MB",
        "16 GB",
        "3 TB",
    ]
