"""Does a text match a regular expression? On the host by `re`, on the device by an automaton made from the pattern.

The pattern means what it means to `re`: `re`'s own parser reads it, and `re` itself says which characters each of its
parts takes, so that classes such as \\w are those of Unicode (of ASCII under `(?a)`), and `(?i)`, `(?m)`, `(?s)` and
`(?x)` mean what they mean there. Whether a text matches does not depend on greed. Refused by name: references to a
group, which no finite automaton follows, and lookahead, lookbehind, conditions, atomic groups, possessive repeats.

The construction: an automaton with choices (Thompson 1968), of whose states all that can be reached by the same text
become one (Rabin and Scott 1959). A state also holds what `^`, `$` and `\\b` need to know of the character before.
"""

import re
from collections.abc import Callable, Sequence
from functools import lru_cache
from re import _compiler, _parser  # pyright: ignore[reportAttributeAccessIssue]
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from rlhfjax.rewards.characters import CODES, ByteTable, Characters, CodeMap, code_map, look_up, score_texts

__all__ = ["RegexAutomaton", "regex_automaton", "regex_on_device", "regex_reward"]

How = Literal["fullmatch", "search"]
MOST_PARTS, MOST_STATES = 20_000, 4_096


class RegexAutomaton(NamedTuple):
    """A deterministic automaton over classes of characters; state 0 is the beginning of a text."""

    classes: CodeMap  # class of each code point
    next_SC: np.ndarray  # int32, the state after a character of class c
    accepts_S: np.ndarray  # bool, whether a text that ends here matches


def regex_reward(pattern: str, how: How = "fullmatch") -> Callable[..., list[float]]:
    """A host reward: 1.0 where `re.fullmatch` (or `re.search`) finds the pattern in a completion, else 0.0.

    >>> regex_reward("[0-9]+")(["", ""], ["42", "forty-two"])
    [1.0, 0.0]
    """
    match = _matcher(_compiled(pattern), how)

    def reward(prompts: Sequence[str], completions: Sequence[str], **columns: object) -> list[float]:
        del prompts, columns
        return [float(match(completion) is not None) for completion in completions]

    return reward


def regex_on_device(table: ByteTable, pattern: str, how: How = "fullmatch") -> Callable[..., jax.Array]:
    """`reward(params, token_BT, mask_BT) -> float32 [B]`, as `regex_reward` gives it; params are not used.

    table: `byte_table` of the vocabulary. For the errors see `regex_automaton`.
    """
    automaton = regex_automaton(pattern, how)

    def score(params: object, text: Characters) -> jax.Array:
        del params
        return matches(text, automaton)

    return score_texts(table, score)


def matches(text: Characters, automaton: RegexAutomaton) -> jax.Array:
    """Whether each text matches, bool [B]: a step for each character of the longest text."""
    class_BN = look_up(automaton.classes, text.code_BN)
    next_SC, accepts_S = jnp.asarray(automaton.next_SC), jnp.asarray(automaton.accepts_S)

    def step(i: jax.Array, state_B: jax.Array) -> jax.Array:
        class_B = jax.lax.dynamic_index_in_dim(class_BN, i, axis=1, keepdims=False)
        return jnp.where(i < text.length_B, next_SC[state_B, class_B], state_B)

    start_B = jnp.zeros_like(text.length_B)
    return accepts_S[jax.lax.fori_loop(0, jnp.max(text.length_B, initial=0), step, start_B)]


@lru_cache(maxsize=64)
def regex_automaton(pattern: str, how: How = "fullmatch") -> RegexAutomaton:
    """The automaton of a pattern, NumPy arrays, made once on the host.

    how: "fullmatch": the whole text; "search": anywhere in it.

    Raises re.error for what `re` does not understand, and ValueError, which names the part, for what no automaton does,
    or one that would have more than 4,096 states (long counted repeats of overlapping parts).
    """
    _matcher(_compiled(pattern), how)
    parts = _Parts(pattern, how)
    return _determinise(pattern, parts, *_classes(parts))


