"""Problems and verifiers. Importing the package registers the verifiers that come with it."""

from __future__ import annotations

from rewards import countdown as countdown
from rewards import sudoku as sudoku
