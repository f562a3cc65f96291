"""The commands of `grpo`: each file has one, a function named like the file, and what it does.

`WRITES` says whether it writes anything: a command that only looks ends without a word when its reader goes, as `head`
does. What takes long to import is imported inside the functions, so that `grpo --help` stays fast.

options.py       what several commands share: types of their arguments, signals, exit code 1
run.py           train a policy
fork.py          a new run from a policy of another one
stage.py         one stage of one iteration
starter.py       the small model that a config describes
rescore.py       new rewards and advantages over stored completions
import_.py       completions written elsewhere
reward.py        `reward try`: a handful of completions, scored while a reward is written
reward_model.py  a reward model from preferences
diff.py          where two runs part, or two scorings
whatif.py        what another normalization would have changed
verify.py        is a run what it says it is
replay.py        stored artifacts, computed again
tokens.py        what an update made of each token
audit.py         reward hacking, leaks, broken training
lineage.py       what was made from what
report.py        one HTML file about a run
prune.py         drop older weights
ls.py            runs, or the artifacts of one
rows.py          rows of a dataset
show.py          one group, to be read
groups.py        one row per group
metrics.py       one row per iteration
schema.py        datasets and columns, and what they mean
"""
