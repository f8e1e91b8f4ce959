"""How others bring weights into a running SGLang server, written from their public description.

Each module has one ``update``, which every rank calls with its tensors. ``engine`` is what rank 0 talks to, None on
the others. Invariant: a peer is given what it was made for and no worse: gloo with the same ranks, tensors in memory
of their own, the device's UUID in its handles; nothing of the sidecar runs while it is measured.
"""

from benchmarks.peers import http_server_engine_adapter, slime_flattened, verl_local_serialized
from benchmarks.peers.surroundings import Peer

PEERS: dict[str, Peer] = {
    "http_server_engine_adapter": http_server_engine_adapter.update,
    "verl_local_serialized": verl_local_serialized.update,
    "slime_flattened": slime_flattened.update,
}
