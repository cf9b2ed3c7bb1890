"""Worlds in words with known answers, scripted players of them, and games as rows of tokens."""

from rlhfjax.environments.text.conversation import (
    Conversation,
    Exchanges,
    Player,
    as_rows,
    converse,
    render,
    row_length,
)
from rlhfjax.environments.text.guess_who import (
    guess_who_optimum,
    guess_who_player,
    guess_who_world,
    people,
)
from rlhfjax.environments.text.guessing import best_score
from rlhfjax.environments.text.maze import DOUBLE_T, MOVES, maze_player, maze_score, maze_table, maze_world
from rlhfjax.environments.text.star_graph import star_graph_player, star_graph_world
from rlhfjax.environments.text.text_world import (
    PAD,
    TextWorld,
    Utterance,
    decode,
    encode,
    phrases,
    say,
    text_world,
    understand,
)
from rlhfjax.environments.text.things import Things, every_box, everyday_things
from rlhfjax.environments.text.twenty_questions import (
    twenty_questions_optimum,
    twenty_questions_player,
    twenty_questions_world,
)
from rlhfjax.environments.text.wordle import (
    five_letter_words,
    nonsense_words,
    wordle_optimum,
    wordle_player,
    wordle_words,
    wordle_world,
)

__all__ = [
    "DOUBLE_T",
    "MOVES",
    "PAD",
    "Conversation",
    "Exchanges",
    "Player",
    "TextWorld",
    "Things",
    "Utterance",
    "as_rows",
    "best_score",
    "converse",
    "decode",
    "encode",
    "every_box",
    "everyday_things",
    "five_letter_words",
    "guess_who_optimum",
    "guess_who_player",
    "guess_who_world",
    "maze_player",
    "maze_score",
    "maze_table",
    "maze_world",
    "nonsense_words",
    "people",
    "phrases",
    "render",
    "row_length",
    "say",
    "star_graph_player",
    "star_graph_world",
    "text_world",
    "twenty_questions_optimum",
    "twenty_questions_player",
    "twenty_questions_world",
    "understand",
    "wordle_optimum",
    "wordle_player",
    "wordle_words",
    "wordle_world",
]
