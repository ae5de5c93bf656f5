"""Watching: the same policy as in training, the right pictures, files, numbers and command lines."""

import os
import signal
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import imageio.v2
import numpy as np
import pytest
import torch
from canonical import assert_close
from test_faults import command

import enjoy
from evaluation.agent import Agent, load_for_play, play_episodes
from evaluation.video import film
from evaluation.watch import Painter, Player, draw_episode, episode_summary
from evaluation.window import Window
from memory import make_memory
from tests.test_agent import make_model, write
from tests.toy_environments import toy
from tests.walk import CORES, task_of, walk
from utils import EnvironmentFailure, UserError

POC, CARTPOLE, GRID, ENDLESS = (
    {"type": name} for name in ("PocMemoryEnv", "CartPoleMasked", "MysteryPath-Grid", "Endless-MysteryPath")
)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A small model of PocMemoryEnv."""
    return write(tmp_path_factory.mktemp("models") / "run.nn", *make_model(POC))


@pytest.fixture
def enjoy_with(monkeypatch, tmp_path):
    """A function that runs enjoy.py in this process, without a display, and returns what it says."""
    for name in ("DISPLAY", "WAYLAND_DISPLAY"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("evaluation.agent.inspect_environment", lambda section: (task_of(section), []))
    return partial(command, tmp_path, "--cpu", program=enjoy)


# ---------------------------------------------------------------------------------------------- the same as in training


@pytest.mark.parametrize(
    ("environment", "core"), [*((CARTPOLE, core) for core in CORES), (GRID, "relative"), (ENDLESS, "relative")]
)
def test_steps_are_what_training_computes(monkeypatch, environment, core):
    """Policies, values and attention of a whole episode equal the batched forward pass of training."""
    model, config, task = make_model(environment, core)
    seen, outputs, observe = [], [], Agent.observe

    def observing(agent, arrays, rows):
        seen.append((arrays.vectors if task.frame is None else arrays.frames)[0].copy())
        outputs.append(observe(agent, arrays, rows))
        return outputs[-1]

    monkeypatch.setattr(Agent, "observe", observing)
    player = Player(model, config, task, render=False, max_steps=60)
    moments = list(player.play(3))[:-1]
    step, worker = np.arange(len(seen)), np.zeros(len(seen), np.int64)
    assert len(seen) > 6
    memory = make_memory(model, 1, len(seen), torch.device("cpu"))
    for t, (output, _) in enumerate(outputs):
        memory.write(slice(0, 1), t, output.kept, step[t : t + 1])
    observations = torch.from_numpy(np.stack(seen))
    observations = observations.permute(0, 3, 1, 2) if task.frame else observations
    with torch.no_grad():
        view = memory.past_of(worker, step, step[:, None].copy())
        batched = model(model.complete(model.embed(observations), None, torch.from_numpy(step)), view)
    assert_close(torch.cat([output.policy.parameters() for output, _ in outputs]), batched.policy.parameters())
    assert_close(torch.cat([output.value for output, _ in outputs]), batched.value)
    for t, moment in enumerate(moments if batched.attention else ()):
        group, place = divmod(int(view.slot[t]), view.distance.shape[1])
        columns = slice(int(view.distance[group, place]) - min(t, 4), int(view.distance[group, place]))
        expected = [block[group, 2 * place : 2 * place + 2, columns] for block in batched.attention]
        np.testing.assert_allclose(moment.past, torch.stack(expected), atol=1e-5)


def test_memory_goes_on_when_the_timeline_is_full(monkeypatch):
    """An episode that is longer than the timeline gives the same as on a longer timeline."""
    values = []
    for rollout in (5, 500):
        monkeypatch.setattr("evaluation.agent.SHORTEST_ROLLOUT", rollout)
        monkeypatch.setattr("evaluation.agent.OBSERVATIONS_KEPT", rollout)
        values.append([moment.value for moment in Player(*make_model(toy("Toy")), render=False).play(2)])
    assert len(values[0]) > 2 * 5
    np.testing.assert_allclose(*values, atol=1e-5)


def test_evaluation_is_repeatable_and_its_processes_do_without_pytorch(monkeypatch):
    """The same with one process and with two; PyTorch would take seconds to load, and the memory of each."""
    monkeypatch.setattr("evaluation.agent.ENVIRONMENTS", 3)
    made, seeds = make_model(walk("vectors", "one branch")["environment"]), [100_000, 100_001, 100_002]
    one, two = (play_episodes(*made, seeds, 2, action_seed=5, processes=processes) for processes in (1, 2))
    assert one == two and not any(episode["pytorch"] for episode in one)
    assert [(e["seed"], e["repetition"]) for e in one] == [(seed, r) for seed in seeds for r in (0, 1)]


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("environment", "core"), [(POC, "gru"), (POC, "none"), (GRID, "relative")])
def test_pictures_have_one_even_size(environment, core):
    """A picture per step plus the end; a strip for each block, one for a recurrent state, none without memory."""
    player = Player(*make_model(environment, core), max_steps=7)
    moments, pictures = zip(*draw_episode(player, 3, 4), strict=True)
    length = int(moments[-1].result["length"])
    assert [moment.step for moment in moments] == [*range(length + 1)]
    assert [len(some) for some in pictures] == [1] * length + [6]
    ((height, width, _),) = {picture.shape for some in pictures for picture in some}
    assert width == 720 and height % 2 == 0 and player.strips == {
        "gru": ["state"], "none": [], "relative": ["block 1", "block 2"]}[core]  # fmt: skip
    assert (moments[0].view is None) == (environment == POC)
    if core == "gru":
        np.testing.assert_allclose(moments[-2].past[0, 0], [moment.change for moment in moments[:-2]])


def test_rewards_are_shown_as_they_are_reported():
    *_, end = Player(*make_model(CARTPOLE), render=False).play(3)
    assert end.reward == pytest.approx(end.result["reward"]) and end.reward == end.step > 1


def test_thumbnails_are_of_the_most_attended_steps():
    """The thumbnails under the strips show the frames of the steps with the largest weights, in order of time."""
    player = Player(*make_model(POC))
    moments = list(player.play(3))[:-1]
    painter = Painter(player, "title", moments[0], 50)
    for step, moment in enumerate(moments[:4]):
        moment.frame = np.full_like(moment.frame, 40 * (step + 1))
        moment.past = np.array([[[0.1, 0.2, 0.7]]] * 2)[:, :, :step]
        painter.draw(moment)
    assert [int(image.get_array().max()) for image in painter.thumbnails] == [40, 80, 120, 255, 255]
    labels = [image.axes.get_xlabel() for image in painter.thumbnails]
    assert labels == ["step 0: 10%", "step 1: 20%", "step 2: 70%", " ", " "]


@pytest.mark.parametrize(("name", "how"), [("NotANumber", ".* is not finite: "), ("Leaves", "SystemExit: window")])
def test_an_environment_that_fails_is_named(name, how):
    """One line with environment, seed and step, whether one episode is watched or many are evaluated."""
    model, config, task = make_model(toy(name))
    message = rf"^tests.toy_environments:{name}-v0, {{}}reset seed 100000, step 9: {how}[^\n]*$"
    with pytest.raises(EnvironmentFailure, match=message.format("")):
        list(Player(model, config, task, render=False).play(100_000))
    with pytest.raises(EnvironmentFailure, match=message.format("environment 0, ")):
        play_episodes(model, config, task, [100_000])


def test_summary_is_an_animated_picture_and_the_same_each_time(monkeypatch):
    """TensorBoard gets a GIF of bounded size; nothing about the model or PyTorch's random state changes."""
    monkeypatch.setattr("evaluation.watch.SUMMARY_STEPS", 5)
    model, config, task = make_model(POC)
    weights, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first, second = (episode_summary(model, config, task, "episode") for _ in range(2))
    assert first == second and torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    (value,) = first.value
    frames = imageio.v2.mimread(value.image.encoded_image_string)
    assert value.tag == "episode" and len(frames) == 5 + 9


