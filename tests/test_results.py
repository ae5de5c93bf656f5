"""Numbers: what episodes report, their means, statistics over runs, tables, files and curves."""

import csv
import io
import itertools
import json
import math
import re
import sys
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import imageio.v2
import numpy as np
import pytest
import torch
from scipy.stats import trim_mean

import evaluate
from environments.numbers import count_missing_success, episode_numbers, episode_scalars, task_numbers
from evaluation.published import COLUMNS, Reference, read_references
from evaluation.statistics import (
    STATISTICS,
    Evaluated,
    group_runs,
    interquartile_mean,
    interval,
    plot,
    summarise,
    table,
    to_csv,
    to_json,
)
from evaluation.watch import describe_means
from run.cli import command_line, step_limit
from utils import UserError

PUBLISHED = Path(__file__).parent.parent / "docs" / "published" / "memory_gym.csv"


def evaluated(run_id: str, seed: int, steps: int, config: dict, reward: float = 0.0) -> Evaluated:
    """Return a model that did something made up."""
    episodes = [{"seed": s, "repetition": r, "reward": reward + s} for s in range(4) for r in range(2)]
    run = {"run_id": run_id, "seed": seed, "steps": steps}
    return Evaluated(f"{run_id}-{steps}.nn", "Task", config, run, episodes)


def successes(chance: float, seeds: int, repetitions: int, run: int = 1) -> Evaluated:
    """Return a model whose environment decides by its seed whether an episode succeeds, with a chance."""
    model = evaluated(f"run-{run}", run, 100, {})
    good = np.random.default_rng(run).permutation(seeds) < round(chance * seeds)
    model.episodes = [
        {"seed": s, "repetition": r, "reward": float(good[s]), "success": float(good[s])}
        for s in range(seeds) for r in range(repetitions)
    ]  # fmt: skip
    return model


# ------------------------------------------------------------------------------------------------ what episodes report


def test_any_info_becomes_numbers():
    """Numbers of any kind are kept, the rest is left out, and nothing that a task puts into an info fails."""
    cycle = {"depth": 1}
    cycle["again"] = cycle
    info = OrderedDict(
        none=None, text="3", nan=math.nan, infinity=np.float32("inf"), huge=10**400, complex=1j, many=np.ones(2),
        when=np.datetime64("2020"), mask=np.ones(3, bool), scalar=np.int8(3), zero_d=np.array(4.5), one=np.ones((1, 1)),
        boolean=np.bool_(True), tensor=torch.tensor([2.0], dtype=torch.bfloat16, requires_grad=True),
        nested={"left": {"score": 1}, "text": "x"}, cycle=cycle,
    )  # fmt: skip
    info[7] = 70
    found = task_numbers(info)
    assert {name: found[name] for name in found if "cycle" not in name} == {
        "scalar": 3, "zero_d": 4.5, "one": 1, "boolean": 1, "tensor": 2, "nested/left/score": 1, "7": 70
    }  # fmt: skip
    assert found["cycle/depth"] == 1 and all(type(value) is float for value in found.values())
    assert task_numbers(None) == task_numbers([1.0]) == {}


def test_names_are_clean_and_do_not_replace_others():
    """Odd and long names become tags, two keys never share one, and the program's own numbers keep theirs."""
    info = {"a b\n": 1, "a\tb ": 2, "x" * 500 + "1": 3, "x" * 500 + "2": 4, "": 5, "/x/": 6, (1, "z"): 7, "Länge": 8}
    info |= {"reward": 9, "length": 10, "seed": 11, "repetition": 12, "cut": 13}
    found = task_numbers(info)
    assert sorted(found.values()) == list(range(1, 14))
    assert all(re.fullmatch(r"[\w./-]{1,64}", name) for name in found)
    assert {"info_reward", "info_length", "info_seed", "info_repetition", "info_cut", "Länge"} <= set(found)
    # A long name is the same whether or not its neighbour is there.
    assert set(task_numbers({"x" * 500 + "2": 4})) < set(found)
    # Behind the wrapper, reward and length are the program's.
    assert episode_numbers({"reward": 1.0, "length": 2, "seed": 3}) == {"reward": 1.0, "length": 2.0, "info_seed": 3.0}


