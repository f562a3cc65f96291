"""`grpo verify`: what can be derived from files is derived anew, and compared with what is stored.

verify       all checks of a run, in order
ledger       what the checks write into: tallies, wrong rows; rules on rows, comparison of rows
files        the catalog of a run; bytes, hashes, counts and schemas against the manifests
inputs       manifests against their inputs, back to the first prompt, and against the config
checkpoints  policies and optimizer states against those before them
rows         prompts and completions by themselves: ids, splits, lengths, tokens, texts, endings
plan         ids, seeds, settings and policies that follow from prompts and config
derived      rewards, advantages, batches, training records and metrics from their inputs
tokens       recorded tokens against the batches' rows and the numbers of their own row
logprobs     --deep: log probabilities by the trainer's model
"""
