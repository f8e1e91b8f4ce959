"""``VerlEngine``: the call surface of SGLang's class of that name, with the server in a process of its own.

Every rank of the trainer makes one. Rank 0 (the first rank of each node, with ``nnodes``) starts the server, rank 0
the sidecar beside it. Invariant: an update uses the mesh for rank and size alone; only the start and generation talk
over its process group, in JSON. Whatever ends this object, or this process, ends what it started.
"""

import atexit
import contextlib
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from adapter.client import DEFAULT_BUCKET_BYTES, WeightSyncClient
from adapter.credentials import NO_CREDENTIALS, Credentials
from adapter.errors import LaunchError
from adapter.exchange import Exchange
from adapter.launch import SERVER, SIDECAR
from adapter.membership import Membership, Mesh, check_mesh, find_membership
from adapter.sources.lazy import NamedTensors
from adapter.staging import DEFAULT_BUFFERS
from adapter.verl_engine.control import EngineControl
from adapter.verl_engine.deaths import Deaths
from adapter.verl_engine.facts import EngineFacts
from adapter.verl_engine.fleet import Fleet
from adapter.verl_engine.hosts import host_identity
from adapter.verl_engine.options import Options, launches_server
from adapter.verl_engine.startup import Startup
from adapter.wire import UpdateResult

SAME_AS_WHOLE_TENSORS = (None, "auto", "flattened_bucket")
GENERATE_S = 3600.0
IDLE_S = 60.0


