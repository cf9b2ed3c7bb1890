"""Conversations of a chat model with a partner in Python: against a loop that plays one at a time from the papers'
definitions, against the library's encoding of the whole, and what is learnt of them."""

from dataclasses import replace
from functools import cache, partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from compiling import compiled
from test_data_chat import ENDS, TEMPLATES
from tiny_tokenizers import KINDS, ROLES, TOKENIZERS

from rlhfjax.algorithms import grpo, ppo
from rlhfjax.config import GRPO, PPO, Decoder, LoRA
from rlhfjax.data import CHATML, ChatTemplate
from rlhfjax.generation import Generation
from rlhfjax.networks import adapted, decoder, init_scalar_head
from rlhfjax.recipes import (
    Chats,
    Frozen,
    best_of_samples,
    best_worst_pairs,
    chat_generate,
    chat_rollout,
    grpo_batch,
    make_learn,
    ppo_batch,
    text_actor_critic,
    text_policy,
)

TOKENIZER = TOKENIZERS["byte"]
ID = TOKENIZER.special_texts
START, END, EOS = ID["<|im_start|>"], ID["<|im_end|>"], ID["</s>"]
CONFIG = Decoder(
    vocab_size=TOKENIZER.vocab_size + 3,
    width=16,
    layers=1,
    heads=2,
    kv_heads=1,
    head_size=8,
    mlp_width=16,
    max_positions=140,
    embedding_stddev=0.3,
)
LM = decoder(CONFIG)
TEMPERATURE, TURNS, NEW, PROMPT, ROW = 0.9, 3, 5, 32, 104
CHATS = Chats(
    ChatTemplate(CHATML, ROLES),
    TOKENIZER,
    turns=TURNS,
    max_new_tokens=NEW,
    prompt_length=PROMPT,
    completion_length=ROW,
    context_lengths=(PROMPT, 132),
)
OPENINGS = [
    [{"role": "user", "content": "the cat"}],
    [{"role": "system", "content": "mat"}, {"role": "user", "content": "2+2?"}],
]
NUMBERS = np.asarray([7, 4])
KEY = jax.random.key(0)


@cache
def policy() -> dict:
    """Turns end soon or late: the end of a turn and EOS are likely after anything, and a token that has no text is."""
    params = compiled(LM.init, jax.random.key(0))
    table = np.array(params["embedding"])
    table[END] = table[EOS] = table[-1] = table.sum(axis=0) * 0.3
    return params | {"embedding": jnp.asarray(table)}


SAY = jax.jit(chat_generate(LM, CHATS, temperature=TEMPERATURE))


def partner(conversations):
    return [reply(talk) for talk in conversations]


def reply(talk):
    """Whoever says a number of bytes that three does not divide is asked on."""
    said = talk[-1]["content"]
    return f"why {len(said)}?" if len(said.encode()) % 3 else None


@cache
def played():
    return chat_rollout(CHATS, SAY, policy(), OPENINGS, KEY, index_B=NUMBERS, partner=partner, samples=4)


@jax.jit
def logits_of(params, token_T):
    """Plain logits after every token of one sequence, padded on the right."""
    position_1T = jnp.arange(token_T.shape[0])[None]
    causal_1TT = jnp.tril(jnp.ones((1, token_T.shape[0], token_T.shape[0]), bool))
    hidden, _ = LM.apply(params, token_T[None], position_BT=position_1T, mask_BTS=causal_1TT)
    return LM.logits(params, hidden)[0]


def padded(ids):
    return jnp.asarray(np.pad(np.asarray(ids, np.int32), (0, PROMPT + ROW - len(ids))))


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    return logits - logits.max() - np.log(np.exp(logits - logits.max()).sum())


def chatml(role, content):
    return [START, *TOKENIZER.encode(f"{role}\n{content}"), END, *TOKENIZER.encode("\n")]


