"""The old class's parameters as the body of SGLang's /generate."""

import base64
import io
import json

import pytest
import torch

from adapter.verl_engine.generate_body import generate_body

PNG = b"\x89PNG..."


class Picture:
    """As PIL's images save themselves."""

    def save(self, file: io.BytesIO, format: str) -> None:
        assert format == "PNG"
        file.write(PNG)


def test_only_what_was_given_is_sent_under_sglangs_names() -> None:
    parameters = {"prompt": "hi", "input_ids": None, "sampling_params": {"temperature": 0}, "top_logprobs_num": None}
    assert generate_body(parameters, stream=False) == {"text": "hi", "sampling_params": {"temperature": 0}}


def test_a_stream_is_asked_for() -> None:
    assert generate_body({"prompt": "hi"}, stream=True) == {"text": "hi", "stream": True}


def test_an_explicit_no_is_sent() -> None:
    body = generate_body({"prompt": "hi", "return_logprob": False, "log_metrics": False}, stream=False)
    assert body == {"text": "hi", "return_logprob": False, "log_metrics": False}


def test_zero_is_not_nothing() -> None:
    body = generate_body({"prompt": "hi", "return_logprob": True, "logprob_start_len": 0}, stream=False)
    assert (body["return_logprob"], body["logprob_start_len"]) == (True, 0)


def test_token_ids_may_be_tensors() -> None:
    ids = torch.tensor([[1, 2], [3, 4]])
    assert generate_body({"input_ids": ids}, stream=False) == {"input_ids": [[1, 2], [3, 4]]}
    assert generate_body({"input_ids": [ids[0], [5]]}, stream=False) == {"input_ids": [[1, 2], [5]]}


def test_sampling_parameters_may_hold_numbers_of_torch() -> None:
    body = generate_body({"prompt": "hi", "sampling_params": {"top_k": torch.tensor(3)}}, stream=False)
    assert json.dumps(body) == '{"text": "hi", "sampling_params": {"top_k": 3}}'


@pytest.mark.parametrize("given", [{}, {"prompt": None}, {"prompt": "hi", "input_ids": [1]}])
def test_a_prompt_is_needed_once(given: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="give either prompt or input_ids"):
        generate_body(given, stream=False)


def test_images_go_as_addresses_or_base64() -> None:
    encoded = base64.b64encode(PNG).decode()
    body = generate_body({"prompt": "x", "image_data": ["/a.png", [PNG, Picture()], "http://b"]}, stream=False)
    assert body["image_data"] == ["/a.png", [encoded, encoded], "http://b"]


def test_an_image_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="image_data holds a float; give a path, a URL, base64, bytes or a PIL image"):
        generate_body({"prompt": "x", "image_data": [1.5]}, stream=False)


def test_what_json_has_no_form_for_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match="sampling_params cannot be sent as JSON: object is neither a number"):
        generate_body({"prompt": "x", "sampling_params": {"stop": object()}}, stream=False)
