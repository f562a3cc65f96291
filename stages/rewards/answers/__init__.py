"""Rewards of completions that have a reference or a form to keep.

matching             equal or overlapping texts
numeric              equal numbers
plain_numbers        numbers of any writing as plain ones
choice               multiple choice
symbolic             mathematical expressions
extraction           where in an answer its mathematics stand
reading              what they say: an expression, words, a number in a base, a quantity
latex                their LaTeX as the parser reads it whole
units                units of measure
parser               LaTeX to sympy
equality             whether two readings say the same
facts                facts that must be named
format               form and length
reasoning_gym        the verifiers of reasoning-gym
reasoning_gym_tasks  calls them, in the worker or inside of the sandbox
ratings              what people said about stored completions
time_limit           ends what computes without end
answer_part          the part of a completion that holds its answer
"""
