"""The algorithm: torch, transformers and polars expressions. It knows no files but checkpoints.

settings         the table [update]: what decides an update besides rows and weights
strict           the base of this package's tables
losses           the per-token losses, chosen by name
correction       weights for the difference between sampler and proximal policy, chosen by kind
options          config tables from the signatures of functions
kl               estimators of a KL divergence
advantages       rewards of a group -> advantages
groups           groups of rewards and their statistics
combine          several rewards -> one per completion
aggregation      means over tokens, as denominators of rows
batching         rows -> microbatches, trainable tokens, logprobs over the whole vocabulary
collate          rows -> tensors
logprobs         log probabilities through a chunked head
policy_logprobs  log probabilities of rows under a policy
train_step       the update: rows in, changed weights and records out
optimizer        AdamW, its schedule and its file
records          what the update did with each row
policy           loading and saving a checkpoint
weight_files     which files of a checkpoint are loaded
"""
