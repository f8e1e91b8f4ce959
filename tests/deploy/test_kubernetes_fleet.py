"""The fleet's manifests: valid, as closed as they say, found by DNS, gated by readiness; their commands parse."""

import sys
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, DRAIN_S, PROBE_PORT, ROOT, document, documents, flags, run, tool

FLEET = DEPLOY / "kubernetes/fleet"
CORE = sorted(path for path in FLEET.glob("*.yaml") if path.name != "kustomization.yaml")
KUSTOMIZATION = document("kubernetes/fleet/kustomization.yaml")
EPHEMERAL = (32768, 60999)
PARSES = """
import runpy, sys
from torch.distributed.run import get_args_parser
launched = get_args_parser().parse_args(sys.argv[1:])
parsed = runpy.run_path(launched.training_script)["arguments"]().parse_args(launched.training_script_args)
print(launched.nnodes, launched.nproc_per_node, launched.master_port, parsed.engines, parsed.port)
"""


def named(kind: str, name: str) -> Any:
    (found,) = (
        one for path in CORE for one in documents(path) if one["kind"] == kind and one["metadata"]["name"] == name
    )
    return found


def pod(name: str) -> Any:
    kind = "StatefulSet" if name == "engine" else "Job"
    return named(kind, name)["spec"]["template"]["spec"]


def containers() -> dict[str, Any]:
    """By name; no name is in both pods."""
    listed = [
        one
        for of in ("engine", "trainer")
        for kind in ("initContainers", "containers")
        for one in pod(of).get(kind, [])
    ]
    return {one["name"]: one for one in listed}


def labels(name: str) -> Any:
    return named("StatefulSet" if name == "engine" else "Job", name)["spec"]["template"]["metadata"]["labels"]


def flag(container: str, name: str) -> str:
    (value,) = (one.partition("=")[2] for one in containers()[container]["args"] if one.startswith(f"{name}="))
    return str(value)


def mounts(container: str) -> dict[str, str]:
    return {one["mountPath"]: one["name"] for one in containers()[container]["volumeMounts"]}


def keys_of(name: str, volume: str) -> list[str]:
    (found,) = (one["secret"] for one in pod(name)["volumes"] if one["name"] == volume)
    return [item["key"] for item in found.get("items", [])]


@pytest.mark.parametrize("release", ["1.34", "1.37"])
def test_kubernetes_schemas_accept_every_manifest_without_unknown_fields(release: str) -> None:
    done = run([tool("kubernetes-validate"), "--strict", "-k", release, *CORE])
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(" passed for resource ") == sum(len(documents(path)) for path in CORE), said


def test_kustomize_is_given_every_manifest_and_every_image() -> None:
    assert {path.name for path in CORE} == set(KUSTOMIZATION["resources"])
    assert {one["image"] for one in containers().values()} == {one["name"] for one in KUSTOMIZATION["images"]}
    assert named("Namespace", KUSTOMIZATION["namespace"])


