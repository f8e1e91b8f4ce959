"""What the engine's checksums prove, over the updates that asked.

Pure: checksums in, a verdict out. The sidecar never sees a tensor's bytes, so it compares what the engine computed:
over its TP ranks, and with what the same content gave before. Two ranks' shards of one tensor differ, so which
tensors every rank holds whole is learned: those that were equal on all ranks under two different contents.

Invariant: a verdict is remembered only if nothing differed.
"""

from collections import OrderedDict, defaultdict
from collections.abc import Sequence

from sidecar.errors import ChecksumsDiffer, Reason
from sidecar.update import Update, Verification

KEPT_CONTENTS = 16
NAMED_AT_MOST = 5

Checksums = Sequence[dict[str, str]]
"""By TP rank: each tensor's name in the engine, and its digest."""


class Verifier:
    """What was verified so far, in this life of the engine."""

    def __init__(self, kept: int = KEPT_CONTENTS) -> None:
        self._kept = kept
        self._by_content: OrderedDict[tuple[str, ...], Checksums] = OrderedDict()
        self._equal_digests: defaultdict[str, set[str]] = defaultdict(set)
        """By name: up to two digests that were equal on all ranks."""
        self._ever_unequal: set[str] = set()
        self._epoch = 0
        """The engine's life that all this was learned in."""

    def check(self, update: Update, ranks: Checksums) -> Verification:
        """The verdict on what the engine holds after ``update``; raises ``ChecksumsDiffer``."""
        if update.epoch != self._epoch:  # another server may have laid its tensors out in another way
            self._by_content.clear()
            self._equal_digests.clear()
            self._ever_unequal.clear()
            self._epoch = update.epoch
        self._check_names(update, ranks)
        self._check_whole_tensors(update, ranks)
        before = self._by_content.get(_content(update))
        if before is not None:
            _check_same_content(update, before, ranks)
        self._remember(update, ranks)
        return Verification.CONSISTENT if before is None else Verification.PROVEN

    def _check_names(self, update: Update, ranks: Checksums) -> None:
        if len(ranks) != update.num_engine_ranks:
            raise _differ(update, f"{len(ranks)} ranks of {update.num_engine_ranks} answered", [])
        for rank, checksums in enumerate(ranks):
            if odd := sorted(checksums.keys() ^ ranks[0].keys()):
                raise _differ(update, f"ranks 0 and {rank} do not hold the same tensors", odd)

    def _check_whole_tensors(self, update: Update, ranks: Checksums) -> None:
        """Tensors that every rank holds whole must be equal everywhere."""
        whole = [name for name, digests in self._equal_digests.items() if len(digests) > 1]
        known = [name for name in whole if name not in self._ever_unequal and name in ranks[0]]
        if unequal := [name for name in known if len(_digests(name, ranks)) > 1]:
            raise _differ(update, "ranks differ in tensors that each of them holds whole", unequal)

    def _remember(self, update: Update, ranks: Checksums) -> None:
        for name in ranks[0] if len(ranks) > 1 else ():
            digests = _digests(name, ranks)
            if len(digests) > 1:
                self._ever_unequal.add(name)
            elif len(self._equal_digests[name]) < 2:
                self._equal_digests[name] |= digests
        if update.header.content_digest:
            self._by_content[_content(update)] = ranks
            self._by_content.move_to_end(_content(update))
        while len(self._by_content) > self._kept:
            self._by_content.popitem(last=False)


def _content(update: Update) -> tuple[str, ...]:
    """What makes two updates of one content comparable: the digest, the models meant, and what was sent."""
    header = update.header
    return header.content_digest, header.selector or "", str(update.num_engine_ranks), update.digest


def _check_same_content(update: Update, before: Checksums, ranks: Checksums) -> None:
    for rank, (old, new) in enumerate(zip(before, ranks, strict=True)):
        if changed := sorted(name for name in old.keys() | new.keys() if old.get(name) != new.get(name)):
            raise _differ(update, f"rank {rank} differs from what this content gave before", changed)


def _digests(name: str, ranks: Checksums) -> set[str]:
    return {checksums[name] for checksums in ranks}


def _differ(update: Update, what: str, names: Sequence[str]) -> ChecksumsDiffer:
    message = f"update {update.id!r}: {what}"
    if names:
        more = f" and {len(names) - NAMED_AT_MOST} more" if len(names) > NAMED_AT_MOST else ""
        message += f": {', '.join(names[:NAMED_AT_MOST])}{more}"
    return ChecksumsDiffer(Reason.CHECKSUMS_DIFFER, message, updateId=update.id, tensors=len(names))
