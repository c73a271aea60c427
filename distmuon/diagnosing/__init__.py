"""What is wrong with these machines, and what to do about it? (``distmuon doctor``)."""
