"""Measure how fast a config samples and learns here, and what arithmetic allows.

Usage:
    benchmark.py [options]
    benchmark.py -h | --help

Options:
    --config=<file>      A config [default: configs/mortar_mayhem_grid.yaml].
    --updates=<n>        Updates to measure behind one to warm up [default: 3].
    --attention=<name>   fast, or textbook: per sample its frame is encoded, its
                         window copied, each item projected [default: fast].
    --profile            Also say what the time is spent on.
    --environments       Measure only the environments, in several layouts.
    --output=<file>      Write the results as JSON too.
    --device=<name>      cpu, cuda or cuda:N; by default cuda if there is one.
    --cpu                The same as --device=cpu.
    --processes=<n>      Processes for environments, by default one per core.
    --overlap=<name>     on, off or auto: halves of the environments take turns
                         [default: auto].
    --precision=<name>   float32, or bf16 matrix products [default: float32].
    --compile            Compile the model first (torch.compile).
    -h --help            Show this.
Example: python benchmark.py --config=configs/minigrid.yaml --updates=5
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from pathlib import Path

from run.cli import arguments_of, command_line, cores, one_of, use_cores, whole_number
from run.config import Config, load_config
from utils import UserError

PARTS = {  # what an operation of PyTorch's profiler counts as
    "convolutions and large products": ("convolution", "_linear_pointwise"),
    "attention to windows": ("Window",),
    "matrix products": ("mm", "linear"),
    "copies and gathers": ("copy_", "index", "cat", "stack", "embedding", "gather", "fill_", "zero_"),
    "optimiser": ("_fused_adamw_", "_foreach", "linalg_vector_norm"),
    "normalisation and softmax": ("layer_norm", "softmax"),
}


def main() -> None:
    """Parse the command line, measure, print a table."""
    arguments = arguments_of(__doc__)
    from run.distributed import check_alike, together

    with together(arguments) as (world, device):
        with world.agree_on(UserError):
            config = load_config(arguments["--config"])
        check_alike(world, config, arguments)
        if world.size > 1:
            results = measure_scaling(config, arguments, world, device)
        elif arguments["--environments"]:
            results = measure_environments(config)
        else:
            results = measure_updates(config, arguments, device)
        if world.first:
            report({"config": arguments["--config"]} | results, arguments)


def report(results: dict, arguments: dict) -> None:
    """Print a table, and write the results where --output says."""
    for name, value in results.items():
        print(f"{name:<44}{value:>16,.3g}" if isinstance(value, float) else f"{name:<44}{value!s:>16}")
    if arguments["--output"]:
        Path(arguments["--output"]).write_text(json.dumps(results, indent=2) + "\n", encoding="utf-8")


# ---------------------------------------------------------------------------------------------------- whole updates


def chosen_options(arguments: dict, device, world=None):
    """Return the `Options` that a command line asks for.

    Args:
        arguments: of the command line.
        device: to compute on.
        world: all processes, None where there are no others.
    """
    from run.options import PRECISIONS, Options

    from run.distributed import Ranks

    world = world or Ranks()
    use_cores(device, world.local_size)
    overlap = {"on": True, "off": False, "auto": None}[one_of(arguments, "--overlap", ("on", "off", "auto"))]
    return Options(
        device,
        processes=whole_number(arguments, "--processes", 1, 4096) or max(1, cores() // world.local_size),
        overlap=overlap,
        precision=one_of(arguments, "--precision", PRECISIONS),
        compile=arguments["--compile"],
        world=world,
    )


def measure_scaling(config: Config, arguments: dict, world, device) -> dict:
    """Return how fast all processes are together, and the first of them alone while the others wait.

    Communication is what a process spends in it, waiting for slower ones included. Under "floor" is a sum of the
    gradient alone, when all are ready for it.

    Args:
        config: a checked config.
        arguments: the command line.
        world: all processes.
        device: of this one.
    """
    import torch

    from run.distributed import Ranks, check_divisible

    with world.agree_on(UserError):
        check_divisible(world, config)
        options = chosen_options(arguments, device, world)
        updates = whole_number(arguments, "--updates", 1)
    alone = measure_rate(config, dataclasses.replace(options, world=Ranks()), updates) if world.first else {}
    world.gather(None)
    found = measure_rate(config, options, updates)
    gradient = found.pop("gradient")
    seconds = []
    for _ in range(20):
        world.any(False)
        started = time.perf_counter()
        world.add(gradient)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - started)
    rate = found["update_steps_per_second"]
    return {
        "processes": world.size,
        "update_steps_per_second": rate,
        "of_one_process_alone": alone.get("update_steps_per_second", rate),
        "efficiency": rate / alone.get("update_steps_per_second", rate) / world.size,
        "share: communication": found["communication_seconds"] / found["update_seconds"],
        "seconds_per_minibatch": found["optimisation_seconds"] / config.epochs / config.n_mini_batch,
        "gradient_megabytes": gradient.numel() * gradient.element_size() / 1e6,
        "gradient_sum_floor_seconds": statistics.median(seconds),
    }


def measure_rate(config: Config, options, updates: int) -> dict:
    """Return medians over updates: steps per second, seconds of an update, of its optimisation, of communication."""
    from trainer import PPOTrainer

    trainer = PPOTrainer(config, "benchmark", 1, options)
    spent = time_communication(trainer.world)
    runs = []
    try:
        trainer.start_workers()
        for update in range(-1, updates):
            if options.world.first:
                say(f"{options.world.size} processes, update {update + 1}")
            before, started = spent[0], time.perf_counter()
            scalars = trainer.train_update()
            optimisation = trainer.samples / scalars["performance/optimisation_steps_per_second"]
            runs.append((time.perf_counter() - started, optimisation, spent[0] - before))
    finally:
        trainer.workers.close()
    update, optimisation, communication = (statistics.median(column) for column in zip(*runs[1:], strict=True))
    return {
        "update_steps_per_second": trainer.samples / update,
        "update_seconds": update,
        "optimisation_seconds": optimisation,
        "communication_seconds": communication,
        "gradient": trainer.optimizer.gradient,
    }


def time_communication(world) -> list[float]:
    """Let a world count the seconds that it communicates; return where it does."""
    spent = [0.0]

    def timed(communicate):
        """Return a method that counts its seconds."""

        def method(argument):
            """Communicate as usual."""
            started = time.perf_counter()
            result = communicate(argument)
            spent[0] += time.perf_counter() - started
            return result

        return method

    for name in ("add", "join_rows", "gather"):  # `any` goes by way of `add`
        setattr(world, name, timed(getattr(world, name)))
    return spent


def measure_updates(config: Config, arguments: dict, device) -> dict:
    """Return speeds, memory and the arithmetic floor of a config's updates.

    Args:
        config: a checked config.
        arguments: the command line.
        device: to compute on.
    """
    import torch

    from trainer import PPOTrainer

    options = chosen_options(arguments, device)
    textbook = one_of(arguments, "--attention", ("fast", "textbook")) == "textbook"
    trainer = PPOTrainer(config, "benchmark", 1, options)
    if textbook:
        use_textbook_formulation(trainer)
    rates = {"blas_gflops": matrix_rate(device, plain=True), "best_gflops": matrix_rate(device, plain=False)}
    trainer.start_workers()
    try:
        runs = []
        for update in range(-1, whole_number(arguments, "--updates", 1)):
            say(f"update {update + 1}" if update >= 0 else "warming up")
            runs.append(measure_update(trainer))
        memory = memory_in_use(trainer)
        shares = profile_update(trainer) if arguments["--profile"] else {}
    finally:
        trainer.workers.close()
    median = {name: statistics.median(run[name] for run in runs[1:]) for name in runs[0]}
    seconds = median["sampling_seconds"] + median["optimisation_seconds"]
    speeds = {
        "sampling_steps_per_second": trainer.samples / median["sampling_seconds"],
        "optimisation_steps_per_second": trainer.samples / median["optimisation_seconds"],
        "update_steps_per_second": trainer.samples / seconds,
    }
    floors: dict[str, float] = {}
    for name, rate in rates.items():
        floor = median["gigaflop"] / rate
        floors |= {f"floor_seconds_at_{name}": floor, f"update_over_floor_at_{name}": seconds / floor}
    machine = {"device": trainer.run["device"], "cores": cores(), "threads": torch.get_num_threads()}
    return machine | {"attention": arguments["--attention"]} | speeds | median | rates | floors | memory | shares


def measure_update(trainer) -> dict[str, float]:
    """Carry out one update; return its seconds, its arithmetic and how many observations were distinct."""
    waited = 0.0
    receive = trainer.workers.receive

    def timed_receive(group: range) -> list:
        """Receive as usual and add up how long it took."""
        nonlocal waited
        started = time.perf_counter()
        ended = receive(group)
        waited += time.perf_counter() - started
        return ended

    trainer.workers.receive = timed_receive
    scalars = trainer.train_update()
    trainer.workers.receive = receive
    return {
        "sampling_seconds": trainer.samples / scalars["performance/sampling_steps_per_second"],
        "of_which_waiting_for_environments": waited,
        "optimisation_seconds": trainer.samples / scalars["performance/optimisation_steps_per_second"],
        "distinct_observations": scalars["performance/distinct_observations"],
        "gigaflop": count_operations(trainer) / 1e9,
    }


def count_operations(trainer) -> float:
    """Return the floating-point operations that the mathematics of the last update needs.

    A multiply-add counts as two. A layer costs its weights once forward, and twice more backward, the first of the
    encoder only once more. Distinct frames are encoded once per rollout and once per minibatch. Attention is counted
    over the items that each query may look at, and without gradients with respect to memory.
    """
    import numpy as np

    model, buffer, config = trainer.model, trainer.buffer, trainer.config
    transformer, dim = config.transformer, config.transformer.embed_dim
    encoder = layer_costs(model.encoder)
    # Of each sample; what tells frames apart compares each with all of the minibatch's, which get a prior.
    beside = 0 if model.vector is None else model.vector.weight.numel()
    auxiliary, comparing = 0, 0
    for task in trainer.auxiliary.values():
        prior = getattr(task, "prior", None) is not None
        auxiliary += sum(layer_costs(task)) - dim * prior
        auxiliary += sum(layer.weight.numel() for layer in getattr(task, "actions", []) if model.task.continuous)
        comparing += prior
    heads = sum(module.weight.numel() for module in (model.policy_hidden, model.value_hidden, *model.policy))
    matrices = {
        name: matrix.numel() for name, matrix in model.transformer.blocks.named_parameters() if matrix.dim() == 2
    }
    # Of each distance, not of each sample; the biases of the relative encoding are no products.
    table = sum(matrices.pop(name) for name in [*matrices] if name.endswith("relative.weight"))
    table *= transformer.memory_length + 1
    dense = heads + beside + sum(size for name, size in matrices.items() if name.endswith("weight"))
    seen = np.minimum(buffer.step, transformer.memory_length).sum() / buffer.step.size
    attention = 2 * transformer.num_blocks * transformer.num_heads * dim * seen
    positions = transformer.num_blocks * dim * seen if table else 0
    embedding = model.embedding.weight.numel()
    distinct = len(buffer.observations)
    seen_by = buffer.observation_index if model.task.frame is None else buffer.frame_index()
    total = (
        buffer.step.size * (dense + attention + positions) + distinct * (sum(encoder) + embedding) + table
    )  # sampling
    for epoch in range(config.epochs):
        for samples in buffer.minibatches(np.random.default_rng((trainer.seed, trainer.update - 1, epoch))):
            distinct = len(np.unique(seen_by.flat[samples]))
            total += distinct * (3 * (sum(encoder) + embedding) - encoder[0])
            total += len(samples) * (3 * (dense + auxiliary + positions) + 2 * attention) + 2 * table
            total += 3 * comparing * distinct * dim * (len(samples) + 1)
    return 2 * float(total)


def layer_costs(part) -> list[int]:
    """Return the multiply-adds per sample of each layer of an encoder or of an auxiliary task."""
    import math

    layers = [module for module in part.children() if hasattr(module, "weight")]
    sizes = getattr(part, "sizes", [])
    costs = []
    for layer in layers:
        places = 1
        if layer.weight.dim() == 4:  # a convolution works at each of its outputs, a transposed one at each input
            places = math.prod(sizes[int(layer_name(part, layer)[-1])])
        costs.append(layer.weight.numel() * places)
    return costs


def layer_name(part, layer) -> str:
    """Return the name of a layer within its part."""
    return next(name for name, module in part.named_children() if module is layer)


def matrix_rate(device, plain: bool) -> float:
    """Return the GFLOP/s of a float32 product (4096×384)·(384×384), by PyTorch's own choice or by the best kernel."""
    import torch
    from torch.nn import functional as F

    from kernels.products import linear

    x, weight = torch.randn(4096, 384, device=device), torch.randn(384, 384, device=device)
    product = F.linear if plain else linear
    best = float("inf")
    for _ in range(30):
        started = time.perf_counter()
        for _ in range(5):
            product(x, weight)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, (time.perf_counter() - started) / 5)
    return 2 * 4096 * 384 * 384 / best / 1e9


