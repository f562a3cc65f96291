"""A language model as a judge, behind an OpenAI-compatible server.

judge     the reward function
config    its settings
prompt    what the judge is asked
verdict   what its answer means
client    requests, retries, limits
response  what the server sent: bounded, without the API key
cache     judgements on disk
"""
