"""Wordle in words of tokens: cloning and Q-learning over tokens, from the games of players who do not think much."""

from dataclasses import dataclass, field

from experiments.stages.game_configs import CloneStage, Network, Play, SoftStage, ValueStage
from rlhfjax.config import ILQL, Optimizer

DESCRIPTION = "Wordle of adjustable size, learnt from middling players: ILQL against cloning"


@dataclass(frozen=True)
class Config:
    algorithms: str = "clone,best,monte_carlo,ilql"
    """Which to run, comma-separated: clone, best, ilql, monte_carlo, dqn, soft_q."""
    games: int = 8000
    """Games to learn from."""
    smart: float = 0.4
    """Share of guesses in them that agree with all that was told; the others are any word."""
    words: int = 40
    """Words that may be hidden."""
    letters: int = 3
    """Of a word. With 5 the words are English, otherwise nonsense."""
    alphabet: str = "abcdefgh"
    """Letters that nonsense is made of."""
    tries: int = 5
    """Guesses of a game."""
    memory: int = 0
    """Turns that attention reaches back over; 0: all."""
    best_fraction: float = 0.1
    """Share of the games that are cloned by `best`."""
    network: Network = field(default_factory=Network)
    play: Play = field(default_factory=Play)
    clone: CloneStage = field(
        default_factory=lambda: CloneStage(
            steps=1500, batch=32, optimizer=Optimizer(learning_rate=3e-3, warmup_steps=50)
        )
    )
    best: CloneStage = field(default_factory=lambda: CloneStage(steps=100))
    """From the clone: a tenth of the games is too few to learn spelling from."""
    ilql: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=1500,
            batch=32,
            betas=(2.0, 8.0),
            algorithm=ILQL(discount=1.0, expectile=0.8, polyak=0.05, policy_coefficient=None),
        )
    )
    monte_carlo: ValueStage = field(
        default_factory=lambda: ValueStage(
            steps=1000,
            batch=32,
            betas=(2.0, 8.0),
            algorithm=ILQL(
                bootstrap="returns", discount=1.0, expectile=None, policy_coefficient=None, polyak=1.0
            ),
        )
    )
    dqn: ValueStage = field(
        default_factory=lambda: ValueStage(
            betas=(2.0, 8.0),
            algorithm=ILQL(
                bootstrap="max", discount=1.0, expectile=None, polyak=0.05, policy_coefficient=None
            ),
        )
    )
    soft_q: SoftStage = field(default_factory=SoftStage)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.game_report import known_or_none, solve
    from experiments.stages.games import Task
    from rlhfjax.environments.text import (
        five_letter_words,
        nonsense_words,
        wordle_optimum,
        wordle_player,
        wordle_world,
    )

    if config.letters == 5:
        words = five_letter_words(config.words)
    else:
        words = nonsense_words(config.words, letters=config.letters, alphabet=config.alphabet)
    world = wordle_world(words, tries=config.tries)
    return solve(
        f"Wordle, {config.words} words of {config.letters} letters",
        config,
        Task(world, wordle_player(world, smart=config.smart), config.memory or None),
        folder,
        optimum=known_or_none(wordle_optimum, world),
        players={
            "guesses at random": wordle_player(world, smart=0.0),
            "guesses never contradicted": wordle_player(world, smart=1.0),
        },
        text="A game scores minus its misses.",
    )
