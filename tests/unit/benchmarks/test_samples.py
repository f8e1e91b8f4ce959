"""Samples are kept line by line, and judged run by run."""

from pathlib import Path

import pytest

from benchmarks import report
from benchmarks.__main__ import EXIT_MISSED, EXIT_USAGE, main
from benchmarks.check import judged
from benchmarks.samples import SAMPLES, Run, Sample, SampleFile, Spread, medians


def sample(way: str, seconds: float, *, subject: str = "dense-8b", warm_up: bool = False) -> Sample:
    phases = {"export": 0.001, "collect": 0.001, "pause": 0.001, "load": seconds, "flush": 0.001}
    return Sample(
        benchmark="sync", subject=subject, tp=1, way=way, seconds=seconds, phases=phases, path="", warm_up=warm_up
    )


def run_with(folder: Path, **seconds: float) -> Path:
    file = SampleFile(folder / "run")
    file.note("machine", {"cores": 2, "gpus": ["H100"], "sglang": "0.5.15.post1", "torch": "2.11"})
    for way, value in seconds.items():
        file.add(sample(way, 9.0, warm_up=True))
        for repeat in (-1, 0, 1):
            file.add(sample(way, value + repeat * 1e-4))
    return folder


def test_a_run_that_was_cut_off_in_a_line_has_its_other_lines(tmp_path: Path) -> None:
    run_with(tmp_path, floor_tensors=0.010)
    path = tmp_path / "run" / SAMPLES
    path.write_text(path.read_text()[:-20])
    run = Run.read(path)
    assert len(run.of("floor_tensors")) == 2  # neither the warm-up nor the broken one


def test_a_second_run_is_not_mixed_into_the_first(tmp_path: Path) -> None:
    run_with(tmp_path, floor_tensors=0.010)
    with pytest.raises(ValueError, match="is there already: ratios hold within one run, so choose another --out"):
        SampleFile(tmp_path / "run")


def test_the_spread_of_one_value_is_that_value() -> None:
    assert Spread.of([2.0]) == Spread(2.0, 2.0, 2.0, 2.0, 2.0, 1)
    assert Spread.of([5, 1, 2, 3, 4]) == Spread(3, 2, 4, 1, 5, 5)


def test_medians_are_of_the_repeats_that_have_a_phase() -> None:
    assert medians([{"load": 1.0}, {"load": 3.0, "end": 2.0}]) == {"load": 2.0, "end": 2.0}


def test_a_table_has_each_way_with_its_ratio_to_the_copy(tmp_path: Path) -> None:
    text = report.text(run_with(tmp_path, floor_tensors=0.010, replay_in_place=0.014))
    (row,) = [line for line in text.splitlines() if line.startswith("| replay_in_place") and " 1.40 " in line]
    assert "14.00" in row
    assert "H100; SGLang 0.5.15.post1, torch 2.11" in text


def test_a_target_is_met_missed_or_not_measured(tmp_path: Path) -> None:
    said, missed = judged(run_with(tmp_path, floor_tensors=0.010, replay_in_place=0.014, replay_staged=0.030))
    assert "dense, resident, replay / copy <= 1.5 x" in said
    assert missed == ["run: dense, staged, replay / copy <= 2.6 x: 3.00 x"]
    assert "fastest peer" not in said


def test_the_check_exits_with_1_and_names_what_misses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(run_with(tmp_path, floor_tensors=0.010, replay_in_place=0.020))]) == EXIT_MISSED
    assert "missed: run: dense, resident, replay / copy <= 1.5 x: 2.00 x" in capsys.readouterr().out


def test_a_folder_without_samples_is_a_wrong_use(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["check", str(tmp_path)]) == EXIT_USAGE
    assert "there is no samples.jsonl under" in capsys.readouterr().err
