"""Exchanges whose sums only the device sees: its kernels compare the ranks' tags, and the next exchange reads the result.

A rank that waited for the device after each exchange would lose more time than the exchange takes. So each exchange of a layer has a word
in pinned memory, which the kernel that uses the sums sets if another rank has added something else. The comparison then fails on every
rank, so every rank raises: at its next exchange, or at a later one if its device has not run the kernel by then. What no exchange has read
when the group ends is a warning then.
"""

from __future__ import annotations

import ctypes
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .agreement import RankMismatchError

CAPACITY = 1024  # words of a page, one for each exchange
_ZEROS = bytes(4 * CAPACITY)

Words = dict[tuple[bool, tuple[Any, ...]], Tensor]  # by whether kernels write it, and the exchange


class Alarms:
    """The words of a group's exchanges."""

    def __init__(self, signature: Callable[..., str]) -> None:
        self._signature = signature  # of an exchange's key, for errors
        self._pages: list[Tensor] = []
        self._words: Words = {}
        self._flags: dict[tuple[Any, ...], Tensor] = {}
        weakref.finalize(self, _warn, self._pages, self._words, signature)

    def word(self, key: tuple[Any, ...], of_kernels: bool = True) -> Tensor:
        """[1] int32 on the CPU, in pinned memory if there is a GPU: 0 until ranks have mixed this exchange with another. An exchange has
        the same word each time, because a captured graph keeps its address."""
        word = self._words.get((of_kernels, key))
        if word is None:
            number = len(self._words)
            if number == len(self._pages) * CAPACITY:
                with torch.inference_mode(False):
                    self._pages.append(torch.zeros(CAPACITY, dtype=torch.int32, device="cpu", pin_memory=torch.cuda.is_available()))
            word = self._words[of_kernels, key] = self._pages[-1][number % CAPACITY :][:1]
        return word

    def compare(self, key: tuple[Any, ...], sums: Tensor, expected: tuple[float, float]) -> None:
        """Does what the kernels do, for the sums [2] of a tag and its square in a payload that no kernel uses. It has a word of its own,
        because the copy would undo what a kernel has written."""
        word = self.word(key, of_kernels=False)
        mixed = (sums[:1] != expected[0]) | (sums[1:] != expected[1])  # with floats: to copy a tensor of them would wait for the device
        flag = self._flags.get(key)
        if flag is None:
            with torch.inference_mode(False):
                flag = self._flags[key] = torch.zeros_like(mixed, dtype=torch.int32)
        flag.copy_(flag | mixed)  # in place, since a captured graph reads it again
        word.copy_(flag, non_blocking=True)

    def check(self) -> None:
        """Raises RankMismatchError if a word is set, and clears the words. Does not wait for the device."""
        if _are_zero(self._pages):
            return
        message = _message(self._words, self._signature)
        for page in self._pages:
            page.zero_()
        for flag in self._flags.values():
            flag.zero_()
        raise RankMismatchError(message)


def _are_zero(pages: list[Tensor]) -> bool:
    return all(ctypes.string_at(page.data_ptr(), len(_ZEROS)) == _ZEROS for page in pages)


def _message(words: Words, signature: Callable[..., str]) -> str:
    """Names the exchanges whose word is set."""
    return (
        "the ranks have exchanged different things: another rank has added something else to"
        + "".join(dict.fromkeys(f"\n  {signature(*key)}" for (_, key), word in words.items() if word.item()))
        + "\nThe sums have been used: go on from a checkpoint. SYNCBN_CHECK=always compares before each exchange, and names each rank's"
    )


def _warn(pages: list[Tensor], words: Words, signature: Callable[..., str]) -> None:
    """Gives a RuntimeWarning if a word is set. Called when the group or the process ends; does not wait for the device."""
    if not _are_zero(pages):
        warnings.warn(_message(words, signature), RuntimeWarning, stacklevel=2)
