"""The engine's side of a weight sync: names are checked first, then weights are loaded, then counted.

`receive` takes a version from a trainer's channel, to which `utils.weights.sender` sends it. Nothing outside
this file calls vLLM 0.26's transfer interface (`init_weight_transfer_engine`, `start_weight_update`,
`update_weights`, `finish_weight_update`), which changed between 0.25 and 0.29.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from utils.logging_utils import get_logger
from utils.weights.buckets import BucketLayout
from utils.weights.channel import ChannelError

logger = get_logger(__name__)

# Name of our transfer engine in vLLM, whose own are called `nccl` and `ipc`.
TRANSFER_ENGINE = "channel"
NUM_NAMES_SHOWN = 4
# Old Llama checkpoints carry this buffer; no parameter of any model here.
IGNORED_SUFFIX = "rotary_emb.inv_freq"

Manifest = Sequence[tuple[str, Sequence[int]]]


@dataclass(frozen=True)
class WeightUpdateReport:
    """What one complete update brought: named parameters, their bytes as sent, and the version they are.

    num_verified: parameters whose checksum was compared with the trainer's, in every worker of the engine.
    """

    num_params: int
    num_bytes: int
    version: int
    num_verified: int = 0


class WeightUpdateError(ValueError):
    """An update that was refused or broke off; the engine generates again only after a complete one."""


def manifest_problems(expected: Mapping[str, Sequence[int]], manifest: Manifest) -> list[str]:
    """Return every difference between `manifest` and the `expected` names and shapes."""
    counts = Counter(name for name, _ in manifest)
    wrong_shapes = [
        f"{name} is {tuple(shape)}, not {tuple(expected[name])}"
        for name, shape in manifest
        if name in expected and tuple(shape) != tuple(expected[name])
    ]
    groups = {
        "missing": [name for name in expected if name not in counts],
        "unexpected": [name for name in counts if name not in expected],
        "sent more than once": [name for name, count in counts.items() if count > 1],
        "wrong shape": wrong_shapes,
    }
    return [f"{len(names)} {what}: {_shorten(names)}" for what, names in groups.items() if names]


def _shorten(names: list[str]) -> str:
    more = len(names) - NUM_NAMES_SHOWN
    return ", ".join(names[:NUM_NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def engine_info(
    infos: Sequence[dict[str, Any] | None],
    backend: str,
    engine_index: int,
    tensor_parallel_size: int = 1,
) -> dict[str, Any]:
    """What engine `engine_index` needs to join, from what each trainer rank's `WeightSender.open` returned.

    nccl, gloo: all workers of all engines join rank 0's channel. ipc: worker w (counted over all engines) joins the
    channel of trainer rank w, which must be on the same GPU.
    """
    workers = range(engine_index * tensor_parallel_size, (engine_index + 1) * tensor_parallel_size)
    senders = [(infos[w], 1) if backend == "ipc" else (infos[0], 1 + w) for w in workers]
    joins = [
        {"address": info["address"], "rank": rank} for info, rank in senders if info is not None
    ]
    assert len(joins) == len(senders), "an engine's trainer rank has opened no channel"
    first = senders[0][0]
    assert first is not None
    return {"layout": first["layout"], "joins": joins}


class WeightReceiver:
    """Brings one engine from policy version to policy version.

    `expected` maps every parameter's checkpoint name to its shape. `problem` is None while the weights are those of
    `version`, else it says why not.
    """

    def __init__(
        self, llm: Any, expected: Mapping[str, Sequence[int]], backend: str | None
    ) -> None:
        self.llm = llm
        self.expected = {
            name: tuple(s) for name, s in expected.items() if not name.endswith(IGNORED_SUFFIX)
        }
        self.backend = backend
        self.version = 0
        self.problem: str | None = None
        self._manifest: list[tuple[str, tuple[int, ...]]] | None = None

    def init(self, backend: str, info: dict[str, Any]) -> None:
        """Open the connection to the trainer; `info` is `engine_info`'s.

        Raises ValueError for another backend than the engine's, RuntimeError when the trainer is not reached.
        """
        if backend != self.backend:
            raise ValueError(
                f"weight transfer backend {backend!r} was asked for, but the engine was built for {self.backend!r}: "
                "set EngineConfig.weight_transfer_backend"
            )
        self._manifest = None
        self.llm.init_weight_transfer_engine({"init_info": info})
        if problem := self._worker_problem():
            raise ChannelError(problem)
        self._manifest = BucketLayout.from_dict(info["layout"]).manifest

    def receive(self, version: int) -> WeightUpdateReport:
        """Receive `version` from the trainer's channel, while every trainer rank sends it.

        Names and shapes are checked before anything is overwritten; the trainer hears a refusal. Raises
        WeightUpdateError when they are wrong, when another end refuses, when a checksum differs and when the trainer
        does not answer in time.
        """
        if self._manifest is None:
            raise ValueError(
                f"no channel is open for weight transfer backend {self.backend!r}: init_weight_transfer"
            )
        problems = manifest_problems(self.expected, self._manifest)
        refusal = "; ".join(problems) or None
        self.problem = f"the update to version {version} broke off half-way"
        self.llm.start_weight_update()
        self.llm.update_weights({"update_info": {"version": version, "refusal": refusal}})
        self.llm.finish_weight_update()
        if problems:
            self._refuse(version, "nothing was overwritten", problems)
        if problem := self._worker_problem():
            self.problem = f"the weight update to version {version} failed: {problem}"
            raise WeightUpdateError(self.problem)
        report = self._worker_report(version)
        self._accept(version)
        return report

    def _worker_problem(self) -> str | None:
        """What kept the engine's workers from joining or receiving."""
        return (
            "; ".join(sorted({text for text in self.llm.collective_rpc(_problem_of) if text}))
            or None
        )

    def _worker_report(self, version: int) -> WeightUpdateReport:
        """What the engine's workers report, which must be the same and complete."""
        reports = self.llm.collective_rpc(_received_by)
        report = WeightUpdateReport(**reports[0])
        if any(other != reports[0] for other in reports) or (report.version, report.num_params) != (
            version,
            len(self.expected),
        ):
            self._refuse(version, "its workers disagree", [str(other) for other in reports])
        return report

    def _accept(self, version: int) -> None:
        # Prefix, image and encoder caches would hold results of the old weights.
        self.llm.reset_prefix_cache()
        self.llm.llm_engine.reset_mm_cache()
        self.llm.llm_engine.reset_encoder_cache()
        self.version, self.problem = version, None

    def _refuse(self, version: int, state: str, problems: list[str]) -> None:
        self.problem = f"the weight update to version {version} failed ({state}): " + "; ".join(
            problems
        )
        raise WeightUpdateError(
            f"{self.problem}. Send every parameter once, by its checkpoint name"
        )


def _problem_of(worker: Any) -> str | None:
    """What kept a worker from its last operation; runs in the worker."""
    return worker.weight_transfer_engine.problem


def _received_by(worker: Any) -> dict[str, int]:
    """What a worker's last update brought; runs in the worker."""
    return asdict(worker.weight_transfer_engine.received)


def register_transfer_engine() -> None:
    """Tell vLLM, in this process, about the engine that receives through channels; may be repeated."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    if TRANSFER_ENGINE not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(
            TRANSFER_ENGINE, "utils.weights.vllm_engine", "ChannelWeightTransferEngine"
        )
