"""generate and chat: run a model by plan, show its text as it comes."""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase, TextStreamer
from transformers.generation.streamers import BaseStreamer

from hwmodels.errors import FormatError, PlanError
from hwmodels.units import format_bytes, format_number, format_seconds
from runtime.autoplan import Request, choose_plan
from runtime.cli.console import emit, note, refuse_pins
from runtime.cli.files import check_file, write_whole
from runtime.prefix import PrefixCache
from runtime.resolve import check_checkpoint, resolve_folder, resolve_model
from runtime.session import PlannedModel, load_planned
from runtime.tokens import IdStreamer, decode, load_tokenizer, prompt_ids
from sim.model import ModelSpec
from sim.plan import Plan, check_plan, load_plan
from sim.rows import Speeds, measured_row
from sim.workload import Workload, check_context

DEFAULT_PROMPT = "Once upon a time"


@dataclass(frozen=True)
class Source:
    """A checkpoint as the run commands use it."""

    folder: Path
    spec: ModelSpec
    tokenizer: PreTrainedTokenizerBase | None


def open_source(flags: Namespace) -> Source:
    """Folder, sizes and tokenizer of --model; reads no weights."""
    folder = resolve_folder(flags.model)
    check_checkpoint(folder)
    return Source(folder, resolve_model(folder, flags.dtype), load_tokenizer(folder))


def load(flags: Namespace, source: Source, workload: Workload) -> PlannedModel:
    """The model, loaded by --plan or by a plan made now for the workload."""
    plan = _plan(flags, source, workload)
    return load_planned(
        source.folder, plan, flags.dtype, flags.device, flags.threads, flags.host_budget, progress=not flags.quiet
    )


def _plan(flags: Namespace, source: Source, workload: Workload) -> Plan:
    if flags.plan not in (None, "auto"):
        refuse_pins(flags)
        return _given_plan(flags, source.spec, workload)
    request = Request(
        source.folder,
        source.spec,
        workload,
        flags.policy,
        flags.device,
        flags.vram_budget,
        flags.host_budget,
        flags.hardware,
        flags.threads,
        flags.pin,
    )
    return choose_plan(request, progress=not flags.quiet, tell=lambda text: note(flags, text)).plan


def _given_plan(flags: Namespace, spec: ModelSpec, workload: Workload) -> Plan:
    plan = load_plan(flags.plan)
    if flags.dtype == "auto" and plan.dtype != spec.dtype:
        spec = resolve_model(resolve_folder(flags.model), plan.dtype)
    check_plan(plan, spec)
    if workload.n_ctx > plan.n_ctx:
        raise PlanError(
            f"the run needs a context of {workload.n_ctx} tokens, the plan has room for {plan.n_ctx}; "
            f"plan again with --ctx-size {workload.n_ctx}, or shorten the prompt or --n-gen"
        )
    if flags.vram_budget is not None and plan.vram_budget_bytes > flags.vram_budget:
        raise PlanError(
            f"the plan is for {format_bytes(plan.vram_budget_bytes)} of device memory, --vram-budget allows "
            f"{format_bytes(flags.vram_budget)}; plan again"
        )
    return plan


# -- generate -----------------------------------------------------------------------------------------


def generate(flags: Namespace) -> None:
    """Generate from a prompt; the text streams to stdout, timings follow on stderr."""
    check_file(flags.trace)
    check_file(flags.routing_out)
    source = open_source(flags)
    ids = prompt_ids(_prompt(flags, source), source.tokenizer, source.spec)
    workload = _workload(flags, len(ids), source.spec)
    model = load(flags, source, workload)
    try:
        streamer = _streamer(source.tokenizer) if flags.output == "md" else None
        new_ids = complete(PrefixCache(model), ids, flags, streamer)
        _save_traces(flags, model)
        _report(flags, source, model, Workload(len(ids), len(new_ids)), new_ids)
    finally:
        model.close()


def _workload(flags: Namespace, n_prompt: int, spec: ModelSpec) -> Workload:
    """What will run, with the rest of --ctx-size as depth so that the KV cache gets room for it."""
    needed = n_prompt + flags.n_gen
    n_ctx = flags.ctx_size or needed
    if n_ctx < needed:
        raise FormatError(
            f"the prompt has {n_prompt} tokens and --n-gen is {flags.n_gen}: --ctx-size {n_ctx} is too small; "
            f"expected at least {needed}"
        )
    workload = Workload(n_prompt, flags.n_gen, n_depth=n_ctx - needed, seed=flags.seed)
    check_context(spec, workload)
    return workload


def _prompt(flags: Namespace, source: Source) -> str:
    if flags.prompt is not None and flags.prompt_file is not None:
        raise FormatError("--prompt and --prompt-file are both given; expected one of them")
    if flags.prompt is not None:
        return str(flags.prompt)
    if flags.prompt_file is None:
        return DEFAULT_PROMPT if source.tokenizer is not None else ""
    try:
        return Path(flags.prompt_file).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not a text file"
        raise FormatError(f"cannot read --prompt-file {str(flags.prompt_file)!r}: {reason}") from error


def _streamer(tokenizer: PreTrainedTokenizerBase | None) -> BaseStreamer:
    if tokenizer is None:
        return IdStreamer(sys.stdout)
    return TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)


def complete(prefix: PrefixCache, ids: Sequence[int], flags: Namespace, streamer: BaseStreamer | None) -> list[int]:
    """New token ids after a prompt, at the temperature and seed of the flags."""
    torch.manual_seed(flags.seed)
    sampling = {"do_sample": True, "temperature": flags.temp} if flags.temp > 0 else {"do_sample": False}
    return prefix.generate(ids, max_new_tokens=flags.n_gen, streamer=streamer, **sampling)


def _save_traces(flags: Namespace, model: PlannedModel) -> None:
    timeline, routing = model.last_timeline, model.last_routing
    assert timeline is not None, "generate has run"
    assert routing is not None, "generate has run"
    if flags.trace is not None:
        timeline.save_chrome_trace(flags.trace)
        note(flags, f"wrote {flags.trace}; open it in ui.perfetto.dev, or compare it with a simulated one")
    if flags.routing_out is not None:
        write_whole(flags.routing_out, routing.save)
        note(flags, f"wrote {flags.routing_out}")


def _report(flags: Namespace, source: Source, model: PlannedModel, workload: Workload, new_ids: list[int]) -> None:
    timeline = model.last_timeline
    assert timeline is not None, "generate has run"
    note(flags, timings(model, workload))
    if flags.output != "md":
        device = model.executor.device.kind
        row = measured_row(source.spec, model.plan, workload, [timeline], timeline, device)
        emit(flags, [{**row, "text": decode(new_ids, source.tokenizer)}], [])


def timings(model: PlannedModel, workload: Workload) -> str:
    """One line of speed for people, of the model's last run."""
    timeline, device = model.last_timeline, model.executor.device
    assert timeline is not None, "generate has run"
    speeds = Speeds.of(timeline, workload)
    text = (
        f"prompt: {workload.n_prompt} tokens in {format_seconds(speeds.ttft_s)} "
        f"({format_number(speeds.prefill_tok_s)} tok/s)"
    )
    if speeds.decode_tok_s > 0:
        text += (
            f"; generated: {workload.n_gen} at {format_seconds(speeds.tpot_s)} each "
            f"({format_number(speeds.decode_tok_s)} tok/s)"
        )
    return f"{text}; {model.plan.policy} on the {device.kind} device, {format_bytes(device.peak_bytes())} of its memory"
