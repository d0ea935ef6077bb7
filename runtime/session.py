"""load(): a Hugging Face model whose MLPs run by plan.

The returned object keeps its class's `generate`, caches and streamers; it gains `plan`, `last_timeline`,
`last_routing`, `memory_report()` and `close()`.
"""

from __future__ import annotations

import os
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import PreTrainedModel

from hwmodels.errors import ExecutionError, PlanError
from hwmodels.schema import to_json
from hwmodels.units import format_bytes
from runtime.adapter import Adapter, FfnKind, activation_of
from runtime.bound import BoundModel
from runtime.checkpoint import Checkpoint, read_config
from runtime.devices import Device, open_device
from runtime.devices.base import failure
from runtime.executor import Executor
from runtime.ffn import PartitionedExperts, PartitionedMlp, attach
from runtime.forward import Forward, forward_of
from runtime.latent import use_latents
from runtime.layer import use_layers
from runtime.lean import use_lean_steps
from runtime.memory import WeightStore, allocate, fill_cache, trim_heap
from runtime.projection import use_projections
from runtime.skeleton import build_skeleton, load_rest
from runtime.step import use_steps
from sim.memory import Memory, check_memory, memory
from sim.model import ModelSpec
from sim.plan import Plan, check_plan
from sim.timeline import Timeline
from sim.workload import RoutingTrace


