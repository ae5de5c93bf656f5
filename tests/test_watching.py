"""Watching and evaluating: the same policy as in training, the right pictures, files, numbers and command lines."""

import os
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
from model import ActorCriticModel
from play.agent import Agent, first_unseen_seed, load_for_play, play_episodes
from play.watch import SUMMARY_STEPS, SUMMARY_WIDTH, Painter, Player, draw_episode, episode_summary, write_video
from play.window import Window
from run.checkpoint import save_model
from run.cli import command_line
from run.config import Config, check_config, load_config
from utils import inspect_environment

ROOT = Path(__file__).parent.parent
ENDLESS = "endless_mystery_path"
TASKS = ("poc_memory_env", "cartpole_masked", "mystery_path_grid", ENDLESS)


def make_model(name: str, memory_length: int = 16, **transformer: object) -> tuple:
    """Return a small model with random weights of a task, its config and its task."""
    config = load_config(ROOT / "configs" / f"{name}.yaml").model_dump() | {"hidden_layer_size": 16}
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
        monkeypatch.setattr("play.agent.SHORTEST_ROLLOUT", rollout)
        monkeypatch.setattr("play.agent.OBSERVATIONS_KEPT", rollout)
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
    monkeypatch.setattr("play.agent.ENVIRONMENTS", 7)
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
