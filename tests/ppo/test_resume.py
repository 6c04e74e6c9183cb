"""Which checkpoint a run goes on from, what keeps it from that, and what it takes out of the run's folder."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from torch.distributed import checkpoint as dcp

import ppo_vllm_ray_fsdp_vla as driver
from ppo import resume
from ppo.batch import required_tensors
from ppo.reporting import BestReturn
from ppo.state_checks import WORKER_STATISTICS
from ppo.utils.curriculum import Curriculum
from prismatic.model_files import CHECKSUMS_NAME, write_checksums

pytestmark = pytest.mark.filterwarnings("ignore:torch.distributed is disabled")

ARGS = driver.Args(exp_id="run")
RUNNING = {"request": [1, None, 5], "next_request": [0, None, 6], "actions": "AACAPwAAgD8AAIA/AACAPwAAgD8AAIA/AACAPw==",
           "image": "0" * 16}  # fmt: skip
NUM_ENVS = ARGS.local_rollout_batch_size
OLD_WORLD = {
    "num_episodes": [2] * NUM_ENVS,
    "running": [RUNNING] * NUM_ENVS,
    "num_replaced": 0,
    "num_not_repeated": 0,
}
EPISODE = {
    "start_step": 9,
    "task_id": 0,
    "init_state_id": None,
    "seed": 1,
    "success": True,
    "length": 3,
    "episode_return": 1.0,
}
WORLD = OLD_WORLD | {"num_steps": 24, "ended": [EPISODE]}
ROLLOUT = {
    "episodes": [EPISODE],
    "worker_stats": [dict.fromkeys(WORKER_STATISTICS, 2.0)],
    "metrics": {"sync/mib": 1.5},
}


def make_state(step: int = 2, num_minibatches: int | None = None, **changes) -> resume.RunState:
    values = {
        "num_trainers": 1, "flags": dataclasses.asdict(ARGS), "best": BestReturn(0.1, 3).state_dict(),
        "curriculum": Curriculum(2).state_dict(), "worlds": [WORLD],
        "rollout": None if num_minibatches is None else ROLLOUT,
    }  # fmt: skip
    return resume.RunState(step, num_minibatches, **(values | changes))


def write_checkpoint(exp_dir: Path, state: resume.RunState) -> Path:
    folder = exp_dir / state.name / resume.STATE_DIR
    folder.mkdir(parents=True)
    state.write(folder)
    tensors, update = {"policy.weight.x": torch.arange(100)}, None
    if state.num_minibatches is not None:
        num_done = {"value": state.num_minibatches, "policy": 0}
        update = {"num_done": num_done, "averages": {"sums": {}, "maxima": {}}}
        tensors |= {f"rank_0.update.{name}": torch.zeros(2) for name in required_tensors()}
    (folder / "rank_0.json").write_text(json.dumps({"update": update}))
    dcp.save(tensors, checkpoint_id=folder, no_dist=True)
    return folder.parent


def test_a_state_is_read_as_it_was_written(tmp_path):
    for state in (make_state(), make_state(3, 0), make_state(3, 12)):
        checkpoint = write_checkpoint(tmp_path, state)
        read = resume.RunState.read(checkpoint)
        assert json.dumps(dataclasses.asdict(read)) == json.dumps(dataclasses.asdict(state))
        assert resume.checkpoint_problems(checkpoint) == []
    assert [p.name for p in resume.checkpoints(tmp_path)] == [
        "step_2",
        "step_3_minibatch_0",
        "step_3_minibatch_12",
    ]
    assert resume.Collected.from_json(ROLLOUT).to_json()["metrics"] == ROLLOUT["metrics"]


def test_a_checkpoint_that_counts_optimizer_steps_can_still_be_resumed(tmp_path):
    checkpoint = write_checkpoint(tmp_path, make_state())
    file = checkpoint / resume.STATE_DIR / "rank_0.json"
    old = {"optimizer_steps": {"policy": 1, "critic": 1}, "update": None}
    file.write_text(json.dumps(old))
    assert resume.checkpoint_problems(checkpoint) == []
    file.write_text(json.dumps({"optimizer_steps": {"policy": 1, "critic": 1}}))
    assert "has no update" in resume.checkpoint_problems(checkpoint)[0]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s.update(format=99), "not of format 1 or 2"),
        (lambda s: s["worlds"][0].pop("ended"), r"worlds\[0\] has no ended"),
        (lambda s: s["worlds"][0].update(ended=[{"task_id": 0}]), r"ended\[0\] has no seed"),
        (lambda s: s["worlds"][0].update(num_steps=-1), "num_steps is -1"),
        (lambda s: s.update(format=1, worlds=[None]), "damaged: TypeError"),
        (lambda s: s.pop("worlds"), "worlds missing or unknown"),
        (lambda s: s.update(step=-1), "damaged"),
        (lambda s: s.update(step="2"), "damaged"),
        (lambda s: s.update(num_minibatches=3), "an update under way needs its rollout"),
        (lambda s: s["worlds"][0].pop("running"), r"worlds\[0\] has no running"),
        (lambda s: s["worlds"][0]["running"][0].update(actions="AACA"), "damaged"),
        (lambda s: s["best"].pop("average"), "best has no average"),
        (lambda s: s["curriculum"].update(extra=1), "curriculum has 'extra', which is unknown"),
        (lambda s: s.update(worlds=3), "damaged"),
    ],
)
def test_a_damaged_state_is_refused_with_its_name(tmp_path, change, message):
    checkpoint = write_checkpoint(tmp_path, make_state())
    file = checkpoint / resume.STATE_DIR / resume.STATE_FILE
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=message) as error:
        resume.RunState.read(checkpoint)
    assert str(file) in str(error.value)


@pytest.mark.parametrize("num_minibatches", [None, 3])
def test_a_state_of_format_1_is_read_without_its_ema_which_began_with_successes(
    tmp_path, num_minibatches
):
    checkpoint = write_checkpoint(tmp_path, make_state(2, num_minibatches))
    file = checkpoint / resume.STATE_DIR / resume.STATE_FILE
    content = json.loads(file.read_text()) | {"format": 1, "worlds": [OLD_WORLD]}
    content["best"] = {"ema": 1.0, "best": 1.0, "last_saved_step": 2}
    if content["rollout"] is not None:
        content["rollout"]["episodes"][0].pop("start_step")
    file.write_text(json.dumps(content))
    state = resume.RunState.read(checkpoint)
    num_steps = ARGS.num_steps * (2 if num_minibatches is None else 3)
    assert state.worlds == [OLD_WORLD | {"num_steps": num_steps, "ended": []}]
    best = BestReturn(0.1, 3)
    best.load_state_dict(state.best)
    assert best == BestReturn(0.1, 3), "a best of 1.0 would never be beaten"
    if state.rollout is not None:
        (episode,) = resume.Collected.from_json(state.rollout).episodes
        assert episode.start_step == num_steps - EPISODE["length"]
    state.write(file.parent)
    assert resume.RunState.read(checkpoint) == state


@pytest.mark.parametrize("damage", ["state.json", "rank_0.json", ".metadata", "__0_0.distcp"])
def test_the_newest_whole_checkpoint_is_taken(tmp_path, damage):
    exp_dir = tmp_path / "run"
    assert resume.find_checkpoint("auto", exp_dir) == (None, [])
    older, newer = (write_checkpoint(exp_dir, make_state(step)) for step in (9, 10))
    (exp_dir / ".step_11.partial" / resume.STATE_DIR).mkdir(parents=True)  # a crash while writing
    (exp_dir / "step_12").mkdir()  # only a policy
    for name in ("auto", str(exp_dir), str(newer)):
        assert resume.find_checkpoint(name, exp_dir) == (newer, [])
    file = newer / resume.STATE_DIR / damage
    file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    for name in ("auto", str(exp_dir)):
        assert resume.find_checkpoint(name, exp_dir) == (older, [])
    _, (problem, *_) = resume.find_checkpoint(str(newer), exp_dir)  # who names one gets no other
    assert damage in problem
    write_checksums(older)
    assert resume.find_checkpoint("auto", exp_dir) == (older, [])
    data = older / resume.STATE_DIR / "__0_0.distcp"
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    found, (problem,) = resume.find_checkpoint("auto", exp_dir)
    assert found is None and f"{data} is not what was written" in problem
    (older / CHECKSUMS_NAME).unlink()
    (older / resume.STATE_DIR / "rank_0.json").unlink()
    found, (problem,) = resume.find_checkpoint("auto", exp_dir)
    assert found is None and "no checkpoint of" in problem and "rank_0.json" in problem
    assert "no checkpoint step_<N>" in resume.find_checkpoint(str(tmp_path), tmp_path)[1][0]


def test_flags_that_may_not_change_are_refused_all_at_once():
    saved = make_state()
    changes = {
        "lora_rank": 8,
        "seed": 3,
        "task_ids": (1, 2),
        "learning_rate": 1.0,
        "exp_id": "other",
        "num_epochs": 9,
    }
    flags = dataclasses.asdict(dataclasses.replace(ARGS, **changes))
    problems = resume.flag_problems(saved, flags)
    assert len(problems) == 3
    for name in ("lora_rank", "seed", "task_ids"):
        assert any(problem.startswith(f"--{name} is ") for problem in problems)
    assert "--lora_rank is 8, the resumed run has 32: the saved weights are of it" in problems[0]
    assert resume.changed_flags(saved, flags)["learning_rate"] == (2e-5, 1.0)
    assert "exp_id" not in resume.changed_flags(saved, flags)
    within = resume.flag_problems(make_state(2, 5), flags)
    assert len(within) == 4 and "--num_epochs is 9" in within[-1]
    read = json.loads(json.dumps(saved.flags))  # a tuple comes back as a list
    assert resume.changed_flags(make_state(flags=read), dataclasses.asdict(ARGS)) == {}


def test_a_hub_id_is_compared_by_its_commit_wherever_the_cache_lies():
    commits = ["1" * 40, "2" * 40]
    recorded = dataclasses.asdict(ARGS) | {"vla_path": "openvla/x", "revision": commits[0]}
    saved = make_state(flags=recorded)
    for home in ("/home/a", "/home/b"):
        same, other = (f"{home}/hub/models--openvla--x/snapshots/{commit}" for commit in commits)
        now = dataclasses.asdict(ARGS) | {"vla_path": same}
        assert resume.changed_flags(saved, now) == {}
        (problem,) = resume.flag_problems(saved, now | {"vla_path": other})
        assert (
            f"--vla_path is openvla/x@{commits[1]}, the resumed run has openvla/x@{commits[0]}"
            in problem
        )
    folder = dataclasses.asdict(ARGS) | {"vla_path": "openvla/x"}  # a folder of that name
    assert resume.flag_problems(saved, folder)


def test_every_flag_named_here_exists():
    named = {
        name for names in (resume.FIXED_FLAGS | resume.UPDATE_FLAGS).values() for name in names
    }
    named |= {*resume.PATH_FLAGS, *resume.SILENT_FLAGS}
    assert named <= {field.name for field in dataclasses.fields(driver.Args)}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"resume": "auto", "exp_id": None}, "--resume auto needs --exp_id"),
        ({"resume": "auto", "overwrite": True}, "--overwrite deletes the run"),
        ({"resume": "runs/other/step_3"}, "goes on in runs/other: leave --exp_id run out"),
        ({"resume": "runs/other"}, "goes on in runs/other"),
        ({"keep_last": -1}, "--keep_last -1"),
    ],
)
def test_flags_that_do_not_go_with_resume_are_refused(changes, message):
    driver.validate(dataclasses.replace(ARGS, resume="auto"))
    driver.validate(dataclasses.replace(ARGS, resume="runs/run/step_3_minibatch_4"))
    with pytest.raises(ValueError, match=message):
        driver.validate(dataclasses.replace(ARGS, **changes))


def test_what_came_after_the_checkpoint_is_put_aside(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [f'{{"step": {step}}}\n' for step in (1, 2, 3)] + [
        '{"step": 3, "eval/success_rate": 1}\n',
        '{"step": 4, "tr',
    ]
    for name in ("step_2", "step_2_minibatch_7", "step_3", "step_10", "best_return"):
        (tmp_path / name).mkdir()
    file.write_text("".join(lines))
    resume.cut_after(tmp_path, 3, tmp_path / "step_3")
    assert file.read_text() == "".join(lines[:3])
    assert (tmp_path / "cut/1/metrics.jsonl").read_text() == "".join(lines[3:])
    assert sorted(p.name for p in (tmp_path / "cut/1").iterdir()) == ["metrics.jsonl", "step_10"]
    resume.cut_after(tmp_path, 2, tmp_path / "step_2")
    assert file.read_text() == "".join(lines[:2])
    assert sorted(p.name for p in (tmp_path / "cut/2").iterdir()) == [
        "metrics.jsonl",
        "step_2_minibatch_7",
        "step_3",
    ]
    resume.cut_after(tmp_path, 2, tmp_path / "step_2")
    assert not (tmp_path / "cut/3").exists(), "there was nothing to cut"
    resume.cut_after(tmp_path, 0, None)  # a run that had saved nothing begins again
    assert (
        file.read_text() == ""
        and not (tmp_path / "step_2").exists()
        and (tmp_path / "best_return").exists()
    )


def test_old_checkpoints_go_when_newer_ones_are_whole(tmp_path):
    names = ["step_9", "step_10_minibatch_4", "step_20", "step_30"]
    for name in names:
        (tmp_path / name).mkdir()
    resume.remove_old(tmp_path, 0)
    assert [p.name for p in resume.step_folders(tmp_path)] == ["step_9", "step_20", "step_30"]
    (tmp_path / "step_30_minibatch_1").mkdir()
    resume.remove_old(tmp_path, 2)
    assert [p.name for p in resume.step_folders(tmp_path)] == ["step_30", "step_30_minibatch_1"]
