"""The commands of `grpo`: each file has one, a function with the file's name.

`WRITES` says whether the command writes: a read-only command ends silently when its reader closes the pipe, as `head`
does. Functions import slow modules themselves, so that `grpo --help` stays fast.

options       what several commands share: types of their arguments, signals, exit code 1
run           train a policy
plan          what a run would do, before it does it
fork          a new run from a policy of another one
stage         one stage of one iteration
starter       the small model that a config describes
rescore       new rewards and advantages over stored completions
import_       completions written elsewhere
reward        `reward try`: scores a few completions while a reward is written
reward_model  a reward model from preferences
diff          where two runs, or two scorings, differ
whatif        what another normalization would have changed
verify        checks files, chain and meaning of a run
replay        computes stored artifacts again
tokens        what an update made of each token
check         the checks of a config over a run's rows
audit         reward hacking, leaks, broken training
lineage       what was made from what
report        one HTML file about a run
prune         drop older weights
ls            runs, or the artifacts of one
rows          rows of a dataset
show          one group: its prompt and its completions
groups        one row per group
metrics       one row per iteration
schema        datasets and columns, and what they mean
server        the Prefect server of this machine
worker        runs what schedules want
schedule      runs at set times, or when data has changed
alert         webhooks that are called when somebody is needed
"""
