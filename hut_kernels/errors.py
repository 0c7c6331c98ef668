"""The one exception type of the package's own, and the check of an option that is one of a few."""

from __future__ import annotations

from collections.abc import Sequence


class HUTBackendError(RuntimeError):
    """A backend or a kind of weight that cannot be used here; the message names what is missing."""


def check_choice(name: str, value: object, allowed: Sequence[str]) -> None:
    """Refuses an option that is not one of `allowed` (ValueError)."""
    if value not in allowed:
        raise ValueError(f"{name} must be one of {', '.join(allowed)}; got {value!r}")
