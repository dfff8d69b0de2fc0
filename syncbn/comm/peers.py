"""How the ranks of a group exchange CUDA tensors: in each other's memory if SYNCBN_PEER=1 and all can, else over the group.

    gather hosts and GPUs ──► same node? access? ──► gather answers ──► map memory ──► gather random numbers ──► add them ──► compare
    ──► gather verdicts

Each gathering is one exchange over the group itself. It also carries any rank's reason to stay with the group: all ranks go on, or none,
and all have the same reason. The random numbers are added as a layer's sums are, so no rank relies on memory that it has not tried.

Either way the values of a layer end with a tag and its square, which are added like any value. This process would have to wait for
the sums, so the kernels that use them, `normalize` and `backward_input`, verify them, and the group's next exchange of CUDA tensors reads
what they have found (alarms.py).
"""

from __future__ import annotations

import hashlib
import secrets
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor

from .. import environment, native
from . import agreement, peer_memory
from .alarms import Alarms
from .meeting import Unusable, agree, host_identity
from .peer_memory import MAX_PEERS, PeerMemory
from .signatures import Ticket, signature, sums_of_tags
from .way import Key, MemoryOrGroup, tag

if TYPE_CHECKING:
    from . import Communicator

CAPACITY = 2 * 4096 + 4  # values of an exchange: those of 4096 channels, with weight, samples and tag; more go over the group
HOST, GPU = 32, 16  # bytes of a rank's row
FIRST_TIMEOUT = 60.0  # seconds, at most, of each exchange that tries the memory


class PeerExchange(MemoryOrGroup):
    """The memory of one group's GPUs, and what their kernels have found."""

    def __init__(self) -> None:
        super().__init__()
        self.memory: PeerMemory | None = None
        self.alarms = Alarms(signature)

    def ticket(self, comm: Communicator, key: Key) -> Ticket:
        if environment.settings.check == "off":
            return Ticket(tag(comm, key))
        return Ticket(tag(comm, key), comm.world_size, self.alarms.word(key))

    def check(self) -> None:
        if self.memory is not None:
            self.memory.check()  # first: a missing rank sets the alarms too, and explains them
        self.alarms.check()

    def all_reduce_(self, comm: Communicator, tensor: Tensor, channels: int, key: Key) -> Tensor:
        if self.memory is not None:
            values = tensor[channels:]  # the shifts are 0 on all ranks
            if self.memory.takes(values):
                self.memory.all_reduce_(values, key)
                return tensor
        return super().all_reduce_(comm, tensor, channels, key)

    def verify(self, key: Key, sums: Tensor, ticket: Ticket) -> None:
        if ticket.alarm is not None:
            self.alarms.compare(key, sums, sums_of_tags(ticket.ranks, ticket.tag))

    def _meet(self, comm: Communicator, device: torch.device) -> None:
        self.memory = _meet(comm, device)

    def _memory_in_words(self) -> str:
        return "in each other's GPU memory"


def _meet(comm: Communicator, device: torch.device) -> PeerMemory:
    """Every rank calls it. Raises Unusable on every rank if one of them cannot take part."""
    gather = lambda row: agreement.gather(comm, row, device)  # noqa: E731
    why, identity, memory = _why_not(comm), b"", None
    if not why:
        try:
            identity = host_identity() + gpu_digest(device)
        except Exception as error:  # of any kind: the other ranks wait in the next gathering
            why = f"this rank's GPU cannot be told from others: {error}"
    rows = agree(gather, identity, why)
    if len({row[:HOST] for row in rows}) > 1:
        raise Unusable("the ranks are on several nodes, or in containers of their own")
    agree(gather, b"", why_no_access(device, [row[HOST:][:GPU] for row in rows]))
    number = secrets.randbits(40)
    try:
        memory = PeerMemory(comm.group, device, comm.timeout, signature, CAPACITY)
    except Exception as error:
        why = f"torch's symmetric memory: {str(error).partition(chr(10))[0] or type(error).__name__}"
    numbers = [int.from_bytes(row[:8], "little") for row in agree(gather, number.to_bytes(8, "little"), why)]
    assert memory is not None
    agree(gather, b"", _try(memory, float(number), float(sum(numbers))))
    return memory


def _why_not(comm: Communicator) -> str:
    if not environment.settings.peer:
        return "not turned on by SYNCBN_PEER=1"
    if not (dist.is_available() and isinstance(comm.group, dist.ProcessGroup)):
        return "only the ranks of a torch.distributed process group can map each other's memory"
    if comm.world_size > MAX_PEERS:
        return f"{comm.world_size} ranks are more than {MAX_PEERS}"
    if peer_memory.library() is None:
        cuda = native.status()[1]
        return "the compiled library is of another version" if cuda.loaded else f"the compiled library is not loaded: {cuda.reason}"
    return ""


def _try(memory: PeerMemory, number: float, wanted: float) -> str:
    """Adds a number of each rank twice, because exchanges use the memory's halves in turn. Returns what is wrong; empty if nothing is."""
    try:
        for _ in range(2):
            values = torch.full((memory.capacity,), number, dtype=torch.float64, device=memory.device)
            with memory.waiting(FIRST_TIMEOUT):
                memory.all_reduce_(values, ("the ranks", "first exchange", memory.capacity, values.dtype, "none", 0.0, None))
                sums = values.cpu()  # waits for the kernel
                memory.check()
            if not bool((sums == wanted).all()):
                return "a first exchange in GPU memory has given a wrong sum"
    except Exception as error:
        return f"a first exchange in GPU memory has failed: {error}"
    return ""


def gpu_digest(device: torch.device) -> bytes:
    """Identifies the GPU by its UUID: its number may differ by process."""
    return hashlib.sha256(str(torch.cuda.get_device_properties(device).uuid).encode()).digest()[:GPU]


def why_no_access(device: torch.device, gpus: list[bytes]) -> str:
    """Why this GPU cannot write to another rank's; empty if it can. A GPU that this process cannot see passes here, and fails in torch."""
    seen = {gpu_digest(torch.device("cuda", index)): index for index in range(torch.cuda.device_count())}
    for rank, gpu in enumerate(gpus):
        index = seen.get(gpu, device.index)
        if index != device.index and not torch.cuda.can_device_access_peer(device.index, index):
            return f"this rank's GPU cannot access the memory of rank {rank}'s GPU"
    return ""
