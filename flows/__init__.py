"""The outermost layer: the Prefect flows, the command line, and what a user sees of them.

cli             the entry of `grpo`: nothing is imported from the current directory
app             finds the module of the command that is asked for
crash           how a command ends; one that failed with one message and exit code 2
commands        the commands, one per file
report          the page of `grpo report`
planning        what a run would do, before it does it
schedule        schedules over Prefect's deployments
train           the Prefect flow that trains: one task for each stage
rescore         the flow of `grpo rescore`
audit           the flow of `grpo audit`; a warning fails it
evaluate        the flow of `grpo stage evaluate`
training        the training of a run, with or without Prefect
flow_runs       what Prefect is told of a run; flow runs that have died
notes           notes about a run in its logs, which no result depends on
reporter        who is told of a run while it goes on
tracking        experiment trackers, which are told of each iteration
watching        what Prefect's page shows of a run while it goes on
events          the events that Prefect is told of runs
artifacts       artifacts on Prefect's server, created by a thread
session         what lives as long as a run: engine, trainer, reward processes
brakes          what follows from checks: warnings, a held run, room for a repaired one
prepare         loads and checks the config of a run, once
background      background tasks, which run while the engine samples
rescoring       scores stored completions again, for the command and the flow
one_stage       runs one stage of one iteration, for the command and the flow
replayer        computes stored artifacts again and compares them
comparison      prints a comparison of two scorings
printing        rows as table, JSON lines or CSV; numbers, paths, digests
progress        the bar and the lines that a user sees during a run
environment     environment variables, set before torch and Prefect are imported
prefect_server  Prefect's temporary server, and what its death does to a command
"""
