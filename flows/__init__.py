"""The outermost layer: the Prefect flow, the command line, and what a person sees of them.

cli.py             `grpo`: finds the module of the command that is asked for
commands/          the commands, a file each
report/            the page of `grpo report`
train.py           the Prefect flow that trains: one task for each stage
session.py         what lives as long as a run: engine, trainer, reward processes
background.py      tasks that run while the engine samples
replayer.py        stored artifacts, computed again and compared
comparison.py      how two scorings of the same completions are printed
printing.py        rows as table, JSON lines or CSV; numbers, paths, digests
progress.py        the bar and the lines that a person sees while a run goes on
environment.py     environment variables, set before torch and Prefect are imported
prefect_server.py  ends Prefect's temporary server after a kill -9
"""
