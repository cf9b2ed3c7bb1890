"""What may look at a stage's metrics and end it early, and the way back to an earlier state of it."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax

from rlhfjax import processes
from rlhfjax.checkpoint import Checkpoints
from rlhfjax.run_folder import RunFolder


@dataclass(frozen=True)
class Watch:
    """What looks at the metrics of a stage. Its answers are functions of the metrics that it was shown, so that a
    resumed run, which shows it again what had been logged, comes to the same.

    Metrics of step s are known when step s + 1 has been started. So what they decide acts on step s + 2 at the
    earliest, and always does so there, however soon a checkpoint made them known.
    """

    observe: Callable[[int, Mapping[str, Any]], tuple[Mapping[str, float], Sequence[str]]]
    """(step, its metrics) -> metrics to be logged with them, lines for the terminal. Once for each step, in order."""
    over: Callable[[int], bool]
    """Whether the stage ends when so many steps are done. Goes by metrics of earlier steps only."""
    kept: Callable[[], int | None]
    """Of a stage that ended so: after how many steps its state is the one to return; None: the last."""


def state_after(
    kept: int,
    name: str,
    folder: RunFolder,
    checkpoints: Checkpoints,
    *,
    init: Callable[[], Any],
    step: Callable[..., tuple],
    batch: Callable[[int], Any] | None,
) -> Any:
    """The state of stage `name` after `kept` steps: from the newest checkpoint at or before it by doing the steps since
    then again. It is kept in a checkpoint of its own, of the stage NAME-held."""
    with Checkpoints(folder.checkpoints(f"{name}-held"), keep=1) as own:
        found = own.restore_latest(init())
        if found is not None and found[0] == kept:
            return found[1]
        earlier = processes.from_first(
            f"checkpoints of {name} up to {kept}", lambda: [s for s in checkpoints.steps() if s <= kept]
        )
        state = checkpoints.restore(earlier[-1], init()) if earlier else init()
        for i in range(earlier[-1] if earlier else 0, kept):
            state = jax.block_until_ready(step(state, *(() if batch is None else (batch(i),)), i)[0])
        if found is None:
            own.save(kept, state)
            own.wait()
    return state
