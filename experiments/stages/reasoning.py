"""Questions that can be checked, as a task on text: their rows, their verifier, and pass@k of the policies.

Shapes: B questions, K samples of each, M characters.
"""

import ast
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.loop import run_once
from experiments.options import did_you_mean
from experiments.stages.chats import Examples
from experiments.stages.configs import HostRewards
from experiments.stages.preferences import Gold, sample_policy
from experiments.stages.reasoning_configs import PassAtK, Questions
from experiments.stages.task import DeviceReward, OnDevice, OnHost, Task
from experiments.stages.text import Text, Writer
from rlhfjax import ops
from rlhfjax.environments.text import reasoning
from rlhfjax.environments.text.reasoning import ReasoningTask
from rlhfjax.figures import Panel, plot_panels
from rlhfjax.networks import Branches
from rlhfjax.recipes import completion_reward
from rlhfjax.report import Section, Table, bootstrap_interval
from rlhfjax.rewards import Characters, RewardPool, byte_table, references
from rlhfjax.rewards.characters import look_up, packed, score_against_references, space_map
from rlhfjax.run_folder import RunFolder

_pass_at_k = jax.jit(ops.pass_at_k)
_majority_at_k = jax.jit(ops.majority_at_k, static_argnames="k")

TASKS = ("arithmetic", "countdown", "sorting", "spelling")
HARDER = "harder"
VERIFIER = "verifier"


class Asked(NamedTuple):
    """The task, and its harder kind; None: there is none."""

    task: ReasoningTask
    harder: ReasoningTask | None


def find_task(name: str, config: Questions) -> Asked:
    """The task of this name. Raises ValueError where there is none, or its settings are out of range."""
    if name == "arithmetic":
        a = config.arithmetic
        made = [
            reasoning.arithmetic(a.operation, digits=digits, terms=a.terms, steps=a.steps)
            for digits in (a.digits, a.harder)
        ]
    elif name == "countdown":
        c = config.countdown
        made = [
            reasoning.countdown(
                numbers=numbers,
                largest=c.largest,
                largest_target=c.largest_target,
                operations=c.operations,
                use_all=c.use_all,
            )
            for numbers in (c.numbers, c.harder)
        ]
    elif name == "sorting":
        s = config.sorting
        made = [
            reasoning.sorting(numbers=numbers, largest=s.largest, descending=s.descending)
            for numbers in (s.numbers, s.harder)
        ]
    elif name == "spelling":
        w = config.spelling
        made = [reasoning.spelling(w.kind, length=length, steps=w.steps) for length in (w.length, w.harder)]
    elif name.startswith("gym:"):
        g, gym = config.gym, name.removeprefix("gym:")
        made = [
            reasoning.gym_task(gym, **_gym_settings(settings))
            for settings in (g.settings, g.harder)
            if settings
        ] or [reasoning.gym_task(gym)]
        if g.harder and not g.settings:
            made.insert(0, reasoning.gym_task(gym))
        return Asked(made[0], made[1] if g.harder else None)
    else:
        raise ValueError(
            f"--task {name}: there is no such task{did_you_mean(name, TASKS)} (there are: {', '.join(TASKS)}, and "
            "gym:NAME for those of reasoning-gym)"
        )
    return Asked(made[0], made[1])


def _gym_settings(given: Sequence[str]) -> dict[str, Any]:
    found = {}
    for setting in given:
        name, equals, value = setting.partition("=")
        try:
            found[name] = ast.literal_eval(value) if equals else None
        except (ValueError, SyntaxError):
            equals = ""
        if not equals or not name.isidentifier():
            raise ValueError(
                f"{setting!r} must read NAME=VALUE with a value as Python writes it, such as min_terms=2"
            )
    return found


