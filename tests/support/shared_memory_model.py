"""The protocol of csrc/cpu/shared_memory.h as a state machine, and a search through every interleaving of its ranks.

A rank's program is a list of instructions, each of which reads or writes one word that other ranks see: values are published and added word
by word. Memory is sequentially consistent; the weaker orders of processors and compilers are what ThreadSanitizer checks on the C++.

    put address word      write
    wait rank epoch       continue once that rank has published the epoch
    compare address word  this rank does not agree if another word is there
    add address i         to the i-th sum
    store address i       the i-th sum
    load address i        into the i-th sum
    finish number         note the sums, or a mismatch
"""

from __future__ import annotations

from typing import Any, NamedTuple

WORDS = 2  # of values in a slot
Tags = list[list[str]]  # [exchange][rank]: what the rank is about to exchange


class Protocol(NamedTuple):
    """The protocol, or a mutant of it."""

    by_segments: bool = False
    slots: int = 2
    values_first: bool = True  # before the epoch
    compares: bool = True
    waits_for_results: bool = True  # by segments
    waits_for: str = "all"  # or "next", the next rank only


class Local(NamedTuple):
    """The state of a rank."""

    step: int = 0
    agrees: bool = True
    sums: tuple[int, ...] = (0,) * WORDS
    results: tuple[Any, ...] = ()


def value(rank: int, exchange: int, word: int) -> int:
    """Sums of these differ unless all of their parts are right."""
    return 1 << (16 * exchange + 4 * word + rank)


def program(rank: int, ranks: int, tags: Tags, protocol: Protocol) -> list[tuple]:
    code: list[tuple] = []
    epoch = 0
    awaited = range(ranks) if protocol.waits_for == "all" else [(rank + 1) % ranks]
    others = [other for other in range(ranks) if other != rank]

    def publish(writes: list[tuple]) -> None:
        stored = [("put", ("epoch", rank), epoch)]
        code.extend([*writes, *stored] if protocol.values_first else [*stored, *writes])
        code.extend(("wait", other, epoch) for other in awaited if other != rank)

    for exchange, tag in enumerate(tags):
        epoch += 1
        slot = epoch % protocol.slots
        values = [("put", ("value", rank, slot, word), value(rank, exchange, word)) for word in range(WORDS)]
        publish([("put", ("tag", rank, slot), tag[rank]), *values])
        if protocol.compares:
            code += [("compare", ("tag", other, slot), tag[rank]) for other in others]
        segment = [word for word in range(WORDS) if not protocol.by_segments or word % ranks == rank]
        code += [("add", ("value", other, slot, word), word) for other in range(ranks) for word in segment]
        if protocol.by_segments and len(set(tag)) == 1:  # ranks that differ end the exchange here
            epoch += 1
            before = code[:]
            publish([("store", ("result", word), word) for word in segment])
            if not protocol.waits_for_results:
                code[:] = [*before, *(c for c in code[len(before) :] if c[0] != "wait")]
            code += [("load", ("result", word), word) for word in range(WORDS)]
        code.append(("finish", exchange))
    return code


def step(code: list[tuple], local: Local, memory: dict) -> tuple[Local, dict] | None:
    """The rank after its next instruction, and the memory; None if it has to wait."""
    verb, address, *argument = code[local.step]
    after = local._replace(step=local.step + 1)
    if verb == "finish":
        return Local(after.step, results=(*local.results, local.sums if local.agrees else None)), memory
    if verb == "wait":
        return (after, memory) if memory.get(("epoch", address), 0) >= argument[0] else None
    if verb == "put":
        return after, {**memory, address: argument[0]}
    if not local.agrees:  # it continues to the end of the exchange
        skips = verb in ("compare", "add", "store", "load")
        assert skips
        return after, memory
    if verb == "compare":
        return after._replace(agrees=memory.get(address) == argument[0]), memory
    word = argument[0]
    if verb == "store":
        return after, {**memory, address: local.sums[word]}
    new = memory.get(address, 0) + (local.sums[word] if verb == "add" else 0)
    return after._replace(sums=(*local.sums[:word], new, *local.sums[word + 1 :])), memory


def explore(ranks: int, tags: Tags, protocol: Protocol) -> tuple[int, str]:
    """(number of states, what is wrong in one of them, or nothing)."""
    codes = [program(rank, ranks, tags, protocol) for rank in range(ranks)]
    right = tuple(
        tuple(sum(value(r, e, w) for r in range(ranks)) for w in range(WORDS)) if len(set(tag)) == 1 else None for e, tag in enumerate(tags)
    )
    start = (tuple(Local() for _ in range(ranks)), ())
    seen, stack = {start}, [start]
    while stack:
        locals_, items = stack.pop()
        memory, waiting = dict(items), 0
        for rank in range(ranks):
            if locals_[rank].step == len(codes[rank]):
                continue
            taken = step(codes[rank], locals_[rank], memory)
            if taken is None:
                waiting += 1
                continue
            local, changed = taken
            if local.results != right[: len(local.results)]:
                return len(seen), f"rank {rank} has {local.results} instead of {right}"
            items_after = items if changed is memory else tuple(sorted(changed.items(), key=lambda item: str(item[0])))
            state = ((*locals_[:rank], local, *locals_[rank + 1 :]), items_after)
            if state not in seen:
                seen.add(state)
                stack.append(state)
        if waiting and waiting == sum(local.step < len(code) for local, code in zip(locals_, codes, strict=True)):
            return len(seen), "no rank can continue"
    return len(seen), ""
