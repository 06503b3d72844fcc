"""The bar that shows what a fit is doing, from its first second on."""

from typing import Any, Self

from .._bar import tqdm

__all__ = ["Bar"]


class Bar:
    """A progress bar of steps, which tells in words what comes before them.

    :param name: what stands in front of it.
    :param total: steps at most.
    :param shown: whether there is one at all.
    """

    def __init__(self, name: str = "", total: int = 0, shown: bool = False) -> None:
        self._bar: Any = tqdm(total=total, disable=not shown, desc=name, postfix="set-up")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.close()

    def expect(self, total: int) -> None:
        """Shows how many steps there are at most, where that was not known at first."""
        self._bar.total = total

    def tell(self, what: str, at_once: bool = True) -> None:
        """Shows some words, at once or with the next step."""
        self._bar.set_postfix_str(what, refresh=at_once)

    def begin(self, step: int) -> None:
        """Begins to count steps and their time, of which some have been taken by an earlier run."""
        self.tell("", at_once=False)
        self._bar.reset()
        self._bar.initial = self._bar.n = step

    def end(self, why: str) -> None:
        """Says in the end why it stops where it does; a fit that needs no more steps fills its bar."""
        if why == "converged":
            self._bar.total = self._bar.n
        self.tell(f"{why} at step {self._bar.n}")

    def advance(self, steps: int) -> None:
        """Counts steps that were taken."""
        self._bar.update(steps)
