"""How the miniature's base models were made from nothing; the results stand in data/mini."""
