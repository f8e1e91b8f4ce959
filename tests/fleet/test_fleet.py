"""Fifty updates of three real engines under traffic, and then every fault with every policy.

What is shown: no request is ever answered with a version that the fleet did not publish; engines that serve one version
give the same tokens; the result says of each engine what happened; whoever was left behind is caught up.
"""

import time
from collections.abc import Iterator, Mapping
from itertools import count

import pytest

from adapter.demo import tiny_model
from adapter.fleet import (
    ALL_OR_NOTHING,
    BEST_EFFORT,
    EngineResult,
    EngineState,
    Fleet,
    FleetResult,
    FleetUpdateFailed,
    Policy,
    quorum,
)
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fleet import faults
from tests.fleet.faults import Fault, StruckGroup
from tests.fleet.router import Answer, Router, routing
from tests.fleet.world import START_S, Site, World, open_world, wait_until

pytestmark = [pytest.mark.fleet, pytest.mark.timeout(3000)]

UPDATES = 50
SMALL_BUCKET_BYTES = 400_000
RETURNS_WITHIN_S = 90.0
POLICIES = (ALL_OR_NOTHING, quorum(2), BEST_EFFORT)


class Story:
    """One fleet, its traffic, and what may be served."""

    def __init__(self, world: World, router: Router) -> None:
        self.world = world
        self.router = router
        self.fenced: list[str] = []
        self.may_be_served: set[str] = set()
        self.seed_of: dict[str, int] = {}
        self._versions = count(1)

    def fleet(self, policy: Policy) -> Fleet:
        return Fleet(
            self.world.targets,
            policy=policy,
            on_fenced=lambda target, _: self.fenced.append(target),
            bucket_bytes=SMALL_BUCKET_BYTES,
            staging_buffers=1,
            device="cpu",
            address=self.world.network.address,
            patience=15.0,
            transfer_timeout=8.0,
            make_group=StruckGroup,
        )

    def update(self, fleet: Fleet) -> FleetResult:
        """The next version, which may be served from now on, and if it is not published never again."""
        version = str(next(self._versions))
        self.seed_of[version] = int(version) % 7
        self.may_be_served.add(version)
        began = time.monotonic()
        try:
            return fleet.update_weights(self.weights(version), version=version, timeout=60.0)
        except FleetUpdateFailed:
            self.may_be_served.discard(version)
            raise
        finally:
            assert time.monotonic() - began < RETURNS_WITHIN_S

    def weights(self, version: str) -> tiny_model.NamedTensors:
        return tiny_model.random_weights(self.seed_of[version])

    def check(self) -> None:
        """Every answer so far."""
        for answer in list(self.router.answers):
            assert set(answer.versions) <= self.may_be_served, f"{answer}: the fleet never published that"
        by_content: dict[tuple[int, tuple[int, ...]], Answer] = {}
        for answer in list(self.router.answers):
            if len(answer.versions) == 1:
                content = self.seed_of[answer.versions[0]], answer.prompt
                first = by_content.setdefault(content, answer)
                assert first.tokens == answer.tokens, f"one content, other tokens: {first} and {answer}"


@pytest.fixture(scope="module")
def story(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Story]:
    """Three hosts under traffic; gloo takes the bridge."""
    with pytest.MonkeyPatch.context() as patch, open_world(tmp_path_factory.mktemp("fleet")) as world:
        patch.setenv("GLOO_SOCKET_IFNAME", world.network.bridge)
        with routing(world.sites) as router:
            yield Story(world, router)


