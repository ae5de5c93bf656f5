"""Watching and evaluating: the same policy as in training, the right pictures, files, numbers and command lines."""

import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import imageio.v2
import numpy as np
import pytest
import torch
from PIL import Image, ImageSequence

import enjoy
import evaluate
from buffer import Timeline
from evaluation.agent import Agent, first_unseen_seed, load_for_play, play_episodes
from evaluation.statistics import Evaluated, group_runs
from evaluation.video import film, write_video
from evaluation.watch import (
    SUMMARY_STEPS,
    SUMMARY_WIDTH,
    Moment,
    NumberPanel,
    Painter,
    Player,
    draw_episode,
    episode_summary,
)
from evaluation.window import Window
from model import ActorCriticModel
from run.checkpoint import save_model
from run.cli import command_line
from run.config import Config, check_config, load_config
from utils import EnvironmentFailure
from worker import inspect_environment

ROOT = Path(__file__).parent.parent
ENDLESS = "endless_mystery_path"
TASKS = ("poc_memory_env", "cartpole_masked", "mystery_path_grid", ENDLESS)


def toy(name: str) -> dict:
    """Return the `environment` section of a toy."""
    return {"type": "Gymnasium", "name": f"tests.toy_environments:{name}-v0"}


def make_model(name: str, memory_length: int = 16, environment: dict | None = None, **transformer: object) -> tuple:
    """Return a small model with random weights of a config's task, or another one, its config and its task."""
    config = load_config(ROOT / "configs" / f"{name}.yaml").model_dump() | {"hidden_layer_size": 16}
    config["environment"] = environment or config["environment"]
    config["transformer"] |= {"embed_dim": 16, "num_heads": 2, "num_blocks": 2, "memory_length": memory_length}
    config["transformer"] |= {"query_position": False} | transformer
    config = check_config(config, "test")
    task, _ = inspect_environment(config.environment)
    torch.manual_seed(1)
    model = ActorCriticModel(config, task)
    with torch.no_grad():  # attention that differs between steps
        for block in model.transformer.blocks:
            block.attention.query.weight *= 8
    return model, config, task


def write_model(path: Path, name: str = "poc_memory_env", run_id: str = "run", seed: int = 1, steps: int = 100) -> Path:
    """Write a small model and return its file."""
    model, config, _ = make_model(name)
    save_model(path, model, config, {"run_id": run_id, "seed": seed, "steps": steps, "updates": 1})
    return path


@pytest.fixture(autouse=True)
def one_thread(monkeypatch):
    """Small models are fastest on one thread; evaluate.py would leave its own number behind."""
    before = torch.get_num_threads()
    monkeypatch.setattr("enjoy.use_cores", lambda device: None)
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def model_file(tmp_path_factory) -> Path:
    """A small model of PocMemoryEnv."""
    return write_model(tmp_path_factory.mktemp("models") / "run.nn")


def command(
    script: str, *arguments: object, folder: Path | None = None, **variables: str
) -> subprocess.CompletedProcess:
    """Run a command line without a display, but for the variables given."""
    environment = {key: value for key, value in os.environ.items() if key not in ("DISPLAY", "WAYLAND_DISPLAY")}
    environment |= {"OMP_NUM_THREADS": "1"} | variables
    return subprocess.run([sys.executable, str(ROOT / script), *map(str, arguments)], cwd=folder, env=environment,
                          capture_output=True, text=True, timeout=120)  # fmt: skip


# ---------------------------------------------------------------------------------------------- the same as in training


def record(model: ActorCriticModel, config: Config, task: object, seed: int, most: int) -> tuple:
    """Play an episode; return its moments and, per step, what was observed, its log-probabilities and its inputs."""
    seen, wanted, inputs = [], [], []
    act = Agent.act

    def acting(agent, arrays, rows):
        prediction, actions = act(agent, arrays, rows)
        seen.append((arrays.vectors if task.frame is None else arrays.frames)[0].copy())
        wanted.append([branch[0] for branch in prediction.policy.log_probs] + [prediction.value[0]])
        inputs.append(prediction.inputs[:, 0])
        return prediction, actions

    player = Player(model, config, task)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Agent, "act", acting)
        moments = [moment for _, moment in zip(range(most), player.play(seed), strict=False)]
    player.close()
    return moments, np.stack(seen), wanted, torch.stack(inputs, dim=1)


