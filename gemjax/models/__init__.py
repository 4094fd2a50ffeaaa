"""Rankers: Wukong and the baselines on the same interface."""

from gemjax.models.ranker import MODELS, Ranker

__all__ = ["MODELS", "Ranker"]
