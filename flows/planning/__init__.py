"""What a run would do, before it does it.

rehearsal   the flow's own loop with a session that decides and computes nothing
planned     what a run does about an artifact, and why
stand_ins   what stands for the moving parts of a run meanwhile
estimate    seconds and bytes, as measured in the manifests of a run
plan        the plan: artifacts, what stops the run, totals; as a document for programs
ranges      the plan in lines for people: iterations with the same verdicts in one
"""
