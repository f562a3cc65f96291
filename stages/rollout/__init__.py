"""Rollouts: how prompts become completions.

base         what a rollout is; requests, seeds and texts
single_turn  the engine is asked once for each completion
"""
