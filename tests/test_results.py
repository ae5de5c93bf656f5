"""Numbers: what episodes report, their means, statistics over runs, tables, files and curves."""

import csv
import io
import json
import math
import re
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import imageio.v2
import numpy as np
import pytest
import torch
from scipy.stats import t
from test_faults import command

import evaluate
from environments.numbers import episode_scalars, task_numbers
from evaluation.published import read_references
from evaluation.statistics import (
    Evaluated,
    chosen_seeds,
    contents,
    from_json,
    group_runs,
    interval,
    plot,
    runs_of,
    summarise,
    table,
    to_csv,
)
from run.cli import step_limit
from tests.test_agent import make_model, write
from utils import UserError

PUBLISHED = Path(__file__).parent.parent / "docs" / "published" / "memory_gym.csv"


def evaluated(run_id: str, seed: int, steps: int, config: dict, reward: float = 0.0, **more) -> Evaluated:
    """Return a model that did something made up."""
    episodes = [{"seed": s, "repetition": r, "reward": reward + s} for s in range(4) for r in range(2)]
    run = {"run_id": run_id, "seed": seed, "steps": steps, "commit": more.pop("commit", "1234567890")}
    path, environment = more.pop("path", f"{run_id}-{steps}.nn"), more.pop("environment", "Task")
    return Evaluated(path, environment, config, run, episodes, **more)


# ------------------------------------------------------------------------------------------------ what episodes report


def test_any_info_becomes_numbers():
    """Numbers of any kind are kept under clean names, the rest is left out; the program's own numbers keep theirs."""
    info = {
        "none": None, "text": "3", "nan": math.nan, "huge": 10**400, "many": np.ones(2), "when": np.datetime64("2020"),
        "scalar": np.int8(3), "zero_d": np.array(4.5), "one": np.ones((1, 1)), "boolean": np.bool_(True),
        "tensor": torch.tensor([2.0], requires_grad=True), "nested": {"left": {"score": 1}, "text": "x"}, 7: 70,
    }  # fmt: skip
    found = task_numbers(info)
    assert found == {"scalar": 3, "zero_d": 4.5, "one": 1, "boolean": 1, "tensor": 2, "nested/left/score": 1, "7": 70}
    assert all(type(value) is float for value in found.values()) and task_numbers(None) == {}
    info = {"a b\n": 1, "x" * 500: 2, "/x/": 3, (1, "z"): 4, "Länge": 5}
    info |= {"reward": 6, "length": 7, "seed": 8, "repetition": 9, "cut": 10}
    found = task_numbers(info)
    assert sorted(found.values()) == list(range(1, 11))
    assert all(re.fullmatch(r"[\w./-]{1,64}", name) for name in found)
    assert {"info_reward", "info_length", "info_seed", "info_repetition", "info_cut", "Länge"} <= set(found)


def test_missing_success_is_failure_and_the_rest_is_said():
    """An environment that mentions success only when it succeeds shows the true share."""
    episodes = [{"reward": 1.0, "success": 1.0, "keys": 4.0}] * 3 + [{"reward": 0.0}] * 7
    scalars = episode_scalars(episodes)
    assert scalars["episode/success_mean"] == 0.3 and "episode/success_share" not in scalars
    assert (scalars["episode/keys_mean"], scalars["episode/keys_share"]) == (4.0, 0.3)
    assert scalars["episode/reward_mean"] == 0.3 and "episode/reward_share" not in scalars


# ---------------------------------------------------------------------------------------------------------- statistics

DRAWN = {
    "normal": (lambda g, n: g.normal(size=(n, 1, 1)), 0.0),
    "skewed": (lambda g, n: g.lognormal(0, 0.5, (n, 1, 1)), math.exp(0.125)),
    "success": (lambda g, n: 1.0 * (g.random((n, 100, 1)) < 0.9), 0.9),
    "nearly always": (lambda g, n: 1.0 * (g.random((n, 50, 1)) < 0.99), 0.99),
    "over seeds": (lambda g, n: 1.0 * (g.random((1, 20 * n, 1)) < 0.8), 0.8),
}


