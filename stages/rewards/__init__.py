"""Reward functions: the machinery here, the library in the folders. The families do not import each other.

base       what a reward function is
functions  finding one; its shape and identity
scorer     what each function is shown
pool       processes for functions that may hang or die
worker     the child's side of such a process
results    rewards, errors and details as rows
frames     what functions over a frame return
words      words, stop words and sentences, for several families
answers    completions with a reference
text       what can be read off a text
models     frozen models that score
judge      a language model that judges
code       programs, run in a sandbox
"""
