"""Keyword arguments of SGLang's ``ServerArgs`` -> the command line of ``sglang.launch_server``.

Pure, and without SGLang: names are not checked here, the server itself refuses one that it does not know. Invariant:
no secret gets onto a command line, where every user of the machine could read it.
"""

import json
from collections.abc import Iterator, Mapping
from enum import Enum
from numbers import Real
from pathlib import Path

REFUSED = {
    "server_args": "give the fields of your ServerArgs as keyword arguments instead: VerlEngine(model_path=..., ...)",
    "api_key": "the sidecar cannot show a key yet; run the server without keys, on loopback",
    "admin_api_key": "the sidecar cannot show a key yet; run the server without keys, on loopback",
    "ssl_certfile": "the sidecar speaks plain HTTP to the server; keep it on loopback",
    "ssl_keyfile": "the sidecar speaks plain HTTP to the server; keep it on loopback",
    "ssl_keyfile_password": "it would be readable on the server's command line",
    "grpc_mode": "it replaces the HTTP server that updates go through",
    "smg_grpc_mode": "it replaces the HTTP server that updates go through",
}


def check_server_args(server_args: Mapping[str, object], decided: Mapping[str, object]) -> None:
    """Raise ``ValueError`` for what a server that is started here cannot have.

    Args:
        server_args: what the caller wants.
        decided: what follows from the ranks, such as tp_size; the same value again is no mistake.
    """
    _check_model_path(server_args.get("model_path"))
    for name, reason in REFUSED.items():
        if server_args.get(name):
            raise ValueError(f"{name} cannot be used here: {reason}")
    for name, value in decided.items():
        given = server_args.get(name)
        if given is not None and given != value:
            raise ValueError(f"{name}={given!r} contradicts the trainer's ranks, which make it {value!r}; leave it out")
    _check_layout(server_args)


def _check_model_path(model_path: object) -> None:
    if model_path is None:
        raise ValueError("model_path is missing: a checkpoint's folder or its name on the Hugging Face hub")
    if not isinstance(model_path, str | Path) or not str(model_path):
        raise ValueError(f"model_path is {model_path!r}; give a folder or a name on the Hugging Face hub")


def _check_layout(server_args: Mapping[str, object]) -> None:
    if _number(server_args, "pp_size") > 1:
        raise ValueError(
            f"pp_size={server_args['pp_size']}: every pipeline stage would open the same memory; use tensor parallelism"
        )
    if _number(server_args, "dp_size") > 1 and not server_args.get("enable_dp_attention"):
        raise ValueError(
            f"dp_size={server_args['dp_size']} makes replicas: give each its own VerlEngine, or set enable_dp_attention"
        )


def _number(server_args: Mapping[str, object], name: str) -> int:
    value = server_args.get(name)
    return value if isinstance(value, int) else 1


def to_argv(server_args: Mapping[str, object]) -> list[str]:
    """Flags, in the order given. None and False are left out: most flags can only be switched on.

    The few that can also be switched off have a name for it: ``no_enable_fused_qk_norm_rope=True``.
    """
    return [word for name, value in server_args.items() for word in _words(name, value)]


def _words(name: str, value: object) -> Iterator[str]:
    flag = "--" + name.replace("_", "-")
    if value is None or value is False:
        return
    if value is True:
        yield flag
    elif isinstance(value, list | tuple | set | frozenset):
        if value:
            yield from (flag, *(_text(name, item) for item in value))
    elif name == "lora_paths" and isinstance(value, Mapping):
        yield from (flag, *(f"{lora}={path}" for lora, path in value.items()))
    else:
        text = _text(name, value)
        yield from [f"{flag}={text}"] if text.startswith("-") else [flag, text]


def _text(name: str, value: object) -> str:
    if isinstance(value, Enum):
        return _text(name, value.value)
    if isinstance(value, Mapping):
        return json.dumps(value)
    if isinstance(value, str | Path | Real):
        return str(value)
    raise ValueError(f"{name} is a {type(value).__name__}, which cannot be written on the server's command line")