class PlannedModel(BoundModel):  # type: ignore[no-untyped-call]
    """What `load` adds to the model's own class; never instantiated itself."""

    executor: Executor
    whole: Forward | None
    """Small steps in one call, where their form allows it."""
    device_memory: Memory
    last_timeline: Timeline | None
    last_routing: RoutingTrace | None

    @property
    def plan(self) -> Plan:
        """The plan that the model runs by."""
        return self.executor.plan

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """One forward pass. No gradients: weights are cut, and parts of a layer run in other threads.

        Raises ExecutionError if a task fails or device memory runs out; the model stays usable.
        """
        self.check_here()
        try:
            with self.executor.device.driving():
                found = self._whole_step(args, kwargs)
                if found is not None:
                    return found
                with torch.no_grad():
                    return super().__call__(*args, **kwargs)
        except RuntimeError as error:
            named = self._named(error)
            if named is error:
                raise
            raise named from error.__cause__ or error

    def _whole_step(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A small step in one call; None, and nothing done, where the model's own forward must do it."""
        if self.whole is None or not self.__dict__.keys().isdisjoint(("forward", "_compiled_call_impl")):
            return None
        return self.whole.step(args, kwargs)

    def _named(self, error: RuntimeError) -> BaseException:
        """The error with the task that was at work, and with what to do about it."""
        task, cause = self.executor.open_task, error.__cause__ or error
        named = failure(task, error) if task is not None else error
        if not isinstance(cause, torch.OutOfMemoryError):
            return named
        return ExecutionError(
            f"{named}; device memory ran out: the plan allows {format_bytes(self.plan.vram_budget_bytes)}; "
            "raise --vram-budget, or plan for a smaller --ctx-size or --batch"
        )

    def generate(self, *args: Any, **kwargs: Any) -> Any:
        """As transformers' generate; records the run into last_timeline and last_routing.

        A prompt is fed in the plan's chunks. Threads take turns.
        Raises ExecutionError, naming the task, if one fails; the model stays usable.
        """
        self.check_here()
        kwargs.setdefault("disable_compile", True)  # the executor cannot be traced
        executor = self.executor
        if executor.plan.chunk_tokens is not None and self._uses_cache(args, kwargs):
            kwargs.setdefault("prefill_chunk_size", executor.plan.chunk_tokens)
        with executor.device.driving():
            executor.begin_run()
            try:
                return super().generate(*args, **kwargs)  # type: ignore[misc]
            finally:
                self.last_timeline, self.last_routing = executor.end_run(run_info(executor))

    def _uses_cache(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """Whether a call of generate does: a prompt is not fed in chunks without one."""
        given = args[1] if len(args) > 1 else kwargs.get("generation_config")
        config = given or self.generation_config
        return kwargs.get("use_cache", config.use_cache) is not False

    def _prefill(self, *args: Any, **kwargs: Any) -> Any:
        """Transformers' own, which cuts the prompt: its steps are the prompt's, whatever their number."""
        self.executor.feed_prompt(True)
        try:
            return super()._prefill(*args, **kwargs)  # type: ignore[misc]
        finally:
            self.executor.feed_prompt(False)

    def memory_report(self) -> dict[str, object]:
        """Planned bytes by part, and the most device memory that was held."""
        return {**to_json(self.device_memory), "peak_vram_bytes": self.executor.device.peak_bytes()}

    def close(self) -> None:
        """End threads, drop weights, give device memory back; safe to call twice, and without effect in a fork."""
        self.executor.stop()
        if not self.is_here:
            return
        with self.executor.device.driving():
            for module in self.modules():
                if isinstance(module, (PartitionedMlp, PartitionedExperts)):
                    module.executor = None
            for parameter in self.parameters():
                parameter.data = torch.empty(0)
            self.executor.close()
        trim_heap()


def run_info(executor: Executor) -> dict[str, object]:
    """What identifies a measured run."""
    plan = executor.plan
    return {
        "model": executor.spec.name,
        "policy": plan.policy,
        "plan_id": plan.id,
        "profile_id": plan.profile_id,
        "device": executor.device.kind,
        "dtype": executor.spec.dtype,
        **executor.cache_info(),
    }


def load_planned(
    path: str | Path,
    plan: Plan,
    dtype: str = "auto",
    device: str = "auto",
    cpu_threads: int | None = None,
    host_bytes: int | None = None,
    progress: bool = False,
) -> PlannedModel:
    """Load a checkpoint folder by a plan, on at most cpu_threads CPU threads and at most the plan's.

    Everything that can be known beforehand is checked before a weight is read: the plan against the
    model, its memory against the budget, the checkpoint's headers. Raises PlanError, ModelError or
    CheckpointError; nothing stays allocated then.
    """
    folder = Path(path)
    config = read_config(folder)
    adapter = Adapter.of(config, folder.name)
    spec = Adapter.of({**config, "dtype": plan.dtype if dtype == "auto" else dtype}, folder.name).spec
    check_plan(plan, spec)
    check_memory(spec, plan, host_bytes)
    with Checkpoint.open(folder) as checkpoint:
        opened = open_device(device, plan.vram_budget_bytes, _fewest(cpu_threads, plan.cpu_threads))
        what = f"load {spec.name}"
        bar = tqdm(total=spec.weight_bytes, unit="B", unit_scale=True, desc=what, disable=not progress, leave=False)

        def fill(model: PreTrainedModel, store: WeightStore) -> None:
            load_rest(model, checkpoint, adapter, placement(plan, opened), getattr(torch, spec.dtype), bar.update)
            _load_ffns(store, checkpoint, adapter, spec, bar.update)

        with bar:
            return assemble(folder, spec, plan, opened, fill)


def _fewest(*n_threads: int | None) -> int | None:
    return min((n for n in n_threads if n is not None), default=None)


Fill = Callable[[PreTrainedModel, WeightStore], None]
"""Gives values to a skeleton's parameters and to the MLP weights."""


def assemble(folder: Path, spec: ModelSpec, plan: Plan, device: Device, fill: Fill) -> PlannedModel:
    """A model of a folder's config whose MLPs the device runs by plan; closes the device on failure."""
    try:
        need = memory(spec, plan)
        model = build_skeleton(folder, getattr(torch, spec.dtype), _make_ffn(spec))
        device.arena.take(need.ends + need.rest, "embedding, attention, norms and head")
        device.arena.take(need.kv + need.activations, "KV cache and activations")
        store = allocate(spec, plan, device)
        fill(model, store)
        fill_cache(spec, plan, store)
        _audit(need, store)
        planned = _adopt(model)
        planned.process = os.getpid()
        planned.executor = Executor(spec, plan, device, store, activation_of(model.config.to_dict()))
        planned.device_memory = need
        planned.last_timeline, planned.last_routing = None, None
        # Training with gradient checkpointing leaves "use_cache": false in configs; a plan is of steps over a cache.
        # Who asks for none, in a call or in generation_config, gets none.
        planned.generation_config.use_cache = True
        use_projections(model)
        use_latents(model, getattr(torch, spec.dtype))
        planned.executor.knows_attention = use_steps(model)
        attach(planned, planned.executor)
        use_layers(model, planned.executor)
        use_lean_steps(model, planned.executor)
        planned.whole = forward_of(planned, planned.executor)
        weakref.finalize(planned, device.close)  # threads do not outlive a model that nobody closed
        return planned
    except BaseException:
        device.close()
        raise


def _make_ffn(spec: ModelSpec) -> Callable[[int, FfnKind, nn.Module], nn.Module]:
    def make(layer: int, kind: FfnKind, original: nn.Module) -> nn.Module:
        if kind == "dense":
            return PartitionedMlp(layer)
        down_proj_bias = original._parameters.get("down_proj_bias")
        return PartitionedExperts(layer, spec.layers[layer].ffn.n_experts, down_proj_bias)

    return make


def placement(plan: Plan, device: Device) -> Callable[[str], torch.device]:
    """Where each parameter that is not an MLP's goes."""
    cpu = torch.device("cpu")

    def place(name: str) -> torch.device:
        in_layer = name.startswith("model.layers.")
        here = plan.layers[int(name.split(".")[2])].rest if in_layer else plan.ends
        return device.torch_device if here == "GPU" else cpu

    return place


def _load_ffns(
    store: WeightStore, checkpoint: Checkpoint, adapter: Adapter, spec: ModelSpec, progress: Callable[[int], object]
) -> None:
    for i, layer in enumerate(store.layers):
        expert_bytes = spec.layers[i].ffn.columns * spec.column_bytes(i)
        for e, expert in enumerate(layer.experts):
            expert.fill(*adapter.read_ffn(checkpoint, i, e), after_each=checkpoint.release)
            progress(expert_bytes)


def _audit(need: Memory, store: WeightStore) -> None:
    """Placed bytes against planned bytes: a difference is our own error and must not pass in silence."""
    if store.device_bytes != need.gg:
        raise PlanError(
            f"memory audit: {format_bytes(store.device_bytes)} of columns were placed on the device, the plan says "
            f"{format_bytes(need.gg)}; report this plan"
        )


def _adopt(model: PreTrainedModel) -> PlannedModel:
    # The model's own class, with PlannedModel's methods in front: isinstance and class name stay true.
    cls = type(model)
    model.__class__ = type(cls.__name__, (PlannedModel, cls), {"__module__": cls.__module__})
    assert isinstance(model, PlannedModel)
    return model
