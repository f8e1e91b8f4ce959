"""What a trainer under torchrun does, with nothing but torchrun's variables and one address that all ranks know.

    python -m torch.distributed.run --nproc-per-node 2 -m tests.e2e.verl_torchrun FOLDER ARGUMENTS

ARGUMENTS: those of VerlEngine, as JSON. Each rank writes what it saw to FOLDER/rank-R.json.
"""

import json
import sys
from pathlib import Path

from adapter.demo.tiny_model import random_weights
from adapter.verl_engine import VerlEngine
from tests.e2e.verl_ranks import greedy


def main(folder: Path, arguments: str) -> None:
    """One rank's whole life."""
    with VerlEngine(**json.loads(arguments)) as engine:
        versions, tokens = [], []
        for seed in (1, 2):
            versions.append(engine.update_weights_from_tensor(random_weights(seed)).weight_version)
            tokens.append(engine.generate(**greedy())["output_ids"])
        # Here the ranks meet for the last time, so that rank 0 ends the server after both have generated.
        engine.update_weights_from_tensor(random_weights(1))
        seen = {"rank": engine.tp_rank, "size": engine.tp_size, "versions": versions, "tokens": tokens}
        (folder / f"rank-{engine.tp_rank}.json").write_text(json.dumps(seen))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
