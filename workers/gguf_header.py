"""The header of a GGUF file, looked at before a library reads it: one that lies about what follows would have the
reader take all the memory there is.

Layout: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
"""

from __future__ import annotations

import math
import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

STRING, ARRAY = 8, 9
WIDTHS = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of a value of GGUF's other types."""
NUMBERS = {0: "<B", 2: "<H", 4: "<I", 10: "<Q"}
MOST_ITEMS = 1 << 22
"""Of all arrays of a GGUF file together: the reader has objects for each, and a vocabulary of 256 Ki takes a fifth."""
MOST_DIMENSIONS = 4
ALIGNMENT = 32  # unless the file says otherwise


def check_gguf(file: Path) -> None:
    """Raises ValueError for a file that is no GGUF file, or whose header says what is not there."""
    with file.open("rb") as opened:
        if opened.read(4) != b"GGUF":
            raise ValueError(f"model.source: {file} is not a GGUF file (it does not begin with GGUF)")
        with mmap.mmap(opened.fileno(), 0, access=mmap.ACCESS_READ) as data:
            try:
                _Header(data).check()
            except (UnicodeDecodeError, _Lie) as error:
                raise ValueError(f"model.source: {file} is damaged: {error}") from None


class _Lie(Exception):
    """What a header says is not so."""


class _Header:
    """A GGUF file from its beginning to the end of its header, read without leaving the file."""

    def __init__(self, data: mmap.mmap) -> None:
        self._data = data
        self._place = 4
        self._items = 0

    def check(self) -> None:
        """Raises _Lie, or UnicodeDecodeError, where the header does not fit the file."""
        version, tensors, values = self._take("<IQQ")
        if version not in (2, 3):
            raise _Lie(f"it is of version {version}, and accepted are 2 and 3, little-endian")
        alignment = self._check_values(values, tensors)
        end = max(self._ends(tensors), default=0)
        start = self._place + -self._place % alignment
        if end > len(self._data) - start:
            raise _Lie("tensors are said to lie behind its end")

    def _check_values(self, count: int, tensors: int) -> int:
        """Go through the values by name; the alignment that one of them gives."""
        names: set[str] = set()
        alignment = ALIGNMENT
        for _ in range(count):
            name = self._string().decode()
            if name in names:
                raise _Lie(f"it has {name!r:.60} twice")
            names.add(name)
            number = self._value()
            if name == "general.alignment":
                if number is None or number < 1 or number & (number - 1):
                    raise _Lie(f"its alignment is {number}, which is no power of two")
                alignment = number
            elif name.endswith(".block_count") and number is not None and number > tensors:
                raise _Lie(f"it has {number} blocks, but {tensors} tensors")
        return alignment

    def _value(self) -> int | None:
        """Go over a value; what it is where it is a whole number that cannot be negative."""
        (kind,) = self._take("<I")
        if kind in NUMBERS:
            number: int = self._take(NUMBERS[kind])[0]
            return number
        if kind != ARRAY:
            self._skip(kind, 1)
            return None
        inner, count = self._take("<IQ")
        self._items += count
        if self._items > MOST_ITEMS:
            raise _Lie(f"its arrays have more than {MOST_ITEMS} items")
        self._skip(inner, count)
        return None

    def _skip(self, kind: int, count: int) -> None:
        if kind == STRING:
            for _ in range(count):
                self._string()
        elif kind in WIDTHS:
            self._bytes(WIDTHS[kind] * count)
        else:
            raise _Lie(f"it has a value, or items, of type {kind}, which is none")

    def _ends(self, count: int) -> Iterator[int]:
        """Where tensors end, in bytes after the header."""
        names: set[bytes] = set()
        for _ in range(count):
            name = self._string()
            if name in names:
                raise _Lie(f"it has tensor {name!r:.60} twice")
            names.add(name)
            (dimensions,) = self._take("<I")
            if dimensions > MOST_DIMENSIONS:
                raise _Lie(f"tensor {name!r:.60} has {dimensions} dimensions")
            *shape, kind, offset = self._take(f"<{dimensions}QIQ")
            if kind not in set(GGMLQuantizationType):
                raise _Lie(f"tensor {name!r:.60} is of type {kind}, which there is not")
            block, size = GGML_QUANT_SIZES[GGMLQuantizationType(kind)]
            yield offset + math.prod(shape) * size // block

    def _string(self) -> bytes:
        (length,) = self._take("<Q")
        return self._bytes(length)

    def _bytes(self, length: int) -> bytes:
        if length > len(self._data) - self._place:
            raise _Lie("its header is longer than the file")
        self._place += length
        return self._data[self._place - length : self._place]

    def _take(self, form: str) -> tuple[Any, ...]:
        return struct.unpack(form, self._bytes(struct.calcsize(form)))
