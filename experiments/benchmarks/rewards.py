"""Samples per second of rewards, host form against device form: `python experiments/benchmarks/rewards.py`.

Completions are summaries of the bundled data, cut to 24 tokens of the bundled tokenizer, a batch at a time.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import jax
import jax.numpy as jnp
import numpy as np

from experiments.assets import asset
from rlhfjax import rewards
from rlhfjax.data import BPETokenizer, load_pairs, pad_completions

DATA = "experiments/assets/debian_summaries.jsonl.gz"
LENGTH = 24


def cases(table: rewards.ByteTable, references: rewards.References, answer_R: np.ndarray) -> dict[str, tuple]:
    """name -> (host reward, reward on the device, its params or None, whether it is numbered)."""
    lexicon = {
        word: 1.0 for word in ("fast", "simple", "small", "library", "tool", "package", "data", "files")
    }
    pattern = r"[A-Za-z][^.]*\.?"
    return {
        "chrf": (rewards.chrf_reward, rewards.chrf_on_device(table), references, True),
        "rouge_l": (rewards.rouge_l_reward, rewards.rouge_l_on_device(table), references, True),
        "rouge_n, n = 2": (rewards.rouge_n_reward(2), rewards.rouge_n_on_device(table, 2), references, True),
        "bleu": (rewards.bleu_reward(), rewards.bleu_on_device(table), references, True),
        "exact_match": (rewards.exact_match_reward(), rewards.exact_match_on_device(table), references, True),
        "marked_answer": (
            rewards.marked_answer_reward("for", column="reference"),
            rewards.marked_answer_on_device(table, "for"),
            references,
            True,
        ),
        "last_number": (rewards.last_number_reward(), rewards.last_number_on_device(table), answer_R, True),
        "regex": (rewards.regex_reward(pattern), rewards.regex_on_device(table, pattern), None, False),
        "lexicon": (rewards.lexicon_reward(lexicon), rewards.lexicon_on_device(table, lexicon), None, False),
        "repetition": (rewards.repetition_reward(), rewards.repetition_on_device(table), None, False),
        "longest_repeat": (
            rewards.longest_repeat_reward(),
            rewards.longest_repeat_on_device(table),
            None,
            False,
        ),
    }


def seconds(call: Callable[[], object], repeats: int) -> float:
    """Median of some calls, after one that is not counted."""
    call()
    found = []
    for _ in range(repeats):
        start = time.perf_counter()
        call()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def measure(batch: int, repeats: int) -> Iterator[tuple[str, float, float]]:
    """(name, samples per second on the host, on the device), each once it is known."""
    rows = load_pairs(asset(DATA), prompt_field="document", completion_field="summary")[: 2 * batch]
    tokenizer = BPETokenizer.load(asset("experiments/assets/base"))
    ids = [row[:LENGTH] for row in tokenizer.encode_batch([row.completion for row in rows[:batch]])]
    token, mask = (jnp.asarray(x) for x in pad_completions(ids, LENGTH, tokenizer.pad_id))
    texts = tokenizer.decode_batch(ids)
    wanted = [row.completion for row in rows[batch:]]
    columns = {"reference": wanted, "answer": [12.0] * batch}
    table = rewards.byte_table([tokenizer.token_bytes(i) for i in range(tokenizer.vocab_size)])
    index = jnp.arange(batch)
    for name, (host, device, params, numbered) in cases(
        table, rewards.references(wanted), np.full(batch, 12.0, np.float32)
    ).items():
        inputs = (jax.tree.map(jnp.asarray, params), token, mask, *((index,) if numbered else ()))
        compiled = jax.jit(device)
        np.testing.assert_allclose(compiled(*inputs), host(texts, texts, **columns), atol=1e-5, err_msg=name)
        on_host = seconds(lambda host=host: host(texts, texts, **columns), repeats)
        on_device = seconds(lambda f=compiled, x=inputs: f(*x).block_until_ready(), repeats)
        yield name, batch / on_host, batch / on_device


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--repeats", type=int, default=20)
    options = parser.parse_args(arguments)
    print(f"{'reward':<16}{'host':>12}{'device':>12}   samples/s, {jax.devices()[0].device_kind}", flush=True)
    for name, on_host, on_device in measure(options.batch, options.repeats):
        print(f"{name:<16}{on_host:>12,.0f}{on_device:>12,.0f}", flush=True)


if __name__ == "__main__":
    main()
