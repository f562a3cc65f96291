"""Experiment trackers: each a few lines over its own library, imported when a run has something to log.

reporter     tells the trackers of a run what they do not have yet
base         what a tracker is, and what it is told
trackio      figures and traces in Trackio
tensorboard  figures and texts in TensorBoard's event files
wandb        figures and tables in Weights & Biases
mlflow       figures and CSV files in MLflow
"""