@pytest.mark.parametrize("encoding", ["", "relative", "absolute", "learned"])
@pytest.mark.parametrize("name", TASKS)
def test_steps_are_what_training_computes(name, encoding):
    """Logits, values and recorded attention of whole episodes equal the batched forward pass of training."""
    if name == ENDLESS and encoding in ("absolute", "learned"):
        pytest.skip("needs a longest episode")
    model, config, task = make_model(name, positional_encoding=encoding)
    seeds = range(3)
    moments, seen, wanted, inputs = max(
        (record(model, config, task, seed, 150) for seed in seeds), key=lambda r: len(r[1])
    )
    steps, length = np.arange(len(seen)), config.transformer.memory_length
    timeline = Timeline(model, config.transformer, 1, len(seen), torch.device("cpu"))
    for t in steps:
        timeline.write(slice(0, 1), int(t), inputs[:, t : t + 1], np.array([t]))
    observations = torch.from_numpy(seen)
    observations = observations.permute(0, 3, 1, 2) if task.frame else observations
    timeline.in_place = False  # watching read windows where they lie
    with torch.no_grad():
        groups = [timeline.group(np.zeros_like(steps), steps, steps, per_group) for per_group in (8, 1)]
        views = [timeline.view(queries) for queries in groups]
        embedded = model.complete(model.embed(observations), None, torch.from_numpy(steps))
        batched, single = (model(embedded, view) for view in views)
    for t in steps:
        expected = [branch[t] for branch in batched.policy.log_probs] + [batched.value[t]]
        for found, value in zip(wanted[t], expected, strict=True):
            torch.testing.assert_close(found, value, atol=1e-5, rtol=0)
    for t, moment in zip(steps, moments, strict=False):
        assert moment.attention.shape == (2, min(t, length))
        if t > 0:
            np.testing.assert_allclose(moment.attention.sum(axis=1), 1, atol=1e-5)
            group = views[1].slot[t]
            columns = views[1].mask[group, 0]  # in order of time
            expected = torch.stack([block[group][:, columns].mean(dim=0) for block in single.attention])
            np.testing.assert_allclose(moment.attention, expected, atol=1e-5)


def test_attention_refers_to_the_right_step():
    """A block whose scores depend on the distance only attends most to where the distance says."""
    model, config, task = make_model("cartpole_masked", positional_encoding="relative")
    with torch.no_grad():
        for block in model.transformer.blocks:
            attention = block.attention
            attention.query.weight.zero_()
            # The score of distance d is the product of two sinusoids, which is largest for d = 3.
            attention.relative.weight.copy_(torch.eye(16))
            attention.position_bias.copy_(200 * attention.distances[-4].view(2, 8))
    player = Player(model, config, task, render=False)
    moments = [moment for moment in player.play(1) if moment.result is None]
    assert len(moments) > 8
    for moment in moments[4:]:
        assert (moment.attention.argmax(axis=1) == moment.attention.shape[1] - 3).all()


def test_memory_goes_on_when_the_timeline_is_full(monkeypatch):
    """An episode that is longer than the timeline gives the same as on a longer timeline."""
    model, config, task = make_model("cartpole_masked", memory_length=4, positional_encoding="relative")
    short, long = [], []
    for values, rollout in ((short, 5), (long, 500)):
        monkeypatch.setattr("evaluation.agent.SHORTEST_ROLLOUT", rollout)
        monkeypatch.setattr("evaluation.agent.OBSERVATIONS_KEPT", rollout)
        player = Player(model, config, task, render=False)
        values += [moment.value for moment in player.play(2)]
    assert len(short) > 3 * 5
    np.testing.assert_allclose(short, long, atol=1e-5)


