"""Our safetensors reader gives what was written, reads nothing else, and says what is wrong with a file."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from hwmodels.errors import CheckpointError
from runtime.checkpoint import INDEX_NAME, SINGLE_NAME, Checkpoint, read_header

CONFIG = {"model_type": "llama"}


def write(folder: Path, tensors: dict[str, torch.Tensor]) -> Path:
    """A checkpoint folder with one file."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    save_file(tensors, folder / SINGLE_NAME)
    return folder


def write_shards(folder: Path, shards: dict[str, dict[str, torch.Tensor]]) -> Path:
    """A checkpoint folder with an index and one file per entry."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    for name, tensors in shards.items():
        save_file(tensors, folder / name)
    weight_map = {key: name for name, tensors in shards.items() for key in tensors}
    (folder / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def write_raw(folder: Path, header: Any, payload: bytes = b"", pad: int = 0) -> Path:
    """A checkpoint whose header and payload are given: what no library would write."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG))
    text = (header if isinstance(header, str) else json.dumps(header)).encode() + b" " * pad
    (folder / SINGLE_NAME).write_bytes(struct.pack("<Q", len(text)) + text + payload)
    return folder


def f32(shape: list[int], start: int, stop: int) -> dict[str, Any]:
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, stop]}


# -- what was written is read -------------------------------------------------------------------------


@settings(max_examples=30, deadline=None)
@given(
    shapes=st.lists(st.lists(st.integers(0, 5), max_size=3), min_size=1, max_size=6),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool]),
    n_shards=st.integers(1, 3),
)
def test_what_was_written_is_read(
    tmp_path_factory: pytest.TempPathFactory, shapes: list[list[int]], dtype: torch.dtype, n_shards: int
) -> None:
    tensors = {f"t{i}": (torch.rand(shape) * 9).to(dtype) for i, shape in enumerate(shapes)}
    shards = [{k: v for i, (k, v) in enumerate(tensors.items()) if i % n_shards == s} for s in range(n_shards)]
    folder = write_shards(tmp_path_factory.mktemp("c"), {f"m{i}.safetensors": s for i, s in enumerate(shards) if s})
    with Checkpoint.open(folder) as checkpoint:
        assert sorted(checkpoint.keys()) == sorted(tensors)
        assert checkpoint.n_bytes == sum(t.nbytes for t in tensors.values())
        for key, tensor in tensors.items():
            assert checkpoint.shape(key) == tuple(tensor.shape)
            assert checkpoint.dtype(key) == checkpoint.tensor(key).dtype == dtype
            assert torch.equal(checkpoint.tensor(key), tensor)


def test_a_tensor_is_a_view_of_the_mapped_file(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, {"a": torch.arange(4.0), "b": torch.arange(6.0)})) as checkpoint:
        assert checkpoint.tensor("a").data_ptr() == checkpoint.tensor("a").data_ptr()
        assert abs(checkpoint.tensor("a").data_ptr() - checkpoint.tensor("b").data_ptr()) in (16, 24)


def test_writing_to_a_tensor_leaves_the_file_alone(tmp_path: Path) -> None:
    before = write(tmp_path, {"a": torch.zeros(4)}).joinpath(SINGLE_NAME).read_bytes()
    with Checkpoint.open(tmp_path) as checkpoint:
        checkpoint.tensor("a").add_(1)
    assert (tmp_path / SINGLE_NAME).read_bytes() == before


def test_tensors_outlive_the_checkpoint_that_gave_them(tmp_path: Path) -> None:
    with Checkpoint.open(write(tmp_path, {"a": torch.arange(4.0)})) as checkpoint:
        kept = checkpoint.tensor("a")
    assert kept.tolist() == [0, 1, 2, 3]
    with pytest.raises(CheckpointError, match="the checkpoint is closed"):
        checkpoint.tensor("a")


@pytest.mark.parametrize("pad", range(4))
def test_a_tensor_at_an_odd_address_is_read_all_the_same(tmp_path: Path, pad: int) -> None:
    folder = write_raw(tmp_path, {"a": f32([2], 0, 8)}, struct.pack("<2f", 1.5, -2.0), pad)
    assert Checkpoint.open(folder).tensor("a").tolist() == [1.5, -2.0]


