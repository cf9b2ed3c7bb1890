"""RLHF of a pretrained chat model with LoRA: every method, one base for all, stopped and resumed, exported."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from running import start
from tiny_chat import END, write_chat_model, write_prompts
from tiny_text import write_world

from experiments import run
from experiments.assets import asset
from experiments.rewards import sentiment
from experiments.stages import configs, export, policy, text
from rlhfjax import run_folder
from rlhfjax.config import LoRA
from rlhfjax.data import read_prompts
from rlhfjax.networks import decoder
from rlhfjax.pretrained import Answerer, load_pretrained, load_reward_model, open_model, save_pretrained
from rlhfjax.recipes import Frozen, init_reward_model, make_reward_model
from rlhfjax.run_folder import read_lines

BITWISE = ("metrics.jsonl", "samples.jsonl", "summary.json")
SHORT = """
def short(prompts, completions, **_):
    assert all(prompt.startswith("What of") for prompt in prompts)
    return [-float(len(text)) for text in completions]
"""


FAILING = """
CALLS, working = [], short

def short(prompts, completions, **columns):
    CALLS.append(completions)
    if len(CALLS) > 2:
        raise RuntimeError("no more")
    return working(prompts, completions, **columns)
"""


@pytest.fixture(scope="module")
def settings(tmp_path_factory) -> dict[str, Any]:
    world = tmp_path_factory.mktemp("world")
    write_chat_model(world / "base")
    write_prompts(world / "prompts.jsonl")
    (world / "reward.py").write_text(SHORT)
    stage = {"steps": 3, "prompts": 4, "optimizer": {"warmup_steps": 1}}
    return {
        "text": {
            "base": str(world / "base"),
            "data": str(world / "prompts.jsonl"),
            "prompt_length": 44,
            "completion_length": 6,
            "lora": {"rank": 2},
        },
        "rewards": [f"{world / 'reward.py'}:short"],
        "checkpoint_every": 1,
        "preferences": {"prompts": 12, "heldout": 4, "samples": 3},
        "reward_model": stage | {"pool": "last"},
        "dpo": dict(stage),
        "evaluation": {"prompts": 6, "batch": 4, "best_of": [2]},
    } | {name: stage | {"samples": 2} for name in ("grpo", "ppo", "online_dpo", "raft")}


@pytest.fixture(scope="module")
def given(settings, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "given"
    assert start("chat", settings, folder) == 0
    return folder


@pytest.mark.slow
def test_the_given_reward_is_optimised(given):
    samples = [line for line in read_lines(given / "samples.jsonl") if line["stage"] == "grpo"]
    assert samples and all(line["reward"] == -len(line["completion"]) for line in samples)
    assert all(END not in line["completion"] for line in samples)
    summary = json.loads((given / "summary.json").read_text())
    assert any(name.startswith("validation/") for name in summary)


def test_the_export_is_the_policy_that_was_measured(given, settings):
    """The adapter folder opens as base and adapters merged; its card says what it is."""
    opened, base = open_model(given / "policy"), open_model(settings["text"]["base"])
    moved = opened.params["layer_0"]["attention"]["query"]["kernel"]
    assert not np.allclose(moved, base.params["layer_0"]["attention"]["query"]["kernel"])
    np.testing.assert_array_equal(opened.params["embedding"], base.params["embedding"])
    card = (given / "policy" / "README.md").read_text()
    assert f"base_model: {settings['text']['base']}" in card and "GRPO on short" in card
    greedy = [line for line in read_lines(given / "samples.jsonl") if line["stage"] == "validation"]
    loaded = text.open_text(
        configs.Text(**settings["text"] | {"lora": LoRA(rank=2)}, chat=True, trained="lora")
    )
    answer = Answerer(opened, max_new_tokens=loaded.config.completion_length)
    said = [answer([{"role": "user", "content": line["prompt"]}]) for line in greedy]
    assert said == [line["grpo, greedy"] for line in greedy]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "dpo", "online_dpo", "raft", "grpo"])
def test_every_method_on_a_learned_reward(algorithm, settings, tmp_path):
    flags = ("--algorithm", algorithm, "--reward", "learned")
    assert start("chat", settings, tmp_path / "run", *flags) == 0
    assert (tmp_path / "run" / "policy" / "adapter_model.safetensors").exists()
    config, params = load_reward_model(tmp_path / "run" / "reward_model")
    assert params["head"]["kernel"].shape == (config.width,) and np.any(params["head"]["kernel"])


@pytest.mark.slow
def test_ppo_with_a_quantised_base_stopped_and_resumed(settings, tmp_path):
    """Stopped by its reward in the third step and gone on with, the run ends in the bits of one never stopped."""
    flags = ("--algorithm", "ppo", "--text.base-bits", "8", "--calls-of", "8", "--workers", "1")
    reward = tmp_path / "reward.py"
    own = settings | {"rewards": [f"{reward}:short"]}
    reward.write_text(SHORT)
    assert start("chat", own, tmp_path / "whole", *flags) == 0
    reward.write_text(SHORT + FAILING)
    assert start("chat", own, tmp_path / "cut", *flags) == 1
    assert len(read_lines(tmp_path / "cut" / "metrics.jsonl")) == 2
    reward.write_text(SHORT)
    assert run.main(["--resume", str(tmp_path / "cut")]) == 0
    for name in BITWISE:
        assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name


@pytest.mark.slow
def test_a_whole_model_is_trained_and_exported(settings, tmp_path):
    flags = ("--text.trained", "all", "--max-steps", "2")
    assert start("chat", settings, tmp_path / "run", *flags) == 0
    opened, base = open_model(tmp_path / "run" / "policy"), open_model(settings["text"]["base"])
    assert opened.template == base.template and opened.stop_tokens == base.stop_tokens
    assert not np.allclose(opened.params["embedding"], base.params["embedding"], atol=1e-3)


def test_a_base_that_is_no_folder_gives_its_tokenizer_along(settings, tmp_path):
    config = configs.Text(**settings["text"] | {"lora": LoRA(rank=2)}, chat=True, trained="all")
    loaded = dataclasses.replace(text.open_text(config), source=None)  # as of a GGUF file
    folder = run_folder.create(tmp_path / "run", "experiment: fake\n", experiment="fake", seed=0, exact=True)
    directory = export.export_policy(loaded, loaded.base, folder, method="Nothing", metrics={})
    opened = open_model(directory)
    assert opened.template == loaded.template and opened.stop_tokens == loaded.stop_tokens
    assert opened.tokenizer.encode("the cat") == loaded.tokenizer.encode("the cat")


def test_an_algorithm_without_a_given_reward_is_told(settings, tmp_path, capsys):
    assert start("chat", settings, tmp_path / "run", "--algorithm", "dpo") == 1
    assert 'give reward="learned" too' in capsys.readouterr().err


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": "all", "base_bits": 8}, 'give trained="lora" too'),
        ({"prompt_length": 125}, "exceed the 128 positions"),
    ],
)
def test_settings_that_contradict_are_told(settings, changes, message):
    config = configs.Text(
        **settings["text"] | {"lora": LoRA(rank=2), "chat": True, "trained": "lora"} | changes
    )
    with pytest.raises(ValueError, match=message):
        text.open_text(config)


def never(*_: Any) -> Any:
    pytest.fail("the gold scorer was asked")


@pytest.mark.slow
def test_one_base_for_policy_reference_critic_and_reward(settings):
    """The compiled iteration reads one base, which no output holds; its size is what the memory report shows."""
    config = configs.Text(**settings["text"] | {"lora": LoRA(rank=2)}, chat=True, trained="lora")
    loaded = text.open_text(config)
    train = loaded.load("train")
    stage = configs.PPOStage(steps=4, prompts=4, samples=2)
    reference = loaded.start(jax.random.key(0))

    def reward(lm):
        return make_reward_model(lm, pool="last")

    reward_params = init_reward_model(jax.random.key(1), reference, loaded.lm.config.width)
    problem = policy.Problem(loaded, reference, reward, reward_params, train, np.arange(8), never)

    def learner(lm):
        return policy.ppo_learner(lm, stage, problem, reward_params["trunk"])

    state = learner(loaded.lm).algorithm.init(learner(loaded.lm).params)
    iterate = loaded.jit(
        lambda lm: policy.compose(lm, stage, learner(lm), problem).iterate, donate_argnums=(0,)
    )
    frozen = Frozen(reference, reward_params)
    prompts = loaded.batch(train, np.arange(4))
    before = jax.tree.map(np.array, loaded.base)
    new, *_ = iterate(jax.tree.map(jnp.array, state), frozen, prompts, jax.random.key(2))

    def size(tree) -> int:
        return sum(x.nbytes for x in jax.tree.leaves(tree))

    assert size(new) < size(loaded.base) and size(frozen) < size(loaded.base)
    for one, other in zip(jax.tree.leaves(before), jax.tree.leaves(loaded.base), strict=True):
        np.testing.assert_array_equal(one, other)
    jitted = iterate.func  # pyright: ignore[reportFunctionMemberAccess]
    lowered = jitted.lower(loaded.base, state, frozen, prompts, jax.random.key(2))
    given = lowered.compile().memory_analysis().argument_size_in_bytes
    others = size((state, frozen, prompts)) + 4096
    assert size(loaded.base) <= given <= size(loaded.base) + others


def test_conversations_to_fine_tune_on_and_a_system_message(settings, tmp_path):
    rows = [
        {
            "split": "train",
            "messages": [("user", "the cat"), ("assistant", "sat"), ("user", "on"), ("assistant", "mat")],
        },
        {"split": "train", "messages": [("system", "own"), ("user", "the dog"), ("assistant", "log")]},
        {"split": "train", "messages": [("user", "the " * 60), ("assistant", "too long")]},
    ]
    for row in rows:
        row["messages"] = [{"role": role, "content": content} for role, content in row["messages"]]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    changed = {
        "data": str(tmp_path / "rows.jsonl"),
        "system": "short",
        "completion_length": 40,
        "prompt_length": 70,
    }
    config = configs.Text(**settings["text"] | {"lora": LoRA(rank=2)} | changed, chat=True, trained="lora")
    loaded = text.open_text(config)
    examples = loaded.load("train")
    assert examples.prompts == ["on", "the dog"] and examples.references == ["mat", "log"]
    assert examples.dropped == 1
    shown = [loaded.tokenizer.decode(ids) for ids in examples.ids]
    assert shown[0].startswith("system\nshort") and shown[1].startswith("system\nown")
    packed = loaded.pack(examples, np.arange(2), 120)
    learnt = packed.token_RT[:, 1:][packed.completion_RT]
    assert "".join(loaded.tokenizer.decode(learnt.tolist()).split()) in ("satmatlog", "logsatmat")
    assert (learnt == loaded.stop_tokens[0]).sum() == 3  # the end of every turn is learnt


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ["ppo", "soft_q", "ilql"])
def test_other_experiments_take_adapters_too(algorithm, tmp_path):
    """Fine-tuning, reward model, values and the guided policy on one base of plain text, in four bits."""
    world = write_world(tmp_path)
    world["text"] |= {"trained": "lora", "base_bits": 4, "lora": {"rank": 2, "projections": ["query", "up"]}}
    world["text"]["base"] = str(even_base(Path(world["text"]["base"])))
    stage = {"steps": 3, "prompts": 4, "optimizer": {"warmup_steps": 1}}
    settings = world | {"ratings": {"prompts": 8}, "soft_q": stage, "ilql": stage}
    assert start("summarize", settings, tmp_path / "run", "--algorithm", algorithm) == 0
    lines = [x for x in read_lines(tmp_path / "run" / "metrics.jsonl") if x["stage"] == "sft"]
    assert lines[-1]["loss/nll"] != lines[0]["loss/nll"]


def even_base(folder: Path) -> Path:
    """The same kind of model with inputs that four bits can take in groups of 32."""
    config, _ = load_pretrained(folder)
    config = dataclasses.replace(config, width=32, head_size=16, mlp_width=32)
    save_pretrained(folder, config, jax.jit(decoder(config).init)(jax.random.key(0)))
    return folder


def test_the_shipped_prompts_are_of_other_topics_in_each_split():
    path = asset("experiments/assets/chat_prompts.jsonl")
    split = {name: read_prompts(path, split=name) for name in ("train", "validation", "test")}
    assert [len(prompts) for prompts in split.values()] == [320, 40, 40]

    def topics(name: str) -> set[str]:
        texts = [prompt[-1]["content"] for prompt in split[name]]
        return {text.removeprefix("Write one sentence about ")[:-1] for text in texts if "sentence" in text}

    assert [len(topics(name)) for name in split] == [80, 10, 10]
    assert not topics("train") & (topics("validation") | topics("test"))


def test_the_shipped_reward_is_vaders_score():
    pytest.importorskip("vaderSentiment")
    good, bad, none = sentiment(["?"] * 3, ["What a wonderful day!", "This is horrible.", "It is a table."])
    assert good > 0.5 and bad < -0.5 and none == 0.0


def test_prompts_alone_cannot_be_learnt_from(settings):
    config = configs.Text(**settings["text"] | {"lora": LoRA(rank=2)}, chat=True, trained="lora")
    loaded = text.open_text(config)
    with pytest.raises(ValueError, match="prompts alone and nothing to fine-tune on"):
        loaded.pack(loaded.load("train"), np.arange(2), 50)