def test_missing_success_is_failure_and_the_rest_is_said():
    """An environment that mentions success only when it succeeds shows the true share."""
    episodes = [{"reward": 1.0, "success": 1.0, "keys": 4.0}] * 3 + [{"reward": 0.0}] * 6 + [{"reward": math.inf}]
    scalars = episode_scalars(episodes)
    assert scalars["episode/success_mean"] == 0.3 and "episode/success_share" not in scalars
    assert (scalars["episode/keys_mean"], scalars["episode/keys_share"]) == (4.0, 0.3)
    assert (scalars["episode/reward_mean"], scalars["episode/reward_share"]) == (1 / 3, 0.9)
    assert describe_means(episodes)[1:] == ["success 0.30", "keys 4.00 (in 3 of 10 episodes)"]
    assert describe_means([{"reward": 1.0, "length": 5.0, "cut": 1.0}, {"reward": 0.0, "length": 2.0}]) == [
        "reward 0.50", "length 3.50", "1 of 2 episodes cut"
    ]  # fmt: skip


def test_success_stays_known_when_its_episode_is_forgotten():
    """A window of the latest episodes goes on to show success after the last one that reported it has left."""
    window: list[dict[str, float]] = []
    for episode in ({}, {"success": 1.0}, {}, {}, {}):
        window.append(dict(episode))
        count_missing_success(window)
        del window[:-2]
    assert window == [{"success": 0.0}] * 2


# ---------------------------------------------------------------------------------------------------------- statistics


@pytest.mark.parametrize("chance", [0.8, 0.2])
@pytest.mark.parametrize("repetitions", [1, 5])
def test_often_is_reported_as_it_is(chance, repetitions):
    """Success of 80 % reads as .8, whatever is aggregated; only the old way says 1."""
    one = summarise(successes(chance, 100, repetitions).scores("success")[None])
    assert one["mean"] == one["iqm"] == pytest.approx(chance)
    assert one["low"] < chance < one["high"] and 0.1 < one["high"] - one["low"] < 0.2
    runs = np.stack([successes(share, 100, repetitions).scores("success") for share in (chance - 0.1, chance + 0.1)])
    several = summarise(runs)
    assert several["mean"] == pytest.approx(chance) and several["std"] == pytest.approx(0.1)
    assert (several["low"], several["high"]) == (pytest.approx(chance - 0.1), pytest.approx(chance + 0.1))
    assert summarise(runs, "episodes")["iqm"] == pytest.approx(round(chance), abs=0.01)


def test_interval_is_that_of_rliable():
    """Its definition counted out over all 4⁴ resamples, and its numbers, recorded with rliable 1.2.0 and arch 7.2.0."""
    rows = np.arange(12.0).reshape(4, 3) ** 2
    every = rows[list(itertools.product(range(4), repeat=4))]
    for statistic, recorded in ((np.mean, (9.166666666666666, 79.66666666666667)), (interquartile_mean, (2.5, 90.5))):
        found = np.sort([statistic(chosen) for chosen in every])
        for bound, share in zip(interval(rows, statistic), (0.025, 0.975), strict=True):
            assert (found < bound).mean() < share + 0.01 and (found <= bound).mean() > share - 0.01
        assert interval(rows, statistic) == pytest.approx(recorded)
    assert interquartile_mean(rows) == sum([9, 16, 25, 36, 49, 64]) / 6


def test_statistics_against_a_computation_by_hand():
    """Runs are averaged first; the interquartile mean drops a quarter of the runs, or of all episodes, at each end."""
    scores = np.array([[0.0, 1.0], [2.0, 3.0], [4.0, 5.0], [6.0, 100.0]])
    runs = summarise(scores[:, None])
    assert runs["mean"] == pytest.approx(scores.mean()) and runs["iqm"] == pytest.approx((2.5 + 4.5) / 2)
    assert runs["std"] == pytest.approx(np.std([0.5, 2.5, 4.5, 53.0])) and runs["low"] < runs["mean"] < runs["high"]
    pooled = summarise(scores[:, None], "episodes")
    assert pooled["iqm"] == pytest.approx((2 + 3 + 4 + 5) / 4) and pooled["std"] == pytest.approx(scores.std())
    assert pooled["low"] < pooled["iqm"] < pooled["high"] and summarise(scores[:, None], "episodes") == pooled
    # Rows are resampled whole: repeating the same scores within a row makes nothing surer.
    for aggregate, found in (("runs", summarise(scores[None])), ("episodes", pooled)):
        repeated = summarise(np.repeat(scores, 5, axis=1)[None], aggregate)
        assert repeated["high"] - repeated["low"] == pytest.approx(found["high"] - found["low"])
    # A metric that some episodes lack: over those that have it; of a single seed there is no interval.
    lacking = summarise(np.array([[[1.0, np.nan], [np.nan, np.nan], [4.0, 4.0]]]))
    assert lacking["mean"] == 3.0 and (lacking["low"], lacking["high"]) == (1.0, 4.0)
    assert math.isnan(summarise(np.array([[[1.0, 2.0]]]))["low"])


