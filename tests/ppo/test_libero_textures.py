"""Models whose textures lie in shared memory: the same bytes, in fewer pages."""

import gc
import importlib.util
import os
import re
from pathlib import Path

import numpy as np
import pytest

from ppo.envs.base import ResetRequest
from tests.libero_episodes import SUITE, make_env

if importlib.util.find_spec("mujoco") is None:
    pytest.skip("LIBERO's simulator is not installed", allow_module_level=True)

from ppo.envs.libero_simulator import Simulator, mujoco  # noqa: E402 (imports mujoco without a GL library)
from ppo.envs.libero_textures import share_textures  # noqa: E402

# 72 MiB of texture; `mark` is the colour of its squares.
TEXTURED = """<mujoco><asset>
<texture name="t" type="2d" builtin="checker" rgb1="{mark} 0 0" width="4096" height="6144"/>
<material name="m" texture="t"/>
</asset><worldbody><geom type="box" size="1 1 1" material="m"/></worldbody></mujoco>"""


def textured(mark=0.5):
    return mujoco.MjModel.from_xml_string(TEXTURED.format(mark=mark))


def private_bytes():
    """Memory of this process that no other mapping shares."""
    return int(re.search(r"RssAnon:\s+(\d+)", Path("/proc/self/status").read_text())[1]) * 1024


def shared_memories():
    files = [file for file in Path("/proc/self/fd").iterdir() if file.is_symlink()]
    return sum("memfd:libero_textures" in os.readlink(file) for file in files)


def test_shared_textures_are_what_they_were_and_take_memory_once():
    reference = textured().tex_data.copy()
    first = textured()
    kept = [share_textures(first)]
    before = private_bytes()
    others = [textured() for _ in range(2)]
    kept += [share_textures(model) for model in others]
    assert len(set(map(id, kept))) == 1 and shared_memories() == 1
    assert private_bytes() - before < reference.nbytes / 4  # of twice as much
    for model in (first, *others):
        np.testing.assert_array_equal(model.tex_data, reference)


def test_a_model_that_is_written_to_keeps_what_is_written_to_itself():
    first, second = textured(), textured()
    kept = [share_textures(first), share_textures(second)]
    middle = first.tex_data.size // 2
    before = second.tex_data[middle]
    first.tex_data[middle] = before + 1
    assert second.tex_data[middle] == before and first.tex_data[middle] == before + 1
    third = textured()
    kept.append(share_textures(third))
    assert third.tex_data[middle] == before


def test_other_textures_are_not_mixed_up_and_all_memory_is_freed_with_the_models():
    red, dark = textured(1.0), textured(0.25)
    expected = [model.tex_data.copy() for model in (red, dark)]
    kept = [share_textures(red), share_textures(dark)]
    assert shared_memories() == 2
    np.testing.assert_array_equal(red.tex_data, expected[0])
    np.testing.assert_array_equal(dark.tex_data, expected[1])
    assert not np.array_equal(*expected)
    del kept, red
    gc.collect()
    assert shared_memories() == 0
    np.testing.assert_array_equal(dark.tex_data, expected[1])  # what a model maps outlives the rest
    before = private_bytes()
    del dark
    for _ in range(5):  # models come and go in the same places
        model = textured()
        held = share_textures(model)
        del model, held
    assert private_bytes() < before + expected[0].nbytes


@pytest.mark.parametrize("variable", ["LD_PRELOAD", "GLIBC_TUNABLES"])
def test_nothing_is_shared_under_another_allocator_or_of_a_small_model(variable, monkeypatch):
    small = mujoco.MjModel.from_xml_string("<mujoco/>")
    assert share_textures(small) is None
    monkeypatch.setenv(variable, "something")
    assert share_textures(textured()) is None and shared_memories() == 0


@pytest.mark.libero("libero_spatial")
def test_liberos_simulators_share_their_textures_across_tasks():
    first = Simulator(SUITE, 0, False)
    compiled = mujoco.MjModel.from_xml_string(first.domain.sim.model.get_xml())
    others = [Simulator(SUITE, task, False) for task in (0, 1)]
    assert shared_memories() == 1
    for simulator in (first, *others):
        np.testing.assert_array_equal(simulator.model.tex_data, compiled.tex_data)
        simulator.close()
    assert shared_memories() == 0


@pytest.mark.libero("libero_spatial")
def test_pictures_are_the_same_without_sharing(monkeypatch):
    request = ResetRequest(0, 3, 0)
    env = make_env()
    image = env.reset(request)
    env.close()
    monkeypatch.setenv("LD_PRELOAD", "nothing.so")
    env = make_env()
    np.testing.assert_array_equal(env.reset(request), image)
    env.close()
