"""What the caller of ``VerlEngine`` asked for, as one value.

Pure. Invariant: ``Options`` that exist name either a server to start or one that runs already, with all that this
needs as far as it can be known without asking anybody.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.membership import Membership
from adapter.server_args import check_server_args

_ANY_HOST = ("0.0.0.0", "::", "[::]", "")  # noqa: S104 - compared, not bound
NOT_IN_PROCESS = (
    "SGLang does not run inside the trainer here: two event loops read one ZMQ socket then, and the second update hung"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """See ``VerlEngine`` for what each means."""

    launch_server: bool
    server_args: Mapping[str, object]
    server_url: str | None
    sidecar: str | None
    sidecar_listen: str | None
    sidecar_args: tuple[str, ...]
    sidecar_credentials: Credentials = NO_CREDENTIALS
    env: Mapping[str, str | None]
    pythonpath: tuple[Path, ...]
    start_timeout: float
    log_dir: Path | None

    @property
    def attaches(self) -> bool:
        """Whether server and sidecar run already."""
        return not self.launch_server or self.server_url is not None

    def check(self, member: Membership, *, on_mesh: bool) -> None:
        """Raise ``ValueError`` for what cannot work."""
        if self.attaches:
            _check_attach(self.server_url, self.sidecar)
            return
        decided = {"tp_size": member.size, "nnodes": member.nnodes, "node_rank": member.node_rank}
        check_server_args(self.server_args, decided)
        _check_listen(self.sidecar_listen, self.sidecar)
        if not on_mesh and member.size > 1 and self.sidecar is None:
            raise ValueError(
                "without device_mesh_cpu the ranks cannot tell each other where the sidecar listens: give the same "
                "sidecar='unix:/folder/sidecar.sock' on every rank"
            )
        if not on_mesh and member.nnodes > 1 and not self.server_args.get("dist_init_addr"):
            raise ValueError("nnodes > 1 without device_mesh_cpu needs dist_init_addr='host:port' on every rank")

    @property
    def own_server_args(self) -> dict[str, object]:
        """Without those that have an argument of their own on the command line."""
        elsewhere = ("model_path", "tp_size", "host", "port", "nnodes", "node_rank", "dist_init_addr")
        return {name: value for name, value in self.server_args.items() if name not in elsewhere}

    def text(self, name: str) -> str | None:
        """A server argument that is a text, if it was given."""
        value = self.server_args.get(name)
        return None if value is None else str(value)

    def seen_from_elsewhere(self, url: str, address: str) -> str:
        """A server on every address of its host is reached by the host's name, too."""
        return url.replace("127.0.0.1", address) if self.text("host") in _ANY_HOST[:3] else url

    def port(self) -> int | None:
        """The server's port, if it was given."""
        value = self.server_args.get("port")
        if value is None or (isinstance(value, int) and 0 < value < 1 << 16):
            return value
        raise ValueError(f"port={value!r} is no TCP port")


def launches_server(launch_server: bool | str, backend: str | None) -> bool:
    """Raises ``ValueError`` for a backend that there is not. The old class took it as its third argument, too."""
    if isinstance(launch_server, str):
        return launches_server(False, launch_server)
    if backend == "engine":
        raise ValueError(f"backend='engine' is not offered: {NOT_IN_PROCESS}; use backend='server'")
    if backend not in (None, "server"):
        raise ValueError(f"backend={backend!r} is not offered; leave it out, or give 'server'")
    return launch_server or backend == "server"


def _check_attach(server_url: str | None, sidecar: str | None) -> None:
    given = {"server_url='http://host:port'": server_url, "sidecar='unix:/path.sock'": sidecar}
    missing = [example for example, value in given.items() if value is None]
    if missing:
        raise ValueError(
            f"to use a server that runs already, give {' and '.join(missing)} as well; to have one started, leave out "
            f"launch_server=False and server_url. {NOT_IN_PROCESS}"
        )


def _check_listen(listen: str | None, target: str | None) -> None:
    if listen is None:
        return
    host, _, port = listen.rpartition(":")
    if not listen.startswith("unix:") and port == "0":
        raise ValueError(f"sidecar_listen={listen!r} needs a port that the other ranks can know")
    if host in _ANY_HOST and target is None:
        raise ValueError(
            f"sidecar_listen={listen!r} is every address of its host: say with sidecar='host:{port}' which"
        )


def several_hosts_need_tcp(hosts: Sequence[str], options: Options) -> None:
    """Raise ``ValueError`` if a socket file would have to be reached from another host."""
    listen = options.sidecar_listen or options.sidecar or "unix:"
    if len(set(hosts)) > 1 and listen.startswith("unix:"):
        raise ValueError(
            f"the ranks are on {len(set(hosts))} hosts: give sidecar_listen='address:port' where all of them reach it"
        )
