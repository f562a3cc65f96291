"""Plumbing: Arrow, polars, files and hashes. It imports no torch, vLLM or Prefect, and none of the other packages.

chain         the list of stages, from which everything that names a stage or a dataset is derived
schema        the columns of every dataset
columns       how a column is written down; those that several datasets have
conformance   checks rows against their schema
config        strict TOML; which settings are part of a recipe
errors        every error that a user can see
files         atomic writes, hashes, locks, full devices
owner         who writes a directory: the note next to its lock
reading       names, files and JSON that others wrote, within limits
parquet       what rows would take, known before they are decoded
processes     child processes that die with their parent
clock         time limits that count work, and figures per second
wire          messages of a process that is not trusted
manifest      what manifest.json holds: recipe, content, digest
artifact      reads and verifies finished artifacts
writer        writes artifacts: parts first, the manifest last
stage         stages: recipe, reuse, refusal
conditions    SQL conditions over rows, which can read nothing else
functions     functions that a config names as module:function
text          text that others wrote, made visible for people
provenance    versions, commit, processor
run_dir       the names inside a run directory
runs          runs by path or URL: opening, locking, publishing
lineage       what was made from what
prune         drops weights, never rows
retention     which weights stay
object_store  objects below a URL, through fsspec
working_copy  the local copy of a run on an object store
fetch         downloads an artifact's files from an object store
store_lock    the lock of a run on an object store
"""