def test_runs_with_equal_configs_form_a_group():
    """Seeds of one config are one line, other configs other lines, and a model that comes twice counts once."""
    config, longer, other = {"gamma": 0.9, "updates": 5}, {"gamma": 0.9, "updates": 9}, {"gamma": 0.8, "updates": 5}
    models = [evaluated(f"poc-{seed}", seed, steps, config, seed) for seed in (1, 2) for steps in (200, 100)]
    models += [evaluated("poc-2", 2, 200, longer), evaluated("poc-9", 9, 100, longer), evaluated("poc-5", 5, 10, other)]
    first, second = group_runs(models)
    assert (first.name, first.runs, second.name) == ("poc", ["poc-1", "poc-2", "poc-9"], "poc-5")
    assert [(point.steps, len(point.models)) for point in first.points] == [(100, 3), (200, 2)]
    # Two runs resampled: both the worse one, or both the better one, are within the interval's ends.
    for aggregate, name in (("runs", "mean"), ("episodes", "iqm")):
        statistics = group_runs(models, aggregate)[0].points[1].statistics["reward"]
        assert statistics[name] == trim_mean([s + run for run in (1, 2) for s in range(4) for _ in range(2)], 0.25)
        assert statistics["low"] == pytest.approx(2.5) and statistics["high"] == pytest.approx(3.5)


def test_files_and_table_agree_on_what_is_missing():
    """A run that never succeeds counts; NaN is null; cut episodes and "in n of m episodes" are said everywhere."""
    good, bad = evaluated("run-1", 1, 100, {}), evaluated("run-2", 2, 100, {"infinite": math.inf})
    good.max_steps = 10_000
    for episode in good.episodes[:4]:
        episode |= {"success": 1.0, "keys": 3.0, "cut": 1.0}
    bad.episodes[0]["odd"] = math.nan
    bad.config = {}
    groups = group_runs([good, bad])
    lines = list(table(groups))
    assert max(map(len, lines)) <= 80 and lines[2].split() == ["over", "4", "seeds", "mean", "95", "%", "interval",
                                                               "IQM", "std"]  # fmt: skip
    assert lines[1] == "    4 of 8 episodes cut after 10,000 steps"
    assert any("in 4 of 8 episodes" in line for line in lines) and any("over 2 runs" in line for line in lines)
    content = json.loads(to_json(groups, {"seed": 0}), parse_constant=pytest.fail)
    assert (content["aggregate"], content["interval_of"]) == ("runs", "mean")
    assert content["groups"][0]["points"][0]["statistics"]["success"]["mean"] == 0.25
    statistics = [model["statistics"] for model in content["models"]]
    assert [found["success"]["mean"] for found in statistics] == [0.5, 0.0]
    assert (statistics[0]["keys"]["episodes"], statistics[0]["keys"]["of"]) == (4, 8)
    assert content["models"][0]["episodes"][0]["cut"] == 1.0 and content["models"][1]["episodes"][0]["odd"] is None
    rows = list(csv.DictReader(io.StringIO(to_csv(groups).decode())))
    for row, found, cut in zip(rows, statistics, ("4", "0"), strict=True):
        assert (row["aggregate"], row["interval_of"], row["episodes"], row["cut"]) == ("runs", "mean", "8", cut)
        for metric, numbers in found.items():
            assert row[f"{metric}_episodes"] == str(numbers["episodes"])
            assert all(float(row[f"{metric}_{name}"]) == numbers[name] for name in STATISTICS)


