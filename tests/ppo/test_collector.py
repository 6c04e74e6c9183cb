"""The collector over real environment processes, against the same episodes stepped one by one."""

import base64
import dataclasses
import itertools
import json
import logging
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from ppo.collector import Collector
from ppo.envs.base import ResetRequest, get_suite
from ppo.envs.vector import VectorEnv
from prismatic.extern.hf.modeling_prismatic import load_model
from prismatic.extern.hf.processing_prismatic import load_processor
from tests.worlds import UNSEEN_SUITE, PushRight

SIZE, T, B = 8, 7, 5
PROMPTS = [[1, 2], [1, 3, 4]]


def make_collector(
    suite: str, num_envs: int = B, image_size: int = SIZE, seed: int = 11, num_groups: int = 2
) -> Collector:
    vector = VectorEnv(
        suite, num_envs, num_processes=2, image_size=image_size, replacement_wait_s=500.0
    )
    return Collector(
        vector, PROMPTS, generate, decode, num_groups=num_groups, seed=(seed, 0),
        time_limit=get_suite(suite).max_steps,
    )  # fmt: skip


def token_for(prompt: list[int], image: np.ndarray) -> int:
    """A policy that depends on every input: 0 (dx < 0) or 1 (dx > 0) in the first token."""
    return (int(image.sum()) + sum(prompt)) % 2


def generate(prompt_ids, images):
    tokens = np.zeros((len(images), 7), dtype=np.int64)
    tokens[:, 0] = [token_for(p, i) for p, i in zip(prompt_ids, images, strict=True)]
    return SimpleNamespace(token_ids=tokens, logprobs=-tokens.astype(np.float32) - 1.0)


def decode(token_ids):
    actions = np.zeros((len(token_ids), 7), dtype=np.float32)
    actions[:, 0] = 2.0 * token_ids[:, 0] - 1.0
    return actions


@pytest.fixture
def collector():
    collector = make_collector("tests.worlds:SUITE")
    with collector.vector:
        yield collector


def expected_steps(requests: list[ResetRequest], num_steps: int):
    """(observation, task, token, reward, terminated, truncated, final image or None) of one environment, serially."""
    env, todo = PushRight(SIZE), iter(requests)
    request = next(todo)
    image = env.reset(request)
    for _ in range(num_steps):
        token = token_for(PROMPTS[request.task_id], image)
        result = env.step(decode(np.array([[token] + [0] * 6]))[0])
        final = result.image if result.truncated else None
        yield (
            image,
            request.task_id,
            token,
            result.reward,
            result.terminated,
            result.truncated,
            final,
        )
        image = result.image
        if result.terminated or result.truncated:
            request = next(todo)
            image = env.reset(request)


