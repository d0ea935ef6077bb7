"""Flags as data: every one has a unit and a default in its help, and an environment variable of its name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from runtime.cli import values
from sim.pins import parse_pins

FORMATS = ("md", "csv", "json", "jsonl")


@dataclass(frozen=True)
class Option:
    """One flag, or an argument by position if its only name has no dash.

    parse     reads the text; None makes a switch
    default   what holds without the flag
    shown     the default in words, where the value alone does not say it
    """

    names: tuple[str, ...]
    help: str
    parse: Callable[[str], object] | None = str
    default: Any = None
    shown: str = ""
    metavar: str = ""
    required: bool = False

    @property
    def positional(self) -> bool:
        """Whether it is given by position."""
        return not self.names[0].startswith("-")

    @property
    def variable(self) -> str:
        """The environment variable that sets it."""
        return "SCHEINFER_" + self.names[-1].lstrip("-").replace("-", "_").upper()

    @property
    def full_help(self) -> str:
        """Help with the default in brackets."""
        if self.required:
            return f"{self.help} (required)"
        shown = self.shown or ("off" if self.parse is None else "" if self.default is None else str(self.default))
        return f"{self.help} (default: {shown})" if shown else self.help


MODEL = Option(
    ("-m", "--model"),
    "checkpoint folder, config.json, built-in model shape or hub id in the local cache",
    metavar="MODEL",
    required=True,
)
CHECKPOINT = replace(MODEL, help="checkpoint folder, or hub id in the local cache")
CHECKPOINTS = replace(CHECKPOINT, help="checkpoint folders or cached hub ids, comma list", parse=values.names)
HARDWARE = Option(
    ("--hardware",), "profile of the machine: a name that `scheinfer hardware` lists, or a file", required=True
)
OWN_HARDWARE = replace(
    HARDWARE,
    help="profile to plan by: a name or a file",
    required=False,
    shown="this machine's, from the cache or measured quickly",
)
DTYPE = Option(("--dtype",), "auto, bfloat16, float16 or float32", values.dtype, "auto", "auto: as the model says")
DEVICE = Option(("--device",), "auto, cuda:0 or emulated", values.device, "auto", "auto: CUDA if there is one")
VRAM_BUDGET = Option(
    ("--vram-budget",),
    "device memory that the plan may use, such as 8GiB or 8000MiB",
    values.size,
    shown="all that the profile has",
    metavar="SIZE",
)
RUN_VRAM_BUDGET = replace(
    VRAM_BUDGET, shown="90 % of what is free on CUDA; emulated: half of the MLP weights beside what is fixed"
)
HOST_BUDGET = Option(
    ("--host-budget",),
    "host memory that the plan may use, such as 64GiB",
    values.size,
    shown="all that the profile has",
    metavar="SIZE",
)
RUN_HOST_BUDGET = replace(HOST_BUDGET, shown="no limit but the machine's")
THREADS = Option(
    ("-t", "--threads"), "CPU threads that compute host columns", values.count, shown="by the device", metavar="N"
)
CTX_SIZE = Option(
    ("-c", "--ctx-size"),
    "tokens per sequence that the KV cache must hold",
    values.count,
    shown="depth + prompt + generated",
    metavar="N",
)
N_PROMPT = Option(("-p", "--n-prompt"), "prompt tokens", values.count, 512, metavar="N")
N_GEN = Option(("-n", "--n-gen"), "generated tokens", values.count, 128, metavar="N")
N_DEPTH = Option(("-d", "--n-depth"), "tokens in the KV cache before the prompt", values.whole, 0, metavar="N")
N_DEPTHS = replace(
    N_DEPTH,
    help="tokens in the KV cache before the prompt, comma list or range",
    parse=values.wholes,
    default=(0,),
    shown="0",
)
BATCH = Option(("-b", "--batch"), "sequences at once", values.count, 1, metavar="N")
REPETITIONS = Option(("-r", "--repetitions"), "measured runs of each row", values.count, 5, metavar="N")
SEED = Option(("--seed",), "seed of sampling", values.whole, 0, metavar="N")
SKEW = Option(
    ("--skew",),
    "Zipf exponent of expert popularity that routing is sampled with, 0 is uniform; a comma list: layers take turns",
    values.numbers,
    0.0,
)
ONE_SKEW = replace(
    SKEW, help="Zipf exponent of expert popularity that routing is sampled with, 0 is uniform", parse=values.number
)
POLICY = Option(("--policy",), "rule that makes the plan: auto, or a name below", metavar="NAME")
POLICIES = Option(
    ("--policy",), "rules that make the plans, comma list, or all", values.names, shown="auto", metavar="NAMES"
)
PIN = Option(
    ("--pin",),
    "units that a plan by auto or scheinfer must keep on the device (gpu), compute on the CPU (cpu) or send in every "
    "step (stream): comma list of REGEX=gpu|cpu|stream; REGEX matches a whole name such as layers.7.mlp, "
    "layers.7.experts.3 or layers.7.attention",
    parse_pins,
    (),
    "none",
    metavar="PINS",
)
PLAN = Option(("--plan",), "plan file that `scheinfer plan` wrote, or auto", shown="auto: plan now", metavar="FILE")
TRACE = Option(("--trace",), "write the timeline here, as Chrome trace JSON for Perfetto", values.path, metavar="FILE")
ROUTING = Option(("--routing",), "routing trace (Parquet) to replay", values.path, metavar="FILE")
QUICK = Option(("--quick",), "fewer points and repetitions: under a minute", None, False)

OUTPUT = Option(
    ("-o", "--output"),
    f"format of the table on stdout: {', '.join(FORMATS)}",
    values.one_of(*FORMATS),
    "md",
    metavar="FORMAT",
)
QUIET = Option(("-q", "--quiet"), "no progress and no notes on stderr", None, False)
VERBOSE = Option(("-v", "--verbose"), "warnings of the libraries on stderr", None, False)
DEBUG = Option(("--debug",), "show the traceback of an error", None, False)
COMMON = (OUTPUT, QUIET, VERBOSE, DEBUG)


def out(help_text: str, required: bool = False) -> Option:
    """The --out flag of a command."""
    return Option(("--out",), help_text, values.path, metavar="PATH", required=required)
