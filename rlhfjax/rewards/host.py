"""Rewards that run in Python on texts.

A host reward is a function f(prompts, completions, **columns) -> list[float | None], as in TRL: lists of N
texts and the columns of the data go in; a number for each sample comes out, or None where it does not apply.
"""

import math
import queue
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence, Set, Sized
from concurrent.futures import CancelledError, Future
from functools import partial
from numbers import Real
from typing import Any

import numpy as np

__all__ = ["HostReward", "RewardPool", "score_on_host"]

HostReward = Callable[..., Sequence[float | None]]


def paired(completions: Sequence[str], reference: Sequence[Any]) -> Iterator[tuple[str, Any]]:
    """Completions with the references of their rows. Raises ValueError where there is not one for each."""
    if len(completions) != len(reference):
        raise ValueError(f"{len(completions)} completions but {len(reference)} references; give one for each")
    return zip(completions, reference, strict=True)


def score_on_host(
    functions: Mapping[str, HostReward],
    weights: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    first: int = 0,
) -> np.ndarray:
    """Weighted sum of the functions' rewards: float32 [N], summed in float64.

    functions, weights: by the same names. columns: each with N entries, handed to every function as keywords.
    first: the number of the first sample in messages. A None adds nothing.

    ValueError, naming function, sample and completion, for a NaN or infinity, a wrong number of rewards, or a sample
    to which no function applies; TypeError for a reward that is no number, or one text in place of a list;
    RuntimeError for a function that raises.
    """
    _check_inputs(functions, weights, prompts, completions, columns)
    total_N = np.zeros(len(completions), np.float64)
    applies_N = np.zeros(len(completions), bool)
    for name, function in functions.items():
        scores = scores_of(name, function, prompts, completions, columns, first=first)
        for i, score in enumerate(scores):
            if score is not None:
                total_N[i] += weights[name] * score
                applies_N[i] = True
    if not applies_N.all():
        i = int(np.argmin(applies_N))
        raise ValueError(
            f"every reward of {list(functions)} gave None for sample {first + i} ({_clip(completions[i])}); "
            "at least one must apply to each sample"
        )
    with np.errstate(over="ignore"):  # told below, by name
        score_N = total_N.astype(np.float32)
    if not np.isfinite(score_N).all():
        i = int(np.argmin(np.isfinite(score_N)))
        raise ValueError(
            f"the rewards of sample {first + i} sum to {total_N[i]}, beyond float32 ({_clip(completions[i])})"
        )
    return score_N


def scores_of(
    name: str,
    function: HostReward,
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
    *,
    first: int = 0,
) -> list[float | None]:
    """What one function gives, every number checked; errors as of `score_on_host`."""
    try:
        rewards = function(prompts=prompts, completions=completions, **columns)
    except Exception as error:
        raise RuntimeError(
            f"reward {name!r} raised {type(error).__name__}: {error} "
            f"({_samples(first, first + len(completions))}: {_clip(''.join(completions[:1]))})"
        ) from error
    if isinstance(rewards, str | bytes | Mapping | Set) or not isinstance(rewards, Sized):
        raise TypeError(f"reward {name!r} gave {type(rewards).__name__}; give a list of numbers")
    if len(rewards) != len(completions):
        raise ValueError(f"reward {name!r} gave {len(rewards)} numbers for {len(completions)} completions")
    return [
        None if reward is None else _checked(reward, name, first + i, completions[i])
        for i, reward in enumerate(rewards)
    ]


