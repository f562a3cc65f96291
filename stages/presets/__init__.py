"""Presets: the settings of a method as its paper has them, under a name for ``preset`` in a config.

merge  a config's tables over those of its preset

Each is a TOML file here: grpo_original, dr_grpo, dapo, gspo, cispo, sapo, rloo, reinforce_pp_baseline, scale_rl.
"""