def test_batched_episodes_are_those_of_the_player():
    """Many environments at once, which act deterministically, end as each does on its own."""
    model, config, task = make_model("poc_memory_env")
    seeds = list(range(100_000, 100_012))
    batched = play_episodes(model, config, task, seeds, 2, deterministic=True)
    player = Player(model, config, task, deterministic=True, render=False)
    alone = {seed: list(player.play(seed))[-1].result for seed in seeds}
    assert [(e["seed"], e["repetition"]) for e in batched] == [(seed, r) for seed in seeds for r in (0, 1)]
    for episode in batched:
        result = {key: episode[key] for key in alone[episode["seed"]]}
        assert result == pytest.approx(alone[episode["seed"]])


def test_evaluation_is_repeatable_and_independent_of_processes(monkeypatch):
    """The same episodes with one process, with three, and again; others with another seed of the actions."""
    monkeypatch.setattr("evaluation.agent.ENVIRONMENTS", 7)
    model, config, task = make_model("poc_memory_env")
    seeds = list(range(100_000, 100_010))
    one, three, again, other = (
        play_episodes(model, config, task, seeds, 2, action_seed=seed, processes=processes)
        for seed, processes in ((5, 1), (5, 3), (5, 1), (6, 1))
    )
    assert one == three == again
    assert one != other


# ------------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize("name", ["poc_memory_env", "mystery_path_grid"])
def test_pictures_have_one_even_size_and_change(name):
    """A picture per step plus the end, all of one even size, with the agent's view where it has one."""
    model, config, task = make_model(name)
    player = Player(model, config, task)
    drawn = list(draw_episode(player, 3, 481, 4))
    steps = [moment.step for _, moment in drawn]
    length = int(drawn[-1][1].result["length"])
    assert steps == list(range(length)) + [length] * 6
    assert len({picture.size for picture, _ in drawn}) == 1
    width, height = drawn[0][0].size
    assert width == 480 and height % 2 == 0
    assert (drawn[0][1].view is None) == (name == "poc_memory_env")
    assert drawn[-1][1].reward == pytest.approx(drawn[-1][1].result["reward"])


@pytest.mark.parametrize(
    "environment", ({"type": "Gymnasium", "name": "CartPole-v1", "reward_scale": 0.02}, {"type": "CartPole"})
)
def test_rewards_are_shown_as_they_are_reported(environment):
    player = Player(*make_model("cartpole_novel", environment=environment), render=False)
    *_, end = player.play(3)
    assert end.reward == pytest.approx(end.result["reward"]) and end.reward == end.step > 1


def test_thumbnails_are_of_the_most_attended_steps():
    """The thumbnails under the strips show the frames of the steps with the largest weights."""
    model, config, task = make_model("poc_memory_env")
    player = Player(model, config, task)
    moments = list(player.play(3))[:-1]
    painter = Painter("title", moments[0], 720, 16)
    for step, moment in enumerate(moments[:4]):
        moment.frame = np.full_like(moment.frame, 40 * (step + 1))
        if step == 3:
            moment.attention = np.array([[0.1, 0.2, 0.7]] * 2)
        picture = np.asarray(painter.draw(moment))
    row = painter.thumbnails_top + painter.thumbnail[1] // 2
    columns = [painter.margin + number * (painter.thumbnail[0] + painter.gap) + 20 for number in range(4)]
    assert [int(picture[row, column, 0]) for column in columns] == [40, 80, 120, 255]
    marked = picture[painter.thumbnails_top - 1, columns[2]].tolist()
    assert marked == [213, 94, 0]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
def test_videos_hold_every_picture(tmp_path, suffix):
    """Both formats hold all pictures, are read back, and leave nothing else behind."""
    pictures = [Image.new("RGB", (64, 48), (20 * number, 0, 255 - 20 * number)) for number in range(10)]
    path = tmp_path / f"video{suffix}"
    write_video(path, iter(pictures), 5)
    frames = imageio.v2.mimread(path)
    assert len(frames) == 10
    assert frames[0].shape[:2] == (48, 64)
    assert abs(int(frames[9][20, 20, 0]) - 180) < 20
    assert os.listdir(tmp_path) == [path.name]


