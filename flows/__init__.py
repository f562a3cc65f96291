"""The outermost layer: the Prefect flow, the command line, and what a person sees of them.

cli             `grpo`: finds the module of the command that is asked for
commands        the commands, a file each
report          the page of `grpo report`
train           the Prefect flow that trains: one task for each stage
session         what lives as long as a run: engine, trainer, reward processes
prepare         a run about to be trained: its config loaded and checked, once
background      tasks that run while the engine samples
replayer        stored artifacts, computed again and compared
comparison      how two scorings of the same completions are printed
printing        rows as table, JSON lines or CSV; numbers, paths, digests
progress        the bar and the lines that a person sees while a run goes on
environment     environment variables, set before torch and Prefect are imported
prefect_server  ends Prefect's temporary server after a kill -9
"""
