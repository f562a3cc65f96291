"""Schedules: what runs when, over Prefect's deployments, one process work pool and one concurrency limit per device.

spec         what a schedule is: which config, when, what it does; from the command line or schedules.toml
triggers     whether the data that a schedule waits for has changed, by content
record       what a schedule remembers of its last run that worked; next to the run
actions      which command of `grpo` a firing is
child        runs that command in a process of its own, and ends it with all its children
scheduled    the Prefect flow of every schedule
client       a client of the server; the work pool and the limits of the devices
deployments  schedules on a Prefect server: read, put, paused, run, cancelled, removed
export       schedules as a prefect.yaml
firings      flow runs whose process was killed get an end
diff         what `grpo schedule apply` would change
alerts       what an alert is: which webhook is called, and of which events
automations  alerts on a Prefect server; what ends flow runs that have died
local        the Prefect server of this machine: started, found, ended
"""