def test_fifty_updates_reach_all_engines_and_no_request_is_lost(story: Story) -> None:
    with story.fleet(ALL_OR_NOTHING) as fleet:
        assert {status.state for status in _statuses(fleet)} == {pb.SIDECAR_STATE_UNSYNCED}  # by --require-update
        took = []
        for _ in range(UPDATES):
            result = story.update(fleet)
            assert result.published == sorted(story.world.targets)
            took.append(sum(result.seconds.values()))
            assert fleet.version == result.weight_version
        assert {status.weight_version for status in _statuses(fleet)} == {str(UPDATES)}
    assert story.router.lost == []
    served = {version for answer in story.router.answers for version in answer.versions}
    assert len(served) > UPDATES / 4, "the traffic has met too few versions"
    assert {answer.target for answer in story.router.answers} == set(story.world.targets)
    story.check()
    print(f"\n{UPDATES} updates, {len(story.router.answers)} answers of {len(served)} versions, median update "
          f"{sorted(took)[UPDATES // 2]:.3f} s, slowest {max(took):.3f} s")  # fmt: skip


@pytest.mark.parametrize("policy", POLICIES, ids=str)
@pytest.mark.parametrize("fault", faults.ALL, ids=str)
def test_a_fault_in_the_middle_of_a_broadcast(story: Story, fault: Fault, policy: Policy) -> None:
    with story.fleet(policy) as fleet:
        story.update(fleet)
        struck = story.world.sites[1]
        others = [site.target for site in story.world.sites if site is not struck]
        story.fenced.clear()
        began = time.monotonic()
        StruckGroup.arm(lambda: fault.strike(struck))
        try:
            engines = _under_fault(story, fleet, policy, struck, others)
        finally:
            took = time.monotonic() - began
            fault.undo(struck)
        _healed(story, fleet, struck)
    lost_elsewhere = [lost for lost in story.router.lost if lost.target != struck.target]
    assert lost_elsewhere == []
    story.check()
    said = {target: str(engine.state) for target, engine in engines.items()}
    print(f"\n{fault}, {policy}: returned in {took:.1f} s, {said}; healed")


def _under_fault(
    story: Story, fleet: Fleet, policy: Policy, struck: Site, others: list[str]
) -> Mapping[str, EngineResult]:
    """One update that meets it: what became of each engine."""
    if policy is ALL_OR_NOTHING:
        with pytest.raises(FleetUpdateFailed) as failed:
            story.update(fleet)
        engines: Mapping[str, EngineResult] = failed.value.engines
        assert not any(engine.state is EngineState.PUBLISHED for engine in engines.values())
        healed = fleet.catch_up(story.weights(fleet.version))  # the others go on with what they had
        assert healed is not None
        assert healed.published == sorted(others)
    else:
        result = story.update(fleet)
        engines = result.engines
        assert result.published == sorted(others)
        assert result.left_behind == [struck.target]
        assert struck.target in story.fenced
        assert {status.weight_version for status in _of(fleet, others)} == {result.weight_version}
    assert set(engines) == set(story.world.targets)
    assert engines[struck.target].error
    return engines


def _healed(story: Story, fleet: Fleet, struck: Site) -> None:
    """The struck engine answers again, and is brought to the fleet's version; after all or nothing, all are."""
    wait_until(lambda: _is_there(fleet, struck), START_S, f"{struck.target} is reachable again")
    caught_up = fleet.catch_up(story.weights(fleet.version))
    assert caught_up is None or struck.target in caught_up.published
    assert {status.weight_version for status in _statuses(fleet)} == {fleet.version}
    result = story.update(fleet)
    assert result.published == sorted(story.world.targets)


def _is_there(fleet: Fleet, site: Site) -> bool:
    """Whether it could take an update: its engine answers, and no update is in its hands any more."""
    status = fleet.status()[site.target]
    if not isinstance(status, pb.GetStatusResponse) or not status.HasField("engine"):
        return False
    return not status.HasField("current_update") and site.answers()


def _statuses(fleet: Fleet) -> list[pb.GetStatusResponse]:
    return _of(fleet, list(fleet.status()))


def _of(fleet: Fleet, targets: list[str]) -> list[pb.GetStatusResponse]:
    found = fleet.status()
    statuses = [found[target] for target in targets]
    assert all(isinstance(status, pb.GetStatusResponse) for status in statuses), statuses
    return [status for status in statuses if isinstance(status, pb.GetStatusResponse)]