@pytest.mark.parametrize("runs", [3, 5])
@pytest.mark.parametrize("drawn", DRAWN)
def test_intervals_hold_the_mean_as_often_as_they_say(drawn, runs):
    """Simulated: never less than 93 %, and not more than 97 % where scores have no ties (± 2 % for 400 samples)."""
    draw, mean = DRAWN[drawn]
    generator = np.random.default_rng(0)
    found = [summarise(draw(generator, runs)) for _ in range(400)]
    held = np.mean([numbers["low"] <= mean <= numbers["high"] for numbers in found])
    assert held > 0.91 and (held < 0.99 or drawn in ("success", "nearly always"))


def test_interval_is_that_of_student_but_for_skew():
    """The t interval where nothing is skewed; longer on the side that the skew points to; none for two."""
    reach = t.ppf(0.975, 2) / math.sqrt(3)
    assert interval(np.array([1.0, 2.0, 3.0])) == pytest.approx((2 - reach, 2 + reach))
    low, high = interval(np.array([0.0, 0.0, 0.0, 1.0]))
    assert high - 0.25 > 0.25 - low >= t.ppf(0.975, 3) * 0.25 - 1e-9
    assert np.isnan(interval(np.array([1.0, 2.0]))).all() and interval(np.ones(3)) == (1, 1)


def test_statistics_against_a_computation_by_hand():
    """Runs are averaged first; deviations have n - 1; the interquartile mean drops a quarter at each end."""
    scores = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 100.0]])
    runs = summarise(scores[:, None])
    assert runs["mean"] == pytest.approx(scores.mean()) and runs["iqm"] == pytest.approx((2.5 + 4.5) / 2)
    assert runs["std"] == pytest.approx(np.std([0.5, 2.5, 4.5, 53.0], ddof=1)) and runs["low"] < 0 < runs["high"]
    pooled = summarise(scores[:, None], "episodes")
    assert pooled["iqm"] == (2 + 3 + 4 + 5) / 4 and pooled["std"] == pytest.approx(scores.std(ddof=1))
    assert pooled["low"] < pooled["iqm"] < pooled["high"] < 100
    # Rows are what is counted: repeating the same scores within a row makes nothing surer.
    repeated = summarise(np.repeat(scores, 5, axis=1)[None], "episodes")
    assert repeated["high"] - repeated["low"] == pytest.approx(pooled["high"] - pooled["low"], rel=0.1)
    # A metric that some episodes lack: over the seeds that have it.
    lacking = summarise(np.array([[[1.0, np.nan], [np.nan, np.nan], [4.0, 4.0]]]))
    assert lacking["mean"] == 2.5 and math.isnan(lacking["low"]) and lacking["std"] == pytest.approx(3 / math.sqrt(2))


def test_success_is_a_share():
    """Its interval stays between 0 and 1, and where all succeed it says how few the seeds are."""
    assert summarise(np.ones((3, 100, 1)))["low"] == pytest.approx(0.963, abs=0.001)
    spread = summarise(np.array([[1.0, 1.0], [0.0, 1.0], [1.0, 1.0]])[..., None])
    assert (spread["mean"], spread["high"]) == (pytest.approx(5 / 6), 1.0) and spread["low"] < 0.5


def test_groups_are_runs_of_one_config_and_commit():
    """Other configs, commits and tasks, and seeds that come again, are other groups; a label decides within a task."""
    config, longer, other = {"gamma": 0.9, "updates": 5}, {"gamma": 0.9, "eval_interval": 9}, {"gamma": 0.8}
    models = [evaluated(f"poc-{seed}", seed, steps, config, seed) for seed in (1, 2) for steps in (200, 100)]
    models += [evaluated("poc-3", 3, 100, longer), evaluated("poc-2", 2, 200, longer, 9, path="again.nn")]
    models += [evaluated("poc-5", 5, 10, other), evaluated("poc-1", 1, 200, config, commit="abcdefgh-dirty")]
    groups = group_runs(models)
    assert {name: runs_of(points) for name, points in groups.items()} == {
        "poc": ["poc-1", "poc-2", "poc-3"], "poc-2": ["poc-2"], "poc-5": ["poc-5"], "poc-1": ["poc-1"]
    }  # fmt: skip
    assert [(point.steps, len(point.models)) for point in groups["poc"]] == [(100, 3), (200, 2)]
    assert groups["poc"][1].statistics["reward"]["runs"] == [2.5, 3.5]
    assert "2.500, 3.500" in "\n".join(table(groups)), "two runs have no interval and are shown themselves"
    models = [evaluated("a", seed, 5, {"gamma": seed}, label="mine") for seed in (1, 2)]
    models += [evaluated("a", 3, 5, {}, label="mine", environment="Other")]
    found = {name: len(points[0].models) for name, points in group_runs(models).items()}
    assert found == {"mine": 2, "mine @1234567": 1}


