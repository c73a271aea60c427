"""How state moves: what loading needs beyond torch, and the formats of other Muons."""
