"""Products with many adapters, and the writing of adapters, on a CPU: loops that numba compiles on first use.

torch has no call for them: a group of a dozen tokens is too small for a matrix product of its own to be worth its
start, and uneven groups must be gathered and padded for a batched one. Here every token's product is summed in float32
and rounded once, and its bits do not depend on the tokens beside it, nor on where anything lies in memory.

numba has no 16-bit floats: bfloat16 comes as uint16 and float16 as int16 (`as_array`).

Shapes: T tokens, G groups of tokens with one slot, S slots, n parts of a packed layer, r slot rank, K = n*r.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import numba
import numpy as np
import numpy.typing as npt
import torch
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

Array = npt.NDArray[Any]

COLUMNS = 256
"""Columns of a tile: its B, widened, and a row's sum stay in the first level of the cache."""

SPAN = 2048
"""Coordinates that are put in a slot's order at a time."""

_WHOLE = {torch.bfloat16: torch.uint16, torch.float16: torch.int16}
_FLOAT, _INT32, _HALF = ir.FloatType(), ir.IntType(32), ir.HalfType()


def as_array(tensor: torch.Tensor) -> Array:
    """A CPU tensor's memory as the kernels take it."""
    return tensor.view(_WHOLE.get(tensor.dtype, tensor.dtype)).numpy()


def tiles(outs: tuple[int, ...]) -> Array:
    """The columns (n_tiles, 3) of a packed layer whose parts have so many: first, past the last, and the part."""
    bounds = np.cumsum([0, *outs]).tolist()
    return np.array(
        [
            (start, min(start + COLUMNS, bounds[part + 1]), part)
            for part, first in enumerate(bounds[:-1])
            for start in range(first, bounds[part + 1], COLUMNS)
        ]
    )


def add_expanded(
    y: Array, shrunk: Array, b: Array, tokens: Array, bounds: Array, slots: Array, tiles: Array, *, threads: int = 1
) -> None:
    """y[t] += B[slot of t] shrunk[t], in place, for y (T, out), shrunk (T, K) and b (S, r, out).

    Group g is `tokens[bounds[g]:bounds[g+1]]`, whose slot is `slots[g]`; `tiles` are those of the layer.
    """
    kernel = _choose(threads, _add_expanded, _add_expanded_in_parallel)
    kernel(y, shrunk, b, tokens, bounds, slots, tiles)


def shrink(out: Array, x: Array, a: Array, tokens: Array, bounds: Array, slots: Array, *, threads: int = 1) -> None:
    """out[t] = A[slot of t] x[t] for x (T, in), a (S, K, in) and out (T, K); groups as in `add_expanded`, rows of other
    tokens stay as they are."""
    kernel = _choose(threads, _shrink, _shrink_in_parallel)
    kernel(out, x, a, tokens, bounds, slots)


def start_threads() -> int:
    """Start as many threads for the kernels as torch has here, and return their number. To be called before vLLM binds
    the calling thread to one core: the threads keep to the cores it had when they began."""
    threads = min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS)
    if threads > 1:
        numba.set_num_threads(threads)
    return threads


def _choose(threads: int, alone: Callable[..., None], in_parallel: Callable[..., None]) -> Callable[..., None]:
    if threads == 1:
        return alone
    numba.set_num_threads(threads)  # numba remembers it for each calling thread
    return in_parallel


@intrinsic
def _widen(_: Any, value: Any) -> Any:
    """A number of any type here as a float32."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        (number,) = arguments
        if value == types.float32:
            return number
        if value == types.int16:
            return builder.fpext(builder.bitcast(number, _HALF), _FLOAT)
        return builder.bitcast(builder.shl(builder.zext(number, _INT32), _INT32(16)), _FLOAT)

    return types.float32(value), generate


@intrinsic
def _narrow(_: Any, value: Any, like: Any) -> Any:
    """A float32 in the type of `like`, rounded to nearest, ties to even."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        number, _ = arguments
        if like == types.float32:
            return number
        if like == types.int16:
            return builder.bitcast(builder.fptrunc(number, _HALF), ir.IntType(16))
        bits = builder.bitcast(number, _INT32)
        odd = builder.and_(builder.lshr(bits, _INT32(16)), _INT32(1))
        rounded = builder.add(builder.add(bits, _INT32(0x7FFF)), odd)
        is_nan = builder.fcmp_unordered("uno", number, number)
        kept = builder.select(is_nan, _INT32(0x7FC00000), rounded)
        return builder.trunc(builder.lshr(kept, _INT32(16)), ir.IntType(16))

    return like(types.float32, like), generate


@intrinsic
def _fused(_: Any, a: Any, b: Any, c: Any) -> Any:
    """a*b + c, rounded once."""

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        return builder.fma(*arguments)

    return types.float32(types.float32, types.float32, types.float32), generate