def memory_in_use(trainer) -> dict[str, float]:
    """Return the peak memory of the trainer, the memory of its workers and the peak on the device, in GB."""
    import psutil
    import torch

    workers = [psutil.Process(process.handle.pid).memory_info().rss for process in trainer.workers.processes]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_device = torch.cuda.max_memory_allocated(trainer.device) if trainer.device.type == "cuda" else 0
    return {"trainer_peak_gb": peak / 1e9, "workers_gb": sum(workers) / 1e9, "device_peak_gb": on_device / 1e9}


def profile_update(trainer) -> dict[str, float]:
    """Carry out one update under PyTorch's profiler; return the share of its time that each kind of work takes."""
    from torch.profiler import profile

    say("profiling")
    trainer.map_parts = map  # the profiler sees one thread
    with profile() as profiler:
        started = time.perf_counter()
        waited = measure_update(trainer)["of_which_waiting_for_environments"]
        total = time.perf_counter() - started
    shares = dict.fromkeys(PARTS, 0.0)
    on_gpu = trainer.device.type == "cuda"
    for event in profiler.key_averages():
        seconds = (event.self_device_time_total if on_gpu else event.self_cpu_time_total) / 1e6
        part = next((part for part, words in PARTS.items() if any(word in event.key for word in words)), None)
        if part:
            shares[part] += seconds / total
    shares["waiting for environments"] = waited / total
    return {f"share: {name}": share for name, share in shares.items()} | {
        "share: everything else": max(0.0, 1 - sum(shares.values()))
    }


