"""Clients of benchmarks/serving.py, in a process of their own that imports little.

    python benchmarks/http_clients.py URL BODY_FILE CLIENTS SECONDS

Each client sends the body again as soon as it has an answer. Prints one JSON object.
"""

import asyncio
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import aiohttp


async def client(
    session: aiohttp.ClientSession, url: str, body: bytes, until: float, out: dict[str, list[Any]]
) -> None:
    while (begun := time.perf_counter()) < until:
        try:
            async with session.post(url, data=body) as answer:
                content = await answer.read()
            if answer.status != 200:
                out["failed"].append(f"{answer.status} {content[:200]!r}")
        except Exception as error:  # whatever a client meets is a failed request
            out["failed"].append(repr(error))
        out["ms"].append((time.perf_counter() - begun) * 1e3)


async def run(url: str, body: bytes, count: int, seconds: float) -> dict[str, Any]:
    out: dict[str, list[Any]] = {"ms": [], "failed": []}
    connector = aiohttp.TCPConnector(limit=count)
    async with aiohttp.ClientSession(connector=connector) as session:
        begun = time.perf_counter()
        until = begun + seconds
        await asyncio.gather(*(client(session, url, body, until, out) for _ in range(count)))
        wall = time.perf_counter() - begun
    ordered = sorted(out["ms"])
    return {
        "requests": len(ordered),
        "per_second": len(ordered) / wall,
        "median_ms": statistics.median(ordered),
        "p99_ms": ordered[int(len(ordered) * 0.99)],
        "longest_ms": ordered[-1],
        "failed": len(out["failed"]),
        "failures": out["failed"][:3],
    }


if __name__ == "__main__":
    url, body, count, seconds = sys.argv[1:]
    content = Path(body).read_bytes()
    print(json.dumps(asyncio.run(run(url, content, int(count), float(seconds)))))
