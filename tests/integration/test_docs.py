"""The pages hold against the code: commands run, settings load, names exist, links lead somewhere."""

from __future__ import annotations

import argparse
import ast
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import closing
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc

from adapter import Credentials
from adapter.launch import free_port
from sidecar import errors, settings
from sidecar.errors import Reason, SyncError
from sidecar.inspect import SERVICE_NAME
from sidecar.metrics import Metrics
from sidecar.v1 import weight_sync_pb2 as pb
from tests.fakes import ScriptedEngine
from tests.integration.certificates import HOST, Authority
from tests.integration.support import ANSWER_S, Pair, wait_until

REPOSITORY = Path(__file__).parents[2]
PAGES = [REPOSITORY / "README.md", REPOSITORY / "CONTRIBUTING.md", *sorted((REPOSITORY / "docs").glob("*.md"))]
WITH_COMMANDS = ["README.md", *(f"docs/{name}.md" for name in ("operations", "doctor", "configuration", "security"))]
PROGRAM = "sglang-weight-sync"
SOCKET = "/run/weight-sync/sidecar.sock"
CHANNEL_OPTIONS = [("grpc.use_local_subchannel_pool", 1), ("grpc.enable_http_proxy", 0)]


def page(name: str) -> str:
    return (REPOSITORY / name).read_text()


def blocks(text: str, *languages: str) -> list[str]:
    """The fenced blocks of one of these languages."""
    found = re.findall(r"^```(\w*)\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return [content for language, content in found if language in languages]


def commands() -> list[str]:
    """Every line of a shell block that calls this program, without its comment; once each."""
    lines = [
        line.partition(" #")[0].strip()
        for name in WITH_COMMANDS
        for block in blocks(page(name), "", "sh")
        for line in block.replace("\\\n", " ").splitlines()
    ]
    return list(dict.fromkeys(line for line in lines if line.startswith(f"{PROGRAM} ")))


def called(verb: str) -> list[str]:
    return [line for line in commands() if line.split()[1] == verb]


class Place:
    """What the pages' names stand for here."""

    def __init__(self, folder: Path, engine_url: str, authority: Authority) -> None:
        self.folder = folder
        self.credentials = Credentials(
            ca=authority.path, certificate=folder / "trainer.crt", key=folder / "trainer.key"
        )
        authority.issue("trainer")
        authority.issue(HOST, file="tls")
        (folder / "ca.crt").write_bytes(authority.path.read_bytes())
        for key in ("api.key", "admin.key", "update.token", "look.token"):
            (folder / key).write_text("a-key-of-the-page")
        self.names = {
            "http://127.0.0.1:30000": engine_url,
            SOCKET: f"{folder}/sidecar.sock",
            "0.0.0.0:50051": f"0.0.0.0:{free_port()}",
            "127.0.0.1:9400": f"127.0.0.1:{free_port()}",
            "/etc/weight-sync/": f"{folder}/",
            "--ranks 8": "--ranks 2",
        }
        for block in blocks(page("docs/configuration.md"), "toml"):
            (folder / "sidecar.toml").write_text(self.here(block))

    def here(self, text: str) -> str:
        for name, local in self.names.items():
            text = text.replace(name, local)
        return text

    def argv(self, line: str) -> list[str]:
        return [sys.executable, "-m", "sidecar", *shlex.split(self.here(line))[1:]]

    @property
    def environ(self) -> Mapping[str, str]:
        return {**os.environ, "XDG_RUNTIME_DIR": str(self.folder)}

    def run(self, line: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            self.argv(line), env=self.environ, capture_output=True, text=True, timeout=60, check=False
        )

    def is_ready(self, argv: list[str]) -> bool:
        """Whether the sidecar that ``argv`` starts says so."""
        listen = argv[argv.index("--listen") + 1] if "--listen" in argv else f"unix:{self.folder}/sidecar.sock"
        target = listen.replace("0.0.0.0", HOST)
        credentials = self.credentials if "--tls-certificate" in argv else Credentials()
        with credentials.channel(target, CHANNEL_OPTIONS) as channel:
            try:
                request = health_pb2.HealthCheckRequest(service=SERVICE_NAME)
                answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=2)
            except grpc.RpcError:
                return False
            return bool(answer.status == health_pb2.HealthCheckResponse.SERVING)


