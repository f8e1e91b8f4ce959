"""One model's plans and kept buckets, and what is done with a bucket that comes.

    known manifest?  no, and not in the header: UNKNOWN, the bucket is held for the next call
                     no: recorded            refused: the model's own load
                     unproven: replayed, then loaded by the model itself, and compared
                     proven: replayed        moved: recorded anew

Invariant: whatever the answer but UNKNOWN is, the model's own load, or its proven equal, was the last to write.
"""

import logging
from collections import OrderedDict
from typing import Protocol

import torch

from adapter.replay.copies import Copies
from adapter.replay.header import Ask, Header
from adapter.replay.kept import Bucket, KeptBuckets
from adapter.replay.plan import Piece, Plan, Trust, plan_of
from adapter.replay.reachable import ModelTensors
from adapter.replay.recorder import Recorder, Recording, SourceTensor
from adapter.replay.verdict import Outcome

logger = logging.getLogger(__name__)

MOST_PLANS = 256

Answer = tuple[Outcome, str]
"""What became of it, and why it is no replay."""


class Model(Protocol):
    """What SGLang's models have: a ``torch.nn.Module`` that loads Hugging Face tensors by their names."""

    def load_weights(self, weights: list[tuple[str, torch.Tensor]]) -> object:
        """SGLang's own."""


class Replayer:
    """For one model; called from the scheduler's thread alone."""

    def __init__(self, most_plans: int = MOST_PLANS, kept: KeptBuckets | None = None) -> None:
        self._most_plans = most_plans
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._kept = KeptBuckets() if kept is None else kept
        self._held: Bucket | None = None
        """Of a call whose manifest was unknown."""

    def serve(self, model: torch.nn.Module, said: Header, flat: torch.Tensor) -> Answer:
        """Do what the header asks. ``flat``: the bucket, or an empty tensor if it is here already."""
        held, self._held = self._held, None
        if said.ask in (Ask.HELLO, Ask.NOTHING):
            return Outcome.READY, ""
        with self._kept.in_use(), torch.no_grad():
            bucket = held if said.ask is Ask.LOAD_HELD else self._bucket(said, flat)
            if bucket is None or bucket.flat.numel() < said.size:
                return Outcome.UNKNOWN, "the bucket's memory is not mapped here any more"
            return self._load(model, said, bucket)

    def _bucket(self, said: Header, flat: torch.Tensor) -> Bucket | None:
        kept = self._kept.get(said.lease)
        if kept is not None or not flat.numel():
            return kept
        return self._kept.keep(said.lease, _region_of(flat) if said.lease else flat)

    def _load(self, model: torch.nn.Module, said: Header, bucket: Bucket) -> Answer:
        plan = self._plans.get(said.digest)
        if plan is None and not said.parts:
            self._held = bucket
            return Outcome.UNKNOWN, "the manifest is not known here"
        try:
            return self._by_plan(model, said, plan, bucket)
        finally:
            if bucket.flat.is_cuda:
                torch.cuda.synchronize(bucket.flat.device)

    def _by_plan(self, model: torch.nn.Module, said: Header, plan: Plan | None, bucket: Bucket) -> Answer:
        if plan is None:
            return self._record(model, said, bucket)
        self._plans.move_to_end(plan.digest)
        if plan.tensors is not None and not plan.tensors.unmoved():
            self._kept.forget(plan.digest)
            return self._record(model, plan.header, bucket)
        match plan.trust:
            case Trust.PROVEN:
                return self._replay_proven(model, plan, bucket)
            case Trust.UNPROVEN:
                return _prove(model, plan, bucket)
            case Trust.REFUSED:
                _own_load(model, plan, bucket)
                return Outcome.FELL_BACK, plan.why

    def _record(self, model: torch.nn.Module, said: Header, bucket: Bucket) -> Answer:
        plan = _recorded(model, said, bucket.flat)
        self._plans[plan.digest] = plan
        while len(self._plans) > self._most_plans:
            self._plans.popitem(last=False)
        if plan.trust is Trust.REFUSED:
            logger.info("updates like this one are loaded by the model itself: %s", plan.why)
            return Outcome.FELL_BACK, plan.why
        return Outcome.RECORDED, "its first update is recorded"

    def _replay_proven(self, model: torch.nn.Module, plan: Plan, bucket: Bucket) -> Answer:
        try:
            _replay(plan, bucket)
        except RuntimeError as error:
            plan.refuse(f"a replay failed: {error}")
            _own_load(model, plan, bucket)
            return Outcome.FELL_BACK, plan.why
        return Outcome.REPLAYED, ""


def _region_of(flat: torch.Tensor) -> torch.Tensor:
    """The whole region that a bucket lies at the beginning of: another one may need more of it."""
    return torch.empty(0, dtype=torch.uint8, device=flat.device).set_(flat.untyped_storage())


def _recorded(model: torch.nn.Module, said: Header, flat: torch.Tensor) -> Plan:
    """The model loads the bucket, and is observed."""
    before, recording = ModelTensors(model), Recording()
    views = [(part.name, part.view_in(flat)) for part in said.parts]
    marked: list[tuple[str, torch.Tensor]] = [(name, SourceTensor.of(view, recording)) for name, view in views]
    try:
        with Recorder(flat, before, recording):
            _load_weights(model, marked)
    except Exception as error:  # the model's own code, which is not made for being observed, may raise anything
        logger.warning("a load failed while it was observed; it is made again without", exc_info=True)
        recording.refuse(f"the model cannot be observed ({type(error).__name__}: {error})")
        _load_weights(model, views)
    after = ModelTensors(model)
    if after.has(flat):
        _load_weights(model, views)  # what it keeps must be an ordinary tensor
    return plan_of(model, said, flat, recording, before, after)


def _prove(model: torch.nn.Module, plan: Plan, bucket: Bucket) -> Answer:
    """The first replay, checked against the model's own load, which comes last."""
    assert plan.tensors is not None
    tensors = plan.tensors
    before = tensors.digest()
    try:
        plan.poison()
        _replay(plan, bucket)
        replayed = tensors.digest()
    except RuntimeError as error:
        plan.refuse(f"the first replay failed: {error}")
        replayed = 0
    _own_load(model, plan, bucket)
    if plan.trust is Trust.REFUSED:
        return Outcome.FELL_BACK, plan.why
    own = tensors.digest()
    if replayed != own or not tensors.unmoved():
        plan.refuse("the first replay gave other weights than the model's own load")
        return Outcome.FELL_BACK, plan.why
    if own == before:
        return Outcome.RECORDED, "the weights are those of the update before, which proves nothing"
    plan.trust = Trust.PROVEN
    return Outcome.PROVEN, "its first replay was checked against the model's own load"


def _replay(plan: Plan, bucket: Bucket) -> None:
    copies = bucket.copies.get(plan.digest)
    if copies is None:
        copies = Copies((piece.target, piece.source_in(bucket.flat)) for piece in plan.pieces)
        bucket.remember(plan.digest, copies)
    copies.run()
    for write in plan.in_order:
        if isinstance(write, Piece):
            write.target.copy_(write.source_in(bucket.flat))
        else:
            write.target.fill_(write.value)


def _own_load(model: torch.nn.Module, plan: Plan, bucket: Bucket) -> None:
    _load_weights(model, [(part.name, part.view_in(bucket.flat)) for part in plan.header.parts])


def _load_weights(model: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]) -> None:
    load_weights: Model = model  # type: ignore[assignment]  # every model of SGLang's
    load_weights.load_weights(weights)
