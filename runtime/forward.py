"""A whole small step in one native call, token ids to logits, where the plan leaves all of it to the CPU.

Weights that stream through the caches put Python's own code and data out of them: what surrounds the layers of a step
takes 0.2 ms by itself and 2 to 3 ms there (experiments/LOG.md). Whatever is unusual goes the way of the modules.
"""

from __future__ import annotations

import copy
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import CausalLMOutputWithPast, MoeCausalLMOutputWithPast
from transformers.utils.generic import ModelOutput

from hwmodels.errors import ExecutionError
from runtime import native
from runtime.clock import now_ns
from runtime.executor import Executor
from runtime.latent import real_tables, table_dtype
from runtime.lean import ASKED, MIXTURES, StepModel
from runtime.native.layer import ForwardWords, LayerWords
from runtime.projection import Projection
from runtime.recording import WholeStep
from runtime.span import Span
from runtime.watch import Watch, own_listeners
from sim.workload import Step

_N_POSITIONS = 256
_STATIC_ROPES = frozenset(("default", "linear", "llama3", "yarn"))
"""Whose frequencies do not depend on how long a sequence has become."""
_LAST_LOGITS = (0, 1)
_GIVEN = frozenset(("input_ids", "attention_mask", "position_ids", "past_key_values", "use_cache"))
_SETTINGS = ("_output_attentions", "output_attentions", "return_dict", "sliding_window", "rope_parameters", *ASKED)
_Given = tuple[Tensor, Tensor | None, Tensor | None, Any]
"""Token ids [B, 1], attention mask, positions, cache."""


@dataclass
class Tables:
    """Rotary tables of some positions in a row, and the frequencies that they were made of."""

    rotary: Any
    like: Tensor
    words: LayerWords
    frequencies: Tensor | None = None
    first: int = -1
    both: tuple[Tensor, Tensor] | None = None

    def hold(self, position: int) -> tuple[Tensor, Tensor]:
        """Tables [T, D] that hold a position, made by the model's own module."""
        first, now = position // _N_POSITIONS * _N_POSITIONS, self.rotary._buffers["inv_freq"]
        assert now is not None, "asked when the model was made"
        same = self.frequencies is not None and torch.equal(now, self.frequencies)  # a version misses .data and NumPy
        if self.both is None or not same or first != self.first:
            with torch.inference_mode(False), torch.no_grad():
                positions = torch.arange(first, first + _N_POSITIONS, device="cpu")[None]
                cos, sin = self._real(self.rotary(self.like, positions))
                self.both, self.first, self.frequencies = (cos[0], sin[0]), first, now.clone()
        return self.both

    def _real(self, made: Any) -> tuple[Tensor, Tensor]:
        tables = real_tables(made, self.words)
        assert tables is not None, "of the model's own module"
        return tables