@pytest.fixture
def place(tmp_path: Path) -> Iterator[Place]:
    """With an engine and no sidecar."""
    with ScriptedEngine(tp_size=2) as engine:
        yield Place(tmp_path, engine.url, Authority(tmp_path))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    """With an engine, and a sidecar at the pages' socket."""
    folder = tmp_path_factory.mktemp("served")
    with ScriptedEngine(tp_size=2) as engine, closing(Pair(engine, folder)) as pair:
        pair.wait_for(pb.SIDECAR_STATE_READY)
        yield Place(folder, engine.url, Authority(folder))


# Commands.


def test_the_pages_have_commands_of_every_kind() -> None:
    assert {line.split()[1] for line in commands()} == {"serve", "doctor", "health", "status"}


@pytest.mark.parametrize("line", called("serve"))
def test_a_serve_command_gets_ready_and_ends_in_order(line: str, place: Place) -> None:
    argv = place.argv(line)
    with subprocess.Popen(argv, env=place.environ, stderr=subprocess.PIPE, text=True) as process:
        try:
            wait_until(lambda: process.poll() is not None or place.is_ready(argv))
            assert process.poll() is None, process.communicate()[1]
            process.send_signal(signal.SIGTERM)
            assert process.wait(ANSWER_S) == 0
        finally:
            process.kill()


@pytest.mark.parametrize("line", called("doctor"))
def test_a_doctor_command_looks_at_everything(line: str, place: Place) -> None:
    done = place.run(line)
    assert done.stderr == ""
    assert done.returncode == (1 if re.search(r"^fail ", done.stdout, re.MULTILINE) else 0)
    asked = [option for option in ("ranks", "listen") if f"--{option} " in line]
    for check in ("engine", "release", *asked):
        assert re.search(rf"^ok +{check} ", done.stdout, re.MULTILINE), done.stdout


@pytest.mark.parametrize("line", called("health"))
def test_a_health_command_finds_a_healthy_sidecar(line: str, served: Place) -> None:
    done = served.run(line)
    assert (done.returncode, done.stdout) == (0, "SERVING\n"), done.stderr


@pytest.mark.parametrize("line", [line for line in called("status") if "--watch" not in line])
def test_a_status_command_says_how_it_stands(line: str, served: Place) -> None:
    done = served.run(line)
    assert done.returncode == 0, done.stderr
    assert re.match(r"state: +ready", done.stdout)