def test_no_half_video_is_left(tmp_path):
    """Where playing fails, the old video stays and no other file does."""
    path = tmp_path / "video.mp4"
    path.write_bytes(b"old")

    def pictures():
        yield Image.new("RGB", (64, 48))
        raise RuntimeError("the environment failed")

    with pytest.raises(RuntimeError):
        write_video(path, pictures(), 5)
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["video.mp4"]


@pytest.mark.parametrize("suffix", [".mp4", ".gif"])
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_video_is_kept(tmp_path, capsys, suffix, number):
    """It holds what there was, can be played, and one line says where it was stopped."""

    def pictures():
        for step in range(100):
            player.steps = step
            if step == 4:
                os.kill(os.getpid(), number)
            yield Image.new("RGB", (64, 48), (20 * step % 256, 0, 0))

    player, path = SimpleNamespace(steps=0), tmp_path / f"video{suffix}"
    path.write_bytes(b"old")
    assert film(path, pictures(), 5, player)
    assert len(imageio.v2.mimread(path)) == 5 and os.listdir(tmp_path) == [path.name]
    assert capsys.readouterr().err == f"stopped at step 4 of an episode; the video is {path}\n"


def test_numbers_are_shown_by_name():
    """Choices are one entry; actions are clipped and have their bounds; what has no room is counted."""
    moment = Moment(0, None, None, np.array([2.5, -1.0]), 0.0, 0.0, np.zeros((1, 0)), np.array([0.25, 0, 1, 0, 0]))
    bounds = np.array([-2.0, 0.0]), np.array([2.0, np.inf])
    panel = NumberPanel(("x", "suit=0", "suit=1", "rank=0", "rank=1"), bounds, True)
    shown = [(entry.name, entry.text) for entry in panel.entries(moment)]
    assert shown == [
        ("action[0]", "2.00 in -2…2"), ("action[1]", "0.00 in 0…inf"), ("x", "0.25"), ("suit", "= 1"), ("rank", "= –")
    ]  # fmt: skip
    assert panel.entries(moment)[0].bar == (0.0, 1.0)
    moment.vector = np.arange(40.0)
    entries = panel.entries(moment)
    assert len(entries) == 15 and entries[-1].name == "and 28 more" and entries[2].name == "[0]"


@pytest.mark.parametrize("width", [480, 720])
def test_numbers_have_a_place_in_the_picture(width):
    """What the agent sees and how it acts are drawn between views and attention, and change with them."""
    player = Player(*make_model("cartpole_masked", environment=toy("Acted")))
    (before, moment), (after, _) = (pair for _, pair in zip(range(2), draw_episode(player, 3, width, 4), strict=False))
    painter = Painter("title", moment, width, 16, player.panel)
    player.close()
    assert before.size == (width, painter.height)
    assert Painter("title", moment, width, 16).height < painter.height
    rows = slice(painter.panel_top, painter.strips_top)
    assert (np.asarray(before)[rows] != np.asarray(after)[rows]).any()


def test_an_environment_that_fails_is_named():
    """One line with environment, seed and step, whether one episode is watched or many are evaluated."""
    model, config, task = make_model("cartpole_masked", environment=toy("NotANumber"))
    message = r"^tests.toy_environments:NotANumber-v0, {}reset seed 100000, step 9: .* is not finite: [^\n]*$"
    player = Player(model, config, task, render=False)
    with pytest.raises(EnvironmentFailure, match=message.format("")):
        list(player.play(100_000))
    with pytest.raises(EnvironmentFailure, match=message.format("environment 0, ")):
        play_episodes(model, config, task, [100_000])


def test_a_failure_is_one_line(monkeypatch, capsys):
    """Exit code 1 and no traceback."""

    def main():
        raise EnvironmentFailure("task, reset seed 5, step 3: broken")

    with pytest.raises(SystemExit) as stopped:
        command_line(main)
    assert stopped.value.code == 1 and capsys.readouterr().err == "task, reset seed 5, step 3: broken\n"


