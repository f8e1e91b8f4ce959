"""Renders the matrix for a person who is on call.

    python -m tests.faults.document > docs/faults.md

Pure. Invariant: every cell is in exactly one row of its table; neighbouring phases share a row where all is the same.
"""

import itertools
from collections.abc import Iterable, Iterator, Sequence

from tests.faults import matrix
from tests.faults.matrix import DEAD, NOBODY, Cell, Ending, Expected, Impossible, Visible, What, When, Who

HEAD = """# When something fails

What clients see, what generation sees, how things stand afterwards, and what heals it: for every process of an update,
every way to fail and every phase. `make faults` plays each cell on a scripted engine under traffic, and the kills on a
real SGLang as well; the quick cells are part of `make test`. In every one of them all calls end, no answer carries a
version that is not what its weights are, and no memory stays held.

This file is written by `python -m tests.faults.document` from `tests/faults/matrix.py`.

## The rules

1. **Until the first bucket is posted, nothing is lost.** Whatever fails, the update is aborted: the engine goes on with
   the old weights, as soon as it answers again.
2. **From the first POST to the last, weights are mixed.** An update that cannot go on leaves the engine dirty: it
   generates nothing until it has one version again.
3. **A rank is needed until its part is done:** all its memory posted and, in buckets, its commit said. After that its
   process may die, stop or lose its connection; the update commits without it.
4. **Slow is not dead.** A rank, a sidecar or an engine that is late is waited for, each up to a time-out of its own.
5. **A broken call is not an answer.** A client asks `GetUpdate`, or makes the same call again: it gets the first one's
   answer, and nothing is loaded twice.
6. **A lost answer of the engine is found out**, where there is a way to: the session probe, the reference counts of the
   memory, `/model_info`. Where there is none, the engine is dirty.
7. **A dead engine is not dirty.** What comes up in its place serves its checkpoint, and is not ready until a complete
   update.
8. **A dead sidecar leaves the engine as it is**, and its successor finds the journal: before the first POST it lets
   generation go on with the old weights, after that the engine is dirty.
"""

FAULTS = {
    What.KILLED: "SIGKILL",
    What.STOPPED: "SIGSTOP for longer than anybody waits, then SIGCONT",
    What.SLOW: "SIGSTOP for less than that",
    What.CUT: "the connection breaks: a rank's, all ranks' (sidecar), or the engine's before it has acted",
    What.LOST: "what was asked is done, and the answer does not arrive: to a rank, to all (sidecar), from the engine",
}
PHASES = {
    When.COLLECT: "a rank has not arrived yet",
    When.PAUSE: "`/pause_generation`",
    When.BEGIN: "`/begin_weight_update` (SGLang 0.5.21 and later)",
    When.LOAD_FIRST: "`/update_weights_from_tensor` of bucket 0 of 2; the engine dies half-way through the tensors",
    When.BETWEEN: "bucket 0 is loaded, and rank 1 has not pushed bucket 1",
    When.LOAD_LAST: "`/update_weights_from_tensor` of bucket 1 of 2",
    When.END: "`/end_weight_update` (SGLang 0.5.21 and later)",
    When.FLUSH: "`/flush_cache`",
    When.VERIFY: "`/weights_checker`, where the update asks for it",
    When.PUBLISH: "`/update_weight_version`",
    When.RESUME: "`/continue_generation`; an engine that is killed has carried it out",
}
STATES = {
    Ending.COMMITTED: "`READY` with the new version",
    Ending.ABORTED: "`READY` with the old version",
    Ending.DIRTY: "`DIRTY`, not ready, no version",
    Ending.ENGINE_GONE: "`ENGINE_UNREACHABLE`; a new server: `UNSYNCED`",
    Ending.SUCCESSOR_READY: "the successor: `READY` with the old version",
    Ending.SUCCESSOR_DIRTY: "the successor: `DIRTY`, not ready, no version",
}
HEALED_BY = {
    Ending.COMMITTED: "nothing to heal",
    Ending.ABORTED: "nothing to heal; send the update again",
    Ending.DIRTY: "the next complete update, or `UpdateWeightsFromDisk`",
    Ending.ENGINE_GONE: "start the server again, then a complete update",
    Ending.SUCCESSOR_READY: "start the sidecar again; send the update again",
    Ending.SUCCESSOR_DIRTY: "start the sidecar again, then a complete update or `UpdateWeightsFromDisk`",
}
TITLES = {
    Who.RANK: "A trainer's rank, bucket by bucket",
    Who.ONE_CALL_RANK: "A trainer's rank, in one call",
    Who.SIDECAR: "The sidecar",
    Who.ENGINE: "The engine",
}
TAIL = """## Memory

What the engine has opened it lets go of by itself. What it never opened, or died with, the trainer takes back by what
the sidecar tells of the update and of the engine: when its call is refused, or around its next update. GPU memory of a
trainer that is killed goes with its process. Its host memory stays in `/dev/shm`, as `torch_<pid>_*`, until torch's
helper process removes it, which waits for the engine to end too: remove the files of a dead pid by hand.
"""


