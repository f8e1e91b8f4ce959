"""``python -m benchmarks sync``: one model on one server, way after way.

Owns the order of a run and what of each answer is kept. Invariant: a way that fails is noted and the next one is
taken, as long as the engine lives; what was measured before is on disk.
"""

import json
import tempfile
import time
from base64 import b64decode
from collections.abc import Callable
from contextlib import ExitStack, closing
from dataclasses import asdict, dataclass
from itertools import count
from pathlib import Path
from typing import Any

from adapter.engine_client import EngineClient
from adapter.errors import WeightSyncError
from adapter.launch import EngineProcess
from benchmarks import report
from benchmarks.machine import this_machine
from benchmarks.samples import Sample, SampleFile
from benchmarks.shapes import MODELS, ModelShape
from benchmarks.sync.engine import Counted, EngineFacts, counted_sidecar, engine_config, sidecar
from benchmarks.sync.rank import Answer
from benchmarks.sync.ranks import RankFailed, Ranks
from benchmarks.sync.ways import WHOLE, Kind, Way

RANKS_START_S = 240.0
LOAD = "/update_weights_from_tensor"
REBUILD = b"rebuild_"
"""In a payload with a handle in it, which one importer may open once."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What the command line says."""

    model: str
    tp_size: int
    device: str
    """"cuda" or "cpu"."""
    ways: tuple[Way, ...]
    out: Path
    """A folder without samples."""
    repeats: int = 7
    warm_ups: int = 3
    count_bytes: bool = True
    """Whether two more updates of each way of ours go through counters, after those that are timed."""
    limit_s: float = 540.0
    """No way is begun later than this after the start."""


def run(options: Options) -> None:
    """Start everything, measure everything, print the table, end everything."""
    give_up = time.monotonic() + options.limit_s
    bench_file = SampleFile(options.out)
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="weight-sync-")))
        peers = any(way.kind is Kind.PEER for way in options.ways)
        env = {"OMP_NUM_THREADS": "1"} if options.device == "cpu" else {}
        trainer = Ranks(
            options.out, model=options.model, tp_size=options.tp_size, device=options.device, peers=peers, env=env
        )
        ranks = stack.enter_context(closing(trainer))  # they import while the server starts
        shape, log = MODELS[options.model], options.out / "engine.log"
        config = engine_config(shape, device=options.device, tp_size=options.tp_size, folder=folder, log_path=log)
        facts = EngineFacts.of(stack.enter_context(EngineProcess(config)).url)
        ranks.wait(RANKS_START_S)
        ranks.all_do("make")
        bench_file.note("machine", asdict(this_machine(facts.version, config.args)))
        SyncBenchmark(options, facts, ranks, folder, bench_file).measure_all(give_up)
    print(report.text(options.out))


