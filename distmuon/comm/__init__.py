"""How it gets there and back: the only room that knows DTensor and process groups."""