def test_seeds_are_unseen_or_those_that_are_asked_for():
    """A number counts unseen ones; a range is taken as it is, and said to be of training where it is."""
    few = SimpleNamespace(reset_params={"start-seed": 0, "num-seeds": 10})
    many = SimpleNamespace(reset_params={})
    assert chosen_seeds("2", 3, [few, many]) == ([100_003, 100_004], "")
    assert chosen_seeds("8:12", 3, [few]) == ([8, 9, 10, 11], "--seeds: training may have drawn 2 of these 4")
    for text in ("0", "-3", "5:5", "9:3", ":4", "1:2:3", "x", "²", "9" * 30):
        with pytest.raises(UserError, match="--seeds: .* should be how many"):
            chosen_seeds(text, 0, [few])


def test_files_and_table_agree(tmp_path):
    """A run that never succeeds counts; what is cut or missing is said everywhere; files can be read."""
    good, bad = evaluated("run-1", 1, 100, {}), evaluated("run-2", 2, 100, {})
    good.max_steps = 10_000
    for episode in good.episodes[:4]:
        episode |= {"success": 1.0, "keys": 3.0, "cut": 1.0}
    groups = group_runs([good, bad])
    lines = list(table(groups))
    assert max(map(len, lines)) <= 80 and lines[1] == "    4 of 8 episodes cut after 10,000 steps"
    assert any("in 4 of 8 episodes" in line for line in lines) and any("over 2 runs" in line for line in lines)
    content = contents(groups, {"seed": 0})
    data = json.dumps(content, allow_nan=False)
    assert (content["aggregate"], content["interval_of"]) == ("runs", "mean")
    assert content["groups"][0]["points"][0]["statistics"]["success"]["mean"] == 0.25
    statistics = [model["statistics"] for model in content["models"]]
    assert [found["success"]["mean"] for found in statistics] == [0.5, 0.0]
    assert (statistics[0]["keys"]["episodes"], statistics[0]["keys"]["of"]) == (4, 8)
    rows = list(csv.DictReader(io.StringIO(to_csv(content).decode())))
    for row, found, cut in zip(rows, statistics, ("4", "0"), strict=True):
        assert (row["aggregate"], row["interval_of"], row["episodes"], row["cut"]) == ("runs", "mean", "8", cut)
        for metric, numbers in found.items():
            assert row[f"{metric}_episodes"] == str(numbers["episodes"])
            assert row[f"{metric}_mean"] == str(numbers["mean"])
    (tmp_path / "results.json").write_text(data)
    assert list(table(group_runs(from_json(tmp_path / "results.json")))) == lines
    with pytest.raises(UserError, match="should be a file that evaluate.py --output wrote"):
        from_json(Path(__file__))


@pytest.mark.parametrize("aggregate", ["runs", "episodes"])
def test_plot_is_readable(aggregate):
    """The figure of a curve of two runs, a single point and published curves is a file of its format."""
    models = [evaluated(f"a-{seed}", seed, steps, {"gamma": 0.9}) for seed in (1, 2) for steps in (5, 10)]
    models.append(evaluated("b", 1, 5, {"gamma": 0.8}))
    names = f"{PUBLISHED}:mp_grid_off/trxl,mp_grid_off/gru"
    references = read_references([names], "success", ["MysteryPath-Grid"])
    assert [(name, rows["runs"][0], len(rows)) for name, rows in references.items()] == [
        ("mp_grid_off/trxl", 5, 21), ("mp_grid_off/gru", 5, 21)
    ]  # fmt: skip
    rows = references["mp_grid_off/trxl"]
    assert (np.diff(rows["steps"]) > 0).all() and rows["mean"][10] == pytest.approx(0.87, abs=0.01)
    svg = plot(group_runs(models, aggregate), "reward", ".svg", references)
    assert all(name in svg for name in (b"a (2 runs)", b"b (1 run, band over ", b"mp_grid_off/trxl (published, 5 runs"))


# ------------------------------------------------------------------------------------------------------- command lines


