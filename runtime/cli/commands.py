"""The commands as data: name, one line, where the code is, flags. Nothing heavy is imported here."""

from __future__ import annotations

from dataclasses import dataclass, replace

from runtime.cli import options as o
from runtime.cli import values
from runtime.cli.options import Option, out


@dataclass(frozen=True)
class Command:
    """One command. `run` is "module:function"; the function takes the parsed flags."""

    name: str
    summary: str
    run: str
    options: tuple[Option, ...]

    @property
    def all_options(self) -> tuple[Option, ...]:
        """Its own flags and those of every command."""
        return (*self.options, *o.COMMON)


_WORKLOAD = (o.N_PROMPT, o.N_GEN, o.N_DEPTH, o.BATCH, o.SEED, o.SKEW)
_RUN = (o.DTYPE, o.DEVICE, o.RUN_VRAM_BUDGET, o.RUN_HOST_BUDGET, o.THREADS)
_SAMPLING = (
    Option(("--temp",), "sampling temperature, 0 is greedy", values.number, 0.0, metavar="T"),
    o.SEED,
)

COMMANDS = (
    Command(
        "doctor",
        "what this machine is, and what of it limits the speed",
        "runtime.cli.machine:doctor",
        (),
    ),
    Command(
        "calibrate",
        "measure this machine's hardware profile through the executor",
        "runtime.cli.machine:calibrate",
        (
            replace(o.CHECKPOINT, required=False, help="checkpoint whose shapes are measured", shown="a small Llama's"),
            o.QUICK,
            o.DEVICE,
            o.DTYPE,
            o.THREADS,
            Option(
                ("--repeats",), "measure so often and take the mean: a shared machine changes speed", values.count, 1
            ),
            out("profile file to write", required=True),
        ),
    ),
    Command(
        "hardware",
        "list hardware profiles, or show one with the source of every number",
        "runtime.cli.machine:hardware",
        (
            Option(("name",), "profile to show: a listed name or a file", metavar="NAME"),
            Option(("--gpu",), "or put one together: its GPU, such as rtx4090", metavar="PART"),
            Option(("--cpu",), "and its CPU with memory, such as ryzen7950x", metavar="PART"),
            Option(("--pcie",), "its link, such as 4x16", values.link, shown="the slower side's", metavar="PART"),
            Option(("--dram",), "reading host memory, such as 80GB/s", values.bandwidth, shown="the CPU's figure"),
            Option(("--set",), "what if: other figures, such as dram_read_GBps=160,vram_GiB=16", values.changes),
            out("write the profile here, for --hardware of other commands"),
        ),
    ),
    Command(
        "models",
        "list built-in model shapes, or show bytes and FLOPs of one by part",
        "runtime.cli.machine:models",
        (Option(("name",), "model to show: a listed name, folder or config.json", metavar="NAME"), o.DTYPE),
    ),
    Command(
        "plan",
        "make the best plan, and say why it is",
        "runtime.cli.planning:plan",
        (
            o.MODEL,
            o.HARDWARE,
            o.VRAM_BUDGET,
            o.HOST_BUDGET,
            replace(o.POLICY, default="auto"),
            o.PIN,
            *_WORKLOAD,
            o.CTX_SIZE,
            o.DTYPE,
            Option(("--explain",), "say why: what was compared, memory by part, the hardware's bound", None, False),
            Option(
                ("--export",),
                "write the plan to stdout for another engine instead: flags of llama.cpp, or accelerate's device_map",
                values.one_of("llama.cpp", "accelerate"),
                metavar="ENGINE",
            ),
            out("plan file to write"),
        ),
    ),
    Command(
        "simulate",
        "simulate one generation",
        "runtime.cli.planning:simulate",
        (
            o.MODEL,
            o.HARDWARE,
            replace(o.PLAN, help="plan file to simulate", shown=""),
            replace(o.POLICY, help="or the rule that makes the plan", shown="auto, without --plan"),
            o.PIN,
            o.VRAM_BUDGET,
            o.HOST_BUDGET,
            *_WORKLOAD,
            o.DTYPE,
            o.ROUTING,
            Option(("--no-contention",), "let resources work as fast together as alone", None, False),
            o.TRACE,
        ),
    ),
    Command(
        "sweep",
        "simulate a grid of models, machines, policies, budgets and lengths",
        "runtime.cli.sweeping:sweep",
        (
            replace(
                o.MODEL, help="models, comma list: folders, config.json files, built-in shapes", parse=values.names
            ),
            replace(o.HARDWARE, help="profiles, comma list: names or files", parse=values.names),
            replace(o.POLICIES, default=("all",), shown="all"),
            Option(
                ("--vram-budget",),
                "device memory, comma list with ranges such as 4GiB-24GiB+4GiB",
                values.sizes,
                shown="all that each profile has",
                metavar="SIZES",
            ),
            o.HOST_BUDGET,
            replace(
                o.N_PROMPT, help="prompt tokens, comma list or range", parse=values.counts, default=(512,), shown="512"
            ),
            replace(
                o.N_GEN, help="generated tokens, comma list or range", parse=values.counts, default=(128,), shown="128"
            ),
            o.N_DEPTHS,
            replace(
                o.BATCH, help="sequences at once, comma list or range", parse=values.counts, default=(1,), shown="1"
            ),
            o.SEED,
            o.ONE_SKEW,
            o.DTYPE,
            Option(("--workers",), "processes that simulate", values.count, shown="1", metavar="N"),
            Option(("--dask",), "or the address of a Dask scheduler whose workers simulate", metavar="ADDRESS"),
            out("folder of the rows; a sweep that was interrupted goes on there"),
        ),
    ),
    Command(
        "generate",
        "generate text by plan; text to stdout, timings to stderr",
        "runtime.cli.running:generate",
        (
            o.CHECKPOINT,
            o.PLAN,
            replace(o.POLICY, help="rule that makes the plan, without --plan", default="auto"),
            o.PIN,
            o.OWN_HARDWARE,
            Option(("--prompt",), "the prompt", metavar="TEXT"),
            Option(("--prompt-file",), "file with the prompt", values.path, metavar="FILE"),
            replace(o.N_GEN, help="tokens to generate at most"),
            *_SAMPLING,
            *_RUN,
            o.CTX_SIZE,
            o.TRACE,
            Option(("--routing-out",), "write the routing here, as Parquet", values.path, metavar="FILE"),
        ),
    ),
    Command(
        "chat",
        "talk with a model; !help shows what else can be typed",
        "runtime.cli.talk:chat",
        (
            o.CHECKPOINT,
            o.PLAN,
            replace(o.POLICY, help="rule that makes the plan, without --plan", default="auto"),
            o.PIN,
            o.OWN_HARDWARE,
            replace(o.N_GEN, help="tokens of an answer at most"),
            *_SAMPLING,
            *_RUN,
            replace(o.CTX_SIZE, default=2048, shown="2048, or the model's positions if fewer"),
        ),
    ),
    Command(
        "serve",
        "answer over HTTP by OpenAI's protocol: /v1/chat/completions, /v1/completions, /v1/models",
        "runtime.cli.serving:serve",
        (
            o.CHECKPOINT,
            o.PLAN,
            replace(o.POLICY, help="rule that makes the plan, without --plan", default="auto"),
            o.PIN,
            o.OWN_HARDWARE,
            Option(("--host",), "address to listen on; there is no password", str, "127.0.0.1", metavar="ADDRESS"),
            Option(("--port",), "port to listen on, 0 for any that is free", values.port, 8000, metavar="N"),
            replace(o.N_GEN, help="tokens of an answer that the plan is made for"),
            replace(o.SEED, help="seed of the routing that the plan is made for"),
            *_RUN,
            replace(o.CTX_SIZE, default=2048, shown="2048, or the model's positions if fewer"),
        ),
    ),
    Command(
        "bench",
        "measure plans or policies, with simulated speed and error beside",
        "runtime.cli.benching:bench",
        (
            o.CHECKPOINT,
            replace(o.PLAN, help="plan files to measure, comma list", parse=values.paths, shown="", metavar="FILES"),
            replace(o.POLICIES, help="or rules that make the plans, comma list, or all", shown="auto, without --plan"),
            o.OWN_HARDWARE,
            o.N_PROMPT,
            o.N_GEN,
            o.N_DEPTHS,
            o.REPETITIONS,
            o.SEED,
            *_RUN,
        ),
    ),
    Command(
        "compare",
        "simulated against measured: errors by task, kind, resource and step, and a Gantt chart",
        "runtime.cli.planning:compare",
        (
            Option(("simulated",), "trace that simulate wrote", values.path, metavar="SIMULATED", required=True),
            Option(("measured",), "trace that generate wrote", values.path, metavar="MEASURED", required=True),
            out("folder for the tables (Parquet), the errors (JSON) and the chart (PNG)"),
        ),
    ),
    Command(
        "validate",
        "the whole chain: calibrate, plan, run the best plans and the baselines, compare, report, keep the fastest",
        "runtime.cli.benching:validate",
        (
            replace(o.CHECKPOINTS, required=False, shown="none: give this or --demo"),
            Option(("--demo",), "use two small models, which are written first", None, False),
            o.RUN_VRAM_BUDGET,
            replace(
                o.POLICIES, help="rules whose plans run, comma list, or all", shown="auto, scheinfer and four baselines"
            ),
            replace(o.N_PROMPT, default=128),
            replace(o.N_GEN, default=32),
            replace(o.REPETITIONS, default=3),
            Option(("--top",), "plans predicted fastest that run as well", values.whole, 3, metavar="N"),
            o.DEVICE,
            o.THREADS,
            o.QUICK,
            Option(("--fresh",), "calibrate anew, cached profiles or not", None, False),
            out("folder of the report", required=True),
        ),
    ),
)