# --------------------------------------------------------------------------------------------------- files and windows


@pytest.mark.parametrize(("suffix", "stopped_by"), [(".mp4", None), (".mp4", signal.SIGINT), (".gif", signal.SIGTERM)])
def test_videos_hold_every_picture_up_to_where_they_are_stopped(tmp_path, suffix, stopped_by):
    """Both formats hold all pictures, can be read back, and leave nothing else, also where playing fails."""

    def pictures():
        for step in range(10):
            if step == 4 and stopped_by:
                os.kill(os.getpid(), stopped_by)
            yield np.full((48, 64, 3), (20 * step, 0, 255 - 20 * step), np.uint8)

    path = tmp_path / f"video{suffix}"
    path.write_bytes(b"old")
    assert film(path, pictures(), 5) == bool(stopped_by)
    frames = imageio.v2.mimread(path)
    assert len(frames) == (5 if stopped_by else 10) and frames[0].shape[:2] == (48, 64)
    assert abs(int(frames[-1][20, 20, 0]) - 20 * (len(frames) - 1)) < 20 and os.listdir(tmp_path) == [path.name]
    whole = path.read_bytes()
    with pytest.raises(ZeroDivisionError):
        film(path, (np.full((48, 64, 3), 1 // (2 - step), np.uint8) for step in range(5)), 5)
    assert path.read_bytes() == whole and os.listdir(tmp_path) == [path.name]


# -------------------------------------------------------------------------------------------------------- command lines


def test_enjoy_prints_results_without_a_display(model_file, enjoy_with):
    """It says how to watch; seeds are unseen, --seed skips some, --seeds names those that training may have drawn."""
    *lines, hint = enjoy_with("--model", model_file, "--episodes=3").splitlines()
    starts = [f"episode {number + 1}, seed {100_000 + number}" for number in range(3)]
    assert [line.split(":")[0] for line in lines] == starts and "--video=" in hint
    assert all("reward" in line and "length" in line and "success" in line for line in lines)
    later = enjoy_with(model_file, "--seed=2")
    assert later.splitlines()[0].split(": ")[1] == lines[2].split(": ")[1]
    trained = enjoy_with(model_file, "--seeds=5:7")
    assert "episode 2, seed 6: " in trained and "training may have drawn 2 of these 2" in trained


def test_enjoy_writes_videos(model_file, enjoy_with, tmp_path):
    """--video, --fps, --max-steps and --episodes: as many pictures as steps, ends and the time they are held."""
    said = enjoy_with(model_file, "--max-steps=3", "--episodes=2", "--fps=4", "--video=film.MP4")
    with imageio.v2.get_reader(tmp_path / "film.MP4") as reader:
        assert sum(1 for _ in reader) == 2 * (3 + 6) and reader.get_meta_data()["fps"] == 4
    assert "film.MP4" in said and said.count("cut after 3 steps") == 2


def test_enjoy_opens_a_window(model_file, enjoy_with, monkeypatch):
    """With a display, --window shows the episode; space pauses and goes on, Esc ends."""
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    monkeypatch.setattr(pygame.display, "get_driver", lambda: "x11")
    assert "episode 1" in enjoy_with(model_file, "--window", "--fps=120")
    window, picture = Window(), np.full((48, 64, 3), (255, 0, 0), np.uint8)
    for keys, goes_on in (([], True), ([pygame.K_SPACE] * 2, True), ([pygame.K_ESCAPE], False)):
        for key in keys:
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key))
        assert window.show(picture, 100) == goes_on
        assert not goes_on or pygame.display.get_surface().get_at((5, 5))[:3] == (255, 0, 0)


MISTAKES = {
    "missing.nn": "missing.nn: cannot be read: No such file",
    "MODEL --window": "--window: there is no display",
    "MODEL --video=film.avi": "should end in .mp4 or .gif",
    "MODEL --seeds=7:5": "--seeds",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line(model_file, enjoy_with, arguments):
    said = enjoy_with(*arguments.replace("MODEL", str(model_file)).split(), code=2)
    assert MISTAKES[arguments] in said and said.count("\n") == 1


def test_a_model_of_another_task_is_not_played(tmp_path):
    """Its environment is no longer what it was trained on."""
    model, config, task = make_model(POC)
    path = write(tmp_path / "m.nn", model, config, replace(task, max_episode_steps=99))
    for load in (lambda: load_for_play(path, torch.device("cpu")), lambda: Agent.load(path)):
        with pytest.raises(UserError, match="m.nn: was trained where PocMemoryEnv was"):
            load()


UNTIDY = """
import argparse
argparse.ArgumentParser().parse_args()
class Mine(Toy):
    def close(self): raise RuntimeError('not connected')
"""


def test_an_untidy_environment_is_watched(module, tmp_path, monkeypatch):
    """Its module parses the command line when it is imported, and its close() fails."""
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(sys, "argv", ["enjoy.py", "--video=episode.mp4"])
    model, config, task = make_model(toy("Toy"))
    untidy = config.environment.model_copy(update={"name": module(UNTIDY)})
    player = Player(model, config.model_copy(update={"environment": untidy}), task, render=False)
    assert list(player.play(3))[-1].result is not None
    player.close()
