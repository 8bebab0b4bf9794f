"""A stage's layers on a device, with messages, samples and expert answers on the host.

T tokens, D model width, S sampled rows, V tokens of the vocabulary.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, fields, replace

from torch import Tensor

from common.compute.device import Device
from services.stage.model.decoder import ExpertCall, ForwardPass, OnItsWay, StageModel
from services.stage.model.micro_batch import MicroBatch
from services.stage.model.paged_attention import LayerKvCache


@dataclass(frozen=True, slots=True)
class DeviceStageModel(StageModel):
    """Takes batches and answers of the host, and yields expert calls of the host. Before, it yields what the device is
    about to give, so that other micro-batches go on meanwhile.

    What it returns is of the host where a next stage gets it, and of the device where `sampled_logits` does.
    """

    device: Device

    def forward(self, batch: MicroBatch, caches: list[LayerKvCache]) -> ForwardPass:
        """Hidden states of a micro-batch after this stage's layers; `caches` are on the device."""
        forward = StageModel.forward(self, self._put(batch), caches)
        answer: Tensor | None = None
        try:
            while True:
                call = forward.send(answer)
                assert isinstance(call, ExpertCall), "the layers themselves wait for nothing else"
                given = yield ExpertCall(call.layer, *(yield from self._fetch(call.hidden, call.experts, call.weights)))
                assert given is not None, "an expert call is answered"
                (answer,) = self.device.to_device(given)
        except StopIteration as stop:
            hidden: Tensor = stop.value
        finally:
            forward.close()
        if self.lm_head is None:
            return (yield from self._fetch(hidden))[0]
        yield from self._fetch()  # what samples then waits for little more than the lm_head
        return hidden

    def _fetch(self, *tensors: Tensor) -> Generator[ExpertCall | OnItsWay, Tensor | None, tuple[Tensor, ...]]:
        """Device tensors on the host."""
        download = self.device.begin_download(*tensors)
        try:
            yield download
            return download.take()
        finally:
            download.give_up()

    def sampled_logits(self, hidden: Tensor, rows: Tensor) -> Tensor:
        """hidden [T, D] as `forward` returned it, rows int64 [S] -> [S, V], both of the host."""
        (chosen,) = self.device.to_device(rows)
        return self.device.to_host(self.logits(hidden[chosen]))[0]

    def _put(self, batch: MicroBatch) -> MicroBatch:
        hidden, positions, row_sequence, block_tables, slots = self.device.to_device(
            batch.hidden, batch.positions, batch.row_sequence, batch.block_tables, batch.slots
        )
        return replace(
            batch,
            hidden=hidden,
            positions=positions,
            row_sequence=row_sequence,
            block_tables=block_tables,
            slots=slots,
            host_positions=batch.positions,
        )


def put_on_device(model: StageModel, device: Device) -> StageModel:
    """A model whose tensors have been loaded to the device; on the host, the model as it is."""
    if device.is_host:
        return model
    return DeviceStageModel(**{field.name: getattr(model, field.name) for field in fields(model)}, device=device)
