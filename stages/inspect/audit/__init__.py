"""`grpo audit`: what a run's own rows say about reward hacking, leaks and broken training.

audit       all checks of a run, in the order of the report
by_name     one check over one iteration, for [[checks]]
thresholds  the config: a table for each check
findings    what a check returns, and the report of all
run_rows    the rows of a run as the checks read them
rewards     checks: length, one part alone, one policy alone
phrases     check: a phrase that is rewarded and spreads
outcomes    checks: saturation, completions against references, prompts that are lost again
text        checks: duplicates, repetition, empty form
leaks       checks: completions that need not be found
training    checks: jumps, cut and timed-out completions, held-out against training
"""