@pytest.mark.parametrize("name", list(containers()))
def test_a_container_runs_closed(name: str) -> None:
    container = containers()[name]
    security = container["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "memory" in container["resources"]["limits"]
    assert "requests" in container["resources"]


@pytest.mark.parametrize("name", ["engine", "trainer"])
def test_a_pod_has_one_user_no_token_and_nothing_of_its_host(name: str) -> None:
    spec = pod(name)
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["runAsGroup"] == 10001
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostIPC", "hostPID", "hostNetwork"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])


def test_the_sidecar_listens_for_other_hosts_behind_tls_and_a_token() -> None:
    command, *rest = containers()["sidecar"]["args"]
    assert command == "serve"
    assert {one.partition("=")[0] for one in rest} <= flags("serve")
    assert "--insecure" not in rest
    assert flag("sidecar", "--listen") == "$(POD_IP):9443"
    assert [one["name"] for one in containers()["sidecar"]["env"]] == ["POD_IP"]
    paths = [flag("sidecar", name) for name in ("--tls-certificate", "--tls-key", "--update-token-file")]
    assert [mounts("sidecar")[path.rpartition("/")[0]] for path in paths] == ["sidecar-tls"] * 2 + ["sidecar-token"]
    assert mounts("sidecar")[flag("sidecar", "--journal").rpartition("/")[0]] == "journal"


def test_an_engine_gets_no_requests_before_its_first_update() -> None:
    sidecar = containers()["sidecar"]
    assert "--require-update" in sidecar["args"]
    assert sidecar["restartPolicy"] == "Always"
    asked = {kind: sidecar[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert asked["startup"] == asked["liveness"] == {"path": "/livez", "port": "probes"}
    assert asked["readiness"] == {"path": "/readyz", "port": "probes"}
    assert flag("sidecar", "--http-listen").endswith(f":{PROBE_PORT}")
    assert "readinessProbe" not in containers()["engine"]
    assert "publishNotReadyAddresses" not in named("Service", "sglang")["spec"]
    assert named("StatefulSet", "engine")["spec"]["podManagementPolicy"] == "Parallel"


def test_a_pod_is_given_longer_to_end_than_the_sidecars_drain() -> None:
    before = containers()["engine"]["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert flag("sidecar", "--drain-timeout") == str(DRAIN_S)
    assert pod("engine")["terminationGracePeriodSeconds"] > DRAIN_S + before


def test_the_trainer_finds_engines_that_are_not_ready_by_the_name_of_their_headless_service() -> None:
    service, engine = named("Service", "sidecars")["spec"], named("StatefulSet", "engine")["spec"]
    assert service["clusterIP"] == "None"
    assert service["publishNotReadyAddresses"] is True
    assert service["selector"] == engine["selector"]["matchLabels"] == labels("engine")
    assert engine["serviceName"] == "sidecars"
    assert flag("trainer", "--dns") == f"sidecars.{KUSTOMIZATION['namespace']}.svc.cluster.local"
    assert flag("trainer", "--port") == flag("sidecar", "--listen").rpartition(":")[2] == "9443"
    (replicas,) = KUSTOMIZATION["replicas"]
    assert replicas == {"name": "engine", "count": engine["replicas"]}
    assert flag("trainer", "--engines") == str(engine["replicas"])


def test_the_trainer_has_the_token_and_the_authority_but_not_the_sidecars_key() -> None:
    assert mounts("trainer")[flag("trainer", "--ca").rpartition("/")[0]] == "sidecar-ca"
    assert keys_of("trainer", "sidecar-ca") == ["ca.crt"]
    assert keys_of("engine", "sidecar-tls") == ["tls.crt", "tls.key"]
    assert mounts("trainer")[flag("trainer", "--token-file").rpartition("/")[0]] == "sidecar-token"
    assert "sidecar-token" not in mounts("engine").values()
    secrets = {one["secret"]["secretName"] for one in pod("trainer")["volumes"] if "secret" in one}
    assert secrets == {"sidecar-tls", "sidecar-token"}


def test_the_trainers_command_is_one_that_torchrun_and_the_example_parse() -> None:
    trainer = containers()["trainer"]
    assert trainer["command"] == ["torchrun"]
    script = "examples/torchrun_fleet.py"
    words = [str(ROOT / one) if one == script else one.replace("$(NODE_RANK)", "0") for one in trainer["args"]]
    done = run([sys.executable, "-c", PARSES, *words])
    assert done.returncode == 0, done.stderr
    nodes = named("Job", "trainer")["spec"]["completions"]
    ranks = trainer["resources"]["limits"]["nvidia.com/gpu"]
    assert done.stdout.split() == [str(nodes), str(ranks), "29400", flag("trainer", "--engines"), "9443"]


def test_torchrun_finds_its_first_pod_and_each_pod_its_own_number() -> None:
    job = named("Job", "trainer")["spec"]
    assert job["completionMode"] == "Indexed"
    assert job["parallelism"] == job["completions"]
    assert flag("trainer", "--master-addr") == f"trainer-0.{pod('trainer')['subdomain']}"
    service = named("Service", "trainer")["spec"]
    assert (service["clusterIP"], service["publishNotReadyAddresses"]) == ("None", True)
    assert service["selector"] == labels("trainer")
    (rank,) = (one for one in containers()["trainer"]["env"] if one["name"] == "NODE_RANK")
    assert "job-completion-index" in rank["valueFrom"]["fieldRef"]["fieldPath"]


def test_both_sides_of_the_broadcast_take_the_same_interface() -> None:
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    told = [{e["name"]: e.get("value") for e in containers()[name]["env"]} for name in ("engine", "trainer")]
    assert [[one[name] for name in names] for one in told] == [["eth0", "eth0"]] * 2


def allowed(policy: str) -> dict[Any, Any]:
    """Port, or first and last one -> who reaches it."""
    spec = named("NetworkPolicy", policy)["spec"]
    assert spec["podSelector"]["matchLabels"] == labels(policy)
    assert spec["policyTypes"] == ["Ingress"]
    assert all(len(rule["ports"]) == 1 for rule in spec["ingress"])
    return {
        (port["port"], port["endPort"]) if "endPort" in port else port["port"]: [
            one["podSelector"]["matchLabels"] for one in rule["from"]
        ]
        for rule in spec["ingress"]
        for port in rule["ports"]
    }


def test_only_the_trainer_reaches_the_sidecars_and_only_members_the_ports_of_torch_distributed() -> None:
    engine, trainer = labels("engine"), labels("trainer")
    at_the_engine, at_the_trainer = allowed("engine"), allowed("trainer")
    assert at_the_engine.keys() == {"http", "sidecar", "probes", EPHEMERAL}
    assert at_the_engine["sidecar"] == [trainer]
    assert at_the_engine["http"] == [{"sglang-client": "true"}]
    assert at_the_engine["probes"] == [{"app.kubernetes.io/name": "prometheus"}]
    assert at_the_engine[EPHEMERAL] == at_the_trainer[EPHEMERAL] == [trainer, engine]
    assert at_the_trainer.keys() == {EPHEMERAL, "torchrun"}
    assert at_the_trainer["torchrun"] == [trainer]


def test_the_range_that_is_let_through_has_the_kernels_ports_and_none_of_ours() -> None:
    first, last = EPHEMERAL
    for name in ("engine", "trainer"):
        (setting,) = pod(name)["securityContext"]["sysctls"]
        assert setting == {"name": "net.ipv4.ip_local_port_range", "value": f"{first} {last}"}
    ports = [port["containerPort"] for one in containers().values() for port in one.get("ports", [])]
    assert sorted(ports) == [9400, 9443, 29400, 30000]
    assert not any(first <= port <= last for port in ports)
