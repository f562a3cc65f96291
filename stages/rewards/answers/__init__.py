"""Rewards of completions that have a reference or a form to keep.

matching             equal or overlapping texts
numeric              equal numbers
choice               multiple choice
symbolic             mathematical expressions
facts                facts that must be named
format               form and length
reasoning_gym        the verifiers of reasoning-gym
reasoning_gym_tasks  calls them, in the worker or inside of the sandbox
ratings              what people said about stored completions
time_limit           ends what computes without end
answer_part          the part of a completion that holds its answer
"""