def render() -> str:
    """The document."""
    cells = list(matrix.cells())
    sections = [_section(who, [cell for cell in cells if cell.who is who]) for who in Who]
    return "\n".join([HEAD, _legend(), *sections, TAIL])


def _legend() -> str:
    faults = _table(("fault", "is"), ((what, text) for what, text in FAULTS.items()))
    phases = _table(("phase", "is"), ((str(when), text) for when, text in PHASES.items()))
    endings = ((f"**{ending.value}**", STATES[ending], HEALED_BY[ending]) for ending in Ending)
    healed = _table(("ending", "`status` before it is healed", "healed by"), endings)
    return f"## Words\n\n{faults}\n{phases}\n{healed}"


def _section(who: Who, cells: Sequence[Cell]) -> str:
    by_phase = {when: [cell for cell in cells if cell.when is when and not cell.unopened] for when in When}
    grid = _table(("phase", *What), ((str(when), *map(_word, row)) for when, row in by_phase.items()))
    details = _table(("fault", "phase", "clients see", "generation", "ending", "remark"), _rows(cells))
    return f"## {TITLES[who]}\n\n{grid}\n{details}{_not_there(cells)}"


def _word(cell: Cell) -> str:
    return cell.expected.ending.value if isinstance(cell.expected, Expected) else "-"


def _not_there(cells: Sequence[Cell]) -> str:
    """Why some phases have no cells."""
    whys = {(str(cell.when), cell.expected.why) for cell in cells if isinstance(cell.expected, Impossible)}
    return "".join(f"\nNo fault in phase {when}: {why}.\n" for when, why in sorted(whys))


def _rows(cells: Sequence[Cell]) -> Iterator[tuple[str, ...]]:
    """One per run of phases, one after the other, in which a fault comes to the same."""
    real = [(cell, cell.expected) for cell in cells if isinstance(cell.expected, Expected)]
    for (what, *texts), run in itertools.groupby(real, lambda one: (one[0].what, *_texts(*one))):
        phases = [str(cell.when) + (", memory not opened" if cell.unopened else "") for cell, _ in run]
        yield (what, phases[0] if len(phases) == 1 else f"{phases[0]} to {phases[-1]}", *texts)


def _texts(cell: Cell, expected: Expected) -> tuple[str, str, str, str]:
    """What clients see, what generation sees, how it ends, and what a person may want to know."""
    return _clients(expected.sees), _generation(cell.when, expected), expected.ending.value, expected.note


def _clients(sees: tuple[str, str]) -> str:
    rank0, rank1 = map(_client, sees)
    if rank0 == rank1:
        return f"both: {rank0}"
    return f"rank 0: {rank0}" if sees[1] == DEAD else f"rank 0: {rank0}; rank 1: {rank1}"


def _client(saw: str) -> str:
    first, _, learned = saw.partition(">")
    if first == matrix.COMMITTED:
        return "committed"
    named = " or ".join(f"`{reason}`" for reason in first.split("|"))
    match learned:
        case "":
            return named
        case matrix.COMMITTED:
            return f"{named}, and committed when asked again"
        case _ if learned == NOBODY:
            return f"{named}, and nobody to ask; the successor does not know the update"
        case _:
            return f"{named}, and {learned} when asked again"


def _generation(when: When, expected: Expected) -> str:
    match expected.ending:
        case Ending.COMMITTED:
            return "waits until it resumes, with the new version"
        case Ending.ABORTED | Ending.SUCCESSOR_READY if when is When.COLLECT:
            return "runs on with the old version"
        case Ending.ABORTED:
            return "waits until it resumes, with the old version"
        case Ending.SUCCESSOR_READY:
            return "waits until the successor resumes it, with the old version"
        case Ending.ENGINE_GONE:
            return "ends with the server"
        case _ if expected.paused:
            return "is held until it is healed"
        case _:
            return f"resumes with the {'old' if expected.visible is Visible.OLD else 'new'} version"


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    print(render(), end="")
