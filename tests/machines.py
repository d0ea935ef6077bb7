"""Made-up machines with round numbers and models to run on them, for tests about policies, search and bounds."""

from __future__ import annotations

from typing import Any

from hwmodels.profile import Contention, HardwareProfile, Peak, Resource
from sim.model import ModelSpec, from_config
from sim.policies.problem import Problem
from sim.space import fixed_bytes
from sim.workload import Workload

GB = 10**9


def machine(
    cpu_gb_s: float = 10,
    gpu_gb_s: float = 100,
    link_gb_s: float = 5,
    cpu_gflops: float = 100,
    gpu_gflops: float = 10_000,
    fixed_s: float = 0.0,
    handoff_s: float = 0.0,
    gpu: bool = True,
    together: tuple[float, float] | None = None,
    computing: tuple[float, float] | None = None,
) -> HardwareProfile:
    """A machine of peaks only. together, computing: rates of CPU and H2D while both are busy, the CPU computing."""

    def peak(gflops: float, gb_s: float) -> Peak:
        return Peak({"float32": gflops * 1e9, "bfloat16": gflops * 1e9}, gb_s * 1e9, 1.0, fixed_s, "estimated")

    peaks = {"CPU": peak(cpu_gflops, cpu_gb_s)}
    if gpu:
        peaks |= {"GPU": peak(gpu_gflops, gpu_gb_s), "H2D": peak(1, link_gb_s), "D2H": peak(1, link_gb_s)}
    handoffs = dict.fromkeys(("CPU>H2D", "H2D>GPU", "GPU>D2H", "D2H>CPU", "GPU>H2D"), handoff_s) if gpu else {}

    def contended(rates: tuple[float, float], *kind: Resource) -> Contention:
        both: tuple[Resource, ...] = ("CPU", "H2D")
        return Contention(both, dict(zip(both, rates, strict=True)), "estimated", computing=kind)

    table = [contended(together)] if together else []
    table += [contended(computing, "CPU")] if computing else []
    return HardwareProfile(
        name="made-up",
        device="cuda" if gpu else "none",
        created="2026-01-01",
        fingerprint={},
        vram_bytes=100 * GB if gpu else 0,
        host_bytes=100 * GB,
        cpu_threads=4,
        peaks=peaks,
        handoff_s=handoffs,
        contention=tuple(table),
    )


def budget(spec: ModelSpec, workload: Workload, share: float) -> int:
    """Device memory for everything but MLPs, and a share of these."""
    fixed = fixed_bytes(Problem(spec, machine(), 0, workload), 0, "GPU")
    return fixed + int(share * sum(spec.ffn_bytes(i) for i in range(spec.n_layers)))


def dense(n_layers: int = 4, d_model: int = 64, columns: int = 256, **changes: Any) -> ModelSpec:
    """A Llama of a few layers: four heads of 16, tiny vocabulary."""
    config = {
        "model_type": "llama",
        "hidden_size": d_model,
        "intermediate_size": columns,
        "num_hidden_layers": n_layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "vocab_size": 128,
        "max_position_embeddings": 4096,
    }
    return from_config({**config, **changes}, "dense", "bfloat16")


def moe(n_layers: int = 3, d_model: int = 64, columns: int = 128, n_experts: int = 4, top_k: int = 2) -> ModelSpec:
    """A Mixtral of a few layers."""
    return from_config(
        {
            "model_type": "mixtral",
            "hidden_size": d_model,
            "intermediate_size": columns,
            "num_hidden_layers": n_layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "num_local_experts": n_experts,
            "num_experts_per_tok": top_k,
            "vocab_size": 128,
            "max_position_embeddings": 4096,
        },
        "moe",
        "bfloat16",
    )


def mixtral_8x7b() -> ModelSpec:
    return from_config(
        {
            "model_type": "mixtral",
            "hidden_size": 4096,
            "intermediate_size": 14336,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "vocab_size": 32000,
            "max_position_embeddings": 32768,
        },
        "mixtral-8x7b",
        "bfloat16",
    )


def qwen3_30b() -> ModelSpec:
    return from_config(
        {
            "model_type": "qwen3_moe",
            "hidden_size": 2048,
            "intermediate_size": 6144,
            "moe_intermediate_size": 768,
            "num_hidden_layers": 48,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "head_dim": 128,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "vocab_size": 151936,
            "max_position_embeddings": 32768,
        },
        "qwen3-30b-a3b",
        "bfloat16",
    )


def llama_70b() -> ModelSpec:
    return from_config(
        {
            "model_type": "llama",
            "hidden_size": 8192,
            "intermediate_size": 28672,
            "num_hidden_layers": 80,
            "num_attention_heads": 64,
            "num_key_value_heads": 8,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        },
        "llama-2-70b",
        "bfloat16",
    )
