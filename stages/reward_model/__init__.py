"""Reward models, trained from preferences.

reward_model     the stage and its config
preferences      preferences from files and runs
preference_loss  the Bradley-Terry loss and its training
"""
