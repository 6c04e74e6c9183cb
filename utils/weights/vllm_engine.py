"""vLLM's end of a weight channel: all buckets of a version in one call.

vLLM 0.26's own `nccl` and `ipc` engines reload layer by layer, wait for a call per chunk and only run on CUDA.
This one overwrites weights in place on GPUs and runs on CPUs too.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor
from vllm.distributed.parallel_state import get_tensor_model_parallel_rank
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import (
    finalize_layerwise_reload,
    initialize_layerwise_reload,
)

from utils.weights.buckets import BucketLayout
from utils.weights.channel import ChannelAddress, Received, ReceivingEnd


@dataclass
class ChannelInitInfo(WeightTransferInitInfo):
    """How each worker of one engine joins: `joins[tensor-parallel rank]` is a ChannelAddress and a rank, as dicts.

    `layout` is the trainer's `BucketLayout.to_dict()`.
    """

    layout: dict[str, Any]
    joins: list[dict[str, Any]]


@dataclass
class ChannelUpdateInfo(WeightTransferUpdateInfo):
    """The version to come, or why the engine does not want it (the senders then hear the reason)."""

    version: int
    refusal: str | None = None


class ChannelWeightTransferEngine(WeightTransferEngine[ChannelInitInfo, ChannelUpdateInfo]):
    """Receives a whole version from a trainer's WeightSender in one call; every worker is a receiver of its own.

    On GPUs the unquantised weights are overwritten in place (vLLM processes nothing after loading there), so pointers
    and CUDA graphs stay valid and no memory is needed. On CPUs they go through vLLM's layerwise reload, because linear
    weights are repacked and dropped.

    Failures are kept in `problem`, not raised: vLLM stops reading its workers' answers at the first error, and would
    take the other workers' answers for those to the next call.
    """

    init_info_cls = ChannelInitInfo
    update_info_cls = ChannelUpdateInfo
    end: ReceivingEnd | None = None
    received: Received | None = None
    problem: str | None = None

    def init_transfer_engine(self, init_info: ChannelInitInfo) -> None:
        """Join the trainer's channel; an earlier one is left. `problem` says when the others do not come."""
        self.shutdown()
        join = init_info.joins[get_tensor_model_parallel_rank()]
        layout = BucketLayout.from_dict(init_info.layout)
        self.problem = None
        try:
            self.end = ReceivingEnd(
                ChannelAddress(**join["address"]), join["rank"], layout, self.device
            )
        except (RuntimeError, ValueError) as error:
            self.problem = str(error)

    def start_weight_update(self) -> None:
        """Do nothing: weights are touched only after all ends have agreed on the update."""

    def receive_weights(self, update_info: ChannelUpdateInfo) -> None:
        """Receive and load all buckets; `received` says what came, `problem` why it did not (ReceivingEnd.receive)."""
        self.received, self.problem = None, None
        load = self._load_in_place if self.device.type == "cuda" else self._reload_layers
        try:
            assert self.end is not None, "no channel is open"
            self.received = self.end.receive(update_info.version, load, update_info.refusal)
        except (
            Exception
        ) as error:  # whatever it is, the other workers' answers must be read: see above
            self.problem = str(error) or repr(error)

    def finish_weight_update(self) -> None:
        """Do nothing: `receive_weights` leaves the model complete."""

    def _load_in_place(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        self._check_all_loaded(self.model.load_weights(tensors))

    def _reload_layers(self, tensors: Iterator[tuple[str, Tensor]]) -> None:
        initialize_layerwise_reload(self.model)
        try:
            # Copies: a layer waits for all of its parts, and the bucket's buffer is used again.
            loaded = self.model.load_weights((name, tensor.clone()) for name, tensor in tensors)
        finally:
            # Also after a failure: the next update must find layers in place, or it would count old parts.
            finalize_layerwise_reload(self.model, self.model_config)
        self._check_all_loaded(loaded)

    def _check_all_loaded(self, loaded: set[str]) -> None:
        """Raise RuntimeError if a parameter of the model (after sleeping: anything) was not overwritten."""
        missing = sorted({name for name, _ in self.model.named_parameters()} - loaded)
        if missing:
            raise RuntimeError(
                f"{len(missing)} parameters got no new weights: {', '.join(missing[:4])}"
            )

    def shutdown(self) -> None:
        """Leave the channel."""
        if self.end is not None:
            self.end.close()
        self.end = None

    @staticmethod
    def trainer_send_weights(iterator: Iterator[Any], trainer_args: Any) -> None:
        """Unsupported: trainers send with `utils.weights.sender.WeightSender`."""
        raise NotImplementedError("the trainer sends with utils.weights.sender.WeightSender")
