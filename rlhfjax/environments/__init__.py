"""Environments: worlds to act in, as pure functions.

`enumerable` is a language model small enough that nothing about it has to be estimated.
"""

from rlhfjax.environments import enumerable
from rlhfjax.environments.enumerable import Sequences

__all__ = ["Sequences", "enumerable"]
