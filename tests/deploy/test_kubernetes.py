"""The manifests: valid for Kubernetes, as closed as they say, and what CUDA IPC between the containers needs."""

import sys
from typing import Any

import pytest

from tests.deploy.files import DEPLOY, DRAIN_S, PROBE_PORT, documents, manifest, run, tool

OF_OTHERS = {"kustomization.yaml", "podmonitor.yaml"}  # kinds that are not Kubernetes' own
CORE = sorted(path for path in DEPLOY.glob("kubernetes/*.yaml") if path.name not in OF_OTHERS)


def pod() -> Any:
    return manifest("Deployment")["spec"]["template"]["spec"]


def containers() -> list[Any]:
    return [*pod()["initContainers"], *pod()["containers"]]


def container(name: str) -> Any:
    (found,) = (one for one in containers() if one["name"] == name)
    return found


def mounts(name: str) -> dict[str, str]:
    return {one["mountPath"]: one["name"] for one in container(name)["volumeMounts"]}


def ingress() -> Any:
    return manifest("NetworkPolicy")["spec"]["ingress"]


@pytest.mark.parametrize("release", ["1.34", "1.37"])
def test_kubernetes_schemas_accept_every_manifest_without_unknown_fields(release: str) -> None:
    done = run([tool("kubernetes-validate"), "--strict", "-k", release, *CORE])
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert said.count(" passed for resource ") == sum(len(documents(path)) for path in CORE), said


def test_kustomize_is_given_every_manifest_of_kubernetes_own() -> None:
    assert {path.name for path in CORE} == set(manifest("Kustomization")["resources"])
    assert {one["image"] for one in containers()} == {one["name"] for one in manifest("Kustomization")["images"]}


@pytest.mark.parametrize("name", [one["name"] for one in containers()])
def test_a_container_runs_closed(name: str) -> None:
    security = container(name)["securityContext"]
    assert security["runAsNonRoot"] is True
    assert security["readOnlyRootFilesystem"] is True
    assert security["allowPrivilegeEscalation"] is False
    assert security["capabilities"] == {"drop": ["ALL"]}
    assert security["seccompProfile"] == {"type": "RuntimeDefault"}
    assert "memory" in container(name)["resources"]["limits"]
    assert "requests" in container(name)["resources"]


def test_the_pod_has_one_user_no_token_and_nothing_of_its_host() -> None:
    spec = pod()
    assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["runAsGroup"] == 10001
    assert not any("runAsUser" in one["securityContext"] for one in containers())
    assert spec["automountServiceAccountToken"] is False
    assert not {"hostIPC", "hostPID", "hostNetwork"} & spec.keys()
    assert not any("hostPath" in volume for volume in spec["volumes"])
    level = manifest("Namespace")["metadata"]["labels"]["pod-security.kubernetes.io/enforce"]
    assert level == "restricted"


def test_the_sidecar_is_native_and_the_kubelet_asks_it_at_its_own_port() -> None:
    sidecar = container("sidecar")
    assert sidecar["restartPolicy"] == "Always"
    assert sidecar in pod()["initContainers"]
    assert sidecar["ports"] == [{"name": "probes", "containerPort": PROBE_PORT}]
    asked = {kind: sidecar[f"{kind}Probe"]["httpGet"] for kind in ("startup", "liveness", "readiness")}
    assert asked["startup"] == asked["liveness"] == {"path": "/livez", "port": "probes"}
    assert asked["readiness"] == {"path": "/readyz", "port": "probes"}


def test_an_engine_that_is_paused_is_not_killed_for_it() -> None:
    assert container("engine")["startupProbe"]["httpGet"]["path"] == "/health"
    assert "tcpSocket" in container("engine")["livenessProbe"]
    assert "readinessProbe" not in container("engine")


def test_the_pod_is_given_longer_to_end_than_the_sidecars_drain() -> None:
    assert f"--drain-timeout={DRAIN_S}" in container("sidecar")["args"]
    before = container("engine")["lifecycle"]["preStop"]["sleep"]["seconds"]
    assert pod()["terminationGracePeriodSeconds"] > DRAIN_S + before


