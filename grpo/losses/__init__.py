"""Losses: each a function of `LossInputs` that returns the tokens' losses, and why a token has no gradient.

base     what a loss is given and returns
clip     PPO's clip, with separate bounds and the dual clip
chosen   the losses by name
options  their settings, one class each, without torch
"""
