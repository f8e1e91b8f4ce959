"""The benchmark of a fleet's control runs, and names the engine that is slow."""

from pathlib import Path

import pytest

from benchmarks.__main__ import main
from benchmarks.check import judged
from benchmarks.fleet.hosts import names
from benchmarks.fleet.table import AGAIN, FIRST, SLOW, STEPS, slowest, text
from benchmarks.samples import SAMPLES, Run, Sample, SampleFile

REPEATS = 3
SLOW_MS = 300


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Run:
    out = tmp_path_factory.mktemp("fleet-cost")
    options = ["--engines", "1,2", "--repeats", str(REPEATS), "--slow", f"2:{SLOW_MS}"]
    assert main(["fleet", *options, "--out", str(out)]) == 0
    return Run.read(out / "fleet" / SAMPLES)


def rows(run: Run, beginning: str) -> list[list[str]]:
    lines = [line for line in text(run).splitlines() if line.startswith(f"| {beginning}")]
    return [[cell.strip() for cell in line.strip("| ").split("|")] for line in lines]


def test_the_tables_have_a_row_for_each_number_of_engines(measured: Run) -> None:
    for number in (1, 2):
        whole, first, steps, first_steps = rows(measured, f"{number} engines ")
        assert ([whole[1], first[1]], whole[5]) == ([AGAIN, FIRST], str(REPEATS))
        assert (steps[1], first_steps[1], len(steps)) == (AGAIN, FIRST, 2 + len(STEPS))


def test_the_slow_engine_is_the_one_that_is_named(measured: Run) -> None:
    (whole, _) = rows(measured, "2 engines,")
    assert whole[0] == f"2 engines, {names(2)[1]} {SLOW_MS} ms slower"
    assert whole[-1] == f"{names(2)[1]} (load), {REPEATS} of {REPEATS}"


def test_every_engine_took_every_update_and_the_trainer_spent_time_on_it(measured: Run) -> None:
    for sample in measured.samples:
        assert sample.counts["engines"] == int(sample.subject.split()[0])
        assert sample.counts["trainer_cpu_us"] > 0
        assert sum(sample.phases.values()) == pytest.approx(sample.seconds)


def test_only_a_slow_engine_pays_for_being_slow(measured: Run) -> None:
    slow, others = measured.of(SLOW, benchmark="fleet"), measured.of(AGAIN, "2 engines", "fleet")
    assert min(sample.phases["broadcast"] for sample in slow) > SLOW_MS / 1e3
    assert min(sample.phases["broadcast"] for sample in others) < SLOW_MS / 1e3


def test_one_updates_control_takes_few_bytes(measured: Run) -> None:
    for line in measured.bytes:
        assert 0 < line["grpc_request"] < 2_000
        assert 0 < line["grpc_answer"] < 4_000


def fleet_sample(engines: int, seconds: float) -> Sample:
    counts = {"engines": engines, "trainer_cpu_us": engines * 1000, "others_cpu_us": 0}
    return Sample(
        benchmark="fleet", subject=f"{engines} engines", tp=1, way=AGAIN, seconds=seconds, counts=counts, slowest=""
    )


def test_a_cost_that_grows_faster_than_the_fleet_is_missed(tmp_path: Path) -> None:
    file = SampleFile(tmp_path / "fleet")
    for engines, seconds in ((16, 0.016), (256, 0.512)):
        file.add(fleet_sample(engines, seconds))
    said, missed = judged(tmp_path)
    assert missed == ["fleet: fleet's control, one engine of 256 / of 16 <= 1.5 x: 2.00 x"]
    assert "trainer's CPU, one engine of 256 / of 16 <= 1.5 x" in said


def test_of_several_names_the_most_frequent_one_is_shown() -> None:
    named = ["unix:/s/engine-001.sock (load: 0.010 s)", "host-2:50051 (load: 0.020 s)", "host-2:50051 (load: 0.020 s)"]
    samples = [Sample(benchmark="fleet", subject="", tp=1, way="", seconds=1.0, slowest=name) for name in named]
    assert slowest(samples) == "host-2:50051 (load), 2 of 3"
