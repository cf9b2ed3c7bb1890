"""The benchmarks: every case runs at tiny sizes and counts what it says; its arithmetic is checked."""

import dataclasses
import functools
import json
import shlex
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import peers
from experiments.benchmarks import run as benchmark
from experiments.benchmarks.cases import CASES
from experiments.benchmarks.measure import measure
from experiments.benchmarks.models import language_model
from experiments.benchmarks.ragged import completion_lengths
from experiments.benchmarks.sizes import Sizes
from rlhfjax.config import Decoder
from rlhfjax.networks import branch_mask, causal_mask, flops

ROOT = Path(__file__).parent.parent
TINY = Sizes(
    layers=1,
    width=8,
    heads=2,
    mlp_width=16,
    batch=4,
    samples=2,
    prompt_length=3,
    new_tokens=5,
    generation_vocab_size=16,
    training_vocab_size=12,
    mean_tokens=2,
    memory_length=6,
    memory_vocab_size=20,
    seeds=2,
    control_iterations=2,
    matmul_size=8,
)
TINY_FLAGS = [f"--{k.replace('_', '-')}={v}" for k, v in dataclasses.asdict(TINY).items() if type(v) is int]
TOKENS = {
    "ceiling": 0,
    "generate_greedy": 4 * 5,
    "generate_t1": 4 * 5,
    "generate_top_p": 4 * 5,
    "generate_ragged": int(completion_lengths(TINY).sum()),
    "generate_ragged_batches": int(completion_lengths(TINY).sum()),
    "sft": 4 * (3 + 5),
    "reward_model": 4 * 2 * (3 + 5),
    "ppo": 4 * 5,
    "ppo_grouped": 4 * 5,
    "ppo_seeds": 2 * 4 * 5,
    "grpo": 4 * 5,
    "dpo": 4 * 2 * (3 + 5),
    "ragged_update": int(completion_lengths(TINY).sum()),
    "control_ppo": 0,
    "control_pqn": 0,
    "control_dqn": 0,
    "logprob_memory": 4 * 6,
    "update_memory": 4 * 6,
}
# Two seeds, two iterations: worlds x steps of the defaults.
ENVIRONMENT_STEPS = {"control_ppo": 4 * 4 * 128, "control_pqn": 4 * 16 * 32, "control_dqn": 4 * 8 * 4}


@functools.cache
def record_of(name: str) -> dict:
    """The record of a case, measured once."""
    return measure(CASES[name](TINY), repeats=2)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_every_case_is_measured_whole(name: str):
    record = record_of(name)
    assert record.keys() == record_of("ceiling").keys()
    json.dumps(record)  # nothing but plain values
    assert record["tokens"] == TOKENS[name]
    assert record["environment_steps"] == ENVIRONMENT_STEPS.get(name, 0)
    assert record["compiles"] == 1
    assert record["memory_temp_bytes"] >= 0 and record["memory_argument_bytes"] > 0
    assert record["model_flops"] > 0 and record["xla_flops"] > 0
    if name.endswith("_memory"):
        assert record["seconds"] == [] and record["seconds_median"] is None
    else:
        assert len(record["seconds"]) == 2 and record["compiles_while_timed"] == 0
        assert 0 < record["seconds_min"] <= record["seconds_median"] <= record["seconds_max"]
        for unit in ("tokens", "environment_steps"):
            rate = record[unit] / record["seconds_median"]
            assert record[f"{unit}_per_second"] == pytest.approx(rate)
        assert record["gflops_per_second"] == pytest.approx(
            record["model_flops"] / record["seconds_median"] / 1e9
        )


def test_peak_memory_counts_a_donated_state_once():
    record = record_of("sft")
    argument, output, alias, temp = (
        record[f"memory_{name}_bytes"] for name in ("argument", "output", "alias", "temp")
    )
    assert alias > 0  # parameters and Adam's moments are updated in place
    assert record["memory_peak_bytes"] == argument + temp + (output - alias)
    floats = 3 * record["sizes"]["parameters"]  # parameters and two moments
    assert alias >= 4 * floats


