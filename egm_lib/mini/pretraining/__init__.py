"""How the miniature's base models were trained from nothing; the models are in data/mini."""
