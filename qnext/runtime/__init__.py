"""Running compiled steps for many sequences: effects live here."""
