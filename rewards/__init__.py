"""Problems, verifiers and environments. Importing the package registers those that come with it."""

from __future__ import annotations

from rewards import arc as arc
from rewards import chat as chat
from rewards import composition as composition
from rewards import conciseness as conciseness
from rewards import countdown as countdown
from rewards import guess as guess
from rewards import maths as maths
from rewards import reward_model as reward_model
from rewards import sudoku as sudoku
