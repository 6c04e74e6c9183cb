"""LIBERO's own environment, as its users make it, for comparison: a program of its own, because ours switches drawing
off inside robosuite.

    python tests/plain_libero.py played.npz seen.npz

`played.npz`: suite, task_id, init_state_id, seed, num_wait, actions (T, 7) float32, pictured (the numbers of steps that
are drawn). `seen.npz` gets states, rewards, dones, what the robot's sensors say, and the pictures, rotated by 180
degrees as OpenVLA's evaluation does.
"""

import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from ppo.envs import libero_install  # noqa: E402 (the project's root must be on the path)

SETTLE = [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, -1.0]
CAMERAS = ["agentview", "robot0_eye_in_hand"]


def blank(_cache: dict) -> np.ndarray:
    return np.zeros((256, 256, 3), dtype=np.uint8)


blank.__modality__ = "image"  # type: ignore[attr-defined]


class Recorder:
    """Plays one episode and keeps what it sees."""

    def __init__(self, env: Any) -> None:
        self.env = env
        self.seen: dict[str, list] = {}
        self.cameras = {
            f"{name}_image": env.env._observables[f"{name}_image"]._sensor for name in CAMERAS
        }

    def draw(self, is_wanted: bool) -> None:
        """Whether the cameras draw from now on, which takes most of the time; when they are asked does not change."""
        for name, camera in self.cameras.items():
            self.env.env.modify_observable(name, "sensor", camera if is_wanted else blank)

    def note(self, **values: Any) -> None:
        for name, value in values.items():
            self.seen.setdefault(name, []).append(np.asarray(value))

    def note_state(self) -> None:
        data = self.env.sim.data
        self.note(qpos=data.qpos.copy(), qvel=data.qvel.copy())

    def note_pictures(self, observation: dict[str, np.ndarray]) -> None:
        """What the cameras saw within the step, and what is to be seen at its end."""
        for camera in CAMERAS:
            seen_now = self.env.sim.render(camera_name=camera, width=256, height=256)
            pictures = {camera: observation[f"{camera}_image"], f"{camera}_at_end": seen_now}
            self.note(**{name: picture[::-1, ::-1] for name, picture in pictures.items()})

    def note_sensors(self, observation: dict[str, np.ndarray]) -> None:
        sensors = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos", "robot0_joint_pos")
        self.note(**{name: observation[name] for name in sensors})


def play(played: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    from libero.libero import benchmark
    from libero.libero.envs import OffScreenRenderEnv

    suite = benchmark.get_benchmark_dict()[str(played["suite"])]()
    task_id, pictured = int(played["task_id"]), set(played["pictured"].tolist())
    env = OffScreenRenderEnv(
        bddl_file_name=suite.get_task_bddl_file_path(task_id),
        camera_heights=256,
        camera_widths=256,
        ignore_done=True,
    )
    env.seed(int(played["seed"]))
    env.reset()
    recorder = Recorder(env)
    recorder.note(body_pos=env.sim.model.body_pos.copy())
    observation = env.set_init_state(
        suite.get_task_init_states(task_id)[int(played["init_state_id"])]
    )
    recorder.draw(False)
    for _ in range(int(played["num_wait"])):
        observation, *_ = env.step(SETTLE)
    recorder.note_state()
    for number, action in enumerate(played["actions"], start=1):
        recorder.draw(number in pictured)
        observation, reward, done, _ = env.step(action)
        recorder.note_state()
        recorder.note(rewards=reward, dones=done)
        if number in pictured:
            recorder.note_pictures(observation)
            recorder.note_sensors(observation)
    layout = play_layout(env, played)
    return {name: np.stack(values) for name, values in (recorder.seen | layout).items()}


def play_layout(env: Any, played: dict[str, np.ndarray]) -> dict[str, list]:
    """The layout that the seed draws, after a hard reset and without a fixed state, settled and stepped a little."""
    env.seed(int(played["seed"]))
    env.reset()
    recorder = Recorder(env)
    recorder.draw(False)
    for action in [SETTLE] * int(played["num_wait"]) + list(played["actions"][:5]):
        recorder.note(layout_qpos=env.sim.data.qpos.copy())
        env.step(action)
    return recorder.seen


def main() -> None:
    libero_install.prepare()
    seen: dict[str, Any] = play(dict(np.load(sys.argv[1])))
    np.savez(sys.argv[2], **seen)


if __name__ == "__main__":
    main()
