"""A short run of everything, in every `make test`: 20,000 requests, the kept ones, and some payloads."""

import os
import random
import subprocess
import sys
from pathlib import Path

import torch  # noqa: F401 - resolved by name below

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fuzz import kept, safe_unpickler
from tests.fuzz.__main__ import repeated
from tests.fuzz.blocks import Run
from tests.fuzz.composer import ComposerFuzz
from tests.fuzz.payload_check import ALLOWED_GLOBALS
from tests.fuzz.replay_headers import HeaderFuzz
from tests.fuzz.tally import Tally
from tests.fuzz.valid import METHODS

ROOT = Path(__file__).parents[2]
REQUESTS, PAYLOADS = 20_000, 600


def test_every_rpc_of_the_contract_is_fuzzed() -> None:
    service = pb.DESCRIPTOR.services_by_name["WeightSyncService"]
    assert {name: kind.DESCRIPTOR.full_name for name, kind in METHODS.items()} == {
        method.name: method.input_type.full_name for method in service.methods
    }


def test_twenty_thousand_requests_find_nothing() -> None:
    """In processes of their own, so that their memory is theirs alone."""
    arguments = [f"--requests={REQUESTS}", "--payloads=0", "--seed=2", "--processes=2"]
    ran = subprocess.run(
        [sys.executable, "-m", "tests.fuzz", *arguments],
        check=False,
        cwd=ROOT,
        env=os.environ,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, f"{ran.stdout}\n{ran.stderr[-4000:]}"
    assert "findings: 0" in ran.stdout


async def test_requests_that_once_found_a_defect_find_nothing() -> None:
    run, requests = Run(seed=0), kept.read()
    await run.again(requests)
    assert run.tally.findings == []
    assert run.tally.requests.total() == len(requests) > 0


def test_payloads_load_in_every_release_and_are_what_went_in() -> None:
    tally = Tally()
    repeated(tally, "composed payloads", ComposerFuzz(random.Random(2)).check_one, PAYLOADS)
    repeated(tally, "replay headers", HeaderFuzz(random.Random(2)).check_one, PAYLOADS)
    assert tally.findings == []
    assert "installed" in safe_unpickler.releases()


def test_every_allowed_global_exists_in_the_torch_that_is_installed() -> None:
    for module, name in ALLOWED_GLOBALS:
        __import__(module)
        assert hasattr(sys.modules[module], name), f"{module}.{name}"