@pytest.mark.parametrize("line", [line for line in called("status") if "--watch" in line])
def test_a_watching_command_goes_on_until_it_is_interrupted(line: str, served: Place) -> None:
    argv = served.argv(line)
    with subprocess.Popen(argv, env=served.environ, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            assert re.match(r"state: +ready", process.stdout.readline())
            process.send_signal(signal.SIGINT)
            assert process.wait(ANSWER_S) == 0
        finally:
            process.kill()


# Settings, targets, links, Python.


@pytest.mark.parametrize(
    ("name", "block"),
    [pytest.param(path.name, block, id=path.name) for path in PAGES for block in blocks(path.read_text(), "toml")],
)
def test_a_settings_file_of_the_pages_is_taken(name: str, block: str, place: Place) -> None:
    (place.folder / name).with_suffix(".toml").write_text(place.here(block))
    parser = argparse.ArgumentParser()
    settings.add_flags(parser)
    values = settings.resolve(
        parser.parse_args(["--config", str((place.folder / name).with_suffix(".toml"))]), environ={}
    )
    assert values["engine-url"] == place.names["http://127.0.0.1:30000"]


def test_every_target_that_the_pages_name_is_in_the_makefile() -> None:
    there = set(re.findall(r"^([a-z-]+):", page("Makefile"), re.MULTILINE))
    named = {(path.name, target) for path in PAGES for target in make_targets(path.read_text())}
    assert len(named) > 10
    assert sorted((name, target) for name, target in named if target not in there) == []


def make_targets(text: str) -> list[str]:
    in_blocks = [re.findall(r"^make ([a-z-]+)", block, re.MULTILINE) for block in blocks(text, "", "sh")]
    return [*re.findall(r"`make ([a-z-]+)", text), *(target for found in in_blocks for target in found)]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_every_link_leads_to_a_file_and_to_a_heading_of_it(path: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    links = [link for link in re.findall(r"\]\(([^)\s]+)\)", text) if "://" not in link]
    assert [link for link in links if not leads_somewhere(path, link)] == []


def leads_somewhere(path: Path, link: str) -> bool:
    name, _, heading = link.partition("#")
    target = path.parent / name if name else path
    if not target.exists():
        return False
    return not heading or heading in map(slug, re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE))


def slug(heading: str) -> str:
    """As GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-")


@pytest.mark.parametrize("name", ["README.md", "docs/trainer.md"])
def test_python_of_the_pages_compiles(name: str) -> None:
    found = blocks(page(name), "python")
    assert found
    for block in found:
        ast.parse(block)


# Names.


def test_the_metrics_table_names_every_family_and_none_that_does_not_exist() -> None:
    rows = re.findall(r"^\| `(weightsync_\w+)` \| (\w+) \|", page("docs/operations.md"), re.MULTILINE)
    families = [(family.name, family.type) for family in Metrics().registry.collect()]
    assert sorted(rows) == sorted(families)


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_metric_that_a_page_names_exists(path: Path) -> None:
    families = [family.name for family in Metrics().registry.collect()]
    named = set(re.findall(r"`(weightsync_\w+)", path.read_text()))
    assert [name for name in named if re.sub(r"_(total|count|sum|bucket)$", "", name) not in families] == []


def test_the_deadlines_table_has_the_defaults() -> None:
    by_flag = {setting.flag: setting.default for setting in settings.SETTINGS}
    rows = re.findall(r"^\| (`--[^|]+) \| (\d+) s \|", page("docs/operations.md"), re.MULTILINE)
    told = {flag: float(seconds) for flags, seconds in rows for flag in re.findall(r"`(--[\w-]+)`", flags)}
    assert told == {flag: default for flag, default in by_flag.items() if flag.endswith("-timeout")}


def test_the_protocols_page_has_every_call() -> None:
    rows = re.findall(r"^\| `(\w+)` \| [^|]+ \| [^|]+ \|$", page("docs/protocol.md"), re.MULTILINE)
    methods = [method.name for method in pb.DESCRIPTOR.services_by_name["WeightSyncService"].methods]
    assert sorted(row for row in rows if row in methods) == sorted(methods)


def reasons_with_codes() -> dict[str, set[str]]:
    rows = re.findall(r"^\| `([A-Z_]+)` \| ([A-Z_, ]+) \|", page("docs/protocol.md"), re.MULTILINE)
    return {reason: set(codes.split(", ")) for reason, codes in rows}


def test_the_protocols_page_has_every_reason_once() -> None:
    assert set(reasons_with_codes()) == set(Reason)


def test_the_protocols_page_has_the_codes_that_reasons_are_raised_with() -> None:
    kinds = {
        name: kind for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, SyncError)
    }
    source = "".join(path.read_text() for path in (REPOSITORY / "sidecar").rglob("*.py"))
    raised = re.findall(r"(\w+)\(\s*Reason\.(\w+)", source)
    seen = {(reason, kinds[kind].status.name) for kind, reason in raised if kind in kinds}
    told = reasons_with_codes()
    assert len(seen) > 30
    assert sorted((reason, code) for reason, code in seen if code not in told[reason]) == []
