"""Where a comparison is, in words."""

from __future__ import annotations

from collections import Counter, defaultdict
from datetime import timedelta
from pathlib import Path
from statistics import mean

from es_engine.compare.plan import Trial, pending, tuning_trials
from es_engine.config import ComparisonConfig
from es_engine.config.base import in_yaml


class Progress:
    """Counts the trials of a comparison, and guesses from those that were done since it was made how long the others
    will take."""

    def __init__(self, comparison: ComparisonConfig, folder: Path) -> None:
        finals = len(comparison.seeds)
        todo = pending(comparison, folder)
        self._total = len(tuning_trials(comparison)) + finals * len(comparison.runs)
        self._left = Counter(trial.run for trial in todo)
        if todo and todo[0].purpose == "tuning":  # then no final run has begun
            self._left.update(dict.fromkeys(comparison.runs, finals))
        self._seconds: defaultdict[str, list[float]] = defaultdict(list)

    def title(self, trial: Trial) -> str:
        """Which of the trials is next, what its grid gives it, and about how long it and all after it will take."""
        place = self._total - self._left.total() + 1
        setting = ", ".join(f"{field} {in_yaml(value)}" for field, value in trial.setting.items())
        left = self._seconds_left
        about = "" if left is None else f" (about {timedelta(seconds=round(left))} left)"
        return f"[{place} of {self._total}] {trial.folder}{setting and ': '}{setting}{about}"

    def done(self, trial: Trial, seconds: float) -> None:
        """A trial was finished, and took so long."""
        self._left[trial.run] -= 1
        self._seconds[trial.run].append(seconds)

    @property
    def _seconds_left(self) -> float | None:
        """A trial takes as long as those of its run; where none of them is done, as those of the other runs."""
        if not self._seconds:
            return None
        usual = {run: mean(seconds) for run, seconds in self._seconds.items()}
        of_others = mean(usual.values())
        return sum(count * usual.get(run, of_others) for run, count in self._left.items())
