"""Reviews of an exact grammar, and what is asked of them: are they positive, and are they still of the grammar?

    the plot of the old film: it was dull but the music was really charming.

Host rewards and guards can name the functions here: experiments.stages.sentiment_texts:valid
"""

import re
from collections.abc import Sequence
from functools import lru_cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rlhfjax.environments.text.reasoning import draws, split_of


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


NOUNS = _words(
    "plot music sound picture cast story ending script pace design menu coffee soup staff room view garden price "
    "service food light colour shape weight screen handle finish cover map index style tone length layout start "
    "middle seat door roof floor"
)
THINGS = _words(
    "film book hotel house phone lamp chair bag car boat train game song ballet course talk tour meal cake tea shirt "
    "coat desk clock radio camera guide poem letter speech show dance trip walk site tool kit box pen ring"
)
KINDS = _words(
    "old new small big other last first second third next blue green red white local tall short wide long round"
)
ADVERBS = ("very", "really", "so", "extremely", "quite", "rather", "slightly", "somewhat")
POSITIVE = _words(
    "adorable agreeable amazing amusing attractive awesome beautiful beloved best blissful brave breathtaking bright "
    "brilliant calming capable charming cheerful classy clever comfortable convincing courageous creative "
    "cute daring delicious delightful dynamic easy effective efficient elegant encouraging energetic "
    "enjoyable entertaining excellent exciting exhilarating fabulous fantastic fascinating fine fresh friendly fun "
    "funny generous gentle glamorous glorious good gorgeous graceful gracious great happy harmonious healthy "
    "heartwarming helpful heroic hilarious honest hopeful humorous ideal impressive innovative inspiring intelligent "
    "interesting inviting joyful kind likeable lively lovable lovely loving lucky magnificent marvelous merry neat "
    "nice noble optimistic outstanding peaceful perfect playful pleasant pleasing popular positive powerful precious "
    "pretty promising proud radiant relaxing remarkable rewarding rich romantic satisfying sincere smart "
    "sophisticated special splendid strong stunning successful superb supportive sweet terrific thoughtful thrilling "
    "useful valuable vibrant warm welcoming wise wonderful"
)
NEGATIVE = _words(
    "abusive aggressive angry annoying appalling arrogant awful awkward bad boring broken brutal careless "
    "chaotic clueless confusing contemptible criminal critical cruel cynical damaging dangerous dead defective "
    "depressing desperate destructive difficult dirty disappointing disastrous discouraging disgusting dishonest "
    "dismal disturbing dreadful dreary dubious dull dumb embarrassing evil exhausting faulty fearful foolish "
    "frightening frustrating furious gloomy greedy grim gross hateful heartbreaking heartless hopeless horrible "
    "horrid horrific hostile hurtful idiotic immoral incompetent inferior insecure insulting intimidating irrational "
    "irritating joyless lame lazy lonely lousy ludicrous mad meaningless messy mindless miserable misleading "
    "moody nasty negative obnoxious offensive ominous outrageous painful pathetic poor problematic reckless "
    "ridiculous rude sad scary selfish severe shameful shocking sluggish sorrowful stressful stupid "
    "terrible tragic ugly unattractive uncomfortable unfair unfriendly unhappy unhealthy unimpressive unpleasant "
    "unstable upset useless vicious violent weak wicked worst worthless"
)
SCALE = 15.0
"""What the squared sum of the weights is held against, as in VADER: sum / sqrt(sum^2 + this)."""


def lexicon() -> dict[str, float]:
    """The adjectives' weights: VADER's where it is installed and knows them, else 2 and -2."""
    known = {}
    if find_spec("vaderSentiment") is not None:
        known = _vader().lexicon
    plain = dict.fromkeys(POSITIVE, 2.0) | dict.fromkeys(NEGATIVE, -2.0)
    return {word: float(known.get(word, weight)) for word, weight in plain.items()}


def review(seed: int, index: int) -> tuple[str, str]:
    """Prompt and completion number `index`: one to three clauses (the grammar allows more), every word as likely."""
    draw = draws(seed, index)

    def one(words: Sequence[str]) -> str:
        return words[draw(len(words))]

    def praise() -> str:
        degree = f"{one(ADVERBS)} " if draw(2) else ""
        return degree + one((POSITIVE, NEGATIVE)[draw(2)])  # pyright: ignore[reportArgumentType]

    prompt = f"the {one(NOUNS)} of the {one(KINDS)} {one(THINGS)}:"
    clauses = [f"it was {praise()}"]
    clauses += [f"{one(('and', 'but'))} the {one(NOUNS)} was {praise()}" for _ in range(draw(3))]
    return prompt, f"{' '.join(clauses)}."


def review_rows(seed: int, counts: dict[str, int]) -> list[dict[str, str]]:
    """So many reviews of each split, which a review's prompt decides; none of the others has that prompt."""
    rows, left, index = [], dict(counts), 0
    while any(left.values()):
        prompt, completion = review(seed, index)
        index += 1
        split = split_of(prompt)
        if left.get(split, 0):
            left[split] -= 1
            rows.append({"prompt": prompt, "completion": completion, "split": split})
    return rows


def words_of_reviews() -> list[str]:
    """All words as they stand behind another, for a tokenizer; and those that a text begins with."""
    later = (*NOUNS, *THINGS, *KINDS, *ADVERBS, *POSITIVE, *NEGATIVE, "of", "the", "was", "and", "but")
    return ["it", "the", *(f" {word}" for word in dict.fromkeys(later))]


def pattern() -> str:
    """The grammar of completions as a regular expression, of the whole text."""
    degree, adjective, noun = ("|".join(words) for words in (ADVERBS, POSITIVE + NEGATIVE, NOUNS))
    quality = f"(?:(?:{degree}) )?(?:{adjective})"
    # In this order both places of a quality are read at once, so that the automaton needs the words once.
    return rf"it(?: was {quality} (?:and|but) the (?:{noun}))* was {quality}\."


def valid(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """1.0 where a completion is of the grammar, else 0.0."""
    del prompts
    match = _grammar().fullmatch
    return [float(match(completion) is not None) for completion in completions]


def vader(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float]:
    """VADER's compound score, from -1 to 1 (Hutto and Gilbert 2014). ValueError where it is not installed."""
    del prompts
    score = _vader().polarity_scores
    return [score(completion)["compound"] for completion in completions]


@lru_cache(maxsize=1)
def _grammar() -> re.Pattern[str]:
    return re.compile(pattern())


@lru_cache(maxsize=1)
def _vader() -> Any:
    if find_spec("vaderSentiment") is None:
        raise ValueError("VADER is not installed: pip install vaderSentiment")
    return import_module("vaderSentiment.vaderSentiment").SentimentIntensityAnalyzer()
