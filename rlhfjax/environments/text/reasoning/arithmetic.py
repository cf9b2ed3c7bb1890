"""Sums and products of whole numbers, with the steps of written arithmetic where they are asked for.

12+34   -> 46,    with steps 2+4=6;1+3=4;=46
7*58    -> 406,   with steps 7*8=56;7*5=35;56+350=406;=406
"""

from collections.abc import Sequence
from typing import Literal

from rlhfjax.environments.text.reasoning.questions import (
    Draw,
    Question,
    ReasoningTask,
    between,
    check_range,
    verify_answer,
)


def arithmetic(
    operation: Literal["+", "*"] = "+",
    *,
    digits: tuple[int, int] = (1, 2),
    terms: int = 2,
    steps: bool = False,
) -> ReasoningTask:
    """Sums of `terms` numbers, or products of two, of between low and high digits each (every length as likely).

    steps: whether `worked` writes the calculation out: sums column by column from the right, with the carry; products
    digit by digit of the second factor, then added up.

    ValueError for settings out of range.
    """
    check_range("digits", digits, 1)
    if operation not in ("+", "*"):
        raise ValueError(f'operation must be "+" or "*", got {operation!r}')
    if terms < 2 or (operation == "*" and terms != 2):
        raise ValueError(f"terms={terms} must be at least 2 of a sum, and 2 of a product")

    def make(draw: Draw) -> Question:
        numbers = [_number(draw, between(draw, digits)) for _ in range(terms)]
        prompt = operation.join(map(str, numbers))
        value = sum(numbers) if operation == "+" else numbers[0] * numbers[1]
        written = (column_steps(numbers) if operation == "+" else product_steps(*numbers)) if steps else ""
        answer = str(value)
        worked = f"{written}={answer}" if steps else answer
        return Question(prompt, answer, worked, operation.join(map(str, sorted(numbers))))

    return ReasoningTask("arithmetic", make, verify_answer, one_answer=True)


def column_steps(numbers: Sequence[int]) -> str:
    """A sum column by column from the right, the carry last: "7+5=12;4+8+1=13;" of 47 + 85."""
    written, carry = "", 0
    for column in range(max(len(str(x)) for x in numbers)):
        terms = [x // 10**column % 10 for x in numbers if len(str(x)) > column] + [carry] * (carry > 0)
        total = sum(terms)
        written += f"{'+'.join(map(str, terms))}={total};"
        carry = total // 10
    return written


def product_steps(first: int, second: int) -> str:
    """A product digit by digit of the second factor, from the right, then added up: see the module."""
    parts = [first * (second // 10**i % 10) for i in range(len(str(second)))]
    digits = reversed(str(second))
    written = "".join(f"{first}*{digit}={part};" for digit, part in zip(digits, parts, strict=True))
    total = parts[0]
    for i, part in enumerate(parts[1:], 1):
        written += f"{total}+{part * 10**i}={total + part * 10**i};"
        total += part * 10**i
    return written


def _number(draw: Draw, digits: int) -> int:
    """A number of so many digits; of one digit it may be 0."""
    least = 10 ** (digits - 1) if digits > 1 else 0
    return least + draw(10**digits - least)
