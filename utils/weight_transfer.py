"""Weight updates of a vLLM engine: the list of names is checked first, then buckets are loaded, then counted.

Uses vLLM 0.26's native interface (`init_weight_transfer_engine`, `start_weight_update`, `update_weights`,
`finish_weight_update`), which changed between 0.25 and 0.29: nothing outside this file calls it. It knows no PPO.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from utils.logging_utils import get_logger

if TYPE_CHECKING:
    from vllm import LLM

logger = get_logger(__name__)

BACKENDS = ("object_store", "nccl", "ipc")
NUM_NAMES_SHOWN = 4
# Old Llama checkpoints carry this buffer; no parameter of any model here.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

Bucket = list[tuple[str, Tensor]]
Manifest = Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class WeightUpdateReport:
    """What one complete update brought: named parameters, their bytes as sent, and the version they are."""

    num_params: int
    num_bytes: int
    version: int


class WeightUpdateError(ValueError):
    """An update that was refused or broke off; the engine generates again only after a complete one."""


def bucket_manifest(buckets: Iterable[Bucket]) -> list[tuple[str, tuple[int, ...]]]:
    """Names and shapes of all tensors in `buckets`, in order."""
    return [(name, tuple(tensor.shape)) for bucket in buckets for name, tensor in bucket]


def manifest_problems(expected: Mapping[str, Sequence[int]], manifest: Manifest, *, complete: bool = True) -> list[str]:
    """Everything that keeps `manifest` from being exactly the `expected` names and shapes; empty when it is.

    With `complete=False` names may still be missing.
    """
    counts = Counter(name for name, _ in manifest)
    wrong_shapes = [
        f"{name} is {tuple(shape)}, not {tuple(expected[name])}"
        for name, shape in manifest
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    groups = {
        "missing": [name for name in expected if complete and name not in counts],
        "unexpected": [name for name in counts if name not in expected],
        "sent more than once": [name for name, count in counts.items() if count > 1],
        "wrong shape": wrong_shapes,
    }
    return [f"{len(names)} {what}: {_shorten(names)}" for what, names in groups.items() if names]


def _shorten(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


class WeightReceiver:
    """Brings one engine from policy version to policy version; owns the only calls of vLLM's transfer interface.

    `expected` maps every parameter's checkpoint name to its shape. `problem` is None while the weights are those of
    `version`, else it says why not.
    """

    def __init__(self, llm: "LLM", expected: Mapping[str, Sequence[int]], backend: str) -> None:
        self.llm = llm
        self.expected = {name: tuple(s) for name, s in expected.items() if not name.endswith(IGNORED_SUFFIX)}
        self.backend = backend
        self.version = 0
        self.problem: str | None = None
        self._is_initialized = False

    def init(self, backend: str, info: dict[str, Any]) -> None:
        """Open the connection to the trainer; `info` is the backend's own (NCCL: master_address, master_port, ...)."""
        if backend != self.backend:
            raise ValueError(
                f"weight transfer backend {backend!r} was asked for, but the engine was built for {self.backend!r}: "
                f"set EngineConfig.weight_transfer_backend (one of {', '.join(BACKENDS)})"
            )
        self.llm.init_weight_transfer_engine({"init_info": info})
        self._is_initialized = True

    def update(self, infos: Iterable[dict[str, Any]], manifest: Manifest, version: int) -> WeightUpdateReport:
        """Run one update: check `manifest`, load every info (a backend's update_info), count, and set `version`.

        Raises WeightUpdateError before anything is overwritten when the manifest is not exactly the model's
        parameters, and when what comes is not what the manifest announced.
        """
        if not self._is_initialized:
            self.init(self.backend, {})
        problems = manifest_problems(self.expected, manifest)
        if problems:
            self._refuse(version, "nothing was overwritten", problems)
        self.problem = f"the update to version {version} broke off half-way"
        num_bytes = self._load(infos, dict(manifest), version)
        # Prefix, image and encoder caches would hold results of the old weights.
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.version, self.problem = version, None
        return WeightUpdateReport(len(manifest), num_bytes, version)

    def _load(self, infos: Iterable[dict[str, Any]], announced: Mapping[str, Sequence[int]], version: int) -> int:
        received: list[tuple[str, tuple[int, ...]]] = []
        problems: list[str] = []
        num_bytes = 0
        self.llm.start_weight_update()
        is_open = True
        try:
            for info in infos:
                headers, info_bytes = _info_headers(info)
                problems = manifest_problems(announced, received + headers, complete=False)
                if problems:
                    break
                is_open = False  # vLLM ends the session itself when this call raises
                self.llm.update_weights({"update_info": info})
                is_open = True
                received += headers
                num_bytes += info_bytes
        finally:
            if is_open:
                self.llm.finish_weight_update()
        problems = problems or manifest_problems(announced, received)
        if problems:
            self._refuse(version, f"it ended after {len(received)} of {len(announced)} parameters", problems)
        return num_bytes

    def _refuse(self, version: int, state: str, problems: list[str]) -> None:
        self.problem = f"the weight update to version {version} failed ({state}): " + "; ".join(problems)
        raise WeightUpdateError(f"{self.problem}. Send every parameter once, by its checkpoint name")


def _info_headers(info: Mapping[str, Any]) -> tuple[list[tuple[str, tuple[int, ...]]], int]:
    """Names, shapes and bytes of one update_info: tensors (object store) or headers (NCCL, IPC)."""
    if "weights" in info:
        weights: Bucket = info["weights"]
        return bucket_manifest([weights]), sum(t.numel() * t.element_size() for _, t in weights)
    shapes = [tuple(shape) for shape in info["shapes"]]
    sizes = [getattr(torch, dtype.removeprefix("torch.")).itemsize for dtype in info["dtype_names"]]
    num_bytes = sum(torch.Size(shape).numel() * size for shape, size in zip(shapes, sizes, strict=True))
    return list(zip(info["names"], shapes, strict=True)), num_bytes
