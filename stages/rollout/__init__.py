"""How completions come about: `base` says what a rollout is, `single_turn` asks the engine once."""
