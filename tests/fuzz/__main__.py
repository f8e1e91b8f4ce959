"""``python -m tests.fuzz --requests 1000000 --seed 1``: a long run, on as many processes as asked for.

Exits with 1 if anything was found, and prints how to repeat it: ``python -m tests.fuzz --repeat SEED:BLOCK``.
"""

import argparse
import asyncio
import contextlib
import json
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

from tests.fuzz import kept
from tests.fuzz.blocks import BLOCK, Run, progress
from tests.fuzz.composer import ComposerFuzz
from tests.fuzz.tally import Tally
from tests.fuzz.watching import MemoryWatch

PROGRESS_S = 30.0
PAYLOADS_AT_A_TIME = 1000


def main(argv: Sequence[str] | None = None) -> int:
    """Run; whether anything was found."""
    arguments = _parser().parse_args(argv)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # so that nothing is left in /dev/shm
    started = time.monotonic()
    if arguments.repeat:
        seed, block = map(int, arguments.repeat.split(":"))
        tally = asyncio.run(_blocks(seed, range(block, block + 1), arguments.size))
    elif arguments.child is not None:
        print(json.dumps(_child(arguments).to_json()))
        return 0
    else:
        tally = _children(arguments)
    print(tally.table(time.monotonic() - started))
    for name in sorted({finding.split(" ")[0] for finding in tally.findings if ":" in finding.split(" ")[0]})[:20]:
        print(f"repeat: python -m tests.fuzz --repeat {name} --size {arguments.size}")
    return bool(tally.findings)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--requests", type=int, default=1_000_000)
    parser.add_argument("--payloads", type=int, default=None, help="for the composer; a tenth of the requests")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--size", type=int, default=BLOCK, help="requests of one block")
    parser.add_argument("--repeat", default="", metavar="SEED:BLOCK", help="one block of an earlier run")
    parser.add_argument("--child", type=int, default=None, help=argparse.SUPPRESS)
    return parser


def _children(arguments: argparse.Namespace) -> Tally:
    """One process each, so that each has an interpreter lock of its own."""
    payloads = arguments.requests // 10 if arguments.payloads is None else arguments.payloads
    passed = [f"--{name}={getattr(arguments, name)}" for name in ("requests", "seed", "processes", "size")]
    command = [sys.executable, "-m", "tests.fuzz", *passed, f"--payloads={payloads}"]
    children = [
        subprocess.Popen([*command, f"--child={number}"], stdout=subprocess.PIPE, text=True)
        for number in range(arguments.processes)
    ]
    try:
        return _added_up(children)
    finally:
        for child in children:
            child.terminate()  # nothing, to one that has ended


def _added_up(children: Sequence["subprocess.Popen[str]"]) -> Tally:
    total = Tally()
    for number, child in enumerate(children):
        said, _ = child.communicate()
        if child.returncode:
            total.findings.append(f"process {number} ended with {child.returncode}")
        else:
            total.add(Tally.from_json(json.loads(said)))
    return total


def _child(arguments: argparse.Namespace) -> Tally:
    """This process's share: every ``processes``-th block, and then payloads."""
    number, step = arguments.child, arguments.processes
    tally = asyncio.run(
        _blocks(arguments.seed, range(number, arguments.requests // arguments.size, step), arguments.size)
    )
    share = arguments.payloads // step
    from tests.fuzz.replay_headers import HeaderFuzz  # with torch, which would hide how little memory the rest needs

    composer = ComposerFuzz(random.Random(f"composer {arguments.seed} {number}"))
    headers = HeaderFuzz(random.Random(f"headers {arguments.seed} {number}"))
    repeated(tally, "composed payloads", composer.check_one, share)
    repeated(tally, "replay headers", headers.check_one, share // 10)
    return tally


async def _blocks(seed: int, numbers: range, size: int) -> Tally:
    run = Run(seed)
    if seed == 1 and numbers.start == 0:
        await run.again(kept.read())
    telling = asyncio.create_task(_tell(run))
    await run.blocks(numbers, size)
    telling.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await telling
    add_memory(run.tally, run.memory, "requests")
    return run.tally


async def _tell(run: Run) -> None:
    started = time.monotonic()
    while True:
        await asyncio.sleep(PROGRESS_S)
        print(progress(run, started), file=sys.stderr, flush=True)


def repeated(tally: Tally, what: str, check_one: Callable[[], int], number: int) -> None:
    """The same check again and again, until it has had so many payloads; and whether memory grew."""
    memory, done = MemoryWatch(), 0
    while done < number:
        before = done
        try:
            done += check_one()
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a finding
            tally.findings.append(f"{what} after {done}: {type(error).__name__}: {str(error)[:300]}")
            done += 1
        if before // PAYLOADS_AT_A_TIME != done // PAYLOADS_AT_A_TIME:
            memory.sample()
    tally.counts[what] += done
    add_memory(tally, memory, what)


def add_memory(tally: Tally, memory: MemoryWatch, what: str) -> None:
    """What was sampled, and whether it grew."""
    tally.findings += [f"{what}: {finding}" for finding in memory.findings()]
    if rss := memory.rss_mb:
        tally.rss.append((what, [rss[(len(rss) - 1) * tenth // 10] for tenth in range(11)]))


if __name__ == "__main__":
    sys.exit(main())
