"""Problems, verifiers and environments. Importing the package registers those that come with it."""

from __future__ import annotations

from rewards import composition as composition
from rewards import countdown as countdown
from rewards import guess as guess
from rewards import sudoku as sudoku
