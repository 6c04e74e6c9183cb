"""Models named by their Hugging Face hub id (`openvla/openvla-7b`): downloaded once, then used as local folders.

`fetch_models` replaces the ids among a program's flags by the folders of their snapshots in the hub's cache, before
anything else reads them. A snapshot's path holds its id and commit (`models--OWNER--NAME/snapshots/COMMIT`), so
`source_of` can tell both later, and whatever records where a model came from writes these instead of the path.

Only safetensors, JSON and the tokenizer's files are downloaded: no code, and no weights that have to be unpickled.
huggingface_hub reads HF_TOKEN, HF_ENDPOINT, HF_HOME and HF_HUB_OFFLINE.
"""

import dataclasses
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from tyro.constructors import PrimitiveConstructorSpec

from utils.command_line import CommandLineError
from utils.logging_utils import get_logger
from utils.progress import ProgressReport

logger = get_logger("hub")

# The flags that take a hub id, by the flag that chooses its revision.
REVISION_FLAGS = {
    "vla_path": "revision",
    "pretrained_checkpoint": "revision",
    "load_adapter_checkpoint": "adapter_revision",
    "adapter_dir": "adapter_revision",
}
FETCHED_FILES = ("*.safetensors", "*.json", "tokenizer.model")
# The patterns above also match files in folders below, such as other checkpoints.
IGNORED_FILES = ("*/*",)
_HUB_ID = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_REVISION = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_./+-]*")
_COMMIT = re.compile(r"[0-9a-f]{40}")

ArgsType = TypeVar("ArgsType")


class HubError(CommandLineError):
    """A hub id whose model cannot be had; the message has one problem on each line and says what to do."""


@dataclasses.dataclass(frozen=True)
class Source:
    """Where a snapshot came from: hub id and commit."""

    hub_id: str
    commit: str


def is_hub_id(path: str | Path) -> bool:
    """Whether `path` is to be looked up on the hub: OWNER/NAME, and nothing of this name is on this machine."""
    text = str(path)
    is_name = _HUB_ID.fullmatch(text) is not None and "--" not in text and ".." not in text
    return is_name and not os.path.lexists(text)


def parse_model_path(text: str) -> Path:
    """The path of a flag. What is written as a path (`./a/b`, `a/b/`) stays one: Path alone would make it `a/b`."""
    return Path(text) if _HUB_ID.fullmatch(text) else Path(text).absolute()


# A flag that takes a folder or a hub id.
ModelPath = Annotated[
    Path,
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="PATH",
        instance_from_str=lambda words: parse_model_path(words[0]),
        is_instance=lambda value: isinstance(value, Path),
        str_from_instance=lambda value: [str(value)],
    ),
]


def source_of(folder: str | Path) -> Source | None:
    """Hub id and commit of a snapshot's folder; None for any other folder."""
    path = Path(folder).absolute()
    owner = path.parent.parent.name
    if (
        not _COMMIT.fullmatch(path.name)
        or path.parent.name != "snapshots"
        or not owner.startswith("models--")
    ):
        return None
    return Source(owner.removeprefix("models--").replace("--", "/"), path.name)


def model_name(path: str | Path) -> str:
    """The last part of a folder's path, or of a model's hub id: a name for people."""
    source = source_of(path)
    return Path(source.hub_id if source else path).name


def recorded_path(path: str | Path) -> dict[str, str]:
    """What to record of a model's folder: its path, or hub id and revision (the commit)."""
    source = source_of(path)
    return {"path": source.hub_id, "revision": source.commit} if source else {"path": str(path)}


def recorded_flags(flags: Mapping[str, Any]) -> dict[str, Any]:
    """`flags` with snapshots' folders as the hub ids that they came from, and their revisions as commits."""
    recorded = dict(flags)
    for name, revision_name in REVISION_FLAGS.items():
        if recorded.get(name) is not None and (source := source_of(recorded[name])):
            recorded |= {name: source.hub_id, revision_name: source.commit}
    return recorded


def identity(path: str | Path, revision: str | None = None) -> str:
    """What tells one model from another: `OWNER/NAME@COMMIT` of a snapshot or a recorded hub id, else the full path."""
    if source := source_of(path):
        return f"{source.hub_id}@{source.commit}"
    return f"{path}@{revision}" if revision is not None else os.path.abspath(path)


def hub_flags(args: Any) -> dict[str, str]:
    """The flags of `args` whose value is a hub id, by name."""
    values = {name: getattr(args, name, None) for name in REVISION_FLAGS}
    return {name: str(value) for name, value in values.items() if value and is_hub_id(value)}


