"""Countdown: reach a target from given numbers by + - * / and parentheses. Any expression that does so is right.

    3 5 8=16   ->   3+5+8, or 8+(5+3), or ...

What a policy wrote is read by a parser of its own, never by Python's.
"""

from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import NamedTuple

from rlhfjax.environments.text.reasoning.questions import (
    Draw,
    Question,
    ReasoningTask,
    Verifier,
    between,
    check_range,
)

_DEEPEST = 32  # open parentheses: more is no answer
_LONGEST = 256  # characters
_BINDING = {"+": 1, "-": 1, "*": 2, "/": 2}


class Value(NamedTuple):
    """An expression's value, and the numbers that it was made of, in the order written."""

    value: Fraction
    numbers: tuple[int, ...]


def countdown(
    *,
    numbers: tuple[int, int] = (3, 4),
    largest: int = 20,
    largest_target: int = 99,
    operations: str = "+-*/",
    use_all: bool = True,
) -> ReasoningTask:
    """Between low and high numbers from 1 to `largest`, and a target from 1 to `largest_target`, that can be reached.

    The worked answer uses all numbers, and nothing on its way is below 1 or broken; a right answer may.

    use_all: whether a right answer must use all numbers; each may be used once at most in any case.

    ValueError for settings out of range.
    """
    check_range("numbers", numbers, 2)
    if largest < 1 or largest_target < 1:
        raise ValueError(f"largest={largest} and largest_target={largest_target} must be at least 1")
    if not operations or not set(operations) <= set(_BINDING):
        raise ValueError(f"operations={operations!r} must be some of {''.join(_BINDING)}")

    def make(draw: Draw) -> Question:
        for _ in range(10_000):
            given = [1 + draw(largest) for _ in range(between(draw, numbers))]
            made = _combine(draw, given, operations)
            if made is not None and 1 <= made[0] <= largest_target:
                target, expression = made
                prompt = f"{' '.join(map(str, given))}={target}"
                key = f"{' '.join(map(str, sorted(given)))}={target}"
                return Question(prompt, expression, expression, key)
        raise ValueError(
            f"no target up to {largest_target} is reached from {numbers} numbers up to {largest} by {operations!r}"
        )

    return ReasoningTask("countdown", make, verify_countdown(use_all=use_all), one_answer=False)


def verify_countdown(*, use_all: bool = True) -> Verifier:
    """1.0 where a completion is an expression of the prompt's numbers that equals its target; else 0.0.

    The verifier raises ValueError for a prompt that is none of this task.
    """

    def verify(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float | None]:
        return [float(_reaches(*pair, use_all)) for pair in zip(prompts, completions, strict=True)]

    return verify


def evaluate_expression(text: str) -> Value | None:
    """Value of an expression of whole numbers, + - * / and parentheses, spaces between them allowed; None: it is none.

    As Python reads it, but for what Python also knows: no sign before a number, no `//`, no `**`. None too for a
    division by zero, more than 256 characters, and 33 parentheses open at a time.
    """
    # Operator precedence with two stacks (Dijkstra's shunting yard), so that no depth of nesting is recursion.
    tokens = _tokens(text)
    if tokens is None:
        return None
    values: list[Value] = []
    waiting: list[str] = []  # operators and open parentheses
    after_value, depth = False, 0
    for token in tokens:
        if token == "(" or token.isdigit():
            if after_value:
                return None
            if token == "(":
                waiting.append(token)
                depth += 1
                if depth > _DEEPEST:
                    return None
                continue
            values.append(Value(Fraction(int(token)), (int(token),)))
            after_value = True
            continue
        if not after_value:
            return None
        binding = _BINDING.get(token, 0)  # a closing parenthesis applies all up to its opening one
        while waiting and waiting[-1] != "(" and _BINDING[waiting[-1]] >= binding:
            if not _apply(waiting.pop(), values):
                return None
        if token == ")":
            if not waiting:
                return None
            waiting.pop()
            depth -= 1
            continue
        waiting.append(token)
        after_value = False
    if not after_value or depth:
        return None
    while waiting:
        if not _apply(waiting.pop(), values):
            return None
    return values[0]


def _tokens(text: str) -> list[str] | None:
    """Numbers and signs; None where there is anything else, a number with a leading zero, or too much."""
    if len(text) > _LONGEST:
        return None
    found, number = [], ""
    for character in f"{text} ":
        if character in "0123456789":
            number += character
            continue
        if number:
            if number[0] == "0" and number.strip("0"):
                return None
            found.append(number)
            number = ""
        if character in "+-*/()":
            found.append(character)
        elif character != " ":
            return None
    return found


def _apply(sign: str, values: list[Value]) -> bool:
    """Takes two values off the stack and puts theirs on; False where it has none."""
    (left, before), (right, after) = values[-2:]
    if sign == "/" and right == 0:
        return False
    value = (
        left + right
        if sign == "+"
        else left - right
        if sign == "-"
        else left * right
        if sign == "*"
        else left / right
    )
    values[-2:] = [Value(value, before + after)]
    return True


def _reaches(prompt: str, completion: str, use_all: bool) -> bool:
    numbers, separator, target = prompt.partition("=")
    try:
        given, wanted = Counter(map(int, numbers.split())), int(target)
    except ValueError:
        separator = ""
    if not separator:
        raise ValueError(f"prompt {prompt!r} is no countdown: it reads NUMBER NUMBER ...=TARGET")
    made = evaluate_expression(completion)
    if made is None or made.value != wanted:
        return False
    used = Counter(made.numbers)
    return used == given if use_all else used <= given


def _combine(draw: Draw, numbers: Sequence[int], operations: str) -> tuple[int, str] | None:
    """Joins two terms at a time, at random, until one is left: (value, expression). None: a step was not allowed."""
    terms = [(value, str(value), 3) for value in numbers]  # value, text, binding of its outermost sign
    while len(terms) > 1:
        left = terms.pop(draw(len(terms)))
        right = terms.pop(draw(len(terms)))
        sign = operations[draw(len(operations))]
        if (sign == "-" and left[0] <= right[0]) or (sign == "/" and left[0] % right[0]):
            return None
        value = {
            "+": left[0] + right[0],
            "-": left[0] - right[0],
            "*": left[0] * right[0],
            "/": left[0] // right[0],
        }[sign]
        binding = _BINDING[sign]
        first = left[1] if left[2] >= binding else f"({left[1]})"
        # Behind - and / a term that binds as loosely would be read otherwise.
        loose = right[2] < binding or (right[2] == binding and sign in "-/")
        terms.append((value, f"{first}{sign}{f'({right[1]})' if loose else right[1]}", binding))
    return terms[0][0], terms[0][1]
