"""Problems and verifiers. Importing the package registers the verifiers that come with it."""

from __future__ import annotations

from rewards import arc as arc
from rewards import conciseness as conciseness
from rewards import countdown as countdown
from rewards import maths as maths
