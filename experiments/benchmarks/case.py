"""What a case of the benchmarks is."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax


class Case(NamedTuple):
    """One step and what it works on.

    Shapes in place of arrays (`jax.eval_shape`) make a case that is compiled and not run.
    """

    step: Callable[[Any, Any, jax.Array], tuple[Any, Any]]  # (state, inputs, key) -> (state, outputs)
    state: Any  # donated to the step
    inputs: Any  # read only
    tokens: int  # in a step, as a user counts them: generated, or trained on
    count: Callable[[Any], Any]  # outputs -> the tokens or environment steps the program itself saw
    flops: float  # of the matrix products a step cannot do without
    sizes: dict[str, Any]
    environment_steps: int = 0  # in a step, in place of tokens

    @property
    def runs(self) -> bool:
        """Whether there are arrays to run on."""
        leaves = jax.tree.leaves((self.state, self.inputs))
        return not any(isinstance(x, jax.ShapeDtypeStruct) for x in leaves)
