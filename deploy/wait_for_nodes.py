"""Wait until a Ray cluster has so many nodes: wait_for_nodes.py NODES [SECONDS]. Exit code 1 if they do not come.

`pool.workers: auto` fills the nodes that there are when a run begins, so all of them should have joined by then.
"""

from __future__ import annotations

import sys
import time

import ray


def main(wanted: int, seconds: float = 600.0) -> int:
    deadline = time.monotonic() + seconds
    ray.init(address="auto", log_to_driver=False, logging_level="ERROR")
    while (alive := sum(node["Alive"] for node in ray.nodes())) < wanted:
        if time.monotonic() > deadline:
            print(f"only {alive} of {wanted} nodes have joined in {seconds:.0f} s", file=sys.stderr)
            return 1
        time.sleep(1)
    print(f"{alive} nodes have joined")
    return 0


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), *map(float, sys.argv[2:])))
