"""sweep: a grid of simulations, resumable, on this machine's cores or on a Dask cluster. No torch in here."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Iterator
from concurrent.futures import Executor
from contextlib import contextmanager

from hwmodels.catalog import hardware
from hwmodels.errors import ExecutionError, FormatError
from hwmodels.profile import HardwareProfile
from runtime.cli.console import emit, note
from runtime.cli.files import check_folder
from runtime.cli.result_columns import SWEPT_COLUMNS
from runtime.resolve import resolve_model
from sim.sweep import Swept, grid, workloads
from sim.sweep import sweep as run_sweep


def sweep(flags: Namespace) -> None:
    """Simulate every combination of models, machines, policies, budgets and lengths."""
    check_folder(flags.out)
    if flags.workers is not None and flags.dask is not None:
        raise FormatError("--workers and --dask are both given (an environment variable counts, too); expected one")
    points = grid(
        [resolve_model(name, flags.dtype) for name in flags.model],
        [_profile(name, flags.host_budget) for name in flags.hardware],
        flags.policy,
        flags.vram_budget,
        workloads(flags.n_prompt, flags.n_gen, flags.n_depth, flags.batch, flags.seed, flags.skew),
    )
    note(flags, f"{len(points)} simulations")
    try:
        with _executor(flags.dask) as executor:
            swept = run_sweep(points, flags.out, executor, flags.workers or 1, progress=not flags.quiet)
    except KeyboardInterrupt:
        note(flags, f"stopped; the same command goes on from {flags.out}" if flags.out is not None else "stopped")
        raise
    if flags.out is not None:
        note(flags, f"wrote {flags.out}: {_found_words(swept)}")
    emit(flags, swept.rows, SWEPT_COLUMNS)
    if swept.failures:
        first = swept.failures[0]["failed"]
        raise ExecutionError(f"{len(swept.failures)} of {len(points)} simulations failed, the first with {first}")


def _profile(name: str, host_bytes: int | None) -> HardwareProfile:
    profile = hardware(name)
    return profile.with_(host_bytes=host_bytes) if host_bytes is not None else profile


def _found_words(swept: Swept) -> str:
    words = f"{len(swept.rows)} rows, {swept.n_found} of them from an earlier sweep"
    return words + (f", {swept.n_damaged} damaged shards made anew" if swept.n_damaged else "")


@contextmanager
def _executor(address: str | None) -> Iterator[Executor | None]:
    """Workers of a Dask cluster; None where no address is given."""
    if address is None:
        yield None
        return
    try:
        from distributed import Client
    except ImportError as error:
        raise FormatError("--dask needs the package distributed: pip install 'scheinfer[dask]'") from error
    try:
        client = Client(address, timeout="10s")  # type: ignore[no-untyped-call]
    except (OSError, ValueError) as error:
        raise FormatError(f"no Dask scheduler answers at {address!r}: {error}") from error
    with client:
        yield client.get_executor()  # type: ignore[no-untyped-call]
