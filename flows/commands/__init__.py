"""The commands of `grpo`: each file has one, a function named like the file, and what it does.

`WRITES` says whether it writes anything: a command that only looks ends without a word when its reader goes, as `head`
does. What takes long to import is imported inside the functions, so that `grpo --help` stays fast.

options       what several commands share: types of their arguments, signals, exit code 1
run           train a policy
fork          a new run from a policy of another one
stage         one stage of one iteration
starter       the small model that a config describes
rescore       new rewards and advantages over stored completions
import_       completions written elsewhere
reward        `reward try`: a handful of completions, scored while a reward is written
reward_model  a reward model from preferences
diff          where two runs part, or two scorings
whatif        what another normalization would have changed
verify        is a run what it says it is
replay        stored artifacts, computed again
tokens        what an update made of each token
audit         reward hacking, leaks, broken training
lineage       what was made from what
report        one HTML file about a run
prune         drop older weights
ls            runs, or the artifacts of one
rows          rows of a dataset
show          one group, to be read
groups        one row per group
metrics       one row per iteration
schema        datasets and columns, and what they mean
"""
