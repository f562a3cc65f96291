"""Reads finished artifacts and reports on them. No other module of stages imports from here.

metrics        an iteration as one row of metrics.parquet, and the expressions that measure it
report_data    a run for `grpo report`: measures by iteration, distributions
report_groups  the groups that the report shows, completion by completion, token by token
run_diff       where two runs differ first: settings, recipe, row
artifact_diff  how much two artifacts of the same recipe differ: rows, tensors, files
scoring_diff   what another reward or normalization of the same completions would have changed
verify         are the rows what the manifests, the inputs and the config say?
audit          do the rows look like reward hacking, leaks or broken training?
"""