def test_two_rollouts_hold_what_serial_environments_do_and_each_episode_its_task(
    collector, monkeypatch
):
    requests: dict[int, list[ResetRequest]] = {b: [] for b in range(B)}
    original = collector._request

    def remembered(env_id, tasks):
        requests[env_id].append(original(env_id, tasks))
        return requests[env_id][-1]

    monkeypatch.setattr(collector, "_request", remembered)
    tasks = itertools.cycle([0, 1, 1])
    collected = [collector.collect(T, tasks) for _ in range(2)]
    assert len({r.seed for rs in requests.values() for r in rs}) == sum(
        map(len, requests.values())
    ), "seeds repeat"
    num_episodes = num_truncated = 0
    for b in range(B):
        for number, step in enumerate(expected_steps(requests[b], 2 * T)):
            image, task, token, reward, terminated, truncated, final = step
            rollout, t = collected[number // T][0], number % T
            np.testing.assert_array_equal(rollout.images_TBHWC[t, b].numpy(), image)
            assert (
                int(rollout.task_id_TB[t, b]) == task
                and int(rollout.action_ids_TBA[t, b, 0]) == token
            )
            assert float(rollout.logprob_TBA[t, b, 0]) == -token - 1.0
            assert float(rollout.reward_TB[t, b]) == reward
            assert (bool(rollout.terminated_TB[t, b]), bool(rollout.truncated_TB[t, b])) == (
                terminated,
                truncated,
            )
            num_episodes, num_truncated = (
                num_episodes + (terminated or truncated),
                num_truncated + truncated,
            )
            if truncated:
                row = ((rollout.final_t_K == t) & (rollout.final_b_K == b)).nonzero().item()
                np.testing.assert_array_equal(rollout.final_images_KHWC[row].numpy(), final)
    records = collected[0][1] + collected[1][1]
    assert len(records) == num_episodes > 10 and num_truncated > 0
    played = {(r.task_id, r.seed) for r in records}
    assert played <= {(r.task_id, r.seed) for rs in requests.values() for r in rs}
    first, second = collected[0][0], collected[1][0]
    assert first.episode_step_B.tolist() == [0] * B
    since_end = [
        T - 1 - max([-1, *first.done_TB[:, b].nonzero().flatten().tolist()]) for b in range(B)
    ]
    assert second.episode_step_B.tolist() == since_end == [3] * B
    np.testing.assert_array_equal(first.last_images_BHWC.numpy(), second.images_TBHWC[0].numpy())
    np.testing.assert_array_equal(first.last_task_id_B.numpy(), second.task_id_TB[0].numpy())


def test_the_policy_is_given_image_and_instruction_and_nothing_of_the_simulators_state(
    tiny_model_dir,
):
    model, processor = load_model(tiny_model_dir), load_processor(tiny_model_dir)
    prompts = [processor.prompt_ids(text) for text in UNSEEN_SUITE.instructions]

    @torch.inference_mode()
    def act(prompt_ids, images):
        ids, mask = processor.collate_prompts(prompt_ids)
        pixels = processor.image_processor.normalize(torch.from_numpy(images), torch.float32)
        logits = (
            model(input_ids=ids, attention_mask=mask, pixel_values=pixels).logits[:, -1].numpy()
        )
        distributions.append((prompt_ids, logits))
        tokens = np.zeros((len(images), 7), dtype=np.int64)
        tokens[:, 0] = np.arange(len(images)) % 2
        return SimpleNamespace(token_ids=tokens, logprobs=np.zeros((len(images), 7), np.float32))

    def play(seed):
        with VectorEnv("tests.worlds:UNSEEN_SUITE", 4, num_processes=1, image_size=28) as vector:
            collector = Collector(
                vector, prompts, act, decode, num_groups=2, seed=(seed, 0), time_limit=4
            )
            return collector.collect(T, itertools.cycle([0, 1]))[0]

    seen, rewards = [], []
    for seed in (1, 2):
        distributions: list = []
        rewards.append(play(seed).reward_TB.numpy())
        seen.append(distributions)
    assert (rewards[0] != rewards[1]).any(), "the hidden states do not differ"
    assert len(seen[0]) == len(seen[1]) == 2 * T
    for (prompts_one, logits_one), (prompts_two, logits_two) in zip(*seen, strict=True):
        assert prompts_one == prompts_two
        np.testing.assert_array_equal(logits_one, logits_two)


def test_a_dropped_episode_is_invalid_from_its_start_and_reported_nowhere():
    collector = make_collector("tests.worlds:MORTAL_SUITE", num_envs=2, seed=0, num_groups=1)
    with collector.vector:
        rollout, records = collector.collect(12, itertools.repeat(0))
        statistics = collector.statistics()
    assert (
        statistics["num_replaced"] == collector.vector.num_replaced >= 1
        and statistics["envs_gib"] > 0.02
    )
    void = ~rollout.valid_TB
    assert void.any() and not void.all()
    for b in range(2):
        for t in np.flatnonzero(void[:, b].numpy()):
            begins = t == 0 or bool(rollout.done_TB[t - 1, b])
            assert begins or void[t - 1, b], "a void step follows a valid one of the same episode"
    counted = int((rollout.done_TB & rollout.valid_TB).sum())
    assert len(records) == counted > 0


def next_rollout(suite: str, state: dict | None, first_steps: int) -> tuple[dict, list]:
    """A collector's state after `first_steps` (or after loading `state`), with the rollout and records that follow."""
    collector = make_collector(suite, image_size=16, seed=3)
    with collector.vector:
        if state is None:
            collector.collect(first_steps, itertools.cycle([0, 1]))
        else:
            collector.load_state_dict(state)
        now = collector.state_dict()
        rollout, records = collector.collect(T, itertools.cycle([1, 1, 0]))
        return now, [rollout, records, collector]


@pytest.mark.parametrize("suite", ["tests.worlds:SUITE", "tests.worlds:SPRINT_SUITE", "tabletop"])
def test_episodes_under_way_go_on_in_another_process_as_if_nothing_had_happened(suite):
    state, (rollout, records, _) = next_rollout(suite, None, 6)
    state = json.loads(json.dumps(state))
    assert any(content["actions"] for content in state["running"]), "no episode is under way"
    assert bool(state["ended"]) == (suite == "tests.worlds:SPRINT_SUITE"), "some end early there"
    loaded, (again, records_again, collector) = next_rollout(suite, state, 0)
    assert loaded == state and records == records_again and collector.num_not_repeated == 0
    for field in dataclasses.fields(rollout):
        one, two = getattr(rollout, field.name), getattr(again, field.name)
        assert torch.equal(one, two) if isinstance(one, torch.Tensor) else one == two, field.name


def test_an_episode_that_does_not_repeat_itself_begins_anew_and_is_counted(caplog, monkeypatch):
    state, (rollout, _, _) = next_rollout("tests.worlds:SUITE", None, 6)
    assert state["running"][1]["actions"]
    state["running"][1]["image"] = "0" * 16
    actions = base64.b64decode(state["running"][3]["actions"])
    state["running"][3]["actions"] = base64.b64encode(
        actions * 9
    ).decode()  # it would end on the way
    monkeypatch.setattr(logging.getLogger("ppo_vla"), "propagate", True)
    loaded, (again, _, collector) = next_rollout("tests.worlds:SUITE", state, 0)
    assert (
        collector.num_not_repeated == 2
        and "environments [1, 3] did not come to the images" in caplog.text
    )
    assert [len(loaded["running"][i]["actions"]) for i in (1, 3)] == [0, 0]
    assert loaded["running"][0] == state["running"][0]
    first = PushRight(16).reset(ResetRequest(*state["running"][1]["request"]))
    np.testing.assert_array_equal(again.images_TBHWC[0, 1].numpy(), first)
    np.testing.assert_array_equal(
        again.images_TBHWC[:, 0].numpy(), rollout.images_TBHWC[:, 0].numpy()
    )


def test_a_collector_that_has_not_begun_has_no_episodes(collector):
    state = collector.state_dict()
    assert state["running"] is None and state["num_episodes"] == [0] * B
    collector.load_state_dict(state)
    assert collector.collect(1, itertools.repeat(0))[0].images_TBHWC.shape[:2] == (1, B)


def test_episodes_are_reported_when_all_that_started_with_them_have_ended():
    """Sprints of 1 to 4 steps under a limit of 4, in rollouts of 3: an episode's start decides."""
    collector = make_collector("tests.worlds:SPRINT_SUITE")
    ended: list[tuple[int, int, bool]] = []  # start, length, success of what the environments did
    reported: list[tuple[int, int, bool]] = []
    starts = [0] * B
    with collector.vector:
        for number in range(1, 9):
            rollout, records = collector.collect(3, itertools.repeat(0))
            for t, b in (rollout.done_TB).nonzero().tolist():
                end = 3 * (number - 1) + t + 1
                ended.append((starts[b], end - starts[b], bool(rollout.terminated_TB[t, b])))
                starts[b] = end
            found = [(r.start_step, r.length, r.success) for r in records]
            assert [start for start, *_ in found] == sorted(start for start, *_ in found)
            reported += found
            due = [episode for episode in ended if episode[0] + 4 <= 3 * number]
            assert sorted(reported) == sorted(due)
    assert len({length for _, length, success in ended if success}) > 1
    early = [e for e in ended if e[0] + e[1] <= 3]
    assert early and all(success for *_, success in early), "what ends in step 1 are successes"
    first = [success for start, _, success in reported if start == 0]
    assert len(first) == B and not all(first)
