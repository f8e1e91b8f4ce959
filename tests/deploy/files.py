"""deploy/ as data."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"
DRAIN_S = 30
PROBE_PORT = 9400
VARIABLE = "SGLANG_WEIGHT_SYNC_"


@cache
def documents(path: Path) -> list[Any]:
    """All YAML documents of a file, or the one of a JSON file."""
    if path.suffix == ".json":
        return [json.loads(path.read_text())]
    return list(yaml.safe_load_all(path.read_text()))


def document(name: str) -> Any:
    """The only document of a file below deploy/."""
    (only,) = documents(DEPLOY / name)
    return only


def manifests() -> Iterator[dict[str, Any]]:
    """Every Kubernetes object, whatever file it is in."""
    for path in sorted(DEPLOY.glob("kubernetes/*.yaml")):
        yield from documents(path)


def manifest(kind: str) -> Any:
    """The only one of its kind."""
    (only,) = (one for one in manifests() if one["kind"] == kind)
    return only


def unit(name: str) -> dict[str, list[str]]:
    """A systemd unit's settings, each with all its values in order; the names of sections are dropped."""
    settings: dict[str, list[str]] = {}
    text = (DEPLOY / "systemd" / name).read_text().replace("\\\n", " ")
    for line in text.splitlines():
        key, separator, value = line.partition("=")
        if separator and not line.startswith("#"):
            settings.setdefault(key.strip(), []).append(value.strip())
    return settings


def run(command: Sequence[str | Path]) -> subprocess.CompletedProcess[str]:
    """A tool of this environment, with what it said."""
    wide = {**os.environ, "COLUMNS": "400"}
    return subprocess.run([*map(str, command)], capture_output=True, text=True, timeout=60, check=False, env=wide)


def tool(name: str) -> Path:
    """A program that pip has put beside this interpreter."""
    return Path(sys.executable).parent / name


@cache
def flags(command: str) -> frozenset[str]:
    """What the command line knows, as it says itself."""
    done = run([sys.executable, "-m", "sidecar", command, "--help"])
    assert done.returncode == 0, done.stderr
    return frozenset(re.findall(r"--[a-z][a-z-]*", done.stdout))
