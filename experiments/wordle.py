"""Wordle in words of tokens: cloning and Q-learning over tokens, from the games of players who do not think much."""

from dataclasses import dataclass

from experiments.stages.game_configs import Learning

DESCRIPTION = "Wordle of adjustable size, learnt from middling players: ILQL against cloning"


@dataclass(frozen=True)
class Config(Learning):
    smart: float = 0.6
    """Share of guesses in the games that agree with all that was told; the others are any word."""
    words: int = 40
    """Words that may be hidden."""
    letters: int = 3
    """Of a word. With 5 the words are English, otherwise nonsense."""
    alphabet: str = "abcdefgh"
    """Letters that nonsense is made of."""
    tries: int = 5
    """Guesses of a game."""
    memory: int | None = None
    """Turns that attention reaches back over; None: all."""


def plan(config: Config, mesh) -> list:
    """The programs of all stages, as shapes."""
    from experiments.stages.game_programs import programs_of_games

    return programs_of_games(config, _task(config), mesh)


def run(config: Config, folder) -> dict[str, float]:
    """Runs everything; returns the numbers of summary.json."""
    from experiments.stages.game_report import known_or_none, solve
    from rlhfjax.environments.text import wordle_optimum, wordle_player

    task = _task(config)
    world = task.world
    return solve(
        f"Wordle, {config.words} words of {config.letters} letters",
        config,
        task,
        folder,
        optimum=known_or_none(wordle_optimum, world),
        players={
            "guesses at random": wordle_player(world, smart=0.0),
            "guesses never contradicted": wordle_player(world, smart=1.0),
        },
        text="A game scores minus its misses.",
    )


def _task(config: Config):
    """The game, and who played the games to learn from."""
    from experiments.stages.games import Task
    from rlhfjax.environments.text import five_letter_words, nonsense_words, wordle_player, wordle_world

    if config.letters == 5:
        words = five_letter_words(config.words)
    else:
        words = nonsense_words(config.words, letters=config.letters, alphabet=config.alphabet)
    world = wordle_world(words, tries=config.tries)
    return Task(world, wordle_player(world, smart=config.smart), config.memory)
