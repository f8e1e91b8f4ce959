"""The edge to SGLang: nothing is raised, everything is told, and nobody else's payload is loaded."""

import json
import logging
import subprocess
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from adapter import loader
from adapter.replay import header as headers
from adapter.replay import verdict as verdicts
from adapter.replay.verdict import Outcome, Verdict
from tests.unit.replay import models
from tests.unit.replay.calls import VERDICT, assert_loaded, bucket, text, verdict_file, words
from tests.unit.replay.models import Model


@pytest.fixture(autouse=True)
def _verdicts() -> Iterator[None]:
    verdict_file().write_bytes(bytes(2 * verdicts.SLOT_BYTES))
    yield
    verdict_file().unlink(missing_ok=True)


def said(rank: int = 0) -> dict[str, Any]:
    slot = verdict_file().read_bytes()[rank * verdicts.SLOT_BYTES : (rank + 1) * verdicts.SLOT_BYTES]
    answer: dict[str, Any] = json.loads(slot.rstrip(b"\0"))
    return answer


def test_a_load_is_answered_in_the_slot_of_its_rank() -> None:
    model = Model()
    loader.load(model, [(text(rank=1, nonce="abc"), bucket(1))])
    assert said(1) == {
        "nonce": "abc",
        "outcome": "recorded",
        "life": loader.LIFE,
        "why": "its first update is recorded",
    }
    assert verdict_file().read_bytes()[: verdicts.SLOT_BYTES] == bytes(verdicts.SLOT_BYTES)
    assert_loaded(model, bucket(1))


def test_a_model_that_fails_is_told_and_not_raised() -> None:
    loader.load(models.Failing(), [(text(), bucket(1))])
    assert (said()["outcome"], said()["why"]) == ("failed", "KeyError: 'q'")


@pytest.mark.parametrize(
    "payload",
    [
        [("model.embed_tokens.weight", torch.zeros(4))],
        [(text(), bucket(1)), (text(), bucket(1))],
        [],
        [(7, bucket(1))],
        [(headers.MAGIC + "{", bucket(1))],
        [(headers.MAGIC + "[]", bucket(1))],
        [(text(sudo=True), bucket(1))],
        [(text("dance"), bucket(1))],
        [(text(digest="0" * 64), bucket(1))],
        [(text(size=100), bucket(1))],
        [(text(tensors=[["q", "float32", [-1], 0]]), bucket(1))],
        [(text(tensors=[["q", "load", [1], 0]]), bucket(1))],
    ],
    ids=lambda payload: str(payload)[:40],
)
def test_a_payload_that_is_not_the_sidecars_loads_nothing(
    payload: list[tuple[str, torch.Tensor]], caplog: pytest.LogCaptureFixture
) -> None:
    model = Model()
    with caplog.at_level(logging.ERROR):
        loader.load(model, payload)
    assert caplog.messages[0].startswith("nothing was loaded: ")
    assert not model.qk.any()
    assert not any(verdict_file().read_bytes())


@pytest.mark.parametrize("name", ["../../tmp/x", "sglang-weight-sync-verdict-", VERDICT + "/x"])
def test_a_verdict_goes_into_no_other_file(name: str, caplog: pytest.LogCaptureFixture) -> None:
    loader.load(Model(), [(text(verdict=name), bucket(1))])
    assert "cannot be told that its bucket was recorded" in caplog.text


def test_a_load_whose_verdict_cannot_be_written_is_a_load(caplog: pytest.LogCaptureFixture) -> None:
    model = Model()
    verdict_file().unlink()
    loader.load(model, [(text(), bucket(1))])
    assert_loaded(model, bucket(1))
    assert "No such file" in caplog.text


def test_a_long_reason_is_cut_to_its_slot() -> None:
    verdicts.write(VERDICT, 0, Verdict("n", Outcome.FAILED, "life", "ü" * 5000))
    assert said()["why"].startswith("üü")
    assert set(verdict_file().read_bytes()[verdicts.SLOT_BYTES :]) == {0}


def test_a_rank_without_a_slot_is_refused() -> None:
    with pytest.raises(ValueError, match="has no slot for rank 2"):
        verdicts.write(VERDICT, 2, Verdict("n", Outcome.READY, "life"))


def test_importing_the_loader_brings_neither_grpc_nor_protobuf_into_sglang() -> None:
    script = (
        "import sys, adapter.loader; print([m for m in ('grpc', 'google.protobuf', 'requests') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout.strip() == "[]"


def test_a_header_says_what_the_sidecar_said() -> None:
    parsed = headers.parse(text(lease="l", skippable=["k"], event="00ff"))
    assert (parsed.digest, parsed.lease, set(parsed.skippable)) == (words()["digest"], "l", {"k"})
    assert parsed.event == b"\x00\xff"
    assert [part.name for part in parsed.parts] == ["q", "k", "norm"]
