"""Acting with trained agents, statistics of what they reach, and watching them."""

from evaluation.agent import Agent as Agent
