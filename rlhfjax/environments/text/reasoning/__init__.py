"""Verifiable reasoning: questions by own generators, of any number and difficulty, whose answers can be checked."""

from rlhfjax.environments.text.reasoning.arithmetic import arithmetic, column_steps, product_steps
from rlhfjax.environments.text.reasoning.countdown import (
    Value,
    countdown,
    evaluate_expression,
    verify_countdown,
)
from rlhfjax.environments.text.reasoning.gym import gym_task
from rlhfjax.environments.text.reasoning.questions import (
    SPLITS,
    Question,
    ReasoningTask,
    Split,
    distinct_questions,
    draws,
    final_answer,
    question,
    rows_of,
    split_of,
    verify_answer,
)
from rlhfjax.environments.text.reasoning.sequences import sorting, spelling

__all__ = [
    "SPLITS",
    "Question",
    "ReasoningTask",
    "Split",
    "Value",
    "arithmetic",
    "column_steps",
    "countdown",
    "distinct_questions",
    "draws",
    "evaluate_expression",
    "final_answer",
    "gym_task",
    "product_steps",
    "question",
    "rows_of",
    "sorting",
    "spelling",
    "split_of",
    "verify_answer",
    "verify_countdown",
]