def test_sizes_tell_the_model_and_the_batch():
    sizes = record_of("ppo_grouped")["sizes"]
    assert (sizes["prompts"], sizes["samples"], sizes["vocab_size"]) == (2, 2, 12)
    assert sizes["parameters"] == sum(
        x.size for x in jax.tree.leaves(language_model(TINY, 12).init(jax.random.key(0)))
    )
    assert record_of("generate_t1")["sizes"]["vocab_size"] == 16
    assert record_of("update_memory")["sizes"]["logits_bytes"] == 4 * 4 * 6 * 20


def test_a_step_that_sees_other_tokens_than_claimed_is_an_error():
    case = CASES["ceiling"](TINY)
    with pytest.raises(RuntimeError, match="saw 0 tokens, not the 7"):
        measure(case._replace(tokens=7), repeats=1)
    with pytest.raises(RuntimeError, match="saw 0 environment steps, not the 5"):
        measure(case._replace(environment_steps=5), repeats=1)


def test_recompiling_while_timed_is_seen():
    fresh = iter(range(3, 9))

    def between():
        jax.jit(lambda x: x * x)(jnp.ones(next(fresh)))

    record = measure(CASES["ceiling"](TINY), repeats=1, rounds=2, between=between)
    assert record["compiles_while_timed"] >= 2


def test_generation_runs_to_the_end_and_keeps_logprobs():
    case = CASES["generate_t1"](TINY)
    step = jax.jit(case.step)
    one, other = (step(case.state, case.inputs, jax.random.key(i))[1] for i in (0, 1))
    assert one.mask_BGC.all() and not one.finished_BG.any()
    assert bool((one.logp_BGC < 0).all())
    assert not np.array_equal(one.token_BGC, other.token_BGC)


def test_ragged_cases_generate_the_same_tokens_of_the_lengths_drawn():
    sizes = dataclasses.replace(TINY, ragged_batches=2, new_tokens=3)
    lengths = completion_lengths(sizes)
    assert len(set(lengths.tolist())) > 2 and lengths.max() == sizes.new_tokens
    cases = (CASES[name](sizes) for name in ("generate_ragged", "generate_ragged_batches"))
    one, other = (jax.jit(x.step)(x.state, x.inputs, jax.random.key(0))[1] for x in cases)
    np.testing.assert_array_equal(one.mask_BGC.sum(-1)[:, 0], lengths)
    np.testing.assert_array_equal(one.token_BGC, other.token_BGC)


def test_pairs_are_those_the_masks_let_through():
    assert flops.causal_pairs(6) == int(causal_mask(jnp.ones((1, 6), jnp.int32)).sum())
    mask = branch_mask(jnp.ones((1, 3), bool), jnp.ones((1, 2, 4), bool))
    assert flops.branch_pairs(3, 2, 4) == int(mask.sum())


def test_forward_flops_are_those_of_the_matrices():
    config = Decoder(vocab_size=11, width=8, layers=3, heads=4, kv_heads=2, head_size=2, mlp_width=16)
    # query, key, value, output; gate, up, down
    matrices = 8 * 8 + 8 * 4 + 8 * 4 + 8 * 8 + 3 * 8 * 16
    expected = 3 * (5 * 2 * matrices + 7 * 4 * 4 * 2) + 2 * 2 * 8 * 11
    assert flops.forward_flops(config, positions=5, pairs=7, logits=2) == expected


def test_the_count_agrees_with_the_compiler_where_nothing_loops_or_is_masked():
    # Wide, and many rows of few tokens: matrix products are nearly all there is.
    sizes = dataclasses.replace(TINY, width=64, mlp_width=256, prompt_length=1, new_tokens=3, batch=64)
    case = CASES["sft"](sizes)
    counted = jax.jit(case.step).lower(case.state, case.inputs, jax.random.key(0)).cost_analysis()
    assert counted is not None
    assert case.flops == pytest.approx(counted["flops"], rel=0.15)


def test_indivisible_sizes_are_refused():
    with pytest.raises(ValueError, match="batch of 4 sequences cannot hold 3 samples"):
        CASES["ppo_grouped"](dataclasses.replace(TINY, samples=3))
    with pytest.raises(ValueError, match="width 8 must be a multiple of heads 3"):
        CASES["sft"](dataclasses.replace(TINY, heads=3))
    with pytest.raises(ValueError, match="--seeds 0 and --control-iterations 2 must be at least 1"):
        CASES["control_ppo"](dataclasses.replace(TINY, seeds=0))