def played_alone(opening, number, sample):
    """(completion, whether each token is the assistant's, log-probabilities, messages, finished, ended)."""
    header = [START, *TOKENIZER.encode("assistant\n")]
    prompt = [i for m in opening for i in chatml(m["role"], m["content"])] + header
    completion, mine, logps, messages, ended = [], [], [], list(opening), False
    key = jax.random.fold_in(jax.random.fold_in(KEY, number), sample)
    for turn in range(TURNS):
        turn_key, said = jax.random.fold_in(key, turn), []
        while len(said) < NEW and (not said or said[-1] not in (END, EOS)):
            ids = prompt + completion
            logits = np.asarray(logits_of(policy(), padded(ids)))[len(ids) - 1] / TEMPERATURE
            allowed = np.exp(log_softmax(logits))
            allowed[TOKENIZER.vocab_size :] = 0  # ids that no token has
            uniform = float(jax.random.uniform(jax.random.fold_in(turn_key, len(said))))
            token = int(np.argmax(np.cumsum(allowed) > uniform * allowed.sum()))
            said.append(token)
            completion.append(token)
            mine.append(True)
            logps.append(log_softmax(logits)[token])
        finished = said[-1] in (END, EOS)
        text = TOKENIZER.decode(said[:-1] if finished else said)
        messages = [*messages, {"role": "assistant", "content": text}]
        if turn + 1 == TURNS:
            break
        answer = reply(messages)
        if answer is None:
            ended = True
            break
        end = [] if said[-1] == END else [END]
        heard = [*end, *TOKENIZER.encode("\n"), *chatml("user", answer), *header]
        completion, mine, logps = completion + heard, mine + [False] * len(heard), logps + [0.0] * len(heard)
        messages = [*messages, {"role": "user", "content": answer}]
    return prompt, completion, mine, logps, messages, finished, ended


def row(rollout, b, g):
    """Prompt and completion of one conversation, without padding."""
    branches = rollout.branches
    prompt = np.asarray(branches.prompt_BP)[b][np.asarray(branches.prompt_mask_BP)[b]]
    seen = np.asarray(branches.completion_mask_BGC)[b, g]
    return prompt.tolist(), np.asarray(branches.completion_BGC)[b, g][seen].tolist(), seen


def test_conversations_equal_a_loop_that_plays_one_at_a_time():
    rollout, kinds = played(), set()
    for b, opening in enumerate(OPENINGS):
        for g in range(4):
            prompt, completion, mine, logps, messages, finished, ended = played_alone(opening, NUMBERS[b], g)
            got_prompt, got_completion, seen = row(rollout, b, g)
            assert (got_prompt, got_completion) == (prompt, completion)
            generation = jax.tree.map(lambda x, b=b, g=g: np.asarray(x)[b, g], rollout.generation)
            assert generation.mask_BGC[seen].tolist() == mine
            np.testing.assert_array_equal(seen, np.arange(ROW) < len(completion))
            np.testing.assert_allclose(generation.plain_logp_BGC[seen], logps, atol=1e-4)
            outside = ~generation.mask_BGC
            assert not generation.plain_logp_BGC[outside].any() and not generation.logp_BGC[outside].any()
            assert rollout.messages[b][g] == messages
            turns = sum(m["role"] == "assistant" for m in messages)
            assert (rollout.turns_BG[b, g], rollout.ended_BG[b, g]) == (turns, ended)
            assert generation.finished_BG == finished
            # The last tokens of turns that got a reply.
            after = np.flatnonzero(np.diff(np.asarray(mine, int)) == -1)
            kinds |= {{END: "ended", EOS: "stopped"}.get(completion[i], "cut") for i in after}
            kinds |= {turns, f"finished {finished}"}
    # Or else the test were weak.
    assert kinds == {1, 2, 3, "ended", "stopped", "cut", "finished True", "finished False"}


@pytest.mark.parametrize("packing", [None, 0.9])
def test_the_row_evaluated_whole_gives_the_log_probabilities_kept_while_decoding(packing):
    lm = decoder(replace(CONFIG, packing=packing))
    rollout = played()
    evaluation = jax.jit(text_policy(lm, temperature=TEMPERATURE))(policy(), rollout.branches)
    mask = np.asarray(rollout.generation.mask_BGC)
    np.testing.assert_allclose(
        np.asarray(evaluation.logp)[mask], np.asarray(rollout.generation.plain_logp_BGC)[mask], atol=1e-4
    )
    # Where an id without a text is banned, what was sampled from is another distribution than the model's own.
    assert np.all(np.asarray(rollout.generation.logp_BGC)[mask] > np.asarray(evaluation.logp)[mask])


