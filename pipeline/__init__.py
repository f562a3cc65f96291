"""Plumbing: Arrow, polars, files and hashes. No torch, no vLLM, no Prefect; it imports nothing of the other packages.

chain         the list of stages, from which everything that names a stage or a dataset is derived
schema        the columns of every dataset
conformance   do rows have the columns of their schema?
config        strict TOML; which settings stand in a recipe
errors        every error that a user can meet
files         atomic writes, hashes, locks, full devices
processes     child processes that die with their parent
manifest      what manifest.json holds: recipe, content, digest
artifact      reading finished artifacts, verified
writer        writing artifacts: parts first, the manifest last
stage         stages: recipe, reuse, refusal
functions     functions that a config names as module:function
provenance    versions, commit, processor
run_dir       the names inside a run directory
runs          runs by path or URL: opening, locking, publishing
lineage       what was made from what
prune         dropping weights, never rows
object_store  objects below a URL, through fsspec
working_copy  a run on an object store and its copy here
fetch         bringing the files of an artifact from an object store
store_lock    the lock of a run on an object store
"""
