"""What trainers do, in order, and what goes wrong with it: requests in waves, drawn from a seed.

The requests of one wave are sent at the same time; the next wave follows once they are answered, but for those that
hold an update open, which are waited for at the end.
"""

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

from google.protobuf.message import Message

from sidecar.v1 import weight_sync_pb2 as pb
from tests.fuzz.floods import flooded
from tests.fuzz.mutate import MAX_WIRE, Mutator
from tests.fuzz.valid import METHODS, Facts, Valid

HEALTHY_S, SPOILT_S = 1.5, 0.06
"""How long callers wait: of updates that can complete, and of those of which something was changed."""
BY_SOCKET = 0.01
CANCELLED = 0.03


@dataclass(frozen=True, slots=True)
class Request:
    """One call."""

    method: str
    wire: bytes
    budget_s: float = SPOILT_S
    holds: bool = False
    """Whether it is answered only as its update ends."""
    by_socket: bool = False
    """Through gRPC itself instead of in process."""
    cancel_s: float | None = None
    """When its caller gives up without a word."""


Wave = list[Request]
Waves = list[Wave]


class Scenarios:
    """Draws one after the other; the same seed draws the same."""

    def __init__(self, rng: random.Random, facts: Facts, prefix: str) -> None:
        self._rng = rng
        self._valid = Valid(rng, facts, prefix)
        self._mutator = Mutator(rng)
        self._tp_size = facts.tp_size
        self._kinds: tuple[tuple[Callable[[], Waves], float], ...] = (
            (self._single, 60),
            (self._garbage, 12),
            (self._one_call, 6),
            (self._bucketed, 4),
            (self._over_a_group, 3),
            (self._repeated, 2),
            (self._disk, 1),
            (self._adapter, 3),
            (self._asking, 6),
            (self._flood, 0.05),
        )

    def draw(self, num_requests: int) -> Iterator[Waves]:
        """Until there are so many requests."""
        kinds, weights = zip(*self._kinds, strict=True)
        left = num_requests
        while left > 0:
            waves = self._rng.choices(kinds, weights)[0]()
            yield [[self._travelling(request) for request in wave] for wave in waves]
            left -= sum(map(len, waves))

    def _travelling(self, request: Request) -> Request:
        by_socket = self._rng.random() < BY_SOCKET
        cancel_s = self._rng.choice((0.0, 0.002, 0.01, 0.03)) if self._rng.random() < CANCELLED else None
        return replace(request, by_socket=by_socket, cancel_s=cancel_s)

    # Kinds of scenarios.

    def _single(self) -> Waves:
        """One call, with something changed; seldom damaged as bytes too."""
        method = self._rng.choice(list(METHODS))
        request = self._request(method, self._valid.message(method), spoilt=True)
        damaged = self._rng.random() < 0.1
        return [[replace(request, wire=self._mutator.wire(request.wire)) if damaged else request]]

    def _garbage(self) -> Waves:
        method = self._rng.choice(list(METHODS))
        if self._rng.random() < 0.5:
            return [[Request(method, self._mutator.garbage())]]
        return [[Request(method, self._mutator.wire(self._valid.message(method).SerializeToString()))]]

    def _asking(self) -> Waves:
        methods = ("GetCapabilities", "GetStatus", "GetUpdate", "CheckManifest")
        return [[self._request(method, self._valid.message(method), spoilt=False) for method in methods]]

    def _flood(self) -> Waves:
        """One request of a megabyte or so."""
        method, message = flooded(self._rng, self._valid)
        return [[self._request(method, message, spoilt=False)]]

    def _one_call(self) -> Waves:
        num_buckets = self._rng.choice((1, 1, 2, 4))
        sends = self._valid.one_call(self._valid.new_id(), self._valid.manifest(num_buckets), self._valid.options())
        return [self._of_all_ranks("UpdateWeights", sends)]

    def _repeated(self) -> Waves:
        """The same calls again, as a trainer whose answers were lost makes them."""
        (wave,) = self._one_call()
        return [wave, wave]

    def _bucketed(self) -> Waves:
        num_buckets, update_id = self._rng.choice((1, 2, 3)), self._valid.new_id()
        spoilt = self._is_spoilt()
        options = self._valid.options()
        begins = self._valid.begin(update_id, self._valid.manifest(num_buckets), options)
        waves = [self._of_all_ranks("BeginUpdate", begins, spoilt)]
        if self._rng.random() < 0.4:
            holds = [pb.HoldUpdateRequest(update_id=update_id, rank=rank) for rank in range(self._tp_size)]
            waves.append([replace(self._request("HoldUpdate", hold, spoilt), holds=True) for hold in holds])
        pushes = [self._pushes(update_id, bucket) for bucket in range(num_buckets)]
        waves += [self._of_all_ranks("PushBucket", push, spoilt) for push in pushes]
        waves += self._ending(update_id, options, spoilt)
        return self._in_some_order(waves)

    def _over_a_group(self) -> Waves:
        """One rank or all take part; the group is left, or not."""
        update_id, name, spoilt = self._valid.new_id(), self._valid.group_name(), self._is_spoilt()
        options = {**self._valid.options(), "group_name": name}
        begins = self._valid.begin(update_id, self._valid.dense_manifest(self._rng.choice((1, 2))), options)
        waves = [
            [self._request("InitWeightsUpdateGroup", self._valid.join(name), spoilt)],
            self._of_all_ranks("BeginUpdate", begins, spoilt),
            self._of_all_ranks("PrepareUpdate", _of_rank(pb.PrepareUpdateRequest, update_id), spoilt),
            *self._ending(update_id, options, spoilt),
        ]
        if self._rng.random() < 0.8:
            leave = pb.DestroyWeightsUpdateGroupRequest(group_name=name)
            waves.append([self._request("DestroyWeightsUpdateGroup", leave, spoilt)])
        return self._in_some_order(waves)

    def _in_some_order(self, waves: Waves) -> Waves:
        if self._rng.random() < 0.15:
            self._rng.shuffle(waves)
        return waves

    def _pushes(self, update_id: str, bucket: int) -> Callable[[int], Message]:
        return lambda rank: pb.PushBucketRequest(
            update_id=update_id, rank=rank, bucket=bucket, handle=self._valid.handle(rank, bucket)
        )

    def _ending(self, update_id: str, options: Mapping[str, Any], spoilt: bool) -> Waves:
        if self._rng.random() < 0.2:
            abort = pb.AbortUpdateRequest(update_id=update_id, rank=0, reason="enough")
            return [[self._request("AbortUpdate", abort, spoilt)]]
        waves = [self._of_all_ranks("CommitUpdate", _of_rank(pb.CommitUpdateRequest, update_id), spoilt)]
        if options.get("two_phase") and self._rng.random() < 0.8:
            waves.append(self._of_all_ranks("PublishUpdate", _of_rank(pb.PublishUpdateRequest, update_id), spoilt))
        return waves

    def _disk(self) -> Waves:
        return [[self._request("UpdateWeightsFromDisk", self._valid.disk(self._valid.new_id()), self._is_spoilt())]]

    def _adapter(self) -> Waves:
        name = f"adapter {self._rng.randrange(3)}" if self._rng.random() < 0.7 else self._valid.new_id()
        sends = self._valid.adapter(self._valid.new_id(), name)
        waves = [self._of_all_ranks("LoadLoraAdapter", sends)]
        unload = pb.UnloadLoraAdapterRequest(lora_name=name)
        return [*waves, [self._request("UnloadLoraAdapter", unload, self._is_spoilt())]]

    # Parts.

    def _is_spoilt(self) -> bool:
        return self._rng.random() < 0.4

    def _of_all_ranks(self, method: str, sends: Callable[[int], Message], spoilt: bool | None = None) -> Wave:
        spoilt = self._is_spoilt() if spoilt is None else spoilt
        bad_rank = self._rng.randrange(self._tp_size)
        requests = [self._request(method, sends(rank), spoilt and rank == bad_rank) for rank in range(self._tp_size)]
        return [replace(request, budget_s=SPOILT_S if spoilt else HEALTHY_S) for request in requests]

    def _request(self, method: str, message: Message, spoilt: bool) -> Request:
        if spoilt:
            self._mutator.change(message)
        wire = message.SerializeToString()[:MAX_WIRE]
        return Request(method, wire, SPOILT_S if spoilt else HEALTHY_S)


def _of_rank(kind: Callable[..., Message], update_id: str) -> Callable[[int], Message]:
    return lambda rank: kind(update_id=update_id, rank=rank)