@pytest.fixture
def cheap_sft(monkeypatch):
    """The command line, not the step, is under test: a matrix product stands in for it."""
    monkeypatch.setitem(CASES, "sft", CASES["ceiling"])


def test_one_line_of_json_a_case_with_its_share_of_the_ceiling(capsys, cheap_sft):
    assert benchmark.main(["sft", "--repeats", "2", *TINY_FLAGS]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["case"] for line in lines] == ["ceiling", "sft"]
    best = 2 * 8**3 / lines[0]["seconds_min"] / 1e9
    for line in lines:
        assert line["ceiling_gflops_per_second"] == pytest.approx(best)
        assert line["ceiling_share"] == pytest.approx(line["gflops_per_second"] / best)


def test_a_command_is_run_by_turns_and_compared(capsys, tmp_path, cheap_sft):
    log, program = tmp_path / "log", tmp_path / "other.py"
    program.write_text(
        "import json, sys\n"
        f"open({str(log)!r}, 'a').write('x')\n"
        "print('noise')\n"
        "print(json.dumps({'t': {'s': int(sys.argv[1])}}))\n"
    )
    command = f"{shlex.quote(sys.executable)} {shlex.quote(str(program))} {{batch}}"
    arguments = ["sft", "--repeats=2", "--rounds=3", "--against", command, "--against-field=t.s"]
    assert benchmark.main([*arguments, *TINY_FLAGS]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert log.read_text() == "xxx"
    assert record["their_seconds"] == [4.0, 4.0, 4.0] and record["their_record"] == {"t": {"s": 4}}
    assert len(record["seconds"]) == 6 and len(record["ours_seconds"]) == 3
    assert record["ours_seconds"][1] == pytest.approx(sum(record["seconds"][2:4]) / 2)


def test_the_ratio_is_theirs_over_ours_pair_by_pair():
    compared = peers.compare([1.0, 2.0, 4.0], [3.0, 4.0, 4.0])
    assert compared["ratio"] == 2.0  # the median of 3, 2, 1
    assert (compared["ours_seconds_median"], compared["their_seconds_median"]) == (2.0, 4.0)


@pytest.mark.parametrize(
    ("arguments", "why"),
    [
        (["generate_greedi"], "did you mean 'generate_greedy'"),
        (["sft", "--repeats", "0"], "must be at least 1"),
        (["--against", "true"], "compares one case: name it"),
        (["sft", "ppo", "--against", "true"], "compares one case: name it"),
        (["sft", "--against", "other {bach}"], "cannot fill in 'bach'"),
    ],
)
def test_bad_options_are_told(capsys, cheap_sft, arguments: list[str], why: str):
    assert benchmark.main([*arguments, *TINY_FLAGS]) == 2
    assert why in capsys.readouterr().err


def test_what_a_command_did_wrong_is_told():
    with pytest.raises(RuntimeError, match="ended with status 3(.|\n)*oh no"):
        peers.run_command("echo oh no >&2; exit 3")
    with pytest.raises(RuntimeError, match="no line of JSON"):
        peers.run_command("echo hello")
    lines = ['{"a": 0}', '{"a": 1}', "{'a': 2}", "3"]  # of which the last JSON object counts
    assert peers.run_command(f"printf '%s\\n' {shlex.join(lines)}") == {"a": 1}
    assert peers.read_seconds({"a": {"b": 2}}, "a.b") == 2.0
    with pytest.raises(ValueError, match="c is not in the record, which has a, b"):
        peers.read_seconds({"a": 1, "b": 2}, "c")
    with pytest.raises(ValueError, match="must be a number of seconds, got 'x'"):
        peers.read_seconds({"a": "x"}, "a")


def test_help_answers_without_jax():
    program = (
        "import sys, runpy\n"
        "sys.argv = ['run.py', '--help']\n"
        "try: runpy.run_path('experiments/benchmarks/run.py', run_name='__main__')\n"
        "except SystemExit: print('jax' in sys.modules)"
    )
    command = [sys.executable, "-c", program]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert run.stdout.splitlines()[-1] == "False" and "--against" in run.stdout