def rows_to_ask(asked: Asked, config: Questions) -> list[dict[str, Any]]:
    """The rows of all splits; those of `harder` are of the test split's questions of the harder kind."""
    rows = []
    for split in reasoning.SPLITS:
        count = config.train if split == "train" else config.heldout
        rows += reasoning.rows_of(
            reasoning.distinct_questions(asked.task, split, count, seed=config.seed), split
        )
    if asked.harder is not None:
        hard = reasoning.distinct_questions(asked.harder, "test", config.heldout, seed=config.seed)
        rows += reasoning.rows_of(hard, HARDER)
    return rows


def as_task(asked: Asked, pool: RewardPool | None) -> Task:
    """Accuracy as gold score, and the verifier as reward: on the device where one answer alone is right, else by the
    threads of the pool."""
    if pool is None:
        return Task("accuracy", lambda examples: verified(asked.task, examples), OnDevice(answer_on_device))
    settings = HostRewards(workers=1, calls_of=256)
    return Task("accuracy", lambda examples: verified(asked.task, examples), OnHost(pool, settings))


def open_verifier(asked: Asked) -> RewardPool | None:
    """A thread that calls the verifier, where it cannot be on the device. It is Python: more threads would not help."""
    if asked.task.one_answer:
        return None
    return RewardPool({VERIFIER: asked.task.verify}, {VERIFIER: 1.0}, workers=1, batch=256, timeout=120.0)


def verified(task: ReasoningTask, examples: Examples) -> Gold:
    """The verifier's score of completions of these examples' prompts."""

    def gold(rows: np.ndarray, texts: list[list[str]]) -> np.ndarray:
        found = [
            task.verify(
                [examples.prompts[row]] * len(group), group, reference=[examples.references[row]] * len(group)
            )
            for row, group in zip(rows, texts, strict=True)
        ]
        return np.asarray(found, np.float64)

    return gold


def answer_on_device(text: Text, examples: Examples) -> DeviceReward:
    """1.0 where the final answer is that of the row's reference, as `reasoning.verify_answer` has it."""
    table = byte_table(text.token_bytes(), text.lm.config.vocab_size)
    given = references([reasoning.final_answer(x) for x in examples.references])
    score = completion_reward(score_against_references(table, same_answer))

    def reward(params: Any, branches: Branches, index_B: jax.Array) -> jax.Array:
        return score(params, branches, index_B)

    return DeviceReward(jax.tree.map(jnp.asarray, given), reward)


def same_answer(text: Characters, answer: Characters) -> jax.Array:
    """Whether what stands behind a text's last "=", without the white space around it, is the answer; bool [B]."""
    code_BN, mask_BN = text.code_BN, text.mask_BN
    place_N = jnp.arange(code_BN.shape[1], dtype=jnp.int32)[None, :]
    behind_BN = mask_BN & (
        place_N > jnp.max(jnp.where(mask_BN & (code_BN == ord("=")), place_N, -1), axis=1)[:, None]
    )
    inked_BN = behind_BN & (look_up(space_map(), code_BN) == 0)
    first_B = jnp.min(jnp.where(inked_BN, place_N, code_BN.shape[1]), axis=1)
    last_B = jnp.max(jnp.where(inked_BN, place_N, -1), axis=1)
    final_BN, length_B = packed(code_BN, (place_N >= first_B[:, None]) & (place_N <= last_B[:, None]))
    width = max(final_BN.shape[1], answer.code_BN.shape[1])
    pair = (jnp.pad(x, ((0, 0), (0, width - x.shape[1]))) for x in (final_BN, answer.code_BN))
    same_BM = jnp.equal(*pair)
    return jnp.all(same_BM, axis=1) & (length_B == answer.length_B)


# ---- pass@k


class Passed(NamedTuple):
    """The samples of one policy on one kind of questions."""

    right_BK: np.ndarray  # bool
    answer_BK: np.ndarray  # int, equal where two samples of a question end in the same answer


