"""An SGLang that is newer than any this sidecar was made for: asked what it can do, and used as far as it can."""

from sidecar.v1 import weight_sync_pb2 as pb
from tests.integration.conftest import StartPair
from tests.integration.support import ANSWER_S, refusal


def test_a_newer_release_that_has_the_routes_is_used_and_warned_about(start: StartPair) -> None:
    pair = start(release="0.9.0")
    assert pair.update("7").state == pb.UPDATE_STATE_COMMITTED
    log = pair.process.process.log_text()
    assert "WARNING sidecar.engine.life: SGLang 0.9.0 is newer than 0.5.23" in log
    assert "it has the routes of 0.5.21, whose rules are followed" in log


def test_a_newer_release_that_does_not_say_what_it_has_is_used_and_warned_about(start: StartPair) -> None:
    pair = start(release="0.9.0", without_routes=("/openapi.json",))
    assert pair.update("7").state == pb.UPDATE_STATE_COMMITTED
    assert "and does not say what it can do" in pair.process.process.log_text()


def test_a_newer_release_without_a_route_that_is_needed_is_refused_by_name(start: StartPair) -> None:
    pair = start(release="0.9.0", without_routes=("/end_weight_update",))
    refused = refusal(pair.send(pair.request("7", 0)))
    assert refused.reason == "ENGINE_UNSUPPORTED"
    assert (
        "SGLang 0.9.0 is newer than 0.5.23, the newest that this sidecar was run with, and has no /end_weight_update"
        in refused.message
    )
    assert pair.posts() == []
    assert "and has no /end_weight_update; upgrade the sidecar" in pair.process.process.log_text()


def test_a_release_without_the_route_of_a_disk_update_stays_clean(start: StartPair) -> None:
    pair = start(release="0.9.0", without_routes=("/update_weights_from_disk",))
    request = pb.UpdateWeightsFromDiskRequest(update_id="disk", weight_version="7", model_path="/models/other")
    refused = refusal(pair.rpc.UpdateWeightsFromDisk.future(request, timeout=ANSWER_S))
    assert "404" in refused.message
    assert pair.wait_for(pb.SIDECAR_STATE_READY).weight_version
    assert not pair.is_paused()


def test_a_release_that_is_known_is_not_asked(start: StartPair) -> None:
    pair = start()
    assert "/openapi.json" not in [call.path for call in pair.engine.calls]
