"""Who listens to what while a run goes on."""

from __future__ import annotations

import ipaddress
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import ray

LISTENING = "0A"  # as <net/tcp_states.h> has it


@dataclass
class Looked:
    """The programs among the descendants of this process that listened, with the addresses that they listened to; and
    where Ray wrote its logs."""

    addresses: set[tuple[str, str]] = field(default_factory=set)
    ray_logs: Path = Path()


def look_before(owner: type, method: str, monkeypatch: pytest.MonkeyPatch) -> Looked:
    """Look each time before a method is called."""
    looked, call = Looked(), getattr(owner, method)

    def look_and_call(*arguments: Any) -> Any:
        looked.addresses |= listening()
        looked.ray_logs = Path(ray._private.worker._global_node.get_logs_dir_path())
        return call(*arguments)

    monkeypatch.setattr(owner, method, look_and_call)
    return looked


def listening() -> set[tuple[str, str]]:
    """(program, address) of every TCP socket that this process and its descendants listen to."""
    addresses = {inode: address for table in ("tcp", "tcp6") for inode, address in _sockets(Path(f"/proc/net/{table}"))}
    found = set()
    for process in _descendants(os.getpid()):
        try:
            links = {os.readlink(link) for link in Path(f"/proc/{process}/fd").iterdir()}
            program = Path(f"/proc/{process}/comm").read_text().strip()
        except OSError:  # it has ended
            continue
        found |= {(program, address) for inode, address in addresses.items() if f"socket:[{inode}]" in links}
    return found


def _sockets(table: Path) -> list[tuple[str, str]]:
    rows = [line.split() for line in table.read_text().splitlines()[1:]] if table.exists() else []
    return [(row[9], _address(row[1].partition(":")[0])) for row in rows if row[3] == LISTENING]


def _address(digits: str) -> str:
    """The kernel writes 32 bits at a time, in the machine's order of bytes."""
    words = [bytes.fromhex(digits[place : place + 8])[::-1] for place in range(0, len(digits), 8)]
    address = ipaddress.ip_address(b"".join(words))
    return str(getattr(address, "ipv4_mapped", None) or address)


def _descendants(process: int) -> list[int]:
    parents: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            fields = stat.read_text().rpartition(")")[2].split()
        except OSError:
            continue
        parents.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found = [process]
    for each in found:
        found += parents.get(each, [])
    return found
