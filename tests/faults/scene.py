"""Plays one cell: brings an update to a phase, does the deed, and returns what the ranks saw.

A phase with a request is reached by having the engine hang at that request, which goes on once the deed is done.
Collecting and the wait between buckets are reached by a rank that holds a bucket back. Invariant: whatever was
stopped goes on again, and every call that was made has ended, when ``play`` returns.
"""

import time
from dataclasses import asdict, dataclass, replace

from tests.fakes import ANY_PATH, FOREVER, Fault
from tests.faults import content
from tests.faults.matrix import DEAD, Cell, What, When, Who
from tests.faults.rank import Job
from tests.faults.ranks import RankProcess
from tests.faults.rig import Rig, wait_until

LOAD = "/update_weights_from_tensor"
LOOK = "/model_info"
PATHS = {
    When.PAUSE: "/pause_generation",
    When.BEGIN: "/begin_weight_update",
    When.LOAD_FIRST: LOAD,
    When.LOAD_LAST: LOAD,
    When.END: "/end_weight_update",
    When.FLUSH: "/flush_cache",
    When.VERIFY: "/weights_checker",
    When.PUBLISH: "/update_weight_version",
    When.RESUME: "/continue_generation",
}
QUIET = (When.COLLECT, When.BETWEEN)
"""No request to the engine is on its way, but for looks."""
KILLS = {When.LOAD_FIRST: Fault.HALF_LOAD, When.LOAD_LAST: Fault.HALF_LOAD, When.RESUME: Fault.DIE_AFTER}
"""Where a SIGKILL hits the engine in the middle of something, or after it; elsewhere before."""
PATIENCE_S = 20.0
SHORT_S = 1.8
"""A deadline that a cell waits out."""
SLOW_S = 0.4
"""Less than every deadline."""
NOTICE_S = 0.4
"""For the sidecar to hear that a connection has ended, which the kernel tells it at once."""
QUEUE_S = 0.5
"""For an engine that goes on to deal with what has queued up."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Seen:
    """What came of a cell, before anything was healed."""

    job: Job
    sees: tuple[str, str]
    """How the calls of rank 0 and of rank 1 ended."""
    started: float
    ended: float
    """When the last call had ended, on time.monotonic()."""


def play(rig: Rig, cell: Cell) -> Seen:
    """One cell, on a healthy rig."""
    scene = Scene(rig, cell)
    started = time.monotonic()
    try:
        scene.reach()
        scene.do()
        sees = scene.saw(0), scene.saw(1)
        return Seen(job=scene.job, sees=sees, started=started, ended=time.monotonic())
    finally:
        scene.let_all_go_on()


class Scene:
    """One cell's update."""

    def __init__(self, rig: Rig, cell: Cell) -> None:
        self.rig = rig
        self.who, self.what, self.when, self.unopened = cell.who, cell.what, cell.when, cell.unopened
        self.bystander, self.victim = rig.ranks
        version = rig.next_version()
        all_wait = self.who is Who.SIDECAR and self.what in (What.STOPPED, What.LOST)
        self.job = Job(
            update_id=f"{cell}-{version}",
            version=version,
            one_call=self.who is Who.ONE_CALL_RANK,
            deadline_s=SHORT_S if all_wait else PATIENCE_S,
            verify=self.when is When.VERIFY,
        )

    @property
    def victims_job(self) -> Job:
        """Where its answers are lost, it must not wait for them for long."""
        lost = self.what is What.LOST and self.who is not Who.ENGINE
        return replace(self.job, deadline_s=SHORT_S) if lost else self.job

    # Reaching the phase.

    def reach(self) -> None:
        """Start the update, and return when it is in the phase."""
        match self.when:
            case When.COLLECT if self.who is Who.ONE_CALL_RANK:
                self._reach_collect_in_one_call()
            case When.COLLECT:
                self._reach_collect()
            case When.BETWEEN:
                self._start(self.bystander, self.job)
                self._start(self.victim, replace(self.victims_job, withhold=1))
                self.bystander.wait("loaded", bucket=0)
            case _:
                self._reach_request()

    @property
    def _is_late(self) -> bool:
        """Whether the fault keeps rank 1 from arriving; otherwise it has arrived, and rank 0 is awaited."""
        return self.what in (What.STOPPED, What.SLOW) or self.who in (Who.SIDECAR, Who.ENGINE)

    def _reach_collect(self) -> None:
        if self._is_late:
            self._start(self.bystander, self.job)
            self._start(self.victim, replace(self.victims_job, withhold=0))
        else:
            self._start(self.victim, self.victims_job)
            self._start(self.bystander, replace(self.job, withhold=0))
        self._wait_for_missing(1 if self._is_late else 0)

    def _reach_collect_in_one_call(self) -> None:
        """The rank that is late makes its only call after the deed."""
        if self._is_late:
            self.victim.stop()
            short = self.what is What.STOPPED
            job = replace(self.job, deadline_s=SHORT_S) if short else self.job
            self._start(self.victim, job)  # read when it goes on
            self._start(self.bystander, job)
        else:
            self._start(self.victim, self.victims_job)
        self._wait_for_missing(1 if self._is_late else 0)

    @staticmethod
    def _start(rank: RankProcess, job: Job) -> None:
        rank.start(asdict(job))

    def _wait_for_missing(self, rank: int) -> None:
        wait_until(lambda: list(self.rig.status().current_update.waiting_for_ranks) == [rank])

    def _reach_request(self) -> None:
        fault = self._fault()
        after = 1 if self.when is When.LOAD_LAST else 0
        self.rig.engine.fault(PATHS[self.when], fault, after=after, delay_s=2 * NOTICE_S)
        self._start(self.bystander, self.job)
        self._start(self.victim, self.victims_job)
        if fault is Fault.HANG:
            wait_until(lambda: self.rig.engine.num_hanging == 1)
        if fault is Fault.LATE:
            wait_until(self._is_loaded)

    def _is_loaded(self) -> bool:
        """Whether the bucket that is being loaded has been."""
        bucket = 0 if self.when is When.LOAD_FIRST else 1
        return content.holds(self.rig.engine.loaded, self.job.version, bucket)

    def _fault(self) -> Fault:
        """What the engine does at the phase's request: fail by itself, or hang until the deed is done."""
        if self.who is not Who.ENGINE:
            opened = self.what is What.KILLED and self.who is not Who.SIDECAR and not self.unopened
            return Fault.LATE if opened and PATHS[self.when] is LOAD else Fault.HANG
        match self.what:
            case What.CUT:
                return Fault.CUT
            case What.LOST:
                return Fault.LOSE_REPLY
            case What.KILLED:
                return KILLS.get(self.when, Fault.DIE)
            case _:
                return Fault.HANG

    # The deed.

    def do(self) -> None:
        """Inflict the fault, and let the update take its course."""
        match self.who:
            case Who.SIDECAR:
                self._to_the_sidecar()
            case Who.ENGINE:
                self._to_the_engine()
            case _:
                self._to_the_rank()
        self.rig.engine.release()
        self._free_buckets()
        if self.who is Who.ONE_CALL_RANK and self.when is When.COLLECT and not self._is_late:
            self._bystander_calls()

    def _to_the_rank(self) -> None:
        match self.what:
            case What.KILLED:
                self.victim.kill()
                if self.unopened:
                    self.victim.remove_memory()
                time.sleep(NOTICE_S)
            case What.CUT:
                self.rig.wires[1].cut()
                time.sleep(NOTICE_S)
            case What.LOST:
                self.rig.wires[1].swallow()
            case What.SLOW:
                self.victim.stop()
                time.sleep(SLOW_S)
                self.victim.go_on()
            case What.STOPPED:
                self.victim.stop()
                self.rig.engine.release()
                self.bystander.wait("done")  # without it
                self.victim.go_on()

    def _to_the_sidecar(self) -> None:
        rig = self.rig
        match self.what:
            case What.KILLED:
                rig.kill_sidecar()
            case What.CUT:
                for wire in rig.wires:
                    wire.cut()
                time.sleep(NOTICE_S)
            case What.LOST:
                for wire in rig.wires:
                    wire.swallow()
            case What.SLOW:
                rig.stop_sidecar()
                time.sleep(SLOW_S)
                rig.continue_sidecar()
            case What.STOPPED:
                rig.stop_sidecar()
                rig.engine.release()  # which has no fault: it answers, and waits for what comes next
                for rank in self._callers():
                    rank.wait("missed")
                rig.continue_sidecar()
                time.sleep(NOTICE_S)

    def _callers(self) -> list[RankProcess]:
        """Ranks with a call that must be answered; one that holds a bucket back has none."""
        return [self.bystander] if self.when in QUIET else [self.bystander, self.victim]

    def _to_the_engine(self) -> None:
        engine = self.rig.engine
        match self.what:
            case What.SLOW:
                if self.when in QUIET:
                    engine.fault(LOOK, Fault.HANG)
                time.sleep(SLOW_S)
            case What.STOPPED:  # it takes connections, as the kernel does for it, and answers nothing
                engine.fault(ANY_PATH, Fault.HANG, times=FOREVER)
                self._free_buckets()
                for rank in self.rig.ranks:
                    rank.wait("done")
            case What.KILLED if self.when in QUIET:
                engine.die()
            case What.CUT | What.LOST if self.when in QUIET:
                looks = engine.paths("GET").count(LOOK)
                engine.fault(LOOK, Fault.CUT if self.what is What.CUT else Fault.LOSE_REPLY)
                wait_until(lambda: engine.paths("GET").count(LOOK) > looks + 1)

    def _free_buckets(self) -> None:
        for rank in self.rig.ranks:
            if not rank.dead:
                rank.tell("go on")

    def _bystander_calls(self) -> None:
        """In one call rank 0 arrives only now: to nobody, once rank 1 has given up."""
        if self.what is What.CUT:
            self.victim.wait("done")
        self._start(self.bystander, replace(self.job, deadline_s=SHORT_S))

    # What comes of it.

    def saw(self, rank: int) -> str:
        """How that rank's calls ended."""
        process = self.rig.ranks[rank]
        return DEAD if process.dead else str(process.wait("done")["saw"])

    def let_all_go_on(self) -> None:
        """Whatever was stopped."""
        for rank in self.rig.ranks:
            if not rank.dead:
                rank.go_on()
        self.rig.continue_sidecar()
        give_up = time.monotonic() + (QUEUE_S if self.what is What.STOPPED and self.who is Who.ENGINE else 0.0)
        self.rig.engine.release()
        while time.monotonic() < give_up:  # each call that has queued up hangs once it is its turn
            time.sleep(0.01)
            self.rig.engine.release()
