"""Rollouts: how prompts become completions.

base         the rollout protocol; requests, seeds and texts
single_turn  one engine request for each completion
"""
