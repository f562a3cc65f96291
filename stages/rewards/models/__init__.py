"""Rewards by frozen models.

embedding         likeness of embeddings
perplexity        fluency by a language model
entailment        grounding by an entailment model
preference_model  a reward model's score
classifier        classifiers in torch
frozen_models     loading and running them
model_identity    the digest of a model's files
"""
