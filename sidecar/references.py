"""What a manifest is compared with: the checkpoint at the engine's model path, else the last verified update's.

Reads files off the event loop and keeps what it read for as long as they do not change; keeps verdicts too, so that
the check costs the ranks of an update nothing after the first. Invariant: ``report`` never fails; what could not be
read is said in ``Report.unchecked``.
"""

import asyncio
import logging
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from sidecar import checkpoint, manifest_check
from sidecar.checkpoint import CheckpointUnreadable, KnownTensor
from sidecar.header import Header, Selector
from sidecar.manifest_check import Allowance, Checked, Reference, Report
from sidecar.manifest_store import KnownManifest
from sidecar.update import Update, UpdateState, Verification

logger = logging.getLogger(__name__)

KEPT_REPORTS = 16
DRAFT_NAMES = "names, shapes and missing tensors: nothing tells what the draft model has"


class References:
    """What is known of the model's tensors."""

    def __init__(self) -> None:
        self._read: tuple[str, str, Reference] | None = None
        """Folder, fingerprint and content of the checkpoint that was read last."""
        self._unreadable: tuple[str, str, str] | None = None
        """The same of one that could not be read, with the reason."""
        self._verified: Reference | None = None
        self._verified_state = ""
        self._reports: OrderedDict[tuple[object, ...], Report] = OrderedDict()
        self._loaded: Checked | None = None
        """The last one that was committed."""

    async def report(
        self, known: KnownManifest, model_path: str, allow: Allowance, selector: Selector | None
    ) -> Report:
        """What is wrong with a manifest, as far as it can be told."""
        if selector is Selector.DRAFT:
            return replace(manifest_check.check(known.manifest, None, allow), unchecked=(DRAFT_NAMES,))
        reference, state, problem = await asyncio.to_thread(self._reference, model_path)
        key = (known.digest, allow, state)
        if key not in self._reports:
            self._reports[key] = await asyncio.to_thread(manifest_check.check, known.manifest, reference, allow)
            while len(self._reports) > KEPT_REPORTS:
                self._reports.popitem(last=False)
        report = self._reports[key]
        return replace(report, unchecked=(*report.unchecked, problem)) if problem else report

    async def report_of(self, header: Header, known: KnownManifest, model_path: str, epoch: int) -> Checked:
        """The same for an update; what the engine has loaded before, in the life of that number, stays right."""
        about = (known.digest, header.allow, header.selector, model_path, epoch)
        if self._loaded is not None and self._loaded.about == about:
            return self._loaded
        return Checked(about, await self.report(known, model_path, header.allow, header.selector))

    async def tensors(self, model_path: str) -> tuple[Mapping[str, KnownTensor], str]:
        """The model's own tensors, or none and why."""
        reference, _, problem = await asyncio.to_thread(self._reference, model_path)
        return (reference.tensors, problem) if reference else ({}, problem)

    def ended(self, update: Update) -> None:
        """Remember what was loaded, and the manifest of an update that was verified, if it was a whole model's."""
        if update.state is UpdateState.COMMITTED:
            self._loaded = update.checked
        verified = update.verification in (Verification.CONSISTENT, Verification.PROVEN)
        whole = update.header.allow == Allowance() and update.header.selector is not Selector.DRAFT
        if update.state is UpdateState.COMMITTED and verified and whole and update.manifest.buckets:
            self._verified = Reference.of_manifest(update.manifest, f"update {update.id}")
            self._verified_state = f"{update.id} {update.digest}"

    def _reference(self, model_path: str) -> tuple[Reference | None, str, str]:
        """The best source there is, the state that it is in, and why it is not a better one."""
        try:
            fingerprint = checkpoint.fingerprint(Path(model_path))
            return self._checkpoint(model_path, fingerprint), f"{model_path} {fingerprint}", ""
        except CheckpointUnreadable as problem:
            return self._verified, self._verified_state, str(problem)

    def _checkpoint(self, model_path: str, fingerprint: str) -> Reference:
        if self._unreadable and self._unreadable[:2] == (model_path, fingerprint):
            raise CheckpointUnreadable(self._unreadable[2])
        try:
            return self._read_checkpoint(model_path, fingerprint)
        except CheckpointUnreadable as problem:
            self._unreadable = (model_path, fingerprint, str(problem))
            raise

    def _read_checkpoint(self, model_path: str, fingerprint: str) -> Reference:
        folder = Path(model_path)
        if self._read is None or self._read[:2] != (model_path, fingerprint):
            content = Reference.of_checkpoint(checkpoint.read(folder), f"checkpoint {model_path}")
            self._read = (model_path, fingerprint, content)
            logger.info("the checkpoint at %s has %d tensors", model_path, len(content.tensors))
        return self._read[2]
