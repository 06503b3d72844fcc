"""Parameters that are corrections to fixed numbers while a guide is fitted."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["Fixed"]


class Fixed(nn.Module):
    """A module whose parameters have fixed numbers beside them while it is in a frame.

    In a frame an optimizer's steps are in units of the posterior's scale.  The fixed numbers are buffers,
    ``fixed_`` and the parameter's name; None outside of a frame, and for what the module does not have.
    """

    names: tuple[str, ...]

    def __init__(self) -> None:
        super().__init__()
        self.register_fixed()

    def register_fixed(self) -> None:
        """Makes the buffers, of a module that is none by this class alone."""
        for name in self.names:
            self.register_buffer(f"fixed_{name}", None)

    @property
    def in_frame(self) -> bool:
        """Whether there are fixed numbers."""
        return any(self._buffers[f"fixed_{name}"] is not None for name in self.names)

    def fixed_or(self, name: str) -> Any:
        """The fixed numbers, without a frame the parameter; None if the module has neither."""
        fixed = getattr(self, f"fixed_{name}")
        return getattr(self, name, None) if fixed is None else fixed

    def fix(self, values: Mapping[str, Tensor]) -> None:
        """Sets the fixed numbers, and leaves the parameters as they are."""
        for name in self.names:
            value = values.get(name)
            setattr(self, f"fixed_{name}", None if value is None else value.detach().clone())

    @torch.no_grad()
    def set_fixed(self, values: Mapping[str, Tensor | None], own: bool = False) -> None:
        """Enters a frame, where parameters are zero; with ``own`` the values become the parameters."""
        self.fix({} if own else {name: value for name, value in values.items() if value is not None})
        for name in self.names:
            value, param = values.get(name), self._parameters.get(name)
            if param is not None:
                param.copy_(value) if own and value is not None else param.zero_()

    def as_fixed(self) -> dict[str, Tensor]:
        """The fixed numbers of a frame in which the module is what it is now."""
        raise NotImplementedError(f"{type(self).__name__}.as_fixed")

    def leave(self) -> None:
        """Makes the parameters what they and the fixed numbers are together."""
        raise NotImplementedError(f"{type(self).__name__}.leave")

    def own_numbers(self) -> dict[str, Tensor]:
        """Copies of the parameters by name."""
        return {name: param.detach().clone() for name, param in self._parameters.items() if param is not None}

    def fixed_numbers(self) -> dict[str, Tensor]:
        """The fixed numbers by name; empty outside of a frame."""
        found = ((name, getattr(self, f"fixed_{name}")) for name in self.names)
        return {name: value.clone() for name, value in found if value is not None}

    def _load_from_state_dict(
        self, state_dict: Mapping[str, Tensor], prefix: str, *args: Any, **kwargs: Any
    ) -> None:
        for name in self.names:
            saved = state_dict.get(f"{prefix}fixed_{name}")
            like = next(self.parameters(), torch.zeros(()))
            self._buffers[f"fixed_{name}"] = None if saved is None else like.new_empty(saved.shape)
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
