"""What a manifest is compared with, and what is remembered of updates for that."""

import asyncio
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch

from adapter.demo import tiny_model
from sidecar.header import Header, Selector
from sidecar.manifest import BucketSpec, Manifest, TensorSpec
from sidecar.manifest_check import Allowance, FindingKind, Report
from sidecar.manifest_store import KnownManifest
from sidecar.references import DRAFT_NAMES, References
from sidecar.update import Update, UpdateState, Verification

NO_EXCEPTION = Allowance()
NOWHERE = "/no/such/folder"


def manifest_of(*buckets: Iterable[str]) -> Manifest:
    return Manifest(
        tuple(BucketSpec(64, tuple(TensorSpec(name, "float32", (4,), 0, 16) for name in b)) for b in buckets)
    )


def known(manifest: Manifest) -> KnownManifest:
    return KnownManifest(manifest, manifest.digest(), ())


def checkpoint(folder: Path, *names: str) -> str:
    return str(tiny_model.save_checkpoint(folder, [(name, torch.zeros(4)) for name in names]))


def report(
    references: References,
    model_path: str,
    *names: str,
    allow: Allowance = NO_EXCEPTION,
    selector: Selector | None = None,
) -> Report:
    return asyncio.run(references.report(known(manifest_of(names)), model_path, allow, selector))


def kinds(found: Report) -> list[str]:
    return [finding.kind.value for finding in found.findings]


def ended(
    *names: str,
    update_id: str = "12",
    state: UpdateState = UpdateState.COMMITTED,
    verification: Verification = Verification.CONSISTENT,
    allow: Allowance = NO_EXCEPTION,
    selector: Selector | None = None,
) -> Update:
    header = Header(update_id=update_id, weight_version="7", rank=0, tp_size=1, allow=allow, selector=selector)
    manifest = manifest_of(names) if names else Manifest(())
    return Update(header, manifest, manifest.digest(), state=state, verification=verification)


def test_a_checkpoint_is_what_a_manifest_is_compared_with(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "a", "b")
    references = References()
    assert report(references, folder, "a", "b") == Report((), (f"checkpoint {folder}",), ())
    assert kinds(report(references, folder, "a", "c")) == [FindingKind.UNKNOWN_TENSOR, FindingKind.MISSING_TENSOR]
    allowed = report(references, folder, "a", "c", allow=Allowance(unknown=("c",), missing=("b",)))
    assert kinds(allowed) == []


def test_a_checkpoint_that_was_changed_is_read_again(tmp_path: Path) -> None:
    references = References()
    assert kinds(report(references, checkpoint(tmp_path, "a"), "a", "b")) == [FindingKind.UNKNOWN_TENSOR]
    assert kinds(report(references, checkpoint(tmp_path, "a", "b"), "a", "b")) == []


def test_another_folder_is_another_checkpoint(tmp_path: Path) -> None:
    references = References()
    one, other = checkpoint(tmp_path / "one", "a"), checkpoint(tmp_path / "other", "b")
    assert kinds(report(references, one, "a")) == []
    assert kinds(report(references, other, "a")) == [FindingKind.UNKNOWN_TENSOR, FindingKind.MISSING_TENSOR]
    assert report(references, one, "a").sources == (f"checkpoint {one}",)


def test_a_verdict_is_kept_for_the_ranks_that_follow(tmp_path: Path) -> None:
    folder = checkpoint(tmp_path, "a")
    references = References()
    assert report(references, folder, "a") is report(references, folder, "a")


@pytest.mark.parametrize("model_path", [NOWHERE, "", "Qwen/Qwen3-0.6B", "nul\0byte"])
def test_without_any_source_it_is_said_that_nothing_was_compared(model_path: str) -> None:
    found = report(References(), model_path, "a")
    assert (found.findings, found.sources) == ((), ())
    assert found.unchecked[0].startswith("Names, missing tensors, shapes and dtypes were not checked")
    assert "is not the absolute path of a folder on this host" in found.unchecked[-1]


def test_the_last_verified_update_stands_in_for_a_checkpoint() -> None:
    references = References()
    references.ended(ended("a", "b"))
    found = report(references, NOWHERE, "a", "c")
    assert kinds(found) == [FindingKind.UNKNOWN_TENSOR, FindingKind.MISSING_TENSOR]
    assert found.sources == ("update 12",)
    assert any("What update 12 itself lacked" in sentence for sentence in found.unchecked)
    references.ended(ended("a", "c", update_id="13", verification=Verification.PROVEN))
    assert (kinds(report(references, NOWHERE, "a", "c")), report(references, NOWHERE, "a").sources) == (
        [],
        ("update 13",),
    )


def test_a_checkpoint_is_believed_more_than_an_update(tmp_path: Path) -> None:
    references = References()
    references.ended(ended("a", "b"))
    assert kinds(report(references, checkpoint(tmp_path, "a"), "a")) == []


@pytest.mark.parametrize(
    "update",
    [
        ended("a", verification=Verification.NOT_ASKED),
        ended("a", verification=Verification.UNAVAILABLE),
        ended("a", state=UpdateState.FAILED),
        ended("a", state=UpdateState.ABORTED),
        ended("a", allow=Allowance(missing=("b",))),
        ended("a", allow=Allowance(unknown=("c",))),
        ended("a", selector=Selector.DRAFT),
        ended(),
    ],
    ids=["unverified", "unverifiable", "failed", "aborted", "partial", "too-much", "draft", "from-disk"],
)
def test_only_a_whole_model_that_was_verified_is_remembered(update: Update) -> None:
    references = References()
    references.ended(update)
    assert report(references, NOWHERE, "b").sources == ()
    references.ended(ended("b", update_id="before"))
    references.ended(update)
    assert report(references, NOWHERE, "b").sources == ("update before",)


def test_a_verdict_against_one_update_is_none_against_another_of_the_same_name() -> None:
    """An id can come back once the history has forgotten it."""
    references = References()
    references.ended(ended("a"))
    assert kinds(report(references, NOWHERE, "a", "b")) == [FindingKind.UNKNOWN_TENSOR]
    references.ended(ended("a", "b"))
    assert kinds(report(references, NOWHERE, "a", "b")) == []


def test_a_verdict_names_the_update_that_it_was_reached_against() -> None:
    references = References()
    for update_id in ("12", "13"):
        references.ended(ended("a", update_id=update_id))
        assert report(references, NOWHERE, "a").sources == (f"update {update_id}",)


def test_nothing_tells_what_a_draft_model_has(tmp_path: Path) -> None:
    references = References()
    found = report(references, checkpoint(tmp_path, "a"), "fc.weight", selector=Selector.DRAFT)
    assert found == Report((), (), (DRAFT_NAMES,))


def test_a_fused_group_of_a_draft_model_is_checked_all_the_same() -> None:
    split = manifest_of(["layers.0.q_a_proj.weight"], ["layers.0.kv_a_proj_with_mqa.weight"])
    found = asyncio.run(References().report(known(split), NOWHERE, NO_EXCEPTION, Selector.DRAFT))
    assert kinds(found) == [FindingKind.FUSED_GROUP_SPLIT]


def test_a_target_model_is_compared_as_an_only_one_is(tmp_path: Path) -> None:
    references = References()
    folder = checkpoint(tmp_path, "a")
    assert kinds(report(references, folder, "b", selector=Selector.TARGET)) == kinds(report(references, folder, "b"))
