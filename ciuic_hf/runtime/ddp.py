"""Gradients compressed on their way between the processes of DistributedDataParallel."""

# Without `from __future__ import annotations`: DDP compares the annotations of a hook with the classes themselves.

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ciuic_hf.errors import CiuicError
from ciuic_hf.runtime.stochastic import PackedGroups, pack_any, packed_nbytes, unpack

# 8.125 and 4.25 bits on the wire.
_GROUPS = {8: 128, 4: 64}
# The residual is below half a step, so that four bits of it leave 1/30 of a step.
_RESIDUAL_BITS, _RESIDUAL_GROUP = 4, 64


def compress_communication(
    model: DistributedDataParallel, *, bits: int = 8, seed: int = 0
) -> "CommunicationState":
    """Compresses the gradients that DDP exchanges; call it once, before training, with the same bits everywhere.

    8 and 4 bits: each process sends every other its share of the bucket, packed; averages what it gets for its own
    share; and sends that average to all, packed. That is as much as a ring sends, for any number of processes. What
    rounding took off is added to the next bucket, in both exchanges (error feedback, as in 1-bit Adam, arXiv
    2102.02888). All processes decode the same bytes, so their weights stay equal. For 16 bits and for low rank torch
    has hooks (``torch.distributed.algorithms.ddp_comm_hooks``).

    The exchange of a bucket is waited for, so it does not overlap with the backward pass.

    Returns:
        The state of the hook, which counts bytes.

    Raises:
        CiuicError: for other bits, or a model that is not under DistributedDataParallel.
    """
    if not isinstance(model, DistributedDataParallel):
        raise CiuicError(
            f"Expected a model under DistributedDataParallel, got {type(model).__name__}; for one process use "
            "compress_gradients."
        )
    if isinstance(bits, bool) or bits not in _GROUPS:
        raise CiuicError(
            f"Gradients travel at 8 or 4 bits, got bits={bits!r}; for 16 register torch's bf16_compress_hook."
        )
    state = CommunicationState(bits, model.process_group, seed)
    model.register_comm_hook(state, exchange)
    return state


class CommunicationState:
    """Bytes so far, and what rounding left over for the next step.

    Attributes:
        sent_nbytes: that this process gave to the exchanges, its own share included.
        original_nbytes: of the same in the dtype of the gradients.
    """

    def __init__(self, bits: int, group: Any, seed: int) -> None:
        self.bits, self.group, self.seed = bits, group, seed
        self.sent_nbytes, self.original_nbytes = 0, 0
        self._residuals: dict[tuple[str, int], tuple[tuple[int, ...], PackedGroups]] = {}
        self._generator: torch.Generator | None = None

    def with_residual(self, key: tuple[str, int], owner: tuple[int, ...], values: Tensor) -> None:
        """Adds what is left over, in place. DDP makes new buckets after its first step, which start without."""
        known, packed = self._residuals.pop(key, (None, None))
        if known == owner and packed is not None:
            values += unpack(packed)

    def keep_residual(self, key: tuple[str, int], owner: tuple[int, ...], error: Tensor) -> None:
        """What did not get through; not of a step with NaN or infinity, which would never leave again."""
        if self._generator is None:
            self._generator = torch.Generator(error.device).manual_seed(self.seed)
        error = torch.nan_to_num_(error, nan=0.0, posinf=0.0, neginf=0.0)
        packed, _ = pack_any(error, _RESIDUAL_BITS, _RESIDUAL_GROUP, self._generator, signed=True)
        self._residuals[key] = (owner, packed)


def exchange(state: CommunicationState, bucket: dist.GradBucket) -> torch.futures.Future[Tensor]:
    """The communication hook: the average of the bucket over all processes, in the bucket's own memory."""
    buffer, processes = bucket.buffer(), dist.get_world_size(state.group)
    owner = (buffer.numel(), *(id(parameter) for parameter in bucket.parameters()))
    unit = processes * _GROUPS[state.bits]
    values = torch.zeros(-(-buffer.numel() // unit) * unit, dtype=torch.float32, device=buffer.device)
    values[: buffer.numel()] = buffer
    state.original_nbytes += 2 * buffer.nbytes

    state.with_residual(("sent", bucket.index()), owner, values)
    sent = [_encode(share, state.bits) for share in values.chunk(processes)]
    decoded = torch.cat([_decode(message, state.bits) for message in sent])
    state.keep_residual(("sent", bucket.index()), owner, values - decoded)
    outgoing = torch.stack(sent)
    received = torch.empty_like(outgoing)
    dist.all_to_all_single(received, outgoing, group=state.group)

    mean = torch.stack([_decode(message, state.bits) for message in received]).mean(0)
    state.with_residual(("mean", bucket.index()), owner, mean)
    message = _encode(mean, state.bits)
    state.keep_residual(("mean", bucket.index()), owner, mean - _decode(message, state.bits))
    gathered = torch.empty(processes * message.numel(), dtype=torch.uint8, device=buffer.device)
    dist.all_gather_into_tensor(gathered, message, group=state.group)
    state.sent_nbytes += outgoing.nbytes + gathered.nbytes

    means = torch.cat([_decode(part, state.bits) for part in gathered.chunk(processes)])
    buffer.copy_(means[: buffer.numel()])
    devices: list[int | str | torch.device] = [buffer.device] if buffer.device.type != "cpu" else []
    future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
    future.set_result(buffer)
    return future


def _encode(values: Tensor, bits: int) -> Tensor:
    """uint8: the codes, then the scales; to the nearest, as the feedback takes care of the bias."""
    packed, _ = pack_any(values, bits, _GROUPS[bits], None, signed=True)
    return torch.cat([packed.codes.flatten(), packed.step.view(torch.uint8)])


def _decode(message: Tensor, bits: int) -> Tensor:
    group = _GROUPS[bits]
    groups = message.numel() // packed_nbytes(group, bits, group, signed=True)
    codes, step = message.split([groups * group * bits // 8, 2 * groups])
    # cloned, as a view of another dtype needs an aligned start
    packed = PackedGroups(
        codes.view(groups, -1), step.clone().view(torch.bfloat16), None, bits, groups * group, torch.float32
    )
    return unpack(packed)