def test_a_conversation_does_not_depend_on_those_beside_it():
    rollout = played()
    other = [{"role": "user", "content": "dog"}]
    numbers = np.asarray([NUMBERS[1], 9])
    beside = chat_rollout(
        CHATS,
        SAY,
        policy(),
        [OPENINGS[1], other],
        KEY,
        index_B=numbers,
        partner=partner,
        samples=4,
    )
    assert beside.messages[0] == rollout.messages[1]
    for ours, theirs in zip(beside.generation, rollout.generation, strict=True):
        np.testing.assert_allclose(ours[0], theirs[1], atol=1e-5)
    np.testing.assert_array_equal(beside.turns_BG[0], rollout.turns_BG[1])


def test_adapters_speak_by_the_base_that_is_an_argument():
    lora = LoRA(rank=2)
    adapters = compiled(adapted(LM, policy(), lora).init, jax.random.key(5))
    say = jax.jit(
        lambda params, *x: chat_generate(adapted(LM, params[0], lora), CHATS, temperature=TEMPERATURE)(
            params[1], *x
        )
    )

    def talk(adapters):
        def end(talks):
            return [None] * len(talks)

        whole = (policy(), adapters)
        return chat_rollout(CHATS, say, whole, OPENINGS, KEY, index_B=NUMBERS, partner=end, samples=4)

    fresh, changed = talk(adapters), talk(jax.tree.map(lambda x: x + 0.3, adapters))
    mask = np.asarray(fresh.generation.mask_BGC)
    for name in ("token_BGC", "plain_logp_BGC"):  # adapters that are fresh change nothing
        ours, plain = (np.asarray(getattr(x.generation, name))[mask] for x in (fresh, played()))
        np.testing.assert_allclose(ours, plain, atol=1e-5)
    assert fresh.ended_BG.all() and (fresh.turns_BG == 1).all()
    assert np.abs(changed.generation.plain_logp_BGC - fresh.generation.plain_logp_BGC).max() > 0.01


# What the model says, from a script: no model is needed for what the loop does around it.


LONG = replace(
    CHATS, max_new_tokens=40, prompt_length=80, completion_length=400, context_lengths=(100, 200, 400)
)


def scripted(speak, chats):
    """`say` by `speak(context ids, key) -> ids`; an id that is a stop ends the turn."""
    calls = []

    def say(params, prompt_RP, mask_RP, key_R1):
        calls.append(prompt_RP.shape)
        rows, most = prompt_RP.shape[0], chats.max_new_tokens
        token, mask = np.zeros((rows, 1, most), np.int32), np.zeros((rows, 1, most), bool)
        for r in range(rows):
            ids = speak(np.asarray(prompt_RP)[r][np.asarray(mask_RP)[r]].tolist(), key_R1[r, 0])
            token[r, 0, : len(ids)], mask[r, 0, : len(ids)] = ids, True
        logp = np.where(mask, -1.0, 0.0).astype(np.float32)
        ends = [i for text, i in chats.tokenizer.special_texts.items() if text in (*ENDS.values(), "</s>")]
        return Generation(*map(jnp.asarray, (token, mask, logp, logp, np.isin(token, ends).any(axis=2))))

    return say, calls


def talk(chats, speak, partner, openings=OPENINGS[:1], samples=1, **options):
    say, calls = scripted(speak, chats)
    index_B = np.arange(len(openings))
    rollout = chat_rollout(
        chats,
        say,
        None,
        openings,
        jax.random.key(0),
        partner=partner,
        samples=samples,
        **({"index_B": index_B} | options),
    )
    return rollout, calls


