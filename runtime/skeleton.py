"""A Hugging Face model without its MLPs: built without memory, filled by our own reader.

Parameters are created on the meta device (no memory, no initialisation), so that a model of any size is
built in well under a second; buffers are computed for real. Nothing in torch or transformers is replaced.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig, PreTrainedConfig, PreTrainedModel

from hwmodels.errors import CheckpointError, ModelError
from runtime import attention
from runtime.adapter import EMBEDDING, HEAD, Adapter, FfnKind
from runtime.checkpoint import Checkpoint, read_config
from runtime.pages import large_pages

MakeFfn = Callable[[int, FfnKind, nn.Module], nn.Module]
"""(layer index, kind, the original module on the meta device) -> the module that takes its place."""

Place = Callable[[str], torch.device]
"""Name of a parameter or buffer -> the device it goes to."""


@dataclass(frozen=True)
class LoadReport:
    """What `load_rest` read: bytes of parameters and stored buffers, and keys of the checkpoint that nothing uses."""

    n_bytes: int
    unused_keys: tuple[str, ...]


def build_skeleton(folder: str | Path, dtype: torch.dtype, make_ffn: MakeFfn) -> PreTrainedModel:
    """The model of a checkpoint folder with parameters on meta and every MLP replaced by make_ffn's module.

    Dense layers lose `layer.mlp`; MoE layers keep router and shared expert and lose `layer.mlp.experts`.
    Raises ModelError for an unsupported or inconsistent config.
    """
    folder = Path(folder)
    adapter = Adapter.of(read_config(folder), folder.name)
    model = _build(folder, dtype)
    _compute_buffers(model)
    for i, layer in enumerate(decoder_layers(model)):
        owner, attribute = adapter.ffn_owner(layer, i)
        setattr(owner, attribute, make_ffn(i, adapter.kind(i), getattr(owner, attribute)))
    model.config.name_or_path = str(folder)
    if (folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(folder)
    model.train(False)
    model.requires_grad_(False)
    return model


def decoder_layers(model: PreTrainedModel) -> nn.ModuleList:
    """The model's decoder layers, first to last."""
    layers = model.get_submodule("model.layers")
    assert isinstance(layers, nn.ModuleList)
    return layers


def _build(folder: Path, dtype: torch.dtype) -> PreTrainedModel:
    attention.register()
    try:
        config: PreTrainedConfig = AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        vars(config).pop("quantization_config", None)  # our own reader gives what the numbers stand for
        with torch.device("meta"):
            model: PreTrainedModel = AutoModelForCausalLM.from_config(  # type: ignore[no-untyped-call]
                config, dtype=dtype, attn_implementation=attention.NAME
            )
    except Exception as error:  # transformers raises a dozen kinds, all of them about this config
        raise ModelError(f"{folder}: transformers cannot build this config.json: {error}") from error
    return model


def _compute_buffers(model: PreTrainedModel) -> None:
    """Rebuild the modules whose buffers were swallowed by the meta device (rotary tables) with real ones.

    Buffers that a checkpoint holds stay on meta: they are loaded like parameters.
    """
    stored = set(model.state_dict())
    for name, module in list(model.named_modules()):
        own = module.named_buffers(prefix=name, recurse=False)
        if not any(buffer.is_meta and full not in stored for full, buffer in own):
            continue
        if list(module.children()) or list(module.parameters()):
            raise ModelError(f"{type(module).__name__} ({name}) has buffers that cannot be computed here")
        model.set_submodule(name, type(module)(config=model.config))


# -- loading ------------------------------------------------------------------------------------------


def load_rest(
    model: PreTrainedModel,
    checkpoint: Checkpoint,
    adapter: Adapter,
    place: Place,
    dtype: torch.dtype,
    progress: Callable[[int], object] | None = None,
) -> LoadReport:
    """Load every parameter that is left on meta, in dtype, onto the device that `place` names.

    progress is called with the bytes of each tensor once loaded. Buffers that the checkpoint holds (corrections of
    a router's scores) are loaded in float32, as transformers keeps them; computed ones move and keep their dtype.
    Raises CheckpointError if a parameter has no tensor or a tensor of another shape; the model is then
    partly loaded and of no use.
    """
    _check_tied(checkpoint, adapter)
    used: set[str] = set()
    n_bytes = 0
    for name, tensor in _on_meta(model):
        key = adapter.checkpoint_key(name, checkpoint)
        own_dtype = dtype if isinstance(tensor, nn.Parameter) else torch.float32
        loaded = _load(checkpoint, key, tensor, place(name), own_dtype)
        _assign(model, name, loaded)
        checkpoint.release()  # else the file's pages stay beside the copies: twice the model in memory
        used.add(key)
        n_bytes += loaded.nbytes
        if progress is not None:
            progress(loaded.nbytes)
    model.tie_weights(recompute_mapping=False)
    for name, buffer in list(model.named_buffers()):
        owner, attribute = _owner(model, name)
        setattr(owner, attribute, buffer.to(place(name)))
    left = [name for name, _ in _on_meta(model)]
    if left:
        raise CheckpointError(f"{checkpoint.folder}: {left[0]!r} and {len(left) - 1} more were not loaded")
    unused = tuple(k for k in checkpoint if k not in used and not adapter.is_ignorable(k))
    return LoadReport(n_bytes, unused)


def _on_meta(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    everything = (*model.named_parameters(), *model.named_buffers())
    yield from [(name, tensor) for name, tensor in everything if tensor.is_meta]


def _load(
    checkpoint: Checkpoint, key: str, tensor: torch.Tensor, device: torch.device, dtype: torch.dtype
) -> torch.Tensor:
    # A copy, even where dtype and device agree: the model must not hang on the file.
    stored = checkpoint.tensor_of(key, tuple(tensor.shape))
    if device.type != "cpu":
        return stored.to(device=device, dtype=dtype, copy=True)
    return large_pages(torch.empty(stored.shape, dtype=dtype, device=device)).copy_(stored)


def _assign(model: nn.Module, name: str, value: torch.Tensor) -> None:
    owner, attribute = _owner(model, name)
    is_parameter = isinstance(getattr(owner, attribute), nn.Parameter)
    setattr(owner, attribute, nn.Parameter(value, requires_grad=False) if is_parameter else value)


def _owner(model: nn.Module, name: str) -> tuple[nn.Module, str]:
    path, _, attribute = name.rpartition(".")
    return model.get_submodule(path), attribute


def _check_tied(checkpoint: Checkpoint, adapter: Adapter) -> None:
    if not adapter.spec.tied_embeddings or HEAD not in checkpoint or EMBEDDING not in checkpoint:
        return
    if not torch.equal(checkpoint.tensor(HEAD), checkpoint.tensor(EMBEDDING)):
        raise CheckpointError(
            f"{checkpoint.folder}: config.json ties the output projection to the embedding, but {HEAD!r} differs from "
            f"{EMBEDDING!r}; set tie_word_embeddings to false in config.json"
        )