@pytest.fixture
def evaluate_with(monkeypatch, tmp_path):
    """A function that runs evaluate.py in this process, beside a file of results, and returns what it says."""
    monkeypatch.chdir(tmp_path)
    models = [evaluated("run", 1, 5, {}, environment="MysteryPath-Grid")]
    for episode in models[0].episodes:
        episode["success"] = 1.0
    Path("old.json").write_text(json.dumps(contents(group_runs(models), {})))
    models[0].episodes = models[0].episodes[::2]
    Path("half.json").write_text(json.dumps(contents(group_runs(models), {})))
    return partial(command, tmp_path, "--cpu", program=evaluate)


def test_results_are_aggregated_anew(evaluate_with):
    """Files are read again; --aggregate and --reference reach table, files and figure."""
    curve = f"--reference={PUBLISHED}:mp_grid_off/trxl"
    said = evaluate_with("old.json", "--aggregate=episodes", "--output=new")
    assert "over 8 episodes" in said and "wrote new.json, new.csv" in said
    content = json.loads(Path("new.json").read_text())
    assert (content["aggregate"], content["interval_of"], content["seeds"]) == ("episodes", "iqm", [0, 1, 2, 3])
    said = evaluate_with("new.json", "--plot=curve.png", "--metric=success", curve)
    assert evaluate_with("old.json") in said and imageio.v2.imread("curve.png").std() > 0
    limited, endless = SimpleNamespace(max_episode_steps=512), SimpleNamespace(max_episode_steps=None)
    assert [step_limit(None, limited), step_limit(None, endless), step_limit(99, limited)] == [None, 10_000, 99]


def test_output_is_never_the_reason_to_lose_results(evaluate_with, monkeypatch, tmp_path):
    """Files are written before anything is printed, and before a metric that nobody reports ends it."""
    monkeypatch.setattr("evaluation.statistics.table", lambda groups: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        evaluate_with("old.json", "--output=a", "--plot=a.png")
    assert {path.name for path in tmp_path.iterdir()} == {"old.json", "half.json", "a.json", "a.csv", "a.png"}


MISTAKES = {
    "half.json": "run-5.nn: was evaluated on other episodes than",
    "--group=a.nn": "should be <label>:<models>",
    f"--plot=c.png --metric=success --reference={PUBLISHED}:mp/trxl": "for success in MysteryPath-Grid it has mp_grid_",
    f"--plot=c.png --reference={Path(__file__)}:mm_grid/trxl": "of a file with the columns environment, ",
    "--plot=c.png --metric=keys": "--metric: 'keys' is not reported; allowed here are reward",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes_are_one_line(evaluate_with, arguments):
    said = evaluate_with("old.json", *arguments.split(), code=2)
    assert MISTAKES[arguments] in said.splitlines()[-1] and "Traceback" not in said


def test_evaluate_writes_what_it_found(evaluate_with):
    """Every flag; folders and files; JSON with every episode, CSV with a row per model, statistics as by hand."""
    made = make_model({"type": "PocMemoryEnv"})
    Path("run-1").mkdir()
    for steps in (100, 200):
        write(Path("run-1") / f"model-{steps:012d}.nn", *made, run_id="run-1", steps=steps)
    write(Path("two.nn"), *made, run_id="run-2", seed=2, steps=200)
    said = evaluate_with(
        "run-1", "two.nn", "two.nn", "--seeds=2", "--repetitions=2", "--seed=3", "--processes=2", "--deterministic",
        "--metric=length", "--plot=curve.png", "--output=numbers", "--max-steps=9",
    )  # fmt: skip
    assert "run: 2 runs (PocMemoryEnv), 200 steps, 8" in said and "3/3 two.nn: 100%" in said
    content = json.loads(Path("numbers.json").read_text())
    assert content["seeds"] == [100_003, 100_004] and content["versions"]["torch"] == torch.__version__
    paths = ["run-1/model-000000000100.nn", "run-1/model-000000000200.nn", "two.nn"]
    assert [model["path"] for model in content["models"]] == paths
    assert [(group["name"], len(group["points"])) for group in content["groups"]] == [("run", 2)]
    with open("numbers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, model in zip(rows, content["models"], strict=True):
        lengths = [episode["length"] for episode in model["episodes"]]
        assert lengths[::2] == lengths[1::2], "deterministic: each seed's repetitions are the same"
        assert float(row["length_mean"]) == model["statistics"]["length"]["mean"] == pytest.approx(np.mean(lengths))
    assert imageio.v2.imread("curve.png").std() > 0