def test_engine_sidecar_and_trainer_share_what_cuda_ipc_needs() -> None:
    assert pod()["shareProcessNamespace"] is True
    (shm,) = (volume for volume in pod()["volumes"] if volume["name"] == "shm")
    assert shm["emptyDir"]["medium"] == "Memory"
    for name in ("engine", "sidecar", "trainer"):
        assert mounts(name)["/dev/shm"] == "shm"
        assert mounts(name)["/tmp"] == "tmp"
    claims = container("engine")["resources"]["claims"]
    assert claims == container("trainer")["resources"]["claims"] == [{"name": pod()["resourceClaims"][0]["name"]}]
    assert "claims" not in container("sidecar")["resources"]


def test_the_socket_is_mounted_where_it_is_used_and_nowhere_else() -> None:
    where = {one["name"] for one in containers() if "/run/weight-sync" in mounts(one["name"])}
    assert where == {"sidecar", "trainer"}


def test_keys_come_as_files_of_a_secret_and_never_as_arguments_or_variables() -> None:
    files = {f"{path}/" for path, name in mounts("sidecar").items() if name == "sidecar-keys"}
    named = [one.partition("=")[2] for one in container("sidecar")["args"] if "key-file" in one]
    assert len(named) == 2
    assert all(one.startswith(tuple(files)) for one in named)
    assert "/etc/sglang" in mounts("engine")
    assert not any("secretKeyRef" in str(one) or "--api-key" in str(one) for one in containers())
    assert "engine-config" not in mounts("trainer").values()


def test_only_clients_reach_generation_and_only_prometheus_the_sidecar() -> None:
    by_port = {rule["ports"][0]["port"]: rule["from"] for rule in ingress()}
    assert [len(rule["ports"]) for rule in ingress()] == [1, 1]
    assert by_port.keys() == {"http", "probes"}, "SGLang's native gRPC port, or another, is open"
    (prometheus,) = by_port["probes"]
    assert prometheus.keys() == {"namespaceSelector", "podSelector"}
    assert prometheus["podSelector"]["matchLabels"] == {"app.kubernetes.io/name": "prometheus"}
    (clients,) = by_port["http"]
    assert clients.keys() == {"podSelector"}


def test_policy_service_and_monitor_are_about_the_pods_that_there_are() -> None:
    labels = manifest("Deployment")["spec"]["template"]["metadata"]["labels"]
    assert manifest("NetworkPolicy")["spec"]["podSelector"]["matchLabels"] == labels
    assert manifest("Service")["spec"]["selector"] == labels
    assert manifest("PodMonitor")["spec"]["selector"]["matchLabels"] == labels
    ports = {port["name"] for one in containers() for port in one.get("ports", [])}
    assert {port["targetPort"] for port in manifest("Service")["spec"]["ports"]} == {"http"}
    assert {one["port"] for one in manifest("PodMonitor")["spec"]["podMetricsEndpoints"]} == {"probes"}
    assert ports == {"http", "probes"}
    annotations = manifest("Deployment")["spec"]["template"]["metadata"]["annotations"]
    assert annotations["prometheus.io/port"] == str(PROBE_PORT)


def test_the_loader_that_is_copied_into_the_engines_container_is_where_it_looks(tmp_path: Any) -> None:
    copy = container("copy-loader")["command"]
    assert copy[:2] == ["python", "-c"]
    done = run([sys.executable, "-c", copy[2].replace("/loader/", f"{tmp_path}/")])
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "adapter/loader.py").is_file()
    assert "--custom-weight-loader=adapter.loader.load" in container("engine")["args"]
    (path,) = (one["value"] for one in container("engine")["env"] if one["name"] == "PYTHONPATH")
    assert mounts("engine")[path] == mounts("copy-loader")["/loader"] == "loader"
