"""Engines: each generates completions with one policy at a time.

base                 what an engine is given and returns
vllm_engine          vLLM; the only file that imports it
transformers_engine  transformers, where vLLM cannot be installed
scripted             completions from a script, for tests
process              an engine in a process of its own
child                how that process is started, and how it ends
worker               what runs in it
replies              what it answers, as JSON
"""