class RewardPool:
    """Host rewards in threads: they are scored while the device works, several batches at a time.

        with RewardPool({"judge": judge}, {"judge": 1.0}, workers=8, batch=4, timeout=30) as pool:
            scores = pool.submit(prompts, completions, {"reference": references})
            ...  # something else
            score_N = scores()

    Threads help where a reward waits (a server, a process, a compiler) or leaves Python's lock (NumPy). The functions
    must bear being called from several threads at once, with `batch` texts at a time; one of a batch is scored like
    one of a whole, so a function that compares samples with each other needs a `batch` that holds them.

    Args:
      functions, weights: as in `score_on_host`.
      workers: threads.
      batch: texts of one call.
      timeout: seconds that the scores of one `submit` may take; None: any. A thread cannot be stopped: after a
        time-out it goes on until its function returns, is missing in the pool so long, and does not keep the program
        from ending.
    """

    def __init__(
        self,
        functions: Mapping[str, HostReward],
        weights: Mapping[str, float],
        *,
        workers: int = 4,
        batch: int = 16,
        timeout: float | None = None,
    ) -> None:
        if workers < 1 or batch < 1:
            raise ValueError(f"workers={workers} and batch={batch} must be at least 1")
        if timeout is not None and not timeout > 0:
            raise ValueError(f"timeout={timeout} must be above 0 seconds; None waits for ever")
        _check_inputs(functions, weights, (), (), {})
        self._functions, self._weights = dict(functions), dict(weights)
        self._batch, self._timeout = batch, timeout
        self._jobs: queue.SimpleQueue = queue.SimpleQueue()
        self._threads = [
            threading.Thread(target=_work, args=(self._jobs,), daemon=True) for _ in range(workers)
        ]
        for thread in self._threads:
            thread.start()
        self._closed = False

    def submit(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        columns: Mapping[str, Sequence[Any]] | None = None,
    ) -> Callable[[], np.ndarray]:
        """Hands N texts to the threads; returns a function that waits for the scores, float32 [N].

        It may be called again. It raises what `score_on_host` raises, and TimeoutError naming the samples that are
        waited for.
        """
        if self._closed:
            raise ValueError("the pool is closed; make another RewardPool")
        columns = columns or {}
        _check_inputs(self._functions, self._weights, prompts, completions, columns)
        deadline = None if self._timeout is None else time.monotonic() + self._timeout
        parts: list[tuple[slice, Future]] = []
        for first in range(0, len(completions), self._batch):
            part, future = slice(first, min(first + self._batch, len(completions))), Future()
            some = {name: column[part] for name, column in columns.items()}
            score = partial(
                score_on_host,
                self._functions,
                self._weights,
                prompts[part],
                completions[part],
                some,
                first=first,
            )
            self._jobs.put((future, score))
            parts.append((part, future))

        def scores() -> np.ndarray:
            score_N = np.zeros(len(completions), np.float32)
            for part, future in parts:
                left = None if deadline is None else max(0.0, deadline - time.monotonic())
                try:
                    score_N[part] = future.result(left)
                except CancelledError:
                    raise RuntimeError(
                        f"the pool was closed before {_samples(part.start, part.stop)} had been scored; "
                        "ask for the scores first"
                    ) from None
                except TimeoutError:
                    which = f"{_samples(part.start, part.stop)} of {len(completions)}"
                    raise TimeoutError(
                        f"rewards {list(self._functions)} gave no answer within {self._timeout:g} s for "
                        f"{which} ({_clip(str(completions[part.start]))}); give a longer timeout, "
                        "smaller batches or more workers"
                    ) from None
            return score_N

        return scores

    def close(self) -> None:
        """Ends the threads as soon as they are done with what they have.

        Whoever asks for scores that were not begun by then gets RuntimeError.
        """
        self._closed = True
        while True:
            try:
                job = self._jobs.get_nowait()
            except queue.Empty:
                break
            if job is not None:
                job[0].cancel()
        for _ in self._threads:
            self._jobs.put(None)

    def __enter__(self) -> "RewardPool":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _work(jobs: queue.SimpleQueue) -> None:
    while (job := jobs.get()) is not None:
        future, score = job
        try:
            future.set_result(score())
        except BaseException as error:  # handed to the one who waits
            future.set_exception(error)


def _samples(first: int, end: int) -> str:
    return f"sample {first}" if end - first <= 1 else f"samples {first} to {end - 1}"


def _check_inputs(
    functions: Mapping[str, HostReward],
    weights: Mapping[str, float],
    prompts: Sequence[str],
    completions: Sequence[str],
    columns: Mapping[str, Sequence[Any]],
) -> None:
    if not functions or functions.keys() != weights.keys():
        raise ValueError(f"weights {sorted(weights)} must name the rewards {sorted(functions)}, at least one")
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"the weight of reward {name!r} is {weight}")
    for name, column in {"prompts": prompts, "completions": completions, **columns}.items():
        if isinstance(column, str | bytes):
            raise TypeError(f"{name!r} must be a list with an entry for each sample, not one text")
        if len(column) != len(completions):
            raise ValueError(f"{name!r} has {len(column)} entries for {len(completions)} completions")


def _checked(reward: Any, name: str, index: int, completion: str) -> float:
    """The reward as a finite float. A NumPy or JAX scalar is a number; a text of digits is not."""
    scalar = reward.item() if getattr(reward, "shape", None) == () else reward
    where = f"reward {name!r} gave {reward!r} for sample {index} ({_clip(completion)})"
    if not isinstance(scalar, Real):
        raise TypeError(f"{where}; give a number or None")
    if not math.isfinite(scalar):
        raise ValueError(f"{where}; give a finite number, or None where the reward does not apply")
    return float(scalar)


def _clip(text: str, width: int = 60) -> str:
    return repr(text if len(text) <= width else text[:width] + "...")
