"""Prefill and decoding."""

from experiments.benchmarks.case import Case
from experiments.benchmarks.models import case_sizes, generation_flops, init, language_model, random_prompts
from experiments.benchmarks.ragged import ragged_case
from experiments.benchmarks.sizes import Sizes
from rlhfjax.generation import Sampling, generate, sample_keys


def generate_greedy(sizes: Sizes) -> Case:
    """Prefill and greedy decoding, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling(temperature=0.0))


def generate_t1(sizes: Sizes) -> Case:
    """Prefill and decoding at temperature 1, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling())


def generate_top_p(sizes: Sizes) -> Case:
    """Prefill and decoding with top-p, log-probabilities kept; counts new tokens."""
    return generation(sizes, Sampling(top_p=sizes.top_p))


def generate_ragged(sizes: Sizes) -> Case:
    """Completions of ragged length at temperature 1 through slots that refill; counts new tokens."""
    return ragged_generation(sizes, refill=True)


def generate_ragged_batches(sizes: Sizes) -> Case:
    """The same completions batch after batch, each as long as its longest; counts new tokens."""
    return ragged_generation(sizes, refill=False)


def ragged_generation(sizes: Sizes, *, refill: bool) -> Case:
    """One completion of every prompt, `ragged_batches` times as many as are decoded at a time."""
    lm = language_model(sizes, sizes.generation_vocab_size)
    count = sizes.ragged_batches * sizes.batch
    prompts = random_prompts(lm, count, sizes.prompt_length)
    described = case_sizes(lm, sizes, prompts=count, samples=1)
    return ragged_case(sizes, lm, init(lm, 0), prompts, described, refill=refill)


def generation(sizes: Sizes, sampling: Sampling) -> Case:
    """Prefill and decoding; `sampling` is a constant of the program, as in the stages of a run."""
    lm = language_model(sizes, sizes.generation_vocab_size)
    batch, new_tokens = sizes.batch, sizes.new_tokens

    def step(state, inputs, key):
        params, prompts = inputs
        keys_BG = sample_keys(key, prompts.index_B, 1)
        return state, generate(
            lm,
            params,
            prompts.token_BP,
            prompts.mask_BP,
            keys_BG,
            max_new_tokens=new_tokens,
            stop_tokens=(),
            sampling=sampling,
        )

    return Case(
        step,
        state=(),
        inputs=(init(lm, 0), random_prompts(lm, batch, sizes.prompt_length)),
        tokens=batch * new_tokens,
        count=lambda generation: generation.mask_BGC.sum(),
        flops=generation_flops(lm.config, batch, 1, sizes.prompt_length, new_tokens),
        sizes=case_sizes(lm, sizes, prompts=batch, samples=1) | {"sampling": sampling._asdict()},
    )
