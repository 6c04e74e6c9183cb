"""Buffers that two processes map: CUDA IPC on one GPU, a file in shared memory on a CPU. Torch only.

Handles are plain JSON values. The owner must outlive the others' use of the memory.
"""

import base64
import os
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

SHARED_MEMORY_DIR = Path("/dev/shm")


def share_buffers(
    num_bytes: int, num_buffers: int, device: torch.device
) -> tuple[list[Tensor], list[Any]]:
    """Make flat uint8 buffers on `device` and the handles that open them elsewhere."""
    if device.type == "cuda":
        buffers = [_allocate_exportable(num_bytes, device) for _ in range(num_buffers)]
        return buffers, [_cuda_handle(buffer) for buffer in buffers]
    folder = SHARED_MEMORY_DIR if SHARED_MEMORY_DIR.is_dir() else None
    buffers, paths = [], []
    for _ in range(num_buffers):
        number, path = tempfile.mkstemp(prefix="ppo_vla_weights_", dir=folder)
        os.truncate(number, num_bytes)
        os.close(number)
        buffers.append(torch.from_file(path, shared=True, size=num_bytes, dtype=torch.uint8))
        paths.append(path)
    return buffers, [{"path": path, "num_bytes": num_bytes} for path in paths]


def open_shared_buffers(handles: list[Any], device: torch.device) -> list[Tensor]:
    """Map the buffers behind `handles` on `device`, which must be the same GPU (its index may differ here).

    The files of CPU buffers are removed once they are mapped: nothing stays behind, however the processes end.
    Raises RuntimeError when the handles belong to another GPU.
    """
    if device.type == "cuda":
        return [_open_cuda(handle, device) for handle in handles]
    buffers = []
    for handle in handles:
        size = handle["num_bytes"]
        buffers.append(torch.from_file(handle["path"], shared=True, size=size, dtype=torch.uint8))
        os.unlink(handle["path"])
    return buffers


def _allocate_exportable(num_bytes: int, device: torch.device) -> Tensor:
    """A buffer from plain cudaMalloc: handles of expandable segments need rights that containers do not give."""
    configured = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "") + os.environ.get(
        "PYTORCH_ALLOC_CONF", ""
    )
    is_expandable = "expandable_segments:True" in configured
    if is_expandable:
        torch.cuda.memory._set_allocator_settings("expandable_segments:False")
    try:
        return torch.empty(num_bytes, dtype=torch.uint8, device=device)
    finally:
        if is_expandable:
            torch.cuda.memory._set_allocator_settings("expandable_segments:True")


def _gpu_uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)


def _cuda_handle(buffer: Tensor) -> dict[str, Any]:
    # Order of the values as torch.multiprocessing.reductions.reduce_tensor has it, without the device's own index.
    values = buffer.untyped_storage()._share_cuda_()[1:]
    encoded = [
        {"bytes": base64.b64encode(v).decode()} if isinstance(v, bytes) else v for v in values
    ]
    return {"uuid": _gpu_uuid(buffer.device), "num_bytes": buffer.numel(), "values": encoded}


def _open_cuda(handle: dict[str, Any], device: torch.device) -> Tensor:
    if handle["uuid"] != _gpu_uuid(device):
        raise RuntimeError(
            f"the buffers are on GPU {handle['uuid']}, this process uses {_gpu_uuid(device)}: ipc needs the same GPU"
        )
    values = [base64.b64decode(v["bytes"]) if isinstance(v, dict) else v for v in handle["values"]]
    torch.cuda.init()
    storage = torch.UntypedStorage._new_shared_cuda(device.index, *values)
    return torch.empty(0, dtype=torch.uint8, device=device).set_(
        storage, 0, (handle["num_bytes"],), (1,)
    )
