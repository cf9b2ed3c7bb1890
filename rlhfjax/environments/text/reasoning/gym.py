"""The tasks of reasoning-gym (Stojanovski et al. 2025, arXiv:2505.24760), if it is installed.

Each of its data sets makes an item from a seed and a number, and scores a text against the item, from 0 to 1.
"""

from collections.abc import Sequence
from importlib import import_module
from importlib.util import find_spec
from typing import Any

from rlhfjax.environments.text.reasoning.questions import Draw, Question, ReasoningTask

_ITEMS = 2**31  # of a data set, by number


def gym_task(name: str, *, seed: int = 0, **settings: Any) -> ReasoningTask:
    """The task `name` of reasoning-gym with its own settings, such as `min_digits=1`.

    Its questions are drawn by number from the data set of that seed. `verify` gives the score of the data set, which
    may lie between 0 and 1 (a text that is no answer can get 0.01), for prompts that have been drawn from this task
    before: the score needs the item that the prompt came from.

    ModuleNotFoundError without reasoning-gym; ValueError for a task that it does not have, or settings that it refuses.
    """
    if find_spec("reasoning_gym") is None:
        raise ModuleNotFoundError('reasoning-gym is not installed: pip install "rlhfjax[tasks]"')
    library = import_module("reasoning_gym")
    known = sorted(import_module("reasoning_gym.factory").DATASETS)
    if name not in known:
        raise ValueError(f"reasoning-gym has no task {name!r}; it has {', '.join(known)}")
    try:
        data = library.create_dataset(name, size=_ITEMS, seed=seed, **settings)
    except (TypeError, AssertionError, ValueError) as error:
        raise ValueError(f"reasoning-gym refuses the settings {settings} of {name}: {error}") from error
    items: dict[str, Any] = {}  # by prompt, those that have been drawn

    def make(draw: Draw) -> Question:
        item = data[draw(_ITEMS)]
        prompt, answer = item["question"], str(item["answer"])
        items[prompt] = item
        return Question(prompt, answer, answer, prompt)

    def verify(prompts: Sequence[str], completions: Sequence[str], **_: object) -> list[float | None]:
        return [
            float(data.score_answer(completion, _item(items, prompt, name)))
            for prompt, completion in zip(prompts, completions, strict=True)
        ]

    return ReasoningTask(f"gym:{name}", make, verify, one_answer=False)


def _item(items: dict[str, Any], prompt: str, name: str) -> Any:
    if prompt not in items:
        raise ValueError(
            f"the prompt {prompt[:60]!r} has not been drawn from this task, {name}: draw it first"
        )
    return items[prompt]