# ------------------------------------------------------------------------------------------- the textbook formulation


def use_textbook_formulation(trainer) -> None:
    """Let a fresh trainer compute as textbooks do.

    Every sample's frame is encoded; a window is copied for every sample, its items get their position, are normalised
    and projected to keys and values; a minibatch is differentiated as a whole.
    """
    import numpy as np
    import torch
    from kernels.windows import MASKED

    from transformer import Attention

    class TextbookAttention(Attention):
        """Multi-head attention that projects every memory item of every sample."""

        def forward(self, x, items, memory, norm):
            """Return what `Attention.forward` returns, with keys and values of every item of every sample."""
            places, heads, head_dim = items.shape[0], self.num_heads, self.head_dim
            if norm is not None:
                items = items * norm.weight + norm.bias
            query = memory.to_places(self.query(x)).view(places, heads, 1, head_dim)
            key = torch.nn.functional.linear(items, self.key.weight).view(places, -1, heads, head_dim)
            value = torch.nn.functional.linear(items, self.value.weight).view(places, -1, heads, head_dim)
            scores = (query @ key.permute(0, 2, 3, 1)).squeeze(2) / x.shape[1] ** 0.5  # (places, heads, K)
            weights = scores.masked_fill(~memory.mask, MASKED).softmax(dim=-1)
            context = (weights[:, :, None] @ value.transpose(1, 2)).reshape(places, -1)  # (places, D)
            context = context if memory.slot is None else context[memory.slot]  # (N, D)
            return self.out(context * memory.nonempty), weights

    transformer, timeline = trainer.model.transformer, trainer.buffer.timeline
    store = trainer.buffer.observations.frames
    for block in transformer.blocks:
        block.attention.__class__ = TextbookAttention
    if transformer.encoding == "absolute":
        transformer.encoding = "learned"  # these items are kept as they are, encoded and normalised when they are read
    trainer.buffer.per_group, timeline.stretch, timeline.narrow, timeline.in_place = 1, 0, False, False
    trainer.parts, trainer.map_parts = 1, map

    def gather(index) -> tuple[torch.Tensor, int, torch.Tensor]:
        """Return a frame per sample; the first of each come first, as auxiliary tasks expect the distinct ones."""
        distinct, first = np.unique(index, return_index=True)
        order = np.concatenate((first, np.delete(np.arange(len(index)), first)))
        frames = store.frames[torch.from_numpy(index[order]).to(trainer.device)].permute(0, 3, 1, 2)
        return frames, len(distinct), torch.from_numpy(np.argsort(order)).to(trainer.device)

    if store is not None:
        store.gather = gather


