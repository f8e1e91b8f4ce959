"""A trainer of one rank whose server is a stand-in, and which then does what it was told.

    python -m tests.integration.verl_trainer DOING ARGUMENTS

ARGUMENTS: those of VerlEngine, as JSON. Says on its standard output, as JSON, what it has started; a start that fails
is its error's kind and text. DOING: "end" without a shutdown, "raise" an error, "wait", or "fork" a child that ends in
good order, and wait.
"""

import json
import os
import sys
import time

from adapter.errors import WeightSyncError
from adapter.verl_engine import VerlEngine
from tests.integration.verl_stub import described


def main(doing: str, arguments: str) -> None:
    """Its whole life."""
    try:
        engine = VerlEngine(**json.loads(arguments))
    except WeightSyncError as error:
        print(json.dumps([type(error).__name__, str(error)]), flush=True)
        return
    print(json.dumps(described(engine)), flush=True)
    if doing == "raise":
        raise SystemError("a defect of the trainer")
    if doing == "fork" and os.fork() == 0:
        sys.exit(0)  # runs the exit handlers that it has inherited
    if doing in ("wait", "fork"):
        time.sleep(1000)


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2])