# -------------------------------------------------------------------------------------------------------------- curves


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
@pytest.mark.parametrize("aggregate", ["runs", "episodes"])
def test_plot_is_readable(suffix, aggregate):
    """The figure of two groups, one of them with a single point, and a published curve is a file of its format."""
    models = [evaluated("a", 1, steps, {"gamma": 0.9}) for steps in (0, 5, 10)] + [evaluated("b", 1, 5, {"gamma": 0.8})]
    reference = Reference("task/other", [0.0, 50.0], [0.0, 2.0], [0.1, 0.2], [0.0, 3.0], 5)
    data = plot(group_runs(models, aggregate), "reward", suffix, [reference])
    assert data[:8] in (b"\x89PNG\r\n\x1a\n", b"%PDF-1.4", b"<?xml ve")
    if suffix == ".png":
        assert imageio.v2.imread(data).shape[:2] == (800, 1280)


def test_published_curves_are_read():
    """Points of one curve and metric, in order of steps; a file is named once for several."""
    texts = [f"{PUBLISHED}:mp_grid_off/trxl,mp_grid_off/gru"]
    first, second = read_references(texts, "success")
    assert (first.name, first.runs, len(first.steps), second.name) == ("mp_grid_off/trxl", 5, 21, "mp_grid_off/gru")
    assert first.steps == sorted(first.steps) and first.mean[10] == pytest.approx(0.87, abs=0.01)
    with pytest.raises(UserError, match="is of success and reward; --metric is luck"):
        read_references([f"{PUBLISHED}:mp_off_dense/trxl"], "luck")


@pytest.mark.parametrize("column", ("steps", "runs"))
def test_published_curves_hold_numbers(tmp_path, column):
    values = dict.fromkeys(COLUMNS, "1") | {"task": "a", "run": "b", "metric": "success", column: "nan"}
    (tmp_path / "curves.csv").write_text(f"{','.join(COLUMNS)}\n{','.join(values.values())}\n")
    with pytest.raises(UserError, match="curves.csv: a/b: the columns from steps on should be numbers: nan"):
        read_references([f"{tmp_path / 'curves.csv'}:a/b"], "success")


# ------------------------------------------------------------------------------------------------------- command lines


@pytest.fixture
def played(monkeypatch):
    """Let evaluate.py believe that a model was played; takes what it was asked for."""
    config = SimpleNamespace(environment={"type": "Task"}, model_dump=lambda: {"gamma": 0.9})
    task, asked = SimpleNamespace(max_episode_steps=None), {}
    run = {"run_id": "run", "seed": 1, "steps": 5}

    def play_episodes(model, config, task, seeds, repetitions, **options):
        asked.update(options)
        return [{"seed": s, "repetition": r, "reward": float(s % 5 > 0)} for s in seeds for r in range(repetitions)]

    monkeypatch.setattr("evaluation.agent.load_for_play", lambda path, device: (None, config, task, run))
    monkeypatch.setattr("evaluation.agent.play_episodes", play_episodes)
    monkeypatch.setattr("evaluation.agent.first_unseen_seed", lambda environment: 100_000)
    monkeypatch.setattr("evaluation.agent.task_name", lambda environment: environment["type"])
    monkeypatch.setattr("torch.set_num_threads", lambda number: None)
    return asked


def evaluate_with(monkeypatch, *arguments: str) -> None:
    """Run evaluate.py in this process."""
    monkeypatch.setattr(sys, "argv", ["evaluate.py", "model.nn", "--cpu", *arguments])
    command_line(evaluate.main)


def test_evaluate_says_how_it_aggregated(played, monkeypatch, tmp_path, capsys):
    """--aggregate, --max-steps and --reference reach table, files and figure."""
    monkeypatch.chdir(tmp_path)
    curve = f"--reference={PUBLISHED}:emp/trxl"
    evaluate_with(monkeypatch, "--output=new", "--plot=curve.png", curve, curve.replace("trxl", "gru"))
    assert played["max_steps"] == 10_000 and "0.800" in capsys.readouterr().out
    evaluate_with(monkeypatch, "--output=old", "--aggregate=episodes", "--max-steps=7")
    assert played["max_steps"] == 7 and "1.000" in capsys.readouterr().out
    new, old = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("new", "old"))
    assert (new["aggregate"], old["aggregate"], old["models"][0]["max_steps"]) == ("runs", "episodes", 7)
    assert imageio.v2.imread(tmp_path / "curve.png").std() > 0


