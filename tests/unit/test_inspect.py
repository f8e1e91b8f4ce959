"""What ``status`` says of a sidecar, and what watching one looks like; the sidecar is a gRPC server with a script."""

import io
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import grpc
import pytest

from sidecar.inspect import SERVICE_NAME, describe, in_clear, status_text, watch
from sidecar.v1 import weight_sync_pb2 as pb

READY = pb.GetStatusResponse(state=pb.SIDECAR_STATE_READY, weight_version="6")


def phase(number: pb.Phase.ValueType, milliseconds: int) -> pb.PhaseDuration:
    made = pb.PhaseDuration(phase=number)
    made.duration.FromMilliseconds(milliseconds)
    return made


def applying(load_ms: int = 1500) -> pb.GetStatusResponse:
    return pb.GetStatusResponse(
        state=pb.SIDECAR_STATE_APPLYING,
        weight_version="6",
        engine=pb.EngineInfo(version="0.5.23", tp_size=2, device="cuda", replays=True),
        current_update=pb.UpdateOutcome(
            update_id="u7",
            weight_version="7",
            state=pb.UPDATE_STATE_APPLYING,
            num_buckets=17,
            num_posted=3,
            waiting_for_ranks=[1],
            phases=[phase(pb.PHASE_COLLECT, 250), phase(pb.PHASE_PAUSE, 12), phase(pb.PHASE_LOAD, load_ms)],
        ),
        last_update=pb.UpdateOutcome(
            update_id="u6",
            weight_version="6",
            state=pb.UPDATE_STATE_COMMITTED,
            num_buckets=17,
            num_posted=17,
            load_path=pb.LOAD_PATH_FELL_BACK,
            load_reason="shapes changed",
            verification=pb.VERIFICATION_PROVEN,
            transport=pb.TRANSPORT_IPC,
            phases=[phase(pb.PHASE_COLLECT, 1000), phase(pb.PHASE_LOAD, 200_000)],
            notes=["requests in flight kept the cache"],
        ),
    )


def test_an_update_in_hand_and_the_last_one_are_told_with_phase_bucket_ranks_and_age() -> None:
    assert describe(applying()).splitlines() == [
        "state:   applying",
        "engine:  SGLang 0.5.23, tp_size 2, cuda, replay loader",
        "serves:  version '6'",
        "update:  'u7' (version '7') applying, bucket 3 of 17, load, waits for ranks [1], for 1.8 s now",
        "         collect 250 ms, pause 12 ms",
        "last:    'u6' (version '6') committed in 3 min 21 s, bucket 17 of 17, ipc, fell_back (shapes changed), proven",
        "         collect 1.0 s, load 3 min 20 s",
        "         requests in flight kept the cache",
    ]


def test_an_engine_that_is_not_there_is_told_with_the_reason() -> None:
    status = pb.GetStatusResponse(state=pb.SIDECAR_STATE_ENGINE_UNREACHABLE, reason="connection refused")
    assert describe(status).splitlines() == [
        "state:   engine_unreachable - connection refused",
        "serves:  no one version",
    ]


def test_the_group_that_the_engine_is_in_is_told() -> None:
    group = pb.WeightsUpdateGroup(
        group_name="update-7", master_address="10.0.0.1", master_port=29500, rank_offset=3, world_size=5, backend="nccl"
    )
    last = pb.UpdateOutcome(
        update_id="u6", weight_version="6", state=pb.UPDATE_STATE_COMMITTED, transport=pb.TRANSPORT_DISTRIBUTED
    )
    status = pb.GetStatusResponse(state=pb.SIDECAR_STATE_READY, weight_version="6", group=group, last_update=last)
    assert describe(status).splitlines() == [
        "state:   ready",
        "group:   'update-7' of 5 ranks (nccl, 10.0.0.1:29500), the engine's from 3 on",
        "serves:  version '6'",
        "last:    'u6' (version '6') committed in 0 ms, bucket 0 of 0, distributed",
    ]


def test_an_update_that_waits_for_its_word_is_told() -> None:
    status = pb.GetStatusResponse(
        state=pb.SIDECAR_STATE_APPLYING,
        current_update=pb.UpdateOutcome(
            update_id="u7",
            state=pb.UPDATE_STATE_APPLYING,
            num_buckets=2,
            num_posted=2,
            waiting_for_ranks=[0, 1],
            phases=[phase(pb.PHASE_COLLECT, 1), phase(pb.PHASE_LOAD, 2), phase(pb.PHASE_DECIDE, 10)],
        ),
    )
    assert "bucket 2 of 2, decide, waits for ranks [0, 1], for 13 ms now" in describe(status)


