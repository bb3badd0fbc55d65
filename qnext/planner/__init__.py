"""How a model would do on many cards, on paper: memory, links, time for a token; the best plan."""
