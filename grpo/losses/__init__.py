"""Losses: each a function of `LossInputs` that returns the tokens' losses, and why a token has no gradient.

base          what a loss is given and returns
clip          PPO's clip, with separate bounds and the dual clip
soft          SAPO, LUFFY's shaping: gradients that fade without an edge
likelihood    REINFORCE, CISPO, TOPR, VESPO: constant factors of the log probability
sequence      GSPO, GSPO-token, LUSPO, GMPO: one ratio for a row
trust_region  DPPO: bounds on the probability itself
options       the losses by name, and the table [update.loss] from their signatures
chosen        the loss that a config names
"""
