"""Checks of an iteration's rows before they train: `[[checks]]`, what they say, and what follows from that.

config      the tables of [[checks]], and the file that several runs share
conditions  checks by an SQL condition
shipped     the checks that ship
outcome     what a check returns, and the rows of the dataset `checks`
"""
