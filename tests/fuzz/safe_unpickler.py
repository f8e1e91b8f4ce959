"""SGLang's own ``SafeUnpickler`` of each release at hand, run without importing SGLang or torch.

Its source is cut out of the installed package and executed as it stands. Only what lies under its check, resolving an
allowed name, is replaced: by the inert stand-ins of ``tests.fakes.unpickling``, which record what torch would be given.
Invariant: what loads here has passed the release's real check, name by name.
"""

import ast
import importlib.util
import io
import pickle
from collections.abc import Callable
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from tests.fakes.unpickling import _GLOBALS

ENGINES = Path(__file__).parents[2] / ".engines"
COMMON = Path("sglang/srt/utils/common.py")


class _StandIns(pickle.Unpickler):
    """In place of ``pickle.Unpickler`` under SGLang's class: names become stand-ins, and no module is imported."""

    def find_class(self, module_name: str, global_name: str) -> Any:
        return _GLOBALS[module_name, global_name]


@cache
def releases() -> dict[str, type[pickle.Unpickler]]:
    """By release: the newest, installed one as "installed", and the folders of older ones."""
    found = {"installed": _installed()} | {path.name: path / COMMON for path in sorted(ENGINES.glob("*"))}
    return {name: _cut_out(path) for name, path in found.items() if path.exists()}


def load_in_all(data: bytes) -> Any:
    """What the payload becomes; raises what any release's check raises, and whatever its loading would."""
    loaded = [_load(unpickler, data) for unpickler in releases().values()]
    return loaded[0]


def _load(unpickler: type[pickle.Unpickler], data: bytes) -> Any:
    load: Callable[[], Any] = unpickler(io.BytesIO(data)).load
    return load()


def _installed() -> Path:
    spec = importlib.util.find_spec("sglang")  # finds the folder without running any of it
    assert spec is not None, "SGLang is not installed"
    folder = (spec.submodule_search_locations or [""])[0]
    return Path(folder).parent / COMMON


def _cut_out(path: Path) -> type[pickle.Unpickler]:
    """The class, with nothing changed in it."""
    source = path.read_text()
    classes = [node for node in ast.parse(source).body if isinstance(node, ast.ClassDef)]
    (found,) = [node for node in classes if node.name == "SafeUnpickler"]
    names: dict[str, Any] = {"pickle": SimpleNamespace(Unpickler=_StandIns), "_safe_load_torch_storage": _never}
    exec(compile(ast.Module([found], []), str(path), "exec"), names)
    kind: type[pickle.Unpickler] = names["SafeUnpickler"]
    return kind


def _never(*_: object) -> None:
    raise AssertionError("no payload of ours has a storage inside it")
