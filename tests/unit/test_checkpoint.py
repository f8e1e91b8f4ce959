"""What is read of a checkpoint folder, and every folder that cannot be read."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from adapter.demo import tiny_model
from sidecar.checkpoint import MAX_HEADER_BYTES, Checkpoint, CheckpointUnreadable, KnownTensor, fingerprint, read
from sidecar.manifest import ITEM_SIZES

INDEX = "model.safetensors.index.json"
CONFIG = "config.json"


def save(path: Path, **tensors: torch.Tensor) -> None:
    save_file({name.replace("__", "."): tensor for name, tensor in tensors.items()}, str(path), {"format": "pt"})


def write_config(folder: Path, **values: object) -> None:
    (folder / CONFIG).write_text(json.dumps(values))


def write_index(folder: Path, **places: str) -> None:
    weight_map = {name.replace("__", "."): file for name, file in places.items()}
    (folder / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": weight_map}))


def write_header(path: Path, header: object) -> None:
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text)


def refusal(folder: Path) -> str:
    with pytest.raises(CheckpointUnreadable) as raised:
        read(folder)
    return str(raised.value)


def test_the_tiny_models_folder_is_read_as_it_was_saved(tmp_path: Path) -> None:
    folder = tiny_model.save_checkpoint(tmp_path, tiny_model.random_weights(1))
    checkpoint = read(folder)
    assert checkpoint.tensors == {name: KnownTensor("bfloat16", shape) for name, shape in tiny_model.tensor_shapes()}
    assert checkpoint.num_hidden_layers == 4
    assert checkpoint.num_nextn_predict_layers is None
    assert not checkpoint.tied_embeddings
    assert checkpoint.architectures == ("Qwen3ForCausalLM",)


@pytest.mark.parametrize("dtype", ITEM_SIZES)
def test_every_dtype_has_torchs_name(tmp_path: Path, dtype: str) -> None:
    save(tmp_path / "model.safetensors", w=torch.zeros(2, 3, dtype=getattr(torch, dtype)))
    assert read(tmp_path).tensors == {"w": KnownTensor(dtype, (2, 3))}


def test_shapes_of_scalars_and_empty_tensors_are_kept(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", scalar=torch.tensor(1.0), empty=torch.zeros(0, 7))
    assert read(tmp_path).tensors == {"scalar": KnownTensor("float32", ()), "empty": KnownTensor("float32", (0, 7))}


def test_a_dtype_from_the_future_keeps_its_own_name(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"w": {"dtype": "F4", "shape": [8], "data_offsets": [0, 4]}})
    assert read(tmp_path).tensors == {"w": KnownTensor("F4", (8,))}


def test_the_data_is_never_read(tmp_path: Path) -> None:
    write_header(tmp_path / "model.safetensors", {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}})
    assert read(tmp_path).tensors == {"w": KnownTensor("float32", (2**40,))}


def test_shards_are_read_through_their_index(tmp_path: Path) -> None:
    save(tmp_path / "model-00001-of-00002.safetensors", a__weight=torch.zeros(2), b__weight=torch.zeros(3))
    save(tmp_path / "model-00002-of-00002.safetensors", c__weight=torch.zeros(4, dtype=torch.float16))
    save(tmp_path / "optimizer.safetensors", moments=torch.zeros(1))
    first, second = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
    write_index(tmp_path, a__weight=first, b__weight=first, c__weight=second)
    assert read(tmp_path).tensors == {
        "a.weight": KnownTensor("float32", (2,)),
        "b.weight": KnownTensor("float32", (3,)),
        "c.weight": KnownTensor("float16", (4,)),
    }


def test_a_tensor_that_the_index_forgot_counts_since_its_file_is_loaded(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.zeros(2), b=torch.zeros(3))
    write_index(tmp_path, a="one.safetensors")
    assert set(read(tmp_path).tensors) == {"a", "b"}


def test_without_an_index_all_files_count(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.zeros(2))
    save(tmp_path / "two.safetensors", b=torch.zeros(3))
    (tmp_path / "below").mkdir()
    save(tmp_path / "below" / "three.safetensors", c=torch.zeros(4))
    assert set(read(tmp_path).tensors) == {"a", "b"}


@pytest.mark.parametrize(
    ("files", "names"),
    [
        pytest.param(["consolidated.safetensors", "model.safetensors"], {"model"}, id="beside-another"),
        pytest.param(["consolidated.safetensors"], {"consolidated"}, id="alone"),
        pytest.param(
            ["consolidated-1.safetensors", "consolidated-2.safetensors"],
            {"consolidated-1", "consolidated-2"},
            id="sharded",
        ),
    ],
)
def test_a_consolidated_file_counts_only_alone(tmp_path: Path, files: list[str], names: set[str]) -> None:
    for file in files:
        save_file({Path(file).stem: torch.zeros(1)}, str(tmp_path / file))
    assert set(read(tmp_path).tensors) == names


def test_a_link_to_a_file_elsewhere_is_followed_as_in_the_hubs_cache(tmp_path: Path) -> None:
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    save(tmp_path / "blobs" / "0123", a=torch.zeros(2))
    (tmp_path / "snapshot" / "model.safetensors").symlink_to("../blobs/0123")
    assert set(read(tmp_path / "snapshot").tensors) == {"a"}


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        pytest.param({}, Checkpoint(tensors={}, tied_embeddings=True), id="empty-and-no-head"),
        pytest.param(
            {"tie_word_embeddings": False, "num_hidden_layers": 3, "num_nextn_predict_layers": 1},
            Checkpoint(tensors={}, num_hidden_layers=3, num_nextn_predict_layers=1),
            id="flat",
        ),
        pytest.param(
            {"text_config": {"tie_word_embeddings": True, "num_hidden_layers": 3}},
            Checkpoint(tensors={}, tied_embeddings=True, num_hidden_layers=3),
            id="nested",
        ),
        pytest.param(
            {"tie_word_embeddings": False, "num_hidden_layers": 9, "text_config": {"tie_word_embeddings": True}},
            Checkpoint(tensors={}, num_hidden_layers=9),
            id="tied-is-asked-outside-first",
        ),
        pytest.param(
            {"tie_word_embeddings": False, "num_hidden_layers": 9, "text_config": {"num_hidden_layers": 3}},
            Checkpoint(tensors={}, num_hidden_layers=3),
            id="layers-are-asked-inside-first",
        ),
        pytest.param(
            {"tie_word_embeddings": "no", "num_hidden_layers": "3", "num_nextn_predict_layers": True},
            Checkpoint(tensors={}, tied_embeddings=True),
            id="wrong-types-say-nothing",
        ),
        pytest.param(
            {"tie_word_embeddings": False, "num_hidden_layers": -1, "architectures": ["A", 1], "text_config": []},
            Checkpoint(tensors={}, architectures=("A",)),
            id="odd-values",
        ),
        pytest.param(
            {"tie_word_embeddings": False, "architectures": "A"},
            Checkpoint(tensors={}),
            id="architectures-is-no-list",
        ),
    ],
)
def test_the_configs_facts(tmp_path: Path, config: dict[str, object], expected: Checkpoint) -> None:
    write_header(tmp_path / "model.safetensors", {})
    write_config(tmp_path, **config)
    assert read(tmp_path) == expected


@pytest.mark.parametrize(
    ("name", "tied"),
    [
        ("lm_head.weight", False),
        ("language_model.lm_head.weight", False),
        ("model.embed_tokens.weight", True),
        ("my_lm_head.weight", True),
    ],
)
def test_where_no_config_says_it_a_head_in_the_files_is_not_tied(tmp_path: Path, name: str, tied: bool) -> None:
    save_file({name: torch.zeros(1)}, str(tmp_path / "model.safetensors"))
    assert read(tmp_path).tied_embeddings is tied


@pytest.mark.parametrize(
    ("content", "said"),
    [
        pytest.param(b"", "its header would be 0 bytes long", id="empty"),
        pytest.param(b"\x02\x00", "its header would be 2 bytes long", id="cut-in-the-length"),
        pytest.param((0).to_bytes(8, "little"), "its header would be 0 bytes long", id="no-header"),
        pytest.param((50).to_bytes(8, "little") + b'{"a": ', "its header would be 50 bytes long", id="cut-header"),
        pytest.param(
            (MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "100000001 bytes long", id="longer-than-the-format"
        ),
        pytest.param(b"version https://git-lfs.github.com/spec/v1\n", "its header would be", id="git-lfs-pointer"),
        pytest.param((2).to_bytes(8, "little") + b"{[", "not JSON", id="not-json"),
        pytest.param((2).to_bytes(8, "little") + b"\xff\xfe", "not JSON", id="not-text"),
        pytest.param((2).to_bytes(8, "little") + b"[]", "not a JSON object", id="not-an-object"),
        pytest.param((200_000).to_bytes(8, "little") + b"[" * 200_000, "not JSON", id="bottomless"),
    ],
)
def test_a_broken_file_is_named_with_what_is_wrong(tmp_path: Path, content: bytes, said: str) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(content)
    message = refusal(tmp_path)
    assert message.startswith(f"{path} is broken or not complete (")
    assert said in message
    assert message.endswith("): copy the checkpoint again")


@pytest.mark.parametrize(
    "entry",
    [
        pytest.param([], id="a-list"),
        pytest.param({"shape": [1]}, id="no-dtype"),
        pytest.param({"dtype": 7, "shape": [1]}, id="dtype-is-a-number"),
        pytest.param({"dtype": "F32"}, id="no-shape"),
        pytest.param({"dtype": "F32", "shape": "1"}, id="shape-is-text"),
        pytest.param({"dtype": "F32", "shape": [-1]}, id="negative"),
        pytest.param({"dtype": "F32", "shape": [True]}, id="true"),
        pytest.param({"dtype": "F32", "shape": [1.0]}, id="float"),
        pytest.param({"dtype": "F32", "shape": [2**63]}, id="too-large"),
    ],
)
def test_a_header_that_does_not_describe_its_tensors_is_refused(tmp_path: Path, entry: object) -> None:
    write_header(tmp_path / "model.safetensors", {"__metadata__": {"format": "pt"}, "w": entry})
    assert "tensor 'w' has no dtype and shape" in refusal(tmp_path)


def test_a_file_that_was_cut_while_it_was_copied_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    save(path, a=torch.zeros(2), b=torch.zeros(3))
    path.write_bytes(path.read_bytes()[:40])
    assert "is broken or not complete" in refusal(tmp_path)


@pytest.mark.parametrize(
    "file", ["../outside.safetensors", "/etc/passwd", "a/b", "a\\b", "..", ".", "", "a\0b", 7, None]
)
def test_an_index_cannot_lead_out_of_the_folder(tmp_path: Path, file: object) -> None:
    save(tmp_path / "outside.safetensors", a=torch.zeros(1))
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / INDEX).write_text(json.dumps({"weight_map": {"a": file}}))
    message = refusal(folder)
    assert message.startswith(f"{folder / INDEX} places tensor 'a' in {file!r}, which is not a file inside the folder")


@pytest.mark.parametrize(
    ("index", "said"),
    [
        pytest.param("{", "is broken or not complete (not JSON", id="not-json"),
        pytest.param("[]", "is broken or not complete (not a JSON object)", id="a-list"),
        pytest.param("{}", "has no weight_map", id="no-map"),
        pytest.param('{"weight_map": {}}', "has no weight_map", id="empty-map"),
        pytest.param('{"weight_map": ["a"]}', "has no weight_map", id="map-is-a-list"),
    ],
)
def test_a_broken_index_is_refused_although_the_files_are_there(tmp_path: Path, index: str, said: str) -> None:
    save(tmp_path / "model.safetensors", a=torch.zeros(1))
    (tmp_path / INDEX).write_text(index)
    message = refusal(tmp_path)
    assert message.startswith(str(tmp_path / INDEX))
    assert said in message


def test_a_shard_that_is_missing_is_named(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.zeros(1))
    write_index(tmp_path, a="one.safetensors", b="two.safetensors")
    assert refusal(tmp_path) == f"{tmp_path / 'two.safetensors'} is missing: copy the checkpoint again"


def test_a_tensor_that_its_shard_does_not_hold_is_named(tmp_path: Path) -> None:
    save(tmp_path / "one.safetensors", a=torch.zeros(1))
    write_index(tmp_path, a="one.safetensors", b="one.safetensors")
    message = refusal(tmp_path)
    assert f"{tmp_path / INDEX} places tensor 'b' in 'one.safetensors', which does not hold it" in message


def test_a_folder_without_safetensors_says_that_names_are_unknown(tmp_path: Path) -> None:
    tiny_model.write_config(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"pickle")
    message = refusal(tmp_path)
    assert message.startswith(f"{tmp_path} holds neither {INDEX} nor a .safetensors file")
    assert message.endswith("save the checkpoint as safetensors")


@pytest.mark.parametrize("model_path", ["Qwen/Qwen3-0.6B", "relative", "", "/no/such/folder", "nul\0byte"])
def test_what_is_no_folder_here_is_refused(model_path: str) -> None:
    message = refusal(Path(model_path))
    assert message.startswith(f"{str(Path(model_path))!r} is not the absolute path of a folder on this host")
    with pytest.raises(CheckpointUnreadable):
        fingerprint(Path(model_path))


def test_a_relative_path_is_refused_even_where_it_leads_to_a_folder() -> None:
    assert Path(".").is_dir()
    assert "is not the absolute path of a folder" in refusal(Path("."))


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=torch.zeros(1))
    assert "is not the absolute path of a folder" in refusal(tmp_path / "model.safetensors")


def test_a_path_that_the_system_refuses_is_refused_in_its_words(tmp_path: Path) -> None:
    folder = tmp_path / ("n" * 300)
    assert refusal(folder) == f"{folder} cannot be read (File name too long): let the sidecar's user read it"
    with pytest.raises(CheckpointUnreadable, match="File name too long"):
        fingerprint(folder)


# A link that leads to itself cannot be opened by anybody, root included, as permissions would let it.
@pytest.mark.parametrize(
    ("make", "said"),
    [
        pytest.param(
            lambda path: path.symlink_to(path), "cannot be read (Too many levels of symbolic links)", id="loop"
        ),
        pytest.param(lambda path: path.symlink_to("gone"), "is missing", id="link-to-nothing"),
        pytest.param(lambda path: path.mkdir(), "is not a regular file", id="folder"),
        pytest.param(os.mkfifo, "is not a regular file", id="pipe"),
        pytest.param(lambda path: path.symlink_to("/dev/zero"), "is not a regular file", id="endless-device"),
    ],
)
def test_what_cannot_be_opened_is_named_and_never_waited_for(
    tmp_path: Path, make: Callable[[Path], None], said: str
) -> None:
    path = tmp_path / "model.safetensors"
    make(path)
    message = refusal(tmp_path)
    assert message.startswith(str(path))
    assert said in message


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_a_config_or_index_that_is_no_file_is_refused(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model.safetensors", a=torch.zeros(1))
    (tmp_path / name).mkdir()
    assert refusal(tmp_path).startswith(f"{tmp_path / name} is not a regular file")


@pytest.mark.parametrize("name", [CONFIG, INDEX])
def test_a_config_or_index_without_end_is_not_read(tmp_path: Path, name: str) -> None:
    save(tmp_path / "model.safetensors", a=torch.zeros(1))
    with (tmp_path / name).open("wb") as file:
        file.truncate(2**40)  # takes no room
    assert f"{tmp_path / name} is broken or not complete (it is longer than" in refusal(tmp_path)


def test_a_broken_config_is_refused(tmp_path: Path) -> None:
    save(tmp_path / "model.safetensors", a=torch.zeros(1))
    (tmp_path / CONFIG).write_text('{"num_hidden_layers": ')
    assert refusal(tmp_path).startswith(f"{tmp_path / CONFIG} is broken or not complete (not JSON")


def test_the_fingerprint_stays_while_the_folder_does_and_changes_with_each_file_that_is_read(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    tiny_model.save_checkpoint(folder, tiny_model.random_weights(1))
    seen = [fingerprint(folder)]
    assert fingerprint(folder) == seen[0]
    (folder / "tokenizer.json").write_text("{}")
    assert fingerprint(folder) == seen[0]

    def changed() -> None:
        now = fingerprint(folder)
        assert now not in seen
        seen.append(now)

    (folder / INDEX).write_text("{}")
    changed()
    (folder / CONFIG).write_text("{}")
    changed()
    (folder / "more.safetensors").write_bytes(b"")
    changed()
    (folder / "more.safetensors").rename(folder / "other.safetensors")
    changed()
    os.utime(folder / "other.safetensors", ns=(1, 1))
    changed()
    (folder / "other.safetensors").unlink()
    assert fingerprint(folder) == seen[2], "the state before it is there again"


def test_a_fingerprint_opens_nothing(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"not a header")
    assert len(fingerprint(tmp_path)) == 64
