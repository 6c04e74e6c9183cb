"""Models of the hub: downloaded from a server on loopback by the real library, each time in a process of its own."""

import dataclasses
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from prismatic.model_files import write_checksums
from tests import hub_server
from utils import hub
from utils.checkpoint_utils import check_model_dir

ROOT = Path(__file__).parents[2]
HUB_ID = "openvla/tiny"
FETCH = """
import sys
from utils import hub
try:
    print(hub.fetch(sys.argv[1], sys.argv[2] or None))
except hub.HubError as error:
    sys.exit(f"refused: {error}")
"""


@pytest.fixture(scope="module")
def published(tiny_model_dir, tmp_path_factory) -> Path:
    """A model folder as on the hub, with code, pickled weights and another checkpoint in it."""
    folder = tmp_path_factory.mktemp("published") / "model"
    shutil.copytree(tiny_model_dir, folder)
    (folder / "modeling_prismatic.py").write_text("raise SystemExit('code of the hub was run')\n")
    (folder / "README.md").write_text("# a model\n")
    (folder / "pytorch_model.bin").write_bytes(b"pickle")
    (folder / "training_state").mkdir()
    (folder / "training_state/model.safetensors").write_bytes(b"other weights")
    return folder


@pytest.fixture
def server(published):
    with hub_server.serving() as server:
        server.add(HUB_ID, published)
        yield server


def fetch(server, home: Path, hub_id: str = HUB_ID, revision: str = "", **variables: str):
    return subprocess.run(
        [sys.executable, "-c", FETCH, hub_id, revision],
        cwd=ROOT,
        env=hub_server.environment(server, home, **variables),
        capture_output=True,
        text=True,
    )


def folder_of(result) -> Path:
    assert result.returncode == 0, result.stderr
    return Path(result.stdout.strip())


def refusal(result) -> str:
    """The message with which a fetch was refused."""
    assert result.returncode == 1 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.partition("refused: ")[2]


def test_a_model_is_downloaded_without_code_and_pickles_and_loads(server, published, tmp_path):
    folder = folder_of(fetch(server, tmp_path))
    assert server.fetched() == {
        p.name for p in published.glob("*") if p.suffix in (".json", ".safetensors")
    }
    assert {p.name for p in folder.iterdir()} == server.fetched()
    assert (folder / "model.safetensors").is_symlink()  # into the cache's blobs
    assert (folder / "model.safetensors").read_bytes() == (
        published / "model.safetensors"
    ).read_bytes()
    assert check_model_dir(folder) == []
    assert hub.source_of(folder) == hub.Source(HUB_ID, hub_server.COMMIT)


def test_an_oft_checkpoint_is_refused_before_anything_is_downloaded(server, published, tmp_path):
    folder = shutil.copytree(published, tmp_path / "oft")
    (folder / "action_head--100_checkpoint.pt").write_bytes(b"a network")
    server.add("someone/oft", folder)
    message = refusal(fetch(server, tmp_path / "home", "someone/oft"))
    assert "OpenVLA-OFT checkpoint (action_head--100_checkpoint.pt)" in message
    assert server.fetched() == set()


def test_a_second_fetch_downloads_nothing(server, tmp_path):
    folder = folder_of(fetch(server, tmp_path))
    server.requests.clear()
    assert folder_of(fetch(server, tmp_path)) == folder
    assert not server.fetched()