# -------------------------------------------------------------------------------------------- environments on their own


def measure_environments(config: Config) -> dict[str, float]:
    """Return steps per second of the environments alone, under random actions, for several layouts."""
    import numpy as np

    from utils import reason_of
    from worker import inspect_environment

    (task, _), n_workers = inspect_environment(config.environment), config.n_workers
    generator, shape = np.random.default_rng(1), (64, n_workers, task.action_size)
    actions: np.ndarray
    if task.continuous:
        actions = generator.standard_normal(shape, dtype=np.float32)
    else:
        actions = generator.integers(0, task.branches, shape)
    results = {}
    for processes in sorted({1, cores(), 2 * cores(), n_workers}):
        say(f"{processes} processes")
        rate = measure_workers(config, task, processes, actions)
        results[f"shared memory, {processes} processes, steps/s"] = rate
    say("one process per environment over pipes")
    try:
        results["pipes, a process per environment, steps/s"] = measure_pipes(config, task, actions)
    except Exception as error:  # whatever Gymnasium's processes make of an environment, such as one with its own ones
        say(f"not measured ({reason_of(error)})")
    return results


def measure_workers(config: Config, task, processes: int, actions) -> float:
    """Return steps per second of this project's workers."""
    from functools import partial

    from utils import training_seed
    from worker import Workers

    environment = config.environment
    workers = Workers(environment, task, config.n_workers, partial(training_seed, 1, environment), processes)
    workers.start()

    def step(chosen) -> None:
        workers.send(workers.groups[0], permitted(chosen, workers.arrays.masks, task.branches))
        workers.receive(workers.groups[0])

    try:
        return rate_of(step, actions)
    finally:
        workers.close()


