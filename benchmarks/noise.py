"""The cost of noise: seconds to draw D standard normal float32 values, by scheme, over the engine's own.

"Access" says whether a block can be drawn without those before it, "key" how many bits tell streams apart: 32 collide.
Blocks are handed to 1 or 2 Python threads; torch itself has one.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from harness import Row, draw, options, report, take_turns

from es_engine import noise

SEED, GENERATION, PAIR = 1, 2, 3
FillBlock = Callable[[noise.Vector, int], None]


@dataclass(frozen=True, slots=True)
class Scheme:
    """A way to write one block of at most `block` values; block 0 is the whole vector."""

    name: str
    fill: FillBlock
    block: int = noise.BLOCK
    access: str = "random"
    key: str = "256"


def main() -> None:
    given = options(__doc__.splitlines()[0])
    torch.set_num_threads(1)
    rows = [
        row
        for dim in (2_400_000, 20_000_000)
        for threads in ((1,) if given.short else (1, 2))
        for row in measure(dim, threads, given.repeats)
    ]
    report("Noise", rows, given)
    if given.plot is not None:
        lines: dict[str, list[tuple[float, float]]] = {}
        for row in rows:
            if row["threads"] == 1:
                lines.setdefault(f"{row['scheme']}, {row['block']}", []).append((row["D"] / 1e6, row["ns/value"]))
        draw(given.plot, "Noise on one thread", "D, millions", "ns/value", lines)


def measure(dim: int, threads: int, repeats: int) -> list[Row]:
    out = np.empty(dim, dtype=np.float32)
    with ThreadPoolExecutor(threads) as pool:
        timings = take_turns({str(at): partial(draw_all, pool, one, out) for at, one in enumerate(SCHEMES)}, repeats)
    rows = []
    for scheme, timing in zip(SCHEMES, timings.values(), strict=True):
        ratio = timing.over(timings["0"])
        low, high = ratio.quartiles
        rows.append(
            {
                "scheme": scheme.name,
                "block": scheme.block or dim,
                "D": dim,
                "threads": threads,
                "ns/value": timing.median / dim * 1e9,
                "over the engine's": ratio.median,
                "quartiles": f"{low:.2f} to {high:.2f}",
                "access": scheme.access,
                "key": scheme.key,
            }
        )
    return rows


def draw_all(pool: ThreadPoolExecutor, scheme: Scheme, out: noise.Vector) -> None:
    size = scheme.block or len(out)
    list(pool.map(lambda start: scheme.fill(out[start : start + size], start // size), range(0, len(out), size)))


def twister_from_philox(out: noise.Vector, block: int) -> None:
    torch.from_numpy(out).normal_(generator=noise._generator(SEED, GENERATION, PAIR, block))


def _philox(block: int) -> np.random.Philox:
    return np.random.Philox(
        key=np.array([SEED, GENERATION], dtype=np.uint64), counter=np.array([0, 0, PAIR, block], dtype=np.uint64)
    )


def numpy_philox(out: noise.Vector, block: int) -> None:
    np.random.Generator(_philox(block)).standard_normal(dtype=np.float32, out=out)


def numpy_sfc64(out: noise.Vector, block: int) -> None:
    stream = np.random.SFC64(np.random.SeedSequence([SEED, GENERATION, PAIR, block]))
    np.random.Generator(stream).standard_normal(dtype=np.float32, out=out)


def box_muller(out: noise.Vector, block: int) -> None:
    """Torch's vectorised functions on 32-bit integers, the first half of them radii and the second angles."""
    half = (len(out) + 1) // 2
    words = _philox(block).random_raw(half).view(np.int32)
    uniform = torch.from_numpy(words).float().mul_(2.0**-32).add_(0.5).clamp_(2.0**-32, 1 - 2.0**-24)
    radius, angle = uniform[:half].log_().mul_(-2).sqrt_(), uniform[half:].mul_(2 * torch.pi)
    values = torch.from_numpy(out)
    torch.mul(radius[: len(out) - half], torch.sin(angle[: len(out) - half]), out=values[half:])
    torch.mul(radius[: len(angle)], angle.cos_(), out=values[:half])


def torch_seeded(out: noise.Vector, block: int) -> None:
    seed = hash((SEED, GENERATION, PAIR, block))
    torch.from_numpy(out).normal_(generator=torch.Generator().manual_seed(seed))


SCHEMES = [
    Scheme("the engine's", lambda out, block: noise.fill_block(out, SEED, GENERATION, PAIR, block)),
    *(Scheme("Philox-filled twister", twister_from_philox, 1 << bits) for bits in (14, 18, 20)),
    Scheme("numpy Philox, ziggurat", numpy_philox),
    Scheme("numpy SFC64, ziggurat", numpy_sfc64, key="hash"),
    Scheme("Philox, Box-Muller", box_muller),
    Scheme("Philox, Box-Muller", box_muller, 1 << 14),
    Scheme("torch, manual_seed a block", torch_seeded, key="32"),
    Scheme("torch, one stream", torch_seeded, 0, access="serial", key="32"),
]


if __name__ == "__main__":
    main()