def _compiled(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise re.error(f"{pattern!r} is no regular expression: {error.msg}", pattern, error.pos) from None


def _matcher(compiled: re.Pattern, how: str) -> Callable[[str], Any]:
    if how not in ("fullmatch", "search"):
        raise ValueError(f"how must be 'fullmatch' or 'search', got {how!r}")
    return compiled.fullmatch if how == "fullmatch" else compiled.search


# ---- the automaton with choices

_EMPTY_HAS_NO_BOUNDARY = re.search(r"\B", "") is not None  # since Python 3.14
_NAMES = {
    "FAILURE": "an empty negative lookahead",
    "ASSERT": "lookahead or lookbehind",
    "ASSERT_NOT": "negative lookahead or lookbehind",
    "GROUPREF": "a reference to a group",
    "GROUPREF_IGNORE": "a reference to a group",
    "GROUPREF_EXISTS": "a condition on a group",
    "ATOMIC_GROUP": "an atomic group",
    "POSSESSIVE_REPEAT": "a possessive repeat",
}


class _Parts:
    """Numbered places with ways between them: by a character of a set, for nothing, or where an assertion holds."""

    def __init__(self, pattern: str, how: str):
        self.pattern = pattern
        self.sets: list[np.ndarray] = []  # each as its edges (see `_edges`), without repetitions
        self._set_of: dict[Any, int] = {}
        self.by_character: list[tuple[int, int] | None] = []  # of each place: (set, place after)
        self.free: list[list[tuple[str, int]]] = []  # of each place: (assertion or "", place)
        tree = _parser.parse(pattern)
        everything = self._set("all", lambda: np.array([0, CODES]))
        self.start, end = self._place(), self._place()
        self.accept = self._place()
        self._run(tree, tree.state.flags, self.start, end)
        self.free[end].append(("", self.accept))
        if how == "search":
            self.by_character[self.accept] = (everything, self.accept)
            begin = self._place()
            self.by_character[begin] = (everything, begin)
            self.free[begin].append(("", self.start))
            self.start = begin
        self.assertions = {assertion for ways in self.free for assertion, _ in ways if assertion}

    def _place(self) -> int:
        if len(self.free) >= MOST_PARTS:
            raise ValueError(
                f"the pattern {self.pattern!r} has more than {MOST_PARTS} parts; give shorter repeats"
            )
        self.free.append([])
        self.by_character.append(None)
        return len(self.free) - 1

    def _set(self, key: Any, make: Callable[[], np.ndarray]) -> int:
        if key not in self._set_of:
            self._set_of[key] = len(self.sets)
            self.sets.append(make())
        return self._set_of[key]

    def _run(self, tree: Any, flags: int, start: int, end: int) -> None:
        """Ways from start to end by the items of a sequence."""
        items = list(tree)
        for number, (kind, value) in enumerate(items):
            after = end if number == len(items) - 1 else self._place()
            self._item(kind, value, flags, start, after)
            start = after
        if not items:
            self.free[start].append(("", end))

    def _item(self, kind: Any, value: Any, flags: int, start: int, end: int) -> None:
        name = kind.name
        if name in ("LITERAL", "NOT_LITERAL", "ANY", "IN"):
            number = self._set((name, repr(value), flags), lambda: _taken(kind, value, flags))
            middle = self._place()
            self.free[start].append(("", middle))
            self.by_character[middle] = (number, end)
        elif name == "BRANCH":
            for branch in value[1]:
                self._run(branch, flags, start, end)
        elif name == "SUBPATTERN":
            _, added, removed, inner = value
            self._run(inner, _combined(flags, added, removed), start, end)
        elif name in ("MAX_REPEAT", "MIN_REPEAT"):
            least, most, inner = value
            self._repeat(least, most, inner, flags, start, end)
        elif name == "AT":
            self.free[start].append((_assertion(value.name, flags), end))
        else:
            what = _NAMES.get(name, name)
            raise ValueError(f"the pattern {self.pattern!r} has {what}, which an automaton cannot follow")

    def _repeat(self, least: int, most: Any, inner: Any, flags: int, start: int, end: int) -> None:
        for _ in range(least):
            after = self._place()
            self._run(inner, flags, start, after)
            start = after
        if most is _parser.MAXREPEAT:
            # Its own place, so that what comes in there by another way does not go round.
            turn, back = self._place(), self._place()
            self.free[start].append(("", turn))
            self._run(inner, flags, turn, back)
            self.free[back].append(("", turn))
            self.free[turn].append(("", end))
            return
        for _ in range(most - least):
            after = self._place()
            self.free[start].append(("", end))
            self._run(inner, flags, start, after)
            start = after
        self.free[start].append(("", end))


def _combined(flags: int, added: int, removed: int) -> int:
    kinds = re.ASCII.value | re.UNICODE.value | re.LOCALE.value
    if added & kinds:
        flags &= ~kinds
    return (flags | added) & ~removed


def _taken(kind: Any, value: Any, flags: int) -> np.ndarray:
    """The code points that one item takes, as edges: asked of `re`."""
    if kind.name == "LITERAL" and not flags & re.IGNORECASE:
        return np.array([value, value + 1])
    state = _parser.State()
    state.flags, state.str = flags & ~re.DEBUG.value, ""
    one = _parser.SubPattern(state, [(kind, value)])
    some = _parser.SubPattern(state, [(_parser.MAX_REPEAT, (1, _parser.MAXREPEAT, one))])
    return _edges(_compiler.compile(some, 0))


@lru_cache(maxsize=64)
def _edges(some: re.Pattern) -> np.ndarray:
    """Where the runs that a pattern finds in all code points begin and end, int [2 * runs], rising."""
    return np.array([run.span() for run in some.finditer(_every_character())], np.int64).reshape(-1)


@lru_cache(maxsize=1)
def _every_character() -> str:
    return "".join(map(chr, range(CODES)))


def _assertion(name: str, flags: int) -> str:
    lines = bool(flags & re.MULTILINE)
    ascii_only = "_ASCII" if flags & re.ASCII else ""
    return {
        "AT_BEGINNING": "line_begins" if lines else "begins",
        "AT_BEGINNING_STRING": "begins",
        "AT_END": "line_ends" if lines else "last_line_ends",
        "AT_END_STRING": "ends",
        "AT_BOUNDARY": "boundary" + ascii_only,
        "AT_NON_BOUNDARY": "no_boundary" + ascii_only,
    }[name]


# ---- classes of characters that no part tells apart


def _classes(parts: _Parts) -> tuple[CodeMap, np.ndarray]:
    """The class of each code point; and bool [sets + 3, classes]: which sets take it, and what assertions ask of it:
    is it a line break, of a word, of a word of ASCII. What no assertion asks is False."""
    nothing = np.zeros(0, np.int64)
    by_line = any("line" in assertion for assertion in parts.assertions)
    by_word = any("boundary" in assertion for assertion in parts.assertions)
    asked = (
        np.array([ord("\n"), ord("\n") + 1]) if by_line else nothing,
        _edges(re.compile(r"\w+")) if by_word else nothing,
        _edges(re.compile(r"(?a:\w+)")) if by_word else nothing,
    )
    sets = [*parts.sets, *asked]
    begins = np.unique(np.concatenate([[0], *sets]))
    begins = begins[begins < CODES]  # of runs of code points that no set tells apart
    inside = np.stack([np.searchsorted(edges, begins, side="right") % 2 == 1 for edges in sets])
    kinds, kind_of_run = np.unique(inside, axis=1, return_inverse=True)
    class_of = np.repeat(kind_of_run.reshape(-1), np.diff([*begins, CODES]))
    return code_map(class_of), kinds


class _Seen(NamedTuple):
    """What is known of the character at one side of a place; where there is none, all is False."""

    there: bool
    line: bool
    word: bool
    ascii_word: bool


_NOTHING = _Seen(False, False, False, False)

# A thread is (place, duty): what it has promised by passing `$` before the end. 0: nothing; 1: a line break follows
# and then the end; 2: the end follows.
_Thread = tuple[int, int]


def _determinise(pattern: str, parts: _Parts, classes: CodeMap, kinds: np.ndarray) -> RegexAutomaton:
    seen = [_Seen(True, *(bool(x) for x in column)) for column in kinds[-3:].T]
    start = (frozenset([(parts.start, 0)]), _NOTHING)
    index, states = {start: 0}, [start]
    rows: list[list[int]] = []
    accepts: list[bool] = []
    for threads, before in states:  # grows while it is gone through
        reached = {after: _closure(parts, threads, before, after) for after in {_NOTHING, *seen}}
        accepts.append(any(q == parts.accept and duty != 1 for q, duty in reached[_NOTHING]))
        row = []
        for c, after in enumerate(seen):
            moved = frozenset(
                (way[1], 2 if duty else 0)
                for q, duty in reached[after]
                if (way := parts.by_character[q]) is not None
                and kinds[way[0], c]
                and (duty == 0 or (duty == 1 and after.line))
            )
            state = (moved, after if parts.assertions else _NOTHING)
            if state not in index:
                if len(states) >= MOST_STATES:
                    raise ValueError(
                        f"the automaton of {pattern!r} has more than {MOST_STATES} states; give shorter repeats"
                    )
                index[state] = len(states)
                states.append(state)
            row.append(index[state])
        rows.append(row)
    return RegexAutomaton(classes, np.array(rows, np.int32), np.array(accepts))


def _closure(parts: _Parts, threads: frozenset[_Thread], before: _Seen, after: _Seen) -> set[_Thread]:
    """All that can be reached without a character, between these two."""
    reached, left = set(threads), list(threads)
    while left:
        q, duty = left.pop()
        for assertion, to in parts.free[q]:
            promised = _passed(assertion, duty, before, after)
            if promised is not None and (to, promised) not in reached:
                reached.add((to, promised))
                left.append((to, promised))
    return reached


def _passed(assertion: str, duty: int, before: _Seen, after: _Seen) -> int | None:
    """The duty of a thread once it has passed an assertion; None where it does not hold."""
    if assertion == "last_line_ends" and after.line:  # before a line break that must be the last character
        return 1 if duty != 2 else None
    return duty if _holds(assertion, before, after) else None


def _holds(assertion: str, before: _Seen, after: _Seen) -> bool:
    if assertion == "":
        return True
    if assertion in ("begins", "line_begins"):
        return not before.there or (assertion == "line_begins" and before.line)
    if assertion in ("ends", "line_ends", "last_line_ends"):
        return not after.there or (assertion == "line_ends" and after.line)
    if not before.there and not after.there:
        return assertion.startswith("no_boundary") and _EMPTY_HAS_NO_BOUNDARY
    which = "ascii_word" if assertion.endswith("_ASCII") else "word"
    boundary = getattr(before, which) != getattr(after, which)
    return boundary == assertion.startswith("boundary")
