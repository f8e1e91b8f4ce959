"""What SGLang calls to load a bucket: ``--custom-weight-loader adapter.loader.load``. Runs in every scheduler process.

The first time a manifest comes, the model loads it itself, and its copies are recorded. The second time they are
replayed, the model loads once more, and both results are compared. From the third time on they are replayed. Whatever
cannot be proven is loaded by the model itself, every time.

Source: ``custom_loader(model, named_tensors)`` in SGLang 0.5.15.post1 to 0.5.23, model_executor/model_runner.py and
model_runner_components/weight_updater.py: what it returns is dropped, and what it raises ends the server.

Invariants: nothing is raised; a verdict (``replay.verdict``) is written before SGLang answers; the device has read the
bucket by then; a payload that is not the sidecar's loads nothing.
"""

import logging
import secrets
from collections.abc import Sequence
from weakref import WeakKeyDictionary

import torch

from adapter.replay import header as headers
from adapter.replay import verdict as verdicts
from adapter.replay.header import Header
from adapter.replay.kept import KeptRegions
from adapter.replay.replayer import Replayer
from adapter.replay.verdict import Outcome, Verdict

logger = logging.getLogger(__name__)

LIFE = secrets.token_hex(8)
"""This process, as far as the sidecar cares."""

_kept = KeptRegions()
_replayers: WeakKeyDictionary[torch.nn.Module, Replayer] = WeakKeyDictionary()


def load(model: torch.nn.Module, named_tensors: Sequence[tuple[str, torch.Tensor]]) -> None:
    """Load one payload of the sidecar's into ``model``.

    Args:
        model: SGLang's model, with its ``load_weights``.
        named_tensors: one pair: the sidecar's header (``replay.header``) and the bucket, uint8 of one dimension on the
            model's device; an empty tensor where the bucket is here already.
    """
    try:
        ((text, flat),) = named_tensors
        said = headers.parse(text)
    except (TypeError, ValueError) as error:
        logger.error("nothing was loaded: %s", error)
        return
    try:
        if model not in _replayers:
            _replayers[model] = Replayer(_kept)
        outcome, why = _replayers[model].serve(model, said, flat)
    except Exception as error:  # the process edge: an exception here ends the server
        logger.exception("loading a bucket failed")
        outcome, why = Outcome.FAILED, f"{type(error).__name__}: {error}"
    _tell(said, Verdict(said.nonce, outcome, LIFE, why))


def _tell(said: Header, verdict: Verdict) -> None:
    try:
        verdicts.write(said.verdict, said.rank, verdict)
    except (OSError, ValueError) as error:  # the sidecar takes silence for a failure
        logger.error("the sidecar cannot be told that its bucket was %s: %s", verdict.outcome, error)
