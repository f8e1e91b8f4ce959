"""Who may call what, without a connection."""

import pytest

from sidecar.access import Caller, Role, admit, names_of, needed
from sidecar.config import AccessRules
from sidecar.errors import Forbidden, Unauthenticated
from sidecar.secret import Secret
from sidecar.v1 import weight_sync_pb2 as pb

SERVICE = "/sidecar.v1.WeightSyncService/"
UPDATE, LOOK = SERVICE + "UpdateWeights", SERVICE + "GetStatus"
TOKENS = AccessRules(update_token=Secret("may-update"), look_token=Secret("may-look"))


def bearer(token: str) -> list[tuple[str, str]]:
    return [("user-agent", "grpc"), ("authorization", f"Bearer {token}")]


def test_only_what_changes_nothing_may_be_called_by_those_who_look() -> None:
    looks = {"GetCapabilities", "GetStatus", "GetUpdate"}
    for method in pb.DESCRIPTOR.services_by_name["WeightSyncService"].methods_by_name:
        assert needed(SERVICE + method) is (Role.LOOK if method in looks else Role.UPDATE)
    assert needed("/grpc.health.v1.Health/Check") is Role.NOBODY
    assert needed("/something.new.v1.Service/Method") is Role.UPDATE


def test_without_rules_everybody_may_update() -> None:
    assert admit(AccessRules(), UPDATE, [], {}) == Caller("", Role.UPDATE)


def test_a_token_gives_its_role() -> None:
    assert admit(TOKENS, UPDATE, bearer("may-update"), {}).role is Role.UPDATE
    assert admit(TOKENS, LOOK, bearer("may-look"), {}).role is Role.LOOK
    with pytest.raises(Forbidden, match="UpdateWeights needs the right to update"):
        admit(TOKENS, UPDATE, bearer("may-look"), {})


@pytest.mark.parametrize("metadata", [[], bearer("wrong"), bearer(""), [("authorization", "Basic may-update")]])
def test_without_a_right_token_nobody_may_even_look(metadata: list[tuple[str, str]]) -> None:
    with pytest.raises(Unauthenticated, match="the token is"):
        admit(TOKENS, LOOK, metadata, {})


def test_no_token_opens_a_role_whose_token_is_not_set() -> None:
    with pytest.raises(Unauthenticated):
        admit(AccessRules(update_token=Secret("t")), LOOK, bearer(""), {})


def test_a_named_client_updates_and_others_look() -> None:
    rules = AccessRules(update_clients=("trainer",))
    trainer = {"x509_subject_alternative_name": [b"host-7", b"trainer"], "x509_common_name": [b"x"]}
    assert admit(rules, UPDATE, [], trainer) == Caller("host-7", Role.UPDATE)
    assert admit(rules, LOOK, [], {"x509_common_name": [b"grafana"]}) == Caller("grafana", Role.LOOK)
    with pytest.raises(Forbidden, match="grafana may only look"):
        admit(rules, UPDATE, [], {"x509_common_name": [b"grafana"]})


def test_a_common_name_counts_only_without_alternative_names() -> None:
    assert names_of({"x509_subject_alternative_name": [b"a"], "x509_common_name": [b"trainer"]}) == ["a"]


def test_a_token_does_not_help_a_client_that_is_not_named() -> None:
    rules = AccessRules(update_token=Secret("may-update"), update_clients=("trainer",))
    with pytest.raises(Forbidden):
        admit(rules, UPDATE, bearer("may-update"), {"x509_common_name": [b"other"]})