def test_a_revision_is_a_branch_or_a_commit(server, published, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(published, other)
    (other / "dataset_statistics.json").write_text("{}")
    server.add(HUB_ID, other, hub_server.OTHER_COMMIT, "v2")
    for revision in ("v2", hub_server.OTHER_COMMIT):
        folder = folder_of(fetch(server, tmp_path / revision, revision=revision))
        assert folder.name == hub_server.OTHER_COMMIT
        assert (folder / "dataset_statistics.json").read_text() == "{}"
    assert folder_of(fetch(server, tmp_path / "main")).name == hub_server.COMMIT


def test_the_token_is_sent_and_a_restricted_model_says_how_to_get_it(server, tmp_path):
    server.gated.add(HUB_ID)
    for variables in ({}, {"HF_TOKEN": "hf_of_somebody_else"}):
        message = refusal(fetch(server, tmp_path, **variables))
        assert f"Accept its terms at {server.url}/{HUB_ID} and set HF_TOKEN" in message
    assert folder_of(fetch(server, tmp_path, HF_TOKEN=server.token)).is_dir()
    assert server.requests[-1][2] == server.token


def test_offline_a_cached_model_is_found_and_a_missing_one_refused(server, tmp_path):
    message = refusal(fetch(server, tmp_path, HF_HUB_OFFLINE="1"))
    assert "HF_HUB_OFFLINE forbids downloads" in message and str(tmp_path / "hub") in message
    folder = folder_of(fetch(server, tmp_path))
    server.requests.clear()
    assert folder_of(fetch(server, tmp_path, HF_HUB_OFFLINE="1")) == folder
    assert not server.requests
    (folder / "model.safetensors").unlink()
    assert "only part of it is in the cache" in refusal(fetch(server, tmp_path, HF_HUB_OFFLINE="1"))


@pytest.mark.parametrize(
    ("hub_id", "revision", "variables", "message"),
    [
        (HUB_ID, "v9", {}, "there is no revision v9. Choose a branch"),
        (HUB_ID, "../x", {}, "is no name of a branch"),
        ("openvla/tyni", "", {}, "no such folder here, and http"),
        (HUB_ID, "", {"HF_ENDPOINT": "http://127.0.0.1:9"}, "http://127.0.0.1:9 cannot be reached"),
    ],
)
def test_what_cannot_be_had_is_refused_with_what_to_do(
    server, tmp_path, hub_id, revision, variables, message
):
    assert message in refusal(fetch(server, tmp_path, hub_id, revision, **variables))


def test_a_file_cut_short_on_its_way_is_refused(server, tmp_path):
    server.cut.add("model.safetensors")
    assert "the download failed" in refusal(fetch(server, tmp_path))


def test_a_file_cut_short_on_the_hub_is_refused_like_that_of_any_folder(server, tmp_path):
    server.truncated.add("model.safetensors")
    (problem,) = check_model_dir(folder_of(fetch(server, tmp_path)))
    assert "model.safetensors cannot be read" in problem


def test_checksums_may_list_code_that_is_not_downloaded(server, published, tmp_path):
    ours = tmp_path / "ours"
    shutil.copytree(published, ours, ignore=shutil.ignore_patterns("training_state", "*.bin"))
    write_checksums(ours)
    server.add("me/ours", ours)
    folder = folder_of(fetch(server, tmp_path, "me/ours"))
    assert check_model_dir(folder) == []
    (folder / "tokenizer.json").unlink()
    assert "tokenizer.json is missing" in check_model_dir(folder)[0]


def test_bytes_are_logged_where_there_is_no_terminal(server, published, tmp_path):
    with (published / "model.safetensors").open("rb") as file:
        num_mb = file.seek(0, 2) // 10**6
    assert num_mb >= 1
    result = subprocess.run(
        [sys.executable, "-c", f"from utils import progress\nprogress.LOG_INTERVAL_S = 0\n{FETCH}", HUB_ID, ""],
        cwd=ROOT, env=hub_server.environment(server, tmp_path), capture_output=True, text=True,
    )  # fmt: skip
    assert f"{num_mb} of {num_mb} MB, about 0:00 left" in result.stderr
    assert "\r" not in result.stderr


@pytest.mark.parametrize(
    "path",
    [
        "runs",
        "./runs/sft",
        "runs/sft/",
        "~/models/sft",
        "/models/sft",
        "a/b/c",
        "a--b/c",
        "..",
        "",
        "a b/c",
    ],
)
def test_a_path_is_never_looked_up(path):
    assert not hub.is_hub_id(path) and not hub.is_hub_id(hub.parse_model_path(path))


def test_what_is_on_this_machine_wins_over_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub.is_hub_id(HUB_ID) and hub.is_hub_id(hub.parse_model_path(HUB_ID))
    (tmp_path / HUB_ID).mkdir(parents=True)
    assert not hub.is_hub_id(HUB_ID)


@dataclasses.dataclass(frozen=True)
class Flags:
    vla_path: str
    revision: str | None = None
    load_adapter_checkpoint: str | None = None
    adapter_revision: str | None = None


def test_a_revision_without_a_hub_id_is_refused():
    with pytest.raises(hub.HubError) as raised:
        hub.fetch_models(Flags("./sft"), {"vla_path": "v1", "load_adapter_checkpoint": "v2"})
    assert str(raised.value).splitlines() == [
        "--revision v1 is for a hub id, but --vla_path is ./sft, which is a path: leave --revision out",
        "--adapter_revision v2 is for a hub id, but --load_adapter_checkpoint is not given: "
        "leave --adapter_revision out",
    ]


def test_a_snapshot_is_recorded_by_hub_id_and_commit():
    folder = f"/cache/hub/models--openvla--tiny/snapshots/{hub_server.COMMIT}"
    flags = dataclasses.asdict(Flags(folder, load_adapter_checkpoint="runs/adapter"))
    assert hub.recorded_flags(flags) == {
        "vla_path": HUB_ID, "revision": hub_server.COMMIT,
        "load_adapter_checkpoint": "runs/adapter", "adapter_revision": None,
    }  # fmt: skip
    assert hub.recorded_path(folder) == {"path": HUB_ID, "revision": hub_server.COMMIT}
    assert hub.model_name(folder) == "tiny" == hub.model_name(HUB_ID)
    assert hub.source_of("/models/tiny") is hub.source_of(f"/snapshots/{hub_server.COMMIT}") is None


def test_one_model_is_the_same_in_every_cache_and_in_the_records():
    folders = [
        f"{home}/hub/models--openvla--tiny/snapshots/{hub_server.COMMIT}" for home in ("/a", "/b")
    ]
    same = {hub.identity(folder) for folder in folders} | {hub.identity(HUB_ID, hub_server.COMMIT)}
    assert same == {f"{HUB_ID}@{hub_server.COMMIT}"}
    assert hub.identity(HUB_ID, hub_server.OTHER_COMMIT) not in same
    assert hub.identity("runs/sft") == str(Path("runs/sft").absolute())
