"""Measuring servers: load for any that speaks OpenAI's API, and what came of it."""
