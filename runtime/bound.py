"""What a model that runs by a plan is bound to: its process, its weights' places and dtype, its own threads.

A Hugging Face model may be copied, moved, cast and saved. A planned one keeps its MLPs cut, outside of its parameters,
with threads that work on them: what would lose those without a word is refused, with what to do instead.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any, NoReturn, Self

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hwmodels.errors import ExecutionError, PlanError


class BoundModel(PreTrainedModel):  # type: ignore[no-untyped-call]
    """Refuses what a planned model cannot do; never instantiated itself."""

    process: int
    """The process that loaded the model."""

    @property
    def is_here(self) -> bool:
        """Whether the process that loaded the model is this one."""
        return self.process == os.getpid()

    def check_here(self) -> None:
        """ExecutionError in a forked process: threads, and locks that they held, stayed with the parent."""
        if not self.is_here:
            raise ExecutionError(
                f"{self.name_or_path} was loaded by process {self.process}, this is {os.getpid()}, a fork without its "
                "threads; load the model after the fork, or start processes by multiprocessing's 'spawn'"
            )

    def __reduce_ex__(self, protocol: object) -> NoReturn:
        """Neither copied nor pickled."""
        raise ExecutionError(
            f"{self.name_or_path} runs by a plan, with threads and memory of its own, and cannot be copied or pickled; "
            "load it once more, by the same plan"
        )

    def save_pretrained(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Not written: parameters are all but the MLPs', whose columns lie where the plan puts them."""
        raise ExecutionError(
            f"{self.name_or_path} runs by a plan: its MLPs are cut and not among its parameters, so it cannot be "
            "saved; copy the checkpoint it was loaded from, or save the one that transformers loads from there"
        )

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Self:
        """What `to`, `half` and the like do to each parameter; PlanError if that moves or casts any."""
        for dtype, device in {(p.dtype, p.device) for p in self.parameters()}:
            with torch.no_grad():
                became = fn(torch.empty(0, dtype=dtype, device=device))
            if (became.dtype, became.device) != (dtype, device):
                raise PlanError(
                    f"{self.name_or_path} runs by a plan that keeps weights on {device} in {dtype}, asked for are "
                    f"{became.device} and {became.dtype}; plan for them and load it once more, with dtype= and device="
                )
        return super()._apply(fn, recurse)  # type: ignore[no-any-return, no-untyped-call]
