"""A trained model's state on disk: sharded tensors through torch.distributed.checkpoint, numbers as JSON. No PPO here.

Writing goes on in the background while training does: tensors are copied to CPU memory, then a thread writes them, with
a process group of its own. A checkpoint folder is written beside its place and renamed once it is whole.
Only tensors go through torch.distributed.checkpoint, so its data files are read with `weights_only`; its index,
`.metadata`, is a pickle and is read by an unpickler that makes nothing but what such an index consists of.
"""

import json
import math
import os
import pickle
import shutil
import warnings
from collections.abc import Callable, Container, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import IO, Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import Metadata, StorageMeta, TensorStorageMetadata

from prismatic.finite_weights import nonfinite
from prismatic.model_files import is_int, weight_files, write_checksums
from prismatic.regular_files import check_file, open_file
from utils.fsdp_utils import local_tensor

# torch's index of the tensors: some 200 bytes a tensor, optimizer state and rank.
MAX_INDEX_BYTES = 1 << 30

# Where torch's index finds its parts: module and names.
_METADATA = "torch.distributed.checkpoint.metadata"
_INDEX_CLASSES = {
    ("pathlib", "PosixPath"),
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("torch.distributed.checkpoint.filesystem", "_StorageInfo"),
    (_METADATA, "Metadata"),
    (_METADATA, "MetadataIndex"),
    (_METADATA, "StorageMeta"),
    (_METADATA, "TensorStorageMetadata"),
    (_METADATA, "ChunkStorageMetadata"),
    (_METADATA, "TensorProperties"),
    (_METADATA, "_MEM_FORMAT_ENCODING"),
}


class _IndexUnpickler(pickle.Unpickler):
    """Makes the classes of torch's index and torch's own constants (dtypes, layouts), nothing else."""

    def find_class(self, module: str, name: str) -> Any:
        is_constant = module == "torch" and isinstance(
            getattr(torch, name, None), (torch.dtype, torch.layout)
        )
        if (module, name) in _INDEX_CLASSES or is_constant:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"it names {module}.{name}, which no checkpoint's index does")


def _load_index(file: IO[bytes]) -> Metadata:
    metadata = _IndexUnpickler(file).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError(f"it holds a {type(metadata).__name__}, not an index")
    return metadata


class _Reader(dcp.FileSystemReader):
    """torch's reader, but for how the index is unpickled."""

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        with open_file(Path(self.path) / ".metadata", MAX_INDEX_BYTES) as file:
            metadata = _load_index(file)
        metadata.storage_meta = metadata.storage_meta or StorageMeta()
        metadata.storage_meta.load_id = self.load_id
        return metadata


def tensor_problems(folder: str | Path) -> list[str]:
    """Why the tensors in `folder` cannot be loaded: a damaged index, or files that are missing, odd or too short."""
    folder = Path(folder)
    index = folder / ".metadata"
    try:
        with open_file(index, MAX_INDEX_BYTES) as file:
            metadata = _load_index(file)
        needed: dict[str, int] = {}
        for info in metadata.storage_data.values():
            end = info.offset + info.length
            if not is_int(info.offset, 0, 1 << 62) or not is_int(info.length, 0, 1 << 62):
                raise ValueError(f"a tensor lies at {info.offset} and has {info.length} bytes")
            needed[info.relative_path] = max(needed.get(info.relative_path, 0), end)
        _check_sizes(metadata, sum(needed.values()))
    except FileNotFoundError:
        return [f"{folder} has no index .metadata: the checkpoint is half-written"]
    except OSError as error:
        return [str(error)]
    except (
        pickle.UnpicklingError,
        EOFError,
        AttributeError,
        TypeError,
        ValueError,
        IndexError,
        KeyError,
        OverflowError,
        MemoryError,
    ) as error:
        return [f"{index} cannot be read: {error}"]
    problems = []
    for name, size in sorted(needed.items()):
        if Path(name).name != name:
            problems.append(f"{index} names a file elsewhere: {name}")
            continue
        if not os.path.lexists(folder / name):
            problems.append(f"{folder / name} is missing: the checkpoint is half-written")
            continue
        try:
            found = check_file(folder / name).st_size
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        if found < size:
            problems.append(f"{folder / name} has {found} bytes of at least {size}")
    return problems


