"""The parameters of the old ``VerlEngine.generate`` -> the body of SGLang's ``/generate``.

Pure. Invariant: what comes out is JSON, or a ``ValueError`` says which parameter is none.
"""

import base64
import io
import json
from collections.abc import Mapping
from typing import Any

# As SGLang names them; everything else keeps its name.
_NAMES = {"prompt": "text"}


def generate_body(parameters: Mapping[str, Any], *, stream: bool) -> dict[str, Any]:
    """Without what was not given, which is None, as in the old class."""
    body = {_NAMES.get(name, name): value for name, value in parameters.items() if value is not None}
    if ("text" in body) == ("input_ids" in body) and "input_embeds" not in body:
        raise ValueError("give either prompt or input_ids")
    if "image_data" in body:
        body["image_data"] = _images(body["image_data"])
    body = {name: _plain(name, value) for name, value in body.items()}
    return {**body, "stream": True} if stream else body


def _plain(name: str, value: Any) -> Any:
    """Tensors and arrays as lists; the rest must be JSON as it is."""
    try:
        return json.loads(json.dumps(value, default=_as_list))
    except (TypeError, ValueError) as error:
        raise ValueError(f"{name} cannot be sent as JSON: {error}") from error


def _as_list(value: Any) -> Any:
    if hasattr(value, "tolist"):
        return value.tolist()
    raise TypeError(f"{type(value).__name__} is neither a number, a text, a list nor a tensor")


def _images(images: Any) -> Any:
    """Paths, URLs and base64 as they are; images in memory as base64 of PNG."""
    if isinstance(images, list | tuple):
        return [_images(image) for image in images]
    if isinstance(images, str | Mapping):
        return images
    if isinstance(images, bytes):
        return base64.b64encode(images).decode()
    if hasattr(images, "save"):
        png = io.BytesIO()
        images.save(png, format="PNG")
        return base64.b64encode(png.getvalue()).decode()
    raise ValueError(f"image_data holds a {type(images).__name__}; give a path, a URL, base64, bytes or a PIL image")