def chats_for(name, kind="byte", **options):
    return replace(LONG, template=TEMPLATES[name], tokenizer=TOKENIZERS[kind], **options)


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "unigram"])
def test_rows_are_the_librarys_encoding_of_what_the_template_writes(kind, name):
    """For a model that says its turns as the template writes them."""
    chats = chats_for(name, kind)
    contents = ["What is 2+2?", "It is 4.", " the cat \n", "naïve\n\ncafé", "🎉", "the mat"]
    messages = [{"role": ("user", "assistant")[i % 2], "content": c} for i, c in enumerate(contents)]

    def library(talk):
        return KINDS[kind].encode(chats.template.render(talk), add_special_tokens=False).ids

    end = chats.tokenizer.special_texts[ENDS[name]]
    whole, spoken = library(messages), []

    def speak(context, key):
        spoken.append(len(context))
        rest = whole[len(context) :]
        return rest[: rest.index(end) + 1]

    rollout, calls = talk(chats, speak, lambda talks: [messages[len(talks[0])]["content"]], [messages[:1]])
    prompt, completion, seen = row(rollout, 0, 0)
    assert prompt + completion == whole[: len(prompt) + len(completion)]
    assert completion[-1] == end and rollout.turns_BG[0, 0] == 3 and len(spoken) == 3
    assert [m["content"].strip() for m in rollout.messages[0][0]] == [m["content"].strip() for m in messages]
    mine = np.asarray(rollout.generation.mask_BGC)[0, 0][seen]
    said = [len(prompt) + int(i) for i in np.flatnonzero(np.diff(mine.astype(int), prepend=0) == 1)]
    assert said == spoken  # each run of actions begins where the context ended


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_partners_text_makes_no_special_token(name):
    chats, word = chats_for(name), TOKENIZER.encode("cat")
    end = ID[ENDS[name]]

    def ends(text):
        rollout, _ = talk(chats, lambda context, key: [*word, end], lambda talks: [text])
        completion = row(rollout, 0, 0)[1]
        return sum(i in ID.values() for i in completion), TOKENIZER.decode(completion)

    plain, _ = ends("what")
    marked, text = ends(f"what{ENDS[name]}<|im_start|>")
    assert marked == plain >= 5 and text.count(f"what{ENDS[name]}<|im_start|>") == 2


def test_a_turn_without_the_templates_end_gets_it_and_what_was_said_is_kept():
    """Tokens that no encoder would choose, a turn of nothing, one that was cut and one with another stop token."""
    odd = TOKENIZER.encode("t") + TOKENIZER.encode("h") + TOKENIZER.encode("e")
    assert odd != TOKENIZER.encode("the")
    turns = [[*odd, EOS], [END], odd]
    chats = chats_for("chatml", turns=4, max_new_tokens=4)
    said = iter([*turns, [*odd, END]])
    rollout, _ = talk(chats, lambda context, key: next(said), lambda talks: ["why"])
    heard = [*TOKENIZER.encode("\n"), *chatml("user", "why"), START, *TOKENIZER.encode("assistant\n")]
    _, completion, seen = row(rollout, 0, 0)
    assert completion == [*odd, EOS, END, *heard, END, *heard, *odd, END, *heard, *odd, END]
    expected = (
        [1] * 4 + [0] * (1 + len(heard)) + [1] + [0] * len(heard) + [1] * 3 + [0] * (1 + len(heard)) + [1] * 4
    )
    assert np.asarray(rollout.generation.mask_BGC)[0, 0][seen].astype(int).tolist() == expected
    answers = [m["content"] for m in rollout.messages[0][0] if m["role"] == "assistant"]
    assert answers == ["the", "", "the", "the"]


def test_calls_have_few_shapes_and_the_partner_is_asked_once_a_turn():
    asked = []

    def partner(talks):
        asked.append([m["content"] for talk in talks for m in talk[:1]])
        # The first conversation goes on at length, those of "b" end.
        return [
            None if talk[0]["content"] == "b" else "the cat " * (40 if g == 0 else 1)
            for g, talk in enumerate(talks)
        ]

    chats = chats_for("chatml", rows=4)
    openings = [[{"role": "user", "content": text}] for text in "abc"]
    rollout, calls = talk(chats, lambda context, key: [9, END], partner, openings, samples=2)
    assert asked == [["a", "a", "b", "b", "c", "c"], ["a", "a", "c", "c"]]
    # Six conversations in two calls, then four with one of them longer, and longer yet.
    assert calls == [(4, 100), (4, 100), (4, 200), (4, 400)]
    assert rollout.turns_BG.tolist() == [[3, 3], [1, 1], [3, 3]]
    assert rollout.ended_BG.tolist() == [[False, False], [True, True], [False, False]]
    assert np.asarray(rollout.generation.finished_BG).all()


