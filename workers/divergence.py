"""Numbers that are not finite: a worker's fault once, and where they come again that of what it was given."""

from __future__ import annotations


class NotFinite(str):
    """What is wrong with a reply whose numbers are not finite, in words. The worker may be broken, or the model that it
    was given leads there."""


class Diverged(ValueError):
    """Training has led to where numbers are no longer finite."""