def test_opening_reads_headers_only(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": {"a": torch.ones(3)}, "b.safetensors": {"b": torch.ones(3)}})
    checkpoint = Checkpoint.open(folder)
    (folder / "b.safetensors").unlink()  # never opened again unless asked for
    assert checkpoint.tensor("a").sum() == 3


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    write_shards(tmp_path, {"old.safetensors": {"a": torch.zeros(1)}})
    assert Checkpoint.open(write(tmp_path, {"a": torch.ones(1)})).tensor("a").item() == 1


# -- what is wrong is said ----------------------------------------------------------------------------


def test_a_truncated_file_is_named_with_both_sizes(tmp_path: Path) -> None:
    file = write(tmp_path, {"a": torch.zeros(100)}) / SINGLE_NAME
    whole = file.stat().st_size
    file.write_bytes(file.read_bytes()[:-7])
    message = rf"model\.safetensors: truncated: found {whole - 7} bytes, its header describes {whole}"
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(tmp_path)


@settings(max_examples=60, deadline=None)
@given(cut=st.integers(0, 200), flip=st.integers(0, 79))
def test_a_damaged_file_is_refused_or_read_but_never_crashes(
    tmp_path_factory: pytest.TempPathFactory, cut: int, flip: int
) -> None:
    folder = write(tmp_path_factory.mktemp("c"), {"a": torch.zeros(8), "b": torch.ones(8)})
    file = folder / SINGLE_NAME
    damaged = bytearray(file.read_bytes())
    damaged[flip] ^= 0x15
    file.write_bytes(bytes(damaged[: len(damaged) - cut]))
    try:
        checkpoint = Checkpoint.open(folder)
    except CheckpointError:
        return
    for key in checkpoint:
        checkpoint.tensor(key).sum()


HEADERS: dict[str, tuple[Any, bytes, str]] = {
    "a gap": ({"a": f32([1], 0, 4), "b": f32([1], 8, 12)}, b"\0" * 12, "'b' leaves a gap before it"),
    "an overlap": ({"a": f32([2], 0, 8), "b": f32([2], 4, 12)}, b"\0" * 12, "'b' overlaps the tensor before it"),
    "bytes left over": ({"a": f32([1], 0, 4)}, b"\0" * 9, "too long"),
    "a shape that does not fit": ({"a": f32([3], 0, 4)}, b"\0" * 4, "takes 12 bytes, its data_offsets .* give 4"),
    "a negative shape": ({"a": f32([-1], 0, 4)}, b"\0" * 4, "expected numbers"),
    "offsets backwards": ({"a": f32([1], 8, 4)}, b"\0" * 8, "takes 4 bytes"),
    "one offset": ({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}, b"\0" * 4, "data_offsets"),
    "a quantised dtype": ({"a": {"dtype": "F8_E4M3", "shape": [1], "data_offsets": [0, 1]}}, b"\0", "'F8_E4M3'"),
    "no fields": ({"a": 3}, b"", "has dtype None"),
    "a key twice": ('{"a": {}, "a": {}}', b"", "names 'a' twice"),
    "no JSON": ("{nonsense", b"", "the header is not JSON"),
    "a list": ("[]", b"", "the header is a list"),
}


@pytest.mark.parametrize("what", HEADERS)
def test_a_malformed_header_is_refused(tmp_path: Path, what: str) -> None:
    header, payload, message = HEADERS[what]
    with pytest.raises(CheckpointError, match=message):
        Checkpoint.open(write_raw(tmp_path, header, payload))


@pytest.mark.parametrize("content", [b"", b"\x01", struct.pack("<Q", 2**62), struct.pack("<Q", 0), b"PK\x03\x04 a zip"])
def test_what_is_no_safetensors_file_is_refused(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"x\.safetensors: not a safetensors file"):
        read_header(file)


def test_a_missing_shard_is_an_incomplete_download(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": {"a": torch.ones(3)}, "b.safetensors": {"b": torch.ones(3)}})
    (folder / "b.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names b\.safetensors, which is not in the folder"):
        Checkpoint.open(folder)


def test_an_index_must_agree_with_its_shards(tmp_path: Path) -> None:
    folder = write_shards(tmp_path, {"a.safetensors": {"a": torch.ones(3)}, "b.safetensors": {"b": torch.ones(3)}})
    index = folder / INDEX_NAME
    for weight_map, message in (
        ({"a": "a.safetensors", "b": "a.safetensors"}, "says 'b' is in a.safetensors, but no file holds it"),
        ({"a": "b.safetensors", "b": "a.safetensors"}, "says 'a' is in b.safetensors, but it is in a.safetensors"),
        ({"a": "../a.safetensors"}, "expected a plain file name"),
        ({"a": 3}, "expected a plain file name"),
        ({}, "no weight_map"),
    ):
        index.write_text(json.dumps({"weight_map": weight_map}))
        with pytest.raises(CheckpointError, match=message):
            Checkpoint.open(folder)
    index.write_text("not JSON")
    with pytest.raises(CheckpointError, match="not JSON"):
        Checkpoint.open(folder)


def test_a_tensor_in_two_shards_is_refused(tmp_path: Path) -> None:
    both = {"a.safetensors": {"a": torch.ones(3), "x": torch.ones(1)}, "b.safetensors": {"a": torch.ones(3)}}
    folder = write_shards(tmp_path, both)
    with pytest.raises(CheckpointError, match="tensor 'a' is in"):
        Checkpoint.open(folder)


def test_a_folder_of_another_kind_is_described(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json; found an empty folder"):
        Checkpoint.open(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"neither .*; found config\.json, pytorch_model\.bin"):
        Checkpoint.open(tmp_path)
    with pytest.raises(CheckpointError, match="found nothing; expected a Hugging Face checkpoint folder"):
        Checkpoint.open(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="found a file"):
        Checkpoint.open(tmp_path / "config.json")


def test_a_missing_tensor_comes_with_the_nearest_name(tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(write(tmp_path, {"layers.0.norm.weight": torch.ones(1)}))
    with pytest.raises(CheckpointError, match=r"no tensor 'model\.layers\.0\.norm\.weight'; there is 'layers\.0"):
        checkpoint.tensor("model.layers.0.norm.weight")