def test_calls_of_few_rows_and_another_order_give_the_same_conversations():
    openings = [[{"role": "user", "content": text}] for text in ("a", "the cat", "b")]
    numbers = np.asarray([5, 2, 9])

    def speak(context, key):  # what is said depends on key and context, as a model's words do
        seed = [*np.asarray(jax.random.key_data(key)).tolist(), *context]
        return [*np.random.default_rng(seed).integers(20, 90, 1 + seed[0] % 3).tolist(), END]

    def partner(talks):
        return [None if len(talk[-1]["content"]) % 3 == 0 else talk[-1]["content"] for talk in talks]

    def played_in(order, rows):
        chats = chats_for("chatml", rows=rows)
        some = [openings[b] for b in order]
        rollout, calls = talk(chats, speak, partner, some, samples=3, index_B=numbers[order])
        assert {shape[0] for shape in calls} == {min(rows or 9, 9)}
        return rollout

    whole, parts = played_in([0, 1, 2], None), played_in([2, 0, 1], 2)
    assert len({str(talk) for talks in whole.messages for talk in talks}) == 9
    assert len(np.unique(whole.turns_BG)) > 1
    assert [parts.messages[i] for i in (1, 2, 0)] == whole.messages
    for ours, theirs in zip(jax.tree.leaves(parts[:2]), jax.tree.leaves(whole[:2]), strict=True):
        np.testing.assert_array_equal(np.asarray(ours)[[1, 2, 0]], theirs)


def test_the_partner_changes_nothing_of_ours():
    def partner(talks):
        talks[0][0]["content"] = "changed"
        talks[0].clear()
        return ["why"]

    opening = [{"role": "user", "content": "the cat"}]
    rollout, _ = talk(chats_for("chatml"), lambda context, key: [9, END], partner, [opening])
    assert opening == [{"role": "user", "content": "the cat"}]
    assert rollout.messages[0][0][0] == opening[0] and len(rollout.messages[0][0]) == 6


@pytest.mark.parametrize("limit", ["completion_length", "context_lengths"])
def test_a_conversation_without_room_for_another_turn_ends_as_truncated(limit):
    heard = len([*TOKENIZER.encode("\n"), *chatml("user", "why"), START, *TOKENIZER.encode("assistant\n")])
    prompt = len([*chatml("user", "the cat"), START, *TOKENIZER.encode("assistant\n")])
    two = {"completion_length": 2 + heard + 40, "context_lengths": prompt + 2 + heard}[
        limit
    ]  # room for two turns

    def run(room):
        chats = replace(chats_for("chatml"), **{limit: (room,) if limit == "context_lengths" else room})
        return talk(chats, lambda context, key: [9, END], lambda talks: ["why"])[0]

    for room, turns in ((two, 2), (two - 1, 1)):
        rollout = run(room)
        assert rollout.turns_BG.tolist() == [[turns]] and not rollout.ended_BG.any()
        assert not np.asarray(
            rollout.generation.finished_BG
        ).any()  # the last turn ended, the conversation did not
        assert rollout.messages[0][0][-1]["role"] == "assistant"
        assert row(rollout, 0, 0)[1][-1] == END and len(rollout.messages[0][0]) == 2 * turns


def test_a_tool_has_its_own_role():
    chats = chats_for("chatml", partner_role="tool", turns=2)
    rollout, _ = talk(chats, lambda context, key: [9, END], lambda talks: ["4"])
    assert rollout.messages[0][0][2] == {"role": "tool", "content": "4"}
    tool = [START, *TOKENIZER.encode("tool\n4"), END]
    completion = row(rollout, 0, 0)[1]
    assert any(completion[i : i + len(tool)] == tool for i in range(len(completion)))


