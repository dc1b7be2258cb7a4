"""What a model that diverged leaves in vLLM's KV cache on a CPU, and how others are kept from it.

Attention there reads whole blocks and multiplies what lies past a sequence's end by 0, and 0 times NaN is NaN: the
keys and values of a member without finite numbers would be in the answers of whoever is given its blocks next.
"""

from __future__ import annotations

from typing import Any

import torch


class StaleCache:
    """Takes numbers that are not finite out of the cache of a model runner."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self._seen = torch.zeros(())  # a sum: not finite where one of its terms was not
        if runner.device.type == "cpu":
            runner.sampler.register_forward_pre_hook(self._look, with_kwargs=True)

    def clean(self) -> None:
        """To be called before each round of answers: where logits of the last were not finite, clean the cache."""
        if not self._seen.isfinite():
            for cache in self._runner.kv_caches:
                cache.nan_to_num_()
        self._seen.zero_()

    def _look(self, _: Any, __: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        # Keys and values that are not finite make all logits of their token so, of which one is looked at.
        self._seen += keywords["logits"][:, 0].sum(dtype=torch.float32)