def test_tasks_with_a_limit_are_not_cut():
    """Only a flag cuts them."""
    limited, endless = SimpleNamespace(max_episode_steps=512), SimpleNamespace(max_episode_steps=None)
    assert [step_limit(None, limited), step_limit(None, endless), step_limit(99, limited)] == [None, 10_000, 99]


MISTAKES = [
    (("--aggregate=seeds",), "should be one of runs, episodes"),
    (("--max-steps=0",), "--max-steps"),
    (("--reference=x.csv:a/b",), "name one with --plot"),
    (("--plot=c.png", "--reference=a/b"), "should be <file>:<task>/<run>"),
    (("--plot=c.png", f"--reference={PUBLISHED}:mp/trxl"), "there are mm_grid/trxl, "),
    (("--plot=c.png", f"--reference={PUBLISHED.with_name('x.csv')}:mp/trxl"), "memory_gym.csv"),
    (("--plot=c.png", f"--reference={PUBLISHED}:mm_grid/trxl"), "is of commands_completed; --metric is reward"),
    (("--plot=c.png", f"--reference={Path(__file__)}:mm_grid/trxl"), "should have the columns task, run"),
]


@pytest.mark.parametrize(("arguments", "message"), MISTAKES)
def test_mistakes_are_one_line_before_anything_is_played(played, monkeypatch, tmp_path, capsys, arguments, message):
    """Exit code 2, and one line that says what to put right."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        evaluate_with(monkeypatch, *arguments)
    lines = capsys.readouterr().err.splitlines()
    assert stopped.value.code == 2 and len(lines) == 1 and message in lines[0] and not played


def test_evaluate_writes_what_it_found(tmp_path):
    """Every flag; folders and files; JSON with every episode, CSV with a row per model, statistics as by hand."""
    from tests.test_watching import command, write_model

    (tmp_path / "run-1").mkdir()
    for steps in (100, 200):
        write_model(tmp_path / "run-1" / f"model-{steps:012d}.nn", run_id="run-1", steps=steps)
    write_model(tmp_path / "two.nn", run_id="run-2", seed=2, steps=200)
    done = command("evaluate.py", "run-1", "two.nn", "two.nn", "--seeds=6", "--repetitions=2", "--seed=3",
                   "--processes=2", "--device=cpu", "--metric=length", "--plot=curve.png", "--output=numbers",
                   folder=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "run: 2 runs" in done.stdout and max(map(len, done.stdout.splitlines())) <= 80
    assert "3/3 two.nn: 12 episodes" in done.stderr
    content = json.loads((tmp_path / "numbers.json").read_text())
    assert content["seeds"] == list(range(100_003, 100_009)) and content["versions"]["torch"] == torch.__version__
    assert [model["path"] for model in content["models"]] == [
        "run-1/model-000000000100.nn", "run-1/model-000000000200.nn", "two.nn"
    ]  # fmt: skip
    assert [(group["name"], len(group["points"])) for group in content["groups"]] == [("run", 2)]
    with open(tmp_path / "numbers.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    for row, model in zip(rows, content["models"], strict=True):
        assert {episode["seed"] for episode in model["episodes"]} == set(content["seeds"])
        lengths = [episode["length"] for episode in model["episodes"]]
        assert float(row["length_mean"]) == model["statistics"]["length"]["mean"] == pytest.approx(np.mean(lengths))
        assert (row["model"], int(row["steps"]), row["episodes"]) == (model["path"], model["run"]["steps"], "12")
    assert imageio.v2.imread(tmp_path / "curve.png").std() > 0


def test_evaluate_deterministic_does_not_depend_on_processes(tmp_path):
    """Whatever --processes, the same numbers; --deterministic repeats every episode."""
    from tests.test_watching import command, write_model

    arguments = (write_model(tmp_path / "run.nn"), "--seeds=5", "--repetitions=2", "--cpu", "--deterministic")
    contents = []
    for processes in (1, 2):
        done = command("evaluate.py", *arguments, f"--processes={processes}", f"--output={processes}", folder=tmp_path)
        assert done.returncode == 0, done.stderr
        contents.append(json.loads((tmp_path / f"{processes}.json").read_text())["models"][0]["episodes"])
    assert contents[0] == contents[1]
    assert all(a["length"] == b["length"] for a, b in zip(contents[0][::2], contents[0][1::2], strict=True))
