"""Advantages: a baseline and a scale, each a function of groups, chosen by name.

estimate   rewards -> advantages, with reasons for dropping rows
baselines  what a reward is measured against
scales     what an advantage is divided by
"""
