"""The stages: each reads finished datasets and writes one. pipeline/chain.py says who reads what.

prompts           a task or a dataset -> the prompts of an iteration
generate          prompts and policies -> groups of completions
score             completions -> rewards
logprobs          completions and policies -> the log probabilities under each
normalize         rewards -> advantages
check             the rows of an iteration -> what the run's checks say of them
batch             completions and advantages -> the training order
update            batches and a policy -> the next policy
optimizer         the optimizer's state after an update
evaluate          held-out prompts and a policy -> scored completions
policy            a checkpoint -> the policy that a run begins with
importing         completions written elsewhere -> prompts and completions
config            the configuration of a run
wiring            the stages bound to a run: config, inputs, places
presets           methods of papers as settings, by name
preflight         checks before anything starts
disk              what a run will take of the disk
custom_functions  the user's losses, baselines and scales, and their sources
tracking          which experiment trackers are told of a run
members           the policies that write the completions of a group
checkpoints       reading a checkpoint's directory, without torch
sources           tasks, files and hub datasets; what an iteration draws
source_rows       what a row may hold, its identity; the held-out split
encoding          conversations and texts -> token ids
probe             what may never end, tried in a process of its own
tables            tables that users bring
ngrams            texts as words, characters and short sequences of them
engines           what samples tokens
rollout           who talks with the engine
trainers          what trains
checks            the checks: their config, conditions, those that ship
rewards           reward functions: finding, running, identity; the library
reward_model      training a reward model from preferences
starter           a small model of our own
inspect           reads finished artifacts and reports on them
"""