@dataclass
class Forward:
    """Words for the kernel, and all that must be as it was when they were written."""

    executor: Executor
    span: Span
    words: ForwardWords
    watch: Watch
    settings: dict[str, Any]
    tables: Tables
    output: type[ModelOutput]
    n_logits: int
    times: array[int]
    as_set: list[object] = field(init=False)

    def __post_init__(self) -> None:
        self.as_set = copy.deepcopy(list(map(self.settings.get, _SETTINGS)))  # PhiMoE reads a dict of them in each step

    def step(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> ModelOutput | None:
        """What the model returns, logits [B, 1, V]; None, and nothing done, where modules must do it."""
        since_ns, kernel = now_ns(), native.kernel()
        given = _given(args, kwargs)
        if given is None or kernel is None or not self._takes(given):
            return None
        ids, mask, positions, cache = given
        batch = ids.shape[0]
        rooms = self.span.rooms(batch, cache)
        if rooms is None or not self._holds():
            return None
        n_past = rooms[0][1].n_written
        if not self._fits(mask, positions, batch, n_past):
            return None
        self.executor.check_step(batch, n_past + 1, batch)
        logits = torch.empty((batch, 1, self.n_logits), dtype=self.span.prepared[0].dtype, device="cpu")
        ids = ids.contiguous()
        self._write(ids, mask, positions, n_past, logits)
        self.span.write_past(rooms)
        if not self._call(kernel, batch, n_past + 1):
            return None
        for past, _ in rooms:
            past.written(1)
        counts = [layer.counts[:] for layer in self.span.prepared]
        times = self.times[:]
        self.executor.has_computed(
            lambda name: WholeStep(Step(name, batch, n_past + 1, batch), since_ns, times, counts)
        )
        return self.output(logits=logits, past_key_values=cache)

    def _takes(self, given: _Given) -> bool:
        ids = given[0]
        if ids.dtype != torch.int64 or ids.dim() != 2 or ids.shape[1] != 1 or ids.device.type != "cpu":
            return False
        if torch.is_autocast_enabled("cpu"):
            return False
        return self.executor.computes_steps(ids.shape[0])

    def _holds(self) -> bool:
        """Whether the model is as it was read, with the executor alone listening."""
        return list(map(self.settings.get, _SETTINGS)) == self.as_set and self.span.has_layers() and self.watch.holds()

    def _fits(self, mask: Tensor | None, positions: Tensor | None, batch: int, n_past: int) -> bool:
        """Whether a mask and positions are as the kernel reads them, and no window hides a token."""
        window = None if self.span.knows_windows else self.settings.get("sliding_window")
        if window and n_past + 1 >= window:
            return False
        if mask is not None and not (_is_plain(mask) and mask.shape == (batch, n_past + 1)):
            return False
        return positions is None or (_is_plain(positions) and positions.shape in ((batch, 1), (1, 1)))

    def _write(self, ids: Tensor, mask: Tensor | None, positions: Tensor | None, n_past: int, logits: Tensor) -> None:
        words, layers = self.words, self.words.layers
        cos, sin = self.tables.hold(n_past)
        layers.rows, layers.n_past = ids.shape[0], n_past
        words.ids, words.logits = ids.data_ptr(), logits.data_ptr()
        words.mask, words.n_mask = (0, 0) if mask is None else (mask.data_ptr(), mask.numel())
        words.positions = 0 if positions is None else positions.data_ptr()
        words.position_stride = 1 if positions is not None and positions.shape[0] > 1 else 0
        words.cosines, words.sines, words.first_position = cos.data_ptr(), sin.data_ptr(), self.tables.first

    def _call(self, kernel: native.Kernel, batch: int, kv_tokens: int) -> bool:
        try:
            return kernel.forward(self.words, self.executor.device.cpu_threads)
        except ExecutionError as error:
            task = self.executor.failed_task(batch, kv_tokens, batch, int(self.words.n_parts))
            raise ExecutionError(f"task {task.id} failed on CPU: {error}") from error


def _given(args: Sequence[Any], kwargs: Mapping[str, Any]) -> _Given | None:
    """What a call gives, if it asks for nothing but logits and a longer cache."""
    ids = kwargs.get("input_ids") if not args else args[0] if len(args) == 1 and "input_ids" not in kwargs else None
    mask, positions, cache = map(kwargs.get, ("attention_mask", "position_ids", "past_key_values"))
    if not isinstance(ids, Tensor) or cache is None or kwargs.get("use_cache") is False:
        return None
    for name, value in kwargs.items():
        if name in _GIVEN or value is None:
            continue
        if name == "logits_to_keep" and type(value) is int and value in _LAST_LOGITS:
            continue
        if value is not (name == "return_dict"):
            return None
    return ids, mask, positions, cache


def _is_plain(numbers: object) -> bool:
    """Whether the kernel reads these as they lie."""
    if not isinstance(numbers, Tensor) or numbers.dtype != torch.int64 or numbers.device.type != "cpu":
        return False
    return numbers.is_contiguous()


def forward_of(model: PreTrainedModel, executor: Executor) -> Forward | None:
    """All of a model's small steps in one call; None if a part of it has another form."""
    inner, head = model._modules.get("model"), model._modules.get("lm_head")
    if not isinstance(inner, StepModel) or inner.span is None or type(head) is not Projection:
        return None
    embed, rotary, span = inner._modules.get("embed_tokens"), inner._modules.get("rotary_emb"), inner.span
    first = span.prepared[0]
    if type(embed) is not nn.Embedding or embed.max_norm is not None or rotary is None:
        return None
    family = executor.spec.family
    if family not in FAMILIES or not _is_static(rotary, family):
        return None
    tables = Tables(rotary, torch.empty(0, dtype=first.dtype, device="cpu"), first.words)
    size = (_N_POSITIONS, first.words.head_width)
    kind = table_dtype(first.words, first.dtype)
    ours = all(t.shape == size and t.dtype == kind and t.is_contiguous() for t in tables.hold(0))
    weights = [embed.weight, head.weight, *([] if head.bias is None else [head.bias])]
    if not ours or not all(w.dtype == first.dtype and w.is_contiguous() and w.device.type == "cpu" for w in weights):
        return None
    times = array("q", [0] * (3 + 2 * len(span.layers)))
    words = ForwardWords(
        layers=span.words,
        embedding=embed.weight.data_ptr(),
        vocab=embed.weight.shape[0],
        n_positions=_N_POSITIONS,
        head=head.weight.data_ptr(),
        head_bias=0 if head.bias is None else head.bias.data_ptr(),
        n_logits=head.weight.shape[0],
        times=times.buffer_info()[0],
    )
    output = MoeCausalLMOutputWithPast if family in MIXTURES else CausalLMOutputWithPast
    settings, watch = vars(model.config), _watch(model, inner, span)
    return Forward(executor, span, words, watch, settings, tables, output, head.weight.shape[0], times)


def _is_static(rotary: Any, family: str) -> bool:
    """Whether tables of a token are the same beside those of positions around it."""
    kind = getattr(rotary, "rope_type", None)
    if family != "phimoe" or kind == "default":
        return kind in _STATIC_ROPES
    # PhiMoE scales tables by whether the last token of all is beyond a limit: all that are held are, or none.
    return kind == "longrope" and not rotary.config.rope_parameters["original_max_position_embeddings"] % _N_POSITIONS


FAMILIES = frozenset(("llama", "mistral", "qwen2", "qwen3", *MIXTURES))
"""Whose logits are the head's of the last norm, and nothing else."""


def _watch(model: PreTrainedModel, inner: nn.Module, span: Span) -> Watch:
    """What the layers' and the norm's watch asks, and the same of what surrounds them."""
    embed, head, rotary = (model.get_submodule(f) for f in ("model.embed_tokens", "lm_head", "model.rotary_emb"))
    links = [
        (inner._modules, "embed_tokens", embed),
        (inner._modules, "rotary_emb", rotary),
        (model._modules, "lm_head", head),
    ]
    lie: list[tuple[dict[str, Any], str]] = [(embed._parameters, "weight"), (rotary._buffers, "inv_freq")]
    lie += [(head._parameters, "weight"), (head._parameters, "bias")]
    values = [(of, name, 0 if of.get(name) is None else of[name].data_ptr()) for of, name in lie]
    facts = [(rotary, name, getattr(rotary, name)) for name in ("attention_scaling", "rope_type")]
    facts += [(embed, "max_norm", None), (inner, "_compiled_call_impl", None)]
    (state, before, after), *entered = own_listeners((model, inner))
    # The model holds what is made here, which must not hold the model.
    hooks = {name: state[name] for name in ("_forward_pre_hooks", "_forward_hooks")}
    around = Watch.of(links, values, facts, [(hooks, before, after), *entered])
    return Watch.of_all([span.watch, Watch.of([(model._modules, "model", inner)], [], []), around])