def measure_passes(
    config: PassAtK,
    task: ReasoningTask,
    text: Text,
    examples: Examples,
    writers: Mapping[str, Writer],
    folder: RunFolder,
    *,
    temperature: float,
    split: str,
) -> dict[str, Passed]:
    """Samples of every policy, each of the same questions; computed once a run."""
    rows = np.arange(min(config.questions, len(examples)))
    gold = verified(task, examples)
    key = jax.random.fold_in(jax.random.key(folder.seed), 31)

    def compute():
        arrays, metrics = {}, {}
        for label, writer in writers.items():
            temperatures = np.full(config.samples, temperature, np.float32)
            out = sample_policy(text, writer, examples, rows, key, temperatures=temperatures)
            texts = text.decode(out["token_BGC"], out["mask_BGC"])
            arrays[f"{label}/right"] = right = gold(rows, texts) >= 1.0
            arrays[f"{label}/answer"] = np.stack([_numbered(group) for group in texts])
            metrics |= {f"{label}/{name}": float(x.mean()) for name, x in curves(right).items()}
        return arrays, metrics, []

    found = run_once(f"pass_at_k_{split}", folder=folder, compute=compute)
    return {label: Passed(found[f"{label}/right"], found[f"{label}/answer"]) for label in writers}


def _numbered(texts: Sequence[str]) -> np.ndarray:
    """The final answers, as numbers: equal ones alike."""
    return np.unique([reasoning.final_answer(text) for text in texts], return_inverse=True)[1].reshape(-1)


def numbers_of_samples(most: int) -> list[int]:
    """1, 2, 4, ... up to `most`."""
    return [2**i for i in range(most.bit_length())]


def curves(right_BK: np.ndarray) -> dict[str, np.ndarray]:
    """pass@k of each question, float [B], by name."""
    return {
        f"pass@{k}": np.asarray(ops.pass_at_k(right_BK, k=k)) for k in numbers_of_samples(right_BK.shape[1])
    }


def pass_sections(
    passed: Mapping[str, Mapping[str, Passed]], folder: RunFolder, temperature: float
) -> list[Section]:
    """A table for each kind of questions, and the curves of all. `passed`: kind -> policy -> samples."""
    sections, panels = [], []
    for kind, by_policy in passed.items():
        samples = next(iter(by_policy.values())).right_BK.shape[1]
        half = max(1, samples // 2)
        rows, lines = [], {}
        for label, (right_BK, answer_BK) in by_policy.items():
            found = curves(right_BK)
            voted = np.asarray(_majority_at_k(answer_BK, right_BK, k=half))
            rows.append([label, *(bootstrap_interval(x, 0) for x in found.values()), f"{voted.mean():.3f}"])
            lines[label] = (numbers_of_samples(samples), [float(x.mean()) for x in found.values()])
        first = next(iter(by_policy.values()))
        text = (
            f"{len(first.right_BK)} questions, {samples} samples of each at temperature {temperature:g}; the unbiased "
            "estimate (arXiv 2107.03374), with 95 % bootstrap intervals over questions. maj@k: the answer that most of "
            "k samples give is right."
        )
        header = ["policy", *curves(first.right_BK), f"maj@{half}"]
        sections.append(Section(f"pass@k, {kind}", text, Table(header, rows)))
        panels.append(Panel("share of questions", lines, "k samples", kind))
    path = folder.path / "figures"
    path.mkdir(exist_ok=True)
    figure = plot_panels(path / "pass_at_k.png", panels)
    caption = "pass@k: one of k samples is right"
    return [*sections, Section("pass@k, side by side", "", figures=[(figure, caption)])]


def pass_numbers(passed: Mapping[str, Mapping[str, Passed]]) -> dict[str, float]:
    """For summary.json: KIND/POLICY/pass@K."""
    return {
        f"{kind}/{label}/{name}": float(x.mean())
        for kind, by_policy in passed.items()
        for label, samples in by_policy.items()
        for name, x in curves(samples.right_BK).items()
    }