@pytest.mark.parametrize(("name", "chance"), [("Often", 0.8), ("Seldom", 0.2)])
def test_success_by_chance_is_evaluated_as_such(name, chance):
    """Over 100 seeds the true share, of an environment that mentions only its successes, lies within the interval."""
    model, config, task = make_model("cartpole_masked", environment=toy(name))
    episodes = play_episodes(model, config, task, list(range(100_000, 100_100)))
    run = {"run_id": "run", "seed": 1, "steps": 1}
    (group,) = group_runs([Evaluated("run.nn", name, {}, run, episodes)])
    success = group.points[0].statistics["success"]
    assert success["episodes"] == 100 and success["low"] <= chance <= success["high"] < success["low"] + 0.2


def test_summary_is_an_animated_picture_and_the_same_each_time():
    """TensorBoard gets a GIF of bounded size; nothing about the model or PyTorch's random state changes."""
    model, config, task = make_model("cartpole_masked")
    weights, state = {name: value.clone() for name, value in model.state_dict().items()}, torch.get_rng_state()
    first, second = (episode_summary(model, config, task, "episode") for _ in range(2))
    assert first == second
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())
    (value,) = first.value
    frames = imageio.v2.mimread(value.image.encoded_image_string)
    assert value.tag == "episode" and 1 < len(frames) <= SUMMARY_STEPS + 1
    assert frames[0].shape[:2] == (value.image.height, SUMMARY_WIDTH)


# -------------------------------------------------------------------------------------------------------- command lines


def test_enjoy_prints_results_without_a_display(model_file):
    """Without a display and a video it says how to get one; the seeds are unseen, and --seed chooses them."""
    several = command("enjoy.py", "--model", model_file, "--episodes=3", "--cpu")
    assert several.returncode == 0, several.stderr
    lines = several.stdout.splitlines()
    assert [line.split(":")[0] for line in lines] == [
        "episode 1, seed 100000", "episode 2, seed 100001", "episode 3, seed 100002", "mean of 3 episodes"
    ]  # fmt: skip
    assert all("reward" in line and "length" in line and "success" in line for line in lines)
    assert "--video=" in several.stderr and len(several.stderr.splitlines()) == 1
    later = command("enjoy.py", "--model", model_file, "--seed=2", "--device=cpu")
    assert later.stdout.splitlines()[0].split(": ")[1] == lines[2].split(": ")[1]


def test_enjoy_writes_videos(model_file, tmp_path):
    """--video, --fps, --deterministic and --episodes: as many pictures as steps, ends and the time they are held."""
    arguments = ("--model", model_file, "--cpu", "--deterministic", "--episodes=2")
    film = command("enjoy.py", *arguments, "--video=film.mp4", "--fps=4", folder=tmp_path)
    moving = command("enjoy.py", *arguments, "--video=film.GIF", "--fps=4", folder=tmp_path)
    assert film.returncode == moving.returncode == 0, film.stderr + moving.stderr
    assert film.stdout == moving.stdout and "film.mp4" in film.stderr
    lengths = [int(line.split("length ")[1].split(",")[0]) for line in film.stdout.splitlines()[:2]]
    with imageio.v2.get_reader(tmp_path / "film.mp4") as reader:
        assert sum(1 for _ in reader) == sum(lengths) + 2 * 6
        assert reader.get_meta_data()["fps"] == 4
    with Image.open(tmp_path / "film.GIF") as picture:
        durations = [frame.info["duration"] for frame in ImageSequence.Iterator(picture)]
        assert sum(durations) == 250 * (sum(lengths) + 2 * 6)
    assert sorted(os.listdir(tmp_path)) == ["film.GIF", "film.mp4"]


def test_enjoy_opens_a_window(model_file):
    """With a display, --window shows the episode; SDL's dummy driver stands in for the screen."""
    shown = command("enjoy.py", "--model", model_file, "--window", "--fps=120", DISPLAY=":9", SDL_VIDEODRIVER="dummy")
    assert shown.returncode == 0, shown.stderr
    assert shown.stdout.startswith("episode 1") and not shown.stderr


def test_escape_closes_the_window(monkeypatch):
    """Space pauses and goes on, Esc ends."""
    import pygame

    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")
    window, picture = Window(720), Image.new("RGB", (64, 48), (255, 0, 0))
    assert window.show(picture, 100)
    assert window.surface.get_size() == (64, 48) and window.surface.get_at((5, 5))[:3] == (255, 0, 0)
    for _ in range(2):
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_SPACE))
    assert window.show(picture, 100)
    pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_ESCAPE))
    assert not window.show(picture, 100)


