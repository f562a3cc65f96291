"""A small model of our own: made, warmed up and saved without a model hub.

starter    the stage and its config
teacher    the careless teacher's sums
tokenizer  the words of the task, digits one by one, bytes for all else
warm_up    supervised training
"""