def test_words_of_others_cannot_move_the_cursor() -> None:
    status = pb.GetStatusResponse(state=pb.SIDECAR_STATE_DIRTY, reason="\x1b[2J\rready")
    assert describe(status).splitlines()[0] == "state:   dirty - \\x1b[2J\\rready"


class Script:
    """Answers ``GetStatus`` as it is told."""

    def __init__(self) -> None:
        self.status = READY

    def handler(self) -> grpc.GenericRpcHandler:
        answer: grpc.RpcMethodHandler[Any, Any] = grpc.unary_unary_rpc_method_handler(
            lambda request, context: self.status, response_serializer=pb.GetStatusResponse.SerializeToString
        )
        return grpc.method_handlers_generic_handler(SERVICE_NAME, {"GetStatus": answer})


@contextmanager
def serving(target: str, script: Script) -> Iterator[None]:
    with ThreadPoolExecutor(1) as pool:
        server = grpc.server(pool, options=[("grpc.so_reuseport", 0)])
        server.add_generic_rpc_handlers((script.handler(),))
        server.add_insecure_port(target)
        server.start()
        try:
            yield
        finally:
            server.stop(None).wait()


@pytest.fixture
def target(tmp_path: Path) -> str:
    return f"unix:{tmp_path}/s.sock"


class Screen(io.StringIO):
    def isatty(self) -> bool:
        return True


def looks(target: str, out: io.StringIO, *between: Callable[[], object]) -> int:
    """Watch, with something done after each look, and Ctrl-C at last."""
    steps = iter(between)

    def sleep(seconds: float) -> None:
        assert seconds == 0.5
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    return watch(target, interval_s=0.5, timeout_s=5.0, out=out, sleep=sleep)


def test_without_a_terminal_only_news_is_printed(target: str) -> None:
    script, out = Script(), io.StringIO()

    def now(status: pb.GetStatusResponse) -> Callable[[], None]:
        return lambda: setattr(script, "status", status)

    with serving(target, script):
        code = looks(target, out, now(READY), now(applying(100)), now(applying(900)), now(READY))
    assert code == 0
    states = [line for line in out.getvalue().splitlines() if line.startswith("state")]
    assert states == ["state:   ready", "state:   applying", "state:   ready"]


def test_a_terminal_is_drawn_over_at_each_look(target: str) -> None:
    out = Screen()
    with serving(target, Script()):
        looks(target, out, lambda: None)
    first, second = out.getvalue().split("\x1b[H")[1:]
    for drawn in (first, second):
        assert f"  {target}\x1b[K\n\x1b[K\nstate:   ready\x1b[K\n" in drawn
        assert drawn.endswith("\x1b[J")


def test_a_sidecar_that_goes_away_is_told_and_waited_for(target: str) -> None:
    out, channels = io.StringIO(), []

    def connect(to: str) -> grpc.Channel:
        channels.append(in_clear(to))
        return channels[-1]

    first, second = serving(target, Script()), serving(target, Script())
    first.__enter__()
    steps = iter([lambda: first.__exit__(None, None, None), lambda: None, second.__enter__])

    def sleep(_: float) -> None:
        step = next(steps, None)
        if step is None:
            raise KeyboardInterrupt
        step()

    assert watch(target, interval_s=0.0, timeout_s=5.0, connect=connect, out=out, sleep=sleep) == 0
    second.__exit__(None, None, None)
    said = [block.splitlines()[0] for block in out.getvalue().split("\n\n") if block]
    assert said[0] == said[2] == "state:   ready"
    assert said[1].startswith(f"the sidecar at {target} does not answer (")
    assert said[1].endswith("; waiting for it")
    assert len(said) == 3
    assert len(channels) == 3


def test_a_reader_that_has_gone_ends_the_watch(target: str) -> None:
    class Gone(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError

    with serving(target, Script()):
        assert looks(target, Gone()) == 0


def test_one_look_goes_through_the_channel_that_was_given(target: str) -> None:
    with serving(target, Script()):
        assert status_text("nowhere", timeout_s=5.0, connect=lambda _: in_clear(target))[0]


def test_one_look_at_nobody_says_so(target: str) -> None:
    reached, text = status_text(target, timeout_s=5.0)
    assert (reached, text.endswith("is it running?")) == (False, True)


def test_ctrl_c_ends_the_command_with_0(target: str) -> None:
    command = [sys.executable, "-m", "sidecar", "status", "--watch", "0.05", "--target", target]
    with serving(target, Script()), subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as watching:
        assert watching.stdout is not None
        assert watching.stdout.readline() == "state:   ready\n"
        watching.send_signal(signal.SIGINT)
        assert watching.wait(30) == 0
