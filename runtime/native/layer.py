"""Decoder layers as the native kernel takes them in one call: the words of runtime/native/layer.h, in its order."""

from __future__ import annotations

import ctypes
from ctypes import c_double, c_int64, c_void_p
from typing import ClassVar

_SIZES = ("dtype", "isa", "act", "width", "n_heads", "n_kv_heads", "head_width")
_NUMBERS = ("input_eps", "post_eps", "head_eps", "scale", "clip")
_ATTENTION = ("input_norm", "post_norm", "query", "key", "value", "query_bias", "key_bias", "value_bias")
_HEADS = ("query_norm", "key_norm", "norms_whole")
_DOWN = ("query_down", "query_down_bias", "latent", "latent_bias", "expand", "query_rank")
_LATENT = (*_DOWN, "latent_width", "pass_width", "value_width", "turns", "sinks", "window", "output", "output_bias")
_EXPERTS = ("router", "n_experts", "top_k", "normalises", "rounds")
_ROUTING = ("routing", "wide_logits", "router_bias", "correction", "n_groups", "top_groups")
_FACTORS = ("scaling", "jitter")
_BIASES = ("input_norm_bias", "post_norm_bias", "norms_once", "down_bias")
_PIECES = ("n_pieces", "experts")
_SHARED = ("shared_gate", "shared_up", "shared_down", "shared_weight", "shared_columns")
_CALL = ("rows", "n_new", "n_past", "x", "y", "cosine", "sine", "table_stride", "n_dropped", "keys", "values")
SOFTMAX, SIGMOID, SPARSE_MIXER, SOFTMAX_OF_CHOSEN = range(4)
"""Routings of layer.h."""
HALVES, PAIRS_APART, PAIRS = range(3)
"""Turns of layer.h."""


class LayerWords(ctypes.Structure):
    """Sizes, addresses (0 for what a layer has not) and, from `rows` on, what changes from call to call."""

    _fields_: ClassVar = [
        *((name, c_int64) for name in _SIZES),
        *((name, c_double) for name in _NUMBERS),
        *((name, c_int64) for name in (*_ATTENTION, *_HEADS, *_LATENT, *_EXPERTS, *_ROUTING)),
        *((name, c_double) for name in _FACTORS),
        *((name, c_int64) for name in (*_BIASES, *_PIECES, *_SHARED, *_CALL)),
        ("key_strides", c_int64 * 3),
        ("value_strides", c_int64 * 3),
        ("counts", c_void_p),
        ("times", c_int64 * 3),
    ]


class LayersWords(ctypes.Structure):
    """All layers of a step, and what is the same for each of them."""

    _fields_: ClassVar = [
        ("layers", ctypes.POINTER(ctypes.POINTER(LayerWords))),
        *((name, c_int64) for name in ("n_layers", "rows", "n_past", "x", "y", "cosine")),
        *((name, c_int64) for name in ("sine", "table_stride", "norm", "norm_bias")),
        ("eps", c_double),
        ("n_done", c_int64),
    ]


class ForwardWords(ctypes.Structure):
    """A whole step: token ids to logits."""

    _fields_: ClassVar = [
        ("layers", LayersWords),
        *((name, c_int64) for name in ("ids", "positions", "position_stride", "mask", "n_mask", "embedding", "vocab")),
        *((name, c_int64) for name in ("cosines", "sines", "first_position", "n_positions")),
        *((name, c_int64) for name in ("head", "head_bias", "n_logits", "logits", "times", "n_parts")),
    ]


def declare(library: ctypes.CDLL) -> None:
    """Tell the types of the library's functions."""
    pointer, number = ctypes.c_void_p, ctypes.c_int64
    library.scheinfer_mlp.argtypes = [pointer, pointer, number, number, *[ctypes.c_int] * 4, number, pointer]
    library.scheinfer_linear.argtypes = [pointer, *[number] * 3, pointer, *[ctypes.c_int] * 3]
    library.scheinfer_norm.argtypes = [*[pointer] * 3, number, number, ctypes.c_double, *[ctypes.c_int] * 3]
    library.scheinfer_layer_norm.argtypes = [*[pointer] * 4, number, number, ctypes.c_double, *[ctypes.c_int] * 3]
    library.scheinfer_add.argtypes = [*[pointer] * 3, number, number, *[ctypes.c_int] * 3]
    library.scheinfer_turn.argtypes = [*[pointer] * 3, *[number] * 4, *[ctypes.c_int] * 3]
    library.scheinfer_attend.argtypes = [*[pointer] * 5, ctypes.c_double, pointer, *[ctypes.c_int] * 3]
    library.scheinfer_latent.argtypes = [ctypes.POINTER(LayerWords), pointer, ctypes.c_int]
    library.scheinfer_route.argtypes = [ctypes.POINTER(LayerWords), pointer, number, pointer, pointer, ctypes.c_int]
    library.scheinfer_layer.argtypes = [ctypes.POINTER(LayerWords), ctypes.c_int]
    library.scheinfer_layers.argtypes = [ctypes.POINTER(LayersWords), ctypes.c_int]
    library.scheinfer_forward.argtypes = [ctypes.POINTER(ForwardWords), ctypes.c_int]
    library.scheinfer_read.argtypes = [pointer, number, ctypes.c_int]
    library.scheinfer_copy.argtypes = [pointer, number, ctypes.c_double, number]
    library.scheinfer_copy.restype = None
    library.scheinfer_stay_awake.argtypes = [ctypes.c_int]
    library.scheinfer_stay_awake.restype = None
    library.scheinfer_read.restype = ctypes.c_uint64
    library.scheinfer_perform.argtypes = [pointer]
    library.scheinfer_queues_open.argtypes = [pointer, number, number]
    library.scheinfer_queues_open.restype = pointer
    library.scheinfer_queues_run.argtypes = [pointer, pointer, number, ctypes.c_int]
    library.scheinfer_queues_rest.argtypes = [pointer, ctypes.c_int]
    library.scheinfer_queues_close.argtypes = [pointer]
    library.scheinfer_queues_rest.restype = library.scheinfer_queues_close.restype = None
