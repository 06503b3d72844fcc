"""What an objective of path gradients asks of a guide: draws that come with the score of their density."""

from pyro.poutine.messenger import Messenger

from .pyro_private import PYRO_STACK

__all__ = ["Scoring", "is_scoring"]


class Scoring(Messenger):
    """A handler within which draws of a guide's flow are made with the score of their density."""


def is_scoring() -> bool:
    """Whether draws are wanted with their scores; ``poutine.block`` hides sites, not this."""
    return any(isinstance(handler, Scoring) for handler in PYRO_STACK)