def measure_pipes(config: Config, task, actions) -> float:
    """Return steps per second of Gymnasium's vector environment with observations pickled through pipes."""
    from functools import partial

    from gymnasium.vector import AsyncVectorEnv

    from utils import create_env

    make = partial(create_env, config.environment)
    vector = AsyncVectorEnv([make] * config.n_workers, shared_memory=False, context="forkserver")
    info = vector.reset(seed=1)[1]
    single = actions.shape[2] == 1 and actions.dtype.kind == "i"

    def step(chosen) -> None:
        nonlocal info
        chosen = permitted(chosen, info.get("action_mask"), task.branches)
        info = vector.step(chosen[:, 0] if single else chosen)[4]

    try:
        return rate_of(step, actions)
    finally:
        vector.close(terminate=True)


def permitted(actions, masks, branches: tuple[int, ...]):
    """Return actions (n, branches) with the first allowed one in place of each that the masks (n, choices) forbid."""
    import numpy as np

    if masks is None:
        return actions
    rows, parts = np.arange(len(actions)), np.split(masks, np.cumsum(branches)[:-1], axis=1)
    chosen = zip(parts, actions.T, strict=True)
    return np.stack([np.where(part[rows, branch], branch, part.argmax(axis=1)) for part, branch in chosen], axis=1)


def rate_of(step, actions) -> float:
    """Return environment steps per second of a function that steps all environments; median of five stretches."""
    rates = []
    for _ in range(6):
        started = time.perf_counter()
        for chosen in actions:
            step(chosen)
        rates.append(actions.shape[0] * actions.shape[1] / (time.perf_counter() - started))
    return statistics.median(rates[1:])


def say(what: str) -> None:
    """Show what is being measured."""
    print(f"{what} …", file=sys.stderr, flush=True)


if __name__ == "__main__":
    command_line(main)
