"""Play a file of export.py with onnxruntime and NumPy alone: `Player` is an example to copy.

    python -m tools.play_onnx agent.onnx 100000

plays an episode, by its reset seed, in the environment that the agent learned in, for which this repository is needed.
"""

import json
import sys
from typing import Any

import numpy as np
import onnxruntime


class Player:
    """A trained agent in one environment, with its memory; it draws its actions by a seed."""

    def __init__(self, path: str, seed: int = 0) -> None:
        self.session = onnxruntime.InferenceSession(path)
        about = self.session.get_modelmeta().custom_metadata_map
        self.inputs, self.outputs = json.loads(about["inputs"]), json.loads(about["outputs"])
        self.environment, self.random = json.loads(about["environment"]), np.random.default_rng(seed)

    def reset(self) -> None:
        """Begin an episode."""
        self.step, self.memory = 0, np.zeros(self.inputs.get("memory", ["", [0]])[1])

    def act(self, observation: Any, mask: np.ndarray | None = None) -> np.ndarray:
        """Return the action for a frame, a vector, or a dict of both, as `env.reset` and `env.step` return them."""
        given = observation if isinstance(observation, dict) else {"frame": observation, "vector": observation}
        given = given | {"memory": self.memory, "step": self.step, "mask": True if mask is None else mask}
        feed = {k: np.broadcast_to(np.asarray(given[k], kind), [1, *shape]) for k, (kind, shape) in self.inputs.items()}
        results = dict(zip(self.outputs, (array[0] for array in self.session.run(None, feed)), strict=True))
        self.step, self.memory = self.step + 1, results.get("next_memory")
        if "mean" in results:
            return results["mean"] + np.exp(results["log_std"]) * self.random.normal(size=results["mean"].shape)
        branches = [results[name] for name in self.outputs if name.startswith("logits")]
        return np.array([(logits + self.random.gumbel(size=logits.shape)).argmax() for logits in branches])


def main() -> None:
    """Play an episode and print how it went."""
    from environments import SECTIONS

    player = Player(sys.argv[1])
    env = SECTIONS[player.environment["type"]](**player.environment).create()
    player.reset()
    (observation, info), ended = env.reset(seed=int(sys.argv[2])), False
    while not ended:
        observation, _, terminated, truncated, info = env.step(player.act(observation, info.get("action_mask")))
        ended = terminated or truncated
    print(*(f"{name} {value}" for name, value in info.items()), sep=", ")


if __name__ == "__main__":
    main()