MISTAKES = [
    ("enjoy.py", ("--model=missing.nn",), "missing.nn: there is no such file"),
    ("enjoy.py", ("--model=MODEL", "--window"), "--window: there is no display"),
    ("enjoy.py", ("--model=MODEL", "--video=film.avi"), "should end in .mp4 or .gif"),
    ("enjoy.py", ("--model=MODEL", "--video=nowhere/film.mp4"), "cannot be written to"),
    ("enjoy.py", ("--model=MODEL", "--fps=0"), "--fps"),
    ("enjoy.py", ("--model=MODEL", "--episodes=many"), "--episodes"),
    ("enjoy.py", ("--model=MODEL", "--seed=-1"), "--seed"),
    ("enjoy.py", ("--model=MODEL", "--device=tpu"), "--device"),
    ("enjoy.py", (), "see --help"),
    ("evaluate.py", ("missing.nn",), "missing.nn: there is no such file"),
    ("evaluate.py", (".",), "there is no model"),
    ("evaluate.py", ("MODEL", "--seeds=0"), "--seeds"),
    ("evaluate.py", ("MODEL", "--plot=curve.bmp"), "should end in"),
    ("evaluate.py", ("MODEL", "--output=nowhere/numbers"), "cannot be written to"),
    (
        "evaluate.py",
        ("MODEL", "--seeds=2", "--repetitions=1", "--metric=luck", "--plot=c.png"),
        "allowed here are reward",
    ),
]


@pytest.mark.parametrize(("script", "arguments", "message"), MISTAKES)
def test_mistakes_are_one_line(model_file, tmp_path, monkeypatch, capsys, script, arguments, message):
    """Exit code 2, and one line that says what to put right."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DISPLAY", raising=False)
    monkeypatch.delenv("WAYLAND_DISPLAY", raising=False)
    monkeypatch.setattr(sys, "argv", [script, *(text.replace("MODEL", str(model_file)) for text in arguments)])
    with pytest.raises(SystemExit) as stopped:
        command_line({"enjoy.py": enjoy, "evaluate.py": evaluate}[script].main)
    assert stopped.value.code == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if "episodes in" not in line]
    assert len(lines) == 1 and message in lines[0]


def test_a_mistake_ends_the_process_without_a_traceback():
    """The same through the real command lines."""
    for script, argument in (("enjoy.py", "--model=missing.nn"), ("evaluate.py", "missing.nn")):
        done = command(script, argument)
        assert (done.returncode, done.stdout, done.stderr) == (2, "", "missing.nn: there is no such file\n")


@pytest.mark.parametrize("script", ["enjoy.py", "evaluate.py"])
def test_help_fits_a_terminal(script):
    """24 lines of 80 columns, with an example."""
    done = command(script, "--help")
    lines = done.stdout.splitlines()
    assert done.returncode == 0 and len(lines) <= 24 and max(map(len, lines)) <= 80
    assert "Example" in done.stdout and f"python {script}" in done.stdout


def test_a_task_that_changed_is_noticed(tmp_path):
    """A model whose environment is no longer what it was trained on is refused with a reason."""
    from dataclasses import replace

    from utils import UserError

    model, config, task = make_model("poc_memory_env")
    run = {"run_id": "run", "seed": 1, "steps": 1}
    model.task = replace(task, max_episode_steps=99)
    save_model(tmp_path / "m.nn", model, config, run)
    with pytest.raises(UserError, match="was trained where PocMemoryEnv was"):
        load_for_play(tmp_path / "m.nn", torch.device("cpu"))


def test_unseen_seeds_lie_behind_those_of_training():
    """Start and number of the training seeds are respected, and have defaults."""
    assert first_unseen_seed(SimpleNamespace(reset_params={})) == 100_000
    assert first_unseen_seed(SimpleNamespace(reset_params={"start-seed": 5, "num-seeds": 20})) == 25