def fetch_models(args: ArgsType, revisions: Mapping[str, str | None]) -> ArgsType:
    """Return `args`, a dataclass, with each hub id replaced by the folder of its snapshot, downloaded if need be.

    `revisions` has the revision of each of the flags that take a hub id. Raises HubError with the problems of all.
    """
    flags: Any = args
    ids, folders, problems = hub_flags(args), {}, []
    for name, revision in revisions.items():
        value, revision_name = getattr(args, name), REVISION_FLAGS[name]
        if name in ids:
            try:
                folders[name] = type(value)(fetch(ids[name], revision))
            except HubError as error:
                problems.append(f"--{name} {value}: {error}")
        elif revision is not None:
            problems.append(
                f"--{revision_name} {revision} is for a hub id, but --{name} is {value or 'not given'}"
                f"{', which is a path' if value else ''}: leave --{revision_name} out"
            )
    if problems:
        raise HubError("\n".join(problems))
    return dataclasses.replace(flags, **folders)


def fetch(hub_id: str, revision: str | None = None) -> str:
    """The folder of a model's snapshot in the hub's cache, downloaded if need be. Raises HubError."""
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise HubError(f"revision {revision!r} is no name of a branch or tag, and no commit")
    # Here, because `--help` does not need it.
    import httpx2
    from huggingface_hub import constants, snapshot_download

    wanted = f"{hub_id} (revision {revision or 'main'})"
    logger.info("%s is a model of the hub: looking for it", wanted)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    options: dict[str, Any] = (
        {} if os.isatty(2) and is_first else {"tqdm_class": _logged_bar(is_first)}
    )
    try:
        if not constants.HF_HUB_OFFLINE:
            _refuse_oft(hub_id, revision)
        folder = snapshot_download(
            hub_id,
            revision=revision,
            allow_patterns=list(FETCHED_FILES),
            ignore_patterns=list(IGNORED_FILES),
            **options,
        )
    except HubError:
        raise
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError) as error:
        raise HubError(_explain(error, hub_id, revision)) from error
    logger.info("%s is in %s", wanted, folder)
    return folder


def _refuse_oft(hub_id: str, revision: str | None) -> None:
    """Raise HubError for an OpenVLA-OFT checkpoint: what shows that it is one would not be downloaded."""
    import httpx2
    from huggingface_hub import list_repo_files

    from prismatic.extern.hf.oft_checks import oft_files

    try:
        names = list_repo_files(hub_id, revision=revision)
    except (OSError, ValueError, RuntimeError, httpx2.HTTPError):
        return  # snapshot_download finds the model in the cache, or says what is wrong
    if found := oft_files(names):
        raise HubError(
            f"this is an OpenVLA-OFT checkpoint ({', '.join(found[:3])}), which is not supported: "
            "choose a plain OpenVLA"
        )


def _logged_bar(is_shown: bool) -> Any:
    """A class of bars for huggingface_hub that logs the bytes received at intervals instead of drawing."""
    from huggingface_hub.utils import tqdm as HubBar  # noqa: N812

    class LoggedBar(HubBar):
        """Its library makes three: of bytes received, bytes written and files. The second is logged, in MB."""

        def __init__(self, *args: Any, **kwargs: Any) -> None:
            is_logged = is_shown and kwargs.get("name") == "huggingface_hub.snapshot_download"
            super().__init__(*args, **kwargs | {"disable": True})
            self.num_bytes = 0
            self.report = ProgressReport(logger, "MB", 0) if is_logged else None

        def update(self, n: float | None = 1) -> bool | None:
            if self.report is not None:
                self.num_bytes += int(n or 0)
                self.report.total = (self.total or 0) // 10**6
                self.report.advance(self.num_bytes // 10**6 - self.report.num_done)
            return None

    return LoggedBar


def _explain(error: Exception, hub_id: str, revision: str | None) -> str:
    """What went wrong and what to do about it."""
    from huggingface_hub import constants, errors

    page, folder = f"{constants.ENDPOINT}/{hub_id}", "give the path of a model folder"
    if isinstance(error, errors.GatedRepoError):
        return (
            f"this model is restricted. Accept its terms at {page} and set HF_TOKEN to a token of that account, "
            f"or {folder}"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return (
            f"there is no such folder here, and {constants.ENDPOINT} does not have this model or does not show it to "
            f"you. Check the spelling, set HF_TOKEN if the model is private, or {folder}"
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return f"there is no revision {revision or 'main'}. Choose a branch, tag or commit of {page}/commits/main"
    part = (
        "only part of it is" if isinstance(error, errors.IncompleteSnapshotError) else "it is not"
    )
    at_hand = f"{part} in the cache {constants.HF_HUB_CACHE} (revision {revision or 'main'})"
    if constants.HF_HUB_OFFLINE:
        return (
            f"there is no such folder here, {at_hand}, and HF_HUB_OFFLINE forbids downloads. Unset HF_HUB_OFFLINE, "
            f"set HF_HOME to a cache that has it, or {folder}"
        )
    reason = " ".join(str(error.__cause__ or error).split())[:300]
    if isinstance(error, errors.LocalEntryNotFoundError):
        return (
            f"there is no such folder here, {at_hand}, and {constants.ENDPOINT} cannot be reached ({reason}). Check "
            f"the network and HF_ENDPOINT, or {folder}"
        )
    return f"the download failed ({type(error).__name__}: {reason}). Start again to continue it, or {folder}"