def _check_sizes(metadata: Metadata, num_bytes: int) -> None:
    """Raise ValueError if the index describes a tensor larger than the files, which hold `num_bytes` in all."""
    for name, meta in metadata.state_dict_metadata.items():
        if isinstance(meta, TensorStorageMetadata):
            size, dtype = tuple(meta.size), meta.properties.dtype
            if not all(is_int(extent, 0, 1 << 40) for extent in size):
                raise ValueError(f"{name} has the shape {size}")
            if math.prod(size) * dtype.itemsize > num_bytes:
                raise ValueError(f"{name} of shape {size} does not fit into {num_bytes} bytes")


# ---------------------------------------------------------------------------------------------- what is saved


def trained_tensors(
    prefix: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, Tensor]:
    """The trained parameters and the optimizer's states by name, as they are: sharded, sharing their memory.

    Names are those of the plain module, whatever wraps its blocks now.
    """
    tensors: dict[str, Tensor] = {}
    for name, parameter in _trained_parameters(model):
        tensors[f"{prefix}.weight.{name}"] = parameter.detach()
        for slot, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{prefix}.{slot}.{name}"] = value
    return tensors


def load_trained(
    folder: str | Path, prefix: str, model: nn.Module, optimizer: torch.optim.Optimizer
) -> None:
    """Load what `trained_tensors` named, in place, from a checkpoint of any number of ranks.

    Raises:
        ValueError: the checkpoint's names or shapes are not this model's, or a value is not finite.
    """
    present = {
        key: shape for key, shape in saved_shapes(folder).items() if key.startswith(f"{prefix}.")
    }
    states: dict[
        str, dict[str, tuple[int, ...]]
    ] = {}  # of each parameter: its optimizer states' shapes
    for key, shape in present.items():
        _, slot, name = key.split(".", 2)
        if slot != "weight":
            states.setdefault(name, {})[slot] = shape
    targets: dict[str, Tensor] = {}
    for name, parameter in _trained_parameters(model):
        targets[f"{prefix}.weight.{name}"] = parameter.detach()
        optimizer.state.pop(parameter, None)
        for slot, shape in states.get(name, {}).items():
            value = torch.zeros_like(parameter) if shape else _scalar_state(optimizer, parameter)
            targets[f"{prefix}.{slot}.{name}"] = optimizer.state[parameter][slot] = value
    wanted = {key: tuple(tensor.shape) for key, tensor in targets.items()}
    differing = sorted(key for key in wanted | present if wanted.get(key) != present.get(key))
    if differing:
        key = differing[0]
        raise ValueError(
            f"{folder} is of another {prefix}: {len(differing)} tensors differ, such as {key} "
            f"({present.get(key)} saved, {wanted.get(key)} here)"
        )
    load_tensors(folder, targets)
    if found := nonfinite((key, local_tensor(tensor)) for key, tensor in targets.items()):
        raise ValueError(
            f"{folder}: {found[0]} holds values that are NaN or infinite: resume from an older checkpoint"
        )


def _trained_parameters(model: nn.Module) -> list[tuple[str, nn.Parameter]]:
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    for wrapper in ("_checkpoint_wrapped_module.", "_orig_mod."):
        named = [(name.replace(wrapper, ""), p) for name, p in named]
    return named


def _scalar_state(optimizer: torch.optim.Optimizer, parameter: Tensor) -> Tensor:
    """A step count where this optimizer keeps it: beside the parameter only in fused kernels."""
    fused = any(group.get("fused") or group.get("capturable") for group in optimizer.param_groups)
    return torch.zeros((), dtype=torch.float32, device=parameter.device if fused else "cpu")


