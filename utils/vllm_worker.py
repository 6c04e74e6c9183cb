"""What our engine adds to vLLM's workers; importing it registers the model class and the weight transfer.

An engine with tensor parallelism starts a process for each GPU. vLLM's entry points tell them about the class, but only
of an installed distribution; with the project on PYTHONPATH alone there are none. Every worker imports the module of
its extension class before it builds the model.
"""

from typing import Any

import torch

from prismatic.extern.vllm import register
from utils.weights.receiver import register_transfer_engine

register()
register_transfer_engine()


class WorkerExtension:
    """Methods for `collective_rpc`, mixed into vLLM's worker class."""

    get_model: Any

    def encode_images(self, pixels_BHWC: torch.Tensor) -> None:
        """Start encoding the images of the requests to come."""
        self.get_model().encode_images(pixels_BHWC)