class SyncBenchmark:
    """One run, once server and trainer are there."""

    def __init__(self, options: Options, facts: EngineFacts, ranks: Ranks, folder: Path, file: SampleFile) -> None:
        self._file = file
        self._options = options
        self._facts = facts
        self._ranks = ranks
        self._folder = folder
        self._versions = count(1)
        self._sidecar_log = options.out / "sidecar.log"

    @property
    def _shape(self) -> ModelShape:
        return MODELS[self._options.model]

    def measure_all(self, give_up: float) -> None:
        """Every way; those that no time is left for are noted."""
        for way in self._options.ways:
            if time.monotonic() > give_up:
                self._failed(way, "no time was left for it")
                continue
            try:
                self._measure(way)
            except (RankFailed, WeightSyncError) as error:
                self._failed(way, str(error))
                if not self._facts.lives():
                    raise RankFailed(
                        f"the engine has died in {way.name}; see {self._options.out}/engine.log"
                    ) from error
                if way.kind is not Kind.OURS:  # the sidecar heals the engine with its next update
                    self._let_go_on()

    def _measure(self, way: Way) -> None:
        started = time.monotonic()
        self._ranks.all_do("flatten" if way.flat else "tidy")
        match way.kind:
            case Kind.FLOOR:
                self._floor(way)
            case Kind.PEER:
                self._repeat(way, lambda: self._peer(way))
            case Kind.DIRECT:
                self._repeat(way, lambda: self._direct(way))
            case Kind.REPOST:
                self._repost(way)
            case Kind.OURS:
                self._ours(way)
        said = report.one_line(self._options.out, way.name)
        print(f"{way.name}: {said} ({time.monotonic() - started:.1f} s)", flush=True)

    def _floor(self, way: Way) -> None:
        number = self._options.warm_ups + self._options.repeats
        by_rank = [answer["seconds"] for answer in self._ranks.all_do("floor", flat=way.flat, repeats=number)]
        for repeat, seconds in enumerate(zip(*by_rank, strict=True)):
            self._keep(way, repeat, {"seconds": max(seconds)})

    def _ours(self, way: Way) -> None:
        replay, tp_size = way.replay, self._options.tp_size
        with sidecar(self._facts, self._folder, self._sidecar_log, replay=replay) as target:
            self._repeat(way, lambda: self._update(way, [target] * tp_size))
            self._ranks.all_do("tidy")
        if self._options.count_bytes:
            with counted_sidecar(
                self._facts, self._folder, self._sidecar_log, replay=replay, tp_size=tp_size
            ) as counted:
                self._count_bytes(way, counted)
                self._ranks.all_do("tidy")

    def _repeat(self, way: Way, update: Callable[[], Answer]) -> None:
        for repeat in range(self._options.warm_ups + self._options.repeats):
            self._ranks.all_do("flip")
            self._keep(way, repeat, update())

    def _keep(self, way: Way, repeat: int, answer: Answer) -> None:
        self._file.add(
            Sample(
                benchmark="sync",
                **self._where(way),
                warm_up=repeat < self._options.warm_ups,
                **answer,
            )
        )

    # One update.

    def _peer(self, way: Way) -> Answer:
        facts = self._facts
        answers = self._ranks.all_at_once("peer", name=way.name, url=facts.url, uses_sessions=facts.uses_sessions)
        counts = dict(answers[0]["counts"])
        if "gather" in counts:
            counts["gather"] = sum(answer["counts"]["gather"] for answer in answers)
        return {**answers[0], "seconds": _slowest(answers), "counts": counts}

    def _update(self, way: Way, targets: list[str]) -> Answer:
        size = WHOLE if way.whole else self._shape.bucket_bytes
        common: dict[str, Any] = {"bucket_bytes": size, "in_place": way.flat, "version": str(next(self._versions))}
        answers = self._ranks.each_at_once("ours", [{**common, "target": target} for target in targets])
        result, seconds = answers[0]["result"], _slowest(answers)
        client = max(0.0, seconds - sum(result["phases"].values()))
        return {
            "seconds": seconds,
            "phases": {"export": client, **result["phases"]},
            "counts": {"posts": result["num_posts"]},
            "path": result.get("load_path", ""),
        }

    def _direct(self, way: Way) -> Answer:
        handles = [answer["handle"] for answer in self._ranks.all_do("lend")]
        return self._ranks.first_does(
            "direct",
            url=self._facts.url,
            uses_sessions=self._facts.uses_sessions,
            handles=handles,
            version=str(next(self._versions)),
        )

    def _repost(self, way: Way) -> None:
        """The last of three updates again and again: its payload names memory that the engine has kept open."""
        replay, tp_size = way.replay, self._options.tp_size
        with counted_sidecar(self._facts, self._folder, self._sidecar_log, replay=replay, tp_size=tp_size) as counted:
            for _ in range(3):
                self._ranks.all_do("flip")
                counted.reset()
                self._update(way, list(counted.targets))
            body = counted.http.http_bodies(LOAD)[-1]
            if any(REBUILD in b64decode(entry) for entry in json.loads(body)["serialized_named_tensors"]):
                raise RankFailed("the engine has not kept the trainer's memory open, so no payload can be posted twice")
            again = {"url": self._facts.url, "uses_sessions": self._facts.uses_sessions, "body": body.decode()}
            version = str(next(self._versions))
            self._repeat(way, lambda: self._ranks.first_does("repost", version=version, **again))
            self._ranks.all_do("tidy")

    def _count_bytes(self, way: Way, counted: Counted) -> None:
        """The first update of a new client and sidecar has the manifest in full, the third goes by its digest."""
        noted: dict[str, int] = {}
        for when in ("first_", "second_", ""):
            self._ranks.all_do("flip")
            counted.reset()
            self._update(way, list(counted.targets))
            noted[f"{when}grpc_request"] = max(counter.sent for counter in counted.grpc)
            noted[f"{when}http_body"] = sum(map(len, counted.http.http_bodies(LOAD)))
        self._file.note("bytes", {**self._where(way), **noted})

    # When something went wrong.

    def _failed(self, way: Way, why: str) -> None:
        print(f"{way.name}: {why}", flush=True)
        self._file.note("failed", {**self._where(way), "why": why})

    def _where(self, way: Way) -> dict[str, Any]:
        return {"subject": self._options.model, "tp": self._options.tp_size, "way": way.name}

    def _let_go_on(self) -> None:
        """What a peer leaves that broke off: generation held, and perhaps a session."""
        client = EngineClient(self._facts.url)
        for path in (["/end_weight_update"] if self._facts.uses_sessions else []) + ["/continue_generation"]:
            try:
                client.post(path, {}, 30.0)
            except WeightSyncError as error:
                print(f"{path}: {error}", flush=True)


def _slowest(answers: list[Answer]) -> float:
    return float(max(answer["seconds"] for answer in answers))
