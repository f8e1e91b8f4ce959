"""One model's plans, and what is done with a bucket that comes.

    known manifest?  no, and not in the header: UNKNOWN, the bucket is held for the next call
                     no: recorded            refused: the model's own load
                     unproven: replayed, then loaded by the model itself, and compared
                     proven: replayed        moved: recorded anew

Invariant: whatever the answer but UNKNOWN is, the model's own load, or its proven equal, was the last to write.
"""

import logging
from collections import OrderedDict
from dataclasses import replace
from typing import Protocol

import torch

from adapter.replay.copies import Copies
from adapter.replay.header import Ask, Header
from adapter.replay.kept import KeptRegions, Region
from adapter.replay.plan import Piece, Plan, Trust, plan_of
from adapter.replay.reachable import ModelTensors, flat_of, hash_of
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
    """For one model; called from the scheduler's thread alone. ``kept`` is the process's."""

    def __init__(self, kept: KeptRegions, most_plans: int = MOST_PLANS) -> None:
        self._most_plans = most_plans
        self._plans: OrderedDict[str, Plan] = OrderedDict()
        self._kept = kept
        self._held: Region | str | None = None
        """What a call with an unknown manifest has brought; the name of its lease if it is kept."""

    def serve(self, model: torch.nn.Module, said: Header, flat: torch.Tensor) -> Answer:
        """Do what the header asks. ``flat``: the bucket, or an empty tensor if it is here already."""
        held, self._held = self._held, None
        if said.ask in (Ask.HELLO, Ask.NOTHING):
            return Outcome.READY, ""
        with self._kept.in_use(), torch.no_grad():
            if said.ask is Ask.LOAD_HELD:
                region = self._kept.get(held) if isinstance(held, str) else held
            else:
                region = self._region(said, flat)
            if region is None or region.flat.numel() < said.size:
                return Outcome.UNKNOWN, "the bucket's memory is not mapped here any more"
            return self._load(model, said, region)

    def _region(self, said: Header, flat: torch.Tensor) -> Region | None:
        kept = self._kept.get(said.lease)
        if kept is not None or not flat.numel():
            return kept
        # All of the region: another bucket in it may need more than this one.
        return self._kept.keep(said.lease, flat_of(flat) if said.lease else flat)

    def _load(self, model: torch.nn.Module, said: Header, region: Region) -> Answer:
        region.wait_for(said.event)
        plan = self._plans.get(said.digest)
        if plan is None and not said.parts:
            self._held = said.lease if self._kept.get(said.lease) is region else region
            return Outcome.UNKNOWN, "the manifest is not known here"
        try:
            return self._by_plan(model, said, plan, region)
        finally:
            if region.flat.is_cuda:
                torch.cuda.synchronize(region.flat.device)

    def _by_plan(self, model: torch.nn.Module, said: Header, plan: Plan | None, region: Region) -> Answer:
        if plan is None:
            return self._record(model, said, region)
        self._plans.move_to_end(plan.digest)
        if plan.tensors is not None and not plan.tensors.unmoved():
            return self._record(model, replace(plan.header, lease=said.lease), region)
        match plan.trust:
            case Trust.PROVEN:
                return _replay_proven(model, plan, region)
            case Trust.UNPROVEN:
                return _prove(model, plan, region)
            case Trust.REFUSED:
                _own_load(model, plan, region)
                return Outcome.FELL_BACK, plan.why

    def _record(self, model: torch.nn.Module, said: Header, region: Region) -> Answer:
        plan, is_held = _recorded(model, said, region.flat)
        if is_held:
            self._kept.give_up(said.lease)
        self._plans[plan.digest] = plan
        while len(self._plans) > self._most_plans:
            self._plans.popitem(last=False)
        if plan.trust is Trust.REFUSED:
            logger.info("updates like this one are loaded by the model itself: %s", plan.why)
            return Outcome.FELL_BACK, plan.why
        return Outcome.RECORDED, "its first update is recorded"


def _recorded(model: torch.nn.Module, said: Header, flat: torch.Tensor) -> tuple[Plan, bool]:
    """The model loads the bucket, and is observed; also whether it holds on to the bucket's memory."""
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
    return plan_of(model, said, flat, recording, before, after), after.has(flat)


def _prove(model: torch.nn.Module, plan: Plan, region: Region) -> Answer:
    """The first replay, checked against the model's own load, which comes last."""
    assert plan.tensors is not None
    tensors = plan.tensors
    before = tensors.digest()
    try:
        plan.poison()
        _replay(plan, region)
        replayed = tensors.digest()
    except RuntimeError as error:
        return _own_load_from_now_on(model, plan, region, f"the first replay failed: {error}")
    if not _touches_nothing_else(model, plan, tensors, region):
        return _own_load_from_now_on(model, plan, region, "the model derives more from its weights, unseen")
    _own_load(model, plan, region)
    own = tensors.digest()
    if replayed != own or not tensors.unmoved():
        plan.refuse("the first replay gave other weights than the model's own load")
        return Outcome.FELL_BACK, plan.why
    if own == before:
        return Outcome.RECORDED, "the weights are those of the update before, which proves nothing"
    plan.trust = Trust.PROVEN
    return Outcome.PROVEN, "its first replay was checked against the model's own load"


def _touches_nothing_else(model: torch.nn.Module, plan: Plan, tensors: ModelTensors, region: Region) -> bool:
    """Whether the model's own load leaves alone what the plan does not write, whatever is in there.

    Each byte of it is changed in one bit before, and back after. So a step that no recording shows is found even where
    it would have written what was there already.
    """
    others = tensors.others(plan.storages())
    for other in others:
        other.bitwise_xor_(1)
    changed = [hash_of(other) for other in others]
    try:
        _own_load(model, plan, region)
    finally:
        kept = [hash_of(other) == expected for other, expected in zip(others, changed, strict=True)]
        for other, as_it_was in zip(others, kept, strict=True):
            if as_it_was:
                other.bitwise_xor_(1)
    return all(kept)


def _replay_proven(model: torch.nn.Module, plan: Plan, region: Region) -> Answer:
    try:
        _replay(plan, region)
    except RuntimeError as error:
        return _own_load_from_now_on(model, plan, region, f"a replay failed: {error}")
    return Outcome.REPLAYED, ""


def _own_load_from_now_on(model: torch.nn.Module, plan: Plan, region: Region, why: str) -> Answer:
    plan.refuse(why)
    _own_load(model, plan, region)
    return Outcome.FELL_BACK, why


def _replay(plan: Plan, region: Region) -> None:
    copies = region.copies.get(plan)
    if copies is None:
        copies = region.copies[plan] = Copies((piece.target, piece.source_in(region.flat)) for piece in plan.pieces)
    copies.run()
    for write in plan.in_order:
        if isinstance(write, Piece):
            write.target.copy_(write.source_in(region.flat))
        else:
            write.target.fill_(write.value)


def _own_load(model: torch.nn.Module, plan: Plan, region: Region) -> None:
    _load_weights(model, [(part.name, part.view_in(region.flat)) for part in plan.header.parts])


def _load_weights(model: torch.nn.Module, weights: list[tuple[str, torch.Tensor]]) -> None:
    load_weights: Model = model  # type: ignore[assignment]  # every model of SGLang's
    load_weights.load_weights(weights)
