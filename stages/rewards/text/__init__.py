"""Rewards that read a text alone, without a model.

relevance  does it speak of the prompt?
grounding  does it keep to its source?
fluency    repetition and language
surface    form of the writing
"""
