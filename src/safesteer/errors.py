"""The errors a user can mend.

Every `SafeSteerError` carries one sentence that says what is wrong and what to do. The command line prints that
sentence and exits with a non-zero status; a library user catches the class.
"""

from __future__ import annotations

from importlib.util import find_spec


class SafeSteerError(Exception):
    """Base class: bad input, an unsupported model, a refused bank."""


class PromptFileError(SafeSteerError):
    """A prompt file is missing, malformed or empty; names the file and, where there is one, the line."""


class UnknownCategoryError(SafeSteerError):
    """A category name that the taxonomy, the prompt set or the bank does not hold."""


class UnsupportedModelError(SafeSteerError):
    """A model, or a site of it, cannot be steered rightly; says why."""


class BankError(SafeSteerError):
    """A bank file is missing, truncated, edited, or of an unknown format."""


class FingerprintMismatchError(BankError):
    """A bank was made for another model; says what differs."""


class PolicyError(SafeSteerError, ValueError):
    """A policy is malformed, or asks for more than the ceiling allows. A `ValueError`, to which pydantic adds the place."""


class SteeringError(SafeSteerError):
    """Steering cannot be guaranteed for this call, so the call fails instead of answering unsteered."""


def need(extra: str, *packages: str) -> None:
    """Raise `SafeSteerError` now, rather than after an hour of work, if a package (by import name) of an extra is absent."""
    absent = [one for one in packages if find_spec(one) is None]
    if absent:
        raise SafeSteerError(f"this needs {' and '.join(absent)}; pip install 'safesteer[{extra}]'")
