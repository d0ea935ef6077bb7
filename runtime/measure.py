"""Measured runs of a loaded model: fixed prompts, greedy tokens, recorded timelines and routing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from transformers import DynamicCache
from transformers.generation.streamers import BaseStreamer

from hwmodels.errors import PlanError
from hwmodels.load import LoadMeter
from hwmodels.pace import probe_s
from runtime.session import PlannedModel
from sim.timeline import Timeline
from sim.workload import RoutingTrace


@dataclass(frozen=True)
class Measured:
    """One generation.

    tokens are the new ones of the first sequence, peak_vram_bytes is since loading, others_load is the
    share of all cores that other processes took meanwhile (None where the system does not tell); loops_s is
    hwmodels.pace's loop on every core, before and after.
    """

    ttft_s: float
    tpot_s: float
    timeline: Timeline
    routing: RoutingTrace
    tokens: tuple[int, ...]
    peak_vram_bytes: int
    others_load: float | None
    loops_s: tuple[float, ...] = ()

    @property
    def total_s(self) -> float:
        """First token and all that follow."""
        return self.timeline.makespan_s


def measure(
    model: PlannedModel,
    prompt_ids: Sequence[int],
    n_gen: int,
    repetitions: int,
    streamer: BaseStreamer | None = None,
    n_depth: int = 0,
) -> list[Measured]:
    """Generate n_gen greedy tokens `repetitions` times; a short run before the first is not counted.

    The first n_depth ids are in the KV cache when a run begins; the others are its prompt. The first
    repetition feeds the streamer. PlanError if all ids and n_gen pass the plan's context.
    """
    if len(prompt_ids) + n_gen > model.plan.n_ctx:
        raise PlanError(
            f"{len(prompt_ids)} prompt tokens and {n_gen} new ones pass the plan's context of {model.plan.n_ctx}; "
            f"plan with a larger --ctx-size"
        )
    ids = torch.tensor([list(prompt_ids)], device=model.device)
    _generate(model, ids, min(3, n_gen), None, n_depth)
    return [_once(model, ids, n_gen, streamer if i == 0 else None, n_depth) for i in range(repetitions)]


def _once(model: PlannedModel, ids: torch.Tensor, n_gen: int, streamer: BaseStreamer | None, n_depth: int) -> Measured:
    before_s, meter = probe_s(), LoadMeter.start()
    out = _generate(model, ids, n_gen, streamer, n_depth)
    others_load = meter.others()
    timeline, routing, peak_bytes = model.last_timeline, model.last_routing, model.executor.device.peak_bytes()
    assert timeline is not None, "generate has run"
    assert routing is not None, "generate has run"
    tokens = tuple(int(t) for t in out[0, ids.shape[1] :])
    times_s, loops_s = (timeline.ttft_s, timeline.tpot_s), (*before_s, *probe_s())
    return Measured(*times_s, timeline, routing, tokens, peak_bytes, others_load, loops_s)


def _generate(
    model: PlannedModel, ids: torch.Tensor, n_gen: int, streamer: BaseStreamer | None, n_depth: int
) -> torch.Tensor:
    # min_new_tokens keeps the length fixed: a measurement must not end at a chance end-of-text token.
    out: torch.Tensor = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=n_gen,
        min_new_tokens=n_gen,
        do_sample=False,
        streamer=streamer,
        past_key_values=_cache(model, ids[:, :n_depth]) if n_depth else None,
        pad_token_id=model.generation_config.pad_token_id or 0,
    )
    return out


def _cache(model: PlannedModel, ids: torch.Tensor) -> DynamicCache:
    """KV cache that holds some tokens."""
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        for chunk in torch.split(ids, model.plan.step_tokens, dim=1):
            model(chunk, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return cache


def median_run(runs: Sequence[Measured]) -> Measured:
    """The run whose total time is the (lower) median: its timeline stands for all."""
    ordered = sorted(runs, key=lambda run: run.total_s)
    return ordered[(len(ordered) - 1) // 2]
