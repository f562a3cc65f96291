"""Trainers: each keeps a model and its optimizer from one update to the next.

base    the trainer protocol
local   a trainer in this process
resume  bringing a trainer to a policy of the run
"""
