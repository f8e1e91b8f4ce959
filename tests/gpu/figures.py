"""What the GPU tests measure: printed and, if GPU_FIGURES names a file, added to it as JSON lines."""

import json
import os
from pathlib import Path
from typing import Any


def keep(what: str, figures: dict[str, Any]) -> None:
    """One line."""
    line = json.dumps({"what": what, **figures})
    print(line)
    if path := os.environ.get("GPU_FIGURES"):
        with Path(path).open("a") as file:
            file.write(line + "\n")
