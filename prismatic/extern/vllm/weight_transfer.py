"""Weight transfer for engines whose weights arrive as CPU tensors (Ray's object store).

vLLM 0.26 has `nccl`, `ipc` and `sparse_nccl`, all CUDA only. This one takes named tensors in the update call itself.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from vllm.distributed.weight_transfer.base import (
    WeightTransferEngine,
    WeightTransferInitInfo,
    WeightTransferUpdateInfo,
)
from vllm.model_executor.model_loader.reload import finalize_layerwise_reload, initialize_layerwise_reload


@dataclass
class ObjectStoreInitInfo(WeightTransferInitInfo):
    """Nothing has to be agreed on beforehand."""


@dataclass
class ObjectStoreUpdateInfo(WeightTransferUpdateInfo):
    """One bucket: (checkpoint name, whole tensor), in any dtype; the engine casts to its own."""

    weights: list[tuple[str, torch.Tensor]]


class ObjectStoreWeightTransferEngine(WeightTransferEngine[ObjectStoreInitInfo, ObjectStoreUpdateInfo]):
    """Load buckets of CPU tensors through vLLM's layerwise reload.

    A plain `model.load_weights` will not do: on CPU the linear layers are repacked after loading and their original
    weights dropped, so that a copy into them raises or is never read.
    """

    init_info_cls = ObjectStoreInitInfo
    update_info_cls = ObjectStoreUpdateInfo

    def init_transfer_engine(self, init_info: ObjectStoreInitInfo) -> None:
        """Do nothing: there is no connection to open."""

    _is_unfinished = False

    def start_weight_update(self) -> None:
        """Put the layers on the meta device until their new weights are complete."""
        if self._is_unfinished:
            # vLLM skips layers that an update broke off in, with what they had received: a fused layer would then
            # count the old parts and be processed before its last new part came.
            finalize_layerwise_reload(self.model, self.model_config)
        self._is_unfinished = True
        initialize_layerwise_reload(self.model)

    def receive_weights(self, update_info: ObjectStoreUpdateInfo) -> None:
        """Load one bucket; a fused layer is processed when the last of its parts has come."""
        self.model.load_weights(update_info.weights)

    def finish_weight_update(self) -> None:
        """Process what is left (attention layers, padded layers) and put every layer back in place."""
        finalize_layerwise_reload(self.model, self.model_config)
        self._is_unfinished = False

    def shutdown(self) -> None:
        """Do nothing: nothing is held."""

    @staticmethod
    def trainer_send_weights(
        iterator: Iterator[list[tuple[str, torch.Tensor]]], trainer_args: Callable[[dict[str, Any]], None]
    ) -> None:
        """Call `trainer_args` (an engine's `update_weights`) with each bucket of `iterator`."""
        for bucket in iterator:
            trainer_args({"update_info": {"weights": bucket}})