def saved_shapes(folder: str | Path) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in a checkpoint."""
    return {name: tuple(meta.size) for name, meta in _tensor_index(folder).items()}


def _tensor_index(folder: str | Path) -> dict[str, TensorStorageMetadata]:
    metadata = _Reader(folder).read_metadata()
    return {
        k: m
        for k, m in metadata.state_dict_metadata.items()
        if isinstance(m, TensorStorageMetadata)
    }


def load_tensors(folder: str | Path, targets: dict[str, Tensor]) -> None:
    """Fill `targets` in place, each rank what it holds of them. No collective.

    Raises:
        ValueError: the files do not hold them.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")  # what no_dist asks for
        try:
            dcp.load(dict(targets), storage_reader=_Reader(folder), no_dist=True)
        except CheckpointException as error:
            raise ValueError(f"{folder} cannot be loaded: {_failures(error)}") from error


def load_prefixed(folder: str | Path, prefix: str) -> dict[str, Tensor]:
    """Every tensor whose name begins with `prefix`, on the CPU, by the rest of its name."""
    index = {name: meta for name, meta in _tensor_index(folder).items() if name.startswith(prefix)}
    tensors = {
        name: torch.empty(meta.size, dtype=meta.properties.dtype) for name, meta in index.items()
    }
    if tensors:
        load_tensors(folder, tensors)
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items()}


def read_frozen(model_dir: str | Path, trained: Container[str]) -> dict[str, Tensor]:
    """The tensors of a model folder that are not `trained`, by name."""
    tensors: dict[str, Tensor] = {}
    for path in weight_files(model_dir):
        with safe_open(path, "pt") as file:
            tensors |= {name: file.get_tensor(name) for name in file.keys() if name not in trained}  # noqa: SIM118
    return tensors


def random_states(device: torch.device) -> dict[str, Tensor]:
    """States of this process's torch generators: the CPU's and, on a GPU, its own."""
    states = {"cpu": torch.get_rng_state()}
    return states | ({"cuda": torch.cuda.get_rng_state(device)} if device.type == "cuda" else {})


def set_random_states(states: Mapping[str, Tensor], device: torch.device) -> None:
    """Go on drawing where `random_states` was taken; a device without a saved state keeps its own."""
    if "cpu" in states:
        torch.set_rng_state(states["cpu"])
    if "cuda" in states and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)


# ---------------------------------------------------------------------------------------------- writing


class BackgroundWriter:
    """Writes tensors of all ranks from a thread, one checkpoint at a time. Made on every rank at the same time."""

    def __init__(self) -> None:
        self._group = dist.new_group(backend="gloo")  # the trainers' own is in use meanwhile
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None

    def begin(
        self,
        folder: str | Path,
        tensors: dict[str, Tensor],
        after: Callable[[], None] | None = None,
    ) -> None:
        """Copy `tensors` to CPU memory, return, and write them into `folder`; `after` runs once all ranks have.

        A collective; waits for the checkpoint before it.

        Raises:
            RuntimeError: the checkpoint before could not be written.
        """
        self.wait()
        written = dcp.async_save(tensors, checkpoint_id=str(folder), process_group=self._group)
        assert isinstance(written, Future)
        self._pending = self._thread.submit(_finish, written, after)

    def wait(self) -> None:
        """Until what was begun is on disk; raises what went wrong with it."""
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()


def _finish(written: "Future[Any]", after: Callable[[], None] | None) -> None:
    try:
        written.result()
    except CheckpointException as error:  # no Exception of Python's: it would end the process
        raise RuntimeError(f"a checkpoint could not be written: {_failures(error)}") from error
    if after is not None:
        after()


def _failures(error: CheckpointException) -> str:
    """What went wrong on which rank."""
    return "; ".join(f"rank {rank}: {failure[0]!r}" for rank, failure in error.failures.items())


def write_json(path: str | Path, content: Any) -> None:
    """Write `content` as JSON and have it on disk when this returns."""
    with open(path, "w") as file:
        json.dump(content, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())


def publish(partial: str | Path, target: str | Path) -> None:
    """Add checksums to a folder that is whole and rename it to its final name, in place of what may be there."""
    partial, target = Path(partial), Path(target)
    write_checksums(partial)
    for folder in (partial, *(p for p in partial.rglob("*") if p.is_dir())):
        _sync_folder(folder)
    old = target.with_name(f".{target.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if target.exists():
        target.rename(old)
    partial.rename(target)
    _sync_folder(target.parent)
    shutil.rmtree(old, ignore_errors=True)


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
