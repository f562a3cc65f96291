"""The stages: each reads finished datasets and writes one. Who reads what stands in pipeline/chain.py.

prompts           a task or a dataset -> the prompts of an iteration
generate          prompts and policies -> groups of completions
score             completions -> rewards
normalize         rewards -> advantages
batch             completions and advantages -> the training order
update            batches and a policy -> the next policy
optimizer         the optimizer's state after an update
evaluate          held-out prompts and a policy -> scored completions
policy            a checkpoint -> the policy that a run begins with
importing         completions written elsewhere -> prompts and completions
config            the configuration of a run
wiring            the stages bound to a run: config, inputs, places
preflight         what can be known to be wrong before anything starts
custom_functions  losses, baselines and scales of the user's, and their sources
members           the policies that write the completions of a group
checkpoints       what a checkpoint's directory says of itself, without torch
sources           tasks, files and hub datasets; the held-out split
tables            tables that users bring
engines           what samples tokens
rollout           who talks with the engine
trainers          what trains
rewards           reward functions: finding, running, identity; the library
reward_model      training a reward model from preferences
starter           a small model of our own
inspect           what reads finished artifacts and says something about them
"""
