"""TLS, client certificates and tokens over real sockets: who gets in, who may do what, and what follows a rotation."""

import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, closing
from datetime import timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest
import torch
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from adapter import Credentials, NotAllowed, SidecarUnreachable, WeightSyncClient
from adapter.launch import SidecarConfig, SidecarProcess, free_port
from sidecar.v1 import weight_sync_pb2 as pb
from sidecar.v1 import weight_sync_pb2_grpc as pb_grpc
from tests.fakes import ScriptedEngine
from tests.integration.certificates import HOST, Authority, Files
from tests.integration.support import ANSWER_S, header, manifest, refusal, wait_until

TOKEN, LOOK = "token-of-those-who-update", "token-of-those-who-look"
STATUS = pb.GetStatusRequest()
WEIGHTS = [("layer.0.weight", torch.arange(6.0).reshape(2, 3))]


class Guarded:
    """A sidecar on TCP beside a scripted engine, with an authority of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.authority = Authority(folder)
        self.server = self.authority.issue(HOST, file="server")
        self.target = f"{HOST}:{free_port()}"
        self._stack = ExitStack()
        self.engine = self._stack.enter_context(ScriptedEngine(tp_size=1))
        (folder / "update.token").write_text(TOKEN)
        (folder / "look.token").write_text(LOOK)
        self.process: SidecarProcess | None = None

    @property
    def tls(self) -> list[str]:
        return ["--tls-certificate", str(self.server.certificate), "--tls-key", str(self.server.key)]

    @property
    def mtls(self) -> list[str]:
        return [*self.tls, "--tls-client-ca", str(self.authority.path)]

    @property
    def tokens(self) -> list[str]:
        folder = self.folder
        return ["--update-token-file", f"{folder}/update.token", "--look-token-file", f"{folder}/look.token"]

    def start(self, args: list[str], credentials: Credentials) -> None:
        config = SidecarConfig(
            engine_url=self.engine.url,
            listen=self.target,
            log_path=self.folder / "log",
            args=tuple(args),
            grace_s=0.0,
            credentials=credentials,
        )
        self.process = self._stack.enter_context(SidecarProcess(config))
        wait_until(lambda: self.rpc(credentials).GetStatus(STATUS, timeout=5).state == pb.SIDECAR_STATE_READY)

    def rpc(self, credentials: Credentials) -> pb_grpc.WeightSyncServiceStub:
        return pb_grpc.WeightSyncServiceStub(self.channel(credentials))

    def channel(self, credentials: Credentials) -> grpc.Channel:
        return self._stack.enter_context(
            credentials.channel(self.target, [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)])
        )

    def client(self, credentials: Credentials) -> WeightSyncClient:
        return self._stack.enter_context(
            closing(WeightSyncClient(self.target, rank=0, tp_size=1, credentials=credentials))
        )

    def as_client(self, name: str, **more: Any) -> Credentials:
        return as_client(self.authority, self.authority.issue(name), **more)

    def close(self) -> None:
        self._stack.close()


def as_client(authority: Authority, files: Files, **more: Any) -> Credentials:
    return Credentials(ca=authority.path, certificate=files.certificate, key=files.key, **more)


@pytest.fixture
def guarded(tmp_path: Path) -> Iterator[Guarded]:
    with closing(Guarded(tmp_path)) as guarded:
        yield guarded


def test_tls_encrypts_and_who_does_not_speak_it_gets_nothing(guarded: Guarded) -> None:
    guarded.start(guarded.tls, Credentials(ca=guarded.authority.path))
    with pytest.raises(SidecarUnreachable):
        guarded.client(Credentials()).status()
    stranger = Authority(guarded.folder, "stranger")
    with pytest.raises(SidecarUnreachable):
        guarded.client(Credentials(ca=stranger.path)).status()


def test_with_mtls_only_clients_of_our_authority_get_in(guarded: Guarded) -> None:
    guarded.start(guarded.mtls, guarded.as_client("trainer"))
    with pytest.raises(SidecarUnreachable):
        guarded.client(Credentials(ca=guarded.authority.path)).status()
    forged = Authority(guarded.folder, "stranger").issue("trainer", file="forged")
    with pytest.raises(SidecarUnreachable):
        guarded.client(as_client(guarded.authority, forged)).status()


def test_an_expired_certificate_is_refused(guarded: Guarded) -> None:
    guarded.start(guarded.mtls, guarded.as_client("trainer"))
    expired = guarded.authority.issue("trainer", -timedelta(hours=1), file="expired")
    with pytest.raises(SidecarUnreachable):
        guarded.client(as_client(guarded.authority, expired)).status()


def test_a_client_that_is_not_named_may_look_and_not_update(guarded: Guarded) -> None:
    guarded.start([*guarded.mtls, "--update-clients", "trainer"], guarded.as_client("trainer"))
    looker = guarded.client(guarded.as_client("dashboard"))
    assert looker.status().state == pb.SIDECAR_STATE_READY
    with pytest.raises(
        NotAllowed, match="UpdateWeightsFromDisk needs the right to update, and dashboard may only look"
    ):
        looker.update_weights_from_disk(version="7")
    trainer = guarded.client(guarded.as_client("trainer"))
    assert trainer.update_weights(WEIGHTS, version="7").weight_version == "7"


def test_a_rank_cannot_be_taken_over_by_another_client(guarded: Guarded) -> None:
    owner = guarded.as_client("trainer")
    guarded.start(guarded.mtls, owner)
    reference = pb.ManifestReference(manifest=manifest(2))
    begin = pb.BeginUpdateRequest(update=header("mine", 0, 1), manifest=reference)
    guarded.rpc(owner).BeginUpdate(begin, timeout=ANSWER_S)
    thief = guarded.rpc(guarded.as_client("neighbour"))
    for answer in (
        thief.BeginUpdate.future(begin, timeout=ANSWER_S),
        thief.AbortUpdate.future(pb.AbortUpdateRequest(update_id="mine", rank=0, reason="mine now"), timeout=ANSWER_S),
        thief.CommitUpdate.future(pb.CommitUpdateRequest(update_id="mine", rank=0), timeout=ANSWER_S),
    ):
        refused = refusal(answer)
        assert (refused.code, refused.reason) == (grpc.StatusCode.PERMISSION_DENIED, "NOT_YOURS")
    aborted = guarded.rpc(owner).AbortUpdate(
        pb.AbortUpdateRequest(update_id="mine", rank=0, reason="enough"), timeout=ANSWER_S
    )
    assert aborted.outcome.state == pb.UPDATE_STATE_ABORTED


def test_tokens_tell_who_updates_who_looks_and_who_does_neither(guarded: Guarded) -> None:
    ca = guarded.authority.path
    guarded.start([*guarded.tls, *guarded.tokens], Credentials(ca=ca, token=TOKEN))
    looker = guarded.client(Credentials(ca=ca, token_file=guarded.folder / "look.token"))
    assert looker.status().state == pb.SIDECAR_STATE_READY
    with pytest.raises(NotAllowed, match="needs the right to update"):
        looker.update_weights_from_disk(version="7")
    for token in ("", "a-wrong-token"):
        with pytest.raises(NotAllowed, match=r"the token is (missing|not one that this sidecar accepts)"):
            guarded.client(Credentials(ca=ca, token=token)).status()
    trainer = guarded.client(Credentials(ca=ca, token=TOKEN))
    assert trainer.update_weights(WEIGHTS, version="7").weight_version == "7"
    assert guarded.process is not None
    log = guarded.process.process.log_text()
    assert TOKEN not in log
    assert "a-wrong-token" not in log


def test_a_rotated_token_counts_from_the_next_call(guarded: Guarded) -> None:
    ca = guarded.authority.path
    guarded.start([*guarded.tls, *guarded.tokens], Credentials(ca=ca, token=TOKEN))
    old, new = guarded.client(Credentials(ca=ca, token=TOKEN)), guarded.client(Credentials(ca=ca, token="rotated"))
    old.status()
    (guarded.folder / "next").write_text("rotated")
    (guarded.folder / "next").rename(guarded.folder / "update.token")
    new.status()
    with pytest.raises(NotAllowed):
        old.status()


def test_a_rotated_certificate_and_authority_serve_without_a_restart(guarded: Guarded) -> None:
    before = guarded.as_client("trainer")
    guarded.start(guarded.mtls, before)
    kept = guarded.client(before)
    kept.status()
    old_ca = guarded.folder / "old.pem"
    old_ca.write_bytes(guarded.authority.path.read_bytes())
    renewed = Authority(guarded.folder)  # the same file, another authority
    renewed.issue(HOST, file="server")
    after = as_client(renewed, renewed.issue("trainer", file="renewed"))
    assert guarded.client(after).status().state == pb.SIDECAR_STATE_READY
    assert kept.status().state == pb.SIDECAR_STATE_READY, "a connection that is open stays"
    with pytest.raises(SidecarUnreachable):
        guarded.client(Credentials(ca=old_ca)).status()


def test_probes_need_no_token_and_reflection_does(guarded: Guarded) -> None:
    ca = guarded.authority.path
    guarded.start([*guarded.tls, *guarded.tokens], Credentials(ca=ca, token=TOKEN))
    channel = guarded.channel(Credentials(ca=ca))
    answer = health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=ANSWER_S)
    assert answer.status == health_pb2.HealthCheckResponse.SERVING
    request = reflection_pb2.ServerReflectionRequest(list_services="")
    with pytest.raises(grpc.RpcError) as raised:
        list(reflection_pb2_grpc.ServerReflectionStub(channel).ServerReflectionInfo(iter([request])))
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_what_a_stranger_sends_is_not_parsed(guarded: Guarded) -> None:
    ca = guarded.authority.path
    guarded.start([*guarded.tls, *guarded.tokens], Credentials(ca=ca, token=TOKEN))
    call: Any = guarded.channel(Credentials(ca=ca)).unary_unary("/sidecar.v1.WeightSyncService/CheckManifest")
    with pytest.raises(grpc.RpcError) as raised:
        call(b"no message at all", timeout=ANSWER_S)
    assert raised.value.code() is grpc.StatusCode.UNAUTHENTICATED


def test_those_who_look_cannot_use_up_the_calls_of_those_who_update(guarded: Guarded) -> None:
    ca = guarded.authority.path
    guarded.start([*guarded.tls, *guarded.tokens, "--max-open-calls", "2"], Credentials(ca=ca, token=TOKEN))
    looker = reflection_pb2_grpc.ServerReflectionStub(guarded.channel(Credentials(ca=ca)))
    over = threading.Event()

    def questions() -> Iterator[Any]:
        yield reflection_pb2.ServerReflectionRequest(list_services="")
        over.wait(ANSWER_S)

    look = [("authorization", f"Bearer {LOOK}")]
    streams = [looker.ServerReflectionInfo(questions(), metadata=look) for _ in range(3)]
    for stream in streams:
        next(stream)
    trainer = guarded.client(Credentials(ca=ca, token=TOKEN))
    assert trainer.update_weights(WEIGHTS, version="7").weight_version == "7"
    over.set()


def test_a_rank_is_free_again_once_its_attempt_has_ended(guarded: Guarded) -> None:
    first = guarded.as_client("trainer-before")
    guarded.start(guarded.mtls, first)
    begin = pb.BeginUpdateRequest(update=header("5", 0, 1), manifest=pb.ManifestReference(manifest=manifest(2)))
    rpc = guarded.rpc(first)
    rpc.BeginUpdate(begin, timeout=ANSWER_S)
    rpc.AbortUpdate(pb.AbortUpdateRequest(update_id="5", rank=0, reason="the pod is replaced"), timeout=ANSWER_S)
    guarded.rpc(guarded.as_client("trainer-after")).BeginUpdate(begin, timeout=ANSWER_S)


def test_certificates_that_cannot_serve_are_refused_at_the_start_and_kept_out_later(guarded: Guarded) -> None:
    other = guarded.authority.issue("other")
    argv = [sys.executable, "-m", "sidecar", "serve", "--engine-url", guarded.engine.url, "--listen", guarded.target]
    argv += ["--tls-certificate", str(guarded.server.certificate), "--tls-key", str(other.key)]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False)
    assert (done.returncode, "TLS cannot be served with" in done.stderr) == (3, True)
    trusted = Credentials(ca=guarded.authority.path)
    guarded.start(guarded.tls, trusted)
    guarded.server.key.write_bytes(other.key.read_bytes())
    assert guarded.client(trusted).status().state == pb.SIDECAR_STATE_READY


def test_the_command_line_brings_certificates_and_tokens(guarded: Guarded) -> None:
    guarded.start([*guarded.tls, *guarded.tokens], Credentials(ca=guarded.authority.path, token=TOKEN))

    def status(*arguments: str, **environ: str) -> subprocess.CompletedProcess[str]:
        argv = [sys.executable, "-m", "sidecar", "status", "--target", guarded.target, *arguments]
        return subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, env=environ)

    ca, token = str(guarded.authority.path), str(guarded.folder / "look.token")
    assert "state:" in status("--tls-ca", ca, "--token-file", token).stdout
    assert "state:" in status("--tls-ca", ca, SGLANG_WEIGHT_SYNC_TOKEN=LOOK).stdout
    refused = status("--tls-ca", ca)
    assert (refused.returncode, "the token is missing" in refused.stdout) == (1, True)


def test_a_token_never_leaves_the_host_in_clear() -> None:
    with pytest.raises(ValueError, match=r"would go to node7:50051 unencrypted"):
        WeightSyncClient("node7:50051", rank=0, tp_size=1, credentials=Credentials(token=TOKEN)).status()
    argv = [sys.executable, "-m", "sidecar", "status", "--target", "node7:50051"]
    environ = {"SGLANG_WEIGHT_SYNC_TOKEN": TOKEN}
    done = subprocess.run(argv, capture_output=True, text=True, timeout=30, check=False, env=environ)
    assert (done.returncode, "unencrypted" in done.stderr, TOKEN in done.stderr) == (2, True, False)
    assert TOKEN not in repr(Credentials(token=TOKEN))
