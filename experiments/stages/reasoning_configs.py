"""Settings of the experiment on questions that can be checked. No jax here, so that `--help` answers at once."""

from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class Arithmetic:
    """Sums, or products of two numbers."""

    operation: Literal["+", "*"] = "+"
    """Of all the numbers."""
    digits: tuple[int, int] = (1, 2)
    """Least and most digits of a number."""
    harder: tuple[int, int] = (3, 3)
    """The same of the harder questions, which are never trained on."""
    terms: int = 2
    """Numbers of a sum."""
    steps: bool = False
    """Whether fine-tuning shows the steps of written arithmetic before the answer; raise text.completion_length."""


@dataclass(frozen=True)
class Countdown:
    """Reach a target from given numbers."""

    numbers: tuple[int, int] = (3, 3)
    """Least and most numbers given."""
    harder: tuple[int, int] = (4, 4)
    """The same of the harder questions, which are never trained on."""
    largest: int = 20
    """Of the numbers."""
    largest_target: int = 99
    """Of the targets."""
    operations: str = "+-*"
    """Signs that the questions are made with; an answer may use all four."""
    use_all: bool = True
    """Whether an answer must use all numbers."""


@dataclass(frozen=True)
class Sorting:
    """Put numbers in order."""

    numbers: tuple[int, int] = (4, 5)
    """Least and most numbers given."""
    harder: tuple[int, int] = (6, 6)
    """The same of the harder questions, which are never trained on."""
    largest: int = 99
    """Of the numbers."""
    descending: bool = False
    """Whether the largest comes first."""


@dataclass(frozen=True)
class Spelling:
    """Spell a word backwards, or count a letter of it."""

    kind: Literal["backward", "count"] = "backward"
    """What is asked."""
    length: tuple[int, int] = (7, 9)
    """Least and most letters of a word."""
    harder: tuple[int, int] = (10, 10)
    """The same of the harder questions, which are never trained on."""
    steps: bool = False
    """Of counting: whether fine-tuning shows how to count along the word; raise text.completion_length."""


@dataclass(frozen=True)
class Gym:
    """A task of reasoning-gym, where `task` is gym:NAME."""

    settings: tuple[str, ...] = ()
    """Its own settings, each NAME=VALUE with a value as Python writes it."""
    harder: tuple[str, ...] = ()
    """Those of the harder questions, which are never trained on; empty: there are none."""


@dataclass(frozen=True)
class PassAtK:
    """How often one of k samples is right, before and after."""

    samples: int = 16
    """Samples of each question."""
    questions: int = 128
    """Questions of each kind, the first ones."""


@dataclass(frozen=True)
class Questions:
    """What is asked, and how much of it."""

    seed: int = 0
    """That they are drawn with, whatever the run's: runs of other seeds are asked the same."""
    train: int = 3200
    """Questions of the training split; text.sft_share of them are for fine-tuning, the rest for what comes after."""
    heldout: int = 256
    """Of the validation split, of the test split, and harder ones: as many of each."""
    arithmetic: Arithmetic = field(default_factory=Arithmetic)
    countdown: Countdown = field(default_factory=Countdown)
    sorting: Sorting = field(default_factory=Sorting)
    spelling: Spelling = field(default_factory=Spelling)
    gym: Gym = field(default_factory=Gym)
