"""From pure functions to compiled steps: trace, lower by rules, compile, call."""