def _expand(y: Array, shrunk: Array, b: Array, tokens: Array, bounds: Array, slots: Array, tiles: Array) -> None:
    rank = b.shape[1]
    eights = rank - rank % 8
    for item in numba.prange(len(slots) * len(tiles)):
        group, tile = item // len(tiles), item % len(tiles)
        start, stop, part = tiles[tile, 0], tiles[tile, 1], tiles[tile, 2]
        columns = stop - start
        wide = np.empty((rank, columns), np.float32)
        for k in range(rank):
            narrow_row, wide_row = b[slots[group], k, start:stop], wide[k]
            for j in range(columns):
                wide_row[j] = _widen(narrow_row[j])
        total = np.empty(columns, np.float32)
        for place in range(bounds[group], bounds[group + 1]):
            token = tokens[place]
            row = y[token, start:stop]
            h = shrunk[token, part * rank : (part + 1) * rank]
            for j in range(columns):
                total[j] = _widen(row[j])
            for k in range(0, eights, 8):
                b0, b1, b2, b3 = wide[k], wide[k + 1], wide[k + 2], wide[k + 3]
                b4, b5, b6, b7 = wide[k + 4], wide[k + 5], wide[k + 6], wide[k + 7]
                h0, h1, h2, h3 = _widen(h[k]), _widen(h[k + 1]), _widen(h[k + 2]), _widen(h[k + 3])
                h4, h5, h6, h7 = _widen(h[k + 4]), _widen(h[k + 5]), _widen(h[k + 6]), _widen(h[k + 7])
                for j in range(columns):
                    total[j] += (h0 * b0[j] + h1 * b1[j] + h2 * b2[j] + h3 * b3[j]) + (
                        h4 * b4[j] + h5 * b5[j] + h6 * b6[j] + h7 * b7[j]
                    )
            for k in range(eights, rank):
                b0, h0 = wide[k], _widen(h[k])
                for j in range(columns):
                    total[j] += h0 * b0[j]
            for j in range(columns):
                row[j] = _narrow(total[j], row[j])


def _shrink_rows(out: Array, x: Array, a: Array, tokens: Array, bounds: Array, slots: Array) -> None:
    rows, fan_in = a.shape[1], a.shape[2]
    blocks = (rows + 3) // 4
    for item in numba.prange(len(slots) * blocks):
        group, first = item // blocks, item % blocks * 4
        count = min(4, rows - first)
        wide = np.empty(fan_in, np.float32)
        four = np.empty((4, fan_in), np.float32)
        for row in range(4):
            narrow_row, wide_row = a[slots[group], first + min(row, count - 1)], four[row]
            for i in range(fan_in):
                wide_row[i] = _widen(narrow_row[i])
        a0, a1, a2, a3 = four[0], four[1], four[2], four[3]
        for place in range(bounds[group], bounds[group + 1]):
            token = tokens[place]
            narrow_x = x[token]
            for i in range(fan_in):
                wide[i] = _widen(narrow_x[i])
            s0, s1, s2, s3 = np.float32(0), np.float32(0), np.float32(0), np.float32(0)
            for i in range(fan_in):
                s0 += a0[i] * wide[i]
                s1 += a1[i] * wide[i]
                s2 += a2[i] * wide[i]
                s3 += a3[i] * wide[i]
            for row, total in enumerate((s0, s1, s2, s3)):
                if row < count:
                    out[token, first + row] = _narrow(total, out[token, first + row])


_add_expanded = numba.njit(_expand, nogil=True, fastmath={"contract"})
_add_expanded_in_parallel = numba.njit(_expand, nogil=True, fastmath={"contract"}, parallel=True)
_shrink = numba.njit(_shrink_rows, nogil=True, fastmath={"contract", "reassoc"})
_shrink_in_parallel = numba.njit(_shrink_rows, nogil=True, fastmath={"contract", "reassoc"}, parallel=True)


@cache
def factor_writer(rank: int) -> Callable[..., None]:
    """A kernel `write(memory, center, eps, alpha, table, scales)` that puts factors of theta = center + alpha*eps, each
    times its scale, into a slot.

    `memory` is that of all slots, flat; center and eps are (D,). A row of `table` (factors, 7) is a factor's place in
    theta, its rows and columns there, the stride of its rows there; the place of its first number in memory, the stride
    of its rows there, and that of its columns. It is compiled for one LoRA rank, because a B, (out, r) in theta, lies
    as (r, out) in a slot, and with r known that order is changed in registers.
    """

    @numba.njit(nogil=True)
    def write(memory: Array, center: Array, eps: Array, alpha: Any, table: Array, scales: Array) -> None:
        buffer = np.empty(SPAN, np.float32)
        step = max(1, SPAN // rank)
        for m in range(len(scales)):
            source, rows, columns, leap, target, down, across = table[m]
            if down == 1 and columns == rank:
                for first in range(0, rows, step):
                    some = min(step, rows - first)
                    start = source + first * rank
                    span, noise = center[start : start + some * rank], eps[start : start + some * rank]
                    for i in range(some * rank):
                        buffer[i] = scales[m] * _fused(alpha, noise[i], span[i])
                    for k in range(rank):
                        place = memory[target + k * across + first : target + k * across + first + some]
                        for i in range(some):
                            place[i] = _narrow(buffer[i * rank + k], place[i])
            else:
                for row in range(rows):
                    start = source + row * leap
                    span, noise = center[start : start + columns], eps[start : start + columns]
                    place = memory[target + row * down : target + row * down + columns]
                    for i in range(columns):
                        place[i] = _narrow(scales[m] * _fused(alpha, noise[i], span[i]), place[i])

    return write
