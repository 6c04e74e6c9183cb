"""The PPO update on one and two gloo ranks, over a hand-made rollout and the real tiny model."""

import dataclasses
from typing import Any

import pytest
import torch
import torch.distributed as dist

from ppo.batch import Averages, Batch
from ppo.learner import PPOLearner, Reference
from ppo.losses import explained_variance
from ppo.models import make_trainable
from tests.distributed import in_ranks
from tests.learners import (
    AFTER_ONE,
    B,
    T,
    assert_same_update,
    flags,
    make_learner,
    make_rollout,
    weights,
)


def run_and_save(rank: int, model_dir: str, out: str, changes: dict, lora: bool) -> None:
    """One update; rank 0 writes metrics and the weights after it."""
    world = dist.get_world_size()
    args = flags(**({"local_mini_batch_size": T * B // world} | changes))
    learner = make_learner(model_dir, args, lora)
    before = weights(learner)
    metrics = learner.update(make_rollout(model_dir).shard(rank, world), step=1)
    after = weights(learner)  # gathers: every rank takes part
    if rank == 0:
        torch.save({"metrics": metrics, "weights": after, "before": before}, f"{out}/{world}.pt")


def updated(tmp_path, model_dir, world_size: int, lora: bool = False, **changes) -> dict:
    in_ranks(world_size, run_and_save, str(model_dir), str(tmp_path), changes, lora)
    return torch.load(f"{tmp_path}/{world_size}.pt", weights_only=True)


@pytest.mark.parametrize("lora", [False, True])
def test_two_ranks_give_the_loss_and_weights_of_one(tmp_path, tiny_model_dir, lora):
    one = updated(tmp_path, tiny_model_dir, 1, lora)
    two = updated(tmp_path, tiny_model_dir, 2, lora)
    assert_same_update(one, two)


def test_gradient_accumulation_equals_one_large_micro_batch(tmp_path, tiny_model_dir):
    pieces = updated(tmp_path, tiny_model_dir, 1, per_device_train_batch_size=3)
    whole = updated(tmp_path, tiny_model_dir, 1, per_device_train_batch_size=T * B)
    assert_same_update(pieces, whole)


def several_checks(rank: int, model_dir: str) -> None:
    """What needs no second run: ratios, warm-up, frozen vision, invalid samples, old log-probs of the engine."""
    rollout = make_rollout(model_dir)

    # the ratio is 1 in the first minibatch of the first epoch, and not afterwards
    learner = make_learner(model_dir, flags(num_epochs=3, local_mini_batch_size=8))
    metrics = learner.update(rollout, step=1)
    assert metrics["train/first_minibatch_ratio_max_abs_dev"] < 1e-5
    assert metrics["train/ratio_max_abs_dev"] > 1e-3
    assert metrics["train/approx_kl_k3"] > 1e-8

    # critic warm-up: only the critic moves
    learner = make_learner(model_dir, flags(value_init_steps=1))
    before, metrics = weights(learner), learner.update(rollout, step=1)
    changed = {
        n.split(".")[0] for n, w in weights(learner).items() if not torch.equal(w, before[n])
    }
    assert changed == {"critic"} and "train/policy_loss" not in metrics
    learner.update(rollout, step=2)
    assert any(
        not torch.equal(w, before[n]) for n, w in weights(learner).items() if n.startswith("policy")
    )

    # samples of a dropped episode have no influence, whatever they hold
    spoilt = dataclasses.replace(
        rollout, images_TBHWC=rollout.images_TBHWC.clone(), reward_TB=rollout.reward_TB.clone()
    )
    spoilt.images_TBHWC[:2, 3] = 7
    spoilt.reward_TB[:2, 3] = 1e6
    results = []
    for data in (rollout, spoilt):
        learner = make_learner(model_dir, flags())
        learner.update(data, step=1)
        results.append(weights(learner))
    for name in results[0]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-5, atol=1e-7, msg=name
        )

    # a frozen vision backbone: features cached once give the same policy gradient as computed every time
    results = []
    for freeze in (True, False):
        learner = make_learner(model_dir, flags(freeze_vision_backbone=freeze), lora=True)
        learner.policy.model.vision_backbone.requires_grad_(False)
        learner.update(rollout, step=1)
        results.append({n: w for n, w in weights(learner).items() if "vision" not in n})
    for name in results[0]:
        torch.testing.assert_close(
            results[0][name], results[1][name], rtol=1e-5, atol=1e-6, msg=name
        )


def test_ratio_warmup_dropped_episodes_and_cached_vision_features(tiny_model_dir):
    in_ranks(1, several_checks, str(tiny_model_dir))


def advantages_by_hand(rank: int, model_dir: str) -> None:
    """prepare() puts the value of the real next observation where GAE needs it, against an explicit loop."""
    rollout, args = make_rollout(model_dir), flags(norm_adv=False)
    learner = make_learner(model_dir, args)
    batch = learner.prepare(rollout, Averages())

    def value_of(image, task) -> float:
        ids, mask = learner.processor.collate_prompts([rollout.prompts[int(task)]])
        pixels = learner.processor.image_processor.normalize(image[None])
        hidden = learner.policy.model.forward_actions(
            ids, mask, pixel_values=pixels
        ).prompt_hidden_BD
        return float(learner.critic.model(hidden))

    with torch.no_grad():
        for b in (0, 1, 2):
            advantage = 0.0
            for t in reversed(range(T)):
                value = value_of(rollout.images_TBHWC[t, b], rollout.task_id_TB[t, b])
                if rollout.terminated_TB[t, b]:
                    target, advantage = float(rollout.reward_TB[t, b]), 0.0
                elif rollout.truncated_TB[t, b]:
                    row = 0 if b == 0 else 1
                    target, advantage = (
                        args.gamma
                        * value_of(rollout.final_images_KHWC[row], rollout.task_id_TB[t, b]),
                        0.0,
                    )
                elif t == T - 1:
                    target = args.gamma * value_of(
                        rollout.last_images_BHWC[b], rollout.last_task_id_B[b]
                    )
                else:
                    target = args.gamma * value_of(
                        rollout.images_TBHWC[t + 1, b], rollout.task_id_TB[t + 1, b]
                    )
                advantage = target - value + args.gamma * args.lam * advantage
                assert batch.advantage_N[t * B + b] == pytest.approx(advantage, abs=1e-5), (t, b)


def test_advantages_use_the_real_last_observation_of_truncated_episodes(tiny_model_dir):
    in_ranks(1, advantages_by_hand, str(tiny_model_dir))


def non_finite(rank: int, model_dir: str) -> None:
    rollout = make_rollout(model_dir)
    rollout.reward_TB[0, 0] = float("nan")
    learner = make_learner(model_dir, flags(norm_adv=False, local_mini_batch_size=T * B // 2))
    with pytest.raises(
        FloatingPointError,
        match="not finite at training step 4; rank 0: 1 of 12 values of the rewards",
    ):
        learner.update(rollout.shard(rank, dist.get_world_size()), step=4)


def test_a_nan_on_one_rank_stops_every_rank_before_the_optimizer(tiny_model_dir):
    in_ranks(2, non_finite, str(tiny_model_dir))


def dropout_and_checkpointing(rank: int, model_dir: str) -> None:
    """LoRA dropout acts in the update (and only there); checkpointing recomputes Llama layers and changes nothing."""
    from transformers.models.llama.modeling_llama import LlamaDecoderLayer

    calls = [0]
    LlamaDecoderLayer.forward, original = (
        counted(LlamaDecoderLayer.forward, calls),
        LlamaDecoderLayer.forward,
    )
    results, num_calls = [], []
    for options in ({}, {"checkpointing": True}, {"dropout": 0.5}):
        learner = make_learner(model_dir, flags(), lora=True, **options)
        calls[0] = 0
        learner.update(make_rollout(model_dir), step=1)
        num_calls.append(calls[0])
        results.append(weights(learner))
        assert not learner.policy.model.training
    LlamaDecoderLayer.forward = original
    plain, checkpointed, dropped = results
    for name in plain:
        torch.testing.assert_close(checkpointed[name], plain[name], rtol=1e-5, atol=1e-7, msg=name)
    assert num_calls[1] > num_calls[0], "no layer was recomputed"
    assert any(
        not torch.allclose(dropped[n], plain[n], atol=1e-7) for n in plain if "lora_B" in n
    ), "no dropout"


def counted(function, calls):
    def wrapper(*args, **kwargs):
        calls[0] += 1
        return function(*args, **kwargs)

    return wrapper


def test_lora_dropout_and_checkpointing_act_in_the_update(tiny_model_dir):
    in_ranks(1, dropout_and_checkpointing, str(tiny_model_dir))


def importance_weights(rank: int, model_dir: str) -> None:
    """pi_old / pi_rollout per action, cut at the cap; multiplies each action's loss; logged over valid samples."""
    rollout = make_rollout(model_dir)
    learner = make_learner(model_dir, flags(async_depth=1))
    old_NA = learner.prepare(rollout, Averages()).old_logprob_NA
    # rollout log-probs such that the actions' weights are 0.5, 4 (cut at 2) and else 1
    behaviour_NA = old_NA.clone()
    behaviour_NA[3, 0] += torch.tensor(2.0).log()
    behaviour_NA[8, 6] -= torch.tensor(4.0).log()
    rollout.logprob_TBA = behaviour_NA.view(T, B, -1)
    batch = learner.prepare(rollout, Averages())
    expected_N = torch.ones(T * B)
    expected_N[3], expected_N[8] = 0.5, 2.0
    torch.testing.assert_close(batch.importance_weight_N, expected_N, rtol=1e-5, atol=1e-5)
    micro, normalizer = batch[torch.tensor([8])], torch.tensor(1.0)
    weighted = learner._policy_loss(micro, normalizer)[1]["train/policy_loss"]
    micro.importance_weight_N = None
    plain = learner._policy_loss(micro, normalizer)[1]["train/policy_loss"]
    assert float(weighted) == pytest.approx(2 * float(plain), rel=1e-4) and abs(float(plain)) > 1e-3
    metrics = learner.update(rollout, step=1)
    # samples 3 and 7 belong to the dropped episode: 22 valid ones, of which one weighs 2
    assert metrics["train/importance_weight_mean"] == pytest.approx(23 / 22, rel=1e-5)
    assert metrics["train/importance_weight_truncated_fraction"] == pytest.approx(1 / 22, rel=1e-5)


def test_importance_weights_correct_an_overlapped_rollout(tiny_model_dir):
    in_ranks(1, importance_weights, str(tiny_model_dir))


def compiled(rank: int, model_dir: str) -> None:
    """Compiled blocks give the eager update, recompute where asked to, in one shape, under the same names."""
    results = []
    compiled_options: dict[str, Any] = {"compile_backend": "aot_eager"}
    for options in (
        {},
        compiled_options,
        {**compiled_options, "checkpointing": True},
        {**compiled_options, "memory_budget": 0.2},
    ):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        learner = make_learner(
            model_dir, flags(compile="compile_backend" in options), lora=True, **options
        )
        before = weights(learner)
        learner.update(make_rollout(model_dir), step=1)
        results.append({"metrics": {}, "weights": weights(learner), "before": before})
        counts = torch._dynamo.utils.counters
        assert not counts["graph_break"]
        if options:
            # two ViTs (their adapters frozen) without gradients and with, the first block apart; one Llama layer
            frames = counts["frames"]["ok"]
            assert 0 < frames <= 8, frames
            learner.update(make_rollout(model_dir, seed=1), step=2)
            assert counts["frames"]["ok"] == frames, "a second update compiled again"
    for result in results[1:]:
        assert_same_update(results[0], result)


def test_compiled_blocks_give_the_eager_update(tiny_model_dir):
    in_ranks(1, compiled, str(tiny_model_dir))


COUNTED, IGNORED = [0, 1, 2, 5, 6], [3, 4]


def policy_results(learner: PPOLearner, micro: Batch) -> tuple[torch.Tensor, dict[str, float]]:
    """The gradient of the policy's loss on a micro-batch with respect to the logits, and the logged shares."""
    logits_BAV, original = [], learner._forward

    def forward(*args: Any) -> Any:
        out = original(*args)
        out.logits_BAV.retain_grad()
        logits_BAV.append(out.logits_BAV)
        return out

    learner._forward = forward
    loss, shares, deviation = learner._policy_loss(micro, torch.tensor(float(len(micro))))
    loss.backward()
    learner._forward = original
    numbers = {name: float(share) for name, share in shares.items()}
    return logits_BAV[0].grad, numbers | {"loss": float(loss), "deviation": float(deviation)}


def ignored_tokens(rank: int, model_dir: str) -> None:
    """Tokens that do not count: no gradient, no part in ratio, entropy or KL, whatever their log-probs are."""
    rollout = make_rollout(model_dir)
    for level in ("action", "token"):
        learner = make_learner(
            model_dir, flags(ratio_level=level, beta=0.3, entropy_coef=0.2, async_depth=1)
        )
        learner.reference = Reference(learner.policy.model)
        some = PPOLearner(
            learner.args, learner.policy, learner.critic, learner.processor,
            reference=learner.reference, counted_tokens=COUNTED,
        )  # fmt: skip
        averages = Averages()
        batch = some.prepare(rollout, averages)
        micro = batch[torch.tensor([4, 5, 9])]
        generator = torch.Generator().manual_seed(0)
        noise_BA = 0.1 * torch.randn(micro.old_logprob_NA.shape, generator=generator)
        logprob_BA = micro.old_logprob_NA.clone()
        micro.old_logprob_NA = logprob_BA - noise_BA
        micro.ref_logprob_NA = logprob_BA + noise_BA
        gradient_BAV, numbers = policy_results(some, micro)
        assert not gradient_BAV[:, IGNORED].any()
        assert all(gradient_BAV[:, token].abs().max() > 1e-6 for token in COUNTED)

        # by hand, from the log-ratios of the tokens that count
        counted_BA = noise_BA[:, COUNTED]
        ratio_BK = (counted_BA.sum(1, keepdim=True) if level == "action" else counted_BA).exp()
        assert numbers["train/ratio_mean"] == pytest.approx(float(ratio_BK.mean()), rel=1e-4)
        assert numbers["deviation"] == pytest.approx(float((ratio_BK - 1).abs().max()), rel=1e-3)
        log_ratio_B = counted_BA.sum(1)
        kl = float((log_ratio_B.exp() - 1 - log_ratio_B).mean())
        assert numbers["train/approx_kl_k3"] == pytest.approx(kl, rel=1e-3)
        ref_kl = float((counted_BA.exp() - 1 - counted_BA).sum(1).mean())
        assert numbers["train/ref_kl_k3"] == pytest.approx(ref_kl, rel=1e-3)
        surrogate_BK = torch.minimum(
            ratio_BK * micro.advantage_N[:, None],
            ratio_BK.clamp(0.8, 1.2) * micro.advantage_N[:, None],
        )
        surrogate = float((surrogate_BK.mean(1) * micro.importance_weight_N).mean())
        assert numbers["train/policy_loss"] == pytest.approx(-surrogate, rel=1e-3)
        assert numbers["loss"] == pytest.approx(
            -surrogate - 0.2 * numbers["train/entropy"] + 0.3 * ref_kl, rel=1e-3
        )
        weight_B = (
            (batch.old_logprob_NA - rollout.logprob_TBA.flatten(0, 1))[:, COUNTED].sum(1).exp()
        )
        torch.testing.assert_close(
            batch.importance_weight_N, weight_B.clamp(max=2.0), rtol=1e-5, atol=1e-6
        )

        for name in ("old_logprob_NA", "ref_logprob_NA"):
            getattr(micro, name)[:, IGNORED] = -50.0
        assert policy_results(some, micro)[1] == numbers
        everything = policy_results(learner, micro)[1]
        assert everything["train/approx_kl_k3"] > 100 * numbers["train/approx_kl_k3"]

        # entropy: the tokens' own add up to it, with all tokens and with some
        for found, tokens in ((numbers, COUNTED), (everything, range(7))):
            parts = {
                name: x for name, x in found.items() if name.startswith("train/entropy_token_")
            }
            assert parts.keys() == {f"train/entropy_token_{token}" for token in tokens}
            assert sum(parts.values()) == pytest.approx(found["train/entropy"], rel=1e-5)
            assert min(parts.values()) > 1.0
        assert numbers["train/entropy_token_6"] == everything["train/entropy_token_6"]

        # engine and trainer are compared over all tokens
        compared = {}
        for name, which in (("some", some), ("all", learner)):
            averages = Averages()
            which.prepare(rollout, averages)
            compared[name] = averages.reduce(torch.device("cpu"))
        for name in ("train/engine_logprob_abs_diff", "train/engine_logprob_max_diff"):
            assert compared["some"][name] == compared["all"][name] > 0


def test_tokens_of_empty_dimensions_count_in_no_ratio_entropy_or_kl(tiny_model_dir):
    in_ranks(1, ignored_tokens, str(tiny_model_dir))


def outcomes_of_two_rollouts(rank: int, model_dir: str) -> None:
    """The metric against episodes listed by hand, with the values that the critic had before each update."""
    world = dist.get_world_size()
    learner = make_learner(model_dir, flags(local_mini_batch_size=T * B // world, vf_coef=5.0))
    observer = PPOLearner(learner.args, learner.policy, learner.critic, learner.processor)
    rollouts = [make_rollout(model_dir), make_rollout(model_dir, 1, AFTER_ONE)]
    values, metrics = [], []
    for step, rollout in enumerate(rollouts, 1):
        share = rollout.shard(rank, world)
        value_TB = observer.prepare(share, Averages()).old_value_N.view(T, -1)
        of_ranks = [torch.empty_like(value_TB) for _ in range(world)]
        dist.all_gather(of_ranks, value_TB)
        values.append(torch.cat(of_ranks, dim=1))
        metrics.append(learner.update(share, step))
    # Environment, first and last step (counted over both rollouts), reward at the last one. Environment 2 has no end,
    # environment 3 two dropped episodes, the second one begun in the first rollout.
    episodes = {1: [(0, 0, 2, 1.0), (0, 3, 3, 0.0), (1, 0, 5, 0.0)],
                2: [(0, 4, 8, 1.0), (0, 9, 9, 0.0), (1, 6, 11, 0.0)]}  # fmt: skip
    value_SB = torch.cat(values)
    for step, ended in episodes.items():
        value = torch.cat([value_SB[first : last + 1, b] for b, first, last, _ in ended])
        outcome = torch.tensor(
            [reward * 0.9 ** (last - t) for _, first, last, reward in ended for t in range(first, last + 1)]
        )  # fmt: skip
        found = metrics[step - 1]
        assert found["train/num_outcome_episodes"] == 3
        assert found["train/explained_variance_outcome"] == pytest.approx(
            explained_variance(value, outcome), rel=1e-5
        )

    # nothing ends: the count is 0, and the variance is absent
    rollouts[0].terminated_TB[:], rollouts[0].truncated_TB[:] = False, False
    metrics = learner.update(rollouts[0].shard(rank, world), 3)
    assert metrics["train/num_outcome_episodes"] == 0
    assert metrics["train/explained_variance_outcome"] is None


@pytest.mark.parametrize("world_size", [1, 2])
def test_values_are_compared_with_what_came_of_episodes_over_two_rollouts(
    tiny_model_dir, world_size
):
    in_ranks(world_size, outcomes_of_two_rollouts, str(tiny_model_dir))


def rates_of_a_run(model_dir: str, max_approx_kl: float | None) -> tuple[list[dict], list[list]]:
    """Metrics of each of 5 training steps, and the policy's learning rate at each of their optimizer steps."""
    import ppo_vllm_ray_fsdp_vla as driver  # seconds that the other tests' ranks need not take

    num_steps, sizes = (
        5,
        {"num_epochs": 2, "local_mini_batch_size": T * B // 4, "value_init_steps": 2},
    )
    plan = driver.make_plan(
        driver.Args(
            total_episodes=num_steps * T * B, num_steps=T, local_rollout_batch_size=B, **sizes
        ),
        has_gpus=False,
    )
    learner = make_learner(model_dir, flags(max_approx_kl=max_approx_kl, **sizes), lora=True)
    learner.policy = make_trainable(
        learner.policy.model, 1e-3, "linear", 4, plan.policy_optimizer_steps
    )
    rates: list[list[float]] = []
    learner.policy.optimizer.register_step_pre_hook(
        lambda optimizer, *_: rates[-1].append(optimizer.param_groups[0]["lr"])
    )
    metrics = []
    for step in range(1, num_steps + 1):
        rates.append([])
        metrics.append(learner.update(make_rollout(model_dir, step), step))
    return metrics, rates


def schedules(rank: int, model_dir: str) -> None:
    """Two steps of critic warm-up, then three of eight minibatches, of which the KL limit lets few be done."""
    metrics, rates = rates_of_a_run(model_dir, None)
    by_hand = [1e-3 * (k / 4 if k < 4 else (24 - k) / 20) for k in range(24)]
    assert [len(of_step) for of_step in rates] == [0, 0, 8, 8, 8]
    assert sum(rates, []) == pytest.approx(by_hand, rel=1e-12)
    ends = [m["train/learning_rate"] for m in metrics]
    assert ends == pytest.approx([0.0, 0.0, 0.8e-3, 0.4e-3, 0.0], rel=1e-12)

    stopped_metrics, stopped_rates = rates_of_a_run(model_dir, 1e-7)
    assert [m.get("train/stopped_by_kl") for m in stopped_metrics] == [None, None, 1.0, 1.0, 1.0]
    for done, planned in zip(stopped_rates[2:], rates[2:], strict=True):
        assert 0 < len(done) < 8 and done == planned[: len(done)]
    assert [m["train/learning_rate"] for m in stopped_metrics] == ends


def test_minibatches_skipped_by_the_kl_limit_do_not_delay_the_schedule(tiny_model_dir):
    in_ranks(1, schedules, str(tiny_model_dir))


def masters(rank: int, model_dir: str) -> None:
    """bfloat16 compute: frozen weights in bfloat16, what trains (and its gradients) in float32, on one rank and two."""
    args = flags(
        sharding_strategy="shard-grad-op", local_mini_batch_size=T * B // dist.get_world_size()
    )
    learner = make_learner(model_dir, args, lora=True, adam=True, dtype=torch.bfloat16)
    dtypes = {p.requires_grad: p.dtype for p in learner.policy.model.parameters()}
    assert dtypes == {True: torch.float32, False: torch.bfloat16}
    before = weights(learner)
    metrics = learner.update(make_rollout(model_dir).shard(rank, dist.get_world_size()), step=1)
    assert metrics["train/first_minibatch_ratio_max_abs_dev"] < 0.05
    states = learner.policy.optimizer.state.values()
    assert states and all(s["exp_avg"].dtype == torch.float32 for s in states)
    after = weights(learner)
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    assert changed and all("lora" in name or name.startswith("critic") for name in changed)
    assert all(weight.dtype == before[name].dtype for name, weight in after.items())


@pytest.mark.parametrize("world_size", [1, 2])
def test_only_what_trains_has_float32_masters(tiny_model_dir, world_size):
    in_ranks(world_size, masters, str(tiny_model_dir))