THINKING = """{% for message in messages %}{% set said = message['content'] %}
{% if message['role'] == 'assistant' and not loop.last %}{% set said = said.split('</think>')[-1].strip() %}{% endif %}
{{ '<|im_start|>' + message['role'] + '\\n' + said + '<|im_end|>\\n' }}{% endfor %}
{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
SYSTEM_LAST = """{% for message in messages if message['role'] != 'system' %}
{{ '<|im_start|>' + message['role'] + '\\n' + (messages[0]['content'] if loop.last else '') + message['content'] }}
{{- '<|im_end|>' }}
{%- endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"""
LAST_TOLD = CHATML.replace("message['content'] +", "message['content'] + ('!' if loop.last else '?') +")
NO_END = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\\n' }}{% endfor %}"
NO_END += "{% if add_generation_prompt %}assistant: {% endif %}"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (THINKING, "otherwise than they were said"),
        (SYSTEM_LAST, "otherwise than"),
        (LAST_TOLD, "otherwise than"),
        (NO_END, "no special token"),
    ],
)
def test_templates_that_rewrite_what_was_said_or_end_no_turn_are_refused(source, message):
    chats = replace(LONG, template=ChatTemplate(source, ROLES))
    with pytest.raises(ValueError, match=f"opening 0, sample 0, turn 1: .*{message}"):
        talk(chats, lambda context, key: [9, END], lambda talks: ["why"], OPENINGS[1:])


@pytest.mark.parametrize(
    ("replies", "message"),
    [
        (["why"], "partner gave 1 replies to 2 conversations"),
        ("no", "partner gave str to 2"),
        (["why", 4], "sample 1, turn 1: partner replied 4; a reply is a text, or None"),
        (["why", "\ufdd0"], "opening 0, sample 1, turn 1: .*U\\+FDD0"),
    ],
)
def test_bad_replies_are_refused_by_name(replies, message):
    with pytest.raises(ValueError, match=message):
        talk(chats_for("chatml"), lambda context, key: [9, END], lambda talks: replies, samples=2)


def test_what_a_partner_raises_comes_out():
    def broken(talks):
        raise RuntimeError("no tool")

    with pytest.raises(RuntimeError, match="no tool"):
        talk(chats_for("chatml"), lambda context, key: [9, END], broken)


@pytest.mark.parametrize(
    ("settings", "options", "message"),
    [
        ({"turns": 0}, {}, "turns=0"),
        ({"rows": 0}, {}, "rows=0"),
        ({}, {"samples": 0}, "samples=0"),
        ({}, {"openings": []}, "openings=0"),
        (
            {},
            {"index_B": np.arange(3)},
            r"index_B must hold one number an opening, \[1\], it has shape \[3\]",
        ),
        ({"context_lengths": ()}, {}, "context_lengths"),
        ({"context_lengths": (100, 50)}, {}, "ascending"),
        ({"completion_length": 39}, {}, "max_new_tokens=40 of a turn do not fit"),
        ({"partner_role": "assistant"}, {}, "partner_role"),
        ({"prompt_length": 5}, {}, "opening 0 has .* prompt_length is 5"),
        ({"context_lengths": (5,)}, {}, "opening 0 has .* longest of context_lengths 5"),
        ({}, {"openings": [[]]}, "opening 0: .*at least one message"),
    ],
)
def test_settings_that_do_not_fit_are_refused(settings, options, message):
    with pytest.raises(ValueError, match=message):
        talk(chats_for("chatml", **settings), lambda context, key: [9, END], lambda talks: ["why"], **options)


def test_turns_made_by_other_settings_are_refused():
    with pytest.raises(ValueError, match="say gave tokens of shape .*chat_generate"):
        chat_rollout(
            chats_for("chatml"),
            scripted(lambda context, key: [9, END], chats_for("chatml", max_new_tokens=8))[0],
            None,
            OPENINGS,
            jax.random.key(0),
            index_B=np.arange(2),
            partner=lambda talks: ["why"] * 2,
            samples=1,
        )
    with pytest.raises(ValueError, match="do not belong"):
        chat_generate(decoder(replace(CONFIG, vocab_size=100)), CHATS)
    with pytest.raises(ValueError, match="are 137 tokens, the model has max_positions=136"):
        chat_generate(decoder(replace(CONFIG, max_positions=136)), CHATS)
    chat_generate(decoder(replace(CONFIG, max_positions=137)), CHATS)


# What is learnt from a conversation.

SCORE = np.asarray([[0.3, -1.0, 2.0, 0.5], [1.0, 0.0, 0.25, -0.5]], np.float32)


def test_a_grpo_update_learns_from_the_assistants_tokens_alone():
    """The step is that of the gradient of a loss that is written down here, on conversations one at a time."""
    rollout, rate = played(), 0.1
    config = GRPO(scale="none", aggregation="token", kl_coefficient=None)
    algorithm = grpo.make(text_policy(LM, temperature=TEMPERATURE), optax.sgd(rate), config)
    learn = jax.jit(make_learn(algorithm, grpo_batch(LM, temperature=TEMPERATURE, reference=False)))
    state, metrics = learn(
        algorithm.init(policy()),
        Frozen(None, None),
        rollout.branches,
        rollout.generation,
        SCORE,
        jax.random.key(1),
    )
    advantage = SCORE - SCORE.mean(axis=1, keepdims=True)
    mask = np.asarray(rollout.generation.mask_BGC)
    rows, weights = [], []
    for b in range(2):
        for g in range(4):
            prompt, completion, seen = row(rollout, b, g)
            rows.append(padded(prompt + completion))
            weight = np.zeros(PROMPT + ROW, np.float32)
            weight[len(prompt) : len(prompt) + len(completion)] = mask[b, g][seen] * advantage[b, g]
            weights.append(weight[1:])  # of the next token

    @jax.jit
    @jax.grad
    def direct(params):
        def one(token, weight):
            logp = jax.nn.log_softmax(logits_of(params, token)[:-1] / TEMPERATURE)
            return -jnp.sum(jnp.take_along_axis(logp, token[1:, None], axis=1)[:, 0] * weight)

        return jnp.sum(jax.vmap(one)(jnp.stack(rows), jnp.stack(weights))) / mask.sum()

    for before, after, slope in zip(
        *(jax.tree.leaves(x) for x in (policy(), state.params, direct(policy()))), strict=True
    ):
        np.testing.assert_allclose(after, np.asarray(before) - rate * np.asarray(slope), atol=2e-5)
    assert float(metrics["batch/actions"]) == mask.sum()
    seen = np.asarray(rollout.branches.completion_mask_BGC)
    assert float(metrics["completions/padding"]) == pytest.approx(1 - seen.mean())
    assert float(metrics["completions/mean_length"]) == pytest.approx(mask.sum() / 8)
    assert float(metrics["policy/logp_gap"]) < 1e-4


def test_ppo_rewards_the_last_action_and_carries_values_over_what_others_said():
    rollout = played()
    evaluate = text_actor_critic(LM, temperature=TEMPERATURE, shared_trunk=True)
    params = {
        "policy": policy(),
        "critic": {"head": init_scalar_head(jax.random.key(2), CONFIG.width, scale=1.0)},
    }
    as_batch = ppo_batch(LM, evaluate, temperature=TEMPERATURE)
    state = ppo.State(params, None, jnp.float32(0.1), jnp.int32(0))
    config = PPO(lam=0.7, discount=0.9, whiten_advantages=False)

    @jax.jit
    def estimated(branches, generation, score):
        batch = as_batch(state, Frozen(policy(), None), branches, generation, score)
        return batch, ppo.targets(batch, jnp.float32(0.0), config=config)[0]

    batch, sample = jax.tree.map(np.asarray, estimated(rollout.branches, rollout.generation, SCORE))
    mask = np.asarray(rollout.generation.mask_BGC)
    for b in range(2):
        for g in range(4):
            actions = np.flatnonzero(mask[b, g])
            rewards = np.zeros(len(actions))
            rewards[-1] = SCORE[b, g]
            value = np.append(batch.value[b, g][actions].astype(np.float64), 0.0)
            after = 0.0
            for t in reversed(range(len(actions))):
                after = rewards[t] + 0.9 * value[t + 1] - value[t] + 0.9 * 0.7 * after
                assert sample.advantage[b, g, actions[t]] == pytest.approx(after, abs=1e-4)
    assert not sample.advantage[~mask].any()


def test_what_is_imitated_or_preferred_is_the_assistants():
    rollout = played()
    mask, seen = (np.asarray(x) for x in (rollout.generation.mask_BGC, rollout.branches.completion_mask_BGC))
    imitated = compiled(partial(best_of_samples(), None, None), rollout.branches, rollout.generation, SCORE)
    pairs = compiled(
        partial(best_worst_pairs(LM), None, Frozen(policy(), None)),
        rollout.branches,
        rollout.generation,
        SCORE,
    )
    for b, (best, worst) in enumerate(((2, 1), (0, 3))):
        assert (mask[b, best] != seen[b, best]).any()
        np.testing.assert_array_equal(imitated.weight[b, 0], mask[b, best])
        np.testing.assert_array_equal(imitated.inputs.completion_mask_BGC[b, 0], seen[b, best])
        np.testing.assert_array_equal(pairs.completion_mask_BGC[b], mask[b][[best, worst]])
        np.testing.assert_array_equal(pairs.inputs.completion_mask_BGC[b], seen[b][[best, worst]])