class VerlEngine:
    """One rank's part of an SGLang server that a trainer feeds.

    Args:
        device_mesh_cpu: the trainer's tensor-parallel ranks, such as ``mesh["tp"]``. Without it, ``tp_rank`` and
            ``tp_size``, else torchrun's variables, else one rank on its own.
        nnodes: nodes of the server; the first rank of each starts that node's server.
        launch_server: start server and sidecar. Otherwise give ``server_url`` and ``sidecar`` of running ones.
        backend: "server" is the same as ``launch_server=True``.
        tp_rank: this rank, without a mesh.
        tp_size: the number of ranks, without a mesh.
        server_url: a server that runs already.
        sidecar: where the ranks reach the sidecar, ``unix:/path.sock`` or ``host:port``. One that is started listens
            there; needed without a mesh, which would tell the ranks.
        sidecar_listen: where a sidecar that is started listens, if ranks on other hosts must reach it.
        sidecar_args: further arguments of ``sglang-weight-sync serve``.
        sidecar_credentials: for a sidecar with TLS or tokens, such as one that ``sidecar_args`` gives them.
        bucket_bytes: see ``WeightSyncClient``.
        staging_buffers: see ``WeightSyncClient``.
        start_timeout: seconds until server and sidecar must be ready.
        update_timeout: seconds for an update that names no ``timeout``.
        log_dir: where logs go and stay; by default into a private folder that is removed if all went well.
        env: variables for the server, or None for those that it must not have.
        pythonpath: folders that the server imports from first.
        **server_args: SGLang's ServerArgs, such as ``model_path`` and ``mem_fraction_static``.

    Raises:
        LaunchError: server or sidecar did not come up; on every rank of a mesh.
        ValueError: arguments that do not fit each other.
    """

    def __init__(
        self,
        device_mesh_cpu: Mesh | None = None,
        nnodes: int = 1,
        launch_server: bool | str = True,
        *,
        backend: str | None = None,
        tp_rank: int | None = None,
        tp_size: int | None = None,
        server_url: str | None = None,
        sidecar: str | None = None,
        sidecar_listen: str | None = None,
        sidecar_args: Sequence[str] = (),
        sidecar_credentials: Credentials = NO_CREDENTIALS,
        bucket_bytes: int = DEFAULT_BUCKET_BYTES,
        staging_buffers: int = DEFAULT_BUFFERS,
        start_timeout: float = 1200.0,
        update_timeout: float = 600.0,
        log_dir: Path | str | None = None,
        env: Mapping[str, str | None] | None = None,
        pythonpath: Sequence[Path | str] = (),
        **server_args: Any,
    ) -> None:
        def understood() -> tuple[Options, Membership]:
            options = Options(
                launch_server=launches_server(launch_server, backend),
                server_args=server_args,
                server_url=server_url,
                sidecar=sidecar,
                sidecar_listen=sidecar_listen,
                sidecar_args=tuple(sidecar_args),
                sidecar_credentials=sidecar_credentials,
                env=dict(env or {}),
                pythonpath=tuple(Path(folder) for folder in pythonpath),
                start_timeout=start_timeout,
                log_dir=Path(log_dir) if log_dir is not None else None,
            )
            return options, find_membership(device_mesh_cpu, tp_rank, tp_size, nnodes, os.environ)

        self._exchange = _exchange_over(device_mesh_cpu)
        options, member = understood() if self._exchange is None else self._exchange.together(understood)
        self.tp_rank, self.tp_size = member.rank, member.size
        self._update_timeout = update_timeout
        self._owner = os.getpid()
        self._closed = False

        def make_client(target: str) -> WeightSyncClient:
            return WeightSyncClient(
                target,
                rank=member.rank,
                tp_size=member.size,
                bucket_bytes=bucket_bytes,
                staging_buffers=staging_buffers,
                credentials=sidecar_credentials,
            )

        self._facts, self._client, self._fleet = self._start(Startup(options, member, self._exchange, make_client))
        self._deaths = Deaths(self._facts, host_identity())
        self._control = EngineControl(self._facts, self._deaths, self._exchange, acts=member.rank == 0)
        self._last_version = self._facts.last_version

    def _start(self, startup: Startup) -> tuple[EngineFacts, WeightSyncClient, Fleet | None]:
        try:
            facts = startup.run()
        except BaseException:  # Ctrl-C too must leave nothing behind
            _close(startup.client, startup.fleet, keep_logs=True)
            raise
        atexit.register(self.shutdown)
        if startup.fleet is not None:
            startup.fleet.watch()
        assert startup.client is not None, "a start that succeeded has connected"
        return facts, startup.client, startup.fleet

    @property
    def client(self) -> WeightSyncClient:
        """This rank's connection to the sidecar."""
        return self._client

    @property
    def server_url(self) -> str | None:
        """The server, with its OpenAI-compatible routes under ``/v1``; None on a rank that was not told."""
        return self._facts.server_url

    @property
    def sidecar_target(self) -> str:
        """Where the sidecar is reached."""
        return self._facts.sidecar

    @property
    def server_log(self) -> str | None:
        """The log of a server that was started for this engine."""
        return self._facts.log_of(SERVER)

    @property
    def sidecar_log(self) -> str | None:
        """The log of a sidecar that was started for this engine."""
        return self._facts.log_of(SIDECAR)

    # Weights.

    def update_weights_from_tensor(
        self,
        named_tensors: NamedTensors,
        load_format: str | None = None,
        flush_cache: bool = True,
        *,
        weight_version: str | int | None = None,
        **options: Any,
    ) -> UpdateResult:
        """Send all weights, with every other rank; returns when the server generates with them.

        Args:
            named_tensors: (Hugging Face name, tensor) pairs, see ``WeightSyncClient.update_weights``.
            load_format: None, "auto" and "flattened_bucket" are the same here.
            flush_cache: empty the prefix cache.
            weight_version: what the server reports afterwards, new for every update; by default the next number.
            **options: further ones of ``WeightSyncClient.update_weights``.

        Raises:
            LaunchError: the server or the sidecar has ended.
            WeightSyncError: see ``adapter.errors``.
            ValueError: what cannot be sent, or the server's weights are released.
        """
        _check_load_format(load_format)
        version = self._count_version(weight_version)
        options.setdefault("timeout", self._update_timeout)
        self._check_open()
        self._check_update(named_tensors, version, options)
        with self._deaths.explained():
            result = self._client.update_weights(named_tensors, version=version, flush_cache=flush_cache, **options)
        self._control.mark_updated(options.get("allow_missing", ()))
        return result

    def _check_update(self, named_tensors: NamedTensors, version: str, options: Mapping[str, Any]) -> None:
        """What this rank alone may see must not leave the others in their gathers, or waiting at the sidecar."""
        try:
            self._deaths.check()
            self._control.memory.check_update()
        except (LaunchError, ValueError) as error:
            named = {name: options[name] for name in ("update_id", "specs") if name in options}
            self._client.give_up(named_tensors, version=version, cause=error, **named)
            raise

    def _count_version(self, given: str | int | None) -> str:
        """The same on every rank, since all of them make the same calls."""
        self._last_version += 1
        if given is None:
            return str(self._last_version)
        if str(given).isdecimal():
            self._last_version = max(self._last_version, int(given))
        return str(given)

    def get_weights_by_name(self, name: str, truncate_size: int = 100, *, collective: bool = True) -> Any:
        """The first numbers of a tensor, by SGLang's name; only some of its model classes can. As ``generate``."""
        self._check_open()
        return self._control.weights_by_name(name, truncate_size, collective=collective)

    # Generation.

    def generate(
        self,
        prompt: str | Sequence[str] | None = None,
        sampling_params: Mapping[str, Any] | Sequence[Mapping[str, Any]] | None = None,
        input_ids: Any = None,
        image_data: Any = None,
        return_logprob: bool | Sequence[bool] = False,
        logprob_start_len: int | Sequence[int] | None = None,
        top_logprobs_num: int | Sequence[int] | None = None,
        token_ids_logprob: Sequence[Any] | None = None,
        lora_path: str | Sequence[str | None] | None = None,
        custom_logit_processor: str | Sequence[str] | None = None,
        stream: bool = False,
        *,
        collective: bool = True,
        timeout: float = GENERATE_S,
        **fields: Any,
    ) -> Any:
        """SGLang's answer: a dict for one prompt, a list of them for several.

        On a mesh, all ranks call: rank 0 asks once, every rank gets the same answer, or the same error. With
        ``collective=False`` this rank alone asks. Without a mesh it always does.

        With ``stream`` it returns an iterator of dicts, each with all of the text so far. On a mesh the ranks go
        through it in step: each must take every item, or all must stop after the same one.

        Args:
            prompt: text, or a list.
            sampling_params: by SGLang's names.
            input_ids: token ids instead of text: lists, tensors or arrays.
            image_data: paths, URLs, base64, bytes or PIL images.
            return_logprob: see SGLang, as for all that follow.
            logprob_start_len: see SGLang.
            top_logprobs_num: see SGLang.
            token_ids_logprob: see SGLang.
            lora_path: see SGLang.
            custom_logit_processor: see SGLang.
            stream: answer bit by bit.
            collective: whether all ranks of the mesh call.
            timeout: seconds for the whole answer.
            **fields: further ones of SGLang's ``/generate``, such as ``rid``.

        Raises:
            LaunchError: the server has ended.
            WeightSyncError: SGLang refused, in its words, or did not answer in time.
            ValueError: what cannot be asked, or the server's memory is released.
        """
        parameters = {
            "prompt": prompt,
            "sampling_params": sampling_params,
            "input_ids": input_ids,
            "image_data": image_data,
            "return_logprob": return_logprob,
            "logprob_start_len": logprob_start_len,
            "top_logprobs_num": top_logprobs_num,
            "token_ids_logprob": token_ids_logprob,
            "lora_path": lora_path,
            "custom_logit_processor": custom_logit_processor,
            **fields,
        }
        self._check_open()
        ask = self._control.stream if stream else self._control.generate
        return ask(parameters, timeout, collective=collective)

    # Control: acts on rank 0, and does nothing on the others but to learn what is released.

    def release_memory_occupation(
        self, tags: Sequence[str] | str | None = None, *, idle_timeout: float = IDLE_S
    ) -> None:
        """Free the server's GPU memory: "kv_cache", "weights", "cuda_graph", or all of it.

        Waits until no request runs, since SGLang would die; nobody may send new ones meanwhile. What is released is
        left alone. Needs ``enable_memory_saver=True``; without ``enable_weights_cpu_backup=True`` weights lose their
        content, so that an update must follow their resuming.

        On a mesh, all ranks call: rank 0 releases, and every rank learns what is released, or the same error. Without
        a mesh a rank that does not call, or whose rank 0 failed, does not know.
        """
        self._check_open()
        self._control.release(tags, idle_timeout)

    def resume_memory_occupation(self, tags: Sequence[str] | str | None = None) -> None:
        """Take memory back, all that is released unless ``tags`` says which. What is not released is left alone.

        On a mesh, all ranks call, as for ``release_memory_occupation``.
        """
        self._check_open()
        self._control.resume(tags)

    def flush_cache(self, timeout: float = 0.0) -> None:
        """Empty the prefix cache; waits ``timeout`` seconds for requests to end. Raises if some still run."""
        with self._in_use():
            self._control.flush(timeout)

    def pause_generation(self, mode: str = "abort") -> None:
        """Hold generation back: "abort" ends running requests, "retract" and "in_place" keep them for later.

        Requests that come meanwhile wait, ``generate`` too.
        """
        with self._in_use():
            self._control.pause(mode)

    def continue_generation(self) -> None:
        """Let generation go on."""
        with self._in_use():
            self._control.resume_generation()

    def abort_request(self, rid: str = "", abort_all: bool = False) -> None:
        """End the request of this id, or all. SGLang ends every request whose id begins with ``rid``."""
        with self._in_use():
            self._control.abort(rid, abort_all=abort_all)

    # The end.

    @contextlib.contextmanager
    def _in_use(self) -> Iterator[None]:
        self._check_open()
        with self._deaths.noticed():
            yield

    def _check_open(self) -> None:
        if self._closed:
            raise ValueError("this engine was shut down")

    def shutdown(self) -> None:
        """End what this rank has started. May be called again, and by every rank; needs no other rank."""
        if os.getpid() != self._owner:  # a forked child that ends must not take its parent's engine along
            return
        atexit.unregister(self.shutdown)
        if not self._closed:
            self._closed = True
            _close(self._client, self._fleet)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.shutdown()


def _exchange_over(mesh: Mesh | None) -> Exchange | None:
    if mesh is None:
        return None
    check_mesh(mesh)
    return Exchange(mesh.get_group()) if mesh.size() > 1 else None


def _check_load_format(load_format: str | None) -> None:
    if load_format == "direct":
        raise ValueError(
            "load_format='direct' takes SGLang's own names, with tensors fused and cut; send whole tensors by their "
            "checkpoint names, without load_format"
        )
    if load_format not in SAME_AS_WHOLE_TENSORS:
        raise ValueError(f"load_format={load_format!r} is not offered: leave it out and send whole tensors by name")


def _close(client: WeightSyncClient | None, fleet: Fleet | None, *, keep_logs: bool = False) -> None:
    try:
        if client is not None:
            client.close()
    finally:
        if fleet is not None:
            if keep_logs:
                fleet.keep_logs()
            fleet.stop()
