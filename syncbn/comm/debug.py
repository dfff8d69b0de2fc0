"""What SYNCBN_DEBUG=1 needs: a log, and a clock that waits for the device."""

from __future__ import annotations

import functools
import logging
import time

import torch
from torch import Tensor


@functools.cache
def log() -> logging.Logger:
    """The package's log: visible even if the application has not configured logging."""
    log = logging.getLogger("syncbn")
    log.setLevel(logging.INFO)
    if not logging.getLogger().handlers:
        log.addHandler(logging.StreamHandler())
    return log


def now(tensor: Tensor) -> float:
    """Seconds, once `tensor` has been computed. While a graph is captured it cannot wait for that."""
    if tensor.is_cuda and not torch.cuda.is_current_stream_capturing():
        torch.cuda.synchronize(tensor.device)
    return time.perf_counter()
